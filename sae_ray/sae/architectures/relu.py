"""ReLU with an L1 penalty."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sae_ray.sae.architectures.base import PenalisedArchitecture

if TYPE_CHECKING:
    from torch import Tensor

    from sae_ray.sae.weights import Weights


class ReLU(PenalisedArchitecture):
    """ReLU with the L1 norm of the codes as penalty (decoder rows have unit norm)."""

    name = "relu"
    sae_lens = "standard"
    opens_sae_lens = True

    def activate(self, pre: Tensor, weights: Weights) -> tuple[Tensor, Tensor]:
        codes = pre.relu()
        return codes, codes.sum(-1).mean()
