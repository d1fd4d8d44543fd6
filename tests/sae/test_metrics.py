"""Fidelity: known answers, the dense formulas, merging."""

from __future__ import annotations

import math

import pytest
import torch

from sae_ray.sae import SAE, Fidelity, SparseCodes, evaluate


def make_sae() -> SAE:
    generator = torch.Generator().manual_seed(0)
    W_enc = torch.randn(6, 20, generator=generator)
    return SAE(
        architecture="batch_topk",
        W_enc=W_enc,
        W_dec=W_enc.T.contiguous() / 8,
        b_enc=torch.randn(20, generator=generator) - 1,
        b_dec=torch.randn(6, generator=generator),
        threshold=torch.full((20,), 0.5),
        k=3,
    )


def inputs() -> torch.Tensor:
    return torch.randn(100, 6, generator=torch.Generator().manual_seed(1)) + 2


def test_equals_the_dense_formulas():
    sae, x = make_sae(), inputs()
    sae.b_enc[:4] = -1e3
    fidelity = evaluate(sae, x.split(13))
    codes = sae.encode(x).double()
    x_hat, x = sae.decode(sae.encode(x)).double(), x.double()
    error = (x - x_hat).square().sum()
    summary = fidelity.summary()
    assert summary.n_samples == 100
    assert summary.l0 == pytest.approx(((codes > 0).sum() / 100).item())
    assert summary.r2 == pytest.approx((1 - error / (x - x.mean(0)).square().sum()).item(), abs=1e-6)
    assert summary.nmse == pytest.approx((error / x.square().sum()).item())
    assert summary.cosine == pytest.approx(((x * x_hat).sum(1) / x.norm(dim=1) / x_hat.norm(dim=1)).mean().item())
    assert summary.dead_fraction == pytest.approx((codes.amax(0) == 0).double().mean().item())
    assert summary.dead_fraction >= 0.2
    latents = fidelity.latents()
    torch.testing.assert_close(latents.frequency.double(), (codes > 0).double().mean(0))
    torch.testing.assert_close(latents.mean_active, codes.sum(0) / (codes > 0).sum(0).clamp_min(1))
    torch.testing.assert_close(latents.max_token, codes.amax(0))


def test_parts_merge_into_the_whole():
    sae, x = make_sae(), inputs()
    whole = evaluate(sae, [x])
    merged = evaluate(sae, [x[:31]])
    merged.merge(evaluate(sae, [x[31:80], x[80:]]))
    merged.merge(Fidelity(6, 20))
    assert merged.summary() == pytest.approx(whole.summary(), abs=1e-6)
    for left, right in zip(merged.latents(), whole.latents(), strict=True):
        torch.testing.assert_close(left, right)


def test_perfect_and_mean_reconstructions_have_known_values():
    x = inputs()
    none = torch.empty(0, dtype=torch.int64)
    codes = SparseCodes(none, none, torch.empty(0), 100, 20)
    perfect, mean = Fidelity(6, 20), Fidelity(6, 20)
    perfect.update(x, codes, x)
    mean.update(x, codes, x.double().mean(0).expand_as(x))
    assert perfect.summary() == pytest.approx((100, 0, 1, 0, 1, 1))
    assert mean.summary().r2 == pytest.approx(0, abs=1e-12)


def test_nothing_seen_is_not_a_number():
    summary = Fidelity(6, 20).summary()
    assert summary.n_samples == 0
    assert all(math.isnan(value) for value in (summary.l0, summary.r2, summary.nmse, summary.cosine))
