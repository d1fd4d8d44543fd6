"""Sparse codes, and the products with them that cost the number of entries instead of the width of the dictionary.

Sums over entries go through `embedding_bag`, or through Triton kernels on a GPU. Both add the entries of one row (or
latent) in order, so results are the same every time. Gradients of weights are sparse tensors that hold the rows of the
latents that have entries.
"""

from __future__ import annotations

import warnings
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F

from sae_ray.sae.kernels import kernels_for
from sae_ray.sae.whole_numbers import first_numbers, stable_order

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor

with warnings.catch_warnings():
    # Torch warns once per process that CSR is in beta; this is that warning, hidden.
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
        return stable_order(self.latents, self.n_latents)

    @cached_property
    def rows_by_latent(self) -> Int[Tensor, " nnz"]:
        """Their rows in that order."""
        return self.rows[self.by_latent]

    @cached_property
    def used(self) -> Int[Tensor, " n_used"]:
        """The latents that have entries, ascending."""
        return self._runs[0]

    @cached_property
    def used_offsets(self) -> Int[Tensor, " n_used+1"]:
        """Where the entries of each used latent begin in `by_latent`."""
        return F.pad(self._runs[1].cumsum(0), (1, 0))

    @cached_property
    def _runs(self) -> tuple[Tensor, Tensor]:
        if self.n_latents > len(self.latents):
            return torch.unique_consecutive(self.latents[self.by_latent], return_counts=True)
        counts = torch.bincount(self.latents, minlength=self.n_latents)
        used = counts.nonzero().squeeze(1)
        return used, counts[used]

    def row_sums(self, values: Float[Tensor, " nnz"], table: Float[Tensor, "n_latents d"]) -> Float[Tensor, "n_rows d"]:
        """`M @ table`, where M holds `values`."""
        return _bag_sums(self.latents, self.row_offsets, values, table)

    def latent_sums(self, values: Float[Tensor, " nnz"], table: Float[Tensor, "n_rows d"]) -> Float[Tensor, "n_used d"]:
        """The rows of `M.T @ table` of the used latents, where M holds `values`; all others are 0."""
        return _bag_sums(self.rows_by_latent, self.used_offsets, values[self.by_latent], table)

    def of_used(self, sums: Float[Tensor, "n_used d"]) -> Float[Tensor, "n_latents d"]:
        """A sparse tensor with these rows for the used latents."""
        shape = (self.n_latents, sums.shape[1])
        return torch.sparse_coo_tensor(self.used.unsqueeze(0), sums, shape, is_coalesced=True, check_invariants=False)

    def spread(self, numbers: Float[Tensor, " n_used"]) -> Float[Tensor, " n_latents"]:
        """These for the used latents, 0 for all others."""
        return numbers.new_zeros(self.n_latents).index_copy_(0, self.used, numbers)

    def dots(self, left: Float[Tensor, "n_rows d"], right: Float[Tensor, "n_latents d"]) -> Float[Tensor, " nnz"]:
        """The entries of `left @ right.T` that exist."""
        if kernels := kernels_for(left):
            return kernels.dots(self.rows, self.latents, left, right)
        empty = left.new_zeros(len(self.rows))
        mask = torch.sparse_csr_tensor(
            self.row_offsets, self.latents, empty, (self.n_rows, self.n_latents), check_invariants=False
        )
        return torch.sparse.sampled_addmm(mask, left, right.T, beta=0).values()


class PaddedPattern(Pattern):
    """A pattern for kernels whose number of entries is fixed: missing ones come last, in row `n_rows` or beyond of
    latent `n_latents`.

    The shapes of all that follows from it are fixed as well: sums go over all latents, gradients of weights are dense.
    """

    @classmethod
    def of_flat(cls, flat: Int[Tensor, " nnz"], n_rows: int, n_latents: int) -> Pattern:
        """From ascending indices into the flattened matrix; `n_rows * n_latents` for a missing entry."""
        rows = flat // n_latents
        return cls(rows, torch.where(rows < n_rows, flat % n_latents, n_latents), n_rows, n_latents)

    @cached_property
    def used(self) -> Int[Tensor, " n_latents"]:
        """All latents."""
        return first_numbers(self.n_latents, self.rows.device)

    @cached_property
    def used_offsets(self) -> Int[Tensor, " n_latents+1"]:
        return _offsets(self.latents[self.by_latent], self.n_latents)

    def of_used(self, sums: Float[Tensor, "n_latents d"]) -> Float[Tensor, "n_latents d"]:
        """They are those of all latents."""
        return sums

    def spread(self, numbers: Float[Tensor, " n_latents"]) -> Float[Tensor, " n_latents"]:
        return numbers


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
        pattern = ctx.pattern
        grad_W = pattern.latent_sums(grad, x - b_dec)
        grad_b = pattern.latent_sums(grad, grad.new_ones(len(x), 1)).squeeze(1)
        grad_b_enc = pattern.spread(grad_b)
        # Every entry pulls b_dec against its encoder row, and grad_b_enc has already summed the entries of a latent.
        return None, None, pattern.of_used(grad_W), grad_b_enc, -(grad_b_enc @ W_enc_t), None


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
        pattern = ctx.pattern
        return pattern.dots(grad, W_dec), pattern.of_used(pattern.latent_sums(values, grad)), None


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


def _offsets(ascending: Tensor, count: int) -> Tensor:
    return torch.searchsorted(ascending, first_numbers(count + 1, ascending.device))


def _bag_sums(indices: Tensor, offsets: Tensor, weights: Tensor, table: Tensor) -> Tensor:
    if kernels := kernels_for(table):
        return kernels.bag_sums(indices, offsets, weights.detach(), table.detach())
    # Detached, or embedding_bag would collect what its own backward needs.
    return F.embedding_bag(
        indices, table.detach(), offsets, mode="sum", per_sample_weights=weights.detach(), include_last_offset=True
    )
