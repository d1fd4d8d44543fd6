"""What users see: commands, refusals, exit codes. In this process, but for what only a process can show."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from sae_ray.jobs.cli import SECTIONS, main

from sae_ray.study.root import remember
from tests.machine import PATIENCE_S

from .conftest import to_toml


@pytest.fixture
def study_file(study_values, tmp_path) -> Path:
    """The small study as TOML text."""
    path = tmp_path / "small.toml"
    path.write_text(to_toml(study_values))
    return path


def call(*arguments) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def refused(result: Result, code: int, *words: str) -> None:
    """A message and the exit code; an error of another kind would be the exception here."""
    assert result.exit_code == code, (result.output, result.exception)
    assert isinstance(result.exception, SystemExit)
    assert "Error: " in result.stderr
    for word in words:
        assert word in result.stderr


def test_missing_folder(study_file, tmp_path):
    result = call("run", study_file, "--root", tmp_path / "root", "--images", tmp_path / "nowhere")
    refused(result, 2, "images.train", str(tmp_path / "nowhere"))
    assert not (tmp_path / "root").exists()


def test_empty_folder(study_file, tmp_path):
    (tmp_path / "empty").mkdir()
    result = call("run", study_file, "--root", tmp_path / "root", "--images", tmp_path / "empty")
    refused(result, 1, "images.train", str(tmp_path / "empty"))
    assert not (tmp_path / "root").exists()


def test_folder_of_broken_images_only(ray_cluster, study_file, tmp_path):
    (tmp_path / "broken").mkdir()
    for number in range(20):
        (tmp_path / "broken" / f"{number}.jpg").write_bytes(b"\xff\xd8\xff broken")
    root = tmp_path / "root"
    result = call("extract", study_file, "--root", root, "--images", tmp_path / "broken")
    refused(result, 1, "20 of 20 images", "0.jpg", "images.max_bad_fraction")
    assert not list(root.glob("activations-train-*/step.json"))
    entries = json.loads(call("status", "--root", root, "--json").stdout)
    reasons = {entry["step"].rsplit("-", 1)[0]: entry["failure"]["reason"] for entry in entries if entry["failure"]}
    assert "activations-train-projection" in reasons
    assert all(reason.startswith("20 of 20 images") and "\n" not in reason for reason in reasons.values())


def test_unknown_encoder(study_file, tmp_path):
    result = call("run", study_file, "--root", tmp_path / "root", "--encoder", "open_clip:ViT-B-33/none")
    refused(result, 2, "ViT-B-33")
    result = call("run", study_file, "--root", tmp_path / "root", "--encoder", tmp_path / "no-model")
    refused(result, 2, str(tmp_path / "no-model"))
    assert not (tmp_path / "root").exists()


def test_layer_out_of_range(study_file, tmp_path):
    result = call("run", study_file, "--root", tmp_path / "root", "--site", "layer5:cls")
    refused(result, 2, "layer is 5", "0 to 4")


def test_k_above_d_sae(study_file, tmp_path):
    refused(call("run", study_file, "--root", tmp_path / "root", "--k", "200"), 2, "200", "d_sae = 128")


def test_expansion_not_above_0(study_file, tmp_path):
    refused(call("run", study_file, "--root", tmp_path / "root", "--expansion", "0"), 2, "expansion", "0")
    refused(call("run", study_file, "--root", tmp_path / "root", "--expansion", "-2"), 2, "expansion", "-2")


def test_unknown_key_suggests_the_nearest(study_file, tmp_path):
    study_file.write_text(study_file.read_text().replace("expansions", "expansion"))
    refused(call("run", study_file, "--root", tmp_path / "root"), 2, "grid.0.expansion", "'expansions'")


def test_a_shipped_study_needs_no_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").mkdir()  # a folder of that name is no study
    options = ("--images", tmp_path / "nowhere", "--root", tmp_path / "root")
    refused(call("run", "demo", *options), 2, "images.train", str(tmp_path / "nowhere"))
    (tmp_path / "demo").rmdir()
    (tmp_path / "demo").write_text("name = 3")
    refused(call("run", "demo", *options), 2, "name = 3")


def test_root_not_writable(study_file, tmp_path):
    (tmp_path / "file").write_text("in the way")
    refused(call("extract", study_file, "--root", tmp_path / "file" / "root"), 2, "--root", str(tmp_path / "file"))


def test_torn_step_directory(finished, study_file, tmp_path):
    root = tmp_path / "root"
    shutil.copytree(finished, root)
    (victim,) = root.glob("sae-projection-batch_topk-*")
    (victim / "sae_weights.safetensors").unlink()
    listed = call("status", study_file, "--root", root)
    assert listed.exit_code == 0
    assert f"torn  {victim.name}" in listed.output
    assert f"{victim} is torn: sae_weights.safetensors should have" in listed.output
    assert "delete the directory" in listed.output
    refused(call("run", study_file, "--root", root), 1, "torn", str(victim))


def test_step_of_another_schema_version(finished, study_file, tmp_path):
    root = tmp_path / "root"
    shutil.copytree(finished, root)
    (victim,) = root.glob("embeddings-heldout-*")
    record = json.loads((victim / "step.json").read_text())
    (victim / "step.json").write_text(json.dumps(record | {"schema_version": 99}))
    refused(call("run", study_file, "--root", root), 1, "schema version 99", str(victim))


def test_a_disk_that_is_too_full(study_file, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**6, 10**6 - 1000, 1000))
    root = tmp_path / "root"
    refused(call("extract", study_file, "--root", root), 1, "extract needs about", "1 kB are free")
    assert not list(root.glob("activations-*"))


def test_another_driver_at_work(study_file, make_plan, tmp_path):
    from sae_ray.store.steps import hold

    plan = make_plan(tmp_path / "root")
    with hold([plan.extracts[0].step]):
        refused(call("extract", study_file, "--root", tmp_path / "root"), 1, "is being written by process")


def test_no_study(tmp_path):
    refused(call("run", "--root", tmp_path), 2, "no study", "--images", "--site alone", "sae-ray studies")
    refused(call("new", tmp_path), 2, "is there already")  # and nothing is asked
    refused(call("run", tmp_path / "none.toml"), 2, "none.toml", "cannot be read")
    refused(call("run", "--set", "seed"), 2, "--set seed", "FIELD=VALUE")


def test_a_relative_root_is_refused_in_a_job(study_file, tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    monkeypatch.chdir(tmp_path)
    refused(call("run", study_file, "--root", "here"), 2, "--root here", "deleted after the job", "absolute path")
    for root in (tmp_path / "root", (tmp_path / "root").as_uri(), "~/root"):
        assert call("status", study_file, "--root", root).exit_code == 0, root


def test_stores_that_cannot_be(study_file, tmp_path):
    refused(call("status", study_file, "--root", "s4://bucket/x"), 2, "s4://bucket/x cannot be opened", "s3://")
    result = call("status", study_file, "--root", tmp_path, "--images", "s4://bucket/x")
    refused(result, 2, "images.train", "s4://bucket/x cannot be opened")
    result = call("status", study_file, "--root", tmp_path, "--images", "s4://key:s3cr3t@bucket/x?region=eu")
    refused(result, 2, "images.train", "in URI: s4://bucket")
    assert "s3cr3t" not in result.output
    (tmp_path / "study.json").mkdir()
    refused(call("status", "--root", tmp_path), 2, f"--root {tmp_path} cannot be read")


def test_only_numbers_are_read_as_such(study_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "2024").mkdir()
    refused(call("status", study_file, "--images", "2024"), 1, str(tmp_path / "2024"), "contains no files")
    refused(call("status", study_file, "--labels", "2024"), 2, "the label file 2024 cannot be read")
    refused(call("status", study_file, "--steps", "many"), 2, "training.steps = 'many'")
    result = call("status", study_file, "--steps", "70", "--k", "3", "--set", "seed=4")
    assert result.exit_code == 0, result.output
    assert "projection-batch_topk-x2-k3" in result.stdout


def test_dry_run_writes_nothing_and_counts_everything(study_file, tmp_path):
    result = call("run", study_file, "--root", tmp_path / "root", "--dry-run", "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["images_to_encode"] == 650
    rows = {entry["step"].rsplit("-", 1)[0]: entry["rows"] for entry in report["steps"]}
    assert rows["activations-train-projection"] == 500
    assert rows["embeddings-heldout"] == 150
    assert rows["sae-projection-batch_topk-x2-k4"] == 64 * 120
    assert report["flops"] > 2 * 2.0 * 64 * 128 * 64 * 120
    assert not (tmp_path / "root").exists()
    text = call("run", study_file, "--root", tmp_path / "root", "--dry-run")
    assert "650 images to encode" in text.stdout


def test_dry_run_tells_what_is_skipped(study_file, world, tmp_path):
    images = tmp_path / "images"
    shutil.copytree(world / "heldout", images)
    for name in ("README.md", "a.xml", "b.xml"):
        (images / name).touch()
    options = ("--root", tmp_path / "root", "--images", images, "--dry-run")
    text = call("run", study_file, *options)
    assert (
        f"images.train: skipped in {images}, since their names are not those of images: 2 × .xml, 1 × .md"
        in text.stderr
    )
    assert json.loads(call("run", study_file, *options, "--json").stdout)["skipped"]["train"] == {".md": 1, ".xml": 2}


def test_report(finished, study_file):
    result = call("report", study_file, "--root", finished)
    assert result.stdout == f"{finished / 'report' / 'index.html'}\n"
    assert "projection-matryoshka_batch_topk-x2-k4" in Path(result.stdout.strip()).read_text()


def test_status(finished, study_file, make_plan, tmp_path):
    entries = json.loads(call("status", study_file, "--root", finished, "--json").stdout)
    assert [entry["step"] for entry in entries] == [step.name for step in make_plan(finished).steps]
    assert {entry["status"] for entry in entries} == {"done"}
    assert all(entry["bytes"] > 0 and entry["seconds"] >= 0 for entry in entries)
    fresh = json.loads(call("status", study_file, "--root", tmp_path / "fresh", "--json").stdout)
    assert {entry["status"] for entry in fresh} == {"missing"}


def test_a_root_remembers_its_study(finished, make_plan, tmp_path):
    root = tmp_path / "root"
    shutil.copytree(finished, root)
    remember(make_plan(root))
    result = call("run", "--root", root, "--json")
    assert result.exit_code == 0, result.output
    assert "nothing left to do" in result.stderr
    assert json.loads(result.stdout)["study"] == "small"


def test_the_demo_is_not_served_from_another_study(make_plan, tmp_path):
    """Nor run there."""
    root = tmp_path / "root"
    remember(make_plan(root))
    before = sorted(root.rglob("*"))
    result = call("serve", "--demo", "--root", root)
    assert result.exit_code == 2
    assert "holds the study small, which is not the demo; leave out --demo" in result.stderr
    assert sorted(root.rglob("*")) == before


def test_a_run_with_nothing_left_to_do_loads_no_model_and_starts_no_cluster(finished, make_plan, tmp_path):
    root = tmp_path / "root"
    shutil.copytree(finished, root)
    remember(make_plan(root))
    code = (
        "import sys; from sae_ray.jobs.cli import main; main(sys.argv[1:], standalone_mode=False); "
        "print([name for name in ('transformers', 'open_clip', 'ray') if name in sys.modules])"
    )
    command = [sys.executable, "-c", code, "run", "--root", str(root)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "nothing left to do" in done.stderr
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.ray
def test_a_healthy_run_prints_only_its_own_lines(ran):
    ours = re.compile(
        r"(extract train and heldout \(projection\)|train \d+ SAEs|evaluate \d+ SAEs|score \d+ cells|pictures|report|"
        r"small): "
        r"(\d|done in \d)"
    )
    assert [line for line in ran.stderr.splitlines() if not ours.match(line)] == []
    assert ran.stderr.splitlines()[-1].startswith("small: done in")


@pytest.mark.ray
def test_ctrl_c_leaves_a_state_that_resumes(study_file, world, tmp_path):
    root = tmp_path / "root"
    command = [sys.executable, "-m", "sae_ray.jobs.cli", "extract", str(study_file), "--root", str(root)]
    driver = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    deadline = time.monotonic() + PATIENCE_S
    while not list(root.glob("activations-train-*/parts/*.json")):
        assert driver.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(driver.pid, signal.SIGINT)
    _, errors = driver.communicate(timeout=PATIENCE_S)
    assert driver.returncode == 130, errors
    assert "run the same command to resume" in errors
    assert "Traceback" not in errors
    assert not list(root.glob("*/lock-*"))
    entries = json.loads(call("status", study_file, "--root", root, "--json").stdout)
    assert "partial" in {entry["status"] for entry in entries}
    assert all(entry["failure"] is None for entry in entries), "it was interrupted, which is no failure"


def test_a_root_of_another_layout_is_refused(finished, study_file, study_values, tmp_path):
    """What versions before wrote: the study alone; or a later one might write."""
    for values in (study_values, {"layout": 99}):
        (tmp_path / "study.json").write_text(json.dumps(values))
        for command in (["status"], ["run", study_file], ["score"], ["report"]):
            refused(call(*command, "--root", tmp_path), 2, "another version of sae-ray", "choose another --root")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["small.toml", "study.json"]


def test_what_only_looks_needs_neither_folders_nor_models(finished, make_plan, world, tmp_path):
    """Nor their libraries: help and status are answered without torch."""
    root = tmp_path / "root"
    shutil.copytree(finished, root)
    remember(make_plan(root))
    code = (
        "import sys; from sae_ray.jobs.cli import main; main(sys.argv[1:], standalone_mode=False); "
        "print([name for name in ('torch', 'transformers', 'ray') if name in sys.modules])"
    )

    def answer(*arguments: str) -> str:
        done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
        assert done.stderr == ""
        return done.stdout

    hidden = world.with_name("hidden")
    world.rename(hidden)
    try:
        shown = answer("status", "--root", str(root))
    finally:
        hidden.rename(world)
    assert shown.splitlines()[-1] == "[]"
    assert shown.count("done") == len(list(make_plan(root).steps))
    for arguments in (["--help"], ["run", "--help"], ["ask", "--help"], ["studies"]):
        assert answer(*arguments).splitlines()[-1] == "[]"


def test_a_changed_folder_is_reported_by_those_who_list_it(study_values, world, tmp_path):
    images = tmp_path / "images"
    shutil.copytree(world / "heldout", images)
    values = study_values | {"images": {"train": {"path": str(images)}, "heldout_fraction": 0.5}}
    file, root = tmp_path / "small.toml", tmp_path / "root"
    file.write_text(to_toml(values))
    assert call("status", file, "--root", root).exit_code == 0
    from sae_ray.store.files import Folder
    from sae_ray.study.config import Study
    from sae_ray.study.plan import StudyPlan

    remember(StudyPlan(Study.load(file), Folder(root)))
    first = next(images.rglob("*.png"))
    shutil.copy(first, first.with_name("another.png"))
    before = call("status", "--root", root, "--json").stdout
    assert call("status", "--root", root).stderr == ""  # by what the root remembers
    listed = call("run", "--root", root, "--dry-run")
    assert "images has changed since the last run (" in listed.stderr
    assert call("status", "--root", root, "--json").stdout == before


def test_models_of_timm_that_a_study_cannot_have_are_named_with_their_field(study_file, tmp_path):
    import timm

    convolutional = tmp_path / "efficientnet"
    timm.models.save_for_hf(timm.create_model("test_efficientnet"), str(convolutional), safe_serialization=True)
    root = tmp_path / "root"
    for words, said in (
        (["--judge", "timm:efficientnet_lite9"], ["judge.model = 'timm:efficientnet_lite9'", "efficientnet_lite0"]),
        (
            ["--encoder", f"timm:local-dir:{convolutional}", "--site", "layer3:mean"],
            ["point is 'residual'", "it has pooled"],
        ),
    ):
        refused(call("run", study_file, "--root", root, "--dry-run", *words), 2, *said)


def test_a_judge_whose_weights_do_not_fit_fails_before_any_image_is_encoded(study_file, world, tmp_path):
    from safetensors.torch import load_file, save_file

    judge = shutil.copytree(world / "judge", tmp_path / "judge")
    (weights,) = judge.glob("*.safetensors")
    tensors = load_file(weights)
    name = next(name for name in tensors if name.startswith("visual.") and tensors[name].ndim == 2)
    tensors[name] = tensors[name][:, 1:].contiguous()
    save_file(tensors, weights)
    root = tmp_path / "root"
    for command in ("run", "extract"):
        result = call(command, study_file, "--root", root, "--judge", f"open_clip:local-dir:{judge}")
        refused(result, 2, "judge.model = ", name)
    assert not list(root.glob("*/step.json"))


def test_every_command_is_in_one_section_of_the_help():
    assert sorted(name for names in SECTIONS.values() for name in names) == sorted(main.commands)
    shown = call("--help")
    assert all(f"{title}:" in shown.output for title in SECTIONS)
    assert re.search(r"^  find +Find the latents whose top images best match TEXT", shown.output, re.M)
