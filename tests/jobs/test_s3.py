"""A study in an object store: a real S3 server, and the bits of the local run."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from urllib.parse import quote

import httpx
import pytest
from pyarrow.fs import LocalFileSystem, copy_files
from sae_ray.jobs import study
from sae_ray.jobs.cluster import free_port

from sae_ray.store.activations import ActivationStore, finished_parts, read_parts
from sae_ray.store.files import Folder
from sae_ray.study.config import Study
from sae_ray.study.plan import StudyPlan
from sae_ray.study.root import remember
from tests.machine import until

REPORT_DIFFERS = ("index.html", "report.json")
"""They tell of times and places."""


@pytest.fixture(scope="module")
def bucket(tmp_path_factory) -> Iterator[str]:
    """Makes addresses of an empty bucket."""
    port = free_port()
    log = tmp_path_factory.mktemp("s3") / "log"
    with log.open("w") as output:
        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
        server = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
    address = f"http://127.0.0.1:{port}"

    def serves() -> bool:
        try:
            return httpx.get(f"{address}/moto-api/").status_code == 200
        except httpx.TransportError:
            return False

    try:
        until(serves)
        httpx.put(f"{address}/study").raise_for_status()
        # The key is a part of the address, so that every worker of the cluster knows it.
        yield f"s3://testing:testing@study/{{}}?endpoint_override={quote(address, safe='')}&region=us-east-1"
    finally:
        server.kill()
        server.wait()


def contents(folder: Folder) -> dict[str, bytes]:
    return {name: folder.read_bytes(name) for name in folder.files(recursive=True) if not name.startswith(".ray")}


def test_a_killed_study_in_a_store_resumes_to_the_bits_of_the_local_one(
    ray_cluster, bucket, finished, make_plan, world, study_values, kill_driver_when, capsys
):
    images = {name: bucket.format(f"images/{name}") for name in ("train", "heldout")}
    for name, uri in images.items():
        target = Folder(uri)
        copy_files(str(world / name), target.path, LocalFileSystem(), target.filesystem)
    overrides = {f"images.{name}.path": uri for name, uri in images.items()}
    plan = StudyPlan(Study.from_dict(study_values, overrides), Folder(bucket.format("root")))
    local = make_plan(finished)
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
    assert "s3://study/root" in shown
    assert "testing" not in shown, "no key is shown"
    for ours, theirs in zip(plan.steps, local.steps, strict=True):
        assert ours.name == theirs.name
        mine, other = contents(ours.folder), contents(theirs.folder)
        assert len(mine) == len(other)
        for name in other:
            if name.startswith("data/") or name in ("parts.parquet", "step.json"):
                continue
            assert mine[name] == other[name], (ours.label, name)
        if ours.stage == "extract":
            values = [sorted(data for name, data in one.items() if name.startswith("data/")) for one in (mine, other)]
            assert values[0] == values[1], ours.label
    mine, other = contents(plan.root / "report"), contents(local.root / "report")
    assert mine.keys() == other.keys()
    assert [name for name in other if mine[name] != other[name]] == list(REPORT_DIFFERS)


def test_status_from_anywhere_needs_the_store_alone(bucket, ran, tmp_path):
    """Neither a cluster, nor the study file, nor the images, nor anything in the user's home."""
    shown = subprocess.run(
        [sys.executable, "-m", "sae_ray.jobs.cli", "status", "--root", str(ran.root)], capture_output=True, text=True
    )
    root = Folder(bucket.format("elsewhere"))
    copy_files(str(ran.root), root.path, LocalFileSystem(), root.filesystem)
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
