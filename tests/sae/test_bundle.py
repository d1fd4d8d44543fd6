"""Training a bundle without Ray: what it writes, and kills after which another number of ranks resumes."""

from __future__ import annotations

import datetime
import os
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from sae_ray.sae import (
    SAE,
    BundleJob,
    Cell,
    CellJob,
    CellReport,
    CellTrainer,
    TrainingConfig,
    evaluate_store,
    load_sae,
    measure_latents,
    metrics,
    train_cells,
)
from sae_ray.sae.architectures.guided_topk import GuidanceSettings
from sae_ray.sae.ranks import Ranks, Split
from sae_ray.sae.scaling import Scaling
from sae_ray.steering import load_max_token
from sae_ray.store.activations import ActivationStore
from sae_ray.store.files import Folder
from sae_ray.store.sample import Sample
from sae_ray.store.steps import Step
from sae_ray.store.stream import TrainingStream
from tests.machine import processes_with_torch

D_IN, STEPS, EVERY = 12, 36, 6
TRAINING = TrainingConfig(
    steps=STEPS, batch_size=24, learning_rate=3e-3, warmup_steps=3, threshold_start_step=4, threshold_beta=0.9,
    dead_after_samples=120,
)  # fmt: skip
CELLS = (
    Cell("batch_topk", 4, k=3, training=TRAINING),
    Cell("matryoshka_batch_topk", 2, k=3, training=TRAINING),
    Cell("topk", 2, k=3, training=TRAINING),
)
WEIGHTS = ("W_enc", "W_dec", "b_enc", "b_dec")


@pytest.fixture(scope="module")
def store(write_store, tmp_path_factory) -> ActivationStore:
    rng = np.random.default_rng(0)
    parts = [(np.arange(40) + 40 * n, np.zeros(40), rng.normal(size=(40, D_IN)).astype("f4") + 0.3) for n in range(4)]
    return write_store(tmp_path_factory.mktemp("activations"), parts)


def bundle_of(store: ActivationStore, root: Path, cells: tuple[Cell, ...] = CELLS) -> BundleJob:
    steps = [Step(Folder(root), "train", f"sae-{number}", {}) for number in range(len(cells))]
    jobs = tuple(CellJob(step, cell) for step, cell in zip(steps, cells, strict=True))
    return BundleJob(store.folder, jobs, stream_seed=5, shuffle_rows=100, checkpoint_every=EVERY)


@pytest.fixture(scope="module")
def whole(store, tmp_path_factory) -> BundleJob:
    """Trained in one go by one process."""
    bundle = bundle_of(store, tmp_path_factory.mktemp("whole"))
    train_cells(bundle)
    return bundle


def rank_main(bundle: BundleJob, rank: int, size: int, by: str, rendezvous: str, killed_at: int | None) -> None:
    torch.set_num_threads(1)

    def after_step(done: int, _: object) -> bool:
        if done == killed_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return False

    group = None
    if size > 1:
        timeout = datetime.timedelta(minutes=5)
        dist.init_process_group("gloo", f"file://{rendezvous}", timeout, size, rank)
        group = dist.group.WORLD
    train_cells(bundle, split=Split(**{by: Ranks(group)}), after_step=after_step)
    if group is not None:
        dist.destroy_process_group()


def attempt(
    bundle: BundleJob, size: int, scratch: Path, killed_at: int | None = None, by: str = "rows"
) -> list[int | None]:
    """Exit codes of the ranks."""
    context = processes_with_torch()
    rendezvous = str(scratch / f"rendezvous-{size}-{killed_at}")
    ranks = [context.Process(target=rank_main, args=(bundle, n, size, by, rendezvous, killed_at)) for n in range(size)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    return [process.exitcode for process in ranks]


@pytest.mark.parametrize(
    "attempts",
    [[(1, "rows"), (2, "rows"), (4, "rows")], [(4, "latents"), (2, "rows"), (2, "latents")]],
    ids=["more workers", "shards, workers, shards"],
)
def test_a_killed_bundle_resumes_on_other_ranks(
    store: ActivationStore, whole: BundleJob, tmp_path: Path, attempts: list[tuple[int, str]]
):
    """Each attempt but the last is killed between two checkpoints."""
    bundle = bundle_of(store, tmp_path / "steps")
    *killed, (size, by) = attempts
    for (killed_size, killed_by), killed_at in zip(killed, (2 * EVERY + 3, 4 * EVERY + 1), strict=True):
        exits = attempt(bundle, killed_size, tmp_path, killed_at, killed_by)
        assert -signal.SIGKILL in exits, "the others may die of their neighbour's death"
        assert not any(exit == 0 for exit in exits)
        assert not any(job.step.finished for job in bundle.cells)
    assert attempt(bundle, size, tmp_path, by=by) == [0] * size
    for job, reference in zip(bundle.cells, whole.cells, strict=True):
        record, expected = job.step.record(), reference.step.record()
        assert record is not None
        assert expected is not None
        assert [(one["first_step"], one["workers"], one["shards"]) for one in record["ran"]["attempts"]] == [
            (first, size if by == "rows" else 1, size if by == "latents" else 1)
            for first, (size, by) in zip((0, 2 * EVERY, 4 * EVERY), attempts, strict=True)
        ]
        assert record["counts"].keys() == expected["counts"].keys()
        assert job.step.folder.files().keys() == reference.step.folder.files().keys()
        resumed, alone = load_sae(job.step.folder), load_sae(reference.step.folder)
        for name in WEIGHTS:
            expected = getattr(alone, name)
            assert torch.linalg.vector_norm(getattr(resumed, name) - expected) < 1e-3 * expected.norm(), name
        if alone.threshold is not None:
            torch.testing.assert_close(resumed.threshold, alone.threshold, rtol=1e-3, atol=0)


def test_checkpoints_are_written_at_once_when_they_are_asked_for(store: ActivationStore, tmp_path: Path):
    """As before a machine is taken away."""

    class Gone(BaseException):
        pass

    def warn(done: int, _: object) -> bool:
        if done == EVERY // 2 + 1:
            raise Gone
        return done == EVERY // 2

    bundle = bundle_of(store, tmp_path)
    with pytest.raises(Gone):
        train_cells(bundle, after_step=warn)
    for job in bundle.cells:
        names = set((job.step.folder / "checkpoints").files())
        assert names == {f"step-{EVERY // 2:09d}.{suffix}" for suffix in ("json", "safetensors")}


def test_a_killed_bundle_resumes_to_equal_weights(store: ActivationStore, whole: BundleJob, tmp_path: Path):
    """In one process, the cells from different checkpoints."""

    class Killed(BaseException):
        pass

    def kill(done: int, _: object) -> bool:
        if done == 3 * EVERY + 2:
            raise Killed
        return False

    bundle = bundle_of(store, tmp_path)
    with pytest.raises(Killed):
        train_cells(bundle, after_step=kill)
    newest = f"checkpoints/step-{3 * EVERY:09d}"
    for suffix in (".json", ".safetensors"):
        bundle.cells[1].step.folder.delete(newest + suffix)
    reported: list[tuple[int, str, int, int]] = []

    def note(done: int, reports: dict[str, CellReport]) -> bool:
        reported.extend((done, name, report.metrics.step, report.d_sae) for name, report in reports.items())
        return False

    train_cells(bundle, after_step=note)
    expected = [
        (step + 1, job.step.name, step, job.cell.d_sae(D_IN))
        for job, first in zip(bundle.cells, (3 * EVERY, 2 * EVERY, 3 * EVERY), strict=True)
        for step in range(first, STEPS)
    ]
    assert sorted(reported) == sorted(expected), "of every cell the steps that it made"
    for job, reference in zip(bundle.cells, whole.cells, strict=True):
        for name in WEIGHTS:
            resumed, alone = (getattr(load_sae(one.step.folder), name) for one in (job, reference))
            assert torch.equal(resumed, alone), name
        assert not job.step.folder.exists("checkpoints")


def test_a_step_holds_the_sae_its_latents_and_how_it_was_trained(store: ActivationStore, whole: BundleJob):
    x = torch.from_numpy(np.concatenate([store.read(number)[2] for number in range(len(store.parts))]))
    for job in whole.cells:
        record, sae = job.step.record(), load_sae(job.step.folder)
        assert record is not None
        counts = record["counts"]
        assert {name: counts[name] for name in ("steps", "d_in", "d_sae")} == {
            "steps": STEPS,
            "d_in": D_IN,
            "d_sae": sae.d_sae,
        }
        assert 0 <= counts["waiting_for_data"] < 1
        assert record["ran"] == {"attempts": [{"first_step": 0, "workers": 1, "shards": 1, "device": "cpu"}]}
        codes = sae.encode(x).double()
        table = job.step.folder.read_parquet("latents.parquet")
        assert table["latent"].to_pylist() == list(range(sae.d_sae))
        np.testing.assert_allclose(table["frequency"], (codes > 0).double().mean(0))
        np.testing.assert_allclose(table["mean_active"], codes.sum(0) / (codes > 0).sum(0).clamp_min(1), rtol=1e-6)
        np.testing.assert_allclose(table["max_token"], codes.amax(0), rtol=1e-6)
        assert torch.equal(load_max_token(job.step.folder), torch.from_numpy(table["max_token"].to_numpy().copy()))


def test_latents_are_measured_on_the_first_rows_only(store: ActivationStore, whole: BundleJob, monkeypatch):
    monkeypatch.setattr(metrics, "MEASURED_ROWS", 70)
    saes = [load_sae(job.step.folder) for job in whole.cells]
    x = torch.from_numpy(np.concatenate([store.read(number)[2] for number in (0, 1)])[:70])
    for sae, found in zip(saes, measure_latents(saes, store), strict=True):
        torch.testing.assert_close(found.max_token, sae.encode(x).double().amax(0))
        torch.testing.assert_close(found.frequency, (sae.encode(x) > 0).float().mean(0))


def test_fidelity_on_a_store_is_that_on_all_its_rows(store: ActivationStore, whole: BundleJob):
    x = torch.from_numpy(np.concatenate([store.read(number)[2] for number in range(len(store.parts))])).double()
    for job in whole.cells:
        sae = load_sae(job.step.folder)
        summary = evaluate_store(sae, store).summary()
        error = (x - sae.decode(sae.encode(x.float())).double()).square().sum()
        assert summary.n_samples == store.n_rows
        assert summary.r2 == pytest.approx((1 - error / (x - x.mean(0)).square().sum()).item(), abs=1e-6)


def test_a_cell_that_diverges_is_recorded_and_the_others_are_what_they_were(store, whole: BundleJob, tmp_path: Path):
    diverging = Cell("relu", 2, sparsity=1e38, training=TRAINING)
    bundle = bundle_of(store, tmp_path, (*CELLS, diverging))
    train_cells(bundle)
    *healthy, failed = bundle.cells
    assert "loss" in (failed.step.failure or "")
    for job, reference in zip(healthy, whole.cells, strict=True):
        assert torch.equal(load_sae(job.step.folder).W_enc, load_sae(reference.step.folder).W_enc)


# Centring


def codes_and_reconstructions(sae: SAE, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    codes = sae.encode(x)
    return codes, sae.decode(codes)


def alone(store: ActivationStore, cell: Cell) -> tuple[CellTrainer, Scaling]:
    """A plain loop over what the stream gives, with rows that are scaled here."""
    sample, trainer = Sample(store), CellTrainer(cell, store.d)
    without = sample if cell.training.threshold == "calibrated" else None
    scaling = Scaling.of(store, sample.location(), cell.training)
    for _, rows in zip(range(STEPS), TrainingStream(store, 24, 5, 100, without=without).batches(), strict=False):
        rows = rows.float()
        if cell.training.centre:
            rows = rows - torch.from_numpy(sample.location().mean).float()
        trainer.step(rows / scaling.scale)
    return trainer, scaling


@pytest.mark.parametrize("centre", [False, True])
@pytest.mark.parametrize("number", range(len(CELLS)))
def test_an_exported_sae_computes_what_was_trained(store, tmp_path: Path, number: int, centre: bool):
    """On activations as they are: the codes of the scaled ones, times the scale."""
    cell = replace(CELLS[number], training=replace(TRAINING, centre=centre, threshold="average"))
    bundle = bundle_of(store, tmp_path, (cell,))
    train_cells(bundle)
    sae = load_sae(bundle.cells[0].step.folder)
    trainer, scaling = alone(store, cell)
    x = torch.tensor(store.read(0)[2])
    codes, x_hat = codes_and_reconstructions(sae, x)
    expected = codes_and_reconstructions(trainer.export(1.0), scaling(x))
    torch.testing.assert_close(codes, expected[0] * scaling.scale, rtol=1e-5, atol=1e-5)
    centred = 0 if scaling.centre is None else scaling.centre
    torch.testing.assert_close(x_hat, expected[1] * scaling.scale + centred, rtol=1e-5, atol=1e-5)
    assert (scaling.centre is None) != centre
    if not centre:
        plain = trainer.export(store.root_mean_square_norm)
        assert all(torch.equal(getattr(plain, name), getattr(sae, name)) for name in WEIGHTS)


def test_centred_training_does_not_see_where_the_activations_lie(write_store, tmp_path: Path):
    """Powers of two, so that shifted activations are exact in float32."""
    x = np.random.default_rng(0).integers(-64, 64, (160, D_IN)).astype("f4") / 32
    shift = 64.0 * np.random.default_rng(1).integers(-3, 4, D_IN).astype("f4")
    cell = replace(CELLS[0], training=replace(TRAINING, centre=True))
    saes = []
    for label, values in (("plain", x), ("shifted", x + shift)):
        store = write_store(tmp_path, [(np.arange(160), np.zeros(160), values)], label=label)
        bundle = bundle_of(store, tmp_path / f"of-{label}", (cell,))
        train_cells(bundle)
        saes.append((load_sae(bundle.cells[0].step.folder), bundle.cells[0].step.record()))
    (plain, counts), (shifted, others) = saes
    for name in ("W_enc", "W_dec", "b_enc", "threshold"):
        torch.testing.assert_close(getattr(plain, name), getattr(shifted, name), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(shifted.b_dec - plain.b_dec, torch.from_numpy(shift), rtol=0, atol=1e-2)
    offsets = [record["counts"]["mean_over_spread"] for record in (counts, others)]
    spread = np.sqrt(np.square(x - x.mean(0)).sum(1).mean())
    assert offsets == pytest.approx([np.linalg.norm(each.mean(0)) / spread for each in (x, x + shift)], rel=1e-5)
    assert offsets[0] < 1 < 50 < offsets[1]


def test_an_sae_that_standardises_rows_takes_them_as_they_are(store, tmp_path: Path):
    cells = [
        Cell(
            "guided_topk",
            4,
            k=3,
            training=replace(TRAINING, centre=centre),
            settings=GuidanceSettings(concept_weight=0),
        )
        for centre in (False, True)
    ]
    plain, centred = (bundle_of(store, tmp_path / str(n), (cell,)) for n, cell in enumerate(cells))
    for bundle in (plain, centred):
        train_cells(bundle)
    found, expected = (load_sae(bundle.cells[0].step.folder) for bundle in (centred, plain))
    for name in ("W_enc", "W_dec", "b_enc", "b_dec"):
        assert torch.equal(getattr(found, name), getattr(expected, name))
    assert cells[0].identity() == cells[1].identity()


def test_sae_lens_gives_the_codes_of_a_centred_sae(write_store, tmp_path: Path):
    import sae_lens

    values = np.random.default_rng(0).normal(size=(160, D_IN)).astype("f4") + 9
    store = write_store(tmp_path, [(np.arange(160), np.zeros(160), values)])
    bundle = bundle_of(store, tmp_path / "steps", (replace(CELLS[0], training=replace(TRAINING, centre=True)),))
    train_cells(bundle)
    folder, x = bundle.cells[0].step.folder, torch.from_numpy(values)
    theirs = sae_lens.SAE.load_from_disk(folder.path)
    codes, x_hat = codes_and_reconstructions(load_sae(folder), x)
    with torch.no_grad():
        torch.testing.assert_close(theirs.encode(x), codes)
        torch.testing.assert_close(theirs.decode(codes), x_hat)
    assert 0 < (codes > 0).sum() < codes.numel()
