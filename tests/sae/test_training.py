"""The training step: the traps that other libraries fell into, one test each."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load, save

from sae_ray.errors import SaeRayError, UsageError
from sae_ray.sae import Cell, CellTrainer, NonFiniteLoss, TrainingConfig
from sae_ray.sae.architectures import ARCHITECTURES
from sae_ray.sae.architectures.jumprelu import JumpReLUSettings
from sae_ray.sae.architectures.matryoshka_batch_topk import MatryoshkaSettings
from sae_ray.sae.training import geometric_median

D_IN, EXPANSION, K, BATCH = 16, 4, 3, 32
TRAINING = TrainingConfig(
    steps=60, batch_size=BATCH, learning_rate=3e-3, warmup_steps=5, decay_start=40, threshold_start_step=3,
    threshold_beta=0.9, dead_after_samples=96,
)  # fmt: skip
TRAINED = [name for name in ARCHITECTURES if name != "random"]
OWN = {"jumprelu": JumpReLUSettings(bandwidth=0.1, initial_threshold=0.05)}


def make_cell(name: str, training: TrainingConfig = TRAINING, **settings) -> Cell:
    by = ARCHITECTURES[name].tuned_by
    given = {
        "expansion": EXPANSION,
        "training": training,
        "settings": OWN.get(name),
        by: {"k": K, "sparsity": 0.02}[by],
    }
    return Cell(name, **given | settings)


def make_batches(n: int, seed: int = 0) -> list[torch.Tensor]:
    """Sparse mixtures of fixed directions, about unit norm."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(24, D_IN, generator=generator)
    amounts = torch.rand(n, BATCH, 24, generator=generator) * (torch.rand(n, BATCH, 24, generator=generator) < 0.15)
    return list(amounts @ directions / 4 + 0.1)


def run(trainer: CellTrainer, batches: list[torch.Tensor]) -> list:
    return [trainer.step(batch) for batch in batches]


def assert_equal_states(left: CellTrainer, right: CellTrainer) -> None:
    (tensors, facts), (others, other_facts) = left.state(), right.state()
    assert tensors.keys() == others.keys()
    for name, value in tensors.items():
        assert torch.equal(value.nan_to_num(-1), others[name].nan_to_num(-1)), name
    assert facts["n_steps"] == other_facts["n_steps"]


@pytest.mark.parametrize("name", TRAINED)
def test_training_lowers_the_loss_and_keeps_decoder_rows_at_unit_norm(name: str):
    trainer = CellTrainer(make_cell(name), D_IN)
    metrics = run(trainer, make_batches(60))
    # The means of rows, which explain a part, need not be learnt where rows are standardised.
    left = 0.8 if trainer.architecture.standardises_rows else 0.7
    assert metrics[-1].reconstruction_loss < left * metrics[0].reconstruction_loss
    norms = trainer.weights.W_dec.detach().norm(dim=1)
    assert torch.allclose(norms, torch.ones_like(norms)) == trainer.architecture.unit_decoder
    assert not torch.equal(trainer.weights.W_enc_t, trainer.weights.W_dec)
    if trainer.weights.threshold is not None:
        assert trainer.weights.threshold.detach().std() > 0
        assert trainer.weights.threshold.min() >= 0


def test_start_is_the_geometric_median_and_a_tied_encoder():
    trainer = CellTrainer(make_cell("batch_topk"), D_IN)
    assert torch.equal(trainer.weights.W_enc_t, trainer.weights.W_dec)
    outlier = torch.cat([torch.randn(99, D_IN) * 1e-3 + 1, torch.full((1, D_IN), 1e4)])
    trainer.step(outlier)  # the first step of a warm-up has learning rate 0
    torch.testing.assert_close(trainer.weights.b_dec.detach(), torch.ones(D_IN), atol=0.01, rtol=0)
    assert torch.equal(trainer.weights.b_dec, geometric_median(outlier))


@pytest.mark.parametrize("name", [name for name, kind in ARCHITECTURES.items() if kind.frozen])
def test_frozen_weights_stay_as_they_were(name: str):
    """But for `b_dec`, which starts from the first batch."""
    trainer, start = (CellTrainer(make_cell(name), D_IN) for _ in range(2))
    first, *batches = make_batches(60)
    trainer.step(first)
    start.weights.b_dec.data.copy_(geometric_median(first))
    run(trainer, batches)
    assert trainer.report() == []
    for weight, value in trainer.weights.named().items():
        assert torch.equal(value, start.weights.named()[weight]) == (weight in ARCHITECTURES[name].frozen), weight


def test_an_untrained_sae_is_that_of_the_first_step():
    """`random` differs from BatchTopK in that it stays there."""
    batches = make_batches(30)
    trainer, other = CellTrainer(make_cell("random"), D_IN), CellTrainer(make_cell("batch_topk"), D_IN)
    assert [step.reconstruction_loss for step in run(trainer, batches[:1])] == [
        step.reconstruction_loss for step in run(other, batches[:1])
    ]
    metrics = run(trainer, batches[1:])
    assert all(step.gradient_norm == 0 and step.l0 == K for step in metrics)
    assert trainer.export(1.0).threshold.min() > 0


def test_initial_weights_follow_the_seed_alone():
    one, same, other = (CellTrainer(make_cell("topk", seed=seed), D_IN).weights.W_dec for seed in (1, 1, 2))
    torch.rand(3)
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_single_prefix_matryoshka_equals_batch_topk():
    matryoshka = CellTrainer(make_cell("matryoshka_batch_topk", settings=MatryoshkaSettings((1.0,))), D_IN)
    batch_topk = CellTrainer(make_cell("batch_topk"), D_IN)
    assert run(matryoshka, make_batches(40))[10:] == run(batch_topk, make_batches(40))[10:]
    assert matryoshka.samples_since_fired.max() >= TRAINING.dead_after_samples, "AuxK took part"
    assert_equal_states(matryoshka, batch_topk)


def test_cells_trained_together_equal_cells_trained_alone():
    cells = [
        make_cell("batch_topk"),
        make_cell("matryoshka_batch_topk", expansion=2, k=5, seed=4),
        make_cell("topk", replace(TRAINING, gradient_clip=0.05)),
        make_cell("jumprelu"),
        make_cell("relu"),
    ]
    batches = make_batches(20)
    together = [CellTrainer(cell, D_IN) for cell in cells]
    for batch in batches:
        for trainer in together:
            trainer.step(batch)
    for cell, trainer in zip(cells, together, strict=True):
        alone = CellTrainer(cell, D_IN)
        run(alone, batches)
        assert_equal_states(alone, trainer)


def test_each_cell_has_the_learning_rate_of_its_own_width():
    training = replace(TRAINING, learning_rate=None)
    narrow, wide = (CellTrainer(make_cell("batch_topk", training, expansion=e), D_IN) for e in (2, 8))
    batches = make_batches(60)
    rates = [[m.learning_rate for m in run(trainer, batches)] for trainer in (narrow, wide)]
    peak = 2e-4 / math.sqrt(2 * D_IN / 2**14)
    assert rates[0] == pytest.approx([peak * min(1, s / 5) * min(1, (60 - s) / 20) for s in range(60)])
    assert rates[0] == pytest.approx([2 * rate for rate in rates[1]])


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("saved_at", [0, 1, 25])
def test_resume_equals_the_uninterrupted_run(name: str, saved_at: int):
    batches = make_batches(50)
    uninterrupted = CellTrainer(make_cell(name), D_IN)
    run(uninterrupted, batches)
    first = CellTrainer(make_cell(name), D_IN)
    run(first, batches[:saved_at])
    tensors, facts = first.state()
    saved = save(tensors), json.dumps(facts)
    run(first, batches[saved_at : saved_at + 1])  # lost with the worker
    resumed = CellTrainer(make_cell(name), D_IN)
    resumed.restore(load(saved[0]), json.loads(saved[1]))
    run(resumed, batches[saved_at:])
    assert_equal_states(resumed, uninterrupted)


def test_state_of_another_cell_is_refused():
    state = CellTrainer(make_cell("batch_topk"), D_IN).state()
    with pytest.raises(UsageError, match="another cell"):
        CellTrainer(make_cell("batch_topk", seed=1), D_IN).restore(*state)
    older = {name: tensor for name, tensor in state[0].items() if name not in ("revivals", "ever_fired")}
    with pytest.raises(UsageError, match="lacks ever_fired, revivals: an earlier sae-ray wrote it; delete it"):
        CellTrainer(make_cell("batch_topk"), D_IN).restore(older, state[1])
    # What BatchTopK ignores does not make it another cell.
    CellTrainer(make_cell("batch_topk", replace(TRAINING, sparsity_warmup_steps=7)), D_IN).restore(*state)


@pytest.mark.parametrize("name", ["batch_topk", "matryoshka_batch_topk", "topk"])
def test_fewer_positive_values_than_k(name: str):
    trainer = CellTrainer(make_cell(name, expansion=1, k=16), D_IN)
    metrics = run(trainer, make_batches(10))
    assert all(0 < m.l0 < 16 and math.isfinite(m.loss) for m in metrics)


@pytest.mark.parametrize("name", [name for name, kind in ARCHITECTURES.items() if not kind.codes_below_1])
def test_no_positive_value_at_all(name: str):
    trainer = CellTrainer(make_cell(name), D_IN)
    trainer.weights.b_enc.data.fill_(-100)
    metrics = run(trainer, make_batches(10))
    assert all(m.l0 == 0 and math.isfinite(m.loss) for m in metrics)
    assert metrics[-1].n_dead == trainer.d_sae
    assert trainer.threshold.isnan()
    if trainer.architecture.estimates_threshold:
        with pytest.raises(SaeRayError, match="no inference threshold"):
            trainer.export(1.0)
    else:
        assert trainer.export(1.0).encode_sparse(make_batches(1)[0]).values.numel() == 0


def test_threshold_is_a_moving_average_that_starts_at_its_first_value():
    trainer = CellTrainer(make_cell("batch_topk"), D_IN)
    expected, seen = math.nan, []
    for step, batch in enumerate(make_batches(12)):
        if step == 0:
            trainer.step(batch)
            continue
        smallest = trainer.architecture.forward(trainer.weights, batch).smallest_active.item()
        if step > TRAINING.threshold_start_step:
            expected = smallest if math.isnan(expected) else 0.9 * expected + 0.1 * smallest
        seen.append((trainer.step(batch).threshold, expected))
    assert all(math.isnan(t) and math.isnan(e) for t, e in seen[:3])
    assert [t for t, _ in seen[3:]] == pytest.approx([e for _, e in seen[3:]])
    assert seen[3][0] > 0


def test_batches_without_a_positive_value_leave_the_threshold_alone():
    trainer = CellTrainer(make_cell("batch_topk"), D_IN)
    batches = make_batches(12)
    run(trainer, batches)
    before = trainer.threshold.clone()
    trainer.weights.b_enc.data.fill_(-100)
    trainer.step(batches[0])
    assert torch.equal(trainer.threshold, before)


def test_evaluation_never_moves_the_threshold_nor_anything_else():
    trainer, untouched = (CellTrainer(make_cell("batch_topk"), D_IN) for _ in range(2))
    for batch in make_batches(20):
        trainer.step(batch)
        untouched.step(batch)
        if trainer.n_steps > 5:
            sae = trainer.export(2.0)
            sae.decode(sae.encode_sparse(100 * batch))
            sae.W_enc.zero_()
    assert_equal_states(trainer, untouched)


def dead_trainer(select: str) -> tuple[CellTrainer, torch.Tensor]:
    """All latents from 32 on are dead; 32-47 have small positive values, 48-63 are negative everywhere."""
    training = replace(TRAINING, warmup_steps=0, auxk_select=select)
    trainer = CellTrainer(make_cell("batch_topk", training), D_IN)
    weights = trainer.weights
    weights.W_enc_t.data[32:] *= 1e-2
    weights.b_enc.data[32:48] = 0.05
    weights.b_enc.data[48:] = -0.05
    trainer.samples_since_fired[32:] = TRAINING.dead_after_samples
    return trainer, make_batches(1)[0]


@pytest.mark.parametrize(("select", "weight", "first_moved"), [("post", 0.03, 32), ("pre", 0.03, 32), ("post", 0, 64)])
def test_auxk_reaches_the_encoder_of_dead_latents(select: str, weight: float, first_moved: int):
    trainer, batch = dead_trainer(select)
    trainer.cell = replace(trainer.cell, training=replace(trainer.cell.training, auxk_weight=weight))
    before = trainer.weights.W_enc_t.detach().clone()
    metrics = trainer.step(batch)
    assert metrics.n_dead == 32
    assert (metrics.auxk_loss > 0) == (weight > 0)
    moved = (trainer.weights.W_enc_t.detach() != before).any(1)
    assert moved[32:48].any() == (first_moved == 32)
    assert not moved[48:].any(), "16 // 2 latents per sample, and all of 32-47 are stronger"


@pytest.mark.parametrize(("select", "revives"), [("post", False), ("pre", True)])
def test_latents_that_are_negative_everywhere_are_revived_by_pre_only(select: str, revives: bool):
    trainer, batch = dead_trainer(select)
    trainer.samples_since_fired[32:48] = 0
    before = trainer.weights.W_enc_t.detach().clone()
    assert trainer.step(batch).n_dead == 16
    assert (trainer.weights.W_enc_t.detach() != before)[48:].any() == revives


@pytest.mark.parametrize(("name", "select"), [("batch_topk", "post"), ("topk", "pre")])
def test_it_is_known_why_latents_are_dead(name: str, select: str):
    """Against a plain count, latent by latent."""
    trainer = CellTrainer(make_cell(name, replace(TRAINING, auxk_select=select, learning_rate=1e-2), k=1), D_IN)
    silent, ever, revivals = [0] * trainer.d_sae, [False] * trainer.d_sae, [0] * trainer.d_sae
    for batch in make_batches(60):
        if trainer.n_steps == 0:
            trainer.weights.b_dec.data.copy_(geometric_median(batch))
        fired = trainer.architecture.forward(trainer.weights, batch).fired.tolist()
        for latent in range(trainer.d_sae):
            revivals[latent] += fired[latent] and silent[latent] >= TRAINING.dead_after_samples
            silent[latent] = 0 if fired[latent] else silent[latent] + BATCH
            ever[latent] |= fired[latent]
        n_dead = trainer.step(batch).n_dead
    dead = [samples >= TRAINING.dead_after_samples for samples in silent]
    never = sum(not one for one in ever)
    revived = sum(count > 0 and not gone for count, gone in zip(revivals, dead, strict=True))
    assert trainer.deaths() == (never, n_dead - never, revived, sum(revivals))
    assert n_dead == sum(dead)
    assert min(never, n_dead - never, revived) > 0, "all of it happened"


def test_the_parallel_gradient_is_removed_before_clipping():
    training = replace(TRAINING, warmup_steps=0, gradient_clip=1e-3, auxk_weight=0)
    trainer = CellTrainer(make_cell("batch_topk", training), D_IN)
    batch = make_batches(1)[0]
    probe = CellTrainer(make_cell("batch_topk", training), D_IN)
    probe.weights.b_dec.data.copy_(geometric_median(batch))
    loss = probe.architecture.forward(probe.weights, batch).reconstruction_loss
    named = probe.weights.named()
    found = torch.autograd.grad(loss, list(named.values()))
    gradients = {name: gradient.to_dense() for name, gradient in zip(named, found, strict=True)}
    W_dec = probe.weights.W_dec.detach()
    gradients["W_dec"] = gradients["W_dec"] - (gradients["W_dec"] * W_dec).sum(1, keepdim=True) * W_dec
    norm = torch.cat([g.flatten() for g in gradients.values()]).norm()
    assert trainer.step(batch).gradient_norm == pytest.approx(norm.item())
    first_moment = trainer.optimizer.state[trainer.weights.W_dec]["exp_avg"]
    torch.testing.assert_close(first_moment, 0.1 * gradients["W_dec"] * 1e-3 / norm)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_bfloat16_keeps_float32_masters_and_moments(name: str):
    trainer = CellTrainer(make_cell(name, replace(TRAINING, dtype="bfloat16")), D_IN)
    exact = CellTrainer(make_cell(name), D_IN)
    batches = make_batches(30)
    rough, precise = run(trainer, batches)[-1], run(exact, batches)[-1]
    assert rough.loss != precise.loss
    assert rough.loss == pytest.approx(precise.loss, rel=0.1)
    tensors, _ = trainer.state()
    counted = ("samples_since_fired", "revivals", "ever_fired")
    assert {t.dtype for n, t in tensors.items() if n not in counted} == {torch.float32}
    unrounded = trainer.weights.W_enc_t.detach()
    assert not torch.equal(unrounded, unrounded.bfloat16().float())


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e30])
def test_a_loss_that_is_not_finite_stops_its_cell_alone(bad: float):
    failing, other, alone = (CellTrainer(make_cell("batch_topk"), D_IN) for _ in range(3))
    batches = make_batches(10)
    for trainer in (failing, other, alone):
        run(trainer, batches[:8])
    before, _ = failing.state()
    poisoned = batches[8].clone()
    poisoned[3, 2] = bad
    with pytest.raises(NonFiniteLoss, match="step 8"):
        failing.step(poisoned)
    assert failing.failed is not None
    with pytest.raises(NonFiniteLoss, match="step 8"):
        failing.step(batches[8])
    for name, parameter in failing.weights.named().items():
        assert torch.equal(parameter, before[name])
    run(other, batches[8:])
    run(alone, batches[8:])
    assert_equal_states(other, alone)


def test_sparsity_coefficient_warms_up():
    cell = make_cell("relu", replace(TRAINING, sparsity_warmup_steps=20), sparsity=0.5)
    for metrics in run(CellTrainer(cell, D_IN), make_batches(30)):
        coefficient = 0.5 * min(1, metrics.step / 20)
        assert metrics.loss == pytest.approx(metrics.reconstruction_loss + coefficient * metrics.sparsity_penalty)


@pytest.mark.parametrize("shape", [(BATCH, D_IN + 1), (4, BATCH, D_IN), (D_IN,)])
def test_batches_of_another_shape_are_refused(shape: tuple[int, ...]):
    with pytest.raises(UsageError, match=r"\[batch, 16\]"):
        CellTrainer(make_cell("batch_topk"), D_IN).step(torch.zeros(shape))
