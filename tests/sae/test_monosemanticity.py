"""MonoSemanticity over a batch against the score itself, and its gradients against autograd of the formula."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from sae_ray.errors import SaeRayError, UsageError
from sae_ray.sae import BundleJob, Cell, CellJob, CellTrainer, StepMetrics, TrainingConfig, load_sae, train_cells
from sae_ray.sae.monosemanticity import batch_monosemanticity, embeddings_by_image
from sae_ray.sae.ranks import ALONE, Ranks, Split
from sae_ray.sae.sparse import Pattern
from sae_ray.scores import monosemanticity
from sae_ray.store.activations import ActivationStore
from sae_ray.store.files import Folder
from sae_ray.store.sample import Sample
from sae_ray.store.steps import Step
from sae_ray.store.stream import TrainingStream
from tests.sae.thread_ranks import on_ranks

ROWS, LATENTS, WIDTH = 24, 15, 6


def make() -> tuple[torch.Tensor, torch.Tensor]:
    """Codes, with a latent on one row and one on none, and embeddings."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.rand(ROWS, LATENTS, generator=generator, dtype=torch.float64)
    codes *= torch.rand(ROWS, LATENTS, generator=generator) < 0.3
    codes[:, 4], codes[1:, 7], codes[0, 7] = 0, 0, 0.5
    unit = torch.randn(ROWS, WIDTH, generator=generator, dtype=torch.float64) + 0.5
    return codes, torch.nn.functional.normalize(unit, dim=1)


def entries(codes: torch.Tensor) -> tuple[torch.Tensor, Pattern]:
    flat = codes.flatten().nonzero().squeeze(1)
    return codes.flatten()[flat], Pattern.of_flat(flat, *codes.shape)


def mean_score(codes: torch.Tensor, unit: torch.Tensor) -> torch.Tensor:
    """By pairs of rows, for autograd."""
    codes = codes[:, (codes > 0).sum(0) >= 2]
    pairs = codes.T.unsqueeze(2) * codes.T.unsqueeze(1) * (1 - torch.eye(len(codes)))
    return ((pairs * (unit @ unit.T)).sum((1, 2)) / pairs.sum((1, 2))).mean()


def test_it_is_the_score_over_the_rows_of_a_batch():
    codes, unit = make()
    values, pattern = entries(codes)
    found = batch_monosemanticity(values, pattern, unit, ALONE)
    assert found.item() == pytest.approx(monosemanticity(codes, 3 * unit).nanmean().item())
    torch.testing.assert_close(found, mean_score(codes, unit))
    assert batch_monosemanticity(7 * values, pattern, unit, ALONE).item() == pytest.approx(found.item())


def test_its_gradient_is_that_of_the_formula():
    codes, unit = make()
    values, pattern = entries(codes)
    values.requires_grad_()
    [found] = torch.autograd.grad(3 * batch_monosemanticity(values, pattern, unit, ALONE), values)
    codes.requires_grad_()
    [expected] = torch.autograd.grad(3 * mean_score(codes, unit), codes)
    torch.testing.assert_close(found, expected[codes > 0])


def test_ranks_find_the_score_of_the_whole_batch_and_their_part_of_its_gradient():
    codes, unit = make()
    values, pattern = entries(codes)
    values.requires_grad_()
    whole = batch_monosemanticity(values, pattern, unit, ALONE)
    [gradient] = torch.autograd.grad(whole, values)
    of_entries = torch.zeros_like(codes)
    of_entries[pattern.rows, pattern.latents] = gradient

    def by_rows(ranks: Ranks) -> None:
        part = slice(ranks.rank * ROWS // 2, (ranks.rank + 1) * ROWS // 2)
        own, own_pattern = entries(codes[part])
        own.requires_grad_()
        found = batch_monosemanticity(own, own_pattern, unit[part], Split(rows=ranks))
        [own_gradient] = torch.autograd.grad(found, own)
        torch.testing.assert_close(found, whole)
        torch.testing.assert_close(own_gradient / 2, of_entries[part][codes[part] > 0])  # averaged over ranks later

    def by_latents(ranks: Ranks) -> None:
        mine = codes[:, ranks.rank :: 2]
        own, own_pattern = entries(mine)
        own.requires_grad_()
        found = batch_monosemanticity(own, own_pattern, unit, Split(latents=ranks))
        [own_gradient] = torch.autograd.grad(found, own)
        torch.testing.assert_close(found.detach(), whole.detach())
        torch.testing.assert_close(own_gradient, of_entries[:, ranks.rank :: 2][mine > 0])

    on_ranks(2, by_rows)
    on_ranks(2, by_latents)


def test_latents_on_fewer_than_two_rows_have_none():
    codes = torch.eye(3, dtype=torch.float64)
    values, pattern = entries(codes)
    values.requires_grad_()
    found = batch_monosemanticity(values, pattern, torch.eye(3, dtype=torch.float64), ALONE)
    assert found == 0
    assert (torch.autograd.grad(found, values)[0] == 0).all()


# Training


D_IN, BATCH, KINDS = 12, 48, 6
TRAINING = TrainingConfig(
    steps=80, batch_size=BATCH, learning_rate=1e-2, warmup_steps=3, threshold_start_step=3, threshold_beta=0.9,
    dead_after_samples=480,
)  # fmt: skip
CELL = Cell("batch_topk", 3, k=2, training=TRAINING, monosemanticity=0.5)


def make_rows(n: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows that show one of six kinds, whose directions are alike, and the embedding of each kind."""
    generator = torch.Generator().manual_seed(seed)
    fixed = torch.Generator().manual_seed(9)
    directions = torch.randn(KINDS, D_IN, generator=fixed) + 1.5 * torch.randn(1, D_IN, generator=fixed)
    kind = torch.randint(0, KINDS, (n,), generator=generator)
    return (directions[kind] + 0.3 * torch.randn(n, D_IN, generator=generator)) / 6, 3 * torch.eye(KINDS)[kind]


def test_latents_of_a_batch_become_of_one_kind():
    rows, embeddings = (part.split(BATCH) for part in make_rows(80 * BATCH))
    goal, plain = CellTrainer(CELL, D_IN), CellTrainer(replace(CELL, monosemanticity=0.0), D_IN)
    metrics = [goal.step(batch, embeddings=judged) for batch, judged in zip(rows, embeddings, strict=True)]
    others = [plain.step(batch) for batch in rows]
    assert {one.monosemanticity for one in others} == {0.0}
    heldout, kinds = make_rows(600, seed=1)
    reached, before = (
        monosemanticity(trainer.export(1.0).encode(heldout), kinds).nanmean().item() for trainer in (goal, plain)
    )
    assert reached > before + 0.05
    assert metrics[-1].monosemanticity > metrics[0].monosemanticity + 0.1
    assert metrics[-1].loss == pytest.approx(
        metrics[-1].reconstruction_loss + 0.03 * metrics[-1].auxk_loss - 0.5 * metrics[-1].monosemanticity, rel=1e-4
    )


@pytest.mark.parametrize("by", ["rows", "latents"])
def test_two_ranks_pursue_the_goal_as_one_does(by: str):
    rows, embeddings = (part.split(BATCH) for part in make_rows(4 * BATCH))
    alone = CellTrainer(CELL, D_IN)
    expected = [alone.step(batch, embeddings=judged) for batch, judged in zip(rows, embeddings, strict=True)]

    def work(ranks: Ranks) -> list[StepMetrics]:
        trainer = CellTrainer(CELL, D_IN, split=Split(**{by: ranks}))
        parts = [
            [whole.chunk(2)[ranks.rank] if by == "rows" else whole for whole in (batch, judged)]
            for batch, judged in zip(rows, embeddings, strict=True)
        ]
        return [trainer.step(batch, embeddings=judged) for batch, judged in parts]

    for metrics in on_ranks(2, work):
        torch.testing.assert_close(torch.tensor(metrics), torch.tensor(expected), rtol=1e-3, atol=1e-5, equal_nan=True)


def test_the_goal_needs_embeddings_of_every_row():
    trainer, [rows, embeddings] = CellTrainer(CELL, D_IN), make_rows(BATCH)
    for given in (None, embeddings[:3]):
        with pytest.raises(UsageError, match=r"the embeddings have shape .*; give \[48, d\]"):
            trainer.step(rows, embeddings=given)
    with pytest.raises(UsageError, match=r"cell\.monosemanticity = 0\.1: make it 0 for relu, which"):
        Cell("relu", 2, sparsity=0.1, monosemanticity=0.1)


@pytest.fixture
def stores(write_store, tmp_path: Path) -> tuple[ActivationStore, ActivationStore]:
    """Two tokens of every image but the third, which could not be read; and the judge's embedding of each."""
    images = np.delete(np.arange(160), 3)
    rows, embeddings = (part.numpy() for part in make_rows(2 * len(images)))
    parts = [(images.repeat(2)[part], np.tile([0, 1], len(images))[part], rows[part]) for part in HALVES]
    judged = [(images[part], np.zeros(len(images))[part], embeddings[::2][part]) for part in HALVES_OF_IMAGES]
    return write_store(tmp_path / "activations", parts), write_store(tmp_path / "judge", judged)


HALVES_OF_IMAGES = (slice(0, 79), slice(79, 159))
HALVES = tuple(slice(2 * half.start, 2 * half.stop) for half in HALVES_OF_IMAGES)


def test_embeddings_travel_with_the_activations_of_their_images(stores, tmp_path: Path):
    """A bundle equals a plain loop over rows and the embeddings of their images."""
    activations, judge = stores
    cells = (CELL, replace(CELL, monosemanticity=0.0), Cell("topk", 2, k=2, training=TRAINING, monosemanticity=0.1))
    jobs = [
        CellJob(
            Step(Folder(tmp_path), "train", f"sae-{n}", {}),
            cell,
            embeddings=judge.folder if cell.monosemanticity else None,
        )
        for n, cell in enumerate(cells)
    ]
    train_cells(BundleJob(activations.folder, tuple(jobs), stream_seed=5, shuffle_rows=200, checkpoint_every=30))
    of_image = {
        int(image): torch.tensor(vector)
        for part in judge.parts
        for image, _, vector in zip(*judge.read(part), strict=True)
    }
    scale = activations.root_mean_square_norm
    for job, cell in zip(jobs, cells, strict=True):
        trainer = CellTrainer(cell, D_IN)
        stream = TrainingStream(activations, BATCH, 5, 200, without=Sample(activations))
        for _, (rows, images) in zip(range(TRAINING.steps), stream.batches_with_images(), strict=False):
            judged = torch.stack([of_image[image] for image in images.tolist()]).float()
            trainer.step(rows.float() / scale, embeddings=judged if cell.monosemanticity else None)
        torch.testing.assert_close(trainer.export(scale).W_dec, load_sae(job.step.folder).W_dec, rtol=1e-4, atol=1e-5)


def test_embeddings_are_held_once_while_they_are_read(write_store, tmp_path: Path):
    rows, d = 500, 256
    parts = [
        (np.arange(rows * n, rows * (n + 1)), np.zeros(rows), np.full((rows, d), 1 + n, np.float32)) for n in range(8)
    ]
    judge = write_store(tmp_path / "judge", parts)
    tracemalloc.start()
    found = embeddings_by_image(judge, judge)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1.5 * found.nbytes
    assert found[:, 0].tolist() == [1 + n for n in range(8) for _ in range(rows)]


def test_a_judge_that_has_not_seen_all_images_is_refused(stores, write_store, tmp_path: Path):
    activations, judge = stores
    (index, _, vectors), second = (tuple(map(np.array, judge.read(part))) for part in (0, 1))
    fewer = write_store(tmp_path / "fewer", [(index, np.zeros(len(index)), vectors)])
    with pytest.raises(SaeRayError, match=r"has embeddings of 79 images, .* activations of 159; delete both"):
        embeddings_by_image(fewer, activations)
    vectors[5] = 0
    blind = write_store(tmp_path / "blind", [(index, np.zeros(len(index)), vectors), second])
    with pytest.raises(SaeRayError, match="the image with image_index 6 an embedding of length zero"):
        embeddings_by_image(blind, activations)
