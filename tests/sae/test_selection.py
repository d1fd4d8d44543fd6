"""The largest entries: what sorting gives, on one rank and over several, ties by the lower flat index."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from sae_ray.sae.ranks import Ranks, Split
from sae_ray.sae.selection import (
    BatchSelection,
    largest_of_rows,
    largest_positive,
    largest_positive_per_row,
    padded_largest,
)
from sae_ray.sae.whole_numbers import stable_order
from tests.sae.thread_ranks import on_ranks

Select = Callable[[torch.Tensor], torch.Tensor]
SPLITS = ("rows", "latents")


def normal(shape: tuple[int, int], seed: int, mean: float) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) + mean


def few_values(shape: tuple[int, int], seed: int, highest: int) -> torch.Tensor:
    """Whole numbers from -2: ties everywhere."""
    return torch.randint(-2, highest + 1, shape, generator=torch.Generator().manual_seed(seed)).float()


rows = st.sampled_from([1, 2, 3, 4]).map(lambda n: 4 * n)
shapes = st.tuples(rows, st.integers(1, 70))
seeds = st.integers(0, 2**31)
matrices = st.builds(normal, shapes, seeds, st.floats(-3, 2)) | st.builds(few_values, shapes, seeds, st.integers(-1, 3))


def sorted_selection(matrix: torch.Tensor, count: int) -> torch.Tensor:
    """By a stable sort of all values."""
    order = matrix.flatten().sort(descending=True, stable=True).indices[:count]
    return order[matrix.flatten()[order] > 0].sort().values


def padded_selection(matrix: torch.Tensor, k: int) -> torch.Tensor:
    found, values = padded_largest(matrix, k)
    assert len(found) == len(values) == k * len(matrix)
    entries = found[found < matrix.numel()]
    assert (found[len(entries) :] == matrix.numel()).all()
    assert torch.equal(values[: len(entries)], matrix.flatten()[entries])
    assert not values[len(entries) :].any()
    return entries


def on_splits(size: int, by: str, matrices: list[torch.Tensor], start: Callable[[Split], Select]) -> list[torch.Tensor]:
    """What ranks that split the rows or the latents select together of each matrix: flat indices into the whole.

    `start` gives each rank what selects from its parts.
    """

    def work(ranks: Ranks) -> list[torch.Tensor]:
        split = Split(**{by: ranks})
        select, selected = start(split), []
        for matrix in matrices:
            n_rows, width = len(matrix) // split.rows.size, split.latents.share(matrix.shape[1])
            part = split.latents.own(matrix.split(n_rows)[split.rows.rank].T).T.contiguous()
            found = select(part)
            assert (found.diff() > 0).all(), "ascending"
            rows = found // width + n_rows * split.rows.rank
            selected.append(rows * matrix.shape[1] + split.latents.places(found % width))
        return selected

    return [torch.cat(parts).sort().values for parts in zip(*on_ranks(size, work), strict=True)]


def over_ranks(size: int, matrix: torch.Tensor, count: int, guess: float = 0.0, by: str = "rows") -> torch.Tensor:
    [found] = on_splits(size, by, [matrix], lambda split: lambda part: largest_positive(part, count, guess, split))
    return found


def rows_over_shards(size: int, matrix: torch.Tensor, k: int) -> torch.Tensor:
    [found] = on_splits(size, "latents", [matrix], lambda split: lambda part: largest_positive_per_row(part, k, split))
    return found


@pytest.mark.parametrize("by_row", [False, True])
@pytest.mark.parametrize("spread", [1.0, 1e-3])
def test_rough_values_find_the_largest_exact_ones(spread: float, by_row: bool):
    """Rounded to bfloat16, as products are; also where rows hardly differ, so that many values nearly do not."""
    exact = normal((1, 500), 0, 0.0) + spread * normal((60, 500), 1, 0.0)
    matrix, k = (exact, 20) if by_row else (exact.view(1, -1), 20 * len(exact))
    flat, values = padded_largest(matrix.bfloat16().float(), k, lambda flat: exact.flatten()[flat])
    expected = [sorted_selection(row, k) + number * matrix.shape[1] for number, row in enumerate(matrix)]
    assert torch.equal(flat, torch.cat(expected))
    assert torch.equal(values, exact.flatten()[flat])


@given(matrices, st.integers(1, 300))
@example(torch.zeros(4, 8), 3)
@example(torch.full((4, 16), 0.5), 63)
def test_it_is_what_sorting_gives_however_many_ranks_there_are(matrix: torch.Tensor, count: int):
    expected = sorted_selection(matrix, count)
    assert torch.equal(padded_selection(matrix.view(1, -1), min(count, matrix.numel())), expected)
    for guess in (0.0, 0.5, 1.0, 1e6, matrix.max().item(), matrix.median().item()):
        assert torch.equal(largest_positive(matrix, count, guess), expected)
    for size, by in product((2, 4), SPLITS):
        for guess in (0.0, 1.0, 1e6, matrix.median().item()):
            assert torch.equal(over_ranks(size, matrix, count, guess, by), expected)


near_one = st.integers(-3, 3).map(lambda ulps: 1 + ulps * 2**-52)


@given(
    st.sampled_from([np.float32, np.float64]).flatmap(
        lambda dtype: arrays(
            dtype, st.integers(1, 40), elements=st.sampled_from([-1.0, 0.0, 1e-30, 1e30]) | near_one.map(dtype)
        )
    ),
    st.integers(1, 20),
    near_one | st.sampled_from([0.0, 1e-30, 1e30]),
)
@example(np.zeros(3), 1, 0.0)
def test_in_any_precision_it_is_what_numpy_sorts(values: np.ndarray, count: int, guess: float):
    largest = np.argsort(-values, kind="stable")[:count]
    expected = np.sort(largest[values[largest] > 0])
    assert largest_positive(torch.from_numpy(values).view(1, -1), count, guess).tolist() == expected.tolist()


@given(matrices, st.integers(1, 60))
def test_per_row_it_is_what_sorting_each_row_gives(matrix: torch.Tensor, k: int):
    width = matrix.shape[1]
    expected = torch.cat([sorted_selection(row, k) + number * width for number, row in enumerate(matrix)])
    assert torch.equal(largest_positive_per_row(matrix, min(k, width)), expected)
    assert torch.equal(padded_selection(matrix, min(k, width)), expected)
    for size in (2, 4):
        assert torch.equal(rows_over_shards(size, matrix, min(k, width)), expected)


@given(matrices, st.integers(1, 60))
def test_candidates_of_a_row_compete_over_shards_with_whatever_sign(matrix: torch.Tensor, k: int):
    def strongest(part: torch.Tensor) -> torch.Tensor:
        """Ascending flat indices of the `k` largest values of each row, be they below 0."""
        columns = part.sort(dim=1, descending=True, stable=True).indices[:, :k]
        return (columns + part.shape[1] * torch.arange(len(part)).unsqueeze(1)).flatten().sort().values

    for size in (2, 4):
        [found] = on_splits(
            size,
            "latents",
            [matrix],
            lambda split: lambda part: largest_of_rows(part, strongest(part), k, split.latents),
        )
        assert torch.equal(found, strongest(matrix))


@pytest.mark.parametrize("highest", [3, 2**16 - 1, 2**16, 2**31 - 1, 2**31, 2**40])
def test_numbers_of_any_size_are_sorted(highest: int):
    numbers = torch.tensor([[highest, 2, 2, 0], [1, highest, 0, highest]])
    assert torch.equal(stable_order(numbers, highest), torch.tensor([[3, 1, 2, 0], [2, 0, 1, 3]]))


@pytest.mark.parametrize("by", SPLITS)
@pytest.mark.parametrize("size", [1, 2, 4])
def test_ties_at_the_boundary_go_to_the_first_rows(size: int, by: str):
    matrix = torch.ones(4, 63)
    matrix[3, 5] = 2
    expected = torch.tensor([*range(70), 3 * 63 + 5])
    assert torch.equal(over_ranks(size, matrix, 71, by=by), expected)


@pytest.mark.parametrize("by", SPLITS)
@pytest.mark.parametrize("size", [1, 2, 4])
def test_one_rank_may_hold_all_or_none_of_them(size: int, by: str):
    matrix = torch.full((64, 64), -1.0)
    matrix[2 if by == "rows" else slice(None), 2 if by == "latents" else slice(None)] = torch.arange(64) + 1.0
    order = matrix.flatten().argsort(descending=True)
    assert torch.equal(over_ranks(size, matrix, 10, by=by), order[:10].sort().values)
    assert torch.equal(over_ranks(size, matrix, 100, by=by), order[:64].sort().values)
    assert over_ranks(size, -matrix.abs(), 10, by=by).numel() == 0


def test_values_of_any_size_are_told_apart():
    """From the smallest normal number to the largest; neighbours differ in the last bit."""
    start = torch.tensor([1e-37, 1e-3, 1.0, 1e3, 3e38])
    values = torch.stack([start, start.nextafter(torch.tensor(torch.inf))]).flatten()
    for count in range(1, 11):
        assert torch.equal(largest_positive(values.view(2, 5), count), sorted_selection(values, count))
        for by in SPLITS:
            assert torch.equal(over_ranks(2, values.view(2, 5), count, by=by), sorted_selection(values, count))
    double = (1 + torch.arange(1.0, 9, dtype=torch.float64) * 2**-52).view(2, 4)
    assert torch.equal(largest_positive(double, 3), torch.tensor([5, 6, 7]))


@pytest.mark.parametrize("by", SPLITS)
@pytest.mark.parametrize("size", [1, 2, 4])
def test_batch_after_batch_selects_k_per_sample(size: int, by: str):
    """Values rise, fall, vanish and come back: where the last selection lay misleads the next."""
    batches = [scale * normal((8, 39), seed, 0) for seed, scale in enumerate((1, 100, 1, 0.01, -0.0, 1, 1))]
    found = on_splits(size, by, batches, lambda split: BatchSelection(3, split))
    for batch, chosen in zip(batches, found, strict=True):
        assert torch.equal(chosen, sorted_selection(batch, 24))
