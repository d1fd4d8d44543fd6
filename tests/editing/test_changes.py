"""Operators, their bounds, and PISCES' exchange of value vectors against the authors' code."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from sae_ray.editing.changes import RankOne, Replaced, changed
from sae_ray.editing.operators import Mask, Projection, direction_of, exchanged_vectors
from sae_ray.errors import UsageError
from sae_ray.sae import SAE

GOLDEN = Path(__file__).parents[1] / "golden"


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def sae_with(W_dec: torch.Tensor) -> SAE:
    """A tied SAE without biases."""
    return SAE("relu", W_dec.T.contiguous(), W_dec, torch.zeros(len(W_dec)), torch.zeros(W_dec.shape[1]))


def rms(x: torch.Tensor) -> float:
    return float(x.square().mean().sqrt())


@given(st.integers(0, 2**31), st.integers(2, 12), st.integers(2, 24), st.floats(-3, 3))
def test_project_takes_out_its_latent_and_bounds_the_change_of_others(seed, d, n_latents, log_scale):
    dictionary = normal(n_latents, d, seed=seed)
    sae, latent = sae_with(dictionary), seed % n_latents
    weight, bias, x = (
        normal(d, 7, seed=seed + 1) * 10**log_scale,
        normal(d, seed=seed + 2),
        normal(50, 7, seed=seed + 3),
    )
    operator = Projection(direction_of(sae, latent))
    edited_weight = changed(weight, operator.written(weight), "weight")
    edited_bias = changed(bias, operator.written(bias[:, None]), "bias")
    before, after = (x.double() @ w.double().T + b.double() for w, b in ((weight, bias), (edited_weight, edited_bias)))
    unit = direction_of(sae, latent)
    own = before @ unit
    assert rms(after @ unit) <= 1e-5 * rms(own)
    moved = ((after - before) @ dictionary.double().T).abs()
    bound = own.abs()[:, None] * (dictionary.double() @ unit).abs()[None, :]
    assert (moved <= bound + 1e-5 * rms(before) * dictionary.norm(dim=1).max()).all()


def test_project_leaves_orthogonal_latents_as_they_are():
    dictionary = torch.linalg.qr(normal(24, 24)).Q
    sae, weight, x = sae_with(dictionary), normal(24, 40, seed=1), normal(100, 40, seed=2)
    after = changed(weight, Projection(direction_of(sae, 5)).written(weight), "weight")
    before, after = (x @ one.T @ dictionary.T for one in (weight, after))
    others = torch.arange(24) != 5
    assert (after - before)[:, others].abs().max() <= 1e-5 * rms(before)
    assert rms(after[:, 5]) <= 1e-5 * rms(before[:, 5])


def test_a_reader_sees_nothing_of_the_direction():
    sae, weight, x = sae_with(normal(16, 12)), normal(9, 12, seed=1), normal(80, 12, seed=2)
    unit = direction_of(sae, 3).float()
    operator = Projection(direction_of(sae, 3))
    edited = changed(weight, operator.read(weight), "weight")
    along = (x @ unit)[:, None] * unit
    assert rms(along @ edited.T) <= 1e-5 * rms(along @ weight.T)
    torch.testing.assert_close(x @ edited.T, operator(x) @ weight.T, rtol=1e-5, atol=1e-5)


def test_a_scale_after_the_weights_is_allowed_for():
    sae, weight, x = sae_with(normal(16, 12)), normal(12, 20, seed=1), normal(80, 20, seed=2)
    scale = 10 ** normal(12, seed=3, dtype=torch.float64)
    unit = direction_of(sae, 3)
    edited = changed(weight, Projection(unit).written(weight, scale), "weight")
    before, after = ((x.double() @ one.double().T) * scale for one in (weight, edited))
    assert rms(after @ unit) <= 1e-5 * rms(before @ unit)
    torch.testing.assert_close(after, Projection(unit)(before), rtol=1e-4, atol=1e-4 * rms(before))


def test_a_mask_takes_the_fewest_coordinates_that_carry_the_share():
    direction = torch.tensor([0.1, -0.8, 0.0, 0.5, 0.3], dtype=torch.float64)
    direction = direction / direction.norm()
    assert Mask.of(direction, 0.6).coordinates.tolist() == [1]
    assert Mask.of(direction, 0.9).coordinates.tolist() == [1, 3, 4]
    assert Mask.of(direction, 0.89).coordinates.tolist() == [1, 3]
    assert Mask.of(direction, 1.0).coordinates.tolist()[-1] == 4
    weight = normal(5, 6)
    written = changed(weight, Mask.of(direction, 0.6).written(weight), "weight")
    assert torch.equal(written[1], torch.zeros(6))
    assert torch.equal(written[[0, 2, 3, 4]], weight[[0, 2, 3, 4]])
    read = changed(weight.T, Mask.of(direction, 0.6).read(weight.T), "weight")
    assert torch.equal(read, written.T)
    bias = normal(5, seed=1)
    assert changed(bias, Mask.of(direction, 0.6).written(bias[:, None]), "bias").tolist() == [
        value if place != 1 else 0.0 for place, value in enumerate(bias.tolist())
    ]


def test_rows_leave_some_of_the_latent_and_cost_the_others_more_than_project():
    """A random dictionary of 64 in 32 dimensions."""
    sae, weight, x = sae_with(normal(64, 32)), normal(32, 50, seed=1), normal(500, 50, seed=2)
    unit = direction_of(sae, 7)
    before = (x @ weight.T).double()
    found = {}
    for name, operator in (("project", Projection(unit)), ("rows", Mask.of(unit, 0.9))):
        after = (x @ changed(weight, operator.written(weight), "weight").T).double()
        others = torch.arange(64) != 7
        contributions = [(one @ sae.W_dec.double().T)[:, others] for one in (before, after)]
        change = (contributions[1] - contributions[0]).norm() / contributions[0].norm()
        found[name] = (float((after @ unit).var() / (before @ unit).var()), float(change))
    assert found["project"][0] < 1e-10
    assert 0.02 < found["rows"][0] < 0.3
    assert found["project"][1] < 0.25 < 0.5 < found["rows"][1]


@pytest.mark.parametrize("settings", ["k0.5.val0.0", "k0.5.val-2.0", "k0.9.val-2.0"])
def test_value_vectors_are_those_of_the_authors_code(settings):
    tensors = load_file(GOLDEN / "pisces.safetensors")
    facts = json.loads((GOLDEN / "pisces.json").read_text())
    weights = [tensors[name] for name in ("W_enc", "W_dec", "b_enc", "b_dec", "threshold")]
    sae = SAE("jumprelu", *weights)
    signs = {one["id"]: -1.0 if one["neg"] else 1.0 for one in facts["features"]}
    kappa, value = map(float, settings.removeprefix("k").split(".val"))
    found = exchanged_vectors(tensors["W_out"], sae, signs, kappa, value)
    assert found.index.tolist() == sorted(facts["edited_rows"][settings])
    edited = changed(tensors["W_out"], Replaced(0, *found), "W_out")
    torch.testing.assert_close(edited, tensors[f"edited.{settings}"], rtol=0, atol=1e-6)
    transposed = changed(tensors["W_out"].T, Replaced(1, found.index, found.vectors.T), "W_out")
    assert torch.equal(transposed, edited.T)


def test_a_change_of_another_shape_is_refused():
    with pytest.raises(UsageError, match=r"fc2 has the shape \[3, 4\], which the patch does not fit"):
        changed(torch.zeros(3, 4), RankOne(torch.zeros(3), torch.zeros(5)), "fc2")
    with pytest.raises(UsageError, match="does not fit"):
        changed(torch.zeros(3, 4), Replaced(0, torch.tensor([3]), torch.zeros(1, 4)), "fc2")


def test_a_latent_without_a_direction_is_refused():
    dictionary = normal(4, 3)
    dictionary[2] = 0
    with pytest.raises(UsageError, match="latent is 4; the SAE has latents 0 to 3"):
        direction_of(sae_with(dictionary), 4)
    with pytest.raises(UsageError, match="latent is 2, whose decoder row is zero"):
        direction_of(sae_with(dictionary), 2)
