"""Data-parallel training: one, two and four gloo ranks select the same entries and train the same SAE."""

from __future__ import annotations

import datetime
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from safetensors.torch import load_file, save_file

from sae_ray.errors import UsageError
from sae_ray.sae import BundleJob, Cell, CellJob, CellTrainer, NonFiniteLoss, TrainingConfig, train_cells
from sae_ray.sae.architectures import Architecture
from sae_ray.sae.architectures.jumprelu import JumpReLUSettings
from sae_ray.sae.ranks import Ranks, Split
from sae_ray.sae.weights import Weights
from sae_ray.store.files import Folder
from sae_ray.store.steps import Step
from tests.machine import in_ranks

D_IN, BATCH, STEPS, STEPS_PER_SIZE = 16, 32, 24, 8
SIZES = (1, 2, 4)
TRAINING = TrainingConfig(
    steps=STEPS, batch_size=BATCH, learning_rate=3e-3, warmup_steps=2, threshold_start_step=5, threshold_beta=0.9,
    dead_after_samples=96,
)  # fmt: skip
CELLS = [
    Cell("batch_topk", 8, k=3, training=TRAINING),
    Cell("matryoshka_batch_topk", 8, k=3, training=replace(TRAINING, auxk_select="pre")),
    Cell("topk", 8, k=3, training=TRAINING),
    Cell("jumprelu", 4, sparsity=0.02, training=TRAINING, settings=JumpReLUSettings(0.1, 0.05)),
]
BATCH_TOPK, MATRYOSHKA, TOPK, JUMPRELU = range(len(CELLS))
GROWN = (BATCH_TOPK, MATRYOSHKA)
EXACT_SEEDS = range(6)


def make_batches() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(STEPS, BATCH, D_IN, generator=generator) / 4


def share(rows: torch.Tensor, rank: int, size: int) -> torch.Tensor:
    return rows.chunk(size)[rank]


def train(cell: Cell, rank: int, size: int, group, stop: int = STEPS, start: Path | None = None):
    """The state after `stop` steps, from a saved state or from the start."""
    trainer = CellTrainer(cell, D_IN, split=Split(Ranks(group)))
    if start is not None:
        facts = {**trainer.state()[1], "n_steps": stop - STEPS_PER_SIZE}
        trainer.restore(load_file(start), facts)
    metrics = [trainer.step(share(batch, rank, size)) for batch in make_batches()[trainer.n_steps : stop]]
    return {**trainer.state()[0], "metrics": torch.tensor(metrics, dtype=torch.float64)}


def exact(seed: int) -> tuple[Architecture, Weights, torch.Tensor]:
    """Small multiples of 1/8, whose products and sums are exact in any order; there are many ties."""
    trainer = CellTrainer(CELLS[BATCH_TOPK], D_IN)
    generator = torch.Generator().manual_seed(seed)
    for parameter in trainer.weights.named().values():
        parameter.data = torch.randint(-2, 3, parameter.shape, generator=generator) / 8
    trainer.weights.b_enc.data -= seed / 8  # from many values above 0 to hardly any
    return trainer.architecture, trainer.weights, torch.randint(-2, 3, (BATCH, D_IN), generator=generator) / 8


def select(seed: int, rank: int, size: int, group) -> torch.Tensor:
    """Flat indices into the whole batch."""
    architecture = CellTrainer(CELLS[BATCH_TOPK], D_IN, split=Split(Ranks(group))).architecture
    alone, weights, x = exact(seed)
    with torch.no_grad():
        chosen = architecture.select(alone.pre_activations(weights, share(x, rank, size)))
    return chosen + rank * (BATCH // size) * weights.b_enc.numel()


def refusals(rank: int, size: int, group) -> None:
    """Shares of other sizes are refused; a NaN in the share of one rank stops all of them."""
    odd = replace(CELLS[TOPK], training=replace(TRAINING, batch_size=BATCH + 1))
    bundle = BundleJob(Folder("none"), (CellJob(Step(Folder("none"), "train", "sae", {}), odd),), 0, 1, 1)
    with pytest.raises(UsageError, match=f"resources.train.workers = {size}: .* training.batch_size = {BATCH + 1}"):
        train_cells(bundle, split=Split(Ranks(group)))
    uneven = make_batches()[0].split([BATCH - 3 * (size - 1)] + [3] * (size - 1))[rank]
    with pytest.raises(UsageError, match=f"training.batch_size = {BATCH}"):
        CellTrainer(CELLS[BATCH_TOPK], D_IN, split=Split(Ranks(group))).step(uneven)
    for cell in CELLS:
        trainer = CellTrainer(cell, D_IN, split=Split(Ranks(group)))
        first, second, *_ = (share(batch, rank, size).clone() for batch in make_batches())
        trainer.step(first)
        if rank == size - 1:
            second[1, 2] = torch.nan
        with pytest.raises(NonFiniteLoss):
            trainer.step(second)


def rank_main(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=SIZES[-1],
        timeout=datetime.timedelta(minutes=5),
    )
    for stage, size in enumerate(SIZES):
        group = dist.new_group(list(range(size))) if size > 1 else None
        dist.barrier()
        if rank >= size:
            continue
        for index, cell in enumerate(CELLS):
            save_file(train(cell, rank, size, group), f"{folder}/{index}-{size}-{rank}.safetensors")
        for index in GROWN:
            start = Path(folder, f"{index}-grown-{SIZES[stage - 1]}-0.safetensors") if stage else None
            grown = train(CELLS[index], rank, size, group, STEPS_PER_SIZE * (stage + 1), start)
            save_file(grown, f"{folder}/{index}-grown-{size}-{rank}.safetensors")
        for seed in EXACT_SEEDS:
            save_file({"chosen": select(seed, rank, size, group)}, f"{folder}/exact-{seed}-{size}-{rank}.safetensors")
        if size > 1:
            refusals(rank, size, group)
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return in_ranks(rank_main, tmp_path_factory.mktemp("ranks"), SIZES[-1])


def results(folder: Path, name: str, size: int) -> list[dict[str, torch.Tensor]]:
    return [load_file(folder / f"{name}-{size}-{rank}.safetensors") for rank in range(size)]


def assert_same_sae(ranks: list[dict[str, torch.Tensor]], alone: dict[str, torch.Tensor], cell: Cell) -> None:
    """Bit for bit among ranks; up to rounding between numbers of ranks, the counters exactly."""
    for name in alone:
        for other in ranks[1:]:
            assert torch.equal(ranks[0][name].nan_to_num(-1), other[name].nan_to_num(-1)), name
    torch.testing.assert_close(ranks[0]["metrics"], alone["metrics"], rtol=1e-3, atol=1e-6, equal_nan=True)
    for name, start in CellTrainer(cell, D_IN).weights.named().items():
        # Over the whole weight: Adam makes a step of full size of a gradient that is nothing but rounding.
        moved = torch.linalg.vector_norm(alone[name] - start.detach())
        assert torch.linalg.vector_norm(ranks[0][name] - alone[name]) < 1e-3 * moved, name
    assert torch.equal(ranks[0]["samples_since_fired"], alone["samples_since_fired"])


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("seed", EXACT_SEEDS)
def test_the_same_entries_are_selected(folder: Path, seed: int, size: int):
    alone, weights, x = exact(seed)
    with torch.no_grad():
        pre = alone.pre_activations(weights, x).flatten()
    order = pre.sort(descending=True, stable=True).indices[: 3 * BATCH]
    expected = order[pre[order] > 0].sort().values
    assert torch.equal(torch.cat([rank["chosen"] for rank in results(folder, f"exact-{seed}", size)]), expected)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("index", range(len(CELLS)), ids=lambda index: CELLS[index].architecture)
def test_the_number_of_ranks_does_not_show(folder: Path, index: int, size: int):
    alone = train(CELLS[index], 0, 1, None)
    assert_same_sae(results(folder, str(index), size), alone, CELLS[index])
    if index != JUMPRELU:
        assert alone["metrics"][:, 3].max() > 0, "AuxK took part"


@pytest.mark.parametrize("index", GROWN, ids=lambda index: CELLS[index].architecture)
def test_it_may_change_at_a_checkpoint(folder: Path, index: int):
    """A third of the steps each on one, two and four ranks."""
    alone = train(CELLS[index], 0, 1, None)
    alone["metrics"] = alone["metrics"][-STEPS_PER_SIZE:]
    assert_same_sae(results(folder, f"{index}-grown", 4), alone, CELLS[index])
