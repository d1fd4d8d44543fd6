"""The Triton kernels against the plain torch formulation: on a GPU, and through Triton's interpreter on a CPU."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from types import ModuleType

import pytest
import torch

from sae_ray.sae import Cell, CellTrainer, TrainingConfig, optimizer, selection, sparse, training
from sae_ray.sae.optimizer import RowAdam, RowGradient
from sae_ray.sae.selection import largest_positive
from sae_ray.sae.sparse import Pattern

pytest.importorskip("triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"


@pytest.fixture
def use_kernels(monkeypatch) -> Callable[[], None]:
    """Until it is called all runs in plain torch, afterwards through the kernels."""
    from sae_ray.sae import triton_kernels

    def choose(kernels: ModuleType | None) -> None:
        for module in (optimizer, selection, sparse, training):
            monkeypatch.setattr(module, "kernels_for", lambda tensor: kernels)

    choose(None)
    return lambda: choose(triton_kernels)


def make_pattern(d: int) -> tuple[Pattern, torch.Tensor, torch.Tensor, torch.Tensor]:
    """A pattern with an empty row, an empty latent and a crowded latent; its values, and a table for each side."""
    generator = torch.Generator().manual_seed(d)
    there = torch.rand(12, 30, generator=generator) < 0.15
    there[3], there[:, 5], there[4:, 7] = False, False, True
    flat = there.flatten().nonzero().squeeze(1)
    values = torch.randn(len(flat), generator=generator)
    left, right = (torch.randn(n, d, generator=generator) for n in (12, 30))
    return Pattern.of_flat(flat.to(DEVICE), 12, 30), values.to(DEVICE), left.to(DEVICE), right.to(DEVICE)


@pytest.mark.gpu
@pytest.mark.parametrize("d", [1, 12, 64])
def test_sums_and_dots(use_kernels, d: int):
    pattern, values, left, right = make_pattern(d)
    plain = pattern.row_sums(values, right), pattern.latent_sums(values, left), pattern.dots(left, right)
    use_kernels()
    ours = pattern.row_sums(values, right), pattern.latent_sums(values, left), pattern.dots(left, right)
    for one, other in zip(ours, plain, strict=True):
        torch.testing.assert_close(one, other)
    again = pattern.row_sums(values, right), pattern.latent_sums(values, left), pattern.dots(left, right)
    assert all(torch.equal(one, other) for one, other in zip(ours, again, strict=True))


@pytest.mark.gpu
def test_an_empty_pattern(use_kernels):
    empty = torch.zeros(0, dtype=torch.int64, device=DEVICE)
    use_kernels()
    table = torch.ones(4, 8, device=DEVICE)
    pattern = Pattern(empty, empty, 4, 4)
    assert pattern.dots(table, table).shape == (0,)
    assert torch.equal(pattern.row_sums(table.new_zeros(0), table), torch.zeros_like(table))


@pytest.mark.gpu
@pytest.mark.parametrize("guess", [0.5, 1.5, 2.5, 1e6])
def test_selection(use_kernels, guess: float):
    matrix = torch.randn(20, 500, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    plain = largest_positive(matrix, 300)
    use_kernels()
    assert torch.equal(largest_positive(matrix, 300, guess), plain)


@pytest.mark.gpu
def test_the_search_above_a_bound():
    from sae_ray.sae.triton_kernels import at_least

    flat = torch.randn(10_000, generator=torch.Generator().manual_seed(4)).to(DEVICE)
    for bound in (-9.0, 0.0, 2.0, flat.max().item(), 9.0):
        expected = (flat >= bound).nonzero().squeeze(1)
        found = at_least(flat, bound, len(expected))
        assert found is not None
        assert torch.equal(found, expected)
        assert at_least(flat, bound, len(expected) - 1) is None


@pytest.mark.gpu
@pytest.mark.parametrize("d", [1, 64, 5000])
def test_a_bias_is_added_to_rows(d: int):
    from sae_ray.sae.triton_kernels import add_to_rows

    matrix, bias = (torch.randn(*shape, generator=torch.Generator().manual_seed(6)) for shape in ((7, d), (d,)))
    matrix, bias = matrix.to(DEVICE), bias.to(DEVICE)
    expected = matrix + bias
    add_to_rows(matrix, bias)
    assert torch.equal(matrix, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("d", [1, 12, 64])
def test_rows_lose_what_is_parallel_to_their_directions(d: int):
    from sae_ray.sae.triton_kernels import orthogonalise_rows

    generator = torch.Generator().manual_seed(5)
    directions = torch.nn.functional.normalize(torch.randn(30, d, generator=generator), dim=1).to(DEVICE)
    values, rows = torch.randn(7, d, generator=generator).to(DEVICE), torch.arange(1, 29, 4, device=DEVICE)
    used = directions[rows]
    expected = values - (values * used).sum(1, keepdim=True) * used
    orthogonalise_rows(values, directions, rows)
    torch.testing.assert_close(values, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.gpu
def test_adam(use_kernels):
    """Several steps over rows that change, one of them with no row at all."""
    generator = torch.Generator().manual_seed(2)
    trainers = [CellTrainer(Cell("batch_topk", 3, k=2), 20, DEVICE) for _ in range(2)]
    gradients = []
    for count in (7, 60, 0, 20):
        rows = torch.randperm(60, generator=generator)[:count].sort().values.to(DEVICE)
        sparse = RowGradient(rows, torch.randn(count, 20, generator=generator).to(DEVICE))
        biases = {
            name: RowGradient(torch.arange(n, device=DEVICE), torch.randn(n, generator=generator).to(DEVICE))
            for name, n in (("b_enc", 60), ("b_dec", 20))
        }
        gradients.append({"W_dec": sparse, "W_enc_t": sparse, **biases})
    for trainer in trainers:
        adam = RowAdam(trainer.weights)
        for number, gradient in enumerate(gradients, start=1):
            adam.step(gradient, number, 0.01)
        use_kernels()
    for name, plain in trainers[0].weights.named().items():
        torch.testing.assert_close(trainers[1].weights.named()[name], plain)


@pytest.mark.gpu
@pytest.mark.parametrize("architecture", ["batch_topk", "matryoshka_batch_topk", "topk"])
def test_whole_training(use_kernels, architecture: str):
    training = TrainingConfig(
        batch_size=12, steps=12, learning_rate=3e-3, warmup_steps=2, threshold_start_step=3, dead_after_samples=24
    )
    batches = torch.randn(6, 12, 8, generator=torch.Generator().manual_seed(3)).to(DEVICE) / 4
    metrics = []
    for _ in range(2):
        trainer = CellTrainer(Cell(architecture, 4, k=2, training=training), 8, DEVICE)
        metrics.append(torch.tensor([trainer.step(batch) for batch in batches]))
        use_kernels()
    assert metrics[0][:, 3].max() > 0, "AuxK took part"
    torch.testing.assert_close(metrics[1], metrics[0], rtol=1e-3, atol=1e-5, equal_nan=True)


@pytest.mark.skipif(INTERPRETED, reason="this is what it starts")
def test_all_of_this_through_the_interpreter():
    command = [sys.executable, "-m", "pytest", "-m", "gpu", __file__]
    done = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
