"""Training on a GPU: kernels at sizes that fill it compute what they should, and trainers do what they do on a CPU."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from sae_ray.sae import Cell, CellTrainer, NonFiniteLoss, StepMetrics, TrainingConfig, train_sae
from sae_ray.sae.architectures import ARCHITECTURES
from sae_ray.sae.architectures.jumprelu import JumpReLUSettings
from sae_ray.sae.optimizer import RowAdam, RowGradient, adam_scalars
from sae_ray.sae.selection import largest_positive, largest_positive_per_row, padded_largest
from sae_ray.sae.sparse import PaddedPattern, Pattern
from tests.sae.test_selection import over_ranks, sorted_selection

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
ROWS, D_IN, D_SAE, K = 512, 1024, 8192, 20

# Losses of two devices: the same sums in another order, then 60 steps on which they act.
CLOSE = {"float32": 1e-3, "tf32": 1e-2, "bfloat16": 2e-2}
SMALL = TrainingConfig(
    steps=150, batch_size=256, learning_rate=1e-3, warmup_steps=10, decay_start=100, threshold_start_step=5,
    threshold_beta=0.9, dead_after_samples=256,
)  # fmt: skip
SELECTING = [name for name, kind in ARCHITECTURES.items() if kind.revives]


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def make_cell(name: str, training: TrainingConfig = SMALL) -> Cell:
    settings = JumpReLUSettings(bandwidth=0.1, initial_threshold=0.05) if name == "jumprelu" else None
    amount = {"k": {"k": 8}, "sparsity": {"sparsity": 0.01}}[ARCHITECTURES[name].tuned_by]
    return Cell(name, 8, training=training, settings=settings, **amount)


def make_batches(n: int) -> torch.Tensor:
    """Sparse mixtures of fixed directions, of unit mean square."""
    generator = torch.Generator().manual_seed(1)
    directions = torch.randn(256, 64, generator=generator)
    amounts = torch.rand(n, SMALL.batch_size, 256, generator=generator)
    batches = (amounts * (amounts > 0.97)) @ directions
    return batches / batches.square().sum(-1).mean().sqrt()


def trainer_of(cell: Cell, device: str = DEVICE) -> CellTrainer:
    return CellTrainer(cell, 64, device, concepts=("odd", "even") if cell.guided else ())


def targets_of(batch: torch.Tensor) -> torch.Tensor:
    """Two concepts, which are not known of every row."""
    shown = (batch[:, :2] > 0).float()
    return shown.masked_fill(batch[:, 2:4] > 0.05, math.nan)


def trained(cell: Cell, batches: torch.Tensor, device: str = DEVICE) -> tuple[CellTrainer, list[StepMetrics]]:
    trainer = trainer_of(cell, device)
    return trainer, [trainer.step(batch, targets_of(batch) if cell.guided else None) for batch in batches.to(device)]


def assert_equal_states(left: CellTrainer, right: CellTrainer) -> None:
    for (name, value), other in zip(left.state()[0].items(), right.state()[0].values(), strict=True):
        assert torch.equal(value.nan_to_num(-1), other.nan_to_num(-1)), name


def ties(*shape: int) -> torch.Tensor:
    return torch.randint(-3, 4, shape, generator=torch.Generator().manual_seed(2)).float().to(DEVICE)


@pytest.mark.parametrize(
    "matrix_of", [normal, ties, lambda *shape: normal(*shape) - 3.5, lambda *shape: -ties(*shape).abs()]
)
def test_the_selection_is_what_sorting_gives(matrix_of):
    """Whatever the guess: below so many values that the kernel has no room for them, right, and above all."""
    matrix, count = matrix_of(ROWS, D_SAE), K * ROWS
    expected = sorted_selection(matrix, count)
    smallest = matrix.flatten()[expected].min().item() if len(expected) else 1.0
    for guess in (0.0, 1e-6, 0.5 * smallest, 0.9 * smallest, smallest, 1e6):
        assert torch.equal(largest_positive(matrix, count, guess), expected)
    padded, values = padded_largest(matrix.view(1, -1), count)
    assert torch.equal(values[: len(expected)], matrix.flatten()[expected])
    assert torch.equal(padded[: len(expected)], expected)
    assert (padded[len(expected) :] == matrix.numel()).all()
    for size in (2, 8):
        assert torch.equal(over_ranks(size, matrix, count, 0.9 * smallest), expected)
    per_row = torch.cat([sorted_selection(row, K) + number * D_SAE for number, row in enumerate(matrix)])
    assert torch.equal(largest_positive_per_row(matrix, K), per_row)
    assert torch.equal(padded_largest(matrix, K)[0][: len(per_row)], per_row)


def test_sums_and_dots_equal_those_in_float64():
    """One latent is active in every row, one in none, one row has no latent."""
    there = normal(ROWS, D_SAE, seed=3) > 2.8
    there[:, 7], there[:, 5], there[3] = True, False, False
    pattern = Pattern.of_flat(there.flatten().nonzero().squeeze(1), ROWS, D_SAE)
    values, left, right = normal(len(pattern.rows), seed=4), normal(ROWS, D_IN, seed=5), normal(D_SAE, D_IN, seed=6)
    dense = values.new_zeros(ROWS, D_SAE).double()
    dense[pattern.rows, pattern.latents] = values.double()

    def close(ours: torch.Tensor, exact: torch.Tensor) -> None:
        assert (ours - exact).norm() < 1e-6 * exact.norm()

    close(pattern.row_sums(values, right), dense @ right.double())
    close(pattern.latent_sums(values, left), (dense.T @ left.double())[pattern.used])
    close(pattern.dots(left, right), (left.double() @ right.double().T)[pattern.rows, pattern.latents])
    flat = pattern.rows * D_SAE + pattern.latents
    padded = PaddedPattern.of_flat(F.pad(flat, (0, 9), value=dense.numel()), ROWS, D_SAE)
    close(padded.latent_sums(F.pad(values, (0, 9), value=1.0), left), dense.T @ left.double())
    assert torch.equal(pattern.latent_sums(values, left), pattern.latent_sums(values, left))


def test_adam_is_that_of_torch():
    trainer = CellTrainer(Cell("batch_topk", D_SAE / D_IN, k=K), D_IN, DEVICE)
    weights, adam = trainer.weights, RowAdam(trainer.weights)
    theirs = torch.nn.Parameter(weights.W_enc_t.detach().double())
    optimizer = torch.optim.Adam([theirs], lr=1e-3)
    every = {name: RowGradient(torch.arange(len(value), device=DEVICE), torch.zeros_like(value))
             for name, value in weights.named().items()}  # fmt: skip
    for number in range(1, 21):
        values = normal(D_SAE, D_IN, seed=100 + number)
        values[normal(D_SAE, seed=number) < 0.5] = 0
        scalars = torch.tensor([*adam_scalars(number, 1e-3), 0.5, 1.0], device=DEVICE)
        adam.step_with_kernels({**every, "W_enc_t": RowGradient(every["W_enc_t"].rows, values)}, scalars)
        theirs.grad = values.double() / 2
        optimizer.step()
    torch.testing.assert_close(weights.W_enc_t.double(), theirs, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(weights.W_dec.norm(dim=1), torch.ones(D_SAE, device=DEVICE))


@pytest.mark.parametrize("dtype", CLOSE)
@pytest.mark.parametrize(
    ("name", "select"), [*((name, "post") for name in ARCHITECTURES), *((name, "pre") for name in SELECTING)]
)
def test_it_trains_as_a_cpu_does(name: str, select, dtype):
    cell = make_cell(name, replace(SMALL, auxk_select=select, dtype=dtype))
    batches = make_batches(60)
    (ours, seen), (_, expected) = trained(cell, batches), trained(cell, batches, "cpu")
    for field in ("loss", "reconstruction_loss", "sparsity_penalty", "concept_loss", "l0"):
        left, right = (torch.tensor([getattr(one, field) for one in metrics]) for metrics in (seen, expected))
        torch.testing.assert_close(left, right, rtol=CLOSE[dtype], atol=1e-6)
    if name in SELECTING:
        assert max(one.auxk_loss for one in seen) > 0, "AuxK took part"
    if cell.kind.unit_decoder:
        norms = ours.weights.W_dec.detach().norm(dim=1)
        torch.testing.assert_close(norms, torch.ones_like(norms))


@pytest.mark.parametrize("dtype", CLOSE)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_run_gives_the_same_bits_again_and_from_a_state(name: str, dtype):
    cell, batches = make_cell(name, replace(SMALL, dtype=dtype)), make_batches(50)
    whole, _ = trained(cell, batches)
    again, _ = trained(cell, batches)
    assert_equal_states(whole, again)
    stopped, _ = trained(cell, batches[:30])
    resumed = trainer_of(cell)
    resumed.restore(*stopped.state())
    for batch in batches[30:].to(DEVICE):
        resumed.step(batch, targets_of(batch) if cell.guided else None)
    assert_equal_states(whole, resumed)


def test_a_state_of_a_cpu_resumes_on_a_gpu():
    cell, batches = make_cell("batch_topk"), make_batches(50)
    expected, seen = trained(cell, batches, "cpu")
    stopped, _ = trained(cell, batches[:30], "cpu")
    resumed = CellTrainer(cell, 64, DEVICE)
    resumed.restore(*stopped.state())
    ours = [resumed.step(batch) for batch in batches[30:].to(DEVICE)]
    torch.testing.assert_close([one.loss for one in ours], [one.loss for one in seen[30:]], rtol=1e-3, atol=1e-6)
    assert resumed.n_steps == expected.n_steps


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_loss_that_is_not_finite_leaves_the_weights_as_they_were(name: str):
    trainer, _ = trained(make_cell(name), make_batches(5))
    before = {key: value.detach().clone() for key, value in trainer.weights.named().items()}
    bad = torch.full((SMALL.batch_size, 64), math.inf, device=DEVICE)
    with pytest.raises(NonFiniteLoss, match="step 5"):
        trainer.step(bad, targets_of(bad) if trainer.cell.guided else None)
    assert all(torch.equal(value, before[key]) for key, value in trainer.weights.named().items())


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_what_is_exported_encodes_as_on_a_cpu(name: str):
    trainer, _ = trained(make_cell(name), make_batches(40))
    sae, x = trainer.export(2.0), make_batches(41)[-1] * 2
    dense, sparse = sae.encode(x.to(DEVICE)), sae.encode_sparse(x.to(DEVICE))
    x = x.to(DEVICE)
    torch.testing.assert_close(sae.decode(sparse, x), sae.decode(sparse.to_dense(), x))
    expected = sae.to("cpu").encode(x)
    for found in (dense.cpu(), sparse.to_dense().cpu()):
        # An entry beside the threshold may fall on the other side of it.
        assert ((found > 0) != (expected > 0)).sum() <= 2
        both = (found > 0) & (expected > 0)
        torch.testing.assert_close(found[both], expected[both], rtol=1e-4, atol=1e-5)


def test_what_is_trained_has_its_threshold_from_rows_kept_out():
    x = make_batches(4).flatten(0, 1)
    sae = train_sae(x, k=8, steps=100, batch_size=256, device=DEVICE, progress=False)
    active = (sae.encode(x[9::10]) > 0).sum().item()
    assert abs(active - 8 * len(x[9::10])) <= 2  # it is encoded on a CPU here
