"""The sparse path against dense autograd of the same formulas, written out here independently, in float64."""

from __future__ import annotations

from itertools import accumulate

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sae_ray.sae import Cell, SparseCodes
from sae_ray.sae.architectures import ARCHITECTURES
from sae_ray.sae.architectures.base import Forward
from sae_ray.sae.architectures.jumprelu import JumpReLUSettings
from sae_ray.sae.architectures.matryoshka_batch_topk import MatryoshkaSettings
from sae_ray.sae.auxk import auxk_loss
from sae_ray.sae.ranks import ALONE
from sae_ray.sae.sparse import Pattern
from sae_ray.sae.weights import Weights

D_IN, D_SAE, BATCH, K = 12, 40, 24, 3
BANDWIDTH = 0.3
OWN = {"matryoshka_batch_topk": MatryoshkaSettings((0.1, 0.3, 0.6)), "jumprelu": JumpReLUSettings(BANDWIDTH, 0.4)}
CELLS = {
    name: Cell(
        name, D_SAE / D_IN + 1e-9, settings=OWN.get(name), **{kind.tuned_by: {"k": K, "sparsity": 0.1}[kind.tuned_by]}
    )
    for name, kind in ARCHITECTURES.items()
}


def make(name: str) -> tuple[Weights, torch.Tensor, Forward]:
    """Random float64 weights and inputs, and the architecture's forward pass."""
    generator = torch.Generator().manual_seed(3)
    architecture = ARCHITECTURES[name](CELLS[name], D_IN, ALONE)
    weights = Weights(D_IN, D_SAE, 0, architecture.learned_threshold, torch.device("cpu"))
    for parameter in weights.named().values():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.data = parameter.data.double() + 0.05 * noise
    x = torch.randn(BATCH, D_IN, generator=generator, dtype=torch.float64)
    return weights, x, architecture.forward(weights, x)


def dense_pre(weights: Weights, x: torch.Tensor) -> torch.Tensor:
    return (x - weights.b_dec) @ weights.W_enc_t.T + weights.b_enc


def keep(values: torch.Tensor, count: int, dim: int | None) -> torch.Tensor:
    """1 at the `count` largest (of all, or along `dim`), else 0."""
    flat = values.flatten() if dim is None else values
    return torch.zeros_like(flat).scatter(-1, flat.topk(count, dim=-1).indices, 1.0).view_as(values).detach()


def gradients(loss: torch.Tensor, weights: Weights) -> dict[str, torch.Tensor]:
    named = weights.named()
    found = torch.autograd.grad(loss, list(named.values()))
    return dict(zip(named, (gradient.to_dense() for gradient in found), strict=True))


def assert_same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    for name, value in right.items():
        assert value.abs().max() > 0
        torch.testing.assert_close(left[name], value, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", ["batch_topk", "matryoshka_batch_topk", "topk"])
def test_selecting_architectures_have_the_dense_gradients(name: str):
    weights, x, forward = make(name)
    values = dense_pre(weights, x).relu()
    codes = values * (keep(values, K, 1) if name == "topk" else keep(values, K * BATCH, None))
    sizes = CELLS[name].group_sizes(D_IN)
    losses = [
        (x - (codes[:, :end] @ weights.W_dec[:end] + weights.b_dec)).square().sum(1).mean() for end in accumulate(sizes)
    ]
    loss = torch.stack(losses).mean() / len(losses)
    torch.testing.assert_close(forward.reconstruction_loss, loss)
    torch.testing.assert_close(forward.residual, (x - codes @ weights.W_dec - weights.b_dec).detach())
    assert torch.equal(forward.fired, (codes > 0).any(0))
    assert forward.n_active == (codes > 0).sum()
    torch.testing.assert_close(forward.smallest_active, codes[codes > 0].min().detach())
    assert_same(gradients(forward.reconstruction_loss, weights), gradients(loss, weights))


def test_relu_has_the_dense_gradients():
    weights, x, forward = make("relu")
    codes = dense_pre(weights, x).relu()
    error = x - codes @ weights.W_dec - weights.b_dec
    loss = error.square().sum(1).mean() + 0.1 * codes.sum(1).mean()
    ours = forward.reconstruction_loss + 0.1 * forward.sparsity_penalty
    assert_same(gradients(ours, weights), gradients(loss, weights))


def test_jumprelu_has_the_straight_through_gradients():
    """Rajamanoharan et al. 2024, eq. 11 and 12, entry by entry; all other gradients are ordinary ones."""
    weights, x, forward = make("jumprelu")
    coefficient, bandwidth, threshold = 0.7, BANDWIDTH, weights.threshold
    assert threshold is not None
    z = dense_pre(weights, x)
    codes = z * (z > threshold)
    error = x - codes @ weights.W_dec - weights.b_dec
    loss = error.square().sum(1).mean()
    assert round(forward.sparsity_penalty.item() * BATCH) == (z > threshold).sum()
    expected = {n: torch.autograd.grad(loss, p, retain_graph=True)[0] for n, p in weights.named().items()
                if n != "threshold"}  # fmt: skip
    by_code = torch.autograd.grad(loss, codes)[0]
    by_threshold = torch.zeros(D_SAE, dtype=torch.float64)
    for row in range(BATCH):
        for latent in range(D_SAE):
            u = (z[row, latent] - threshold[latent]) / bandwidth
            kernel = 1.0 if abs(u) < 0.5 else 0.0
            d_codes = -threshold[latent] / bandwidth * kernel
            d_count = -kernel / bandwidth
            by_threshold[latent] += (by_code[row, latent] * d_codes + coefficient / BATCH * d_count).item()
    ours = gradients(forward.reconstruction_loss + coefficient * forward.sparsity_penalty, weights)
    assert_same(ours, expected | {"threshold": by_threshold})


@pytest.mark.parametrize("copied", [1, 2**24])
@pytest.mark.parametrize("select", ["post", "pre"])
def test_auxk_has_the_dense_gradients(select, copied, monkeypatch):
    """However many rows are looked through at once."""
    monkeypatch.setattr("sae_ray.sae.auxk._COPIED", copied)
    weights, x, forward = make("batch_topk")
    dead = torch.zeros(D_SAE, dtype=torch.bool)
    dead[::2] = True
    k_aux = D_IN // 2
    pre = dense_pre(weights, x)
    ranked = pre.masked_fill(~dead, -torch.inf)
    mask = keep(ranked, k_aux, 1)
    codes = (pre.relu() if select == "post" else pre) * mask
    residual = forward.residual
    variance = (residual - residual.mean(0)).square().sum(1).mean()
    loss = (residual - codes @ weights.W_dec).square().sum(1).mean() / variance
    ours = auxk_loss(weights, x, forward, dead, select, ALONE)
    torch.testing.assert_close(ours, loss)
    assert_same(gradients(ours, weights), gradients(loss, weights))


@pytest.mark.parametrize("select", ["post", "pre"])
def test_auxk_takes_as_many_latents_where_some_are_equally_strong(select):
    weights, x, forward = make("batch_topk")
    dead = torch.zeros(D_SAE, dtype=torch.bool)
    dead[::2] = True
    weights.W_dec.data[dead] = weights.W_dec.data[0].clone()  # so that it does not matter which of the equal ones
    pre = forward.pre.round()
    k_aux = D_IN // 2
    mask = keep(pre.masked_fill(~dead, -torch.inf), k_aux, 1)
    assert (pre[:, dead].sort(1).values.diff(dim=1)[:, -k_aux] == 0).any(), "there is a choice"
    codes = (pre.relu() if select == "post" else pre) * mask
    variance = (forward.residual - forward.residual.mean(0)).square().sum(1).mean()
    loss = (forward.residual - codes @ weights.W_dec).square().sum(1).mean() / variance
    torch.testing.assert_close(auxk_loss(weights, x, forward._replace(pre=pre), dead, select, ALONE), loss)


matrices = st.tuples(st.integers(1, 9), st.integers(1, 200), st.integers(0, 2**31), st.floats(-2, 2)).map(
    lambda a: torch.randn(a[0], a[1], generator=torch.Generator().manual_seed(a[2])) + a[3]
)


@given(matrices, st.integers(1, 5))
@settings(deadline=None)
def test_pattern_products_are_matrix_products(matrix: torch.Tensor, width: int):
    matrix = (matrix * (matrix > 0.5)).double()
    n_rows, d_sae = matrix.shape
    flat = matrix.flatten().nonzero().squeeze(1)
    pattern, values = Pattern.of_flat(flat, n_rows, d_sae), matrix.flatten()[flat]
    generator = torch.Generator().manual_seed(0)
    left = torch.randn(n_rows, width, generator=generator, dtype=torch.float64)
    right = torch.randn(d_sae, width, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(pattern.row_sums(values, right), matrix @ right)
    torch.testing.assert_close(pattern.of_used(pattern.latent_sums(values, left)).to_dense(), matrix.T @ left)
    torch.testing.assert_close(pattern.dots(left, right), (left @ right.T).flatten()[flat])
    codes = SparseCodes(pattern.rows, pattern.latents, values, n_rows, d_sae)
    assert torch.equal(codes.to_dense(), matrix)
