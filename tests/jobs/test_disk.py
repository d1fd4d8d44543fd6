"""A disk that fills up in the midst of a stage: a named error, and the same bits once there is space."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from sae_ray.jobs import concepts, evaluate, extract, naming, pictures, score, stage, steering, study, train

from sae_ray.errors import SaeRayError
from tests.roots import differences

DISK = "256m"
STAGES = {
    "extract": (extract, "activations-*"),
    "train": (train, "sae-*"),
    "evaluate": (evaluate, "fidelity-*"),
    "score": (score, "scores-*"),
    "concepts": (concepts, "concepts-*"),
    "steering": (steering, "steering-*"),
    "naming": (naming, "naming-*"),
    "pictures": (pictures, "pictures-*"),
}
"""Stage -> its module and its steps."""
QUICK = ("extract", "evaluate")
"""By Ray Data, and by tasks, as the others."""
SLOW = [name for name in STAGES if name not in QUICK]


@pytest.fixture
def disk(tmp_path) -> Iterator[Path]:
    """A filesystem of its own, of `DISK` bytes."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK}", "sae-ray", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only root may mount a filesystem")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(disk: Path) -> Path:
    """Takes what is left, and returns the file that took it."""
    ballast = disk / "ballast"
    with ballast.open("wb") as file:
        free = os.statvfs(disk)
        os.posix_fallocate(file.fileno(), 0, free.f_bavail * free.f_frsize)
    return ballast


@pytest.mark.parametrize("name", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_a_disk_that_fills_up_is_named_and_the_stage_resumes(
    ray_cluster, steered, make_steered, disk, monkeypatch, record_fault, name
):
    module, steps = STAGES[name]
    root = shutil.copytree(steered, disk / "root", ignore=shutil.ignore_patterns(steps, ".ray-train", "report"))
    plan = make_steered(root, **{"resources.train.max_failures": 0})
    connect = stage.connect

    def connect_and_fill() -> None:
        """The disk was found large enough, and the locks are taken."""
        connect()
        fill(disk)

    monkeypatch.setattr("sae_ray.scores.scoring.IMAGES_PER_BLOCK", 50)
    with monkeypatch.context() as patched:
        patched.setattr(stage, "connect", connect_and_fill)
        with pytest.raises(SaeRayError, match="No space left on device"):
            module.run(plan)
    assert not list(root.glob(f"{steps}/lock-*"))
    (disk / "ballast").unlink()
    module.run(plan)
    study.make_report(plan)
    assert not differences(plan, make_steered(steered))
    record_fault("the disk is full", name, "a named error, then the same bits")
