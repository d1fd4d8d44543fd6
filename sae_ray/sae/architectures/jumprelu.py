"""JumpReLU."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sae_ray.sae.architectures.base import PenalisedArchitecture

if TYPE_CHECKING:
    from torch import Tensor

    from sae_ray.sae.weights import Weights


class JumpReLU(PenalisedArchitecture):
    """A learned threshold per latent, with the number of active latents as penalty (Rajamanoharan et al. 2024).

    The threshold itself is trained, not its logarithm, and kept from falling below 0.
    """

    @property
    def learned_threshold(self) -> float:
        return self.cell.training.jumprelu_initial_threshold

    def activate(self, pre: Tensor, weights: Weights) -> tuple[Tensor, Tensor]:
        from sae_ray.sae.straight_through import JumpReLUFunction

        bandwidth = self.cell.training.jumprelu_bandwidth
        result = JumpReLUFunction.apply(pre, weights.threshold, bandwidth)
        assert result is not None
        codes, active = result
        return codes, active.sum(-1).mean()
