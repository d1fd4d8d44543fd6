"""The largest entries: what sorting gives, on one rank and over several, ties by the lower flat index."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from sae_ray.sae.ranks import ALONE, Ranks
from sae_ray.sae.selection import BatchSelection, largest_positive, largest_positive_per_row
from tests.sae.thread_ranks import on_ranks


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


def over_ranks(size: int, matrix: torch.Tensor, count: int, guess: float = 0.0) -> torch.Tensor:
    """Flat indices into the whole matrix."""
    shares = matrix.chunk(size)
    found = on_ranks(size, lambda ranks: largest_positive(shares[ranks.rank], count, guess, ranks))
    return torch.cat([part + rank * shares[0].numel() for rank, part in enumerate(found)])


@given(matrices, st.integers(1, 300))
@example(torch.zeros(4, 8), 3)
@example(torch.full((4, 16), 0.5), 63)
def test_it_is_what_sorting_gives_however_many_ranks_there_are(matrix: torch.Tensor, count: int):
    expected = sorted_selection(matrix, count)
    for guess in (0.0, 0.5, 1.0, 1e6, matrix.max().item(), matrix.median().item()):
        assert torch.equal(largest_positive(matrix, count, guess), expected)
    for size in (2, 4):
        for guess in (0.0, 1.0, 1e6, matrix.median().item()):
            assert torch.equal(over_ranks(size, matrix, count, guess), expected)


@given(matrices, st.integers(1, 60))
def test_per_row_it_is_what_sorting_each_row_gives(matrix: torch.Tensor, k: int):
    width = matrix.shape[1]
    expected = torch.cat([sorted_selection(row, k) + number * width for number, row in enumerate(matrix)])
    assert torch.equal(largest_positive_per_row(matrix, min(k, width)), expected)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_ties_at_the_boundary_go_to_the_first_rows(size: int):
    matrix = torch.ones(4, 64)
    matrix[3, 5] = 2
    expected = torch.tensor([*range(70), 3 * 64 + 5])
    assert torch.equal(over_ranks(size, matrix, 71), expected)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_one_rank_may_hold_all_or_none_of_them(size: int):
    matrix = torch.full((4, 64), -1.0)
    matrix[2] = torch.arange(64) + 1.0
    assert torch.equal(over_ranks(size, matrix, 10), 2 * 64 + torch.arange(54, 64))
    assert torch.equal(over_ranks(size, matrix, 100), 2 * 64 + torch.arange(64))
    assert over_ranks(size, -matrix.abs(), 10).numel() == 0


def test_values_of_any_size_are_told_apart():
    """From the smallest normal number to the largest; neighbours differ in the last bit."""
    start = torch.tensor([1e-37, 1e-3, 1.0, 1e3, 3e38])
    values = torch.stack([start, start.nextafter(torch.tensor(torch.inf))]).flatten()
    for count in range(1, 11):
        assert torch.equal(largest_positive(values.view(2, 5), count), sorted_selection(values, count))
        assert torch.equal(over_ranks(2, values.view(2, 5), count), sorted_selection(values, count))
    double = (1 + torch.arange(1.0, 9, dtype=torch.float64) * 2**-52).view(2, 4)
    assert torch.equal(largest_positive(double, 3), torch.tensor([5, 6, 7]))


@pytest.mark.parametrize("size", [1, 2, 4])
def test_batch_after_batch_selects_k_per_sample(size: int):
    """Values rise, fall, vanish and come back: where the last selection lay misleads the next."""
    batches = [scale * normal((8, 40), seed, 0) for seed, scale in enumerate((1, 100, 1, 0.01, -0.0, 1, 1))]

    def work(ranks: Ranks) -> list[torch.Tensor]:
        select = BatchSelection(3, ranks)
        return [select(batch.chunk(size)[ranks.rank]) for batch in batches]

    found = on_ranks(size, work) if size > 1 else [work(ALONE)]
    for number, batch in enumerate(batches):
        chosen = torch.cat([part[number] + rank * 8 // size * 40 for rank, part in enumerate(found)])
        assert torch.equal(chosen, sorted_selection(batch, 24))
