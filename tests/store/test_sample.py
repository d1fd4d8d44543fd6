"""The part of a store that is read apart from training, and the rows of it that training never draws."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from itertools import chain, islice, pairwise
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sae_ray.store import activations, sample
from sae_ray.store.activations import ActivationStore
from sae_ray.store.sample import KEPT_OUT_EVERY, Sample
from sae_ray.store.stream import TrainingStream

WriteStore = Callable[..., ActivationStore]


def numbered(images: list[int], tokens: int) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Parts of so many images, whose rows carry their number."""
    ends = np.cumsum([0, *images])
    parts = []
    for start, end in pairwise(ends):
        rows = np.arange(start * tokens, end * tokens)
        vectors = np.stack([rows, -rows], axis=1).astype("float32")
        parts.append((rows // tokens, rows % tokens, vectors))
    return parts


@given(
    images=st.lists(st.integers(0, 30), min_size=1, max_size=5).filter(lambda sizes: sum(sizes) > 0),
    tokens=st.integers(1, 4),
    rows_per_group=st.sampled_from([1, 3, 8, 100]),
    n_groups=st.sampled_from([2, 5, 1000]),
    batch_size=st.integers(1, 40),
    shuffle_rows=st.sampled_from([1, 20, 1000]),
    first_step=st.integers(0, 6),
)
def test_every_row_is_either_drawn_once_in_an_epoch_or_kept_out(
    write_store: WriteStore, images: list[int], tokens: int, rows_per_group: int, n_groups: int, batch_size: int,
    shuffle_rows: int, first_step: int,
):  # fmt: skip
    """Whatever the row groups and wherever the stream is entered."""
    with (
        tempfile.TemporaryDirectory() as root,
        patch.object(activations, "ROW_GROUP_BYTES", 8 * rows_per_group),
        patch.object(sample, "GROUPS", n_groups),
    ):
        store = write_store(root, numbered(images, tokens))
        without = Sample(store)
        kept_out = without.kept_out_rows()[:, 0].astype(int).tolist()
        stream = TrainingStream(store, batch_size, 0, shuffle_rows, without=without)
        assert stream.n_rows + len(kept_out) == store.n_rows
        n_batches = -(-2 * stream.n_rows // batch_size) + first_step + 3
        batches = [batch[:, 0].int().tolist() for batch in islice(stream.batches(), n_batches)]
        for batch, (rows, of_images) in zip(batches, stream.batches_with_images(), strict=False):
            assert rows[:, 0].int().tolist() == batch
            assert of_images.tolist() == [row // tokens for row in batch]
        drawn = list(chain.from_iterable(batches))
        for start in (0, stream.n_rows):
            assert sorted(drawn[start : start + stream.n_rows] + kept_out) == list(range(store.n_rows))
        again = TrainingStream(store, batch_size, 0, shuffle_rows, without=without).batches(first_step)
        assert [batch[:, 0].int().tolist() for batch in islice(again, 3)] == batches[first_step : first_step + 3]
        if n_groups == 1000:
            expected = {image for image in range(sum(images)) if image % KEPT_OUT_EVERY == KEPT_OUT_EVERY - 1}
            assert sorted(kept_out) == [image * tokens + token for image in sorted(expected) for token in range(tokens)]


def test_the_location_is_that_of_all_rows(write_store: WriteStore, tmp_path):
    x = np.random.default_rng(0).normal(size=(50, 6)).astype("f4") + np.arange(6)
    store = write_store(tmp_path, [(np.arange(30), np.zeros(30), x[:30]), (np.arange(30, 50), np.zeros(20), x[30:])])
    location = Sample(store).location()
    np.testing.assert_allclose(location.mean, x.mean(0, dtype=float))
    assert location.spread == pytest.approx(np.sqrt(np.square(x - x.mean(0)).sum(1).mean()))
    assert location.offset == pytest.approx(np.linalg.norm(location.mean) / location.spread)


def test_of_a_large_store_a_part_is_read(write_store: WriteStore, tmp_path, monkeypatch):
    """Evenly spread over it, and no other row group."""
    monkeypatch.setattr(activations, "ROW_GROUP_BYTES", 8 * 5)
    monkeypatch.setattr(sample, "GROUPS", 4)
    monkeypatch.setattr(sample, "KEPT_OUT_ROWS", 1)
    store = write_store(tmp_path, numbered([20] * 4, 1))
    read: list[tuple[int, list[int]]] = []
    plain = store.read_groups
    monkeypatch.setattr(store, "read_groups", lambda part, places: read.append((part, places)) or plain(part, places))
    one = Sample(store)
    rows = np.arange(80).reshape(16, 5)[::4]
    assert one.location().mean[0] == rows.mean()
    assert read == [(part, [0]) for part in range(4)]
    assert one.kept_out_every == 20, "one row of a sample of twenty"
    assert one.kept_out_rows()[:, 0].tolist() == []


def test_few_images_are_all_trained_on(write_store: WriteStore, tmp_path):
    store = write_store(tmp_path, numbered([KEPT_OUT_EVERY - 1], 3))
    assert Sample(store).kept_out_rows().shape == (0, 2)
