"""Names from a vocabulary against what CLIP-Dissect computes (tests/golden/README.md), and their blocks."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file
from scipy.sparse import csr_array

from sae_ray.concepts import BestWords, cosine, cosine_cubed, decoder_cosine, rank_reorder, soft_wpmi, wpmi
from sae_ray.concepts.dissect import Prior, log_likelihood, log_total, top_firing, word_probabilities
from sae_ray.errors import UsageError

GOLDEN = Path(__file__).parents[1] / "golden"
DATA = load_file(GOLDEN / "dissect.safetensors")
NAMES = json.loads((GOLDEN / "dissect.json").read_text())["names"]
LIVE = np.arange(12) != 10
ACTIVATIONS, SIMILARITIES = DATA["activations"], DATA["similarities"]
WEIGHTS = 0.998 - np.arange(100) / 100 * 0.028


def check_names(scores: np.ndarray, reference: str) -> None:
    assert np.nanargmax(scores, axis=1).tolist() == NAMES[reference]


def test_soft_wpmi_is_that_of_the_reference():
    every = soft_wpmi(ACTIVATIONS, SIMILARITIES, top_images=DATA["top100"])
    np.testing.assert_allclose(every, DATA["soft_wpmi.all"], rtol=0, atol=1e-3)
    check_names(every, "soft_wpmi.all")
    live = soft_wpmi(ACTIVATIONS[:, LIVE], SIMILARITIES, top_images=DATA["top100"][:, LIVE])
    np.testing.assert_allclose(live, DATA["soft_wpmi.live"], rtol=0, atol=1e-3)
    check_names(live, "soft_wpmi.live")
    assert np.abs(live - every[LIVE]).max() > 0.05  # a dead neuron among those scored changes all others


@pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy, csr_array])
def test_the_other_settings_are_those_of_the_reference(kind):
    activations = kind(ACTIVATIONS[:, LIVE])
    short = soft_wpmi(activations, SIMILARITIES, top_k=20, a=2, lam=0.6)
    np.testing.assert_allclose(short, DATA["soft_wpmi_top20_a2_lam0.6.live"], rtol=0, atol=1e-3)
    check_names(short, "soft_wpmi_top20_a2_lam0.6.live")
    scores = wpmi(activations, SIMILARITIES)
    np.testing.assert_allclose(scores, DATA["wpmi.live"], rtol=0, atol=1e-3)
    check_names(scores, "wpmi.live")


@pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy, csr_array])
def test_cosines_are_those_of_the_reference(kind):
    activations = kind(ACTIVATIONS)
    scores = cosine(activations, SIMILARITIES)
    np.testing.assert_allclose(scores[LIVE], DATA["cos_similarity.live"], rtol=0, atol=1e-6)
    assert np.array_equal(np.isnan(scores), np.isnan(DATA["cos_similarity.all"]))
    check_names(scores[LIVE], "cos_similarity.live")


@pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy, csr_array])
def test_cubed_cosines_are_those_of_the_reference_but_for_its_single_precision(kind):
    """Its formula in double precision gives ours. Its own numbers, sums of 400 products in single precision, are up to
    2.1e-6 away from that."""
    neurons, words = (
        (v - v.mean(axis=0)) ** 3 for v in (ACTIVATIONS[:, LIVE].astype(float), SIMILARITIES.astype(float))
    )
    precise = (neurons / np.linalg.norm(neurons, axis=0)).T @ (words / np.linalg.norm(words, axis=0))
    cubed = cosine_cubed(kind(ACTIVATIONS), SIMILARITIES)
    np.testing.assert_allclose(cubed[LIVE], precise, rtol=0, atol=1e-12)
    np.testing.assert_allclose(cubed[LIVE], DATA["cos_similarity_cubed.live"], rtol=0, atol=2.2e-6)
    assert np.isnan(cubed[10]).all()
    check_names(cubed[LIVE], "cos_similarity_cubed.live")
    faint = cosine_cubed(1e-3 * ACTIVATIONS.astype(float), SIMILARITIES)  # the floor of norms
    np.testing.assert_allclose(faint[LIVE], 1e-6 * precise * np.linalg.norm(neurons, axis=0)[:, None], rtol=1e-9)


def test_the_decoder_cosine_is_that_of_the_reference():
    decoder, texts = DATA["decoder"], DATA["text_embeddings"]
    scores = decoder_cosine(torch.from_numpy(decoder), texts)
    np.testing.assert_allclose(scores, DATA["decoder_cosine"], rtol=0, atol=1e-6)
    check_names(scores, "decoder_cosine")
    np.testing.assert_allclose(
        decoder_cosine(5 * decoder[3:5].astype(float), 2 * texts), scores[3:5], rtol=0, atol=1e-12
    )
    assert np.isnan(decoder_cosine(np.zeros((1, 16)), texts)).all()
    with pytest.raises(UsageError, match=r"decoder \(12, 16\) and texts \(30, 15\)"):
        decoder_cosine(decoder, texts[:, :15])


def test_centring_finds_names_that_the_modality_gap_hides():
    rng = np.random.default_rng(0)
    meaning, cone = rng.normal(size=(20, 16)), rng.normal(size=(2, 16))
    unit = [
        rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (meaning + 6 * cone[0], meaning + 6 * cone[1])
    ]
    images, texts = unit
    plain = BestWords.of(decoder_cosine(images, texts))
    centred = BestWords.of(decoder_cosine(images, texts, centre=images.mean(axis=0)))
    assert centred.first.tolist() == list(range(20))
    assert centred.n_distinct == 20
    assert plain.n_distinct < 10


def test_rank_reorder_is_that_of_the_reference():
    scores = rank_reorder(ACTIVATIONS[:, LIVE], SIMILARITIES)
    np.testing.assert_allclose(scores, DATA["rank_reorder.live"], rtol=0, atol=1e-3)  # NaN where it has NaN
    assert 0.4 < np.isnan(scores).mean() < 0.5
    assert np.argmax(scores, axis=1).tolist() == NAMES["rank_reorder.live"]  # to argmax, as to torch, NaN is highest
    absolute = rank_reorder(csr_array(ACTIVATIONS[:, LIVE]), np.abs(SIMILARITIES))
    np.testing.assert_allclose(absolute, DATA["rank_reorder.abs_similarities.live"], rtol=0, atol=1e-3)
    assert np.isnan(rank_reorder(ACTIVATIONS, SIMILARITIES)[10]).all()


def test_a_dead_neuron_has_no_names_and_changes_nothing():
    with_dead = soft_wpmi(ACTIVATIONS, SIMILARITIES)
    assert np.array_equal(np.isnan(with_dead).all(axis=1), ~LIVE)
    assert np.array_equal(with_dead[LIVE], soft_wpmi(ACTIVATIONS[:, LIVE], SIMILARITIES))
    assert np.isnan(soft_wpmi(np.zeros((400, 3)), SIMILARITIES)).all()


def test_a_neuron_alone_scores_nothing():
    assert np.array_equal(soft_wpmi(ACTIVATIONS[:, :1], SIMILARITIES), np.zeros((1, 30)))


def literal(top_images: np.ndarray, similarities: np.ndarray, a: float) -> np.ndarray:
    """l by its formula, one logarithm per image."""
    shown = np.exp(a * similarities) / np.exp(a * similarities).sum(axis=1, keepdims=True)
    found = np.full((len(top_images), similarities.shape[1]), np.nan)
    for neuron, images in enumerate(top_images):
        images = images[images >= 0]
        if len(images) >= 5:
            logs = np.log(1 + WEIGHTS[: len(images), None] * (shown[images] - 1) + 1e-7)
            found[neuron] = logs.sum(axis=0) * 100 / len(images)
    return found


def test_the_product_of_factors_equals_the_sum_of_their_logarithms():
    rng = np.random.default_rng(0)
    activations = rng.random((400, 40)) * (rng.random((400, 40)) < rng.random(40) * 0.6)
    activations[:, 3], activations[:, 5] = 0, np.arange(400) < 4
    top = top_firing(activations, 100)
    n_images = (top >= 0).sum(axis=1)
    assert n_images.min() == 0
    assert (n_images == 100).sum() > 16
    assert ((n_images > 4) & (n_images < 100)).any()
    found = log_likelihood(top, word_probabilities(SIMILARITIES.astype(float), 10), WEIGHTS)
    np.testing.assert_allclose(found, literal(top, SIMILARITIES.astype(float), 10), rtol=1e-12)
    # 200 images that do not show the word at all: as likely as can be told in double precision.
    far = log_likelihood(np.arange(200)[None], np.zeros((200, 1)), np.ones(200))
    np.testing.assert_allclose(far, 200 * np.log(1e-7))


def test_short_supports_are_scaled_and_do_not_count_for_the_prior():
    few = DATA["few.activations"]
    assert np.count_nonzero(few) == 30
    full = ACTIVATIONS[:, [0, 2, 3, 6] * 5]
    scores = soft_wpmi(np.hstack([few, full]), SIMILARITIES)
    assert np.array_equal(scores[1:], soft_wpmi(full, SIMILARITIES))
    expected = literal(top_firing(np.hstack([few, full]), 100), SIMILARITIES.astype(float), 10)
    prior = np.log(np.exp(expected[1:]).mean(axis=0))
    np.testing.assert_allclose(scores, expected - prior, rtol=1e-9)
    # Fewer than 16 neurons with 100 images: all count.
    mixed = soft_wpmi(np.hstack([few, full[:, :15]]), SIMILARITIES)
    prior = np.log(np.exp(expected[:16]).mean(axis=0))
    np.testing.assert_allclose(mixed, expected[:16] - prior, rtol=1e-9)


def test_top_images_are_the_largest_above_zero_and_ties_go_to_the_lower():
    activations = np.array([[0, 1, -1], [2, 1, -2], [2, 0, -3], [3, 1, 0]], float)
    expected = [[3, 1, 2], [0, 1, 3], [-1, -1, -1]]
    assert top_firing(activations, 3).tolist() == expected
    assert top_firing(csr_array(activations), 3).tolist() == expected


@settings(max_examples=30, deadline=None)
@given(st.sets(st.integers(1, 11)), st.sets(st.integers(1, 29)))
def test_blocks_of_neurons_and_words_give_the_same_scores_and_best_words(neuron_cuts: set[int], word_cuts: set[int]):
    similarities = SIMILARITIES.astype(float)
    whole = soft_wpmi(ACTIVATIONS, similarities)
    word_blocks = [slice(*pair) for pair in zip([0, *sorted(word_cuts)], [*sorted(word_cuts), 30], strict=True)]
    neuron_blocks = [slice(*pair) for pair in zip([0, *sorted(neuron_cuts)], [*sorted(neuron_cuts), 12], strict=True)]
    total = np.logaddexp.reduce([log_total(similarities[:, words], 10) for words in word_blocks])
    top = top_firing(ACTIVATIONS, 100)
    n_images = (top >= 0).sum(axis=1)
    best = []
    for words in word_blocks:
        probabilities = word_probabilities(similarities[:, words], 10, total)
        parts = [log_likelihood(top[neurons], probabilities, WEIGHTS) for neurons in neuron_blocks]
        priors = [Prior.of(part, n_images[block], 100) for part, block in zip(parts, neuron_blocks, strict=True)]
        scores = np.concatenate(parts) - Prior.merged(priors).log_mean()
        np.testing.assert_allclose(scores, whole[:, words], rtol=0, atol=1e-9)
        best.append(BestWords.of(scores, words.start))
    merged, expected = BestWords.merged(best[::-1]), BestWords.of(whole)
    assert np.array_equal(merged.word, expected.word)
    np.testing.assert_allclose(merged.score, expected.score, rtol=0, atol=1e-9)


def test_wrong_inputs_are_refused():
    with pytest.raises(UsageError, match=r"activations has 399 rows and similarities has 400"):
        soft_wpmi(ACTIVATIONS[1:], SIMILARITIES)
    with pytest.raises(UsageError, match=r"top_images has the shape \(12, 100\)"):
        soft_wpmi(ACTIVATIONS, SIMILARITIES, top_images=DATA["top100"].T)
    with pytest.raises(UsageError, match="positions below 50"):
        soft_wpmi(ACTIVATIONS[:50], SIMILARITIES[:50], top_images=DATA["top100"])
    with pytest.raises(UsageError, match="finite"):
        wpmi(ACTIVATIONS, np.full((400, 2), np.nan))
    with pytest.raises(UsageError, match=r"similarities has the shape \(400,\)"):
        cosine(ACTIVATIONS, SIMILARITIES[:, 0])
