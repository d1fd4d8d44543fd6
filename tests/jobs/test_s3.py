"""A study in an object store: a real S3 server, and the bits of the local run."""

import json
import os
import subprocess
import sys
from pathlib import Path

from sae_ray.jobs import study

from sae_ray.store.activations import ActivationStore, finished_parts, read_parts
from sae_ray.store.files import Folder
from sae_ray.study.config import Study
from sae_ray.study.plan import StudyPlan
from sae_ray.study.root import remember
from tests.object_store import KEY, upload
from tests.roots import differences


def in_store(bucket: str, world: Path) -> dict[str, str]:
    """Puts the images and models of the study into a bucket; the fields that name them."""
    local = {"images.train.path": "train", "images.heldout.path": "heldout", "encoder.model": "clip"}
    uris = {field: upload(world / name, bucket.format(f"world/{name}")) for field, name in local.items()}
    judge = upload(world / "judge", bucket.format("world/judge"))
    return uris | {"judge.model": f"open_clip:local-dir:{judge}"}


def test_a_killed_study_in_a_store_resumes_to_the_bits_of_the_local_one(
    ray_cluster, bucket, finished, make_plan, world, study_values, kill_driver_when, capsys
):
    """Images, models and results are in the store; steps are named as those of the local models."""
    plan = StudyPlan(Study.from_dict(study_values, in_store(bucket, world)), Folder(bucket.format("root")))
    remember(plan)
    step = next(one.step for one in plan.extracts if one.images.name == "train")
    two = ["--set", "resources.extract.workers=2"]
    kill_driver_when(["run", "--root", plan.root.uri, *two], lambda: len(finished_parts(step.folder)) >= 2)
    survived = {part.file for part in read_parts(step.folder)}
    assert 2 <= len(survived) < 10
    assert step.status() == "partial"

    summary = study.run(plan)
    listed = {part.file for part in ActivationStore(step.folder).parts.values()}
    assert survived <= listed, "a finished part was done again"
    assert not finished_parts(step.folder), "the markers are no longer needed"
    assert {f"data/{name}" for name in (step.folder / "data").files()} == listed
    shown = f"{study.summary_text(plan, summary)}{summary}{capsys.readouterr().err}"
    shown += (plan.root / "report").read_bytes("index.html").decode()
    assert "s3://study/root" in shown
    assert "s3://study/world/clip" in shown
    assert KEY not in shown, "no key is shown"
    assert KEY not in str([one.record() for one in plan.steps]), "nor recorded"
    assert not differences(plan, make_plan(finished))


def test_status_from_anywhere_needs_the_store_alone(bucket, ran, tmp_path):
    """Neither a cluster, nor the study file, nor the images, nor anything in the user's home."""
    shown = subprocess.run(
        [sys.executable, "-m", "sae_ray.jobs.cli", "status", "--root", str(ran.root)], capture_output=True, text=True
    )
    root = Folder(upload(ran.root, bucket.format("elsewhere")))
    memory = root.read_bytes("study.json").decode()
    for name in ("train", "heldout"):
        path = json.loads(memory)["study"]["images"][name]["path"]
        memory = memory.replace(path, f"s3://no-such-bucket/{name}")
    root.write_bytes("study.json", memory.encode())
    bare = {"HOME": str(tmp_path), "PATH": os.environ["PATH"]}
    (tmp_path / "here").mkdir()
    command = [sys.executable, "-m", "sae_ray.jobs.cli", "status", "--root", root.uri]
    done = subprocess.run(command, cwd=tmp_path / "here", env=bare, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == shown.stdout
    assert done.stdout.count("done") == len(done.stdout.splitlines()) > 5
    assert [path.name for path in tmp_path.iterdir()] == ["here"]
