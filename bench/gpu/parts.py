"""The parts of a training step one by one, and AuxK's sums against the same as a dense block over the dead latents."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch

from bench.gpu.timing import milliseconds
from bench.gpu.training import make_data, make_trainer
from bench.record import Table
from sae_ray.sae.auxk import auxk_loss
from sae_ray.sae.kernels import kernels_for
from sae_ray.sae.ranks import ALONE
from sae_ray.sae.selection import largest_positive
from sae_ray.sae.sparse import Pattern
from sae_ray.sae.training import geometric_median

if TYPE_CHECKING:
    from bench.gpu.sizes import Sizes
    from sae_ray.sae.architectures.base import Forward
    from sae_ray.sae.weights import Weights


def tables(sizes: Sizes, device: torch.device) -> Iterator[Table]:
    rows: list[list[Any]] = []
    for name, run in parts(sizes, device).items():
        rows.append([name, f"{milliseconds(device, run, sizes.rounds):.3f}"])
        yield Table(
            title=f"Parts of a step: d_in {sizes.d_in}, d_sae {sizes.d_sae}, batch {sizes.batch}, k {sizes.k}",
            columns=["part", "ms"],
            rows=rows,
        )
    yield from auxk(sizes, device)


def parts(sizes: Sizes, device: torch.device) -> dict[str, Callable[[], Any]]:
    d_in, d_sae, batch = sizes.d_in, sizes.d_sae, sizes.batch
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(batch, d_in, device=device, generator=generator) / d_in**0.5
    weights = make_trainer(sizes, "batch_topk", d_sae, "bfloat16", device).weights
    W_dec = weights.W_dec.detach()
    pre = x @ W_dec.T
    count = sizes.k * batch
    chosen = largest_positive(pre, count)
    smallest = pre.flatten()[chosen].min().item()
    pattern = Pattern.of_flat(chosen, batch, d_sae)
    values = pre.flatten()[chosen]
    crowded = pre.clone()
    crowded[:, 0] = 1.0
    one_everywhere = Pattern.of_flat(largest_positive(crowded, count), batch, d_sae)
    found: dict[str, Callable[[], Any]] = {
        f"selection, the search begins at {share} of the smallest kept value": (
            lambda share=share: largest_positive(pre, count, share * smallest)
        )
        for share in (0.9, 0.97, 1.0)
    }
    found |= {
        "selection without a guess": lambda: largest_positive(pre, count),
        "torch.topk of the whole batch": lambda: pre.flatten().topk(count, sorted=False),
        "entries sorted by latent": lambda: pattern.latents.argsort(stable=True),
        "used latents": lambda: torch.unique_consecutive(pattern.latents[pattern.by_latent], return_counts=True),
        "decoding: sums by row": lambda: pattern.row_sums(values, W_dec),
        "gradients of weights: sums by latent": lambda: pattern.latent_sums(values, x),
        "the same, one latent active in every row": lambda: one_everywhere.latent_sums(values, x),
        "gradients of codes: dot products": lambda: pattern.dots(x, W_dec),
        "geometric median of a batch (first step)": lambda: geometric_median(x),
    }
    moments = [torch.zeros_like(W_dec) for _ in range(2)]
    if kernels := kernels_for(W_dec):
        for share in (1.0, 0.7):
            rows = (torch.rand(d_sae, device=device, generator=generator) < share).nonzero().squeeze(1)
            gradient = torch.randn(len(rows), d_in, device=device, generator=generator)
            found[f"Adam of one matrix, {share:.0%} of its rows with a gradient"] = (
                lambda rows=rows, gradient=gradient: kernels.adam_rows(
                    W_dec, *moments, rows, gradient, 10, 1e-5, unit_rows=True
                )
            )
    return found


def auxk(sizes: Sizes, device: torch.device) -> Iterator[Table]:
    """The product's AuxK, with its gradients, and the same loss through dense products of the dead latents."""
    trainer = make_trainer(sizes, "batch_topk", sizes.d_sae, "float32", device)
    x = make_data(sizes, device)[0]
    trainer.step(x)
    forward = trainer.architecture.forward(trainer.weights, x)
    rows = []
    for n_dead in (sizes.d_sae // 64, sizes.d_sae // 8, sizes.d_sae // 2):
        dead = torch.zeros(sizes.d_sae, dtype=torch.bool, device=device)
        dead[-n_dead:] = True

        def ours(dead: torch.Tensor = dead) -> torch.Tensor:
            return auxk_loss(trainer.weights, x, forward, dead, "post", ALONE)

        def dense(dead: torch.Tensor = dead) -> torch.Tensor:
            return dense_auxk(trainer.weights, x, forward, dead)

        times = [
            milliseconds(device, lambda loss=loss: gradients(loss(), trainer.weights), 5) for loss in (ours, dense)
        ]
        torch.set_float32_matmul_precision("high")
        times.append(milliseconds(device, lambda: gradients(dense(), trainer.weights), 5))
        torch.set_float32_matmul_precision("highest")
        apart = abs(ours().item() / dense().item() - 1)
        rows.append([n_dead, *(f"{taken:.2f}" for taken in times), f"{apart:.1e}"])
        yield Table(
            title=f"AuxK with its gradients, up to {sizes.d_in // 2} dead latents per row",
            columns=["dead latents", "ms, by entries", "ms, dense block, float32", "ms, dense block, TF32",
                     "difference of the losses"],
            rows=rows,
        )  # fmt: skip


def dense_auxk(weights: Weights, x: torch.Tensor, forward: Forward, dead: torch.Tensor) -> torch.Tensor:
    """`auxk_loss` of one process with "post", as dense products over the dead latents."""
    rows = dead.nonzero().squeeze(1)
    W_enc, W_dec, b_enc = (weight.index_select(0, rows) for weight in (weights.W_enc_t, weights.W_dec, weights.b_enc))
    pre = torch.addmm(b_enc, x - weights.b_dec, W_enc.T).relu()
    top = pre.topk(min(x.shape[1] // 2, len(rows)), dim=1, sorted=False)
    codes = torch.zeros_like(pre).scatter(1, top.indices, top.values)
    error = forward.residual - codes @ W_dec
    variance = (forward.residual - forward.residual.mean(0)).square().sum(-1).mean()
    return error.square().sum(-1).mean() / variance


def gradients(loss: torch.Tensor, weights: Weights) -> None:
    torch.autograd.grad(loss, [value for value in weights.named().values() if value.ndim == 2], allow_unused=True)
