"""Labels of images: read from concept files and from the manifest's labels, split in halves, shuffled, balanced."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from sae_ray.concepts import Labels, balanced_rows, halves, read_concepts, shuffled_labels
from sae_ray.concepts.concept_files import read_values
from sae_ray.errors import UsageError
from sae_ray.images import list_images
from sae_ray.store.files import Folder

IMAGES = ["a/1.jpg", "a/2.jpg", "b/3.jpg"]


def matrix(labels: Labels) -> np.ndarray:
    return np.stack([labels.of_concept(concept) for concept in range(labels.n_concepts)], axis=1)


def read(tmp_path: Path, text: str, images: list[str] = IMAGES) -> Labels:
    (tmp_path / "concepts.csv").write_text(text, encoding="utf-8")
    return read_concepts(str(tmp_path / "concepts.csv"), Folder(tmp_path / "images"), images)


def test_a_concept_file_is_read(tmp_path: Path):
    text = "image_id,Wet, Old\na/2.jpg,1,-1\nb/3.jpg,,\nimages/a/1.jpg,0,1.0\nelsewhere.jpg,1,1\n"
    labels = read(tmp_path, text)
    assert labels.names == ("Old", "Wet")
    np.testing.assert_array_equal(matrix(labels), [[1, 0], [np.nan, 1], [np.nan, np.nan]])
    assert labels.known.tolist() == [[True, True], [False, True], [False, False]]
    assert labels.labelled.tolist() == [True, True, False]
    np.testing.assert_array_equal(matrix(read(tmp_path, text.replace(",", ";"))), matrix(labels))
    np.testing.assert_array_equal(matrix(read(tmp_path, text, IMAGES[1:2])), [[np.nan, 1]])


def test_fractions_are_read_where_they_are_asked_for(tmp_path: Path):
    (tmp_path / "concepts.csv").write_text("image_id,wet,old\na/1.jpg,.25,1\na/2.jpg,-1,1e-3\nb/3.jpg,,0\n")
    names, values = read_values(str(tmp_path / "concepts.csv"), Folder(tmp_path), IMAGES, fractions=True)
    assert names == ["old", "wet"]
    np.testing.assert_array_equal(values, [[1, 0.25], [1e-3, np.nan], [0, np.nan]])
    with pytest.raises(UsageError, match=r"wet is '.25'; give 1, 0 or nothing where it is unknown"):
        read(tmp_path, (tmp_path / "concepts.csv").read_text())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("image_id,wet\na/1.jpg,2\n", r"concepts.csv, row 2: wet is '2'; give 1, 0 or nothing where it is unknown"),
        ("image_id,wet\na/1.jpg,yes\n", "row 2: wet is 'yes'"),
        ("image_id,wet,old\na/1.jpg,1\n", "row 2: it needs as many values as the header has columns"),
        ("image_id,wet\na/1.jpg,1,0\n", "row 2: it needs as many values"),
        ("image_id,wet\na/1.jpg,1\na/1.jpg,1\n", "row 3: 'a/1.jpg' already has a row"),
        ("image_id,wet\na/1.jpg,1\n./a/1.jpg,0\n", "the rows 'a/1.jpg' and './a/1.jpg' name the same image"),
        ("image_id,wet\na/1.jpg,1\na/2.jpg,1\na/3.jpg,1\n", "has no row for the image b/3.jpg.*add the row 'b/3.jpg'"),
        ("image_id,wet\n1.jpg,1\n", r"names none of the 3 images in .*a/1.jpg \(the row '1.jpg' is nearest"),
        ("image_id,wet,wet\na/1.jpg,1,1\n", "has 2 columns with the name 'wet'"),
        ("image_id,wet,\na/1.jpg,1,1\n", "has 1 columns with the name ''"),
        ("image_id\na/1.jpg\n", "has the columns image_id; a concept file is CSV with the header image_id,<concept>"),
        ("path,wet\na/1.jpg,1\n", "has the columns path, wet; a concept file is"),
        ("", r"has the columns \(none\)"),
    ],
)
def test_a_concept_file_that_does_not_fit_is_refused(tmp_path: Path, text: str, message: str):
    with pytest.raises(UsageError, match=message):
        read(tmp_path, text)


def test_a_concept_file_that_is_not_there_is_named(tmp_path: Path):
    with pytest.raises(UsageError, match=r"none.csv cannot be read .*; a concept file is CSV"):
        read_concepts(str(tmp_path / "none.csv"), Folder(tmp_path), IMAGES)


def test_labels_beside_the_manifest_are_classes(tmp_path: Path):
    for path in ("n01440764 tench/1.jpg", "none/2.jpg", "n01443537/3.jpg", "n01440764 tench/4.jpg"):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).touch()
    table = list_images(Folder(tmp_path)).labels.read()
    labels = Labels.of_table(table, ignored=["none"])
    assert labels.names == ("n01440764", "n01443537")
    expected = [[1, 0], [1, 0], [0, 1], [np.nan, np.nan]]  # in the order of the paths
    np.testing.assert_array_equal(matrix(labels), expected)
    assert labels.known.shape == (4, 1)


def test_masked_labels_are_unknown():
    masked = np.ma.masked_array([[1, 0], [0, 1]], mask=[[False, True], [False, False]])
    np.testing.assert_array_equal(matrix(Labels.of(masked)), [[1, np.nan], [0, 1]])


@given(st.data())
def test_halves_hold_every_image_once_and_half_of_every_class(data: st.DataObject):
    classes = data.draw(arrays.arrays("int64", st.integers(0, 40), elements=st.integers(-1, 4)))
    labels = Labels.of(classes, names="abcde")
    fitted, judged = halves(labels, 7)
    assert sorted([*fitted, *judged]) == np.flatnonzero(classes >= 0).tolist()
    for code in range(5):
        difference = (classes[fitted] == code).sum() - (classes[judged] == code).sum()
        assert difference in (0, 1)


def test_halves_of_many_labels_halve_every_concept():
    rng = np.random.default_rng(0)
    values = np.where(rng.random((600, 6)) < [0.5, 0.3, 0.2, 0.1, 0.05, 0.02], 1.0, 0.0)
    values[rng.random(values.shape) < 0.2] = np.nan
    labels = Labels.of(values)
    fitted, judged = halves(labels, 0)
    assert len(fitted) + len(judged) == labels.labelled.sum()
    assert abs(len(fitted) - len(judged)) < 30
    for concept in values.T:
        counts = [(concept[half] == 1).sum() for half in (fitted, judged)]
        assert abs(counts[0] - counts[1]) <= max(2, 0.1 * sum(counts)), counts


def test_draws_depend_on_the_seed_and_the_name_alone():
    classes = np.arange(60) % 3
    one = halves(Labels.of(classes, names="abc"), 1)
    assert not np.array_equal(one.fitted, halves(Labels.of(classes, names="abc"), 2).fitted)
    # Another class, of images that had none, moves no image.
    more = np.where(np.arange(60) < 50, classes, -1)
    with_class = np.where(np.arange(60) < 50, classes, 3)
    before, after = (halves(Labels.of(codes, names="abcd"), 1).fitted for codes in (more, with_class))
    assert np.array_equal(before, after[after < 50])
    # Nor does another number of the same class.
    renamed = halves(Labels.of(2 - classes, names="cba"), 1)
    assert np.array_equal(one.fitted, renamed.fitted)


def test_shuffled_labels_keep_their_numbers():
    values = np.array([[1, 0], [1, 1], [0, np.nan], [0, 0], [np.nan, np.nan]] * 20, float)
    labels = Labels.of(values)
    shuffled = matrix(shuffled_labels(labels, 3))
    assert not np.array_equal(shuffled, values, equal_nan=True)
    np.testing.assert_array_equal(np.isnan(shuffled).all(axis=1), np.isnan(values).all(axis=1))
    assert sorted(map(str, shuffled.tolist())) == sorted(map(str, values.tolist()))
    np.testing.assert_array_equal(shuffled, matrix(shuffled_labels(labels, 3)))
    assert not np.array_equal(shuffled, matrix(shuffled_labels(labels, 4)), equal_nan=True)


def test_balanced_rows_are_as_many_of_either_kind():
    values = np.full((200, 3), 0.0)
    values[:30, 0] = 1
    values[100:, 0] = np.nan
    values[:9, 1] = 1
    values[:195, 2] = 1
    labels = Labels.of(values)
    rows = balanced_rows(labels, 0, 5)
    assert rows is not None
    assert (np.diff(rows) > 0).all()
    assert values[rows, 0].tolist() == [1.0] * 30 + [0.0] * 30
    few = balanced_rows(labels, 0, 5, max_positives=12)
    assert few is not None
    assert (values[few, 0] == 1).sum() == (values[few, 0] == 0).sum() == 12
    assert balanced_rows(labels, 1, 5) is None  # 9 images show it
    assert balanced_rows(labels, 2, 5) is None  # 5 do not
    assert not np.array_equal(rows, balanced_rows(labels, 0, 6))
