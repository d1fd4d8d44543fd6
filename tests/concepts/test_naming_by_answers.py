"""Names from answers about images, against counts by hand and scikit-learn's area under the curve."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import balanced_accuracy_score, roc_auc_score

from sae_ray.concepts import Trials, answered_names, name_scores, random_images, trials
from sae_ray.concepts.naming import names
from sae_ray.concepts.naming_by_answers import MIN_TRIED, affirms
from sae_ray.errors import UsageError


def test_the_commonest_answer_is_the_name():
    answers = dict(enumerate(["Star.", "a cat", "star", "moon", "", "moon"]))
    found = answered_names([[1, 0, 2, 3], [3, 2, 5, 0], [4, -1, -1, -1], [-1, -1, -1, -1]], answers)
    assert found.name == ["star", "moon", None, None]  # moon is as common as star, and its first image ranks higher
    assert found.agreement[:2].tolist() == [0.5, 0.5]
    assert np.isnan(found.agreement[2:]).all()
    assert found.n_images.tolist() == [4, 4, 1, 0]


def test_answers_without_words_count_against_agreement():
    assert answered_names([[0, 1, 2]], {0: "…", 1: "star", 2: ""}).agreement == pytest.approx(1 / 3)


def test_yes_is_yes():
    assert [affirms(answer) for answer in ("Yes.", "yes, it is", "No", "yesterday", "")] == [True, True, *[False] * 3]


def some_codes(seed: int, n_images: int = 700, n_latents: int = 6) -> np.ndarray:
    rng = np.random.default_rng(seed)
    codes = rng.random((n_images, n_latents)) * (rng.random((n_images, n_latents)) < 0.4)
    codes[:, 3] = 0
    codes[:3, 4], codes[3:, 4] = 1, 0
    return codes


def test_names_are_tried_on_strong_and_silent_images():
    codes = some_codes(0)
    drawn = trials(codes, range(6), seed=0)
    for latent in range(6):
        firing, silent = (row[latent][row[latent] >= 0] for row in drawn)
        n_firing = np.count_nonzero(codes[:, latent])
        assert len(firing) == len(set(firing)) == min(16, n_firing)
        assert len(silent) == len(set(silent)) == 16
        assert (codes[silent, latent] == 0).all()
        share = max(16, int(np.ceil(0.1 * n_firing)))
        assert set(firing) <= set(np.argsort(-codes[:, latent])[:share])
    assert len(np.unique(drawn.silent)) < 6 * 16  # from one pool


@given(st.permutations(range(6)), st.integers(1, 6))
def test_trials_of_a_neuron_do_not_depend_on_the_others(order: list[int], n: int):
    codes = some_codes(1)
    whole, some = trials(codes, range(6), seed=3), trials(codes, order[:n], seed=3)
    for place, latent in enumerate(order[:n]):
        assert np.array_equal(whole.firing[latent], some.firing[place])
        assert np.array_equal(whole.silent[latent], some.silent[place])
    assert not np.array_equal(whole.firing, trials(codes, range(6), seed=4).firing)


def test_scores_of_yes_and_no_are_balanced_accuracies():
    rng = np.random.default_rng(0)
    answers = rng.choice(["Star", "a star", "moon", "starfish"], 100).tolist()
    tried = Trials(np.arange(48).reshape(3, 16), np.arange(48, 96).reshape(3, 16))
    found = name_scores(["star", "moon", None], tried, lambda name, image: names(answers[image], name))
    for place, name in enumerate(["star", "moon"]):
        images = np.concatenate([row[place] for row in tried])
        said = [answers[image].lower() == name for image in images]
        assert found[place] == pytest.approx(balanced_accuracy_score([1] * 16 + [0] * 16, said))
    assert np.isnan(found[2])


def test_scores_of_similarities_are_areas_under_the_curve():
    similarities = np.random.default_rng(1).normal(size=100).round(1)  # with ties
    tried = Trials(np.arange(30)[None], np.arange(40, 75)[None])
    found = name_scores(["star"], tried, lambda name, image: similarities[image])
    images = np.concatenate([tried.firing[0], tried.silent[0]])
    assert found[0] == pytest.approx(roc_auc_score([1] * 30 + [0] * 35, similarities[images]))


def test_too_few_images_are_no_trial():
    drawn = trials(some_codes(0), range(6), seed=0)
    found = name_scores(["star"] * 6, drawn, lambda name, image: 1.0)
    assert np.flatnonzero(np.isnan(found)).tolist() == [3, 4]  # one is dead, one fires on three images
    assert MIN_TRIED > 3
    assert np.allclose(np.delete(found, [3, 4]), 0.5)  # a name that fits every image says nothing
    with pytest.raises(UsageError, match="5 names came with images of 6 neurons"):
        name_scores(["star"] * 5, drawn, lambda name, image: 1.0)


def test_random_images_come_from_one_small_pool():
    drawn = random_images(np.arange(10_000, 20_000), 200, seed=0)
    assert drawn.shape == (200, 16)
    assert drawn.min() >= 10_000
    assert len(np.unique(drawn)) <= 512
    assert all(len(set(row)) == 16 for row in drawn.tolist())
    assert random_images(np.arange(9), 0, seed=0).shape == (0, 16)
