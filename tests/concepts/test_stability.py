"""Matching two dictionaries, against the reference's number (tests/golden/README.md) and against all assignments."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

import sae_ray.concepts.stability as module
from sae_ray.concepts import matched_cosine
from sae_ray.errors import UsageError

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy])
def test_the_reference_finds_the_same(kind):
    data = load_file(GOLDEN / "peers.safetensors")
    expected = json.loads((GOLDEN / "peers.json").read_text())["overcomplete"]
    found = matched_cosine(kind(data["overcomplete.dictionary_1"]), kind(data["overcomplete.dictionary_2"]))
    assert found.mean == pytest.approx(expected["mean_matched_cosine"], abs=1e-5)
    assert len(found.cosine) * (1 - found.mean) == pytest.approx(expected["cosine_hungarian_loss"], abs=1e-4)
    assert found.exact


def test_no_assignment_is_better():
    rng = np.random.default_rng(0)
    first, second = rng.normal(size=(5, 3)), rng.normal(size=(6, 3))
    cosines = (first / np.linalg.norm(first, axis=1, keepdims=True)) @ (
        second / np.linalg.norm(second, axis=1, keepdims=True)
    ).T
    best = max(np.mean(cosines[range(5), list(columns)]) for columns in itertools.permutations(range(6), 5))
    found = matched_cosine(first, second)
    assert found.mean == pytest.approx(best)
    np.testing.assert_allclose(found.cosine, cosines[range(5), found.partner])
    turned = matched_cosine(second, first)
    assert turned.mean == pytest.approx(best)
    assert sorted(turned.partner.tolist()) == [-1, 0, 1, 2, 3, 4]
    assert np.isnan(turned.cosine[turned.partner == -1]).all()


def test_the_sign_of_a_latent_matters():
    assert matched_cosine(np.eye(3), -np.eye(3)).mean == pytest.approx(0)
    assert matched_cosine(np.ones((1, 3)), -np.ones((1, 3))).mean == pytest.approx(-1)


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "EXACT", 8)
    monkeypatch.setattr(module, "_BLOCK", 16)


@pytest.mark.usefixtures("few")
def test_many_latents_are_paired_by_their_largest_cosines():
    rng = np.random.default_rng(0)
    first = rng.normal(size=(100, 12))
    order = rng.permutation(100)
    same = matched_cosine(first, 3 * first[order] + 0.01 * rng.normal(size=(100, 12)))
    assert not same.exact
    assert np.array_equal(order[same.partner], np.arange(100))
    assert same.mean > 0.999
    # Against the largest cosine first, one pair at a time, down to 8 latents.
    second = rng.normal(size=(90, 12))
    found = matched_cosine(first, second)
    assert sorted(found.partner[found.partner >= 0].tolist()) == list(range(90))
    cosines = (first / np.linalg.norm(first, axis=1, keepdims=True)) @ (
        second / np.linalg.norm(second, axis=1, keepdims=True)
    ).T
    greedy = []
    while len(greedy) < 90:
        a, b = np.unravel_index(np.argmax(cosines), cosines.shape)
        greedy.append(cosines[a, b])
        cosines[a], cosines[:, b] = -2, -2
    assert found.mean == pytest.approx(np.mean(greedy), abs=1e-6)


@pytest.mark.usefixtures("few")
def test_latents_that_are_all_alike_are_paired_without_end():
    found = matched_cosine(np.ones((500, 4)), np.ones((300, 4)))
    assert sorted(found.partner[found.partner >= 0].tolist()) == list(range(300))
    assert found.mean == pytest.approx(1)


def test_wrong_inputs_are_refused():
    with pytest.raises(UsageError, match="decoder has width 3 and other has 2"):
        matched_cosine(np.eye(3), np.eye(2))
    with pytest.raises(UsageError, match="without dead latents"):
        matched_cosine(np.eye(3), np.zeros((3, 3)))
