"""Fidelity: known answers, the dense formulas, merging."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from datasets import Dataset
from torch.utils.data import DataLoader, TensorDataset

from sae_ray.errors import SaeRayError
from sae_ray.sae import SAE, Fidelity, SparseCodes, evaluate, evaluate_store, measure_latents
from sae_ray.sae.architectures import ARCHITECTURES


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


def test_equals_the_dense_formulas(device: str):
    sae, x = make_sae(), inputs()
    sae.b_enc[:4] = -1e3
    fidelity = evaluate(sae.to(device), x.split(13))
    codes = sae.encode(x).double()
    x_hat, x = sae.decode(sae.encode(x)).double(), x.double()
    error = (x - x_hat).square().sum()
    summary = fidelity.summary()
    # Codes and reconstructions are float32; a GPU adds in another order.
    rel = 1e-6 if device == "cpu" else 1e-5
    assert summary.n_samples == 100
    assert summary.l0 == pytest.approx(((codes > 0).sum() / 100).item())
    assert summary.r2 == pytest.approx((1 - error / (x - x.mean(0)).square().sum()).item(), abs=rel)
    assert summary.nmse == pytest.approx((error / x.square().sum()).item(), rel)
    cosine = ((x * x_hat).sum(1) / x.norm(dim=1) / x_hat.norm(dim=1)).mean().item()
    assert summary.cosine == pytest.approx(cosine, rel)
    assert summary.dead_fraction == pytest.approx((codes.amax(0) == 0).double().mean().item())
    assert summary.dead_fraction >= 0.2
    latents = fidelity.latents()
    torch.testing.assert_close(latents.frequency.double(), (codes > 0).double().mean(0))
    near = {"rtol": 1e-7, "atol": 1e-7} if device == "cpu" else {"rtol": rel, "atol": rel}
    torch.testing.assert_close(latents.mean_active, codes.sum(0) / (codes > 0).sum(0).clamp_min(1), **near)
    torch.testing.assert_close(latents.max_token, codes.amax(0), **near)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_store_is_measured_on_a_gpu_as_on_a_cpu(write_store, tmp_path: Path, name: str):
    """Its parts are float16 on the CPU. No value lies so near a threshold that rounding decides."""
    x = inputs().numpy().astype(np.float16)
    parts = [(rows, np.full(len(rows), -1), x[rows]) for rows in np.split(np.arange(100), [40, 70])]
    store = write_store(tmp_path, parts, "float16")
    sae = make_sae()
    sae = replace(sae, architecture=name, threshold=sae.threshold if ARCHITECTURES[name].has_threshold else None)
    on_gpu, on_cpu = (evaluate_store(sae.to(device), store) for device in ("cuda", "cpu"))
    assert on_gpu.summary() == pytest.approx(on_cpu.summary(), rel=1e-5)
    of_gpu, of_cpu = (measure_latents([sae.to(device)] * 2, store) for device in ("cuda", "cpu"))
    for one, other in zip([on_gpu.latents(), *of_gpu], [on_cpu.latents(), *of_cpu], strict=True):
        assert torch.equal(one.frequency, other.frequency)
        torch.testing.assert_close(one.mean_active, other.mean_active, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(one.max_token, other.max_token, rtol=1e-5, atol=1e-5)


def test_parts_merge_into_the_whole():
    sae, x = make_sae(), inputs()
    whole = evaluate(sae, [x])
    merged = evaluate(sae, [x[:31]])
    merged.merge(evaluate(sae, [x[31:80], x[80:]]))
    merged.merge(Fidelity(6, 20))
    assert merged.summary() == pytest.approx(whole.summary(), abs=1e-6)
    for left, right in zip(merged.latents(), whole.latents(), strict=True):
        torch.testing.assert_close(left, right)


def test_activations_come_in_every_form(tmp_path: Path):
    sae, x = make_sae(), inputs()
    np.save(tmp_path / "x.npy", x.numpy())
    whole = evaluate(sae, [x]).summary()
    fixed = pa.FixedSizeListArray.from_arrays(pa.array(x.numpy().reshape(-1)), 6)
    loader = DataLoader(TensorDataset(x), batch_size=100)
    of_rows = (x, x.numpy(), tmp_path / "x.npy", x.tolist(), [*x], fixed, pa.chunked_array([fixed]))
    of_batches = ([x.numpy()], (x,), iter([x]), DataLoader(x, batch_size=100), loader, list(loader))
    for given in (*of_rows, Dataset.from_dict({"x": x.tolist()})["x"], *of_batches):
        assert evaluate(sae, given).summary() == whole, type(given)
    assert repr(evaluate(sae, x)).startswith("Fidelity(n_samples=100, l0=")
    x[7] = torch.nan
    with pytest.raises(SaeRayError, match="row 7 of the activations has values that are not finite"):
        evaluate(sae, x.split(5))
    for masked in (np.ma.masked_invalid(x.numpy()), [np.ma.masked_invalid(x.numpy())]):
        with pytest.raises(SaeRayError, match="has masked values"):
            evaluate(sae, masked)


def test_perfect_and_mean_reconstructions_have_known_values():
    x = inputs()
    none = torch.empty(0, dtype=torch.int64)
    codes = SparseCodes(none, none, torch.empty(0), 100, 20)
    perfect, mean = Fidelity(6, 20), Fidelity(6, 20)
    perfect.update(x, codes, x)
    mean.update(x, codes, x.double().mean(0).expand_as(x))
    assert perfect.summary() == pytest.approx((100, 0, 1, 0, 1, 1))
    assert mean.summary().r2 == pytest.approx(0, abs=1e-12)


def test_the_cosine_of_small_vectors_is_that_of_large_ones():
    x, none = inputs().double(), torch.empty(0, dtype=torch.int64)
    codes = SparseCodes(none, none, torch.empty(0), 100, 20)
    small, large = Fidelity(6, 20), Fidelity(6, 20)
    small.update(1e-30 * x, codes, 1e-30 * (x + 1))
    large.update(x, codes, x + 1)
    assert small.summary().cosine == pytest.approx(large.summary().cosine, 1e-12)


def test_nothing_seen_is_not_a_number():
    summary = Fidelity(6, 20).summary()
    assert summary.n_samples == 0
    assert all(math.isnan(value) for value in (summary.l0, summary.r2, summary.nmse, summary.cosine))
