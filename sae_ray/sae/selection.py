"""Which entries are the largest, of the whole batch or of each row, over all ranks.

Ties go to the lower flat index into the whole matrix. Every rank gets those of its own part, as indices into that.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from sae_ray.sae import selection_by_numpy as by_numpy
from sae_ray.sae.kernels import kernels_for
from sae_ray.sae.ranks import ALONE, Ranks, Split
from sae_ray.sae.whole_numbers import first_numbers, stable_order

if TYPE_CHECKING:
    from collections.abc import Callable

    from jaxtyping import Bool, Float, Int
    from torch import Tensor

# Entries that a GPU kernel may find per wanted entry; beyond that, the plain search takes over.
_CAPACITY = 4
# Bits of the smallest kept value that one round of the search determines.
_DIGIT_BITS = 11


class BatchSelection:
    """Selects the `k * batch` largest values of the batch of all ranks, step after step."""

    def __init__(self, k: int, split: Split):
        self.k, self.split = k, split
        self._smallest = 0.0
        """Smallest value of the last selection."""
        self._margin = 0.1
        """How far below it the next search starts, as a fraction. Only the speed depends on it."""

    def __call__(self, pre: Float[Tensor, "rows latents"]) -> Int[Tensor, " nnz"]:
        """Ascending flat indices into this rank's part."""
        count, ranks = self.k * len(pre) * self.split.rows.size, self.split.ranks
        guess = (1 - self._margin) * self._smallest
        found, n_found = _candidates(pre.flatten(), count, guess, ranks)
        chosen = _largest(pre, found, n_found, count, self.split)
        kept = pre.flatten()[chosen]
        smallest = kept.amin() if len(kept) else kept.new_full((), torch.inf)
        self._smallest = ranks.smallest(smallest).item()
        if self._smallest < guess or n_found < 1.1 * count:
            self._margin = min(0.5, 1.5 * self._margin)
        elif n_found > 1.5 * count:
            self._margin *= 0.8
        return chosen


def largest_positive(
    matrix: Float[Tensor, "rows latents"], count: int, guess: float = 0.0, split: Split = ALONE
) -> Int[Tensor, " nnz"]:
    """Ascending flat indices of the `count` largest values of the whole matrix; fewer where fewer are above 0.

    Args:
        matrix: this rank's part.
        guess: A value slightly below the smallest of these, the same on all ranks. It affects the speed, but never the
            result.
    """
    return _largest(matrix, *_candidates(matrix.flatten(), count, guess, split.ranks), count, split)


def largest_positive_per_row(
    matrix: Float[Tensor, "rows latents"], k: int, split: Split = ALONE
) -> Int[Tensor, " nnz"]:
    """Ascending flat indices of the `k` largest values of each row; fewer where fewer are above 0."""
    flat, maxima = matrix.flatten(), _block_maxima(matrix, k)
    found = _at_least(flat, maxima, _bound(maxima, k))
    falling = flat[found].argsort(descending=True, stable=True)
    rows = found[falling] // matrix.shape[1]
    by_row = rows.argsort(stable=True)
    rows, falling = rows[by_row], falling[by_row]
    rank = torch.arange(len(rows), device=rows.device) - torch.searchsorted(rows, rows)
    return largest_of_rows(matrix, found[falling[rank < k]].sort().values, k, split.latents)


def padded_largest(
    matrix: Float[Tensor, "rows width"],
    k: int,
    exact: Callable[[Int[Tensor, " n"]], Float[Tensor, " n"]] | None = None,
) -> tuple[Int[Tensor, " rows*k"], Float[Tensor, " rows*k"]]:
    """As `largest_positive_per_row` of one process, and their values; where entries are missing, `matrix.numel()` and 0
    at the end.

    The shapes of all that it does depend on those of the matrix alone, so that it can be part of a CUDA graph.

    Args:
        exact: computes the values at flat indices, for a matrix that is a rough form of them. The `k` largest are then
            looked for among the `2 * k` that are largest in the matrix.
    """
    if exact is None:
        flat = _largest_per_row(matrix, k, signed=False)
        values = matrix.flatten()[flat]
    else:
        near = largest_per_row(matrix, min(2 * k, matrix.shape[1]))
        of_near = exact(near.flatten()).view_as(near)
        places = _first_largest(of_near, k, signed=False)
        flat, values = near.gather(1, places), of_near.gather(1, places)
    missing = matrix.numel()
    flat = torch.where(values > 0, flat, missing).flatten()
    order = stable_order(flat, missing)
    return flat[order], values.relu().flatten()[order]


def largest_per_row(matrix: Float[Tensor, "rows width"], k: int) -> Int[Tensor, "rows k"]:
    """Flat indices of the `k` largest of each row, of either sign, ascending in each row. Their number is fixed: shapes
    depend on those of the matrix alone."""
    return _largest_per_row(matrix, k, signed=True).sort(dim=1).values


def _largest_per_row(matrix: Float[Tensor, "rows width"], k: int, signed: bool) -> Int[Tensor, "rows k"]:
    """The same in no order. They are in the `k` blocks with the largest maxima.

    Args:
        signed: as in `_first_largest`.
    """
    n_rows, width = matrix.shape
    # There are width / size maxima to search, then k * size values: least where both are equally many.
    size = math.gcd(width, 2 ** min(6, round(math.log2(width / k) / 2)))
    maxima = _maxima(matrix, size)
    blocks = _first_largest(maxima, min(k, maxima.shape[1]), signed)
    # In order, so that the first among equal values are the first in the matrix.
    blocks = blocks.gather(1, stable_order(blocks, width))
    near = matrix.view(n_rows, -1, size).gather(1, blocks.unsqueeze(2).expand(-1, -1, size)).flatten(1)
    places = _first_largest(near, k, signed)
    columns = blocks.gather(1, places // size) * size + places % size
    return (width * first_numbers(n_rows, matrix.device)).unsqueeze(1) + columns


def _first_largest(matrix: Float[Tensor, "rows width"], k: int, signed: bool) -> Int[Tensor, "rows k"]:
    """Places, in no order, of the `k` largest of each row, the first among equal ones.

    Args:
        signed: whether values below 0 compete as well; otherwise they are found, in no order, where others are missing.
    """
    # A value and its place as one number: the value's bits, then what is lower for a later place.
    rising = _rising(matrix) if signed else matrix.view(torch.int32).long()
    keys = (rising << 32) - first_numbers(matrix.shape[1], matrix.device)
    return keys.topk(k, dim=1, sorted=False).indices


def _rising(values: Float[Tensor, "*shape"]) -> Int[Tensor, "*shape"]:
    """Numbers of 32 bits, as int64, that rise as the values do."""
    bits = values.view(torch.int32)
    return torch.where(bits < 0, bits ^ torch.iinfo(torch.int32).max, bits).long()


def largest_of_rows(
    matrix: Float[Tensor, "rows latents"], found: Int[Tensor, " found"], k: int, latents: Ranks
) -> Int[Tensor, " nnz"]:
    """Those of the found entries that are among the `k` largest of their row, over the ranks that split the latents.

    Args:
        matrix: float32.
        found: ascending flat indices of this rank's `k` largest of each row, or fewer.
    """
    if latents.size == 1:
        return found
    n_rows, width = matrix.shape
    rows, own = found // width, found % width
    # An entry as one number: the value's bits, which order floats of one sign, then what is lower for a higher latent.
    keys = (_rising(matrix.flatten()[found]) << 32) - latents.places(own)
    lowest = torch.iinfo(torch.int64).min
    # Each rank looks for the smallest kept number of some of the rows.
    by_row = keys.new_full((n_rows + -n_rows % latents.size, k), lowest)
    by_row[rows, torch.arange(len(rows), device=rows.device) - torch.searchsorted(rows, rows)] = keys
    of_all = latents.exchange(by_row).transpose(0, 1).flatten(1)
    smallest = latents.gather(of_all.topk(k, dim=1, sorted=False).values.amin(1))
    return found[keys >= smallest[rows]]


def _numpy_serves(values: Tensor, ranks: Ranks) -> bool:
    return ranks.size == 1 and values.device.type == "cpu" and kernels_for(values) is None


def _candidates(flat: Float[Tensor, " n"], count: int, guess: float, ranks: Ranks) -> tuple[Int[Tensor, " found"], int]:
    """Ascending indices of this rank's values that are not below a bound common to all ranks, and how many all found:
    at least `count`, or all values above 0."""
    # Where every rank has this many values that are not below a bound, there are `count` of them in all.
    if _numpy_serves(flat, ranks) and len(flat) <= by_numpy.SMALL:
        found = by_numpy.at_least(flat, guess) if guess > 0 else None
        if found is None or len(found) < count:
            found = by_numpy.at_least(flat, torch.finfo(flat.dtype).tiny)
        return found, len(found)
    per_rank = -(-count // ranks.size)
    found = maxima = None
    if guess > 0:
        if kernels := kernels_for(flat):
            found = kernels.at_least(flat, guess, _CAPACITY * per_rank)
        if found is None:
            maxima = _block_maxima(flat.unsqueeze(0), per_rank)
            found = _at_least(flat, maxima, maxima.new_tensor([[guess]]))
        n_found = ranks.total(len(found), flat.device)
        if n_found >= count:
            return found, n_found
    if maxima is None:
        maxima = _block_maxima(flat.unsqueeze(0), per_rank)
    found = _at_least(flat, maxima, ranks.smallest(_bound(maxima, per_rank)))
    return found, ranks.total(len(found), flat.device)


def _largest(
    matrix: Float[Tensor, "rows latents"], found: Int[Tensor, " found"], n_found: int, count: int, split: Split
) -> Int[Tensor, " nnz"]:
    """Of these candidates the `count` largest of all ranks, this rank's part."""
    if n_found <= count:
        return found
    if _numpy_serves(matrix, split.ranks):
        return by_numpy.largest(matrix.flatten(), found, count)
    values = matrix.flatten()[found]
    smallest, n_ties = _smallest_kept(values, count, split.ranks)
    tied = values == smallest
    return found[(values > smallest) | (tied & _among_first(found, tied, n_ties, matrix.shape[1], split))]


def _among_first(
    found: Int[Tensor, " found"], tied: Bool[Tensor, " found"], count: Int[Tensor, ""], width: int, split: Split
) -> Bool[Tensor, " found"]:
    """Whether the entries that are tied are among the first `count` of the whole matrix that are."""
    if split.latents.size == 1:  # all ranks before this one hold earlier entries
        return tied.cumsum(0) <= count - split.rows.sum_before(tied.sum())
    places = (found // width << 32) + split.latents.places(found % width)  # rise as indices into the whole matrix do
    first = places.new_full((int(count),), torch.iinfo(torch.int64).max)
    own = places[tied][: len(first)]
    first[: len(own)] = own
    return places <= split.latents.gather(first).kthvalue(len(first)).values


def _smallest_kept(
    values: Float[Tensor, " found"], count: int, ranks: Ranks
) -> tuple[Float[Tensor, ""], Int[Tensor, ""]]:
    """The `count`-th largest of the values of all ranks, which are above 0 and more than that; and how many of those
    equal to it are among the `count`.

    Floats above 0 compare as their bits, and a histogram of the leading bits tells where the `count`-th largest lies.
    """
    bits = 8 * values.element_size() - 1  # without the sign
    keys = values.view(torch.int32 if bits == 31 else torch.int64)
    known = keys.new_zeros(())
    left = torch.full((), count, device=values.device)
    for shift in range(bits // _DIGIT_BITS * _DIGIT_BITS, -1, -_DIGIT_BITS):
        leading = keys >> shift
        inside = (leading >> _DIGIT_BITS == known).int()
        own = inside.new_zeros(2**_DIGIT_BITS).index_add_(0, leading & (2**_DIGIT_BITS - 1), inside)
        histogram = ranks.sum(own)
        at_least = histogram.flip(0).cumsum(0).flip(0)
        digit = (at_least >= left).sum() - 1
        # Not `[digit]`, for which the host would wait.
        left = left - (at_least - histogram).gather(0, digit.unsqueeze(0)).squeeze(0)
        known = (known << _DIGIT_BITS) | digit.to(keys.dtype)
    return known.view(values.dtype), left


def _block_maxima(matrix: Float[Tensor, "rows width"], count: int) -> Float[Tensor, "rows n_blocks"]:
    """The largest values of blocks of each row, at least two blocks per value looked for where there are so many."""
    width = matrix.shape[1]
    block = math.gcd(width, 64)
    while block > 1 and width // block < 2 * count:
        block //= 2
    return _maxima(matrix, block)


def _maxima(matrix: Float[Tensor, "rows width"], block: int) -> Float[Tensor, "rows n_blocks"]:
    """The largest value of each block of neighbours; `block` divides the width."""
    n_rows, width = matrix.shape
    if block == 1:
        return matrix
    if kernels := kernels_for(matrix):
        return kernels.block_maxima(matrix.flatten(), block).view(n_rows, width // block)
    return matrix.view(n_rows, width // block, block).amax(2)


def _bound(maxima: Float[Tensor, "rows n_blocks"], count: int) -> Float[Tensor, "rows 1"]:
    """Above 0 and at most the `count`-th largest of the row: the `count`-th largest of the maxima of its blocks."""
    tiny = torch.finfo(maxima.dtype).tiny
    if maxima.shape[1] < count:
        return maxima.new_full((len(maxima), 1), tiny)
    return maxima.topk(count, dim=1, sorted=False).values.amin(1, keepdim=True).clamp_min(tiny)


def _at_least(
    flat: Float[Tensor, " n"], maxima: Float[Tensor, "rows n_blocks"], bounds: Float[Tensor, "rows 1"]
) -> Int[Tensor, " found"]:
    """Ascending indices of the values that are not below the bound of their row; blocks that are below are skipped."""
    near = (maxima >= bounds).flatten().nonzero().squeeze(1)
    block = len(flat) // max(1, maxima.numel())
    values = flat.view(maxima.numel(), block).index_select(0, near)
    places = _true((values >= bounds[near // maxima.shape[1]]).flatten())
    return near[places // block] * block + places % block


def _true(flags: Bool[Tensor, " n"]) -> Int[Tensor, " found"]:
    """Ascending indices of the true ones, which are few."""
    if len(flags) % 8:
        return flags.nonzero().squeeze(1)
    # Eight flags are read as one word: most words are 0.
    words = flags.view(torch.int64).nonzero()
    places = 8 * words + torch.arange(8, device=flags.device)
    return places[flags.view(-1, 8)[words.squeeze(1)]]
