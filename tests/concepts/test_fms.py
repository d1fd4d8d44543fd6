"""FMS against what the reference's code computes, stumps and trees against scikit-learn, and known answers."""

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
from scipy.sparse import csr_array
from sklearn.tree import DecisionTreeClassifier

from sae_ray.concepts import fms
from sae_ray.concepts.stumps import best_stumps
from sae_ray.errors import UsageError

GOLDEN = Path(__file__).parents[1] / "golden"
DATA = load_file(GOLDEN / "fms.safetensors")
REFERENCE = json.loads((GOLDEN / "fms.json").read_text())
CONCEPTS = REFERENCE["concepts"]


def labels_of(concept: str) -> np.ndarray:
    return DATA["labels"][:, CONCEPTS.index(concept)]


@pytest.mark.parametrize("concept", CONCEPTS)
def test_the_references_code_computes_the_same(concept: str):
    expected = REFERENCE["random_state_0"][concept]
    found = fms(DATA["codes"], labels_of(concept), convention="code")
    same = {
        "accuracy_by_depth_0_to_D": found.accuracy_by_depth,
        "stump_accuracy_by_cuts_0_to_9": found.accs,
        "accs_0": found.accs[0],
        "local_at": found.local,
        "global_reference": found.global_,
        "fms_at": found.fms,
    }
    for name, values in same.items():
        reference = list(expected[name].values()) if isinstance(expected[name], dict) else expected[name]
        np.testing.assert_allclose(values, reference, rtol=0, atol=1e-12, err_msg=name)
    # The two halves of `pair` tie, and the reference draws one of them; ours is the lower one.
    assert (found.root, found.n_tied_roots) == (
        (12, 2) if concept == "pair" else (expected["root"]["feature_index"], 1)
    )


def test_leaves_of_both_labels_are_right_for_the_reference_alone():
    codes, labels = DATA["impure.codes"], DATA["impure.labels"][:, 0]
    expected = REFERENCE["impure_leaves"]
    reference, true = (fms(codes, labels, convention=convention) for convention in ("code", "paper"))
    np.testing.assert_allclose(reference.accuracy_by_depth, expected["reference_accuracy_by_depth"], atol=1e-12)
    np.testing.assert_allclose(true.accuracy_by_depth, expected["true_training_accuracy_by_depth"], atol=1e-12)


@pytest.mark.parametrize("concept", CONCEPTS)
def test_true_accuracies_are_those_of_trees_refitted_with_a_depth(concept: str):
    found = fms(DATA["codes"], labels_of(concept)).accuracy_by_depth
    expected = np.array(REFERENCE["sklearn_refit_training_accuracy_by_depth"][concept])
    if concept == "random":  # latents tie here, and a tree of another depth draws others of them
        for depth in (13, 14):
            rows = DATA["codes"], labels_of(concept)
            trees = (DecisionTreeClassifier(max_depth=depth, random_state=state) for state in range(20))
            assert found[depth] in {tree.fit(*rows).score(*rows) for tree in trees}
            found[depth] = expected[depth]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_stumps_are_scikit_learns(data: st.DataObject):
    n = data.draw(st.integers(2, 16))
    values = st.sampled_from([0.0, 0.0, 0.0, 1.0, -1.0, 0.5]) | st.integers(1, 9).map(float)
    codes = data.draw(arrays.arrays("float64", (n, 4), elements=values))
    labels = data.draw(arrays.arrays("bool", n))
    stumps = best_stumps(csr_array(codes), labels)
    found = dict(zip(stumps.latent.tolist(), zip(*stumps[1:], strict=True), strict=True))
    for latent, column in enumerate(codes.T):
        tree = DecisionTreeClassifier(max_depth=1).fit(column[:, None], labels).tree_
        if labels.all() or not labels.any():
            continue  # scikit-learn splits nothing that is pure
        assert (latent in found) == (tree.node_count == 3) == (len(set(column)) > 1)
        if latent in found:
            gain, threshold, left, right = found[latent]
            share = tree.weighted_n_node_samples / n
            decrease = tree.impurity[0] - share[1] * tree.impurity[1] - share[2] * tree.impurity[2]
            assert gain == pytest.approx(decrease, abs=1e-12)
            goes_left = column <= threshold
            assert left.tolist() == [(goes_left & ~labels).sum(), (goes_left & labels).sum()]
            assert right.tolist() == [(~goes_left & ~labels).sum(), (~goes_left & labels).sum()]
    gains = stumps.gain.tolist()
    assert [*zip(np.negative(gains), stumps.latent, strict=True)] == sorted(
        zip(np.negative(gains), stumps.latent, strict=True)
    )
    assert stumps.n_tied == gains.count(gains[0]) if gains else stumps.n_tied == 0


def balanced(n: int = 1000, latents: int = 20, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Sparse noise, and labels of as many rows of either kind."""
    rng = np.random.default_rng(seed)
    codes = np.where(rng.random((n, latents)) < 0.15, rng.random((n, latents)) + 0.5, 0.0)
    return codes, rng.permutation(np.arange(n) % 2)


@pytest.mark.parametrize("evaluation", ["fitted", "heldout"])
def test_a_latent_that_is_the_concept_scores_one(evaluation):
    codes, labels = balanced()
    codes[:, 7] = labels * (1 + np.random.default_rng(1).random(1000))
    found = fms(codes, labels, evaluation=evaluation)
    assert (found.root, found.n_tied_roots, found.depth) == (7, 1, 1)
    assert found.accs[0] == 1
    assert found.global_ == 1
    assert found.local[0] >= 0.95 if evaluation == "fitted" else found.local[0] >= 0.9
    assert found.fms[0] >= 0.97 if evaluation == "fitted" else found.fms[0] >= 0.95
    assert fms(codes, labels, convention="code").global_ == 1.5


def test_with_a_twin_nothing_is_lost_until_both_are_cut():
    codes, labels = balanced()
    codes[:, 3] = labels * (1 + np.random.default_rng(1).random(1000))
    codes[:, 11] = 2 * codes[:, 3]
    found = fms(codes, labels)
    assert (found.root, found.n_tied_roots) == (3, 2)
    assert found.local[0] == 0
    assert found.local[1] >= 0.95
    assert found.fms[0] == 0.5


def test_a_concept_of_two_latents_together_is_not_global():
    codes, labels = balanced()
    codes[:, :2] = 0
    codes[labels == 1, :2] = 1
    others = np.flatnonzero(labels == 0)
    first = np.arange(len(others)) % 2 == 0
    codes[others, 0], codes[others, 1] = first, ~first  # one of the two, never both
    found = fms(codes, labels)
    assert found.global_ < 0.8
    assert (found.accs[0], found.n_tied_roots) == (0.75, 2)


def test_noise_has_a_floor_above_zero():
    found = fms(DATA["codes"], labels_of("random"), convention="code")
    assert found.fms[0] == pytest.approx(0.206, abs=5e-4)


def test_sparse_and_dense_codes_of_any_kind_score_alike():
    codes, labels = balanced(120, 30)
    codes[:, 4] = 0
    expected = fms(codes, labels, evaluation="heldout", seed=3)
    sparse = csr_array(codes)
    wide = csr_array((sparse.data, sparse.indices.astype(np.int64), sparse.indptr.astype(np.int64)), shape=codes.shape)
    assert wide[:50].indices.dtype == np.int64
    tensor = torch.from_numpy(codes)
    for same in (sparse, wide, tensor, tensor.to_sparse(), tensor.to_sparse_csr().requires_grad_()):
        found = fms(same, torch.from_numpy(labels), evaluation="heldout", seed=3)
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_array_equal(one, other)
    assert fms(codes, labels, evaluation="heldout", seed=4).accs.tolist() != expected.accs.tolist()
    assert expected.n_rows == 60


@pytest.mark.parametrize("evaluation", ["fitted", "heldout"])
@pytest.mark.parametrize("convention", ["paper", "code"])
def test_a_dead_sae_knows_nothing(convention, evaluation):
    codes, labels = np.zeros((40, 5)), np.arange(40) % 2
    found = fms(codes, labels, convention=convention, evaluation=evaluation)
    assert (found.root, found.n_tied_roots, found.depth, found.global_) == (-1, 0, 0, 1)
    assert found.accs.tolist() == [0.5] * 10
    assert found.fms.tolist() == [0.25] * 9
    codes[:, 2] = labels
    alone = fms(codes, labels, convention=convention, evaluation=evaluation)
    assert alone.accs.tolist() == [1] + [0.5] * 9
    assert (alone.root, alone.local[0]) == (2, 1)


@pytest.mark.parametrize(
    ("labels", "options", "message"),
    [
        (np.arange(39) % 2, {}, r"labels has the shape \(39,\) for 40 rows"),
        (np.arange(40) % 3, {}, "labels must be 0 and 1; choose the rows"),
        (np.where(np.arange(40) == 0, np.nan, 1), {}, "labels must be 0 and 1"),
        (np.ones(40), {}, "labels has fewer than 1 rows of 0 or of 1"),
        (np.arange(40) == 3, {"evaluation": "heldout"}, "labels has fewer than 2 rows of 0 or of 1"),
        (np.arange(40) % 2, {"evaluation": "half"}, "evaluation = 'half': it must be fitted or heldout"),
        (np.arange(40) % 2, {"convention": "notebook"}, "convention = 'notebook': it must be paper or code"),
    ],
)
def test_what_cannot_be_scored_is_refused(labels: np.ndarray, options: dict, message: str):
    with pytest.raises(UsageError, match=message):
        fms(np.ones((40, 2)), labels, **options)
