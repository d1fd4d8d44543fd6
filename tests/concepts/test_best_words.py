"""The best words of neurons, and the table of names."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from sae_ray.concepts import BestWords
from sae_ray.concepts.best_words import NAMES_SCHEMA


@settings(deadline=None)
@given(arrays.arrays(np.float64, (4, 12), elements=st.integers(0, 3)), st.integers(1, 11))
def test_ties_go_to_the_lower_word_however_words_are_cut(scores: np.ndarray, cut: int):
    expected = np.argsort(-scores, axis=1, kind="stable")[:, :6]
    for best in (
        BestWords.of(scores),
        BestWords.merged([BestWords.of(scores[:, cut:], cut), BestWords.of(scores[:, :cut])]),
    ):
        assert np.array_equal(best.word, expected)
        assert np.array_equal(best.score, np.take_along_axis(scores, expected, axis=1))
    assert BestWords.of(scores).n_distinct == len({int(np.argmax(row)) for row in scores})


def test_the_table_lists_five_names_with_their_margins():
    scores = np.array([[1, 7, 3, 6, 5, 2, 4], [np.nan] * 7, [np.nan] * 5 + [0.5, 0.25]])
    best = BestWords.of(scores)
    assert best.first.tolist() == [1, -1, 5]
    assert best.n_distinct == 2
    table = best.table("soft_wpmi", list("abcdefg"), np.array([100, 0, 12]), first_neuron=40)
    assert table.schema == NAMES_SCHEMA
    assert table.to_pylist() == [
        {"neuron": 40, "method": "soft_wpmi", "rank": rank, "name": name, "score": 7.0 - rank, "margin": 1.0}
        | {"n_images": 100}
        for rank, name in enumerate("bdegc")
    ] + [
        {"neuron": 42, "method": "soft_wpmi", "rank": 0, "name": "f", "score": 0.5, "margin": 0.25, "n_images": 12},
        {"neuron": 42, "method": "soft_wpmi", "rank": 1, "name": "g", "score": 0.25, "margin": None, "n_images": 12},
    ]
