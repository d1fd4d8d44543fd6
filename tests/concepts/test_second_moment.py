"""The atomic inner product on dictionaries whose geometry is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sae_ray.concepts import SecondMoment, aip_cosines, mean_angle, whitening
from sae_ray.errors import SaeRayError, UsageError


def dictionary(n: int, d: int, seed: int = 0) -> np.ndarray:
    """Unit atoms around a common offset, with a mean |cosine| of about .9."""
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(n, d)) + 3 * np.ones(d)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def off_diagonal(cosines: np.ndarray) -> np.ndarray:
    return np.abs(cosines[~np.eye(len(cosines), dtype=bool)])


def test_a_square_dictionary_becomes_orthonormal_in_its_own_metric():
    atoms = dictionary(32, 32)
    assert off_diagonal(atoms @ atoms.T).mean() > 0.85
    assert off_diagonal(aip_cosines(atoms, atoms, atoms.T @ atoms, ridge=0)).max() < 1e-9


def test_twice_as_many_atoms_become_a_tight_frame_as_coherent_as_chance():
    atoms = dictionary(64, 32)
    metric = whitening(atoms.T @ atoms, ridge=0)
    whitened = atoms @ metric.matrix
    np.testing.assert_allclose(whitened.T @ whitened, np.eye(32), atol=1e-10)
    assert off_diagonal(atoms @ atoms.T).mean() == pytest.approx(0.9, abs=0.02)
    assert off_diagonal(aip_cosines(atoms, atoms, atoms.T @ atoms, ridge=0)).mean() == pytest.approx(0.102, abs=0.01)


def samples(atoms: np.ndarray, n: int, signed: bool) -> np.ndarray:
    """Combinations of 3 atoms, drawn uniformly, with coefficients from 1 to 1.5."""
    rng = np.random.default_rng(1)
    chosen = rng.permuted(np.tile(np.arange(len(atoms)), (n, 1)), axis=1)[:, :3]
    values = rng.uniform(1, 1.5, (n, 3)) * (rng.choice([-1, 1], (n, 3)) if signed else 1)
    return np.einsum("nk,nkd->nd", values, atoms[chosen])


def test_the_metric_can_be_estimated_from_sparse_data():
    atoms = dictionary(64, 32)
    exact = aip_cosines(atoms, atoms, atoms.T @ atoms, ridge=0)
    signed = SecondMoment(32)
    signed.add(samples(atoms, 200_000, signed=True))
    assert np.abs(aip_cosines(atoms, atoms, signed.matrix()) - exact).max() < 0.01
    positive = SecondMoment(32)
    positive.add(samples(atoms, 100_000, signed=False))
    assert np.abs(aip_cosines(atoms, atoms, positive.matrix()) - exact).max() < 0.1
    # Exactly 3 atoms in every sample: centring takes out the direction that all share.
    assert np.abs(aip_cosines(atoms, atoms, positive.matrix(centred=True)) - exact).max() > 0.3


@settings(max_examples=20, deadline=None)
@given(st.sets(st.integers(1, 299), max_size=5))
def test_parts_merge_to_the_whole(cuts: set[int]):
    rows = np.random.default_rng(0).normal(size=(300, 7)) + 5
    whole = SecondMoment(7)
    whole.add(rows)
    parts = []
    for start, end in zip([0, *sorted(cuts)], [*sorted(cuts), 300], strict=True):
        parts.append(SecondMoment(7))
        parts[-1].add(torch.from_numpy(rows[start:end]).float() if start % 2 else rows[start:end])
    merged = SecondMoment.merged(parts)
    assert merged.n_rows == 300
    np.testing.assert_allclose(merged.matrix(), whole.matrix(), rtol=1e-6)
    np.testing.assert_allclose(whole.matrix(), rows.T @ rows / 300, rtol=1e-12)
    np.testing.assert_allclose(whole.matrix(centred=True), np.cov(rows.T, bias=True), rtol=1e-9)


def test_activations_are_at_right_angles_in_their_own_metric():
    rows = np.random.default_rng(0).normal(size=(1000, 16)) + 2
    moment = SecondMoment(16)
    moment.add(rows)
    assert mean_angle(rows) < 45
    # Not 90 but arccos(1 / d), as a mean of the activations stays a direction that they share.
    expected = np.degrees(np.arccos(1 / 16))
    assert mean_angle(rows @ whitening(moment.matrix()).matrix) == pytest.approx(expected, abs=0.5)
    assert mean_angle(rows @ whitening(moment.matrix(centred=True)).matrix) < 80
    assert mean_angle(np.eye(3)) == pytest.approx(90)
    assert np.isnan(mean_angle(np.ones((1, 3))))


def test_the_ridge_is_relative_and_the_condition_number_includes_it():
    metric = whitening(np.diag([4.0, 2.0, 0.0]), ridge=0.5)
    assert metric.ridge == pytest.approx(1.0)
    assert metric.condition == pytest.approx(5.0)
    np.testing.assert_allclose(metric.matrix, np.diag(np.array([5.0, 3.0, 1.0]) ** -0.5), atol=1e-12)
    scaled = whitening(100 * np.diag([4.0, 2.0, 0.0]), ridge=0.5)
    assert scaled.condition == pytest.approx(5.0)


def test_wrong_inputs_are_refused():
    few = SecondMoment(8)
    few.add(np.ones((159, 8)))
    with pytest.raises(SaeRayError, match="159 rows for activations of width 8; its inverse needs 160"):
        few.matrix()
    few.add(np.ones((1, 8)))
    assert few.matrix()[0, 0] == 1
    with pytest.raises(UsageError, match="ridge = 0: make it larger"):
        whitening(np.diag([1.0, 0.0]), ridge=0)
    with pytest.raises(UsageError, match="ridge = -1"):
        whitening(np.eye(2), ridge=-1)
    with pytest.raises(UsageError, match=r"shape \(2, 3\)"):
        whitening(np.ones((2, 3)))
