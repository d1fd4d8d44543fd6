"""Data-parallel training: two gloo ranks against one process that selects per half batch."""

from __future__ import annotations

import datetime
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from safetensors.torch import load_file, save_file

from sae_ray.sae import Cell, CellTrainer, TrainingConfig
from sae_ray.sae.architectures.jumprelu import JumpReLUSettings

D_IN, BATCH, STEPS = 16, 32, 25
TRAINING = TrainingConfig(
    steps=30, batch_size=BATCH, learning_rate=3e-3, warmup_steps=2, threshold_start_step=5, threshold_beta=0.9,
    dead_after_samples=96,
)  # fmt: skip
CELLS = [
    Cell("batch_topk", 8, k=3, training=TRAINING),
    Cell("matryoshka_batch_topk", 8, k=3, training=TRAINING),
    Cell("topk", 8, k=3, training=TRAINING),
    Cell("jumprelu", 4, sparsity=0.02, training=TRAINING, settings=JumpReLUSettings(0.1, 0.05)),
]


def make_batches() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(STEPS, BATCH, D_IN, generator=generator) / 4


def train_on(share: slice, cell: Cell, process_group, selection_shares: int) -> dict[str, torch.Tensor]:
    trainer = CellTrainer(cell, D_IN, process_group=process_group, selection_shares=selection_shares)
    metrics = [trainer.step(batch[share]) for batch in make_batches()]
    tensors, _ = trainer.state()
    return {**tensors, "metrics": torch.tensor(metrics, dtype=torch.float64)}


def rank_main(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=2,
        timeout=datetime.timedelta(minutes=5),
    )
    share = slice(rank * BATCH // 2, (rank + 1) * BATCH // 2)
    for index, cell in enumerate(CELLS):
        save_file(train_on(share, cell, dist.group.WORLD, 1), f"{folder}/{index}-{rank}.safetensors")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(rank_main, args=(str(folder),), nprocs=2)
    return folder


@pytest.mark.parametrize("index", range(len(CELLS)), ids=lambda index: CELLS[index].architecture)
def test_two_ranks_equal_one_process_that_selects_per_half_batch(folder: Path, index: int):
    first, second = (load_file(folder / f"{index}-{rank}.safetensors") for rank in (0, 1))
    alone = train_on(slice(None), CELLS[index], None, selection_shares=2)
    for name in alone:
        assert torch.equal(first[name].nan_to_num(-1), second[name].nan_to_num(-1)), name
        torch.testing.assert_close(first[name], alone[name], rtol=1e-4, atol=2e-6, equal_nan=True)
    assert torch.equal(first["samples_since_fired"], alone["samples_since_fired"])
    if CELLS[index].architecture != "jumprelu":
        assert alone["metrics"][:, 3].max() > 0, "AuxK took part"
