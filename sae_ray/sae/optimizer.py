"""Adam for gradients that are 0 in most rows: one pass over weights and moments, with the constraint on the weights."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch.optim.adam import adam

from sae_ray.sae.kernels import kernels_for
from sae_ray.sae.whole_numbers import first_numbers

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor
    from torch.nn import Parameter

    from sae_ray.sae.ranks import Ranks
    from sae_ray.sae.weights import Weights

# Weights, gradient and moments of a block are 8 MiB: they stay in the cache while they are worked on.
_BLOCK_ENTRIES = 2**19


def adam_scalars(number: int, learning_rate: float) -> tuple[float, float]:
    """Of step `number`, counted from 1: its size, and the square root of the correction of the second moment."""
    return learning_rate / (1 - 0.9**number), (1 - 0.999**number) ** 0.5


class RowGradient(NamedTuple):
    """The gradient of a parameter; rows that are not listed are 0."""

    rows: Int[Tensor, " n"]
    """Ascending."""
    values: Float[Tensor, "n ..."]

    @classmethod
    def of(cls, gradient: Tensor, ranks: Ranks) -> RowGradient:
        """From what autograd gives, sparse or dense, averaged over the ranks that split the rows."""
        if not gradient.is_sparse:
            return cls(first_numbers(len(gradient), gradient.device), ranks.mean(gradient.contiguous()))
        gradient = gradient.coalesce()
        if kernels_for(gradient):  # they take all rows
            return cls.of(gradient.to_dense(), ranks)
        rows, values = gradient.indices().squeeze(0), gradient.values()
        if ranks.size == 1:
            return cls(rows, values)
        on_any = values.new_zeros(len(gradient)).index_fill_(0, rows, 1.0)
        all_rows = ranks.sum(on_any).nonzero().squeeze(1)
        spread = values.new_zeros(len(all_rows), *values.shape[1:])
        return cls(all_rows, ranks.mean(spread.index_copy_(0, torch.searchsorted(all_rows, rows), values)))


class RowAdam:
    """Adam (betas 0.9 and 0.999) over the trained weights of an SAE; `state` names the moments as torch's own does."""

    def __init__(self, weights: Weights):
        self.weights = weights
        self.state: dict[Parameter, dict[str, Tensor]] = {
            parameter: {
                "exp_avg": torch.zeros_like(parameter, requires_grad=False),
                "exp_avg_sq": torch.zeros_like(parameter, requires_grad=False),
            }
            for parameter in weights.trained().values()
        }

    @torch.no_grad()
    def step(
        self, gradients: dict[str, RowGradient], factor: Float[Tensor, ""], number: int, learning_rate: float
    ) -> None:
        """Step `number`, counted from 1, for gradients that are first multiplied by a factor, in place."""
        for name, parameter in self.weights.trained().items():
            gradient = gradients[name]
            gradient.values.mul_(factor)
            self._step_blocks(name, parameter, gradient, number, learning_rate)

    @torch.no_grad()
    def step_with_kernels(self, gradients: dict[str, RowGradient], scalars: Float[Tensor, " 4"]) -> None:
        """The same for gradients of all rows, without anything that only the host knows.

        Args:
            scalars: `adam_scalars` of the step, the factor, and whether to take the step: 1 or 0.
        """
        for name, parameter in self.weights.trained().items():
            kernels = kernels_for(parameter)
            assert kernels is not None
            tensors = [parameter, *self.state[parameter].values(), gradients[name].values]
            if parameter.ndim == 1:
                tensors = [tensor.view(-1, math.gcd(len(tensor), 1024)) for tensor in tensors]
            kernels.adam_rows(*tensors, scalars, self.weights.of_unit_rows(name))
            if name == "threshold":
                self.weights.constrain(name, slice(None))

    def _step_blocks(
        self, name: str, parameter: Parameter, gradient: RowGradient, number: int, learning_rate: float
    ) -> None:
        state, (rows, values) = self.state[parameter], gradient
        n_rows = len(parameter)
        block = min(n_rows, max(1, _BLOCK_ENTRIES * n_rows // parameter.numel()))
        starts = range(0, n_rows, block)
        ends = [0, len(rows)]
        if len(starts) > 1:
            ends = torch.searchsorted(rows, torch.tensor([*starts, n_rows], device=rows.device)).tolist()
        steps_done = torch.full((), number - 1.0, device=parameter.device)
        scratch = torch.empty_like(parameter[:block], requires_grad=False)
        for place, start in enumerate(starts):
            part = slice(start, start + block)
            own = slice(ends[place], ends[place + 1])
            dense = scratch[: min(block, n_rows - start)].zero_().index_copy_(0, rows[own] - start, values[own])
            adam(
                [parameter[part]],
                [dense],
                [state["exp_avg"][part]],
                [state["exp_avg_sq"][part]],
                [],
                [steps_done.clone()],  # the call counts it up
                fused=True,
                amsgrad=False,
                beta1=0.9,
                beta2=0.999,
                lr=learning_rate,
                weight_decay=0.0,
                eps=1e-8,
                maximize=False,
            )
            self.weights.constrain(name, part)
