"""The training stream: every epoch a permutation of all rows, a function of the seed alone, seekable to any step."""

from __future__ import annotations

import tempfile
import tracemalloc
from collections.abc import Callable, Sequence
from itertools import chain, islice
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sae_ray.activations import ActivationStore
from sae_ray.stream import TrainingStream

WriteStore = Callable[..., ActivationStore]


def numbered(sizes: Sequence[int], d: int = 2) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Parts of these sizes whose rows carry their number."""
    parts = []
    first = 0
    for size in sizes:
        number = np.arange(first, first + size)
        parts.append((number, np.zeros(size), np.repeat(number[:, None], d, axis=1).astype("float32")))
        first += size
    return parts


def numbers(stream: TrainingStream, n_batches: int, first_step: int = 0) -> list[list[int]]:
    """The numbers of the rows of each batch."""
    return [batch[:, 0].astype(int).tolist() for batch in islice(stream.batches(first_step), n_batches)]


@given(
    sizes=st.lists(st.integers(0, 9), min_size=1, max_size=6).filter(any),
    batch_size=st.integers(1, 40),
    shuffle_rows=st.integers(1, 60),
    seed=st.integers(0, 2**32 - 1),
    first_step=st.integers(0, 12),
)
def test_any_step_can_be_sought_and_every_epoch_is_a_permutation(
    write_store: WriteStore, sizes: list[int], batch_size: int, shuffle_rows: int, seed: int, first_step: int
):
    with tempfile.TemporaryDirectory() as root:
        store = write_store(root, numbered(sizes))
        stream = TrainingStream(store, batch_size, seed, shuffle_rows)
        batches = numbers(stream, 16)
        assert {len(batch) for batch in batches} == {batch_size}
        rows = list(chain.from_iterable(batches))
        for start in range(0, len(rows) - store.n_rows + 1, store.n_rows):
            assert sorted(rows[start : start + store.n_rows]) == list(range(store.n_rows))
        # The stream has been used, another has not: neither matters.
        for other in (stream, TrainingStream(store, batch_size, seed, shuffle_rows)):
            assert numbers(other, 16 - first_step, first_step) == batches[first_step:]


@pytest.mark.parametrize("shuffle_rows", [100, 25], ids=["one window", "several windows"])
def test_the_order_is_decided_by_the_seed_and_differs_in_every_epoch(
    tmp_path: Path, write_store: WriteStore, shuffle_rows: int
):
    store = write_store(tmp_path, numbered([10] * 10))

    def epochs(seed: int) -> list[list[int]]:
        return numbers(TrainingStream(store, 100, seed, shuffle_rows), 3)

    assert epochs(0) == epochs(0)
    orders = [*epochs(0), *epochs(1), list(range(100))]
    assert len({tuple(order) for order in orders}) == 7


def test_rows_are_shuffled_across_the_parts_of_a_window(tmp_path: Path, write_store: WriteStore):
    store = write_store(tmp_path, numbered([10] * 8))
    [order] = numbers(TrainingStream(store, 80, 0, shuffle_rows=40), 1)
    halves = [{row // 10 for row in order[:40]}, {row // 10 for row in order[40:]}]
    assert [len(parts) for parts in halves] == [4, 4]  # two windows of four parts each
    assert halves[0].isdisjoint(halves[1])
    assert len({row // 10 for row in order[:10]}) > 1


def test_batches_are_what_is_stored(tmp_path: Path, write_store: WriteStore):
    vectors = np.random.default_rng(0).normal(size=(7, 3)).astype("float32")
    store = write_store(tmp_path, [(np.arange(7), np.zeros(7), vectors)], "float16")
    batch = next(TrainingStream(store, 7, 0, 100).batches())
    assert batch.dtype == np.float16
    assert sorted(batch.tolist()) == sorted(vectors.astype("float16").tolist())


def test_no_more_than_one_window_is_held(tmp_path: Path, write_store: WriteStore):
    d, part_rows = 64, 256
    store = write_store(tmp_path, numbered([part_rows] * 16, d))
    stream = TrainingStream(store, 32, 0, shuffle_rows=8 * part_rows)
    window_bytes, part_bytes = 8 * part_rows * d * 4, part_rows * d * 4
    for _ in islice(stream.batches(), 8):
        pass  # whatever is imported on first use is there now
    tracemalloc.start()
    try:
        for _ in islice(stream.batches(), 2 * store.n_rows // 32):
            pass
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < window_bytes + 3 * part_bytes


def test_what_lies_before_a_step_is_not_read(tmp_path: Path, write_store: WriteStore):
    store = write_store(tmp_path, numbered([10] * 6))
    batches = numbers(TrainingStream(store, 10, 0, shuffle_rows=10), 6)
    for number in sorted({batch[0] // 10 for batch in batches[:5]}):
        store.folder.delete(store.parts[number].file)
    assert numbers(TrainingStream(store, 10, 0, shuffle_rows=10), 1, first_step=5) == batches[5:]
    with pytest.raises(FileNotFoundError):
        numbers(TrainingStream(store, 10, 0, shuffle_rows=10), 1, first_step=4)
