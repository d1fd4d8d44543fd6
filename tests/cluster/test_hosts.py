"""A study on hosts that share nothing but a network: the bits of one machine, whatever is lost on the way."""

import re
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from sae_ray.study.plan import StudyPlan
from tests.cluster.hosts import HOME, Host
from tests.cluster.nodes import SKEW_S
from tests.machine import PATIENCE_S, until
from tests.object_store import KEY
from tests.roots import differences

pytestmark = [pytest.mark.cluster, pytest.mark.ray]

SAME_BITS = "same bits"
WRITTEN = {"extract": r"activations-train-[^/]+/data/part-", "train": r"sae-[^/]+/checkpoints/step-"}
"""Stage -> what its workers write in the midst of it."""


def writers(log: Path, plan: StudyPlan, stage: str) -> list[str]:
    """The addresses that sent the files of a stage to the object store, in the order of time."""
    sent = re.compile(rf'(\S+) .*"(?:PUT|POST) /{plan.root.path}/{WRITTEN[stage]}')
    return [match[1] for line in log.read_text().splitlines() if (match := sent.match(line))]


def models_on(host: Host) -> list[str]:
    """The models that a host has copied."""
    copies = host.path(f"{HOME}/.cache/sae-ray/models").iterdir()
    return sorted(path.name.rpartition("-")[0] for path in copies if path.is_dir())


def test_hosts_that_share_nothing_write_the_bits_of_one_machine(cluster, submitted, alone, store_log, record_fault):
    plan = submitted.plan("whole")
    done = cluster.submit(submitted.file, "--root", plan.root.uri)
    assert done.returncode == 0, done.stdout
    assert differences(plan, alone) == []
    assert KEY not in done.stdout, "no key is shown"
    workers = cluster.workers.values()
    assert set(writers(store_log, plan, "extract")) == {host.address for host in workers}, "every worker writes parts"
    copied = [models_on(host) for host in workers]
    assert all(models in (["clip"], ["clip", "judge"]) for models in copied), "once each, and only what it needed"
    assert ["clip", "judge"] in copied, "the judge's few images may all be on one host"
    record_fault("the clocks of two hosts differ by five minutes", "all", SAME_BITS)


def test_a_model_that_only_the_head_has_is_missed_by_name(cluster, submitted, world, record_fault):
    shutil.copytree(world / "clip", cluster.head.path(f"{HOME}/clip"))
    root = submitted.plan("model").root
    done = cluster.submit(submitted.file, "--root", root.uri, "--encoder", f"{HOME}/clip")
    assert done.returncode == 1
    words = (
        rf"Error: encoder.model = '{HOME}/clip': there is no directory {HOME}/clip on worker-\w+, though there was one"
    )
    assert re.search(words, done.stdout), done.stdout
    assert "Traceback" not in done.stdout
    record_fault("a worker lacks the directory of a model", "extract", "a named error")


def test_a_root_that_only_the_head_has_is_missed_by_name(cluster, submitted, record_fault):
    done = cluster.submit(submitted.file, "--root", f"{HOME}/root")
    assert done.returncode == 1
    words = rf"Error: worker-\w+ does not see the files that the driver writes to {HOME}/root/"
    assert re.search(words, done.stdout), done.stdout
    assert "Traceback" not in done.stdout
    record_fault("a worker does not share the root", "extract", "a named error")


HOLD = """
import sys, time
from sae_ray.store.files import Folder
from sae_ray.store.steps import hold
from sae_ray.study.config import Study
from sae_ray.study.plan import StudyPlan
plan = StudyPlan(Study.load("/tmp/small.toml"), Folder(sys.argv[1]))
with hold([one.step for one in plan.extracts]):
    print("held", flush=True)
    time.sleep(1e6)
"""


def test_a_driver_whose_clock_is_ahead_respects_the_lock_of_another_host(cluster, submitted, tmp_path, record_fault):
    """By that clock the lock was not renewed for longer than a driver may be silent."""
    plan = submitted.plan("locked")
    other = cluster.workers["worker-ahead"]
    asked = cluster.start(other, ["python", "-c", "import time; print(time.time())"], tmp_path / "time")
    assert asked.wait(PATIENCE_S) == 0
    assert float((tmp_path / "time").read_text()) > time.time() + SKEW_S / 2
    for host in (cluster.head, other):
        shutil.copy(submitted.file, host.path("/tmp/small.toml"))
    holder = cluster.start(cluster.head, ["python", "-c", HOLD, plan.root.uri], tmp_path / "holder")
    try:
        until(lambda: "held" in (tmp_path / "holder").read_text() or holder.poll() is not None)
        command = ["sae-ray", "extract", "/tmp/small.toml", "--root", plan.root.uri]
        second = cluster.start(other, command, tmp_path / "second")
        assert second.wait(PATIENCE_S) == 1
    finally:
        holder.kill()
    told = (tmp_path / "second").read_text()
    assert re.search(r"Error: .* is being written by process \d+ on head; wait for it", told), told
    record_fault("the clocks of two hosts differ by five minutes", "a second driver", "the lock is respected")


@pytest.mark.parametrize("stage", WRITTEN)
def test_a_host_that_vanishes_costs_no_bits(cluster, submitted, alone, store_log, stage, record_fault):
    """Its power and its link go at once: its processes end, and nothing tells the others so."""
    plan = submitted.plan(f"lost-{stage}")
    job = cluster.submitted(submitted.file, "--root", plan.root.uri)
    lost = ""
    try:
        until(lambda: len(writers(store_log, plan, stage)) >= 2 or job.poll() is not None)
        lost = cluster.lose(writers(store_log, plan, stage)[-1])
        assert not any(one.step.finished for one in {"extract": plan.extracts, "train": plan.trains}[stage])
        output, _ = job.communicate(timeout=2 * PATIENCE_S)
    finally:
        job.kill()
        if lost:
            cluster.add(lost)
    assert job.returncode == 0, output
    assert differences(plan, alone) == []
    record_fault("a host vanishes with its link", stage, SAME_BITS)


def test_a_killed_driver_resumes_to_the_same_bits(cluster, submitted, alone, store_log, record_fault):
    plan = submitted.plan("killed")
    job = cluster.submitted(submitted.file, "--root", plan.root.uri)
    until(lambda: len(writers(store_log, plan, "train")) >= 2 or job.poll() is not None)
    folder = plan.trains[0].step.folder
    [driver] = [folder.read_json(name) for name in folder.files() if name.startswith("lock-")]
    subprocess.run([*cluster.head.inside, "kill", "-KILL", str(driver["pid"])], check=True)
    output, _ = job.communicate(timeout=PATIENCE_S)
    assert job.returncode == 1, output
    assert not any(one.step.finished for one in plan.trains)
    done = cluster.submit(submitted.file, "--root", plan.root.uri)
    assert done.returncode == 0, done.stdout
    assert differences(plan, alone) == []
    record_fault("the driver is killed", "train", "the same command resumes; same bits")
