"""Training on nodes that come and go, some of them announced. A cluster of nodes; takes minutes."""

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from sae_ray.jobs.placement import bundles

from sae_ray.sae import train_cells
from tests.jobs.test_train import assert_equal_weights, weights
from tests.machine import PATIENCE_S

pytestmark = [pytest.mark.ray, pytest.mark.slow]

TRAIN = """
import json, os, sys, threading, time

os.environ |= {"RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "0.2"}
import ray
from ray._private.state import available_resources_per_node
from ray._raylet import GcsClient
from ray.cluster_utils import Cluster
from ray.core.generated.autoscaler_pb2 import DrainNodeReason
from sae_ray.jobs import train
from sae_ray.jobs.cluster import allow_slow_starts
from sae_ray.store.files import Folder
from sae_ray.study.config import Study
from sae_ray.study.plan import StudyPlan

allow_slow_starts()
values, overrides, root, scratch, announced = json.loads(sys.argv[1])
store = {"object_store_memory": 100 * 2**20}
cluster = Cluster(
    initialize_head=True, head_node_args=store | {"num_cpus": 0, "temp_dir": scratch, "include_dashboard": False}
)
nodes = {node.node_id: node for node in (cluster.add_node(num_cpus=1, **store) for _ in "ab")}
ray.init(address=cluster.address, log_to_driver=False)
plan = StudyPlan(Study.from_dict(values, overrides), Folder(root))
[one] = plan.trains

def steps():
    folder = one.step.folder / "checkpoints"
    return [int(name[5:14]) for name in folder.files() if name.endswith(".json")]

def workers():
    free = available_resources_per_node()
    return [node_id for node_id in nodes if free.get(node_id, {}).get("CPU", 0) < 1]

def lose():
    while not (at_work := workers()) or not (announced or steps()):
        time.sleep(0.02)
    if announced:
        time.sleep(3)  # into the steps
        preempted = DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
        deadline = int(1000 * (time.time() + 120))
        GcsClient(cluster.address).drain_node(at_work[0], preempted, "the spot instance is taken back", deadline)
        while not steps():
            time.sleep(0.02)
    print(json.dumps(max(steps())), flush=True)  # what the test reads
    cluster.remove_node(nodes[at_work[0]], allow_graceful=False)

threading.Thread(target=lose, daemon=True).start()
train.run(plan)
"""


def trained(root: Path, study_values: dict, overrides: dict, announced: bool) -> int:
    """Trains and loses a node; returns the newest checkpoint at that moment."""
    with tempfile.TemporaryDirectory(prefix="sr", dir="/tmp", ignore_cleanup_errors=True) as scratch:
        given = json.dumps([study_values, overrides, str(root), scratch, announced])
        done = subprocess.run(
            [sys.executable, "-c", TRAIN, given], capture_output=True, text=True, timeout=2 * PATIENCE_S
        )
    assert done.returncode == 0, done.stderr
    [step] = [json.loads(line) for line in done.stdout.splitlines() if line.isdigit()]
    return step


ONE = {"grid.architectures": ["batch_topk"], "training.steps": 10_000}


@pytest.mark.parametrize(("workers", "max_failures"), [(1, 0), ([1, 2], 3)])
def test_a_node_that_is_taken_away_after_a_notice_costs_what_came_after_it(
    extracted, make_plan, study_values, tmp_path, workers, max_failures, record_fault
):
    """Of several workers the one that is left fails, too, when it loses the other."""
    never = {"checkpoint_every": 10**6, "max_failures": max_failures, "workers": workers}
    never = ONE | {f"resources.train.{name}": value for name, value in never.items()}
    shutil.copytree(extracted, tmp_path / "whole")
    reference = make_plan(tmp_path / "whole", **never)
    torch.set_num_threads(1)
    [bundle] = bundles(reference, reference.trains, 1, "cpu")
    train_cells(bundle)

    root = tmp_path / "root"
    shutil.copytree(extracted, root)
    saved = trained(root, study_values, never, announced=True)
    plan = make_plan(root, **never)
    [one] = plan.trains
    first, second = one.step.record()["ran"]["attempts"]
    assert first["first_step"] == 0
    assert second["first_step"] == saved, "it resumed from the checkpoint that the notice made"
    assert saved % 200 == 0
    assert 0 < saved < ONE["training.steps"]
    outcome = "a checkpoint is written in time"
    if workers == 1:  # sums over two round differently
        assert_equal_weights(plan, reference)
        outcome += "; same bits"
    record_fault("a node is lost after a notice", "train", outcome)


def test_a_bundle_goes_on_with_the_workers_that_are_left(extracted, make_plan, study_values, tmp_path, record_fault):
    elastic = ONE | {"resources.train.workers": [1, 2], "resources.train.checkpoint_every": 100}
    root = tmp_path / "root"
    shutil.copytree(extracted, root)
    trained(root, study_values, elastic, announced=False)
    [one] = make_plan(root, **elastic).trains
    attempts = one.step.record()["ran"]["attempts"]
    assert [attempt["workers"] for attempt in attempts] == [2, 1]
    assert attempts[1]["first_step"] > 0
    assert all(tensor.isfinite().all() for tensor in weights(one.step.folder).values())
    record_fault("one of two workers of an SAE is lost with its node", "train", "the other goes on from a checkpoint")
