"""The parts of a training step one by one, and AuxK as a dense block over the dead latents and by entries."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from bench.gpu.timing import milliseconds
from bench.gpu.training import make_data, make_trainer
from bench.record import Table
from sae_ray.sae import TrainingConfig
from sae_ray.sae import auxk as auxk_module
from sae_ray.sae.auxk import padded_auxk_loss
from sae_ray.sae.kernels import kernels_for
from sae_ray.sae.optimizer import adam_scalars
from sae_ray.sae.ranks import ALONE
from sae_ray.sae.selection import largest_positive, padded_largest
from sae_ray.sae.sparse import PaddedPattern, Pattern
from sae_ray.sae.training import geometric_median

if TYPE_CHECKING:
    from bench.gpu.sizes import Sizes
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
    kind = PaddedPattern if kernels_for(x) else Pattern
    pattern = kind.of_flat(chosen, batch, d_sae)
    values = pre.flatten()[chosen]
    crowded = pre.clone()
    crowded[:, 0] = 1.0
    one_everywhere = kind.of_flat(largest_positive(crowded, count), batch, d_sae)
    found: dict[str, Callable[[], Any]] = {
        "selection of the whole batch": lambda: padded_largest(pre.view(1, -1), count),
        "selection of each row": lambda: padded_largest(pre, sizes.k),
        "selection over ranks, the search begins at 0.9 of the smallest kept value": (
            lambda: largest_positive(pre, count, 0.9 * smallest)
        ),
        "torch.topk of the whole batch": lambda: pre.flatten().topk(count, sorted=False),
        "entries sorted by latent": lambda: pattern.latents.argsort(stable=True),
        "decoding: sums by row": lambda: pattern.row_sums(values, W_dec),
        "gradients of weights: sums by latent": lambda: pattern.latent_sums(values, x),
        "the same, one latent active in every row": lambda: one_everywhere.latent_sums(values, x),
        "gradients of codes: dot products": lambda: pattern.dots(x, W_dec),
        "geometric median of a batch (first step)": lambda: geometric_median(x),
    }
    moments = [torch.zeros_like(W_dec) for _ in range(2)]
    if kernels := kernels_for(W_dec):
        gradient = torch.randn(d_sae, d_in, device=device, generator=generator)
        scalars = torch.tensor([*adam_scalars(10, 1e-5), 1.0, 1.0], device=device)
        found["Adam of one matrix"] = lambda: kernels.adam_rows(W_dec, *moments, gradient, scalars, unit_rows=True)
        found["gradient of the decoder projected"] = lambda: kernels.orthogonalise_rows(gradient, W_dec)
    return found


def auxk(sizes: Sizes, device: torch.device) -> Iterator[Table]:
    """AuxK with its gradients, in its forms."""
    trainer = make_trainer(sizes, "batch_topk", sizes.d_sae, "float32", device)
    x = make_data(sizes, device)[0]
    trainer.step(x)
    forward = trainer.architecture.forward(trainer.weights, x)
    exact = trainer.cell.training
    rough = replace(exact, dtype="bfloat16")
    rows = []
    for n_dead in (sizes.d_sae // 64, sizes.d_sae // 8, sizes.d_sae // 2):
        dead = torch.zeros(sizes.d_sae, dtype=torch.bool, device=device)
        dead[-n_dead:] = True

        def loss(training: TrainingConfig, dense: int, dead: torch.Tensor = dead) -> torch.Tensor:
            auxk_module._DENSE = dense
            return padded_auxk_loss(trainer.weights, x, forward, dead, training, ALONE, int(dead.sum()))

        forms = [(rough, 0), (exact, n_dead)]
        if kernels_for(x):
            forms.append((exact, 0))
        times = [milliseconds(device, lambda form=form: gradients(loss(*form), trainer.weights), 5) for form in forms]
        apart = [abs(loss(*form).item() / loss(exact, n_dead).item() - 1) for form in forms]
        rows.append([n_dead, *(f"{taken:.2f}" for taken in times), f"{max(apart):.1e}"])
        yield Table(
            title=f"AuxK with its gradients, up to {sizes.d_in // 2} dead latents per row",
            columns=["dead latents", "ms, dense block, bfloat16", "ms, dense block, float32",
                     *["ms, by entries"] * (len(forms) > 2), "largest difference of the losses"],
            rows=rows,
        )  # fmt: skip


def gradients(loss: torch.Tensor, weights: Weights) -> None:
    torch.autograd.grad(loss, [value for value in weights.named().values() if value.ndim == 2])
