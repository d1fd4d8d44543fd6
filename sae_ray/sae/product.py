"""Dense products: the encoder's, whose cost grows with the width of the dictionary, and those of a block of latents."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

# Latents per block of the product on a CPU, so that each block is read into the cache once.
_LATENTS = 2048
# Entries of a result for which memory is at hand.
_SMALL = 2**16
_kept = threading.local()


@torch.no_grad()
def affine(
    x: Float[Tensor, "batch d_in"], weight: Float[Tensor, "d_sae d_in"], bias: Float[Tensor, " d_sae"]
) -> Float[Tensor, "batch d_sae"]:
    """`x @ weight.T + bias`, without a gradient.

    On a CPU a large result holds until the next call in this thread: fresh memory would cost a third of the product
    again.
    """
    if x.device.type != "cpu":
        return torch.addmm(bias, x, weight.T)
    n_entries = len(x) * len(weight)
    if x.dtype != torch.float32 or not torch.backends.mkldnn.is_available():
        return torch.addmm(bias, x, weight.T, out=_memory(n_entries, x.dtype).view(len(x), len(weight)))
    # oneDNN uses the widest vectors of every CPU, where MKL, torch's default, takes narrow ones on some. This is
    # private, as of torch 2.13.
    if n_entries <= _SMALL:
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    out = _memory(n_entries, x.dtype).view(len(x), len(weight))
    for start in range(0, len(weight), _LATENTS):
        part = slice(start, start + _LATENTS)
        out[:, part] = torch.ops.mkldnn._linear_pointwise(x, weight[part], bias[part], "none", [], "")
    return out


@contextmanager
def tf32(device: torch.device, dtype: str) -> Iterator[None]:
    """Within, products of float32 on a GPU round their factors to TF32, if that is the dtype of a cell."""
    before = torch.get_float32_matmul_precision()
    if wanted := dtype == "tf32" and device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        if wanted:
            torch.set_float32_matmul_precision(before)


@torch.no_grad()
def rough_affine(
    x: Float[Tensor, "batch d_in"], weight: Float[Tensor, "d_sae d_in"], bias: Float[Tensor, " d_sae"]
) -> Float[Tensor, "batch d_sae"]:
    """`x @ weight.T + bias` of factors that are rounded to bfloat16, without a gradient; the sum is float32."""
    if x.device.type == "cpu":
        return (x.bfloat16() @ weight.bfloat16().T).float() + bias
    # The bias in three parts of eight bits each takes part in the product: to add it takes half as long as the product.
    d_in = x.shape[1]
    width = d_in + 3 + (-d_in - 3) % 8
    left = x.new_empty(len(x), width, dtype=torch.bfloat16)
    right = x.new_empty(len(weight), width, dtype=torch.bfloat16)
    left[:, :d_in].copy_(x)
    left[:, d_in:].fill_(1)
    right[:, :d_in].copy_(weight)
    right[:, d_in:].zero_()
    right[:, d_in].copy_(bias)
    for place in (d_in + 1, d_in + 2):
        bias = bias - right[:, place - 1]
        right[:, place].copy_(bias)
    return torch.mm(left, right.T, out_dtype=torch.float32)


def product(left: Float[Tensor, "n inner"], right: Float[Tensor, "inner m"], dtype: str) -> Float[Tensor, "n m"]:
    """`left @ right`, float32, of factors that are rounded to this dtype (see `tf32`); without a gradient."""
    if dtype != "bfloat16":
        return left @ right
    left, right = left.bfloat16(), right.bfloat16()  # themselves, where they are rounded already
    return torch.mm(left, right, out_dtype=torch.float32) if left.is_cuda else (left @ right).float()


def release() -> None:
    """Frees what `affine` keeps in this thread; what it returned is then of no use."""
    _kept.memory = None


def _memory(n_entries: int, dtype: torch.dtype) -> Float[Tensor, " n_entries"]:
    memory = getattr(_kept, "memory", None)
    if memory is None or len(memory) < n_entries or memory.dtype != dtype:
        memory = _kept.memory = torch.empty(n_entries, dtype=dtype)
    return memory[:n_entries]
