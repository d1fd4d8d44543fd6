"""A section of several pieces."""

from __future__ import annotations

import gc
import sys
import traceback
from collections.abc import Callable, Iterator

import torch

from bench.gpu.sizes import Sizes
from bench.record import Table

Piece = Callable[[Sizes, torch.device], Iterator[Table]]


def in_turn(*pieces: Piece) -> Piece:
    """The `tables` of a section: one piece after the other, each with the memory to itself.

    A piece that fails is reported; the others still run, and the section then ends as failed.
    """

    def tables(sizes: Sizes, device: torch.device) -> Iterator[Table]:
        failed = []
        for piece in pieces:
            try:
                yield from piece(sizes, device)
            except Exception:  # nothing that one piece meets should cost the results of the others
                traceback.print_exc()
                failed.append(piece.__name__)
            free(device)
        if failed:
            sys.exit(f"failed: {', '.join(failed)}")

    return tables


def free(device: torch.device) -> None:
    """Gives back the memory of what is no longer used."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def reason(error: Exception) -> str:
    """What a table says of a row that could not be measured."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:100]}"
