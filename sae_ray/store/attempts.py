"""How often a piece of work was begun: work that ends its process must not be tried for ever."""

from __future__ import annotations

import uuid

from sae_ray.store.files import Folder

ATTEMPTS = "attempts"


def begin(step: Folder, run: str, piece: str, node: str) -> list[str]:
    """Notes that a piece of work begins, and returns the nodes where it was begun before in this run.

    Args:
        step: the folder of the step that it belongs to; what is noted there goes when the step is finished.
        run: names the driver's run. Earlier runs do not count: who starts again wants it tried again.
        piece: names the work.
        node: where it begins.
    """
    noted = step / f"{ATTEMPTS}/{run}/{piece}"
    before = [name.partition("-")[0] for name in noted.files()]
    noted.write_bytes(f"{node}-{uuid.uuid4().hex}", b"")
    return before
