"""One small world for all tests of the drivers."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from sae_ray.jobs import study

from sae_ray.store.files import Folder
from sae_ray.study.config import Study
from sae_ray.study.plan import StudyPlan
from sae_ray.world import write_world
from tests.machine import DEAD_PROXY, PATIENCE_S

N_TRAIN = 500
N_HELDOUT = 150
IMAGES_PER_BLOCK = 50
OTHER_PROMPT = "What colour is it?"


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
        "resources": {"extract": {"batch_size": 16, "workers": 1}, "train": {"checkpoint_every": 20}},
    }


@pytest.fixture(scope="session")
def make_plan(study_values) -> Callable[..., StudyPlan]:
    """`make_plan(root, **{"training.steps": 50})`"""

    def make(root: Path, **overrides) -> StudyPlan:
        return StudyPlan(Study.from_dict(study_values, overrides), Folder(root))

    return make


@pytest.fixture(scope="session")
def steered_values(study_values, world) -> dict:
    """A study of one cell with every stage."""
    grid = {"sites": ["layer3:random:4"], "architectures": ["matryoshka_batch_topk"], "expansions": [4], "k": [8]}
    return study_values | {
        "grid": [grid | {"score_tokens": "all"}],
        "training": study_values["training"] | {"steps": 300},
        "scoring": {"pictures": "train"},
        "concepts": {"ignore_labels": ["blank"], "min_images": 10},
        "steering": {
            "llava": f"{world}/llava",
            "scorer": f"{world}/clip",
            "strength": 4,
            "unit": "max",
            "other_prompts": [OTHER_PROMPT],
            "ignore_labels": ["blank"],
            "min_images": 8,
            "min_purity": 0.5,
            "n_white_latents": 20,
            "n_images": 20,
            "n_image_latents": 3,
        },
        "naming": {"n_latents": 40},
    }


@pytest.fixture(scope="session")
def make_steered(steered_values) -> Callable[..., StudyPlan]:
    """`make_steered(root, **{"steering.n_images": 5})`"""

    def make(root: Path, **overrides) -> StudyPlan:
        return StudyPlan(Study.from_dict(steered_values, overrides), Folder(root))

    return make


@pytest.fixture(scope="session")
def steered(ray_cluster, extracted, make_steered, tmp_path_factory) -> Path:
    """A root with the whole study of `steered_values` done; copy it before writing to it.

    Its statistics are summed in blocks of 50 images, so that there is something to fold.
    """
    root = tmp_path_factory.mktemp("steered") / "root"
    shutil.copytree(extracted, root)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("sae_ray.scores.scoring.IMAGES_PER_BLOCK", IMAGES_PER_BLOCK)
        study.run(make_steered(root))
    return root


def to_toml(values: dict) -> str:
    def inline(value) -> str:
        if isinstance(value, dict):
            return "{" + ", ".join(f"{key} = {inline(item)}" for key, item in value.items()) + "}"
        if isinstance(value, list):
            return "[" + ", ".join(inline(item) for item in value) + "]"
        return json.dumps(value)

    return "\n".join(f"{key} = {inline(value)}" for key, value in values.items())


class Ran(NamedTuple):
    study: Path
    root: Path
    stderr: str


@pytest.fixture(scope="session")
def ran(study_values, tmp_path_factory) -> Ran:
    """The whole study by `sae-ray run`, as a user runs it: with a cluster of its own, and a new home.

    A proxy does not answer: nothing asks it.
    """
    home = tmp_path_factory.mktemp("home")
    study, root = home / "small.toml", home / "root"
    study.write_text(to_toml(study_values))
    command = [sys.executable, "-m", "sae_ray.jobs.cli", "run", str(study), "--root", str(root)]
    command += ["--set", "resources.extract.workers=2"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= DEAD_PROXY | {"HOME": str(home)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not (home / ".ray").exists(), "a token there would lock the user out of heads that ask for one"
    return Ran(study, root, done.stderr)


@pytest.fixture(scope="session")
def finished(ray_cluster, ran) -> Path:
    """A root with the whole study done; copy it before writing to it."""
    return ran.root


@pytest.fixture(scope="session")
def extracted(finished, make_plan, tmp_path_factory) -> Path:
    """A root with all activations of the study and no more; copy it before writing to it."""
    root = tmp_path_factory.mktemp("extracted")
    for step in make_plan(finished).steps:
        if step.stage in ("manifest", "labels", "extract"):
            shutil.copytree(finished / step.name, root / step.name)
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
