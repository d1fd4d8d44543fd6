"""Weights of dimensions in the loss (arXiv 2506.15963): identities, and features that only the right weights find."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bench.methods import gamma_by, recovered
from sae_ray.errors import UsageError
from sae_ray.sae import BundleJob, Cell, CellJob, CellTrainer, TrainingConfig, load_sae, train_cells
from sae_ray.sae.architectures import ARCHITECTURES
from sae_ray.sae.architectures.jumprelu import JumpReLUSettings
from sae_ray.sae.auxk import auxk_loss
from sae_ray.sae.ranks import ALONE
from sae_ray.sae.weighing import Weighing, by_monosemanticity, by_variance, label_of, read_table, told
from sae_ray.store.files import Folder
from sae_ray.store.steps import Step

D_IN, BATCH = 12, 24
TRAINING = TrainingConfig(
    steps=40, batch_size=BATCH, learning_rate=3e-3, warmup_steps=3, threshold_start_step=3, threshold_beta=0.9,
    dead_after_samples=72,
)  # fmt: skip
OWN = {"jumprelu": JumpReLUSettings(bandwidth=0.1, initial_threshold=0.05)}
SELECTING = ("batch_topk", "matryoshka_batch_topk", "topk")
READING_ROWS = [name for name, kind in ARCHITECTURES.items() if not kind.standardises_rows and not kind.frozen]
"""As they are, which may be scaled by dimension. All of their weights have gradients."""


def make_cell(name: str, **settings) -> Cell:
    by = ARCHITECTURES[name].tuned_by
    amount = {by: {"k": 3, "sparsity": 0.02}[by]}
    return Cell(name, **{"expansion": 4, "training": TRAINING, "settings": OWN.get(name)} | amount | settings)


def make_batches(n: int) -> torch.Tensor:
    return torch.randn(n, BATCH, D_IN, generator=torch.Generator().manual_seed(1)) / 4 + 0.1


def some_gamma() -> torch.Tensor:
    return torch.from_numpy(Weighing.of(np.random.default_rng(0).uniform(0.1, 3, D_IN), 1.0).gamma).float()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_weights_of_one_change_no_bit(name: str):
    base = CellTrainer(make_cell(name), D_IN)
    weighted = CellTrainer(make_cell(name, weights="ms"), D_IN, gamma=torch.ones(D_IN))
    for batch in make_batches(30):
        assert weighted.step(batch) == pytest.approx(base.step(batch), rel=0, abs=0, nan_ok=True)
    assert not base.cell.kind.revives or bool(base._dead().any()), "AuxK took part"
    for (key, one), other in zip(base.state()[0].items(), weighted.state()[0].values(), strict=True):
        assert torch.equal(one.nan_to_num(-1), other.nan_to_num(-1)), key


def make_weighted(name: str, gamma: torch.Tensor) -> CellTrainer:
    """After some steps, so that encoder and decoder differ; then in float64."""
    trainer = CellTrainer(make_cell(name, weights="variance"), D_IN, gamma=gamma)
    for batch in make_batches(12):
        trainer.step(batch)
    for parameter in trainer.weights.named().values():
        parameter.data = parameter.data.double()
    trainer.architecture.gamma = gamma.double()
    return trainer


@pytest.mark.parametrize("name", READING_ROWS)
def test_the_loss_is_that_of_weighed_inputs_and_weights(name: str):
    """‖Γ(x - x̂)‖² = ‖Γx - Γx̂‖², with W_enc' = Γ⁻¹ W_enc, W_dec' = W_dec Γ, b_dec' = Γ b_dec; and so its gradients."""
    gamma = some_gamma().double()
    ours, theirs = (make_weighted(name, some_gamma()) for _ in range(2))
    weights, others = ours.weights, theirs.weights
    theirs.architecture.gamma = None
    others.W_dec.data *= gamma
    others.W_enc_t.data /= gamma
    others.b_dec.data *= gamma
    x = make_batches(13)[-1].double()
    weighed, plain = ours.architecture.forward(weights, x), theirs.architecture.forward(others, x * gamma)
    torch.testing.assert_close(weighed.reconstruction_loss, plain.reconstruction_loss, rtol=1e-9, atol=0)
    found = torch.autograd.grad(weighed.reconstruction_loss, [weights.W_dec, weights.W_enc_t, weights.b_dec])
    expected = torch.autograd.grad(plain.reconstruction_loss, [others.W_dec, others.W_enc_t, others.b_dec])
    for one, other, factor in zip(found, expected, (gamma, 1 / gamma, gamma), strict=True):
        torch.testing.assert_close(one.to_dense(), other.to_dense() * factor, rtol=0, atol=1e-9)
    # What others read is not weighed.
    torch.testing.assert_close(weighed.residual * gamma, plain.residual, rtol=0, atol=1e-9)
    assert torch.equal(weighed.fired, plain.fired)


@pytest.mark.parametrize("name", SELECTING)
def test_auxk_weighs_the_residual_and_its_variance(name: str):
    trainer = make_weighted(name, some_gamma())
    gamma, weights = some_gamma().double(), trainer.weights
    x, dead = make_batches(13)[-1].double(), torch.arange(trainer.d_sae) % 3 == 0
    forward = trainer.architecture.forward(weights, x)
    weighed = auxk_loss(weights, x, forward, dead, "pre", ALONE, gamma)
    # Written out: of the dead latents the strongest explain the residual, half as many as there are dimensions.
    pre = ((x - weights.b_dec) @ weights.W_enc_t.T + weights.b_enc).where(dead, -torch.inf)
    top = pre.topk(D_IN // 2, dim=1)
    explained = torch.zeros_like(pre).scatter(1, top.indices, top.values) @ weights.W_dec
    residual = forward.residual * gamma
    variance = (residual - residual.mean(0)).square().sum(1).mean()
    torch.testing.assert_close(weighed, (residual - explained * gamma).square().sum(1).mean() / variance)
    assert not torch.isclose(weighed, auxk_loss(weights, x, forward, dead, "pre", ALONE))


@pytest.mark.parametrize("name", READING_ROWS)
def test_a_dimension_of_weight_zero_gives_the_decoder_no_gradient(name: str):
    gamma = some_gamma()
    gamma[[2, 7]] = 0
    trainer = make_weighted(name, gamma)
    forward = trainer.architecture.forward(trainer.weights, make_batches(13)[-1].double())
    [gradient] = torch.autograd.grad(forward.reconstruction_loss, [trainer.weights.W_dec])
    columns = gradient.to_dense().abs().sum(0)
    assert (columns[gamma == 0] == 0).all()
    assert (columns[gamma > 0] > 0).all()


def test_weights_are_given_to_the_cells_that_have_some():
    for weights, gamma in (("uniform", some_gamma()), ("ms", None)):
        with pytest.raises(UsageError, match=f"cell.weights = '{weights}': give gamma"):
            CellTrainer(make_cell("topk", weights=weights), D_IN, gamma=gamma)


# What dimensions count by


@given(st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=30), st.floats(0, 3))
def test_weights_rise_with_what_counts_and_have_a_mean_square_of_one(s: list[float], alpha: float):
    gamma = Weighing.of(np.array(sorted(s)), alpha).gamma
    assert np.square(gamma).mean() == pytest.approx(1)
    assert (np.diff(gamma) >= 0).all()
    np.testing.assert_allclose(Weighing.of(7 * np.array(sorted(s)), alpha).gamma, gamma, rtol=1e-9)


def test_by_what_dimensions_count():
    variances = np.array([4.0, 1.0, 0.25])
    scaled = Weighing.of(by_variance("inverse_variance", variances), 0.5).gamma * np.sqrt(variances)
    np.testing.assert_allclose(scaled, scaled[0], rtol=1e-5)
    assert Weighing.of(by_variance("variance", variances), 1.0).ratio == pytest.approx(16, rel=1e-4)
    assert Weighing.of(by_variance("inverse_variance", np.array([1.0, 0.0])), 0.5).ratio < 2000, "a constant coordinate"
    assert Weighing.of(by_variance("inverse_variance", np.zeros(3)), 0.5).ratio == 1
    np.testing.assert_allclose(by_monosemanticity(np.array([0.2, np.nan, -0.1, 0.1])), [0.2, 0.002, 0.002, 0.1])
    with pytest.raises(UsageError, match="finite, 0 or more, and not 0 for all"):
        Weighing.of(np.zeros(3), 0.5)


def test_weights_that_change_nothing_are_told():
    assert told(Weighing.of(np.array([1.0, 2.0]), 1.0).ratio) == "max γ / min γ = 2"
    of_clip = np.random.default_rng(0).normal(0.0135, 0.0003, 512)  # MonoSemanticity of its raw coordinates
    assert "below 1.1 this is nearly the SAE without weights" in told(Weighing.of(of_clip, 0.5).ratio)
    assert Weighing.of(np.array([0.0, 1.0]), 1.0).ratio == float("inf")


def test_names_of_weighted_cells_tell_them_apart():
    assert label_of("ms", 0.5, 0.5) == "weights.ms"
    assert label_of("/some/where/ranks.parquet", 1.0, 0.5) == "weights.ranks.1"
    in_store = "s3://key:secret@bucket/ranks.parquet?endpoint_override=http%3A%2F%2F10.0.0.1"
    assert label_of(in_store, 0.5, 0.5) == "weights.ranks"


@pytest.mark.parametrize(
    ("columns", "problem"),
    [
        ({"dimension": [0, 1], "weight": [1.0, 2.0]}, "cannot be read"),
        ({"dimension": [0, 1], "s": ["a", "b"]}, "cannot be read"),
        ({"dimension": [0, 2], "s": [1.0, 2.0]}, "has other values"),
        ({"dimension": [0, 1], "s": [1.0, -2.0]}, "has other values"),
        ({"dimension": [0, 1], "s": [1.0, None]}, "has other values"),
        ({"dimension": [0, 1], "s": [0.0, 0.0]}, "has other values"),
    ],
)
def test_a_table_of_another_form_is_refused(tmp_path: Path, columns: dict, problem: str):
    pq.write_table(pa.table(columns), tmp_path / "table.parquet")
    with pytest.raises(UsageError, match=f"{problem}.*give a parquet table with the columns dimension"):
        read_table(str(tmp_path / "table.parquet"))


def test_a_file_that_is_no_table_is_refused(tmp_path: Path):
    (tmp_path / "table.parquet").write_text("s\n1\n")
    for name in ("table.parquet", "nowhere.parquet"):
        with pytest.raises(UsageError, match="cannot be read"):
            read_table(str(tmp_path / name))


# Training


def test_a_bundle_mixes_weighted_cells_and_others(write_store, tmp_path: Path):
    """What a weighted SAE was trained with lies beside it, and can be given to the next one."""
    rng = np.random.default_rng(0)
    scales = np.linspace(0.2, 2, D_IN)
    values = (rng.normal(size=(160, D_IN)) * scales).astype("f4")
    parts = [(np.arange(80) + 80 * n, np.zeros(80), values[80 * n : 80 * n + 80]) for n in range(2)]
    store = write_store(tmp_path / "activations", parts)
    cells = [make_cell("batch_topk", weights=name) for name in ("uniform", "variance", "inverse_variance", "ms")]
    given = [None, None, None, tuple(np.arange(1.0, D_IN + 1))]
    jobs = [
        CellJob(Step(Folder(tmp_path / "root"), "train", f"sae-{cell.weights}", {}), cell, significance=s)
        for cell, s in zip(cells, given, strict=True)
    ]
    train_cells(BundleJob(store.folder, tuple(jobs), stream_seed=5, shuffle_rows=100, checkpoint_every=20))
    assert not jobs[0].step.folder.exists("weights.parquet")
    expected = Weighing.of(by_variance("inverse_variance", values.astype("f8").var(0)), 0.5)
    table = jobs[2].step.folder.read_parquet("weights.parquet")
    assert table["dimension"].to_pylist() == list(range(D_IN))
    np.testing.assert_allclose(table["gamma"].to_numpy(), expected.gamma, rtol=1e-6)
    record = jobs[2].step.record()
    assert record is not None
    assert record["counts"]["gamma_ratio"] == pytest.approx(expected.ratio)
    np.testing.assert_array_equal(read_table(str(tmp_path / "root" / jobs[3].step.name / "weights.parquet")), given[3])

    def errors(job: CellJob) -> np.ndarray:
        """Of every coordinate, relative to its variance."""
        x, sae = torch.from_numpy(values), load_sae(job.step.folder)
        return (x - sae.decode(sae.encode(x))).square().mean(0).numpy() / scales**2

    by_variances, by_inverse = errors(jobs[1]), errors(jobs[2])
    assert by_inverse[:3].mean() < by_variances[:3].mean(), "small coordinates count more"
    assert by_inverse[-3:].mean() > by_variances[-3:].mean()


def test_the_right_weights_find_features_that_noise_hides():
    """Those of noisy dimensions are small; the other way round they hide more."""
    noise = torch.tensor([0.03] * 16 + [0.6] * 16)
    uniform, right, wrong = (
        recovered(0, 48, noise, gamma, 200) for gamma in (None, gamma_by(1 / (noise + 0.1)), gamma_by(noise + 0.1))
    )
    assert right > uniform + 0.1
    assert wrong < uniform - 0.05


@pytest.mark.slow
def test_features_are_found_as_well_as_known():
    """Sizes of effect that another implementation of these formulas has."""
    noise = torch.tensor([0.03] * 16 + [0.6] * 16)
    uniform, right, wrong = (
        sum(recovered(seed, 48, noise, gamma, 1200) for seed in range(4)) / 4
        for gamma in (None, gamma_by(1 / (noise + 0.1)), gamma_by(noise + 0.1))
    )
    assert right > uniform + 0.03
    assert wrong < 0.7
    assert recovered(0, 64, torch.zeros(32), None, 3000) > 0.93
