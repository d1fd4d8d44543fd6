"""The configuration of one autoencoder of a grid: its architecture, size, sparsity and training."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from sae_ray.config import STRICT
from sae_ray.errors import check
from sae_ray.sae.architectures import architecture
from sae_ray.sae.weighing import SOURCES, UNIFORM
from sae_ray.store.identity import UNNAMED, changed

if TYPE_CHECKING:
    from sae_ray.sae.architectures.base import Architecture


@dataclass(frozen=True)
class TrainingConfig:
    """How an SAE is trained, whatever its architecture; each architecture ignores what it does not use.

    The defaults are the settings of Pach et al. 2025 (arXiv 2504.02821) and its code, but for `threshold`.
    """

    __pydantic_config__ = STRICT

    batch_size: int = 4096
    """Samples per step, over all ranks."""
    steps: int = 100_000
    """Optimiser steps."""
    learning_rate: float | None = None
    """Peak learning rate of Adam. Default: 2e-4 / sqrt(d_sae / 2**14)."""
    warmup_steps: int | None = None
    """Steps over which the learning rate rises linearly from 0. Default: a tenth of `steps`, at most 1000."""
    decay_start: int | None = None
    """Step from which the learning rate falls linearly to 0 at the end. Default: no decay."""
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
    threshold_start_step: int | None = None
    """The threshold is averaged over the steps after this one (batch top-k architectures). Default: a tenth of
    `steps`, at most 1000."""
    sparsity_warmup_steps: int | None = None
    """Steps over which the coefficient of a sparsity penalty rises linearly from 0. Default: a tenth of `steps`."""
    threshold: Literal["average", "calibrated"] = field(default="calibrated", metadata={UNNAMED: "average"})
    """The inference threshold (batch top-k architectures): that moving average (the reference), or the value at which
    `k` latents are active on average on images that are kept out of training, one in ten of a part of the training
    images. They are kept out of the training of all architectures, which then see the same. With fewer than ten images
    none is kept out, and it is the average."""
    centre: bool = False
    """Subtract the mean of the training activations from them before they are scaled by what is left; `b_dec` of the
    trained SAE holds it. The reference does not; it is recommended where the mean is long beside the spread."""
    dtype: Literal["float32", "tf32", "bfloat16"] = "float32"
    """Precision of dense products. "bfloat16" rounds the factors of the encoder's, and on a GPU of AuxK's. "tf32"
    rounds those of all on a GPU, to 10 bits instead of 7; on a CPU it is "float32". Weights, Adam moments, sums and
    everything else stay float32. On one GPU, architectures that select look for candidates by a product in bfloat16
    whatever this says; their values are then computed as it says."""
    init: str | None = None
    """An SAE to start from instead of random directions: a directory that every node has, a URI, or an id on the
    Hugging Face hub. Its architecture and widths must be those of every SAE of the grid. Adam, its learning rates and
    the counters of dead latents start anew."""

    def __post_init__(self):
        for name in ("batch_size", "steps", "dead_after_samples"):
            self._check(name, getattr(self, name) >= 1, "at least 1")
        self._check("learning_rate", self.learning_rate is None or 0 < self.learning_rate < math.inf, "above 0")
        warmup_fits = 0 <= self.effective("warmup_steps") <= self.steps
        self._check("warmup_steps", warmup_fits, f"between 0 and steps ({self.steps})")
        decay_fits = self.decay_start is None or 0 <= self.decay_start < self.steps
        self._check("decay_start", decay_fits, f"at least 0 and below steps ({self.steps}), or unset")
        self._check("gradient_clip", 0 < self.gradient_clip < math.inf, "a number above 0")
        self._check("auxk_weight", 0 <= self.auxk_weight < math.inf, "0 or more")
        self._check("auxk_select", self.auxk_select in ("post", "pre"), '"post" or "pre"')
        self._check("threshold_beta", 0 <= self.threshold_beta < 1, "at least 0 and below 1")
        self._check("threshold", self.threshold in ("average", "calibrated"), '"average" or "calibrated"')
        for name in ("threshold_start_step", "sparsity_warmup_steps"):
            self._check(name, self.effective(name) >= 0, "0 or more, or unset")
        self._check("dtype", self.dtype in ("float32", "tf32", "bfloat16"), '"float32", "tf32" or "bfloat16"')

    @property
    def derived(self) -> dict[str, int]:
        """The values of unset settings that follow from `steps`."""
        tenth = self.steps // 10
        return {
            "warmup_steps": min(1000, tenth),
            "threshold_start_step": min(1000, tenth),
            "sparsity_warmup_steps": tenth,
        }

    def effective(self, name: str) -> int:
        """The value of a setting, or its derived value if it is unset."""
        value = getattr(self, name)
        return self.derived[name] if value is None else value

    def learning_rate_at(self, step: int, d_sae: int) -> float:
        """The learning rate of step `step`, counted from 0."""
        peak = self.learning_rate if self.learning_rate is not None else 2e-4 / math.sqrt(d_sae / 2**14)
        warmup = _rise(step, self.effective("warmup_steps"))
        if self.decay_start is None or step < self.decay_start:
            return peak * warmup
        return peak * warmup * (self.steps - step) / (self.steps - self.decay_start)

    def sparsity_warmup_at(self, step: int) -> float:
        """The factor on the sparsity coefficient at step `step`."""
        return _rise(step, self.effective("sparsity_warmup_steps"))

    def _check(self, name: str, fits: bool, remedy: str) -> None:
        check(fits, f"training.{name}", getattr(self, name), f"make it {remedy}")


@dataclass(frozen=True)
class Cell:
    """One autoencoder of a grid."""

    architecture: str
    """How latents are selected and what the loss is: a name in the registry."""
    expansion: float
    """Latents per input dimension: d_sae = int(expansion * d_in)."""
    k: int | None = None
    """Active latents per sample, exactly or on average; for architectures that are tuned by it."""
    sparsity: float | None = None
    """Coefficient of the sparsity penalty, for architectures that have one."""
    seed: int = 0
    """Seed of the initial weights."""
    training: TrainingConfig = field(default_factory=TrainingConfig)
    """How it is trained."""
    settings: Any = None
    """The architecture's own settings; None stands for its defaults."""
    weights: str = UNIFORM
    """How much every dimension of the input counts in the loss: one of `sae_ray.sae.weighing.SOURCES`, or a table."""
    alpha: float = 0.5
    """The weight of a dimension is its significance to this power."""
    monosemanticity: float = 0.0
    """Weight of the loss by which latents become active on images that are alike to the judge."""

    def __post_init__(self):
        kind, name = self.kind, self.architecture
        if self.settings is None:
            object.__setattr__(self, "settings", kind.Settings())
        self._check("expansion", 0 < self.expansion < math.inf, "a number above 0")
        self._check("seed", 0 <= self.seed < 2**63, "at least 0 and below 2**63")
        if kind.tuned_by == "k":
            self._check("k", self.k is not None and self.k >= 1, f"at least 1 for {name}")
            check(self.sparsity is None, "cell.sparsity", self.sparsity, f"leave it out: {name} is tuned by k")
        else:
            sparsity_fits = self.sparsity is not None and 0 <= self.sparsity < math.inf
            self._check("sparsity", sparsity_fits, f"0 or more for {name}")
            check(self.k is None, "cell.k", self.k, f"leave it out: {name} is tuned by sparsity")
        self._check(
            "settings", type(self.settings) is kind.Settings, f"the {kind.Settings.__name__} of {name}, or unset"
        )
        self._check("alpha", 0 <= self.alpha < math.inf, "0 or more")
        wanted = 0 <= self.monosemanticity < math.inf
        self._check("monosemanticity", wanted and (kind.scores_batches or not self.monosemanticity),
                    "0 or more" if kind.scores_batches else f"0 for {name}, which does not select latents")  # fmt: skip
        check(self.training.init is None or not kind.starts_whitened(self.settings), f"architectures.{name}.init",
              getattr(self.settings, "init", None), "training.init names an SAE to start from; leave one of the two "
              "out")  # fmt: skip
        if kind.estimates_threshold:
            training = self.training
            check(training.steps >= 2, "training.steps", training.steps, f"make it at least 2 for {name}")
            check(training.effective("threshold_start_step") < training.steps - 1, "training.threshold_start_step",
                  training.threshold_start_step, f"make it below steps - 1 ({training.steps - 1}): the inference "
                  "threshold is estimated in the steps after it")  # fmt: skip

    @property
    def kind(self) -> type[Architecture]:
        """The class of its architecture."""
        return architecture(self.architecture, "cell.architecture")

    @property
    def guided(self) -> bool:
        """Whether its first latents learn concepts."""
        return self.kind.guided and self.settings.concept_weight > 0

    def identity(self) -> dict[str, Any]:
        """What determines the SAE, as plain JSON values: equal for two cells that train to the same weights.

        Only settings that the architecture uses and that differ from their defaults are included (see `changed`). A
        value that equals the derived one counts as a default. What files hold (a table of weights, the SAE to start
        from) is not.
        """
        training = {
            name: value
            for name, value in changed(self.training).items()
            if name in self.kind.uses and value != self.training.derived.get(name) and name != "init"
        }
        identity = {
            "architecture": self.architecture,
            "expansion": self.expansion,
            self.kind.tuned_by: getattr(self, self.kind.tuned_by),
            "seed": self.seed,
            "training": training,
            "settings": self.settings.identity(),
        }
        if self.weighted:
            identity["weights"] = {"source": self.weights if self.weights in SOURCES else "table", "alpha": self.alpha}
        if self.monosemanticity:
            identity["monosemanticity"] = self.monosemanticity
        return identity

    @property
    def weighted(self) -> bool:
        """Whether dimensions count differently in the loss."""
        return self.weights != UNIFORM

    def check(self, d_in: int, shards: int = 1) -> None:
        """Raises UsageError when it cannot be trained on activations `d_in` wide, its latents split over `shards`."""
        self.group_sizes(d_in)
        d_sae = self.d_sae(d_in)
        check(shards <= d_sae, "resources.train.shards", shards,
              f"choose at most {d_sae}, the latents of an SAE with expansion {self.expansion:g}")  # fmt: skip

    def check_concepts(self, d_in: int, n_concepts: int) -> None:
        """Raises UsageError when it has not a latent for each of these concepts."""
        check(n_concepts <= self.d_sae(d_in), "cell.expansion", self.expansion,
              f"make it at least {n_concepts}/{d_in}: each of {n_concepts} concepts needs a latent")  # fmt: skip

    def d_sae(self, d_in: int) -> int:
        """The number of latents for inputs `d_in` wide; UsageError when `expansion` or `k` does not fit."""
        d_sae = int(self.expansion * d_in)
        self._check("expansion", d_sae >= 1, f"at least 1/{d_in}: the input is {d_in} wide")
        self._check("k", self.k is None or self.k <= d_sae, f"at most d_sae = {d_sae}")
        return d_sae

    def group_sizes(self, d_in: int) -> list[int]:
        """Latents that each nested prefix of the dictionary adds; a single group for most architectures."""
        return self.kind.groups(self.settings, self.d_sae(d_in))

    def _check(self, name: str, fits: bool, remedy: str) -> None:
        check(fits, f"cell.{name}", getattr(self, name), f"make it {remedy}")


def _rise(step: int, over: int) -> float:
    return min(1.0, step / over) if over else 1.0
