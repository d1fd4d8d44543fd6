"""Data of which nothing can be learnt: all zero, all equal, hardly any. Training, evaluation and scoring give a result
or name the cause."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from sae_ray.sae import BundleJob, Cell, CellJob, TrainingConfig, evaluate_store, load_sae, train_cells
from sae_ray.sae.architectures import ARCHITECTURES
from sae_ray.scores.scoring import score_store
from sae_ray.scores.tables import ScoreTables, write_tables
from sae_ray.store.activations import ActivationStore
from sae_ray.store.files import Folder
from sae_ray.store.steps import Step

TRAINING = TrainingConfig(steps=12, batch_size=16, warmup_steps=2, threshold_start_step=3, dead_after_samples=32)
D_IN = 8


def rows(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, D_IN)).astype("f4")


DATA = {
    "one image": rows(1),
    "two equal images": rows(1).repeat(2, 0),
    "all equal": rows(1).repeat(100, 0),
    "all equal, small and large": np.array([[1e-20, 1e20] * (D_IN // 2)] * 100, "f4"),
    "fewer rows than a batch": rows(5),
    "all 0 but one": np.concatenate([rows(1), np.zeros((99, D_IN), "f4")]),  # the last of ten is not trained on
    "one direction": rows(1) * rows(100)[:, :1],
}


@pytest.fixture
def store_of(write_store, tmp_path):
    def make(activation: np.ndarray, label: str = "activations") -> ActivationStore:
        index = np.arange(len(activation))
        return write_store(tmp_path, [(index, np.zeros_like(index), activation)], label=label)

    return make


def trained(store: ActivationStore, name: str, root: Path, training: TrainingConfig = TRAINING) -> Step:
    tuned = {"k": 2} if ARCHITECTURES[name].tuned_by == "k" else {"sparsity": 0.01}
    job = CellJob(Step(Folder(root), "train", "sae", {}), Cell(name, 4, training=training, **tuned))
    train_cells(BundleJob(store.folder, (job,), stream_seed=0, shuffle_rows=1000, checkpoint_every=100))
    return job.step


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("data", DATA)
def test_hardly_any_data_gives_a_result_or_the_cause(store_of, tmp_path, data, name):
    store = store_of(DATA[data])
    step = trained(store, name, tmp_path)
    if step.failure:
        assert "equal" in data or data == "one image"
        assert f"all {store.n_rows} activations of this site are equal" in step.failure
        return
    sae = load_sae(step.folder)
    found = evaluate_store(sae, store).summary()
    assert math.isfinite(found.nmse)
    assert math.isnan(found.r2) == (len(np.unique(DATA[data], axis=0)) == 1), "nothing varies, so nothing is explained"
    judge = store_of(rows(store.n_images, seed=1), "judge")
    for scored in (sae, None):
        write_tables(Folder(tmp_path / "scores"), score_store(scored, store, judge, 3))
        scores = ScoreTables(Folder(tmp_path / "scores")).scores
        assert np.isnan(scores.ms[scores.n_active < 2]).all()
        assert (np.abs(scores.ms[scores.n_active >= 2]) <= 1 + 1e-9).all()


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize(
    ("activation", "said"),
    [
        (np.zeros((100, D_IN), "f4"), "all 100 activations of this site are 0, so there is nothing to learn"),
        (np.full((100, D_IN), 1e-42, "f4"), "all 100 activations of this site are 0"),
        (np.zeros((0, D_IN), "f4"), "this site has no activations: no image could be read"),
    ],
    ids=["all 0", "all 0 but for rounding", "none"],
)
def test_nothing_to_learn_is_named_as_the_cause(store_of, tmp_path, activation, said, name):
    failure = trained(store_of(activation), name, tmp_path).failure
    assert failure is not None
    assert failure.startswith(said)


def test_equal_activations_are_named_where_no_latent_ever_fires(store_of, tmp_path):
    # The mean of two equal rows is exact: the bias is the activation itself, and every pre-activation 0.
    pairs = replace(TRAINING, batch_size=2)
    failure = trained(store_of(rows(1).repeat(100, 0)), "batch_topk", tmp_path, pairs).failure
    assert failure is not None
    assert failure.startswith("all 100 activations of this site are equal, so that nothing is left")
    assert "no inference threshold has been estimated" in failure
