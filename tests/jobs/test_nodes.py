"""What dies in the midst of a stage costs neither run nor bits."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile

import pytest
from sae_ray.jobs import evaluate
from sae_ray.jobs.progress import Progress

from sae_ray.errors import SaeRayError
from tests.jobs import struck
from tests.jobs.conftest import IMAGES_PER_BLOCK
from tests.machine import PATIENCE_S
from tests.roots import differences

pytestmark = pytest.mark.ray


@pytest.fixture
def run_struck(steered_values, make_steered, steered, tmp_path):
    """Runs the whole study on three nodes while each of these faults strikes each of its stages."""

    def run(*faults: str) -> None:
        with tempfile.TemporaryDirectory(prefix="sr", dir="/tmp", ignore_cleanup_errors=True) as scratch:
            given = {
                "study": steered_values,
                "root": str(tmp_path / "root"),
                "scratch": scratch,
                "faults": faults,
                "images_per_block": IMAGES_PER_BLOCK,
            }
            command = [sys.executable, "-m", "tests.jobs.struck", json.dumps(given)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=4 * PATIENCE_S)
        assert done.returncode == 0, "see its standard error"
        happened = json.loads(done.stdout.splitlines()[-1])
        assert happened == sorted(f"{stage}-{fault}" for stage in struck.STAGES for fault in faults)
        assert not differences(make_steered(tmp_path / "root"), make_steered(steered))

    return run


def test_a_worker_and_a_node_lost_in_every_stage_cost_no_bits(run_struck, record_fault):
    run_struck("worker", "node")
    for stage in struck.STAGES:
        record_fault("a worker process is killed", stage, "same bits")
        record_fault("a node is lost", stage, "same bits")


@pytest.mark.slow
def test_a_driver_killed_in_every_stage_resumes_to_the_same_bits(run_struck, record_fault):
    run_struck("driver")
    for stage in struck.STAGES:
        record_fault("the driver is killed", stage, "same bits, after the same command")


class DeadlyBoard:
    """Kills who reports to it."""

    def set(self, *told) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


def test_work_that_keeps_ending_its_process_is_an_error(
    ray_cluster, finished, make_plan, tmp_path, monkeypatch, record_fault
):
    root = shutil.copytree(finished, tmp_path / "root", ignore=shutil.ignore_patterns("fidelity-*"))
    monkeypatch.setattr(evaluate, "RETRIES", 1)
    with monkeypatch.context() as patched:
        patched.setattr(Progress, "board", lambda progress: DeadlyBoard())
        with pytest.raises(SaeRayError, match=r"evaluate stopped: Ray lost a part of it .*WorkerCrashedError"):
            evaluate.run(make_plan(root))
    evaluate.run(make_plan(root))
    assert not differences(make_plan(root), make_plan(finished))
    record_fault("work ends its process every time", "evaluate", "a named error, then the same bits")
