"""What decides one autoencoder of a grid: its architecture, its size, its sparsity and how it is trained."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Literal

from sae_ray.errors import UsageError

ArchitectureName = Literal["batch_topk", "matryoshka_batch_topk", "topk", "relu", "jumprelu"]
TOPK_FAMILY: tuple[ArchitectureName, ...] = ("batch_topk", "matryoshka_batch_topk", "topk")
THRESHOLD_ESTIMATORS: tuple[ArchitectureName, ...] = ("batch_topk", "matryoshka_batch_topk")

# Read by pydantic when a study file is opened; nothing here imports pydantic.
_PYDANTIC = {"extra": "forbid", "use_attribute_docstrings": True}


@dataclass(frozen=True)
class TrainingConfig:
    """How an SAE is trained. The defaults are the settings of Pach et al. 2025 (arXiv 2504.02821) and its code."""

    __pydantic_config__ = _PYDANTIC

    batch_size: int = 4096
    """Samples per step, over all ranks."""
    steps: int = 100_000
    """Optimiser steps."""
    learning_rate: float | None = None
    """Peak learning rate of Adam; unset: 2e-4 / sqrt(d_sae / 2**14)."""
    warmup_steps: int = 1000
    """Steps over which the learning rate rises linearly from 0."""
    decay_start: int | None = None
    """Step from which the learning rate falls linearly to 0 at the end; unset: no decay."""
    gradient_clip: float = 1.0
    """Largest norm of the whole gradient of one SAE."""
    auxk_weight: float = 0.03
    """Weight of the AuxK loss, which revives dead latents (top-k architectures); 0 turns it off."""
    auxk_select: Literal["post", "pre"] = "post"
    """AuxK chooses among the dead latents by their ReLU value ("post"; the reference) or by their pre-activation
    ("pre"), which also revives latents that are negative everywhere."""
    dead_after_samples: int = 10_000_000
    """A latent that has not fired for this many samples is dead."""
    threshold_beta: float = 0.999
    """Decay of the moving average of the smallest kept value: the inference threshold (batch top-k architectures)."""
    threshold_start_step: int = 1000
    """The threshold is averaged over the steps after this one (batch top-k architectures)."""
    group_fractions: tuple[float, ...] = (0.0625, 0.125, 0.25, 0.5625)
    """Shares of the dictionary that the Matryoshka prefixes add one after the other; they sum to 1."""
    sparsity_warmup_steps: int | None = None
    """Steps over which the sparsity coefficient rises linearly from 0 (relu, jumprelu); unset: a tenth of `steps`."""
    jumprelu_bandwidth: float = 0.001
    """Width of the window in which the straight-through estimate of JumpReLU's threshold gradient is not zero."""
    jumprelu_initial_threshold: float = 0.001
    """JumpReLU's threshold before the first step, in units of the normalised input."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the encoder's product; weights, Adam moments and everything else stay float32."""

    def __post_init__(self):
        for name in ("batch_size", "steps", "dead_after_samples"):
            _require(self, name, getattr(self, name) >= 1, "at least 1")
        for name in ("gradient_clip", "jumprelu_bandwidth"):
            _require(self, name, 0 < getattr(self, name) < math.inf, "a number above 0")
        for name in ("auxk_weight", "jumprelu_initial_threshold"):
            _require(self, name, 0 <= getattr(self, name) < math.inf, "0 or more")
        _require(self, "learning_rate", self.learning_rate is None or 0 < self.learning_rate < math.inf, "above 0")
        _require(self, "warmup_steps", 0 <= self.warmup_steps <= self.steps, f"between 0 and steps ({self.steps})")
        decay_fits = self.decay_start is None or 0 <= self.decay_start < self.steps
        _require(self, "decay_start", decay_fits, f"at least 0 and below steps ({self.steps}), or unset")
        _require(self, "auxk_select", self.auxk_select in ("post", "pre"), '"post" or "pre"')
        _require(self, "threshold_beta", 0 <= self.threshold_beta < 1, "at least 0 and below 1")
        _require(self, "threshold_start_step", self.threshold_start_step >= 0, "0 or more")
        sparsity_fits = self.sparsity_warmup_steps is None or self.sparsity_warmup_steps >= 0
        _require(self, "sparsity_warmup_steps", sparsity_fits, "0 or more, or unset")
        fractions_fit = all(f > 0 for f in self.group_fractions) and math.isclose(sum(self.group_fractions), 1)
        _require(self, "group_fractions", fractions_fit, "numbers above 0 that sum to 1")
        _require(self, "dtype", self.dtype in ("float32", "bfloat16"), '"float32" or "bfloat16"')

    def learning_rate_at(self, step: int, d_sae: int) -> float:
        """The learning rate of step `step`, counted from 0."""
        peak = self.learning_rate if self.learning_rate is not None else 2e-4 / math.sqrt(d_sae / 2**14)
        warmup = min(1.0, step / self.warmup_steps) if self.warmup_steps else 1.0
        if self.decay_start is None or step < self.decay_start:
            return peak * warmup
        return peak * warmup * (self.steps - step) / (self.steps - self.decay_start)

    def sparsity_warmup_at(self, step: int) -> float:
        """The share of the sparsity coefficient in force at step `step`."""
        warmup_steps = self.steps // 10 if self.sparsity_warmup_steps is None else self.sparsity_warmup_steps
        return min(1.0, step / warmup_steps) if warmup_steps else 1.0


@dataclass(frozen=True)
class Cell:
    """One autoencoder of a grid."""

    __pydantic_config__ = _PYDANTIC

    architecture: ArchitectureName
    """How latents are selected and what the loss is."""
    expansion: float
    """Latents per input dimension: d_sae = int(expansion * d_in)."""
    k: int | None = None
    """Active latents per sample (on average for the batch top-k architectures); for the top-k architectures only."""
    sparsity: float | None = None
    """Coefficient of the sparsity penalty; for relu (L1 norm of the codes) and jumprelu (number of active latents)."""
    seed: int = 0
    """Seed of the initial weights."""
    training: TrainingConfig = field(default_factory=TrainingConfig)
    """How it is trained."""

    def __post_init__(self):
        known = ArchitectureName.__args__
        _require(self, "architecture", self.architecture in known, f"one of {', '.join(known)}")
        _require(self, "expansion", 0 < self.expansion < math.inf, "a number above 0")
        _require(self, "seed", 0 <= self.seed < 2**63, "at least 0 and below 2**63")
        if self.architecture in TOPK_FAMILY:
            _require(self, "k", self.k is not None and self.k >= 1, f"at least 1 for {self.architecture}")
            _require(self, "sparsity", self.sparsity is None, f"unset for {self.architecture}, whose sparsity is `k`")
        else:
            sparsity_fits = self.sparsity is not None and 0 <= self.sparsity < math.inf
            _require(self, "sparsity", sparsity_fits, f"0 or more for {self.architecture}")
            _require(self, "k", self.k is None, f"unset for {self.architecture}, which is tuned by `sparsity`")
        if self.architecture in THRESHOLD_ESTIMATORS:
            training = self.training
            fits = training.threshold_start_step < training.steps - 1
            _require(training, "threshold_start_step", fits, f"below steps - 1 ({training.steps - 1}): the inference "
                     "threshold is estimated in the steps after it")  # fmt: skip

    def identity(self) -> dict:
        return dataclasses.asdict(self)

    def check(self, d_in: int) -> None:
        """Raises UsageError when this cell cannot be trained on activations `d_in` wide."""
        self.group_sizes(d_in)

    def d_sae(self, d_in: int) -> int:
        """The number of latents for inputs `d_in` wide; UsageError when `k` or a Matryoshka group does not fit."""
        d_sae = int(self.expansion * d_in)
        _require(self, "expansion", d_sae >= 1, f"at least 1/{d_in}: the input is {d_in} wide")
        _require(self, "k", self.k is None or self.k <= d_sae, f"at most d_sae = {d_sae}")
        return d_sae

    def group_sizes(self, d_in: int) -> list[int]:
        """Latents that each Matryoshka prefix adds; the remainder goes to the last group. One group elsewhere."""
        d_sae = self.d_sae(d_in)
        if self.architecture != "matryoshka_batch_topk":
            return [d_sae]
        fractions = self.training.group_fractions
        sizes = [int(fraction * d_sae) for fraction in fractions[:-1]]
        sizes.append(d_sae - sum(sizes))
        _require(self.training, "group_fractions", min(sizes) >= 1, f"large enough for one latent each of {d_sae}")
        return sizes


def _require(config: object, name: str, fits: bool, remedy: str) -> None:
    if not fits:
        value = getattr(config, name)
        raise UsageError(
            f"{'training' if isinstance(config, TrainingConfig) else 'cell'}.{name} = {value!r}: make it {remedy}"
        )
