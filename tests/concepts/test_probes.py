"""Probes of latents against scikit-learn and what saev and SAEBench compute, and known answers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from safetensors.numpy import load_file
from scipy.optimize import minimize
from scipy.sparse import csr_array

from sae_ray.concepts import (
    Labels,
    LatentProbes,
    best_probes,
    halves,
    judge_probes,
    latent_probes,
    morans_i,
    purity,
    sparse_probing,
    tpp,
)
from sae_ray.errors import UsageError

GOLDEN = Path(__file__).parents[1] / "golden"
DATA = load_file(GOLDEN / "fms.safetensors")
PEERS = load_file(GOLDEN / "peers.safetensors")
REFERENCE = json.loads((GOLDEN / "peers.json").read_text())
CONCEPTS = json.loads((GOLDEN / "fms.json").read_text())["concepts"]
CODES, LABELS, FITTED, JUDGED = (DATA[name] for name in ("codes", "labels", "train_rows", "test_rows"))


def test_saev_fits_the_same_probes():
    saev = REFERENCE["saev"]
    probes = latent_probes(CODES[FITTED], LABELS[FITTED])
    np.testing.assert_allclose(probes.loss, PEERS["saev.loss"], rtol=0, atol=1e-5)
    best = best_probes([probes], Labels.of(LABELS[FITTED]))
    assert best.latent.tolist() == saev["best_latent"]
    on_fitted = judge_probes(best, CODES[FITTED], LABELS[FITTED])
    np.testing.assert_allclose(on_fitted.loss, best.loss, rtol=0, atol=1e-12)
    np.testing.assert_allclose(on_fitted.r, saev["probe_r"], rtol=0, atol=1e-4)
    np.testing.assert_allclose(on_fitted.bias_loss, saev["bias_only_loss"], rtol=0, atol=1e-5)
    ratio = 1 - np.mean(best.loss) / np.mean(saev["bias_only_loss"])
    assert on_fitted.probe_r == pytest.approx(ratio, abs=1e-4)
    # Its own order of tied scores differs from scikit-learn's single step.
    judged = judge_probes(best, CODES[JUDGED], LABELS[JUDGED])
    np.testing.assert_allclose(judged.average_precision, saev["average_precision_sklearn"], rtol=0, atol=1e-12)
    assert judged.coverage() == saev["coverage_at_0.3"]
    assert judged.coverage(0.9) == 2 / 5
    assert judged.mean_average_precision == pytest.approx(np.mean(saev["average_precision_sklearn"]))


@pytest.mark.parametrize("concept", CONCEPTS)
def test_saebench_probes_the_same_latents(concept: str):
    labels = LABELS[:, CONCEPTS.index(concept)]
    found = sparse_probing(CODES, labels, FITTED, JUDGED)
    for (k, expected), probe in zip(REFERENCE["saebench_sparse_probing"][concept].items(), found, strict=True):
        assert probe.latents.tolist() == expected["latents"], k
        assert probe.accuracy == pytest.approx(expected["test_accuracy"], abs=1e-12), k


def optimum(code: np.ndarray, shown: np.ndarray) -> float:
    """The lowest mean cross-entropy, by another solver."""
    prior = np.log(shown.mean() / (1 - shown.mean()))

    def loss(x: np.ndarray) -> float:
        z = x[0] * code + x[1]
        return (np.logaddexp(0, z) - z * shown).mean() + 5e-9 * (x[0] ** 2 + (x[1] - prior) ** 2)

    return min(
        minimize(loss, [start, prior], method=method).fun for start in (-3, 0, 3) for method in ("BFGS", "Nelder-Mead")
    )


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_losses_are_the_lowest(data: st.DataObject):
    n = data.draw(st.integers(2, 14))
    values = st.sampled_from([0.0, 0.0, 0.0, 1.0, 2.0]) | st.integers(-20, 50).map(lambda tenths: tenths / 10)
    codes = data.draw(arrays.arrays("float64", (n, 2), elements=values))
    labels = data.draw(arrays.arrays("float64", (n, 2), elements=st.sampled_from([0.0, 1.0, 1.0, np.nan])))
    probes = latent_probes(codes, labels)
    for latent, concept in np.ndindex(2, 2):
        known = ~np.isnan(labels[:, concept])
        code, shown = codes[known, latent], labels[known, concept]
        loss = probes.loss[latent, concept]
        if len(set(shown)) < 2:
            assert np.isnan(loss)
            continue
        assert loss <= optimum(code, shown) + 1e-6
        z = probes.weight[latent, concept] * code + probes.bias[latent, concept]
        assert loss == pytest.approx((np.logaddexp(0, z) - z * shown).mean(), abs=1e-7)


def test_blocks_of_latents_and_kinds_of_input_are_no_matter(monkeypatch: pytest.MonkeyPatch):
    classes = np.random.default_rng(0).integers(-1, 6, 400)
    labels = Labels.of(classes)
    whole = latent_probes(CODES, labels)
    monkeypatch.setattr("sae_ray.concepts.logistic_probes.CHUNK_ENTRIES", 500)
    blocks = [
        latent_probes(csr_array(CODES[:, part]), torch.from_numpy(classes)) for part in (slice(0, 7), slice(7, 24))
    ]
    for one, other in zip(map(np.concatenate, zip(*blocks, strict=True)), whole, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-9)
    assert best_probes(blocks, labels).latent.tolist() == best_probes([whole], labels).latent.tolist()
    dense = latent_probes(CODES, np.where(classes[:, None] < 0, np.nan, classes[:, None] == np.arange(6)))
    np.testing.assert_allclose(dense.loss, whole.loss, rtol=0, atol=1e-12)


def test_dead_latents_and_concepts_without_images_have_no_probe():
    codes, labels = np.zeros((20, 3)), np.zeros((20, 3))
    labels[:5, 0], labels[:, 1] = 1, 1
    probes = latent_probes(codes, labels)
    np.testing.assert_allclose(probes.loss[:, 0], -(0.25 * np.log(0.25) + 0.75 * np.log(0.75)), atol=1e-12)
    assert np.isnan(probes.loss[:, 1:]).all()
    best = best_probes([probes], Labels.of(labels))
    assert best.latent.tolist() == [0, -1, -1]
    judged = judge_probes(best, codes, labels)
    assert judged.r[0] == pytest.approx(0, abs=1e-9)
    assert judged.average_precision[0] == 0.25  # all scores tie
    assert np.isnan(judged.average_precision[1:]).all()
    nothing = best_probes([LatentProbes(*np.zeros((3, 0, 3)))], Labels.of(labels))
    assert nothing.latent.tolist() == [-1, -1, -1]
    empty = judge_probes(nothing, codes, labels)
    assert np.isnan([empty.probe_r, empty.mean_average_precision, empty.coverage()]).all()


def test_purity_is_the_share_of_the_commonest_class():
    classes = np.array([0, 0, 1, 1, 2, -1])
    top = np.array([[0, 1, 2, 3], [0, 1, 4, 5], [2, 5, -1, -1], [-1, -1, -1, -1], [5, -1, -1, -1]])
    np.testing.assert_array_equal(purity(top, classes), [0.5, 0.5, 0.5, np.nan, 0])


def orthonormal_world(seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Eight classes that are single latents of an orthonormal dictionary, among others."""
    rng = np.random.default_rng(seed)
    classes = np.arange(1600) % 8
    codes = np.where(rng.random((1600, 32)) < 0.1, rng.random((1600, 32)), 0.0)
    codes[:, :8] = (classes[:, None] == np.arange(8)) * (1 + rng.random((1600, 1)))
    decoder = np.linalg.qr(rng.normal(size=(32, 32)))[0]
    noise = 0.01 * rng.normal(size=(1600, 32))  # what the SAE does not reconstruct
    return codes @ decoder + noise, codes, decoder, classes


def test_latents_that_are_the_classes_take_down_their_probes_alone():
    activations, codes, decoder, classes = orthonormal_world()
    split = halves(Labels.of(classes), 0)
    found = tpp(activations, codes, decoder, classes, split)
    assert found.concepts.tolist() == list(range(8))
    assert found.accuracy.min() > 0.99
    assert found.tpp[0] >= 0.49
    assert abs(found.unintended[0]) <= 0.001
    for same in (csr_array(codes), torch.from_numpy(codes)):
        np.testing.assert_array_equal(tpp(activations, same, decoder, classes, split).tpp, found.tpp)

    effects = np.random.default_rng(1).random((8, 32))
    effects[:, :8] = 0
    random = tpp(activations, codes, decoder, classes, split, effects=effects)
    assert np.abs(random.tpp[0]) <= 0.005


def test_a_probe_falls_with_its_own_latent_alone():
    activations, codes, decoder, classes = orthonormal_world(1)
    labels, chosen = Labels.of(classes), np.zeros((8, 32))
    chosen[:, 3], chosen[2, 5] = 1, 2
    split = halves(labels, 0)
    found = tpp(activations, codes, decoder, classes, split, ns=(1,), effects=chosen)
    # Without latent 3, class 3 is like no class; without latent 5, class 5. Every concept but the third takes latent 3.
    assert found.intended[0] == pytest.approx(0.5 / 8, abs=0.01)
    assert found.unintended[0] == pytest.approx((0.5 * 6 + 0.5) / 56, abs=0.01)


def test_tpp_of_what_does_not_fit_is_refused():
    activations, codes, decoder, classes = orthonormal_world()
    split = halves(Labels.of(classes), 0)
    with pytest.raises(UsageError, match=r"decoder \(32, 31\) do not fit"):
        tpp(activations, codes, decoder[:, :31], classes, split)
    few = np.where(np.arange(1600) < 80, classes, -1)
    with pytest.raises(UsageError, match="no concept has at least 10 images, and 10 others, in both halves"):
        tpp(activations, codes, decoder, few, halves(Labels.of(few), 0))


def test_sparse_probing_needs_both_labels():
    with pytest.raises(UsageError, match="the fitted rows are all of one label"):
        sparse_probing(CODES, np.zeros(400), FITTED, JUDGED)
    with pytest.raises(UsageError, match=r"labels has the shape \(3,\) for 400 rows"):
        sparse_probing(CODES, np.zeros(3), FITTED, JUDGED)


def morans_i_by_pairs(values: np.ndarray) -> float:
    """Over all ordered pairs of neighbours, as the formula has it."""
    places = list(np.ndindex(values.shape))
    away = values - values.mean()
    pairs = [(a, b) for a in places for b in places if abs(a[0] - b[0]) + abs(a[1] - b[1]) == 1]
    return len(places) / len(pairs) * sum(away[a] * away[b] for a, b in pairs) / (away**2).sum()


def test_morans_i_equals_the_sum_over_pairs():
    maps = np.random.default_rng(0).random((2, 3, 4, 5))
    found = morans_i(torch.from_numpy(maps))
    assert found.shape == (2, 3)
    for place in np.ndindex(2, 3):
        assert found[place] == pytest.approx(morans_i_by_pairs(maps[place]), abs=1e-12)


def test_morans_i_tells_regions_from_noise_and_from_chequers():
    chequers = np.indices((8, 8)).sum(axis=0) % 2
    region = np.zeros((8, 8))
    region[:, :4] = 1
    np.testing.assert_allclose(morans_i(np.stack([chequers, region])), [-1, 96 / 112], atol=1e-12)
    noise = morans_i(np.random.default_rng(0).random((4000, 4, 4)))
    assert noise.mean() == pytest.approx(-1 / 15, abs=0.01)
    assert np.isnan(morans_i(np.full((1, 3, 3), 0.1))).all()
    with pytest.raises(UsageError, match=r"maps has the shape \(1, 1\)"):
        morans_i(np.ones((1, 1)))
