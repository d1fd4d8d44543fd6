"""Blocks of a vision tower, compiled by torch."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from sae_ray.errors import UsageError

OPTIONS = {
    # Otherwise kernels are chosen by how long they took, and with them the rounding.
    "deterministic": True,
    # Processes that compile would outlive what is stopped; all blocks are alike, so that there is little to compile.
    "compile_threads": 1,
}


def compile_blocks(blocks: Sequence[nn.Module], name: str) -> None:
    """Has the forward passes of blocks compiled when they first run, and again for every other shape of input.

    Hooks on the blocks work as before. While the MLP of a block has hooks, that block runs as it was.

    Args:
        blocks: as `Tower.blocks`.
        name: the encoder's, for messages.

    Raises:
        UsageError: there are none; or, when they run, this machine cannot compile them.
    """
    if not blocks:
        raise UsageError(f"compile = true, but {name} has no blocks of a transformer to compile; leave it out")
    for block in blocks:
        block.forward = _compiled(block, name)


def _compiled(block: Any, name: str) -> Any:
    from torch._dynamo.exc import TorchDynamoException

    eager = block.forward
    fast = torch.compile(eager, dynamic=False, options=OPTIONS)

    @functools.wraps(eager)
    def forward(*args: Any, **settings: Any) -> Any:
        if getattr(getattr(block, "mlp", None), "_forward_hooks", None):
            return eager(*args, **settings)  # compiled, it would not call them
        try:
            return fast(*args, **settings)
        except TorchDynamoException as error:
            cause = getattr(error, "inner_exception", error)
            reason = next(iter(str(cause).splitlines()), type(cause).__name__)
            raise UsageError(
                f"compile = true, but torch cannot compile the blocks of {name} on this machine ({reason}); install a "
                "C compiler such as gcc, or leave it out"
            ) from error

    return forward
