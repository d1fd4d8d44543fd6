"""Latents split over ranks: two and four gloo ranks select the same entries and train the same SAE as one process."""

from __future__ import annotations

import datetime
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from safetensors.torch import load_file, save_file

from sae_ray.errors import UsageError
from sae_ray.sae import Cell, CellTrainer, NonFiniteLoss, StepMetrics, TrainingConfig
from sae_ray.sae.architectures import ARCHITECTURES
from sae_ray.sae.architectures.jumprelu import JumpReLUSettings
from sae_ray.sae.ranks import ALONE, Ranks, Split
from tests.machine import in_ranks

D_IN, D_SAE, BATCH, K = 16, 127, 32, 3
"""No number of ranks divides the latents."""
STEPS, HALF = 16, 8
SIZES = (2, 4)
SEEDS = range(6)
SELECTING = ("batch_topk", "topk")
RESUMED = ("matryoshka_batch_topk-pre", "topk", "jumprelu", "guided_topk")
CONCEPTS = tuple("abcde")
TRAINING = TrainingConfig(
    steps=STEPS, batch_size=BATCH, learning_rate=1e-3, warmup_steps=2, threshold_start_step=3, threshold_beta=0.9,
    dead_after_samples=96,
)  # fmt: skip
PRE = replace(TRAINING, auxk_select="pre")


def make_cell(name: str, training: TrainingConfig = TRAINING, d_sae: int = D_SAE) -> Cell:
    settings = JumpReLUSettings(0.1, 0.05) if name == "jumprelu" else None
    if ARCHITECTURES[name].guided:  # a larger loss is clipped so much that Adam acts on the rounding of gradients
        settings = ARCHITECTURES[name].Settings(concept_weight=0.1)
    amount = {"k": {"k": K}, "sparsity": {"sparsity": 0.02}}[ARCHITECTURES[name].tuned_by]
    return Cell(name, d_sae / D_IN, training=training, settings=settings, **amount)


CELLS = {
    **{name: make_cell(name) for name in ARCHITECTURES},
    **{f"{name}-pre": make_cell(name, PRE) for name, kind in ARCHITECTURES.items() if kind.revives},
}


def make_batches() -> torch.Tensor:
    return torch.randn(STEPS, BATCH, D_IN, generator=torch.Generator().manual_seed(0)) / 4


def make_targets() -> torch.Tensor:
    """What rows show of five concepts, in part unknown."""
    drawn = torch.rand(STEPS, BATCH, len(CONCEPTS), generator=torch.Generator().manual_seed(1))
    return (drawn > 0.5).float().masked_fill(drawn > 0.8, torch.nan)


def make_trainer(cell: Cell, split: Split) -> CellTrainer:
    return CellTrainer(cell, D_IN, split=split, concepts=CONCEPTS if cell.guided else ())


def train(cell: Cell, split: Split, stop: int = STEPS, start: Path | None = None) -> dict[str, torch.Tensor]:
    """The state after `stop` steps on the first rank, and on every rank its metrics and its own `b_dec`."""
    trainer = make_trainer(cell, split)
    if start is not None:
        trainer.restore(load_file(start), {**trainer.state()[1], "n_steps": HALF})
    rows = slice(split.rows.rank * BATCH // split.rows.size, (split.rows.rank + 1) * BATCH // split.rows.size)
    data = list(zip(make_batches(), make_targets(), strict=True))[trainer.n_steps : stop]
    metrics = [trainer.step(batch[rows], targets[rows] if cell.guided else None) for batch, targets in data]
    own = {"metrics": torch.tensor(metrics, dtype=torch.float64), "own_b_dec": trainer.weights.b_dec.detach()}
    own["deaths"] = torch.tensor(trainer.deaths())
    return own | trainer.state()[0]


def select(name: str, seed: int, split: Split) -> torch.Tensor:
    """Flat indices into all latents. Values are small multiples of 1/8: exact in any order, and mostly tied."""
    trainer = CellTrainer(make_cell(name), D_IN, split=split)
    generator = torch.Generator().manual_seed(seed)
    W_enc_t = torch.randint(-2, 3, (D_SAE, D_IN), generator=generator) / 8
    x = torch.randint(-2, 3, (BATCH, D_IN), generator=generator) / 8
    trainer.weights.W_enc_t.data.copy_(split.latents.own(W_enc_t))
    trainer.weights.b_enc.data.fill_(-seed / 8)  # from many values above 0 to hardly any
    with torch.no_grad():
        pre = trainer.architecture.pre_activations(trainer.weights, x)
        found = trainer.architecture.select(pre)
    return found // pre.shape[1] * D_SAE + split.latents.places(found % pre.shape[1])


def refusals(split: Split) -> None:
    """Too few latents are refused; a NaN stops all ranks at its step."""
    with pytest.raises(UsageError, match=f"resources.train.shards = {split.latents.size}: choose at most 1, the laten"):
        CellTrainer(make_cell("relu", d_sae=1), D_IN, split=split)
    first, second, *_ = make_batches()
    second[1, 2] = torch.nan
    for name in ARCHITECTURES:
        trainer = make_trainer(make_cell(name), split)
        targets = make_targets()[0] if trainer.concepts else None
        trainer.step(first, targets)
        with pytest.raises(NonFiniteLoss, match="step 1"):
            trainer.step(second, targets)
    # Infinite weights of one latent are those of one rank alone.
    trainer = CellTrainer(make_cell("topk"), D_IN, split=split)
    trainer.step(first)
    if split.latents.rank == 1:
        trainer.weights.b_enc.data[3] = torch.inf
    with pytest.raises(NonFiniteLoss, match="step 1"):
        trainer.step(first)


def rank_main(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    timeout = datetime.timedelta(minutes=5)
    dist.init_process_group("gloo", f"file://{folder}/rendezvous", timeout, max(SIZES), rank)
    groups = {size: dist.new_group(list(range(size))) for size in SIZES}  # every rank makes every group
    splits = {size: Split(latents=Ranks(groups[size])) for size in SIZES if rank < size}

    def save(name: str, tensors: dict[str, torch.Tensor]) -> None:
        save_file(tensors, f"{folder}/{name}-{rank}.safetensors")

    for size, split in splits.items():
        for name, cell in CELLS.items():
            save(f"{name}-{size}", train(cell, split))
        for name in SELECTING:
            chosen = {str(seed): select(name, seed, split) for seed in SEEDS}
            save(f"{name}-selected-{size}", chosen)
        refusals(split)
    for name in RESUMED:
        save(f"{name}-half", train(CELLS[name], splits[4], HALF))
    dist.barrier()
    for name in RESUMED:
        start = Path(folder, f"{name}-half-0.safetensors")
        if rank < 2:
            save(f"{name}-from-4-by-2-shards", train(CELLS[name], splits[2], start=start))
            save(f"{name}-from-4-by-2-workers", train(CELLS[name], Split(rows=Ranks(groups[2])), start=start))
        if rank == 0:
            save(f"{name}-from-4-by-one", train(CELLS[name], ALONE, start=start))
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return in_ranks(rank_main, tmp_path_factory.mktemp("shards"), max(SIZES))


def load(folder: Path, name: str, rank: int = 0) -> dict[str, torch.Tensor]:
    return load_file(folder / f"{name}-{rank}.safetensors")


@cache
def alone(name: str) -> dict[str, torch.Tensor]:
    return train(CELLS[name], ALONE)


def assert_same_sae(found: dict[str, torch.Tensor], name: str, steps: slice = slice(None)) -> None:
    expected = alone(name)
    weights = list(CellTrainer(CELLS[name], D_IN).weights.named())
    assert found.keys() == expected.keys()
    assert all(found[one].shape == expected[one].shape for one in found if one != "metrics")
    length = torch.cat([expected[one].flatten() for one in weights]).norm()
    for one in weights:
        # Over the whole weight: Adam makes a step of full size of a gradient that is nothing but rounding.
        assert (found[one] - expected[one]).norm() < 1e-6 * length, one
    for one in ("samples_since_fired", "revivals", "ever_fired", "deaths"):
        assert torch.equal(found[one], expected[one]), one
    torch.testing.assert_close(found["threshold_estimate"], expected["threshold_estimate"], equal_nan=True)
    metrics = expected["metrics"][steps]
    torch.testing.assert_close(found["metrics"], metrics, rtol=1e-5, atol=1e-6, equal_nan=True)
    counted = [StepMetrics._fields.index(field) for field in ("l0", "n_dead")]
    assert torch.equal(found["metrics"][:, counted], metrics[:, counted])


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", SELECTING)
def test_the_same_entries_are_selected_with_ties(folder: Path, name: str, size: int):
    counts = []
    for seed in SEEDS:
        expected = select(name, seed, ALONE)
        found = torch.cat([load(folder, f"{name}-selected-{size}", rank)[str(seed)] for rank in range(size)])
        assert torch.equal(found.sort().values, expected)
        counts.append(len(expected))
    assert counts[0] == K * BATCH > counts[-1], "with and without enough values above 0"


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", CELLS)
def test_the_number_of_shards_does_not_show(folder: Path, name: str, size: int):
    first, *others = (load(folder, f"{name}-{size}", rank) for rank in range(size))
    assert_same_sae(first, name)
    auxk_loss = first["metrics"][:, StepMetrics._fields.index("auxk_loss")]
    assert (auxk_loss.max() > 0) == CELLS[name].kind.revives, "AuxK took part"
    for other in others:
        assert other.keys() == {"metrics", "own_b_dec", "deaths"}, "the first rank gets the state"
        for one, value in other.items():
            assert torch.equal(value.nan_to_num(-1), first[one].nan_to_num(-1)), one


@pytest.mark.parametrize("by", ["one", "2-shards", "2-workers"])
@pytest.mark.parametrize("name", RESUMED)
def test_what_four_shards_saved_resumes_otherwise(folder: Path, name: str, by: str):
    assert_same_sae(load(folder, f"{name}-from-4-by-{by}"), name, slice(HALF, None))


@pytest.mark.parametrize("of", ["jumprelu", "guided_topk"])
def test_initial_weights_are_those_of_one_process(of: str):
    whole = CellTrainer(CELLS[of], D_IN).weights.named()
    for rank in range(4):
        ranks = Ranks(None)
        ranks.rank, ranks.size = rank, 4
        for name, part in CellTrainer(CELLS[of], D_IN, split=Split(latents=ranks)).weights.named().items():
            expected = whole[name] if name == "b_dec" else whole[name][rank::4]
            assert part.is_contiguous()
            assert torch.equal(part, expected), name
