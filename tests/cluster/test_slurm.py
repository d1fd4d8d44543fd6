"""The batch script for Slurm makes one Ray cluster of its nodes, and runs a command there.

Slurm is played by two commands: `scontrol` names the nodes, and `srun` runs its command on each of them. A node is a
set of namespaces of this machine: its own network address, processes and /tmp/ray. So Ray, which stops all of its
processes on a node at the end, does not see those of other tests.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.machine import PATIENCE_S

SCRIPT = Path(__file__).parents[2] / "cluster" / "slurm" / "on_ray.sbatch"
NAMESPACES = ["unshare", "--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
AS_ROOT = [] if os.geteuid() == 0 else ["unshare", "--user", "--map-root-user"]

SCONTROL = """#!/bin/sh
[ "$*" = "show hostnames nodes[1-2]" ] && printf '10.77.0.1\\n10.77.0.2\\n'
"""
SRUN = """#!{python}
import argparse, os, subprocess, sys, time

parser = argparse.ArgumentParser()
parser.add_argument("--nodes", type=int)
parser.add_argument("--ntasks", type=int)
parser.add_argument("--cpu-bind", choices=["none"])
parser.add_argument("--kill-on-bad-exit", action="store_true")
parser.add_argument("command", nargs=argparse.REMAINDER)
given = parser.parse_args()
assert given.nodes == given.ntasks == 2
START = 'read go; ip link set lo up; ip addr add "$1/24" dev eth0; ip link set eth0 up; mkdir -p /tmp/ray; '
START += 'mount -t tmpfs tmpfs /tmp/ray; shift; exec "$@" </dev/null'

def ip(*words):
    subprocess.run(["ip", *words], check=True)

def node(number):
    command = [*{namespaces}, "sh", "-c", START, "sh", f"10.77.0.{{number}}", *given.command]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, text=True)
    network = f"/proc/{{process.pid}}/ns/net"
    while os.readlink(network) == os.readlink("/proc/self/ns/net"):
        time.sleep(0.01)
    ip("link", "add", f"node{{number}}", "type", "veth", "peer", "name", "eth0", "netns", str(process.pid))
    ip("link", "set", f"node{{number}}", "master", "switch", "up")
    process.stdin.write("go\\n")
    process.stdin.close()
    return process

ip("link", "add", "switch", "type", "bridge")
ip("link", "set", "switch", "up")
processes = [node(number) for number in (1, 2)]
sys.exit(max(process.wait() for process in processes))
"""
COMMAND = """
import json, os, sys, urllib.error, urllib.request
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy as On

ray.init(log_to_driver=False)
where = ray.remote(ray.util.get_node_ip_address)
nodes = [node for node in ray.nodes() if node["Alive"]]
ran_on = ray.get([where.options(scheduling_strategy=On(node["NodeID"], soft=False)).remote() for node in nodes])
try:
    status = urllib.request.urlopen("http://127.0.0.1:8265/api/version").status
except urllib.error.HTTPError as error:
    status = error.code
found = {"ran_on": sorted(ran_on), "without_token": status}
with open(sys.argv[1], "w") as file:
    json.dump(found, file)
sys.exit(int(sys.argv[2]))
"""


def can_make_nodes() -> bool:
    if not shutil.which("unshare") or not shutil.which("ip"):
        return False
    made = subprocess.run([*AS_ROOT, *NAMESPACES, "ip", "link", "add", "switch", "type", "bridge"], capture_output=True)
    return made.returncode == 0


@pytest.fixture
def sbatch(tmp_path):
    """Runs the batch script on two nodes and returns its exit code and what it said."""
    commands = tmp_path / "bin"
    commands.mkdir()
    (commands / "scontrol").write_text(SCONTROL)
    (commands / "srun").write_text(SRUN.format(python=sys.executable, namespaces=NAMESPACES))
    for file in commands.iterdir():
        file.chmod(0o755)
    allocation = {"SLURM_JOB_NODELIST": "nodes[1-2]", "SLURM_JOB_NUM_NODES": "2"}
    path = f"{commands}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    left_out = ("RAY_AUTH", "RAY_ADDRESS")
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(left_out)}

    def run(*command: str | Path) -> tuple[int, str]:
        done = subprocess.run(
            [*AS_ROOT, *NAMESPACES, "bash", SCRIPT, *command],
            env=inherited | allocation | {"PATH": path, "HOME": str(tmp_path)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=2 * PATIENCE_S,
        )
        return done.returncode, done.stdout

    return run


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.skipif(not can_make_nodes(), reason="namespaces cannot be made here: no unshare, no ip, or no right to")
def test_a_command_runs_on_a_cluster_of_all_nodes(sbatch, tmp_path):
    (tmp_path / "command.py").write_text(COMMAND)
    code, said = sbatch("python", tmp_path / "command.py", tmp_path / "found.json", "3")
    assert (tmp_path / "found.json").exists(), said
    found = json.loads((tmp_path / "found.json").read_text())
    assert found == {"ran_on": ["10.77.0.1", "10.77.0.2"], "without_token": 401}
    assert code == 3, "that of the command"
    assert not (tmp_path / ".ray").exists(), "the token lives as long as the job"
