"""The inference threshold from rows that are kept out of training."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sae_ray.sae import (
    SAE,
    BundleJob,
    Cell,
    CellJob,
    TrainingConfig,
    calibration,
    evaluate_store,
    load_sae,
    train_cells,
    train_sae,
)
from sae_ray.sae.calibration import calibrated
from sae_ray.store.activations import ActivationStore
from sae_ray.store.files import Folder
from sae_ray.store.sample import Sample
from sae_ray.store.steps import Step

D_IN, D_SAE = 6, 20


def random_sae(k: int, seed: int = 0, bias: float = 0.0) -> SAE:
    generator = torch.Generator().manual_seed(seed)
    W_enc = torch.randn(D_IN, D_SAE, generator=generator)
    b_enc, b_dec = torch.randn(D_SAE, generator=generator) + bias, torch.randn(D_IN, generator=generator)
    return SAE("batch_topk", W_enc, W_enc.T.contiguous(), b_enc, b_dec, torch.full((D_SAE,), 9.0), k)


@given(st.integers(1, 7), st.integers(1, 60), st.integers(0, 99), st.sampled_from([1, 50, 2**24]))
def test_k_latents_are_active_on_average(k: int, n: int, seed: int, entries: int):
    """However many rows are encoded at once; whatever the threshold was."""
    sae, rows = random_sae(k, seed), torch.randn(n, D_IN, generator=torch.Generator().manual_seed(seed))
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(calibration, "_ENTRIES", entries)
        found = calibrated(sae, rows)
    positive = (replace(sae, threshold=torch.zeros(D_SAE)).encode(rows) > 0).sum().item()
    assert (found.encode(rows) > 0).sum() == min(k * n, positive)
    assert found.threshold is not None
    assert (found.threshold == found.threshold[0]).all()
    assert (found.W_enc is sae.W_enc, found.k) == (True, k)


def test_it_lies_between_the_last_value_kept_and_the_next():
    sae = SAE("batch_topk", torch.eye(3), torch.eye(3), torch.zeros(3), torch.zeros(3), torch.zeros(3), 1)
    rows = torch.tensor([[5.0, 1.0, -3.0], [4.0, 2.0, 0.5]])
    assert calibrated(sae, rows).threshold.tolist() == [3.0] * 3


def test_where_hardly_anything_is_above_0_all_of_it_is_kept():
    sae, rows = random_sae(4, bias=-50), torch.randn(30, D_IN)
    assert calibrated(sae, rows).threshold.tolist() == [0.0] * D_SAE


# In a bundle


TRAINING = TrainingConfig(
    steps=400, batch_size=64, learning_rate=5e-3, warmup_steps=20, threshold_start_step=100, threshold_beta=0.98,
)  # fmt: skip
CELL = Cell("batch_topk", 16, k=4)


def activations(n: int, seed: int) -> np.ndarray:
    """Sparse mixtures of fixed directions, and noise that can only be learnt by heart."""
    directions = np.random.default_rng(0).normal(size=(40, 16))
    rng = np.random.default_rng(seed)
    amounts = rng.random((n, 40)) * (rng.random((n, 40)) < 0.1)
    return (amounts @ directions + 0.3 * rng.normal(size=(n, 16))).astype("f4")


def trained(
    store: ActivationStore, root: Path, threshold: Any, training: TrainingConfig = TRAINING
) -> tuple[SAE, dict]:
    cell = replace(CELL, training=replace(training, threshold=threshold))
    job = CellJob(Step(Folder(root), "train", f"sae-{threshold}", {}), cell)
    train_cells(BundleJob(store.folder, (job,), stream_seed=0, shuffle_rows=10_000, checkpoint_every=1000))
    record = job.step.record()
    assert record is not None
    return load_sae(job.step.folder), record["counts"]


def test_on_new_images_as_many_latents_are_active_as_were_asked_for(write_store, tmp_path: Path):
    """A wide SAE that has seen few images often: its average threshold lets far more through on others."""

    def store(n: int, seed: int, label: str) -> ActivationStore:
        return write_store(tmp_path, [(np.arange(n), np.zeros(n), activations(n, seed))], label=label)

    train, heldout = store(1000, 1, "train"), store(3000, 2, "heldout")
    (average, plain), (exact, counts) = (trained(train, tmp_path, one) for one in ("average", "calibrated"))
    l0 = [evaluate_store(sae, heldout).summary().l0 for sae in (average, exact)]
    assert l0[0] > 1.2 * CELL.k
    assert l0[1] == pytest.approx(CELL.k, rel=0.05)
    assert (plain["kept_out"], plain["kept_out_l0"]) == (0, None)
    assert (counts["kept_out"], counts["kept_out_l0"]) == (100, CELL.k)
    kept_out = torch.from_numpy(Sample(train).kept_out_rows())
    assert torch.equal(calibrated(exact, kept_out).threshold, exact.threshold)


def test_vectors_from_anywhere_are_calibrated_too():
    """From ten on, the last of every ten is kept out of training."""
    x, few = torch.from_numpy(activations(45, 0)), {"expansion": 16, "k": 4, "steps": 10, "batch_size": 16}
    for rows in (x, x[:10]):
        sae, kept_out = train_sae(rows, **few, progress=False), rows[9::10]
        assert (sae.encode(kept_out) > 0).sum() == 4 * len(kept_out)
    found, average = (train_sae(x[:9], **few, **one, progress=False) for one in ({}, {"threshold": "average"}))
    assert torch.equal(found.threshold, average.threshold)


def test_too_few_images_leave_the_average(write_store, tmp_path: Path):
    store = write_store(tmp_path, [(np.arange(9), np.zeros(9), activations(9, 0))])
    short = replace(TRAINING, steps=10, warmup_steps=1, threshold_start_step=2)
    (average, _), (found, counts) = (trained(store, tmp_path, one, short) for one in ("average", "calibrated"))
    assert torch.equal(average.threshold, found.threshold)
    assert counts["kept_out_l0"] is None
