"""Pieces of work as tasks of Ray, a few at a time, each with the memory that it needs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar

from .cluster import at_most_a_node
from .progress import say
from .stage import readable

LOOK_SECONDS = 10.0
"""Without an end of a task, after which it is seen whether all still have a node that is large enough."""
END_SECONDS = 60.0
"""That a cancelled task has to end."""

T = TypeVar("T")


class Needs(NamedTuple):
    """What a piece of work asks Ray for."""

    memory: float
    """Bytes of each worker; it is given at most what nodes have."""
    cpus: float
    gpus: float
    workers: int = 1
    """At once."""


def ended(
    stage: str, waiting: list[T], at_once: int, needs: Callable[[T], Needs], begin: Callable[[T, int], Any]
) -> Iterator[tuple[T, Any]]:
    """Begins what waits, at most so many at once; yields each as it ends, with its task. More may be added meanwhile.

    Ray begins a lost task again with the memory that it first asked for. Where no node is left that has so much, it
    would wait for ever: it is then begun with the most that a node has.

    Args:
        needs: of a piece of work.
        begin: starts its task, with so many bytes for each worker.
    """
    import ray

    running: dict[Any, tuple[T, int]] = {}
    while waiting or running:
        while waiting and len(running) < at_once:
            one = waiting.pop(0)
            memory = at_most_a_node(*needs(one))
            running[begin(one, memory)] = one, memory
        finished, _ = ray.wait(list(running), timeout=LOOK_SECONDS)
        for task in finished:
            one, _ = running.pop(task)
            yield one, task
        if finished:
            continue
        for task, (one, memory) in list(running.items()):
            most = at_most_a_node(*needs(one)._replace(memory=memory))
            if 0 < most < memory:
                say(
                    f"{stage}: no node is left that has the {readable(memory)} of memory which a task asked for; it is "
                    f"begun again with {readable(most)}, the most that there is. Should that be too little, add a node"
                )
                ray.cancel(task)
                ray.wait([task], timeout=END_SECONDS)
                del running[task]
                waiting.insert(0, one)
