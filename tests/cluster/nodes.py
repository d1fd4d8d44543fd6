"""A Ray cluster whose nodes are hosts of their own, with token authentication."""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
from pathlib import Path

import httpx
from sae_ray.jobs.cluster import KEEPALIVE

from tests.cluster.hosts import HOME, Host
from tests.machine import PATIENCE_S, RAY, until
from tests.object_store import KEY

BIN = Path(sys.executable).parent
KEYS = {"AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": KEY, "AWS_EC2_METADATA_DISABLED": "true"}
"""The environment of whoever may use the object store."""
SKEW_S = 300
AHEAD = f"""
import time
real = time.time, time.time_ns
time.time = lambda: real[0]() + {SKEW_S}
time.time_ns = lambda: real[1]() + {SKEW_S} * 10**9
"""
"""A `sitecustomize` for Python processes whose clock is ahead. Under libfaketime 0.9.10 they cannot sleep."""
CUSTOM = "/tmp/custom"
"""The folder on every node that Python processes look into first."""
STORE_BYTES = 100 * 2**20


class Cluster:
    """A head without CPUs, and workers that may come and go."""

    def __init__(self, logs: Path):
        self.logs = logs
        self.token = secrets.token_hex(32)
        self._number = 10
        self.workers: dict[str, Host] = {}
        self.head = self._host("head")
        self._start(self.head, "--head", "--port=6379", "--num-cpus=0", "--dashboard-host=0.0.0.0")
        self.dashboard = f"http://{self.head.address}:8265"

    def add(self, name: str, ahead: bool = False) -> None:
        """Starts a worker of two CPUs, whose clock may be five minutes ahead."""
        host = self.workers[name] = self._host(name)
        if ahead:
            host.path(CUSTOM).mkdir()
            host.path(f"{CUSTOM}/sitecustomize.py").write_text(AHEAD)
        self._start(host, f"--address={self.head.address}:6379", "--num-cpus=2")

    def lose(self, address: str) -> str:
        """Takes the power and the link of the worker at an address, and returns its name."""
        [name] = [name for name, host in self.workers.items() if host.address == address]
        self.workers.pop(name).vanish()
        return name

    def end(self) -> None:
        for host in (*self.workers.values(), self.head):
            host.end()

    def wait_until_up(self) -> None:
        """Waits for every node that was started."""
        wanted = {host.address for host in (self.head, *self.workers.values())}
        until(lambda: wanted <= self._alive())

    def _alive(self) -> set[str]:
        """The addresses of the nodes, as the head knows them; none while it cannot be asked."""
        try:
            answer = httpx.get(f"{self.dashboard}/api/v0/nodes", headers={"Authorization": f"Bearer {self.token}"})
        except httpx.TransportError:
            return set()
        nodes = answer.json()["data"]["result"]["result"] if answer.is_success else []
        return {node["node_ip"] for node in nodes if node["state"] == "ALIVE"}

    @property
    def client(self) -> dict[str, str]:
        """The environment of whoever may use the cluster."""
        return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": self.token}

    def start(self, host: Host, command: list[str], log: Path) -> subprocess.Popen:
        """Starts a command on a node."""
        environment = (
            self.client
            | KEEPALIVE
            | KEYS
            | {
                "HF_HUB_OFFLINE": "1",
                "HOME": HOME,
                "LANG": "C.UTF-8",
                "OMP_NUM_THREADS": "1",
                "PATH": f"{BIN}:/usr/sbin:/usr/bin:/sbin:/bin",
                "PYTHONDONTWRITEBYTECODE": "1",
                "PYTHONPATH": CUSTOM,
                "RAY_worker_niceness": "0",
            }
        )
        given = [f"{name}={value}" for name, value in environment.items()]
        with log.open("a") as output:
            return subprocess.Popen(
                [*host.inside, "env", "--ignore-environment", *given, *command], stdout=output, stderr=subprocess.STDOUT
            )

    def submit(self, study: Path, *options: str) -> subprocess.CompletedProcess[str]:
        """Submits a study from outside the cluster, and follows it to its end."""
        job = self.submitted(study, *options)
        output, _ = job.communicate(timeout=2 * PATIENCE_S)
        return subprocess.CompletedProcess(job.args, job.returncode, output)

    def submitted(self, study: Path, *options: str) -> subprocess.Popen[str]:
        """As `submit`, without waiting."""
        return subprocess.Popen(
            [str(BIN / "sae-ray"), "submit", str(study), f"--address={self.dashboard}", *options],
            env=os.environ | self.client,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def _host(self, name: str) -> Host:
        self._number += 1
        return Host(name, self._number)

    def _start(self, host: Host, *options: str) -> None:
        command = ["python", "-c", RAY, "start", *options, f"--node-ip-address={host.address}", "--block"]
        command += ["--disable-usage-stats", f"--object-store-memory={STORE_BYTES}"]
        self.start(host, command, self.logs / f"{host.name}.log")
