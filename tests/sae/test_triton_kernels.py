"""The Triton kernels against the plain torch formulation: on a GPU, and through Triton's interpreter on a CPU."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable
from dataclasses import replace
from types import FunctionType, ModuleType
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sae_ray.sae import (
    Cell,
    CellTrainer,
    NonFiniteLoss,
    StepMetrics,
    TrainingConfig,
    auxk,
    guidance,
    kernels,
    optimizer,
    selection,
    sparse,
    training,
    whole_numbers,
)
from sae_ray.sae.optimizer import RowAdam, RowGradient, adam_scalars
from sae_ray.sae.ranks import Ranks, Split
from sae_ray.sae.selection import largest_positive
from sae_ray.sae.sparse import Pattern
from tests.sae.thread_ranks import on_ranks

pytest.importorskip("triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"


def patch_triton_once() -> None:
    """Triton's interpreter replaces what kernels call at every launch, and again at every `tl.sum`, on top of what it
    has replaced before: most of the time goes into that. In this process nothing else calls it, so that it may stay."""
    import triton.language as tl
    from triton.runtime import interpreter

    if hasattr(interpreter, "_LangPatchScope"):  # private, as of Triton 3.9
        interpreter._patch_lang(FunctionType(patch_triton_once.__code__, {"tl": tl, "core": tl.core}))
        interpreter._patch_lang = lambda kernel: interpreter._LangPatchScope()


if INTERPRETED:
    patch_triton_once()


@pytest.fixture
def use_kernels(monkeypatch) -> Callable[[], None]:
    """Until it is called all runs in plain torch, afterwards through the kernels."""
    from sae_ray.sae import triton_kernels

    def choose(chosen: ModuleType | None) -> None:
        for module in (kernels, guidance, optimizer, selection, sparse, training, whole_numbers):
            monkeypatch.setattr(module, "kernels_for", lambda tensor: chosen)

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
@pytest.mark.parametrize("block", [2, 16, 64])
def test_the_largest_of_each_block(block: int):
    from sae_ray.sae.triton_kernels import block_maxima

    flat = torch.randn(block * 1_000, generator=torch.Generator().manual_seed(5)).to(DEVICE)
    expected = flat.view(-1, block).amax(1)
    assert torch.equal(block_maxima(flat, block), expected)
    flat[3], expected[3 // block] = math.nan, math.inf
    assert torch.equal(block_maxima(flat, block), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("d", [1, 12, 64])
def test_rows_lose_what_is_parallel_to_their_directions(d: int):
    from sae_ray.sae.triton_kernels import orthogonalise_rows

    generator = torch.Generator().manual_seed(5)
    directions = torch.nn.functional.normalize(torch.randn(30, d, generator=generator), dim=1).to(DEVICE)
    values = torch.randn(30, d, generator=generator).to(DEVICE)
    expected = values - (values * directions).sum(1, keepdim=True) * directions
    orthogonalise_rows(values, directions)
    torch.testing.assert_close(values, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.gpu
def test_adam(use_kernels):
    """Several steps, the second of which is not to be taken."""
    generator = torch.Generator().manual_seed(2)
    weights = [CellTrainer(Cell("jumprelu", 3, sparsity=0.1), 20, DEVICE).weights for _ in range(2)]
    plain, ours = (RowAdam(one) for one in weights)
    use_kernels()
    for number, taken in ((1, True), (2, False), (2, True), (3, True)):
        factor = torch.full((), 0.7, device=DEVICE)
        found = {name: torch.randn(value.shape, generator=generator) for name, value in weights[0].named().items()}
        gradients = [
            {
                name: RowGradient(torch.arange(len(value), device=DEVICE), value.clone().to(DEVICE))
                for name, value in found.items()
            }
            for _ in range(2)
        ]
        if taken:
            plain.step(gradients[0], factor, number, 0.01)
        ours.step_with_kernels(gradients[1], torch.tensor([*adam_scalars(number, 0.01), factor, taken], device=DEVICE))
    for name, expected in weights[0].named().items():
        torch.testing.assert_close(weights[1].named()[name], expected)


SELECTING = ("batch_topk", "matryoshka_batch_topk", "topk")
CELLS = {
    **{
        (name, select): {"k": 2}
        for name in ("batch_topk", "matryoshka_batch_topk", "topk")
        for select in ("post", "pre")
    },
    **{(name, "post"): {"sparsity": 0.1} for name in ("relu", "jumprelu")},
    **{(name, "post"): {"k": 2} for name in ("guided_topk", "guided_batch_topk", "frozen_decoder", "random")},
}


def small_cell(name: str, select: Any, dtype: Any = "float32") -> Cell:
    training = TrainingConfig(
        batch_size=8, steps=12, learning_rate=3e-3, warmup_steps=2, threshold_start_step=3, dead_after_samples=16,
        auxk_select=select, dtype=dtype,
    )  # fmt: skip
    return Cell(name, 2, training=training, **CELLS[name, select])


def small_trainer(*cell: Any) -> CellTrainer:
    made = small_cell(*cell)
    return CellTrainer(made, 8, DEVICE, concepts=("a", "b", "c") if made.guided else ())


def targets_of(trainer: CellTrainer, batch: torch.Tensor) -> torch.Tensor | None:
    """Three concepts, which are not known of every row."""
    return (batch[:, :3] > 0).float().masked_fill(batch[:, 3:6] > 0.2, math.nan) if trainer.concepts else None


def small_batches(n: int) -> torch.Tensor:
    return torch.randn(n, 8, 8, generator=torch.Generator().manual_seed(3)).to(DEVICE) / 4


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["batch_topk", "matryoshka_batch_topk"])
def test_the_smallest_kept_value(use_kernels, name: str):
    """What the threshold is averaged from. Within a training, it follows biases of which Adam makes too much."""
    trainer, [x] = CellTrainer(small_cell(name, "post"), 8, DEVICE), small_batches(1)
    plain = trainer.architecture.forward(trainer.weights, x).smallest_active
    use_kernels()
    assert plain > 0
    torch.testing.assert_close(trainer.architecture.forward(trainer.weights, x).smallest_active, plain)


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "select"), CELLS)
def test_whole_training(use_kernels, monkeypatch, name: str, select: str):
    """With AuxK, if there is any, as a dense block and by entries."""
    expected = small_trainer(name, select)
    seen = [expected.step(batch, targets_of(expected, batch)) for batch in small_batches(4)]
    use_kernels()
    assert expected.cell.kind.revives == (max(one.auxk_loss for one in seen) > 0), "AuxK took part"
    for dense in (32, 0) if expected.cell.kind.revives else (32,):
        monkeypatch.setattr(auxk, "_DENSE", dense)
        trainer = small_trainer(name, select)
        metrics = [trainer.step(batch, targets_of(trainer, batch)) for batch in small_batches(4)]
        torch.testing.assert_close(torch.tensor(metrics), torch.tensor(seen), rtol=1e-3, atol=1e-5, equal_nan=True)
        for key in ("W_enc_t", "W_dec"):  # not the biases: Adam makes much of the rounding of a gradient near 0
            one, other = (found.weights.named()[key].detach() for found in (trainer, expected))
            assert (one - other).norm() < 1e-3 * other.norm()


@pytest.mark.gpu
def test_training_for_monosemanticity(use_kernels):
    """No step waits for the device."""
    cell, embeddings = replace(small_cell("batch_topk", "post"), monosemanticity=0.3), small_batches(1)[0] + 0.1
    expected = CellTrainer(cell, 8, DEVICE)
    *batches, before, last = small_batches(4)
    seen = [expected.step(batch, embeddings=embeddings) for batch in batches]
    assert seen[-1].monosemanticity != 0
    use_kernels()
    trainer = CellTrainer(cell, 8, DEVICE)
    metrics = [trainer.step(batch, embeddings=embeddings) for batch in batches]
    torch.testing.assert_close(torch.tensor(metrics), torch.tensor(seen), rtol=1e-3, atol=1e-5, equal_nan=True)
    trainer._replayed = None
    trainer.advance(before, embeddings=embeddings)
    with Lint() as lint:
        trainer.advance(last, embeddings=embeddings)
    assert lint.found == []


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "dense"), [("matryoshka_batch_topk", 32), ("batch_topk", 0), ("jumprelu", 32)])
def test_training_with_weights_of_dimensions(use_kernels, monkeypatch, name: str, dense: int):
    """Of which one counts for nothing. No step waits for the device."""
    cell, gamma = replace(small_cell(name, "post"), weights="variance"), torch.linspace(0, 1.7, 8)
    expected = CellTrainer(cell, 8, DEVICE, gamma=gamma)
    *batches, before, last = small_batches(5)
    seen = [expected.step(batch) for batch in batches]
    use_kernels()
    monkeypatch.setattr(auxk, "_DENSE", dense)
    trainer, unweighted = CellTrainer(cell, 8, DEVICE, gamma=gamma), CellTrainer(small_cell(name, "post"), 8, DEVICE)
    metrics = [trainer.step(batch) for batch in batches]
    torch.testing.assert_close(torch.tensor(metrics), torch.tensor(seen), rtol=1e-3, atol=1e-5, equal_nan=True)
    assert [unweighted.step(batch) for batch in batches][-1].loss != pytest.approx(metrics[-1].loss, rel=1e-2)
    trainer._replayed = None
    trainer.advance(before)
    with Lint() as lint:
        trainer.advance(last)
    assert lint.found == []


@pytest.fixture
def one_kernel_at_a_time(monkeypatch) -> None:
    """The interpreter is not made for threads."""
    if INTERPRETED:
        from triton.runtime.interpreter import GridExecutor

        call, lock = GridExecutor.__call__, threading.Lock()

        def guarded(self, *args, **kwargs):
            with lock:
                return call(self, *args, **kwargs)

        monkeypatch.setattr(GridExecutor, "__call__", guarded)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "by",
    [
        "rows",
        pytest.param(
            "latents",
            marks=pytest.mark.skipif(
                not INTERPRETED,
                reason="ranks are threads here, and meet in the backward pass, which has one thread per GPU",
            ),
        ),
    ],
)
def test_two_ranks_train_as_one_does(use_kernels, one_kernel_at_a_time, by: str):
    cell, batches = small_cell("batch_topk", "post"), small_batches(3)
    alone = CellTrainer(cell, 8, DEVICE)
    expected = [alone.step(batch) for batch in batches]
    assert expected[-1].auxk_loss > 0
    use_kernels()

    def work(ranks: Ranks) -> list[StepMetrics]:
        trainer = CellTrainer(cell, 8, DEVICE, Split(**{by: ranks}))
        return [trainer.step(batch.chunk(2)[ranks.rank] if by == "rows" else batch) for batch in batches]

    for metrics in on_ranks(2, work):
        torch.testing.assert_close(torch.tensor(metrics), torch.tensor(expected), rtol=1e-4, atol=1e-6, equal_nan=True)


@pytest.mark.gpu
def test_metrics_that_come_late_are_the_same(use_kernels, monkeypatch):
    """Latents die in between."""
    use_kernels()
    monkeypatch.setattr(training, "REPORT_EVERY", 2)
    cell = small_cell("batch_topk", "post")
    at_once, late = (CellTrainer(cell, 8, DEVICE) for _ in range(2))
    batches = small_batches(5)
    expected = [at_once.step(batch) for batch in batches]
    found = [metrics for batch in batches for metrics in late.advance(batch)]
    assert [one.step for one in found] == [0, 1, 2, 3]
    assert torch.equal(torch.tensor(found + late.report()).nan_to_num(-1), torch.tensor(expected).nan_to_num(-1))
    assert late.report() == []


@pytest.mark.gpu
def test_a_loss_that_is_not_finite_is_known_late_and_leaves_the_weights(use_kernels):
    """The steps after the bad one change nothing, and the state tells of it."""
    use_kernels()
    batches = small_batches(4)
    trainer, expected = (CellTrainer(small_cell("batch_topk", "post"), 8, DEVICE) for _ in range(2))
    for batch in (*batches[:2], batches[2] * math.inf, *batches[3:]):
        trainer.advance(batch)
    for batch in batches[:2]:
        expected.advance(batch)
    tensors, facts = trainer.state()
    assert facts["n_steps"] == 2
    assert facts["failed"].startswith("step 2:")
    wanted = expected.state()[0]
    for name, value in tensors.items():
        assert name in ("samples_since_fired", "revivals", "ever_fired", "threshold_estimate") or torch.equal(
            value, wanted[name]
        ), name
    with pytest.raises(NonFiniteLoss, match="step 2"):
        trainer.advance(batches[0])


class Lint(TorchDispatchMode):
    """Notes calls for which the host would wait for a GPU, or whose results have a shape that depends on numbers."""

    WAITS = (
        *("_local_scalar_dense", "nonzero", "unique", "bincount", "coalesce", "lift_fresh", "equal", "masked_select"),
        "_to_copy",
    )

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        casts = name == "_to_copy" and result.device == args[0].device
        by_flags = name in ("index", "index_put_") and any(
            place is not None and place.dtype == torch.bool for place in args[1]
        )
        if by_flags or (name.startswith(self.WAITS) and not casts):
            self.found.append(name)
        return result


@pytest.mark.gpu
def test_waits_are_noticed(use_kernels):
    """In a step without kernels."""
    trainer = CellTrainer(small_cell("batch_topk", "post"), 8, DEVICE)
    for batch in small_batches(2):
        trainer.advance(batch)
    with Lint() as lint:
        trainer.advance(batch)
    assert {"nonzero", "bincount", "_local_scalar_dense"} < set(lint.found)


@pytest.mark.gpu
@pytest.mark.parametrize("dense", [32, 0])
@pytest.mark.parametrize(
    "name",
    [*SELECTING, "relu", "jumprelu", "guided_topk", "guided_batch_topk", "frozen_decoder", "random"],
)
def test_no_step_waits_for_the_device_between_reports(use_kernels, monkeypatch, name: str, dense: int):
    use_kernels()
    monkeypatch.setattr(auxk, "_DENSE", dense)
    trainer = small_trainer(name, "post", "float32" if dense else "bfloat16")
    trainer._replayed = None  # as it is before it is recorded
    first, *batches = ((batch, targets_of(trainer, batch)) for batch in small_batches(3))
    trainer.advance(*first)
    with Lint() as lint:
        for batch, targets in batches:
            trainer.advance(batch, targets)
    assert lint.found == []
    assert trainer.cell.kind.revives == (trainer.report()[-1].auxk_loss > 0), "AuxK took part"


@pytest.mark.skipif(INTERPRETED, reason="there are no graphs on a CPU")
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("name", "select"), CELLS)
def test_a_recorded_step_equals_the_step(name: str, select: str, dtype: str):
    """Also where the room of AuxK and the averaging of the threshold change, which are recorded apart."""
    recorded, eager = (small_trainer(name, select, dtype) for _ in range(2))
    eager._replayed = None
    first, *batches = ((batch, targets_of(eager, batch)) for batch in small_batches(40))
    recorded.advance(*first)
    eager.advance(*first)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for batch, targets in batches:
                recorded.advance(batch, targets)
                eager.advance(batch, targets)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    waits = [f"{one.filename}:{one.lineno}" for one in caught if "synchroniz" in str(one.message)]
    assert waits == []
    assert torch.equal(torch.tensor(recorded.report()).nan_to_num(-1), torch.tensor(eager.report()).nan_to_num(-1))
    for (key, one), other in zip(recorded.state()[0].items(), eager.state()[0].values(), strict=True):
        assert torch.equal(one.nan_to_num(-1), other.nan_to_num(-1)), key


@pytest.mark.gpu
def test_a_run_that_is_stopped_between_two_reports_goes_on_with_the_same_bits(use_kernels, monkeypatch):
    """Also where fewer latents can be dead by then than when metrics were due, so that AuxK needed less room."""
    use_kernels()
    monkeypatch.setattr(training, "REPORT_EVERY", 4)
    monkeypatch.setattr(training, "_SMALLEST_ROOM", 1)
    whole, stopped, resumed = (CellTrainer(small_cell("batch_topk", "post"), 8, DEVICE) for _ in range(3))
    batches = small_batches(7)
    for batch in batches:
        whole.advance(batch)
    for batch in batches[:6]:
        stopped.advance(batch)
    resumed.restore(*stopped.state())
    resumed.advance(batches[6])
    for (key, one), other in zip(resumed.state()[0].items(), whole.state()[0].values(), strict=True):
        assert torch.equal(one.nan_to_num(-1), other.nan_to_num(-1)), key


@pytest.mark.skipif(INTERPRETED, reason="this is what it starts")
def test_all_of_this_through_the_interpreter():
    command = [sys.executable, "-m", "pytest", "-m", "gpu", __file__]
    done = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
