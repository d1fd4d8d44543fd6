"""One small world for all tests of the drivers."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from sae_ray.store.files import Folder
from sae_ray.study.config import Study
from sae_ray.study.plan import StudyPlan
from sae_ray.world import write_world
from tests.machine import PATIENCE_S

N_TRAIN = 500
N_HELDOUT = 150


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    write_world(folder, n_train=N_TRAIN, n_heldout=N_HELDOUT)
    return folder


@pytest.fixture(scope="session")
def study_values(world) -> dict:
    """A study of two cells on the small world."""
    return {
        "name": "small",
        "images": {"train": {"path": f"{world}/train"}, "heldout": {"path": f"{world}/heldout"}},
        "encoder": {"model": f"{world}/clip"},
        "judge": {"model": f"open_clip:local-dir:{world}/judge", "point": "projection"},
        "grid": [
            {
                "sites": ["projection"],
                "architectures": ["batch_topk", "matryoshka_batch_topk"],
                "expansions": [2],
                "k": [4],
            }
        ],
        "training": {
            "batch_size": 64,
            "steps": 120,
            "warmup_steps": 10,
            "threshold_start_step": 40,
            "dead_after_samples": 2000,
        },
        "extraction": {"images_per_part": 50},
        "resources": {"extract": {"batch_size": 16}, "train": {"checkpoint_every": 20}},
    }


@pytest.fixture(scope="session")
def make_plan(study_values) -> Callable[..., StudyPlan]:
    """`make_plan(root, **{"training.steps": 50})`"""

    def make(root: Path, **overrides) -> StudyPlan:
        return StudyPlan(Study.from_dict(study_values, overrides), Folder(root))

    return make


@pytest.fixture(scope="session")
def extracted(ray_cluster, make_plan, tmp_path_factory) -> Path:
    """A root with all activations of the study; copy it before writing to it."""
    from sae_ray.jobs import extract

    root = tmp_path_factory.mktemp("extracted")
    extract.run(make_plan(root))
    return root


@pytest.fixture(scope="session")
def finished(extracted, make_plan, tmp_path_factory) -> Path:
    """A root with the whole study done."""
    from sae_ray.jobs import study

    root = tmp_path_factory.mktemp("finished") / "root"
    shutil.copytree(extracted, root)
    study.run(make_plan(root))
    return root


@pytest.fixture(scope="session")
def kill_driver_when() -> Callable:
    """Runs `sae-ray <command>` with a cluster of its own and SIGKILLs it as soon as `ready()`."""

    def run(command: list[str], ready: Callable[[], bool]) -> None:
        driver = subprocess.Popen(
            [sys.executable, "-m", "sae_ray.jobs.cli", *command],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        deadline = time.monotonic() + PATIENCE_S
        try:
            while not ready():
                assert driver.poll() is None, driver.stderr.read().decode()
                assert time.monotonic() < deadline, "the driver did not get there in time"
                time.sleep(0.02)
        finally:
            # The driver and what runs in its process group, as when a machine is taken away.
            os.killpg(driver.pid, signal.SIGKILL)
            driver.wait()

    return run
