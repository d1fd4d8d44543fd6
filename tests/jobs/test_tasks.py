"""Tasks and the memory that they ask for."""

import json
import subprocess
import sys
import tempfile

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sae_ray.jobs.cluster import most_memory

from tests.machine import PATIENCE_S

NODE = st.fixed_dictionaries({"CPU": st.integers(0, 8), "GPU": st.integers(0, 2), "memory": st.integers(1, 10**12)})


@given(st.lists(NODE, max_size=5), st.sampled_from([(1, 0), (0.5, 0), (2, 0), (1, 1), (0, 0)]), st.integers(1, 8))
def test_workers_ask_for_no_more_memory_than_lets_them_run_at_once(nodes, resources, workers):
    cpus, gpus = resources
    most = most_memory(nodes, cpus, gpus, workers)

    def n_places(memory: int) -> int:
        places = 0
        for node in nodes:
            limits = [(cpus, node["CPU"]), (gpus, node["GPU"]), (memory, node["memory"])]
            places += min((int(there / each) for each, there in limits if each), default=workers)
        return places

    if n_places(0) >= workers:
        assert n_places(most) >= workers
        assert n_places(most + 1) < workers
    elif n_places(0) == 0:
        assert most == 0
    else:
        assert n_places(most) == n_places(0)


LOSES_ITS_NODE = """
import json, sys, threading, time
from pathlib import Path

import ray
from ray.cluster_utils import Cluster
from sae_ray.jobs import tasks
from sae_ray.jobs.cluster import allow_slow_starts

allow_slow_starts()
tasks.LOOK_SECONDS, tasks.WAIT_SECONDS = 1.0, 3.0
[scratch] = sys.argv[1:]
began = Path(scratch, "began")
store = {"object_store_memory": 100 * 2**20}
cluster = Cluster(
    initialize_head=True, head_node_args=store | {"num_cpus": 0, "temp_dir": scratch, "include_dashboard": False}
)
small, large = (cluster.add_node(num_cpus=1, memory=size * 10**9, **store) for size in (1, 3))
ray.init(address=cluster.address, log_to_driver=False)

@ray.remote(num_cpus=1, max_retries=10)
def work(large):
    if ray.get_runtime_context().get_node_id() == large:
        began.touch()
        time.sleep(1e6)
    return "done"

asked = []

def begin(what, memory):
    asked.append(memory)
    return work.options(memory=memory).remote(large.node_id)

def lose():
    while not began.exists():
        time.sleep(0.05)
    cluster.remove_node(large, allow_graceful=False)

threading.Thread(target=lose, daemon=True).start()
ended = tasks.ended("train", ["a bundle"], 1, tasks.Workers(1, 0), lambda what: 5e9, begin)
print(json.dumps([[what, ray.get(task)] for what, task in ended] + asked))
"""


@pytest.mark.ray
def test_work_whose_node_is_lost_goes_on_with_the_memory_of_those_that_are_left(record_fault):
    """Ray would wait for a node as large as the one that is gone."""
    with tempfile.TemporaryDirectory(prefix="sr", dir="/tmp", ignore_cleanup_errors=True) as scratch:
        command = [sys.executable, "-c", LOSES_ITS_NODE, scratch]
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == [["a bundle", "done"], 3 * 10**9, 10**9]
    said = [line for line in done.stderr.splitlines() if line.startswith("train: no node")]
    assert ["is left that has the 3 GB" in said[0], "begun again with 1 GB" in said[1], len(said)] == [True, True, 2]
    record_fault("the only node with enough memory is lost", "train", "goes on with the most that another one has")
