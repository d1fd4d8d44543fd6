"""Pieces of work as tasks of Ray, a few at a time, each with the memory that it needs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar

from sae_ray.errors import SaeRayError

from .cluster import most_memory, nodes_alive
from .progress import say
from .stage import readable

LOOK_SECONDS = 10.0
"""Without an end of a task, after which it is seen whether all still have a node that is large enough."""
WAIT_SECONDS = 600.0
"""For a node as large as one that was lost: clouds replace it within some minutes."""
END_SECONDS = 60.0
"""That a cancelled task has to end."""

T = TypeVar("T")


class Workers(NamedTuple):
    """What a piece of work asks Ray for besides memory."""

    cpus: float
    """Of each."""
    gpus: float
    number: int = 1
    """At once."""


def ended(
    stage: str,
    waiting: list[T],
    at_once: int,
    workers: Workers,
    memory: Callable[[T], float],
    begin: Callable[[T, int], Any],
    moves: bool = True,
) -> Iterator[tuple[T, Any]]:
    """Begins what waits, at most so many at once; yields each as it ends, with its task. More may be added meanwhile.

    Ray begins a lost task again with the memory that it first asked for. Where no node is left that has so much, it
    would wait for ever: after `WAIT_SECONDS` it is begun with the most that a node has.

    Args:
        memory: bytes of each worker of a piece of work; it is given at most what nodes have.
        begin: starts its task, with so many bytes for each worker.
        moves: whether a task that waits for memory may be ended and begun again. Not one that has begun actors: these
            may still be at work.

    Raises:
        SaeRayError: a task that was ended to be begun again went on.
    """
    import ray

    running: dict[Any, tuple[T, int]] = {}
    most = 0  # bytes that a node has, or had which was lost lately
    waits_since: float | None = None
    while waiting or running:
        there, now = most_memory(nodes_alive(), *workers), time.monotonic()
        most = max(most, there)
        short = {task: asked for task, (_, asked) in running.items() if asked > there > 0}
        if not short:
            waits_since = None
        elif waits_since is None:
            waits_since = now
            then = f" for {WAIT_SECONDS / 60:.0f} minutes, and is then begun again with less" if moves else ""
            say(
                f"{stage}: no node is left that has the {readable(max(short.values()))} of memory which a task asked "
                f"for, only one of {readable(there)}; it waits for such a node{then}"
            )
        elif now - waits_since >= WAIT_SECONDS:
            most = there
            if moves:
                say(
                    f"{stage}: no node came that has enough memory; what waits for one is begun again with "
                    f"{readable(there)}, the most that there is. Should that be too little, add a node"
                )
                for task in short:
                    _end(task, stage)
                    waiting.insert(0, running.pop(task)[0])
        while waiting and len(running) < at_once:
            one = waiting.pop(0)
            wanted = int(memory(one))
            asked = min(wanted, most or wanted)
            running[begin(one, asked)] = one, asked
        finished, _ = ray.wait(list(running), timeout=LOOK_SECONDS)
        for task in finished:
            one, _ = running.pop(task)
            yield one, task


def _end(task: Any, stage: str) -> None:
    import ray

    ray.cancel(task)
    if not ray.wait([task], timeout=END_SECONDS)[0]:
        raise SaeRayError(
            f"a task of the stage {stage} that was to be begun again with less memory did not end within "
            f"{END_SECONDS:.0f} seconds; run the same command to resume"
        )
