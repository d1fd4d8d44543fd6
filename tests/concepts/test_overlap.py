"""Uniqueness against the reference's numbers (tests/golden/README.md) and against all pairs of sets."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

import sae_ray.concepts.overlap as module
from sae_ray.concepts import count_above, shared_pairs, uniqueness
from sae_ray.errors import UsageError

GOLDEN = load_file(Path(__file__).parents[1] / "golden" / "uniqueness_hierarchy.safetensors")
COUNTS = [394, 127, 29, 3, 2, 2, 1, 1, 1, 1]


@pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy])
def test_the_reference_finds_the_same(kind):
    found = uniqueness(kind(GOLDEN["top_images"]), live=kind(GOLDEN["live"]))
    assert found.n_live == 38
    assert found.n_pairs == 703
    assert found.counts.tolist() == COUNTS
    assert found.least_shared == 1
    assert found.shares[0] == 394 / 703
    jaccard = np.zeros((40, 40))
    jaccard[found.pairs.neuron_a, found.pairs.neuron_b] = found.pairs.jaccard
    pairs = np.array(list(itertools.combinations(GOLDEN["live"].tolist(), 2)))
    assert np.array_equal(jaccard[pairs[:, 0], pairs[:, 1]], GOLDEN["jaccard"])


def test_neurons_with_unused_places_do_not_count_by_default():
    top = GOLDEN["top_images"].copy()
    top[34], top[35, 9:] = -1, -1
    assert uniqueness(top).counts.tolist() == COUNTS
    mask = np.ones(40, bool)
    mask[[34, 35]] = False
    assert uniqueness(GOLDEN["top_images"], live=mask).counts.tolist() == COUNTS
    assert uniqueness(np.full((3, 16), -1)).n_live == 0
    assert np.isnan(uniqueness(np.full((3, 16), -1)).shares).all()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sets(st.integers(0, 12), max_size=6), min_size=1, max_size=12), st.integers(1, 40))
def test_it_equals_all_pairs_of_sets_however_they_are_cut(sets: list[set[int]], entries: int):
    top = np.array([[*sorted(images), *[-1] * (6 - len(images))] for images in sets])
    live = np.arange(len(sets))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_BLOCK_ENTRIES", entries)
        found = uniqueness(top, live=live)
        blocks = list(shared_pairs(top, live=live))
    expected = {
        (a, b): (len(sets[a] & sets[b]), len(sets[a] | sets[b]))
        for a, b in itertools.combinations(range(len(sets)), 2)
        if sets[a] & sets[b]
    }
    pairs = found.pairs
    keys = list(zip(pairs.neuron_a.tolist(), pairs.neuron_b.tolist(), strict=True))
    assert keys == sorted(expected)
    assert list(zip(pairs.shared.tolist(), pairs.either.tolist(), strict=True)) == [expected[key] for key in keys]
    assert found.counts.tolist() == [sum(10 * m > t * e for m, e in expected.values()) for t in range(10)]
    assert np.array_equal(sum((count_above(block) for block in blocks), np.zeros(10, int)), found.counts)


def test_where_too_many_pairs_share_an_image_those_that_share_most_are_listed(monkeypatch: pytest.MonkeyPatch):
    top = np.array([[0, 1, 2, 3]] * 5 + [[3, 2, 4, 5]] * 3)
    every = uniqueness(top)
    assert sorted(every.pairs.shared.tolist()) == [2] * 15 + [4] * 13
    monkeypatch.setattr(module, "MAX_PAIRS", 20)
    monkeypatch.setattr(module, "_BLOCK_ENTRIES", 10)
    found = uniqueness(top)
    assert found.least_shared == 3
    assert found.pairs.shared.tolist() == [4] * 13
    assert found.counts.tolist() == every.counts.tolist()
    monkeypatch.setattr(module, "MAX_PAIRS", 5)
    assert len(uniqueness(top).pairs.shared) == 0


def test_wrong_inputs_are_refused():
    with pytest.raises(UsageError, match="twice for neuron 1"):
        uniqueness(np.array([[0, 1], [2, 2]]))
    with pytest.raises(UsageError, match=r"shape \(3,\)"):
        uniqueness(np.arange(3))
    with pytest.raises(UsageError, match="float64"):
        uniqueness(np.zeros((3, 2)))
    with pytest.raises(UsageError, match="live has the shape"):
        uniqueness(np.array([[0, 1], [2, 3]]), live=np.array([2]))
