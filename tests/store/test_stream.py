"""The training stream: every epoch a permutation of all rows, a function of the seed alone, seekable to any step."""

from __future__ import annotations

import tempfile
import threading
import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from itertools import chain, islice
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sae_ray.store import activations
from sae_ray.store.activations import ActivationStore
from sae_ray.store.stream import TrainingStream
from tests.machine import PATIENCE_S

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


def of_rows(n: int) -> AbstractContextManager:
    """While it lasts, row groups of `numbered` parts have so many rows."""
    return patch.object(activations, "ROW_GROUP_BYTES", 8 * n)


def numbers(stream: TrainingStream, n_batches: int, first_step: int = 0) -> list[list[int]]:
    """The numbers of the rows of each batch."""
    return [batch[:, 0].int().tolist() for batch in islice(stream.batches(first_step), n_batches)]


@given(
    sizes=st.lists(st.integers(0, 9), min_size=1, max_size=6).filter(any),
    batch_size=st.integers(1, 40),
    shuffle_rows=st.integers(1, 60),
    seed=st.integers(0, 2**32 - 1),
    first_step=st.integers(0, 12),
    rows_per_group=st.sampled_from([1, 2, 4, 100]),
)
def test_any_step_can_be_sought_and_every_epoch_is_a_permutation(
    write_store: WriteStore, sizes: list[int], batch_size: int, shuffle_rows: int, seed: int, first_step: int,
    rows_per_group: int,
):  # fmt: skip
    with tempfile.TemporaryDirectory() as root, of_rows(rows_per_group):
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


def test_a_window_holds_rows_of_many_places_of_large_parts(tmp_path: Path, write_store: WriteStore):
    """Sorted by class, as image folders are: 200 classes of 50 rows each, ten classes in a part."""
    with of_rows(10):
        store = write_store(tmp_path, numbered([500] * 20))
        [order] = numbers(TrainingStream(store, 10_000, 0, shuffle_rows=4000), 1)
    for start in range(0, 10_000, 2000):  # half of 4000 rows each: 200 row groups
        assert len({row // 50 for row in order[start : start + 2000]}) > 100


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
    windows = [{row // 10 for row in order[start : start + 20]} for start in range(0, 80, 20)]
    assert [len(parts) for parts in windows] == [2, 2, 2, 2]  # half of 40 rows each
    assert set.union(*windows) == set(range(8))
    assert len({row // 10 for row in order[:10]}) > 1


def test_batches_are_what_is_stored(tmp_path: Path, write_store: WriteStore):
    vectors = np.random.default_rng(0).normal(size=(7, 3)).astype("float32")
    store = write_store(tmp_path, [(np.arange(7), np.zeros(7), vectors)], "float16")
    batch = next(TrainingStream(store, 7, 0, 100).batches())
    assert batch.dtype == torch.float16
    assert sorted(batch.tolist()) == sorted(vectors.astype("float16").tolist())


@pytest.mark.parametrize("shuffle_rows", [20, 200], ids=["several windows", "one window"])
def test_rows_come_with_their_images(tmp_path: Path, write_store: WriteStore, shuffle_rows: int):
    """In the order in which they come alone, also after a seek."""
    store = write_store(tmp_path, [(rows // 2, rows % 2, rows[:, None].astype("f4")) for rows in
                                   np.split(np.arange(60), [20, 40])])  # fmt: skip
    stream = TrainingStream(store, 7, 3, shuffle_rows)
    alone = list(islice(stream.batches(), 20))
    for first in (0, 11):
        for expected, (vectors, images) in zip(alone[first:], stream.batches_with_images(first), strict=False):
            assert torch.equal(vectors, expected)
            assert torch.equal(images, vectors[:, 0].long() // 2)


@pytest.mark.parametrize("shuffle_rows", [80, 200], ids=["several windows", "one window"])
def test_no_more_rows_are_held_than_may_be(tmp_path: Path, write_store: WriteStore, shuffle_rows: int):
    store = write_store(tmp_path, numbered([10] * 20))
    stream, read, held = TrainingStream(store, 7, 0, shuffle_rows), [], []
    plain = stream._read

    def noting(window: tuple[int, ...]) -> torch.Tensor:
        vectors = plain(window)
        read.append(weakref.ref(vectors))
        held.append(sum(len(one) for reference in read if (one := reference()) is not None))
        return vectors

    stream._read = noting
    for _ in islice(stream.batches(), 100):
        pass
    assert max(held) == shuffle_rows
    assert len(read) == (1 if shuffle_rows == 200 else len(held))
    assert sum(reference() is not None for reference in read) <= 2


def test_the_next_window_is_read_while_one_is_used(tmp_path: Path, write_store: WriteStore):
    store = write_store(tmp_path, numbered([10] * 4))
    stream, begun = TrainingStream(store, 10, 0, shuffle_rows=20), threading.Semaphore(0)
    plain = stream._read

    def noting(window: tuple[int, ...]) -> torch.Tensor:
        begun.release()
        return plain(window)

    stream._read = noting
    batches = stream.batches()
    next(batches)
    assert all(begun.acquire(timeout=PATIENCE_S) for _ in range(2))
    assert not begun.acquire(timeout=0.2), "and none after that"


def test_what_lies_before_a_step_is_not_read(tmp_path: Path, write_store: WriteStore):
    store = write_store(tmp_path, numbered([10] * 6))
    batches = numbers(TrainingStream(store, 10, 0, shuffle_rows=10), 6)
    for number in sorted({batch[0] // 10 for batch in batches[:5]}):
        store.folder.delete(store.parts[number].file)
    assert numbers(TrainingStream(store, 10, 0, shuffle_rows=10), 1, first_step=5) == batches[5:]
    with pytest.raises(FileNotFoundError):
        numbers(TrainingStream(store, 10, 0, shuffle_rows=10), 1, first_step=4)


@pytest.mark.gpu
@pytest.mark.parametrize("shuffle_rows", [30, 200])
def test_a_gpu_holds_the_same_batches(tmp_path: Path, write_store: WriteStore, shuffle_rows: int):
    store = write_store(tmp_path, numbered([10] * 10))
    ours, theirs = (TrainingStream(store, 7, 0, shuffle_rows, device).batches() for device in ("cuda", "cpu"))
    for batch, other in islice(zip(ours, theirs, strict=False), 40):
        assert batch.is_cuda
        assert torch.equal(batch.cpu(), other)
