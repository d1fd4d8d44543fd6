"""The cluster that a driver works on: what it can never have room for is said, and so is what goes wrong."""

import subprocess
import sys

import pytest
from sae_ray.jobs.cluster import require

from sae_ray.errors import UsageError
from tests.machine import PATIENCE_S


@pytest.mark.parametrize(
    "resources",
    [(4, 1, 0), (1, 4, 0), (8, 0.5, 0), (2, 1.5, 0, 1), (3, 1, 0, 1), (99, 0, 0)],
)
def test_what_the_cluster_holds_passes(ray_cluster, resources):
    require("resources.steering", *resources)


@pytest.mark.parametrize(
    ("resources", "words"),
    [
        ((5, 1, 0), "5 at once with cpus = 1 and gpus = 0 each do not fit in the cluster of 4 CPUs and 0 GPUs; lower"),
        ((1, 4.5, 0), "1 at once with cpus = 4.5"),
        ((3, 1.5, 0), "3 at once"),
        ((1, 1, 0.5), "1 at once with cpus = 1 and gpus = 0.5"),
        ((4, 1, 0, 1), "4 at once with cpus = 1 and gpus = 0 each, and 1 CPU beside them, do not fit"),
    ],
)
def test_what_it_does_not_hold_is_refused(ray_cluster, resources, words, monkeypatch, capsys):
    with pytest.raises(UsageError) as refusal:
        require("resources.steering", *resources)
    assert str(refusal.value).startswith(f"resources.steering: {words}")

    monkeypatch.setenv("RAY_ADDRESS", "auto")  # a cluster that may grow
    require("resources.steering", *resources)
    assert f"resources.steering: {words.removesuffix('; lower')}" in capsys.readouterr().err


MESSAGES = """
import time
from sae_ray.jobs.cluster import connect

connect()
import ray
from ray._private.utils import publish_error_to_driver

for message in ("WARNING: 8 PYTHON worker processes have been started on node: x", "a node is lost", "the end"):
    publish_error_to_driver("worker_pool_large", message, ray._private.worker.global_worker.gcs_client)
time.sleep({patience})
"""


@pytest.mark.ray
def test_messages_of_ray_go_to_standard_error():
    """But for one that is usual on slow machines. Standard output is for results."""
    command = [sys.executable, "-c", MESSAGES.format(patience=PATIENCE_S)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        shown = [process.stderr.readline() for _ in range(2)]
        process.terminate()
        output, _ = process.communicate()
    assert shown == ["Ray: a node is lost\n", "Ray: the end\n"]
    assert output == ""
