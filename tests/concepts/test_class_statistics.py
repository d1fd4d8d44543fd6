"""Statistics by labels: sparse, block by block and in any order, yet equal to the dense computation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from scipy.sparse import csr_matrix

from sae_ray.concepts import ClassStats, Labels, merged
from sae_ray.errors import UsageError

NAMES = ("mean", "squares", "class_total", "class_firing", "n_firing", "n_images", "n_positive")


def dense_statistics(codes: np.ndarray, labels: np.ndarray) -> dict[str, np.ndarray]:
    """By concept, over the images whose label is known, of `labels` [images, concepts] with NaN for unknown."""
    by_concept = []
    for concept in labels.T:
        known, shown = codes[~np.isnan(concept)], codes[concept == 1]
        mean = known.mean(axis=0) if len(known) else np.zeros(codes.shape[1])
        squares = ((known - mean) ** 2).sum(axis=0)
        by_concept.append((mean, squares, shown.sum(axis=0), (shown > 0).sum(axis=0), (known > 0).sum(axis=0)))
    columns = zip(*by_concept, strict=True)
    found = {name: np.stack(column, axis=1) for name, column in zip(NAMES[:5], columns, strict=True)}
    return found | {"n_images": (~np.isnan(labels)).sum(axis=0), "n_positive": (labels == 1).sum(axis=0)}


def check_equal(stats: ClassStats, expected: dict[str, np.ndarray], tolerance: float = 1e-12) -> None:
    for name, values in expected.items():
        found = np.broadcast_to(getattr(stats, name), values.shape)
        np.testing.assert_allclose(
            found, values, rtol=tolerance, atol=tolerance * max(1, np.abs(values).max(initial=0))
        )


def one_hot(classes: np.ndarray, n_concepts: int) -> np.ndarray:
    labels = np.full((len(classes), n_concepts), np.nan)
    labels[classes >= 0] = np.arange(n_concepts) == classes[classes >= 0, None]
    return labels


@st.composite
def codes_and_labels(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    n, latents, concepts = draw(st.integers(1, 12)), draw(st.integers(1, 4)), draw(st.integers(1, 3))
    values = st.sampled_from([0.0, 0.0, 1.0, -2.5]) | st.integers(0, 1000).map(lambda hundredths: hundredths / 100)
    codes = draw(arrays.arrays("float64", (n, latents), elements=values))
    codes += draw(arrays.arrays("float64", latents, elements=st.sampled_from([0.0, 0.0, 100.0])))
    if draw(st.booleans()):
        return codes, one_hot(draw(arrays.arrays("int64", n, elements=st.integers(-1, concepts - 1))), concepts)
    return codes, draw(arrays.arrays("float64", (n, concepts), elements=st.sampled_from([0.0, 1.0, np.nan])))


@given(codes_and_labels(), st.data())
def test_blocks_in_any_order_equal_the_dense_computation(drawn: tuple[np.ndarray, np.ndarray], data: st.DataObject):
    codes, labels = drawn
    expected = dense_statistics(codes, labels)
    check_equal(ClassStats.of(codes, labels), expected)

    everything = Labels.of(labels)
    order = np.array(data.draw(st.permutations(range(len(codes)))))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(codes)), max_size=4)))
    blocks = np.split(order, cuts)
    one = ClassStats(codes.shape[1], labels.shape[1], everything.known.shape[1])
    for rows in blocks:
        one.add(codes[rows], everything.take(rows))
    check_equal(one, expected)
    # Arrays that say nothing of the others: some blocks alone have no unknown labels.
    check_equal(merged(ClassStats.of(codes[rows], labels[rows]) for rows in blocks), expected)


def test_one_class_per_image_equals_its_matrix():
    rng = np.random.default_rng(0)
    codes = np.maximum(rng.normal(size=(50, 6)), 0)
    classes = rng.integers(-1, 4, 50)
    by_class, by_matrix = ClassStats.of(codes, classes), ClassStats.of(codes, one_hot(classes, 4))
    assert by_class.n_images.tolist() == [(classes >= 0).sum()]
    for name in NAMES:
        np.testing.assert_array_equal(getattr(by_class, name), getattr(by_matrix, name))
    named = Labels.of_classes([None if code < 0 else "dcba"[code] for code in classes])
    assert named.names == ("a", "b", "c", "d")
    np.testing.assert_array_equal(ClassStats.of(codes, named).class_total, by_class.class_total[:, ::-1])


def test_a_latent_range_equals_its_part_of_the_whole():
    rng = np.random.default_rng(1)
    codes, classes = np.maximum(rng.normal(size=(40, 7)), 0), rng.integers(0, 3, 40)
    whole, part = ClassStats.of(codes, classes), ClassStats.of(codes[:, 2:5], classes)
    for name in ("mean", "squares", "class_total", "class_firing", "n_firing"):
        np.testing.assert_array_equal(getattr(part, name), getattr(whole, name)[2:5])


def test_the_same_order_gives_the_same_bits():
    rng = np.random.default_rng(2)
    codes, classes = np.maximum(rng.normal(size=(90, 5)), 0), Labels.of(rng.integers(0, 3, 90))
    blocks = [slice(0, 30), slice(30, 60), slice(60, 90)]
    one = ClassStats(5, 3)
    for rows in blocks:
        one.add(csr_matrix(codes[rows]), classes.take(rows))
    other = merged([ClassStats.of(torch.from_numpy(codes[rows]), classes.take(rows)) for rows in blocks])
    for name in NAMES:
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))


def test_values_far_from_zero_keep_their_spread():
    rng = np.random.default_rng(3)
    codes = np.round(rng.normal(size=(64, 2)) * 2**10) / 2**10  # exact in float64, also when moved
    near, far = (
        merged(ClassStats.of(codes[rows] + offset, np.arange(64)[rows] % 2) for rows in (slice(40), slice(40, 64)))
        for offset in (0.0, 2.0**30)
    )
    np.testing.assert_allclose(far.squares, near.squares, rtol=1e-7)  # sums of squares have no right digit here


def test_codes_are_not_changed_and_duplicate_entries_are_one():
    twice = csr_matrix((np.array([1.0, 2.0, -5.0]), np.array([1, 1, 0]), np.array([0, 2, 3])), shape=(2, 2))
    stats = ClassStats.of(twice, np.array([0, 1]))
    assert twice.nnz == 3
    assert stats.class_total.tolist() == [[0, -5], [3, 0]]
    assert stats.class_firing.tolist() == [[0, 0], [1, 0]]


def test_ten_thousand_classes_and_no_labels_are_no_matter():
    codes = np.eye(3)
    many = ClassStats.of(codes, Labels.of(np.array([0, 9_999, 5]), names=[str(number) for number in range(10_000)]))
    assert many.class_total.shape == (3, 10_000)
    assert many.class_total.sum() == 3
    none = ClassStats.of(codes, np.full(3, -1))
    assert none.n_images.tolist() == [0]
    assert none.class_total.shape == (3, 0)


@pytest.mark.parametrize(
    ("codes", "labels", "message"),
    [
        (np.ones((3, 2)), np.zeros(4, int), "codes has 3 rows and labels has 4"),
        (np.ones(3), np.zeros(3, int), r"codes has the shape \(3,\); give a matrix"),
        (np.array([[np.nan]]), np.zeros(1, int), "codes must be finite; remove the rows"),
        (np.ones((2, 2)), np.array([[0.0], [2.0]]), "labels has the value 2; a matrix of labels has only 0, 1 and NaN"),
        (np.ones((2, 2)), np.zeros(2), r"labels has the shape \(2,\) and the type float64; give whole numbers"),
    ],
)
def test_what_does_not_fit_is_refused(codes: np.ndarray, labels: np.ndarray, message: str):
    with pytest.raises(UsageError, match=message):
        ClassStats.of(codes, labels)


def test_statistics_of_other_latents_do_not_merge():
    with pytest.raises(UsageError, match="of 3 latents and 2 concepts, but the statistics of 2 and 2"):
        merged([ClassStats(2, 2), ClassStats(3, 2)])
    with pytest.raises(UsageError, match="there are no statistics"):
        merged([])
    with pytest.raises(UsageError, match="names has 1 names for 2 concepts"):
        Labels.of(np.array([0, 1]), names=["a"])
