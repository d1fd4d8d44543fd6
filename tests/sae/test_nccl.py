"""Ranks that NCCL joins: two of them, by rows and by latents, train the same SAE as one process on a GPU."""

from __future__ import annotations

import datetime
import os
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from sae_ray.sae import Cell, CellTrainer, StepMetrics, TrainingConfig
from sae_ray.sae.architectures.jumprelu import JumpReLUSettings
from sae_ray.sae.ranks import ALONE, Ranks, Split
from tests.machine import in_ranks

pytestmark = pytest.mark.gpu
RANKS, STEPS, BATCH, D_IN = 2, 12, 512, 256
TRAINING = TrainingConfig(
    steps=STEPS, batch_size=BATCH, learning_rate=1e-3, warmup_steps=2, threshold_start_step=3, threshold_beta=0.9,
    dead_after_samples=2 * BATCH, auxk_select="pre",
)  # fmt: skip
CELLS = {
    **{name: Cell(name, 8, k=8, training=TRAINING) for name in ("batch_topk", "matryoshka_batch_topk", "topk")},
    "jumprelu": Cell("jumprelu", 8, sparsity=0.01, training=TRAINING, settings=JumpReLUSettings(0.1, 0.05)),
}
BY = ("rows", "latents")


def make_batches() -> torch.Tensor:
    """Sparse mixtures of fixed directions."""
    generator = torch.Generator().manual_seed(0)
    amounts = torch.rand(STEPS, BATCH, 1024, generator=generator)
    batches = (amounts * (amounts > 0.98)) @ torch.randn(1024, D_IN, generator=generator)
    return batches / batches.square().sum(-1).mean().sqrt()


def train(cell: Cell, split: Split, device: str) -> dict[str, torch.Tensor]:
    """The state after all steps on the first rank, and the metrics on every rank."""
    trainer = CellTrainer(cell, D_IN, device, split=split)
    share = BATCH // split.rows.size
    own = slice(split.rows.rank * share, (split.rows.rank + 1) * share)
    metrics = [trainer.step(batch[own].to(device)) for batch in make_batches()]
    return {"metrics": torch.tensor(metrics, dtype=torch.float64)} | trainer.state()[0]


def rank_main(rank: int, folder: str) -> None:
    if torch.cuda.device_count() < RANKS:  # NCCL takes ranks of one GPU if they seem to be on machines of their own
        os.environ |= {"NCCL_HOSTID": f"rank {rank}", "NCCL_SOCKET_IFNAME": "lo", "NCCL_IB_DISABLE": "1"}
    device = f"cuda:{rank % torch.cuda.device_count()}"
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", f"file://{folder}/rendezvous", datetime.timedelta(minutes=1), RANKS, rank)
    ranks = Ranks(dist.group.WORLD)
    for by in BY:
        for name, cell in CELLS.items():
            state = train(cell, Split(**{by: ranks}), device)
            save_file({key: value.cpu() for key, value in state.items()}, f"{folder}/{name}-{by}-{rank}.safetensors")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return in_ranks(rank_main, tmp_path_factory.mktemp("nccl"), RANKS)


@cache
def alone(name: str) -> dict[str, torch.Tensor]:
    return {key: value.cpu() for key, value in train(CELLS[name], ALONE, "cuda").items()}


@pytest.mark.parametrize("by", BY)
@pytest.mark.parametrize("name", CELLS)
def test_two_ranks_train_the_sae_of_one_process(folder: Path, name: str, by: str):
    first, other = (load_file(folder / f"{name}-{by}-{rank}.safetensors") for rank in range(RANKS))
    expected = alone(name)
    weights = list(CellTrainer(CELLS[name], D_IN).weights.named())
    length = torch.cat([expected[one].flatten() for one in weights]).norm()
    for one in weights:
        assert (first[one] - expected[one]).norm() < 1e-5 * length, one
    for one in ("samples_since_fired", "ever_fired"):
        assert torch.equal(first[one], expected[one]), one
    torch.testing.assert_close(first["metrics"], expected["metrics"], rtol=1e-4, atol=1e-5, equal_nan=True)
    assert torch.equal(first["metrics"].nan_to_num(-1), other["metrics"].nan_to_num(-1))
    if name != "jumprelu":
        assert first["metrics"][:, StepMetrics._fields.index("auxk_loss")].max() > 0, "AuxK took part"
