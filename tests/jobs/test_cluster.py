"""The cluster that a driver works on: what it can never have room for is said, and so is what goes wrong."""

import errno
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from sae_ray.jobs.cluster import (
    SHARES,
    at_most_a_node,
    directory_for_ray,
    loss,
    require,
    share,
    usable_cpus,
    user_error,
)
from sae_ray.jobs.stage import at_work

from sae_ray.errors import SaeRayError, UsageError
from sae_ray.store.files import Folder
from sae_ray.store.steps import Step
from sae_ray.study.config import ScoreResources
from tests.machine import DEAD_PROXY, PATIENCE_S


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


def of_task(fails):
    """What the driver gets from a task that ends so."""
    import ray

    with pytest.raises(Exception) as caught:  # noqa: PT011  # its kind is what the test is about
        ray.get(ray.remote(max_retries=0)(fails).remote())
    return caught.value


def test_what_the_machines_do_is_told_from_errors_of_users_and_of_the_program(ray_cluster):
    def full():
        raise OSError(errno.ENOSPC, "No space left on device", "/data/part")

    def killed():
        os.kill(os.getpid(), signal.SIGKILL)

    def invalid():
        raise UsageError("grid.k = 0: name another")

    def wrong():
        raise ZeroDivisionError

    assert user_error(of_task(invalid)) is not None
    assert "grid.k" in str(user_error(of_task(invalid)))
    assert [user_error(of_task(fails)) for fails in (full, killed, wrong)] == [None] * 3
    found = loss(of_task(full))
    assert found == "a file could not be read or written ([Errno 28] No space left on device: '/data/part')"
    assert "WorkerCrashedError" in str(loss(of_task(killed)))
    assert loss(of_task(wrong)) is None


def test_a_stage_that_loses_its_work_says_how_to_resume(ray_cluster, tmp_path):
    step = Step(Folder(tmp_path), "score", "scores", {})

    class Plan:
        inputs = ()
        bytes = 0

        def __init__(self):
            self.step = step

    def killed():
        os.kill(os.getpid(), signal.SIGKILL)

    said = r"score stopped: Ray lost a part of it .* run the same command to resume"
    with pytest.raises(SaeRayError, match=said), at_work(Folder(tmp_path), "score", [Plan()]):
        raise of_task(killed)
    with pytest.raises(ZeroDivisionError), at_work(Folder(tmp_path), "score", [Plan()]):
        raise ZeroDivisionError
    assert list(step.folder.files()) == ["failure.json"], "the lock is let go, and the reason is noted"


SLOW_AGENTS = """
import sys, time

if any(word.endswith(("dashboard/agent.py", "runtime_env/agent/main.py")) for word in sys.orig_argv):
    time.sleep(20)
"""
START = """
from sae_ray.jobs.cluster import connect

connect()
import ray

print(ray.get(ray.remote(lambda given: "it runs").remote(ray.put(bytes(2**22)))))
"""


@pytest.mark.ray
def test_agents_that_are_slow_to_start_are_waited_for(tmp_path):
    """Ray itself gives them 15 seconds."""
    (tmp_path / "sitecustomize.py").write_text(SLOW_AGENTS)
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", START], env=environment, capture_output=True, text=True)
    assert done.stdout == "it runs\n", done.stderr


CAPABILITIES = "-dac_override,-dac_read_search,-fowner"
UNPRIVILEGED = ["setpriv", f"--bounding-set={CAPABILITIES}", f"--inh-caps={CAPABILITIES}"] if os.geteuid() == 0 else []
"""Begins a command that may only write where its user may."""
MAY_MOUNT = (
    shutil.which("unshare") and not subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode
)
SMALL = (
    ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs -o size=1m tmpfs /dev/shm && exec "$@"', "sh"]
    if MAY_MOUNT
    else []
)
"""Begins a command that has little shared memory, as in a container."""


@pytest.mark.ray
def test_a_cluster_starts_on_a_machine_of_others():
    """Ray's directory is another user's, HOME cannot be written, a proxy that does not answer is to be used, there is
    little shared memory."""
    scratch = Path(tempfile.mkdtemp(prefix="sr", dir="/tmp"))  # Ray's sockets need a short path
    theirs = scratch / "ray"
    theirs.mkdir(0o555)
    environment = os.environ | DEAD_PROXY | {"TMPDIR": str(scratch), "HOME": "/proc/nowhere"}
    try:
        done = subprocess.run(
            [*SMALL, *UNPRIVILEGED, sys.executable, "-c", START], env=environment, capture_output=True, text=True
        )
        assert (done.stdout, done.stderr) == ("it runs\n", "")
        assert not list(theirs.iterdir())
        assert list((scratch / f"ray-{os.getuid()}").iterdir())
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def test_no_place_for_ray_is_said(monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    monkeypatch.setenv("RAY_TMPDIR", "/scratch")
    with pytest.raises(SaeRayError, match=r"neither to /scratch/ray nor to /tmp/ray-\d+; set .* RAY_TMPDIR to"):
        directory_for_ray()


def test_cpus_are_those_that_may_be_used(monkeypatch):
    for name in SHARES:
        monkeypatch.delenv(name, raising=False)
    before = os.sched_getaffinity(0)
    assert usable_cpus() <= len(before)
    os.sched_setaffinity(0, {min(before)})
    try:
        assert usable_cpus() == 1
    finally:
        os.sched_setaffinity(0, before)


def test_work_that_no_node_can_run_yet_asks_for_all_of_its_memory(ray_cluster):
    """None at all would be no limit."""
    assert at_most_a_node(1e15, 99, 0) == 10**15
    assert 0 < at_most_a_node(1e15, 1, 0) < 10**15


@pytest.mark.parametrize("name", SHARES)
def test_cpus_are_those_that_a_scheduler_has_given(monkeypatch, name):
    for other in SHARES:
        monkeypatch.delenv(other, raising=False)
    free = usable_cpus()
    for given, expected in (("1", 1), ("100000", free), ("0", free), ("", free), ("2(x3)", free)):
        monkeypatch.setenv(name, given)
        assert usable_cpus() == expected


def test_there_are_as_many_tasks_that_compute_as_cores(ray_cluster, monkeypatch):
    """Of this machine, whose four logical CPUs may be more; on a cluster of others, as many as it says it has."""
    at_once = {cpus: share("resources.score", ScoreResources(cpus=cpus))[1] for cpus in (0.5, 1, 2)}
    assert at_once == {0.5: min(4, usable_cpus()), 1: min(4, usable_cpus()), 2: max(1, min(4, usable_cpus()) // 2)}
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "1")
    assert share("resources.score", ScoreResources())[1] == 1
    assert share("resources.score", ScoreResources(workers=3))[1] == 3
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    assert share("resources.score", ScoreResources())[1] == 4


LESS_MEMORY = """
from sae_ray.jobs import cluster

cluster.control_groups.memory = lambda: cluster.control_groups.Memory(limit=4 * 10**9, left=2 * 10**9)
cluster.connect()
import ray

there = ray.cluster_resources()
print(there["memory"] + there["object_store_memory"])
"""


@pytest.mark.ray
def test_ray_gives_tasks_no_more_memory_than_control_groups_leave():
    """Ray looks at the outermost group alone, which here leaves more."""
    done = subprocess.run([sys.executable, "-c", LESS_MEMORY], capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.stdout == f"{2e9}\n", done.stderr


MESSAGES = """
import time
from sae_ray.jobs.cluster import connect

connect()
import ray
from ray._private.utils import publish_error_to_driver

for _ in range({patience}):
    for message in ("WARNING: 8 PYTHON worker processes have been started on node: x", "a node is lost", "the end"):
        publish_error_to_driver("worker_pool_large", message, ray._private.worker.global_worker.gcs_client)
    time.sleep(1)
"""


@pytest.mark.ray
def test_messages_of_ray_go_to_standard_error():
    """But for one that is usual on slow machines. Standard output is for results.

    What is published before Ray's thread listens is lost, so all is published again and again.
    """
    command = [sys.executable, "-c", MESSAGES.format(patience=PATIENCE_S)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        while process.stderr.readline() not in ("Ray: the end\n", ""):
            pass
        shown = [process.stderr.readline() for _ in range(2)]
        process.terminate()
        output, _ = process.communicate()
    assert shown == ["Ray: a node is lost\n", "Ray: the end\n"]
    assert output == ""


TOO_LITTLE_MEMORY = """
import os, time

os.environ |= {"RAY_memory_usage_threshold": "0.01", "RAY_memory_monitor_refresh_ms": "100"}
os.environ.pop("RAY_task_oom_retries", None)  # of a cluster that the process of the tests has started
from sae_ray.jobs import cluster

cluster.RETRIES = 1
cluster.connect()
import ray

try:
    ray.get(ray.remote(max_retries=cluster.RETRIES)(lambda: time.sleep(1e6)).remote())
except ray.exceptions.OutOfMemoryError as error:
    print(cluster.reason(error))
"""


@pytest.mark.ray
def test_work_that_has_not_enough_memory_is_not_begun_for_ever():
    """Here Ray finds that of all memory more than a hundredth is used, and ends whatever works."""
    command = [sys.executable, "-c", TOO_LITTLE_MEMORY]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S)
    assert "OutOfMemoryError" in done.stdout, done.stderr
