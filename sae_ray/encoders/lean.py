"""Importing transformers, and what belongs to it, in less time than it takes on its own."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uncollected() -> Iterator[None]:
    """Within, no garbage is collected: what an import makes stays, and to look through it takes a fifth of the time."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


@uncollected()
def import_transformers() -> None:
    """Imports what all models of transformers need; call it before its first class is named.

    Two things halve the time. No garbage is collected meanwhile. And scikit-learn is left out, which generation imports
    where it is installed, for assisted decoding alone; nothing of ours uses that (seen in transformers 5.19).
    """
    from transformers import utils

    utils.is_sklearn_available = lambda: False  # pyright: ignore[reportPrivateImportUsage]
    from transformers.models.auto import modeling_auto  # noqa: F401
