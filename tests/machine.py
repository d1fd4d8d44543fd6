"""What tests take from the machine they run on, whatever else runs there: patience, and the processes of actors."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable
from multiprocessing.context import ForkServerContext
from typing import NamedTuple

PATIENCE_S = 300
"""How long tests wait for what must come about. Only what never comes takes that long, however slow the machine."""


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


def until(holds: Callable[[], bool], seconds: float = PATIENCE_S) -> None:
    """Waits until it does."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "it did not come about in time"
        time.sleep(0.2)
