"""Which pairs people are asked about."""

from __future__ import annotations

from itertools import combinations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from sae_ray.concepts.agreeing import EDGES, bin_of
from sae_ray.concepts.judging import choose_pairs


@given(
    score=st.lists(st.integers(-20, 20), min_size=2, max_size=14).map(lambda tenths: np.array(tenths) / 20),
    n_pairs=st.integers(1, 120),
    seed=st.integers(0, 5),
)
def test_pairs_are_spread_over_the_bins_as_evenly_as_there_are_pairs(score: np.ndarray, n_pairs: int, seed: int):
    eligible = np.arange(len(score)) % 5 != 4
    possible = [(a, b) for a, b in combinations(np.flatnonzero(eligible), 2)]
    available = np.bincount(bin_of(np.array([abs(score[a] - score[b]) for a, b in possible]), EDGES), minlength=10)

    pairs = choose_pairs(score, eligible, n_pairs, seed)
    assert len(pairs) == min(n_pairs, len(possible))
    assert eligible[pairs].all()
    assert len({frozenset(pair) for pair in pairs.tolist()}) == len(pairs)
    assert (pairs[:, 0] != pairs[:, 1]).all()
    taken = np.bincount(bin_of(np.abs(np.diff(score[pairs], axis=1))[:, 0], EDGES), minlength=10)
    assert (taken <= available).all()
    short = taken < available
    # Only a bin that has given everything has fewer than another bin, but for what cannot be divided.
    assert taken.max(initial=0) - taken[short].min(initial=taken.max(initial=0)) <= 1


def test_all_pairs_of_a_bin_are_equally_likely_in_both_orders():
    score = np.array([0.0, 0.01, 0.02, 0.03, 0.5])
    counts = np.zeros((5, 5), int)
    for seed in range(1200):
        [[first, second]] = choose_pairs(score, np.ones(5, bool), 1, seed)
        counts[first, second] += 1
    # One pair is of the bin with most pairs: the six that differ by less than .1.
    expected = np.zeros((5, 5))
    expected[:4, :4] = 100 * (1 - np.eye(4))
    assert np.abs(counts - expected).max() < 45  # over four standard deviations


def test_the_choice_is_that_of_the_seed():
    score = np.random.default_rng(0).random(500)
    some = [choose_pairs(score, score > 0.1, 50, seed) for seed in (1, 1, 2)]
    np.testing.assert_array_equal(some[0], some[1])
    assert not np.array_equal(some[0], some[2])


def test_very_many_neurons_have_no_table_of_pairs():
    score = np.random.default_rng(0).beta(1, 4, 200_000)
    pairs = choose_pairs(score, np.ones(200_000, bool), 1000, 0)
    bins = np.bincount(bin_of(np.abs(np.diff(score[pairs], axis=1))[:, 0], EDGES), minlength=10)
    assert bins.min() >= 90
    assert len(np.unique(pairs, axis=0)) == 1000
