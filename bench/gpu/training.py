"""Training steps of all widths against a dense step, installed peers and the floor."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from itertools import cycle
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from bench.contestants.worker import Settings
from bench.gpu.floors import bandwidth, product_ms
from bench.gpu.timing import milliseconds
from bench.record import Table
from sae_ray.sae import Cell, CellTrainer, TrainingConfig

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from bench.gpu.sizes import Sizes

PRECISIONS = {"bfloat16": "bfloat16", "TF32": "tf32", "float32": "float32"}
"""As tables name them: the cell's dtype."""
COLUMNS = ["step of", "latents", "ms", "ms, half of the latents dead", "times the floor", "GB"]


def tables(sizes: Sizes, device: torch.device) -> Iterator[Table]:
    yield from ours(sizes, device)
    yield from rivals(sizes, device)


def ours(sizes: Sizes, device: torch.device) -> Iterator[Table]:
    """Our steps, widths ascending; the huge one in bfloat16 alone."""
    rate = bandwidth(sizes, device)
    data = make_data(sizes, device)
    rows: list[list[Any]] = []
    for d_sae in (*sizes.widths, sizes.huge):
        huge = d_sae == sizes.huge
        floors = {name: floor_ms(sizes, d_sae, name, rate, device) for name in PRECISIONS}
        for architecture in ("batch_topk",) if huge else ("batch_topk", "matryoshka_batch_topk"):
            for precision in ("bfloat16",) if huge else PRECISIONS:
                reset_peak(device)
                plain = step_ms(sizes, architecture, d_sae, precision, data, device)
                peak = peak_gb(device)
                dead = None if huge else step_ms(sizes, architecture, d_sae, precision, data, device, half_dead=True)
                rows.append(
                    [
                        f"{architecture}, {precision}", d_sae, f"{plain:.2f}", dead and f"{dead:.2f}",
                        f"{plain / floors[precision]:.1f}", peak,
                    ]
                )  # fmt: skip
                yield Table(
                    title=f"Our training step: d_in {sizes.d_in}, batch {sizes.batch}, k {sizes.k}",
                    columns=COLUMNS,
                    rows=rows,
                )
        rows.append(["floor, bfloat16: product, pre-activations written and read, Adam", d_sae,
                     f"{floors['bfloat16']:.2f}", None, "1.0", None])  # fmt: skip


def rivals(sizes: Sizes, device: torch.device) -> Iterator[Table]:
    """The same step as it is usually written, and the installed peers', at the largest width, beside ours."""
    d_in, d_sae, batch = sizes.d_in, sizes.d_sae, sizes.batch
    data = make_data(sizes, device)
    generator = torch.Generator().manual_seed(0)
    W_dec = F.normalize(torch.randn(d_sae, d_in, generator=generator), dim=1).to(device)
    b_dec = data[0].mean(0)
    settings = Settings(d_in, d_sae, sizes.k, batch, 10_000, 1e-3, 0.9, False, torch.get_num_threads(), str(device))
    half = settings._replace(dtype="bfloat16")
    ours = importlib.import_module("bench.contestants.ours")
    makers: dict[str, Callable[[], Any]] = {
        "sae-ray, bfloat16": lambda: ours.BatchTopK(half, W_dec, W_dec, b_dec),
        "sae-ray, float32": lambda: ours.BatchTopK(settings, W_dec, W_dec, b_dec),
        "dense step, bfloat16 products": lambda: DenseStep(half, W_dec, b_dec, "highest"),
        "dense step, TF32": lambda: DenseStep(settings, W_dec, b_dec, "high"),
        "dense step, float32": lambda: DenseStep(settings, W_dec, b_dec, "highest"),
    }
    for peer in ("dictionary_learning", "sae_lens"):
        if find_spec(peer):
            module = importlib.import_module(f"bench.contestants.{peer}")
            makers[peer] = lambda module=module: module.BatchTopK(settings, W_dec, W_dec, b_dec)
    rows, first = [], None
    for name, make in makers.items():  # one after the other: each needs its gigabytes
        reset_peak(device)
        contestant = make()
        step = partial(on_next, contestant.step, cycle(data))
        ms = milliseconds(device, step, sizes.rounds, sizes.warmup)
        with torch.no_grad():
            # By our selection in training, as the dense step's: a threshold averaged over so few steps lags behind.
            trainer = getattr(contestant, "trainer", None)
            if isinstance(trainer, CellTrainer):
                forward = trainer.architecture.forward(trainer.weights, data[0])
                x_hat, n_active = data[0] - forward.residual, int(forward.n_active)
            else:
                x_hat, n_active = contestant.reconstruct(data[0])
        r2 = 1 - (data[0] - x_hat).square().sum() / (data[0] - data[0].mean(0)).square().sum()
        first = first or ms
        rows.append([name, f"{ms:.2f}", f"{ms / first:.2f}", f"{r2.item():.3f}", f"{n_active / batch:.1f}",
                     peak_gb(device)])  # fmt: skip
        del contestant, step, trainer
        yield Table(
            title=f"One BatchTopK step: d_in {d_in}, d_sae {d_sae}, batch {batch}, k {sizes.k}",
            columns=["step of", "ms", "times the first", "R² on a batch", "L0", "GB"],
            rows=rows,
        )


def on_next(step: Callable[[Tensor], Any], batches: Iterator[Tensor]) -> None:
    step(next(batches))


def make_trainer(sizes: Sizes, architecture: str, d_sae: int, dtype: Any, device: torch.device) -> CellTrainer:
    training = TrainingConfig(
        batch_size=sizes.batch, steps=10_000, learning_rate=1e-3, warmup_steps=0, threshold_start_step=1, dtype=dtype
    )
    return CellTrainer(Cell(architecture, d_sae / sizes.d_in, k=sizes.k, training=training), sizes.d_in, device)


def make_data(sizes: Sizes, device: torch.device) -> Float[Tensor, "n batch d_in"]:
    """Batches of sparse mixtures of fixed directions, of unit mean square."""
    generator = torch.Generator(device).manual_seed(0)
    n = 4 * sizes.d_in
    directions = F.normalize(torch.randn(n, sizes.d_in, generator=generator, device=device), dim=1)
    data = torch.empty(8, sizes.batch, sizes.d_in, device=device)
    for batch in data:
        amounts = torch.rand(sizes.batch, n, generator=generator, device=device)
        torch.mm(amounts * (amounts > 1 - 20 / n), directions, out=batch)
    return data / data.square().sum(-1).mean().sqrt()


def step_ms(
    sizes: Sizes, architecture: str, d_sae: int, precision: str, data: Tensor, device: torch.device,
    half_dead: bool = False,
) -> float:  # fmt: skip
    """Milliseconds of one step."""
    steps = Steps(make_trainer(sizes, architecture, d_sae, PRECISIONS[precision], device), data, half_dead)
    return milliseconds(device, steps, sizes.rounds, sizes.warmup)


class Steps:
    """Each call takes one step, on the next of batches that repeat; the host does not ask for its metrics.

    With `half_dead` the last half of the latents count as dead before every step.
    """

    def __init__(self, trainer: CellTrainer, data: Float[Tensor, "n batch d_in"], half_dead: bool):
        self.trainer, self.batches, self.half_dead = trainer, cycle(data), half_dead
        if half_dead:
            # Short encoder rows: they stay dead whatever the step selects.
            trainer.weights.W_enc_t.data[trainer.d_sae // 2 :] *= 0.01

    def __call__(self) -> None:
        if self.half_dead:
            dead_after = self.trainer.cell.training.dead_after_samples
            self.trainer.samples_since_fired[self.trainer.d_sae // 2 :] = dead_after
        self.trainer.advance(next(self.batches))


def floor_ms(sizes: Sizes, d_sae: int, precision: str, bytes_per_ms: float, device: torch.device) -> float:
    """What no step can do without: the product, its float32 result written and read, Adam's pass over the weights."""
    product = product_ms(precision, (sizes.batch, sizes.d_in, d_sae), device)
    pre = 4 * sizes.batch * d_sae / bytes_per_ms  # read; the product's own time has the writing
    adam = 2 * 2 * 3 * 4 * sizes.d_in * d_sae / bytes_per_ms  # two matrices, with two moments each, read and written
    return product + pre + adam


def reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def peak_gb(device: torch.device) -> float | None:
    return round(torch.cuda.max_memory_allocated(device) / 1e9, 1) if device.type == "cuda" else None


class DenseStep:
    """The step as it is usually written: dense codes, dense gradients, Adam, then the decoder's rows normalised."""

    def __init__(self, settings: Settings, W_dec: torch.Tensor, b_dec: torch.Tensor, precision: str):
        self.k, self.precision, self.dtype = settings.k, precision, getattr(torch, settings.dtype)
        self.W_enc = torch.nn.Parameter(W_dec.T.contiguous())
        self.W_dec = torch.nn.Parameter(W_dec.clone())
        self.b_enc = torch.nn.Parameter(W_dec.new_zeros(len(W_dec)))
        self.b_dec = torch.nn.Parameter(b_dec.clone())
        self.weights = [self.W_enc, self.W_dec, self.b_enc, self.b_dec]
        self.optimizer = torch.optim.Adam(self.weights, lr=settings.learning_rate)

    def step(self, batch: torch.Tensor) -> None:
        torch.set_float32_matmul_precision(self.precision)
        x_hat, _ = self._forward(batch)
        (batch - x_hat).square().sum(-1).mean().backward()
        with torch.no_grad():
            assert self.W_dec.grad is not None
            self.W_dec.grad -= (self.W_dec.grad * self.W_dec).sum(1, keepdim=True) * self.W_dec
        torch.nn.utils.clip_grad_norm_(self.weights, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            self.W_dec /= self.W_dec.norm(dim=1, keepdim=True)
        torch.set_float32_matmul_precision("highest")

    def reconstruct(self, x: torch.Tensor) -> tuple[torch.Tensor, int]:
        x_hat, codes = self._forward(x)
        return x_hat, int((codes > 0).sum())

    def _forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.autocast(x.device.type, self.dtype, enabled=self.dtype != torch.float32):
            values = ((x - self.b_dec) @ self.W_enc + self.b_enc).relu()
            top = values.flatten().topk(self.k * len(x), sorted=False)
            codes = torch.zeros_like(values).flatten().scatter(0, top.indices, top.values).view_as(values)
            return codes @ self.W_dec + self.b_dec, codes
