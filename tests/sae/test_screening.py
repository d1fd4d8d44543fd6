"""Screening in bfloat16 loses nothing: the codes are those of the float32 product, and no row depends on another."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sae_ray.sae import SAE
from sae_ray.sae.screening import pays, screening

D_IN, D_SAE = 48, 2048


def make_sae(seed: int = 0, spread: float = 1.0, k: int | None = 4) -> SAE:
    """Encoders of very different lengths if `spread` is large. About `k` latents are active on a row of `rows`."""
    generator = torch.Generator().manual_seed(seed)
    W_enc = torch.randn(D_IN, D_SAE, generator=generator) * torch.exp(spread * torch.randn(D_SAE, generator=generator))
    b_enc, b_dec = torch.randn(D_SAE, generator=generator), torch.randn(D_IN, generator=generator)
    pre = (rows(seed) - b_dec) @ W_enc + b_enc
    threshold = pre.quantile(1 - 4 / D_SAE, dim=0)
    return SAE("batch_topk", W_enc, W_enc.T.clone(), b_enc, b_dec, threshold, k=k)


def rows(seed: int = 0, n: int = 300) -> torch.Tensor:
    """Some of them a thousand times as long as others."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, D_IN, generator=generator) * torch.exp(2 * torch.randn(n, 1, generator=generator))


@given(st.integers(0, 1000), st.sampled_from([0.0, 1.0, 5.0]))
def test_every_active_latent_is_found(seed, spread):
    """Where float32 is in doubt itself, float64 says which may be there and which must be."""
    sae, x = make_sae(seed, spread), rows(seed, 50)
    flat, values = screening(sae)(sae._centred(x))
    exact = sae.to(dtype=torch.float64)._pre(x)
    doubt = 1e-6 * D_IN * ((x - sae.b_dec).norm(dim=1, keepdim=True) * sae.W_enc.norm(dim=0) + sae.b_enc.abs())
    least = sae.threshold.clamp_min(0)
    found = torch.zeros(50 * D_SAE, dtype=torch.bool)
    found[flat] = True
    assert found.view(50, D_SAE)[exact > least + doubt].all()
    assert (exact > least - doubt)[found.view(50, D_SAE)].all()
    assert torch.equal(flat, flat.unique())
    assert ((values - exact.flatten()[flat]).abs() <= doubt.flatten()[flat]).all()


def test_thresholds_are_strict_and_latents_without_an_encoder_have_their_bias():
    W_enc = torch.eye(6)
    W_enc[4:, 4:] = 0
    b_enc, threshold = torch.tensor([0.0, 0, 0, 0, 2, 1]), torch.tensor([0.5, 0.5, -2, 0, 1, 1])
    sae = SAE("batch_topk", W_enc, torch.eye(6), b_enc, torch.zeros(6), threshold, k=2)
    x = torch.tensor([[0.5, 0.75, -1.0, 0.25, 7.0, 7.0]])
    flat, values = screening(sae)(x)
    assert flat.tolist() == [1, 3, 4]
    assert values.tolist() == [0.75, 0.25, 2.0]
    assert torch.equal(sae.encode(x)[0, flat], values)


@pytest.mark.gpu
def test_on_a_gpu_the_codes_are_those_of_a_cpu_and_no_row_depends_on_another():
    on_cpu, x = make_sae(), rows()
    sae = on_cpu.to("cuda")
    assert pays(sae)
    assert not pays(on_cpu)
    assert not pays(make_sae(k=None).to("cuda"))
    assert not pays(make_sae(k=20).to("cuda"))
    codes = sae.encode_sparse(x)
    expected, found = on_cpu.encode(x), codes.to_dense().cpu()
    differing = (expected > 0) != (found > 0)
    assert differing.sum() <= 2, "where the last bits decide"
    same = ~differing
    scale = (x - on_cpu.b_dec).norm(dim=1, keepdim=True) * on_cpu.W_enc.norm(dim=0)
    assert ((found - expected).abs() <= 1e-5 * scale)[same].all()
    for some in (slice(0, 1), slice(37, 300), slice(100, 200)):
        assert torch.equal(sae.encode_sparse(x[some]).to_dense(), codes.to_dense()[some])
    assert sae.encode_sparse(x[:0]).values.numel() == 0
