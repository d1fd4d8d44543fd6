"""Checks that there is enough disk space before a stage starts."""

from __future__ import annotations

from sae_ray.errors import SaeRayError
from sae_ray.store.files import Folder

SPARE = 1.1


def check_disk(root: Folder, stage: str, needed: int) -> None:
    """Raises SaeRayError if the root's disk has less than `needed` bytes plus a tenth free."""
    free = root.free_bytes()
    if free is not None and free < needed * SPARE:
        raise SaeRayError(
            f"{stage} needs about {readable(needed)} under {root}, but only {readable(free)} are free; "
            "free some space or choose another root"
        )


def readable(n_bytes: float) -> str:
    """A size for people, such as `1.5 GB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if n_bytes < 1000:
            return f"{n_bytes:.3g} {unit}"
        n_bytes /= 1000
    return f"{n_bytes:,.3g} TB"
