"""Sparse codes, and the products with them that cost the number of entries instead of the width of the dictionary.

Sums over entries go through `embedding_bag`, which adds the entries of one row (or latent) in order on one thread, so
results are the same every time; on a GPU too.
"""

from __future__ import annotations

import math
import warnings
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor

with warnings.catch_warnings():
    # Torch says once per process that CSR is in beta; this is that once.
    warnings.simplefilter("ignore")
    torch.zeros(1, 1).to_sparse_csr()


class SparseCodes(NamedTuple):
    """Codes of several samples: the active latents only, sorted by (row, latent)."""

    rows: Int[Tensor, " nnz"]
    """Index of the sample, int64."""
    latents: Int[Tensor, " nnz"]
    """Index of the latent, int64."""
    values: Float[Tensor, " nnz"]
    """Activation, above 0."""
    n_rows: int
    """Number of samples, those without an active latent included."""
    d_sae: int
    """Number of latents."""

    def to_dense(self) -> Float[Tensor, "n_rows d_sae"]:
        dense = self.values.new_zeros(self.n_rows, self.d_sae)
        dense[self.rows, self.latents] = self.values
        return dense


class Pattern:
    """Which entries of a matrix [n_rows, n_latents] exist, sorted by row."""

    def __init__(self, rows: Int[Tensor, " nnz"], latents: Int[Tensor, " nnz"], n_rows: int, n_latents: int):
        self.rows, self.latents, self.n_rows, self.n_latents = rows, latents, n_rows, n_latents

    @classmethod
    def of_flat(cls, flat: Int[Tensor, " nnz"], n_rows: int, n_latents: int) -> Pattern:
        """From ascending indices into the flattened matrix."""
        return cls(flat // n_latents, flat % n_latents, n_rows, n_latents)

    @cached_property
    def row_offsets(self) -> Int[Tensor, " n_rows+1"]:
        return _offsets(self.rows, self.n_rows)

    @cached_property
    def by_latent(self) -> Int[Tensor, " nnz"]:
        """The permutation that sorts the entries by (latent, row)."""
        return self.latents.argsort(stable=True)

    @cached_property
    def latent_offsets(self) -> Int[Tensor, " n_latents+1"]:
        return _offsets(self.latents[self.by_latent], self.n_latents)

    def row_sums(self, values: Float[Tensor, " nnz"], table: Float[Tensor, "n_latents d"]) -> Float[Tensor, "n_rows d"]:
        """`M @ table`, where M holds `values`."""
        return _bag_sums(self.latents, self.row_offsets, values, table)

    def latent_sums(
        self, values: Float[Tensor, " nnz"], table: Float[Tensor, "n_rows d"]
    ) -> Float[Tensor, "n_latents d"]:
        """`M.T @ table`, where M holds `values`."""
        order = self.by_latent
        return _bag_sums(self.rows[order], self.latent_offsets, values[order], table)

    def dots(self, left: Float[Tensor, "n_rows d"], right: Float[Tensor, "n_latents d"]) -> Float[Tensor, " nnz"]:
        """The entries of `left @ right.T` that exist."""
        empty = left.new_zeros(len(self.rows))
        mask = torch.sparse_csr_tensor(
            self.row_offsets, self.latents, empty, (self.n_rows, self.n_latents), check_invariants=False
        )
        return torch.sparse.sampled_addmm(mask, left, right.T, beta=0).values()


class _EncodeEntries(torch.autograd.Function):
    @staticmethod
    def forward(ctx, pre, x, W_enc_t, b_enc, b_dec, pattern):
        ctx.save_for_backward(x, W_enc_t, b_dec)
        ctx.pattern = pattern
        return pre.view_as(pre)

    @staticmethod
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        x, W_enc_t, b_dec = ctx.saved_tensors
        grad = grad.contiguous()
        grad_W = ctx.pattern.latent_sums(grad, x - b_dec)
        grad_b_enc = ctx.pattern.latent_sums(grad, grad.new_ones(len(x), 1)).squeeze(1)
        # Every entry pulls b_dec against its encoder row, and grad_b_enc has already summed the entries of a latent.
        return None, None, grad_W, grad_b_enc, -(grad_b_enc @ W_enc_t), None


class _DecodeEntries(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values, W_dec, pattern):
        ctx.save_for_backward(values, W_dec)
        ctx.pattern = pattern
        return pattern.row_sums(values, W_dec)

    @staticmethod
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        values, W_dec = ctx.saved_tensors
        grad = grad.contiguous()
        return ctx.pattern.dots(grad, W_dec), ctx.pattern.latent_sums(values, grad), None


def encode_entries(
    pre: Float[Tensor, " nnz"],
    x: Float[Tensor, "batch d_in"],
    W_enc_t: Float[Tensor, "d_sae d_in"],
    b_enc: Float[Tensor, " d_sae"],
    b_dec: Float[Tensor, " d_in"],
    pattern: Pattern,
) -> Float[Tensor, " nnz"]:
    """The already computed entries `pre` of `(x - b_dec) @ W_enc_t.T + b_enc`, with gradients for all but x."""
    result = _EncodeEntries.apply(pre, x, W_enc_t, b_enc, b_dec, pattern)
    assert isinstance(result, torch.Tensor)
    return result


def decode_entries(
    values: Float[Tensor, " nnz"], W_dec: Float[Tensor, "d_sae d_in"], pattern: Pattern
) -> Float[Tensor, "n_rows d_in"]:
    """`codes @ W_dec`, with gradients for `values` and `W_dec`."""
    result = _DecodeEntries.apply(values, W_dec, pattern)
    assert isinstance(result, torch.Tensor)
    return result


def largest_positive(matrix: Float[Tensor, "batch d_sae"], count: int) -> Int[Tensor, " nnz"]:
    """Ascending flat indices of the `count` largest values of the whole matrix; fewer where fewer are above 0."""
    flat = matrix.flatten()
    # The count-th largest of the maxima of disjoint blocks is at most the count-th largest value. This bound, cheap to
    # find, leaves few candidates to choose from.
    block = math.gcd(flat.numel(), 64)
    while block > 1 and flat.numel() // block < 2 * count:
        block //= 2
    bound = flat.new_tensor(torch.finfo(flat.dtype).tiny)
    if block > 1:
        bound = bound.maximum(flat.view(-1, block).amax(1).topk(count, sorted=False).values.amin())
    found = (flat >= bound).nonzero().squeeze(1)
    if len(found) > count:
        found = found[flat[found].topk(count, sorted=False).indices].sort().values
    return found


def largest_positive_per_row(matrix: Float[Tensor, "batch d_sae"], k: int) -> Int[Tensor, " nnz"]:
    """Ascending flat indices of the `k` largest values of each row; fewer where fewer are above 0."""
    top = matrix.topk(k, dim=1, sorted=False)
    starts = torch.arange(0, matrix.numel(), matrix.shape[1], device=matrix.device)[: len(matrix)]
    return (starts.unsqueeze(1) + top.indices)[top.values > 0].sort().values


def _offsets(ascending: Tensor, count: int) -> Tensor:
    return torch.searchsorted(ascending, torch.arange(count + 1, device=ascending.device))


def _bag_sums(indices: Tensor, offsets: Tensor, weights: Tensor, table: Tensor) -> Tensor:
    # Detached, or embedding_bag would collect what its own backward needs.
    return F.embedding_bag(
        indices, table.detach(), offsets, mode="sum", per_sample_weights=weights.detach(), include_last_offset=True
    )
