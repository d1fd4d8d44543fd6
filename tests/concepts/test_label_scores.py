"""Correlations and entropies of latents over concepts: known answers, other implementations, any split of images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file
from scipy.sparse import csr_array

from sae_ray.concepts import (
    ClassStats,
    Labels,
    LabelScores,
    correlation,
    entropy,
    label_correlation,
    label_entropy,
    label_scores,
    label_summary,
    merged,
    shuffled_labels,
)
from sae_ray.errors import UsageError

GOLDEN = Path(__file__).parents[1] / "golden" / "uniqueness_hierarchy.safetensors"


def sparse(n: int, latents: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.where(rng.random((n, latents)) < 0.3, rng.random((n, latents)) + 0.5, 0.0)


def pearson(codes: np.ndarray, labels: np.ndarray) -> np.ndarray:
    found = np.full((codes.shape[1], labels.shape[1]), np.nan)
    for latent, values in enumerate(codes.T):
        for concept, shown in enumerate(labels.T):
            known = ~np.isnan(shown)
            if len(set(values[known])) > 1 and len(set(shown[known])) > 1:
                found[latent, concept] = np.corrcoef(values[known], shown[known])[0, 1]
    return found


def some_labels(n: int, seed: int = 1) -> np.ndarray:
    """Of four concepts: one unknown here and there, one that no image shows, one that every image shows."""
    rng = np.random.default_rng(seed)
    labels = (rng.random((n, 4)) < [0.3, 0.6, 0, 1]).astype(float)
    labels[rng.random(n) < 0.2, 1] = np.nan
    return labels


def test_correlations_equal_numpys():
    codes, labels = sparse(200, 9), some_labels(200)
    codes[:, 0] = 0
    codes[:, 1] = 0.1  # constant, and no sum of it is exact
    codes[:, 2] -= 3
    codes[:, 3] = 1e4 + codes[:, 3]
    found = label_correlation(codes, labels)
    np.testing.assert_allclose(found, pearson(codes, labels), atol=1e-10)
    assert np.isnan(found[:2]).all()
    assert np.isnan(found[:, 2:]).all()
    assert not np.isnan(found[2:, :2]).any()
    for same in (csr_array(codes), torch.from_numpy(codes)):
        np.testing.assert_array_equal(label_correlation(same, torch.from_numpy(labels)), found)


def test_classes_correlate_as_their_matrix_does():
    classes = np.random.default_rng(0).integers(-1, 3, 100)
    labels = np.where(classes[:, None] < 0, np.nan, classes[:, None] == np.arange(3))
    np.testing.assert_allclose(label_correlation(sparse(100, 5), classes), pearson(sparse(100, 5), labels), atol=1e-10)


@given(st.data())
def test_any_split_of_the_images_gives_the_same(data: st.DataObject):
    codes, labels = sparse(60, 4), some_labels(60)
    codes[:, 1] += data.draw(st.sampled_from([0, 10, 100]))
    labels = labels[:, :2] if data.draw(st.booleans()) else labels[:, 0].astype(int)
    order = np.array(data.draw(st.permutations(range(60))))
    blocks = np.split(order, sorted(data.draw(st.lists(st.integers(0, 60), max_size=5))))
    everything = Labels.of(labels)
    stats = merged(ClassStats.of(codes[rows], everything.take(rows)) for rows in blocks)
    np.testing.assert_allclose(correlation(stats), label_correlation(codes, labels), rtol=0, atol=1e-12)
    for variant in ("mass", "balanced", "rho"):
        expected = label_entropy(codes, labels, variant=variant)
        np.testing.assert_allclose(entropy(stats, variant), expected, rtol=0, atol=1e-12)


def test_a_latent_that_is_its_label_has_rho_1_and_no_entropy():
    classes = np.repeat(np.arange(4), 25)
    codes = (classes[:, None] == np.arange(4)).astype(float)
    np.testing.assert_allclose(np.diag(label_correlation(codes, classes)), 1, rtol=0, atol=1e-12)
    for variant in ("mass", "balanced", "rho"):
        np.testing.assert_array_equal(label_entropy(codes, classes, variant=variant), np.zeros(4))


def test_a_latent_that_ignores_the_classes_has_rho_0_and_all_entropy():
    rng = np.random.default_rng(0)
    classes = rng.integers(0, 10, 10_000)
    codes = (rng.random((10_000, 20)) < 0.1).astype(float)
    assert np.abs(label_correlation(codes, classes)).max() < 5 / np.sqrt(10_000)
    balanced = np.tile([1.0, 0.0], 500)[:, None]  # the same rate in every class, exactly
    assert label_entropy(balanced, np.repeat(np.arange(10), 100)) > 0.999


def test_two_of_many_classes_alike():
    classes = np.repeat(np.arange(8), 20)
    codes = np.isin(classes, [2, 5]).astype(float)[:, None]
    for variant in ("mass", "balanced", "rho"):
        found = label_entropy(codes, classes, variant=variant)
        np.testing.assert_allclose(found, np.log(2) / np.log(8), atol=1e-6)


def test_mass_is_the_entropy_of_the_prevalences_where_balanced_is_1():
    codes = np.ones((1000, 1))
    classes = (np.arange(1000) < 100).astype(int)
    np.testing.assert_allclose(label_entropy(codes, classes, variant="mass"), 0.469, atol=5e-4)
    np.testing.assert_allclose(label_entropy(codes, classes), 1, atol=1e-12)


def test_mass_over_top_images_is_patchsaes_entropy():
    golden = load_file(GOLDEN)
    codes, top = golden["activations"].astype(float), golden["top_images"]
    kept = np.zeros_like(codes)
    for neuron, images in enumerate(top):
        kept[images, neuron] = codes[images, neuron]
    live = (kept != 0).any(axis=0) & (kept >= 0).all(axis=0)
    assert live.sum() == 38
    classes = np.unique(golden["labels"])
    found = label_entropy(kept, golden["labels"], variant="mass", min_firing=1) * np.log(len(classes))
    np.testing.assert_allclose(found[live], golden["patchsae_entropy"][live], atol=1e-5)
    # Fewer than 10 images say too little; nor has a neuron of sums below 0 shares of them.
    default = label_entropy(kept, golden["labels"], variant="mass")
    assert np.flatnonzero(np.isnan(default)).tolist() == [34, 35, 38]


def test_fewer_than_ten_firing_labelled_images_are_too_few():
    codes, classes = np.zeros((40, 2)), np.repeat([0, 1], 20)
    codes[:9, 0], codes[:10, 1] = 1, 1
    assert np.isnan(label_entropy(codes, classes)).tolist() == [True, False]
    classes[0] = -1
    assert np.isnan(label_entropy(codes, classes)).all()
    assert not np.isnan(label_entropy(codes, classes, min_firing=8)).any()


def test_one_class_or_none_has_no_scores():
    for classes in (np.zeros(30, int), np.full(30, -1)):
        scores = label_scores(ClassStats.of(sparse(30, 3), Labels.of(classes, names="a")))
        for name in ("best_rho", "second_rho", "entropy_mass", "entropy_balanced", "entropy_rho"):
            assert np.isnan(getattr(scores, name)).all(), name
        assert scores.best_concept.tolist() == [-1, -1, -1]
        summary = label_summary(scores)
        assert summary.n_found_concepts == 0
        assert np.isnan(summary.mean_entropy_balanced)
    assert label_correlation(sparse(30, 3), np.full(30, -1)).shape == (3, 0)
    assert np.isnan(label_scores(ClassStats.of(sparse(30, 3), np.full(30, -1))).best_rho).all()


def test_an_unknown_variant_is_refused():
    with pytest.raises(UsageError, match="variant = 'share': it must be one of mass, balanced, rho"):
        label_entropy(np.ones((2, 1)), np.zeros(2, int), variant="share")  # type: ignore[arg-type]


def test_scores_of_an_sae_and_their_summary():
    classes = np.repeat(np.arange(5), 40)
    rng = np.random.default_rng(0)
    codes = np.zeros((200, 8))
    codes[:, 0] = classes == 3
    codes[:, 1] = (classes == 3) * (rng.random(200) < 0.5)
    codes[:, 2] = np.isin(classes, [0, 1])
    codes[:, 3] = rng.random(200) < 0.5
    codes[:9, 4] = 1  # too few
    codes[:, 6] = classes == 4
    stats = ClassStats.of(codes, classes)
    scores = label_scores(stats)
    assert scores.n_firing[[0, 4, 5]].tolist() == [40, 9, 0]
    assert scores.best_concept[[0, 1, 2, 4, 5, 6]].tolist() == [3, 3, 0, -1, -1, 4]
    rho = label_correlation(codes, classes)
    np.testing.assert_allclose(scores.best_rho[[0, 1, 2, 6]], rho[[0, 1, 2, 6], [3, 3, 0, 4]])
    np.testing.assert_allclose(scores.gap[2], 0, atol=1e-12)
    summary = label_summary(scores)
    assert (summary.n_live, summary.n_measured, summary.n_found_concepts) == (6, 5, 3)
    assert summary.share_rho_50 == np.count_nonzero(rho.max(axis=1)[[0, 1, 2, 3, 6]] >= 0.5) / 6
    assert summary.max_rho == pytest.approx(1)
    np.testing.assert_allclose(summary.mean_entropy_balanced, np.nanmean(label_entropy(codes, classes)))

    blocks = [label_scores(ClassStats.of(codes[:, part], classes)) for part in (slice(0, 3), slice(3, 8))]
    for one, other in zip(LabelScores.joined(blocks), scores, strict=True):
        np.testing.assert_array_equal(one, other)

    twin = label_summary(label_scores(ClassStats.of(codes, shuffled_labels(Labels.of(classes), 0))))
    assert twin.n_found_concepts == 0
    assert twin.n_measured == summary.n_measured
    assert twin.max_rho < 0.3


def test_a_concept_that_is_known_of_too_few_firing_images_is_not_the_best():
    codes = np.repeat([1.0, 0.0], 30)[:, None]
    labels = np.stack([codes[:, 0], np.arange(60) % 2, codes[:, 0]], axis=1)
    labels[9:30, 0] = np.nan  # known of 9 images on which the latent fires
    scores = label_scores(ClassStats.of(codes, labels))
    assert label_correlation(codes, labels)[0, 0] == pytest.approx(1)
    assert (scores.best_concept[0], scores.n_firing[0]) == (2, 30)
    assert scores.second_rho[0] == pytest.approx(0, abs=1e-12)
