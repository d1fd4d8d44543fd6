"""What a node that is lost costs: only the work that it was doing."""

import json
import shutil
import subprocess
import sys
import tempfile

import pytest
import torch
from sae_ray.jobs.placement import bundles

from sae_ray.sae import train_cells
from tests.jobs.test_train import SLOW, assert_equal_weights
from tests.machine import PATIENCE_S

pytestmark = pytest.mark.ray

LOSE_A_NODE = """
import json, sys, threading, time
import ray
from ray._private.state import state
from ray.cluster_utils import Cluster
from sae_ray.jobs import train
from sae_ray.jobs.cluster import allow_slow_starts
from sae_ray.store.files import Folder
from sae_ray.study.config import Study
from sae_ray.study.plan import StudyPlan

allow_slow_starts()
values, overrides, root, scratch = json.loads(sys.argv[1])
quiet = {"object_store_memory": 100 * 2**20, "include_dashboard": False}
cluster = Cluster(initialize_head=True, head_node_args=quiet | {"num_cpus": 0, "temp_dir": scratch})
nodes = {node.node_id: node for node in (cluster.add_node(num_cpus=2, object_store_memory=100 * 2**20) for _ in "ab")}
ray.init(address=cluster.address, log_to_driver=False)
plan = StudyPlan(Study.from_dict(values, overrides), Folder(root))
checkpoints = [one.step.folder / "checkpoints" for one in plan.trains]

def lose() -> None:
    while not all(folder.files() for folder in checkpoints):
        time.sleep(0.02)
    actors = state.actor_table(None, actor_state_name="ALIVE").values()
    [lost] = {one["Address"]["NodeID"] for one in actors if one["ActorClassName"] == "RayTrainWorker"}
    cluster.remove_node(nodes[lost], allow_graceful=False)
    print(json.dumps(lost), flush=True)  # what the test reads

threading.Thread(target=lose, daemon=True).start()
train.run(plan)
"""


def test_a_node_lost_in_training_costs_neither_run_nor_bits(extracted, make_plan, study_values, tmp_path):
    shutil.copytree(extracted, tmp_path / "whole")
    reference = make_plan(tmp_path / "whole", **SLOW)
    torch.set_num_threads(1)
    [bundle] = bundles(reference, reference.trains, 1, "cpu")
    train_cells(bundle)

    root = tmp_path / "root"
    shutil.copytree(extracted, root)
    with tempfile.TemporaryDirectory(prefix="sr", dir="/tmp", ignore_cleanup_errors=True) as scratch:
        given = json.dumps([study_values, SLOW, str(root), scratch])
        done = subprocess.run(
            [sys.executable, "-c", LOSE_A_NODE, given], capture_output=True, text=True, timeout=2 * PATIENCE_S
        )
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stdout.splitlines() if line.startswith(chr(34))], "no node was lost"
    plan = make_plan(root, **SLOW)
    assert_equal_weights(plan, reference)
    for one in plan.trains:
        attempts = one.step.record()["ran"]["attempts"]
        assert 0 < attempts[-1]["first_step"] < SLOW["training.steps"]
