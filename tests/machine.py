"""What tests take from the machine they run on, whatever else runs there: patience, a cluster, processes of actors."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import NamedTuple

from sae_ray.jobs.cluster import allow_slow_starts, free_port

PATIENCE_S = 300
"""How long tests wait for what must come about. Only what never comes takes that long, however slow the machine."""


RAY = """
from sae_ray.jobs.cluster import allow_slow_starts
allow_slow_starts()
from ray.scripts.scripts import main
main()
"""
"""`ray`, with more patience than it has on a busy machine."""


DEAD_PROXY = dict.fromkeys(
    ("http_proxy", "https_proxy", "all_proxy", "grpc_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"),
    "http://127.0.0.1:9",
)
"""The environment of a machine that reaches others through a proxy, which does not answer."""


class Actor(NamedTuple):
    """A living actor of the cluster that this process is connected to."""

    of: str
    """Its class; that of a Serve replica ends in `:<deployment>`."""
    pid: int


def actors() -> list[Actor]:
    """By what Ray's controller knows: a process is titled by the method that it happens to run."""
    from ray._private.state import state

    table = state.actor_table(None, actor_state_name="ALIVE").values()
    return [Actor(entry["ActorClassName"], entry["Pid"]) for entry in table]


def processes_with_torch() -> ForkServerContext:
    """Starts processes as copies of one that has imported torch, which takes each of them seconds otherwise."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch.distributed", "sae_ray.sae.bundle"])
    return context


def in_ranks(main: Callable[..., None], folder: Path, size: int) -> Path:
    """Runs `main(rank, folder)` in so many processes, and returns the folder."""
    import torch

    method = processes_with_torch().get_start_method()
    torch.multiprocessing.start_processes(main, (str(folder),), size, start_method=method)
    return folder


def head_options(folder: Path, dashboard: int, cpus: int) -> list[str]:
    """What `ray start --head` needs to share the machine with other heads. `folder`: its own, with a short path."""
    options = [
        *("--temp-dir", folder, "--num-cpus", cpus, "--object-store-memory", 200 * 2**20),
        *("--port", free_port(), "--dashboard-port", dashboard, "--ray-client-server-port", free_port()),
        *("--min-worker-port", 0, "--max-worker-port", 0, "--disable-usage-stats"),
    ]
    return [str(option) for option in options]


@contextmanager
def cluster() -> Iterator[None]:
    """A real Ray cluster of this machine, which this process is connected to."""
    allow_slow_starts()
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
    import ray

    scratch = tempfile.mkdtemp(prefix="sr", dir="/tmp")  # Ray's sockets need a short path
    ray.init(
        address="local",
        num_cpus=4,
        include_dashboard=False,
        object_store_memory=200 * 2**20,
        log_to_driver=False,
        _temp_dir=scratch,
    )
    yield
    ray.shutdown()
    shutil.rmtree(scratch, ignore_errors=True)


def until(holds: Callable[[], bool], seconds: float = PATIENCE_S) -> None:
    """Waits until it does."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "it did not come about in time"
        time.sleep(0.2)
