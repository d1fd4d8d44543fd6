"""JumpReLU."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from sae_ray.errors import check
from sae_ray.sae.architectures.base import OwnSettings, PenalisedArchitecture

if TYPE_CHECKING:
    from torch import Tensor

    from sae_ray.sae.weights import Weights


@dataclass(frozen=True)
class JumpReLUSettings(OwnSettings):
    """Settings of JumpReLU."""

    bandwidth: float = 0.001
    """Width of the window in which the straight-through estimate of the threshold's gradient is not zero."""
    initial_threshold: float = 0.001
    """The threshold before the first step, in units of the normalised input."""
    init: Literal["tied", "aip"] = "tied"
    """The encoder before the first step: the decoder's transpose, or with `aip` that times the inverse of the second
    moment of the activations. The latter is the threshold-activated SAE (TSAE) of arXiv 2509.20784."""

    def __post_init__(self):
        check(0 < self.bandwidth < math.inf, "architectures.jumprelu.bandwidth", self.bandwidth,
              "make it a number above 0")  # fmt: skip
        check(0 <= self.initial_threshold < math.inf, "architectures.jumprelu.initial_threshold",
              self.initial_threshold, "make it 0 or more")  # fmt: skip
        check(self.init in ("tied", "aip"), "architectures.jumprelu.init", self.init, 'make it "tied" or "aip"')


class JumpReLU(PenalisedArchitecture):
    """A learned threshold per latent, with the number of active latents as penalty (Rajamanoharan et al. 2024).

    The threshold itself is trained, not its logarithm, and kept from falling below 0.
    """

    name = "jumprelu"
    Settings = JumpReLUSettings
    has_threshold = True
    sae_lens = "jumprelu"
    opens_sae_lens = True

    @classmethod
    def starts_whitened(cls, settings: JumpReLUSettings) -> bool:
        return settings.init == "aip"

    @property
    def learned_threshold(self) -> float:
        return self.cell.settings.initial_threshold

    def activate(self, pre: Tensor, weights: Weights) -> tuple[Tensor, Tensor]:
        from sae_ray.sae.straight_through import JumpReLUFunction

        result = JumpReLUFunction.apply(pre, weights.threshold, self.cell.settings.bandwidth)
        assert result is not None
        codes, active = result
        return codes, active.sum(-1).mean()
