"""Coherence, q* and their bounds, against brute force and on dictionaries with known answers."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sae_ray.concepts.atoms as module
import sae_ray.concepts.recovery as recovery
from sae_ray.concepts import coherence, k_unique, largest_k, q_star, q_star_of_ridge, rip_bound, welch_bound
from sae_ray.concepts.atoms import largest_cosines
from sae_ray.concepts.recovery import _quantile
from sae_ray.errors import UsageError


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def gram(atoms: np.ndarray) -> np.ndarray:
    cosines = np.abs(unit(atoms) @ unit(atoms).T)
    np.fill_diagonal(cosines, -1)
    return cosines


@pytest.mark.parametrize("block", [2048, 7, 1])
@pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy])
def test_coherence_is_that_of_the_gram_matrix(block: int, kind, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "_BLOCK", block)
    atoms = np.random.default_rng(0).normal(size=(40, 6)) * np.arange(1, 41)[:, None]
    found = coherence(kind(atoms), max_k=4)
    np.testing.assert_allclose(found.coherence, gram(atoms).max(axis=1), rtol=1e-12)
    assert found.nearest.tolist() == gram(atoms).argmax(axis=1).tolist()
    pairs = gram(atoms)[np.triu_indices(40, 1)]
    above = [(pairs < 1 / (2 * k - 1)).sum() for k in range(1, 5)]
    assert found.pairs.tolist() == [780 - above[0], *(-np.diff([*above, 0])).tolist()]
    assert coherence(kind(atoms)).pairs.tolist() == [780]


def test_many_atoms_are_compared_in_single_precision(monkeypatch: pytest.MonkeyPatch):
    atoms = np.random.default_rng(0).normal(size=(60, 8))
    exact = coherence(atoms)
    monkeypatch.setattr(module, "DOUBLE_ATOMS", 59)
    single = coherence(atoms)
    assert not np.array_equal(single.coherence, exact.coherence)
    np.testing.assert_allclose(single.coherence, exact.coherence, rtol=0, atol=1e-6)
    assert np.array_equal(single.nearest, exact.nearest)


def test_ties_and_atoms_that_are_none():
    found = coherence(np.array([[1, 0], [0, 1], [0, 2], [0, 0], [-3, 0], [0, -1]], float))
    assert found.nearest.tolist() == [4, 2, 1, -1, 0, 1]
    assert np.array_equal(found.coherence, [1, 1, 1, np.nan, 1, 1], equal_nan=True)
    assert coherence(np.ones((1, 3))).nearest.tolist() == [-1]
    with pytest.raises(UsageError, match="finite"):
        coherence(np.full((2, 2), np.inf))


@pytest.mark.parametrize(
    ("d", "expected"),
    [
        (768, {2: 20, 4: 16, 8: 15, 16: 14, 64: 14}),
        (1024, {2: 23, 4: 18, 8: 17, 16: 17, 64: 16}),
        (64, {2: 6, 4: 5, 8: 4, 16: 4, 64: 4}),
    ],
)
def test_the_largest_k_that_any_dictionary_can_satisfy(d: int, expected: dict[int, int]):
    assert {expansion: largest_k(expansion * d, d) for expansion in expected} == expected
    assert largest_k(d, d) == d


def test_welch_holds_and_is_reached():
    atoms = unit(np.random.default_rng(0).normal(size=(64, 32)))
    assert coherence(atoms).coherence.max() > welch_bound(64, 32) == pytest.approx(0.12598815766974242)
    three = np.array([[1, 0], [-0.5, 3**0.5 / 2], [-0.5, -(3**0.5) / 2]])
    assert coherence(three).coherence == pytest.approx(welch_bound(3, 2))
    assert welch_bound(5, 5) == welch_bound(1, 8) == 0


def test_k_unique_is_the_largest_k_below_its_bound():
    assert k_unique([0.99, 0.34, 0.33, 0.2, 0.199, 0, 1]).tolist() == [1, 1, 2, 2, 3, np.inf, 0]
    for mu in np.random.default_rng(0).uniform(0.01, 1, 100):
        assert k_unique(mu) == max(k for k in range(1, 100) if mu < 1 / (2 * k - 1))


def test_the_bound_of_the_restricted_isometry_constant():
    atoms = unit(np.random.default_rng(0).normal(size=(24, 16)))
    mu = coherence(atoms).coherence.max()
    for k in (2, 3):
        sets = np.array(list(itertools.combinations(range(24), k)))
        eigenvalues = np.linalg.eigvalsh(np.einsum("sid,sjd->sij", atoms[sets], atoms[sets]))
        constant = np.abs(eigenvalues - 1).max()
        if k == 2:
            assert constant == pytest.approx(rip_bound(mu, k), abs=1e-12)
        else:
            assert constant < rip_bound(mu, k)


def atoms_with(mu: np.ndarray) -> np.ndarray:
    """Pairs of atoms in planes of their own; both of a pair have its coherence."""
    found = np.zeros((2 * len(mu), 2 * len(mu)))
    for pair, cosine in enumerate(mu):
        found[2 * pair, 2 * pair] = 1
        found[2 * pair + 1, 2 * pair : 2 * pair + 2] = cosine, (1 - cosine**2) ** 0.5
    return found


@pytest.mark.parametrize(
    ("mu", "l0", "expected"),
    [
        ([0.0], 5, 1.0),
        ([0.2], 2, 1.0),
        ([0.5], 2, 0.0),
        ([0.99], 1, 1.0),
        ([0.99], 0, 1.0),
        (np.linspace(0.0005, 0.9995, 1000)[::8], 2, 0.333),
    ],
)
def test_q_star_where_it_is_known(mu: list[float], l0: int, expected: float):
    atoms = atoms_with(np.asarray(mu))
    d = atoms.shape[1]
    found = q_star(atoms, np.eye(d), np.full(10, l0), ridge=0)
    assert found.atom == pytest.approx(expected, abs=0.01)
    if len(mu) == 1:
        assert found.pair == expected
    assert found.largest_k == d
    assert found.condition == pytest.approx(1)


@pytest.mark.parametrize("block", [2048, 7])
def test_some_atoms_have_the_coherence_that_they_have_among_all(block: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "_BLOCK", block)
    atoms = np.random.default_rng(0).normal(size=(40, 6))
    atoms[11] = 0
    chosen = np.array([39, 11, 0, 20, 21])
    np.testing.assert_allclose(largest_cosines(atoms, chosen), coherence(atoms).coherence[chosen], rtol=1e-12)


def test_q_star_of_another_ridge_is_q_star_and_nearly_so_for_a_sample_of_atoms(monkeypatch: pytest.MonkeyPatch):
    rng = np.random.default_rng(0)
    atoms, x = rng.normal(size=(600, 32)), rng.normal(size=(2000, 32)) * np.geomspace(0.001, 1, 32)
    moment, l0 = x.T @ x / len(x), rng.integers(0, 4, 500)
    for ridge in (1e-7, 1e-2):
        exact = q_star(atoms, moment, l0, ridge=ridge).atom
        assert q_star_of_ridge(atoms, moment, l0, ridge) == exact
    monkeypatch.setattr(recovery, "SAMPLED_ATOMS", 300)
    assert q_star_of_ridge(atoms, moment, l0, 1e-2) == pytest.approx(exact, abs=0.05)
    with pytest.raises(UsageError, match="differ in width"):
        q_star_of_ridge(atoms, np.eye(3), l0, 1e-6)


def test_q_star_of_pairs_and_of_mixed_samples():
    # Of 6 pairs of atoms one is coherent, but it makes half of the atoms so.
    atoms = atoms_with(np.array([0.5, 0.0]))
    found = q_star(torch.from_numpy(atoms), torch.eye(4).double(), torch.tensor([2, 2]), ridge=0)
    assert found.atom == 0.5
    assert found.pair == pytest.approx(5 / 6)
    # Dense samples fail, sparse ones do not: q* is the share that is reached by both.
    assert q_star(atoms, np.eye(4), np.array([1, 1, 1, 2]), ridge=0).atom == 0.75
    assert q_star(atoms, np.eye(4), np.array([1, 2, 2, 2]), ridge=0).atom == 0.5
    assert q_star(atoms, np.eye(4), np.array([2, 2]), ridge=0, live=np.array([0, 2, 3])).atom == 1
    # The same atoms seen through a metric that undoes a skew.
    skew = np.array([[2.0, 1, 0, 0], [0, 1, 0, 1], [0, 0, 1, 0], [0, 0, 0, 3]])
    seen = q_star(atoms @ skew, skew.T @ skew, np.array([2, 2]), ridge=0)
    assert seen.atom == 0.5
    assert seen.condition == pytest.approx(np.linalg.cond(skew) ** 2)


def test_what_is_reachable_does_not_bound_a_share_of_atoms():
    """Welch's bound is on the largest coherence, or the mean of its squares: some atoms can do better."""
    angles = np.pi * np.arange(34) / 34
    crowd = np.zeros((34, 32))
    crowd[:, 0], crowd[:, 1] = np.cos(angles), np.sin(angles)
    atoms = np.concatenate([crowd, np.eye(32)[2:]])
    assert largest_k(64, 32) == 4
    found = q_star(atoms, np.eye(32), np.full(5, 7), ridge=0)
    assert found.reachable == 0
    assert found.atom == pytest.approx(30 / 64)


@settings(deadline=None)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=8), st.lists(st.integers(1, 5), min_size=1, max_size=8))
def test_the_closed_form_is_the_supremum(ks: list[int], l0: list[int]):
    by_k, samples = np.bincount(ks, minlength=6), np.bincount(l0, minlength=6)
    found = _quantile(by_k, samples)
    # The definition, on a grid: the q-quantile of coherence allows k or more if q or more of the atoms do.
    grid = np.unique([*np.arange(1, len(ks) + 1) / len(ks), *np.arange(1, len(l0) + 1) / len(l0)])
    allowed, dense = np.sort(ks)[::-1], np.sort(l0)
    holds = [
        q
        for q in grid.tolist()
        if allowed[int(np.ceil(q * len(ks) - 1e-9)) - 1] >= dense[int(np.ceil(q * len(l0) - 1e-9)) - 1]
    ]
    assert found == pytest.approx(max(holds, default=0.0))


def test_wrong_inputs_are_refused():
    with pytest.raises(UsageError, match="differ in width"):
        q_star(np.eye(3), np.eye(2), np.array([1]))
    with pytest.raises(UsageError, match="0 live latents"):
        q_star(np.zeros((3, 2)), np.eye(2), np.array([1]))
    with pytest.raises(UsageError, match=r"l0 has the shape \(0,\)"):
        q_star(np.eye(2), np.eye(2), np.array([], int))
