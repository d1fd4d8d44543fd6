"""The tables of a pass: what is written is read again, and damaged tables are named."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from sae_ray.errors import SaeRayError
from sae_ray.scores.statistics import BlockImages, Entries, NeuronStats
from sae_ray.scores.tables import Scores, ScoreTables, write_tables
from sae_ray.store.files import Folder

N_IMAGES, N_TOP = 30, 5


def statistics(values: np.ndarray, ranges: tuple[range, ...]) -> list[NeuronStats]:
    """Of one value per image and neuron, with images numbered in steps of two."""
    neuron, image = np.nonzero(values.T)
    value = values[image, neuron]
    entries = Entries(image, neuron, value, 2 * value)
    judged = np.random.default_rng(1).normal(size=(len(values), 4))
    images = BlockImages.of(2 * np.arange(len(values)), judged)
    found = []
    for neurons in ranges:
        stats = NeuronStats(len(neurons), judged.shape[1], N_TOP)
        stats.add(entries.of_range(neurons), images)
        found.append(stats)
    return found


@pytest.fixture
def values() -> np.ndarray:
    """A neuron each that never fires, fires on two images, and is negative everywhere, among others."""
    rng = np.random.default_rng(0)
    values = np.maximum(rng.normal(size=(N_IMAGES, 9)), 0)
    values[:, 2] = 0
    values[2:, 4] = 0
    values[:2, 4] = 3, 7
    values[:, 7] = -1 - values[:, 7]
    return values


def test_what_is_written_is_read_again(tmp_path: Path, values: np.ndarray):
    blocks = statistics(values, (range(4), range(4, 9)))
    write_tables(Folder(tmp_path), blocks)
    tables = ScoreTables(Folder(tmp_path))

    def joined(name: str) -> np.ndarray:
        return np.concatenate([getattr(block, name) for block in blocks])

    scores = tables.scores
    assert scores.neuron.tolist() == list(range(9))
    np.testing.assert_array_equal(scores.ms, np.concatenate([block.monosemanticity() for block in blocks]))
    for name in ("n_active", "n_firing", "max_image", "max_token"):
        np.testing.assert_array_equal(getattr(scores, name), joined(name))
    np.testing.assert_array_equal(scores.frequency, (values > 0).mean(axis=0))
    np.testing.assert_allclose(scores.mean, values.mean(axis=0))
    np.testing.assert_allclose(scores.mean_active[4], 5.0)
    assert scores.mean_active[2] == 0
    np.testing.assert_array_equal(tables.top_images.image, joined("top_image"))
    expected = np.where(joined("top_image") >= 0, joined("top_value"), 0).astype(np.float32)
    np.testing.assert_array_equal(tables.top_images.activation, expected)
    assert tables.top_images.image[4].tolist() == [2, 0, -1, -1, -1]
    np.testing.assert_array_equal(tables.histogram, joined("histogram"))


def test_neurons_that_never_fire_have_no_top_images(tmp_path: Path):
    write_tables(Folder(tmp_path), statistics(np.zeros((6, 3)), (range(3),)))
    tables = ScoreTables(Folder(tmp_path))
    assert tables.top_images.image.shape == tables.top_images.activation.shape == (3, 0)
    assert tables.histogram.sum() == 0
    assert tables.scores.n_firing.tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("name", "column", "attribute"),
    [
        ("scores.parquet", "n_firing", "scores"),
        ("scores.parquet", "n_firing", "histogram"),  # which is as long as the scores
        ("top_images.parquet", "rank", "top_images"),
        ("histogram.parquet", "low", "histogram"),
    ],
)
def test_a_missing_column_and_one_of_another_type_are_named(
    tmp_path: Path, values: np.ndarray, name: str, column: str, attribute: str
):
    folder = Folder(tmp_path)
    write_tables(folder, statistics(values, (range(9),)))
    table = folder.read_parquet(name)
    place = table.column_names.index(column)
    as_text = table.set_column(place, column, table[column].cast(pa.string()))
    for damaged in (table.drop_columns([column]), as_text):
        folder.write_parquet(name, damaged)
        with pytest.raises(SaeRayError, match=rf"{tmp_path}/{name} has no column '{column}' of type .* score stage"):
            getattr(ScoreTables(folder), attribute)


def test_columns_in_another_order_are_read_by_name(tmp_path: Path, values: np.ndarray):
    folder = Folder(tmp_path)
    write_tables(folder, statistics(values, (range(9),)))
    before = ScoreTables(folder)
    before = before.scores, before.top_images, before.histogram
    for name in ("scores.parquet", "top_images.parquet", "histogram.parquet"):
        table = folder.read_parquet(name)
        folder.write_parquet(name, table.select(table.column_names[::-1]).append_column("later", table.column(0)))
    after = ScoreTables(folder)
    for name in Scores._fields:
        np.testing.assert_array_equal(getattr(after.scores, name), getattr(before[0], name))
    np.testing.assert_array_equal(after.top_images, before[1])
    np.testing.assert_array_equal(after.histogram, before[2])
