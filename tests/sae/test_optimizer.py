"""Adam over rows against torch's own Adam on dense gradients, and the CPU's product against `addmm`."""

from __future__ import annotations

import pytest
import torch

from sae_ray.sae import Cell, CellTrainer, TrainingConfig, optimizer
from sae_ray.sae.optimizer import RowAdam, RowGradient
from sae_ray.sae.product import _LATENTS, affine
from sae_ray.sae.ranks import Ranks
from sae_ray.sae.weights import Weights

D_IN, D_SAE = 6, 50


def make_weights(threshold: float | None = None) -> Weights:
    return Weights(D_IN, D_SAE, 0, threshold, torch.device("cpu"))


@pytest.mark.parametrize("block_entries", [1, 100, 2**19])
def test_sparse_rows_in_blocks_are_torch_adam_on_the_dense_gradient(monkeypatch, block_entries: int):
    monkeypatch.setattr(optimizer, "_BLOCK_ENTRIES", block_entries)
    ours, theirs = make_weights(0.01), make_weights(0.01)
    adam, plain = RowAdam(ours), torch.optim.Adam(theirs.named().values(), lr=0.01, fused=True)
    generator = torch.Generator().manual_seed(0)
    for number, count in enumerate((0, 3, D_SAE, 20), start=1):
        rows = torch.randperm(D_SAE, generator=generator)[:count].sort().values
        gradients = {}
        for name, parameter in theirs.named().items():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 2:
                missing = torch.ones(D_SAE, dtype=torch.bool).index_fill_(0, rows, False)
                parameter.grad[missing] = 0
                gradients[name] = RowGradient(rows, parameter.grad[rows])
            else:
                gradients[name] = RowGradient.of(parameter.grad.clone(), Ranks(None))
        adam.step(gradients, torch.ones(()), number, 0.01)
        plain.step()
        with torch.no_grad():
            theirs.W_dec /= theirs.W_dec.norm(dim=1, keepdim=True)
            assert theirs.threshold is not None
            theirs.threshold.clamp_(min=0)
    for name, parameter in theirs.named().items():
        torch.testing.assert_close(ours.named()[name], parameter, rtol=2e-6, atol=1e-7)
        for moment in ("exp_avg", "exp_avg_sq"):
            theirs_moment, ours_moment = plain.state[parameter][moment], adam.state[ours.named()[name]][moment]
            torch.testing.assert_close(ours_moment, theirs_moment, rtol=2e-6, atol=1e-7)
            # In one block it is the same operation; in small ones vectors end elsewhere and round otherwise.
            assert block_entries < D_SAE * D_IN or torch.equal(ours_moment, theirs_moment)


@pytest.mark.parametrize("d_sae", [1, 7, _LATENTS, _LATENTS + 5])
def test_the_product_is_addmm(d_sae: int):
    generator = torch.Generator().manual_seed(1)
    x, weight = torch.randn(9, D_IN, generator=generator), torch.randn(d_sae, D_IN, generator=generator)
    bias = torch.randn(d_sae, generator=generator)
    exact = torch.addmm(bias.double(), x.double(), weight.double().T)
    torch.testing.assert_close(affine(x.double(), weight.double(), bias.double()), exact)
    torch.testing.assert_close(affine(x, weight, bias), exact.float(), rtol=1e-5, atol=1e-5)


def test_narrow_and_wide_cells_share_the_memory_of_the_product():
    """A step leaves nothing in it that a later one reads."""
    training = TrainingConfig(batch_size=16, steps=10, warmup_steps=0, threshold_start_step=1)
    cells = [Cell("batch_topk", expansion, k=2, training=training) for expansion in (2, 40, 8)]
    batches = torch.randn(5, 16, D_IN, generator=torch.Generator().manual_seed(2))
    together = [CellTrainer(cell, D_IN) for cell in cells]
    turns = [[trainer.step(batch) for trainer in together] for batch in batches]
    for number, cell in enumerate(cells):
        alone = CellTrainer(cell, D_IN)
        losses = [alone.step(batch).loss for batch in batches]
        assert losses == [turn[number].loss for turn in turns]
