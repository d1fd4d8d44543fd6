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
        small = {}
        for name, parameter in self.weights.trained().items():
            gradients[name].values.mul_(factor)
            if parameter.numel() <= _BLOCK_ENTRIES:
                small[name] = _dense(gradients[name], torch.empty_like(parameter, requires_grad=False))
            else:
                self._step_blocks(name, parameter, gradients[name], number, learning_rate)
        self._adam({name: slice(None) for name in small}, list(small.values()), number, learning_rate)

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
        rows, values = gradient
        n_rows = len(parameter)
        block = max(1, _BLOCK_ENTRIES * n_rows // parameter.numel())
        starts = range(0, n_rows, block)
        ends = torch.searchsorted(rows, torch.tensor([*starts, n_rows], device=rows.device)).tolist()
        scratch = torch.empty_like(parameter[:block], requires_grad=False)
        for start, first, end in zip(starts, ends, ends[1:], strict=False):
            of_part = RowGradient(rows[first:end] - start, values[first:end])
            dense = _dense(of_part, scratch[: min(block, n_rows - start)])
            self._adam({name: slice(start, start + block)}, [dense], number, learning_rate)

    def _adam(self, parts: dict[str, slice], gradients: list[Tensor], number: int, learning_rate: float) -> None:
        """Steps some rows of weights, all in one call, and constrains them."""
        if not parts:
            return
        weights = [(getattr(self.weights, name), part) for name, part in parts.items()]
        steps_done = torch.full((len(parts),), number - 1.0, device=gradients[0].device)
        adam(
            [weight[part] for weight, part in weights],
            gradients,
            [self.state[weight]["exp_avg"][part] for weight, part in weights],
            [self.state[weight]["exp_avg_sq"][part] for weight, part in weights],
            [],
            list(steps_done.unbind()),  # the call counts them up
            fused=True,
            amsgrad=False,
            beta1=0.9,
            beta2=0.999,
            lr=learning_rate,
            weight_decay=0.0,
            eps=1e-8,
            maximize=False,
        )
        for name, part in parts.items():
            self.weights.constrain(name, part)


def _dense(gradient: RowGradient, scratch: Tensor) -> Tensor:
    """The gradient of all rows, in the scratch memory if some are 0."""
    rows, values = gradient
    return values if len(rows) == len(scratch) else scratch.zero_().index_copy_(0, rows, values)
