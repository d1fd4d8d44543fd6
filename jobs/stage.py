"""What every stage does around its work."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Protocol, TypeVar

from sae_ray.errors import SaeRayError
from sae_ray.store.files import Folder
from sae_ray.store.steps import Step, hold, note_failure

from .cluster import connect, loss, reason, user_error
from .metrics import count_failure

SPARE = 1.1


class Planned(Protocol):
    """The plan of one step."""

    @property
    def step(self) -> Step: ...

    @property
    def inputs(self) -> list[Step]:
        """The steps that it reads."""
        ...

    @property
    def bytes(self) -> int:
        """Its approximate size on disk."""
        ...


P = TypeVar("P", bound=Planned)


def unfinished(plans: Sequence[P]) -> list[P]:
    """The plans that are left to do: not finished, and reading no step that failed permanently."""
    left = [one for one in plans if not one.step.finished]
    failed = {name for name, step in _inputs(left).items() if step.failure}
    return [one for one in left if failed.isdisjoint(_inputs([one]))]


def _inputs(plans: Sequence[Planned]) -> dict[str, Step]:
    """What is read, each step once: to tell whether one is whole its files are listed, which may be very many."""
    return {step.name: step for one in plans for step in one.inputs}


@contextmanager
def at_work(root: Folder, stage: str, todo: Sequence[Planned]) -> Iterator[Failures]:
    """Surrounds the work on some steps of one stage: checks, joins the cluster, keeps other drivers out.

    An error that ends the work is noted in the steps that are left, but for those in which one is noted already.

    Raises:
        SaeRayError: a step that is read is missing, the disk is too full, another driver is at work on one of the
            steps, a worker raised an error that a user can fix, or more was lost (processes, nodes, the disk, the
            object store) than Ray restores.
    """
    for step in _inputs(todo).values():
        if not step.finished:
            raise SaeRayError(f"{step.label} does not exist yet; run the {step.stage} stage first")
    check_disk(root, stage, sum(one.bytes for one in todo))
    try:
        steps = [one.step for one in todo]
        with hold(steps), noting_failures(steps) as failures:
            connect()
            yield failures
    except Exception as error:
        if known := user_error(error):
            raise known from None
        if (lost := loss(error)) is None:
            raise
        problem = f"{stage} stopped: {lost}; finished work is kept: run the same command to resume"
        raise SaeRayError(problem) from error


@contextmanager
def noting_failures(steps: Sequence[Step]) -> Iterator[Failures]:
    """Notes what the block raises in steps that this process holds."""
    failures = Failures()
    try:
        yield failures
    except Exception as error:
        failures.note(steps, error)
        raise


class Failures:
    """Notes in steps why work on them ended, and counts it. The first error of a step is the one that is kept."""

    def __init__(self):
        self._noted: set[str] = set()

    def note(self, steps: Sequence[Step], error: Exception) -> None:
        """Notes an error in those of the steps that are not finished."""
        for step in steps:
            with suppress(OSError, SaeRayError):  # the disk may be full, or the step torn: that must not hide the error
                if step.name not in self._noted and not step.finished:
                    self._noted.add(step.name)
                    count_failure(step)
                    note_failure(step, reason(error))


def check_disk(root: Folder, stage: str, needed: int) -> None:
    """Raises SaeRayError when the root's disk has less than `needed` bytes (and a tenth) free."""
    free = root.free_bytes()
    if free is not None and free < needed * SPARE:
        raise SaeRayError(
            f"{stage} needs about {readable(needed)} under {root}, where {readable(free)} are free; "
            "free some space or choose another root"
        )


def readable(n_bytes: float) -> str:
    """`1.5 GB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if n_bytes < 1000:
            return f"{n_bytes:.3g} {unit}"
        n_bytes /= 1000
    return f"{n_bytes:,.3g} TB"
