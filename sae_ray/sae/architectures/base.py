"""The base classes of architectures: everything in which one kind of autoencoder differs from another.

Plans read the registry, so torch is imported only inside methods.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

from sae_ray.config import STRICT
from sae_ray.errors import UsageError
from sae_ray.store.identity import changed

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from torch import Tensor

    from sae_ray.sae.config import Cell
    from sae_ray.sae.model import SAE
    from sae_ray.sae.ranks import Split
    from sae_ray.sae.sparse import Pattern
    from sae_ray.sae.weights import Weights


class Forward(NamedTuple):
    """This rank's rows of one batch through an SAE in training. Losses and residual are those of all latents."""

    reconstruction_loss: Float[Tensor, ""]
    """With gradient."""
    sparsity_penalty: Float[Tensor, ""]
    """With gradient, before its coefficient; 0 where sparsity is by selection."""
    residual: Float[Tensor, "rows d_in"]
    """x minus the reconstruction; no gradient."""
    pre: Float[Tensor, "rows latents"]
    """Pre-activations of this rank's latents; no gradient. With kernels in a single process, those of a selecting
    architecture are of a product in bfloat16. On a CPU they hold until the next forward pass in this thread, of any
    cell."""
    fired: Bool[Tensor, " latents"]
    """Those that were active at least once."""
    n_active: Float[Tensor, ""]
    """Number of this rank's active entries."""
    smallest_active: Float[Tensor, ""]
    """Their smallest value, infinite when there is none."""
    entries: tuple[Float[Tensor, " nnz"], Pattern] | None = None
    """They themselves, with gradients; None for an architecture that trains densely."""


@dataclass(frozen=True)
class OwnSettings:
    """Settings of one architecture alone. Subclasses are frozen dataclasses; every field has a default, and a docstring
    that is its help text."""

    __pydantic_config__ = STRICT

    def identity(self) -> dict[str, Any]:
        """What decides the SAE, as plain JSON values: the settings that differ from their defaults."""
        return changed(self)


class Architecture(ABC):
    """An architecture: the class says what it is and how it is used, an instance trains one cell."""

    name: ClassVar[str]
    """Its name in study files and on disk."""
    tuned_by: ClassVar[Literal["k", "sparsity"]]
    """Which field of a cell sets its sparsity: the number of active latents, or the coefficient of a penalty."""
    uses: ClassVar[frozenset[str]] = frozenset(
        {
            *("batch_size", "steps", "learning_rate", "warmup_steps", "decay_start", "gradient_clip", "dtype", "init"),
            *("centre", "threshold"),  # of the data: what a batch is centred on, and which rows are never in one
        }
    )
    """The fields of `TrainingConfig` that decide what is trained; the others are ignored. These are common to all."""
    Settings: ClassVar[type[OwnSettings]] = OwnSettings
    """Its own settings, which stand under `[architectures.<name>]` in a study file."""
    has_threshold: ClassVar[bool] = False
    """Whether a trained SAE has a threshold per latent, which codes must exceed."""
    estimates_threshold: ClassVar[bool] = False
    """Whether this threshold is the moving average of the smallest kept value, or calibrated."""
    revives: ClassVar[bool] = False
    """Whether AuxK revives dead latents."""
    frozen: ClassVar[frozenset[str]] = frozenset()
    """Weights (`Weights.named`) that keep their first values."""
    scores_batches: ClassVar[bool] = False
    """Whether `forward` gives active entries, whose MonoSemanticity can then be a goal."""
    guided: ClassVar[bool] = False
    """Whether its first latents learn concepts (`sae_ray.sae.guidance`); its settings are then `GuidanceSettings`."""
    standardises_rows: ClassVar[bool] = False
    """Whether rows are brought to mean 0 and standard deviation 1 before they are encoded, and back after decoding.
    Training then does not begin `b_dec` at the median of its inputs, which need no common scale either."""
    unit_decoder: ClassVar[bool] = True
    """Whether decoder rows begin and stay with unit norm. Otherwise they begin as those of `torch.nn.Linear`."""
    codes_below_1: ClassVar[bool] = False
    """Whether a code is a number from 0 to 1, which tells how far its concept is present."""
    latents_compete: ClassVar[bool] = False
    """Whether the code of a latent depends on the other latents of the sample, in inference: the `k` largest are
    kept."""
    sae_lens: ClassVar[str]
    """The architecture of SAELens that stores it and gives the same codes."""
    opens_sae_lens: ClassVar[bool] = False
    """Whether such a directory opens as this architecture when SAELens itself wrote it; the first registered does."""

    # Training

    def __init__(self, cell: Cell, d_in: int, split: Split):
        """`split`: how rows and latents are split over ranks. Weights and inputs are this rank's."""
        self.cell, self.split = cell, split
        self.prefixes = [split.latents.share(end) for end in accumulate(cell.group_sizes(d_in))]
        """How many of this rank's latents each nested prefix has."""
        self._ends: Int[Tensor, " n_prefixes"] | None = None
        """They, on the device, since the first step there."""
        self.gamma: Float[Tensor, " d_in"] | None = None
        """Factors of the error in every dimension, inside the square; None for those that are all 1."""

    @property
    def learned_threshold(self) -> float | None:
        """Initial value of a threshold per latent that is trained like a weight; None without one."""
        return None

    @classmethod
    def starts_whitened(cls, settings: Any) -> bool:
        """Whether the encoder starts with the second moment of the activations taken out (`start_whitened`)."""
        return False

    @abstractmethod
    def forward(self, weights: Weights, x: Float[Tensor, "batch d_in"]) -> Forward: ...

    @classmethod
    def logit_scale(cls, d_in: int) -> float:
        """What the pre-activation of a guided latent is multiplied by, to be the logit of its concept. Inputs are then
        as long as standardised rows are, √d_in: with a norm of 1 encoders would have to grow for long."""
        return 1.0 if cls.standardises_rows else d_in**0.5

    @property
    def scales_inputs(self) -> bool:
        """Whether training divides activations by their common scale."""
        return not self.standardises_rows

    def inputs(self, x: Float[Tensor, "batch d_in"]) -> Float[Tensor, "batch d_in"]:
        """What the encoder reads."""
        return x

    def weighed(self, error: Float[Tensor, "... d_in"]) -> Float[Tensor, "... d_in"]:
        """An error as it counts in the loss."""
        return error if self.gamma is None else error * self.gamma

    @classmethod
    def groups(cls, settings: Any, d_sae: int) -> list[int]:
        """How many latents each nested prefix of the dictionary adds; they sum to `d_sae`.

        Raises UsageError when the settings do not fit `d_sae`.
        """
        return [d_sae]

    def pre_activations(self, weights: Weights, x: Tensor) -> Tensor:
        """With gradients if they are enabled."""
        import torch

        from sae_ray.sae.product import affine, rough_affine

        centred = x - self.split.latents.shared(weights.b_dec)
        if self.cell.training.dtype == "bfloat16":
            if torch.is_grad_enabled():
                return (centred.bfloat16() @ weights.W_enc_t.bfloat16().T).float() + weights.b_enc
            return rough_affine(centred, weights.W_enc_t, weights.b_enc)
        if torch.is_grad_enabled():
            return torch.addmm(weights.b_enc, centred, weights.W_enc_t.T)
        return affine(centred, weights.W_enc_t, weights.b_enc)

    # Inference: every positive value, above the threshold where there is one

    @classmethod
    def check_sae(cls, sae: SAE) -> None:
        """Raises UsageError when the SAE lacks what inference needs, or has a threshold that it does not use."""
        if cls.has_threshold != (sae.threshold is not None):
            raise UsageError(f"a {cls.name} SAE {'needs a' if cls.has_threshold else 'has no'} threshold")
        if cls.latents_compete and (sae.k is None or not 1 <= sae.k <= sae.d_sae):
            raise UsageError(f"k = {sae.k}: a {cls.name} SAE of {sae.d_sae} latents needs a k from 1 to {sae.d_sae}")

    @classmethod
    def codes(cls, pre: Float[Tensor, "... d_sae"], sae: SAE) -> Float[Tensor, "... d_sae"]:
        """Dense codes."""
        return pre.relu() if sae.threshold is None else pre.relu() * (pre > sae.threshold)

    @classmethod
    def active(cls, pre: Float[Tensor, "n d_sae"], sae: SAE) -> Int[Tensor, " nnz"]:
        """Ascending flat indices of the codes above 0."""
        kept = pre > 0 if sae.threshold is None else (pre > sae.threshold) & (pre > 0)
        return kept.flatten().nonzero().squeeze(1)

    @classmethod
    def activation(cls, pre: Float[Tensor, " nnz"]) -> Float[Tensor, " nnz"]:
        """The codes of active entries."""
        return pre

    @classmethod
    def sae_lens_config(cls, sae: SAE) -> dict[str, Any]:
        """Further keys that SAELens wants in `cfg.json`."""
        return {}


class SelectingArchitecture(Architecture):
    """Architectures that select `k` latents per sample: all gradients follow the selected entries alone."""

    tuned_by = "k"
    revives = scores_batches = True
    uses = Architecture.uses | {"auxk_weight", "auxk_select", "dead_after_samples"}

    @abstractmethod
    def select(self, pre: Float[Tensor, "rows latents"]) -> Int[Tensor, " nnz"]:
        """Ascending flat indices of this rank's active entries, all of them above 0."""

    @abstractmethod
    def rivals(self, pre: Float[Tensor, "rows latents"]) -> tuple[Float[Tensor, "groups entries"], int]:
        """All entries of a single process in groups, and how many of each group are active at most."""

    def forward(self, weights: Weights, x: Tensor) -> Forward:
        import torch

        from sae_ray.sae.kernels import fixed_shapes
        from sae_ray.sae.sparse import PaddedPattern, Pattern, encode_entries

        with torch.no_grad():
            if fixed_shapes(x, self.split):
                pre, flat, kept = self._padded_selection(weights, x)
                pattern = PaddedPattern.of_flat(flat, *pre.shape)
            else:
                pre = self.pre_activations(weights, x)
                flat = self.select(pre)
                pattern, kept = Pattern.of_flat(flat, *pre.shape), pre.flatten()[flat]
        b_dec = self.split.latents.shared(weights.b_dec)
        values = encode_entries(kept, x, weights.W_enc_t, weights.b_enc, b_dec, pattern)
        errors = x - self._reconstruct_prefixes(values, pattern, weights)
        n_prefixes = len(errors)
        active = kept > 0  # all but the missing ones
        return Forward(
            # The reference averages over the prefixes twice; so do we, and losses stay comparable with its own.
            reconstruction_loss=self.weighed(errors).square().sum(-1).mean() / n_prefixes,
            sparsity_penalty=x.new_zeros(()),
            residual=errors[-1].detach(),
            pre=pre,
            fired=pre.new_zeros(pre.shape[1] + 1, dtype=torch.bool).index_fill_(0, pattern.latents, True)[:-1],
            n_active=active.sum().to(x.dtype),
            smallest_active=torch.cat([kept.where(active, torch.inf), kept.new_full((1,), torch.inf)]).amin(),
            entries=(values, pattern),
        )

    def _padded_selection(self, weights: Weights, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Pre-activations of a product in bfloat16; the active entries of a single process and their values, padded.

        Where bfloat16 is not the cell's dtype, that product only tells which entries are computed in float32 and
        compete: twice as many as are selected. One is missed if rounding moves it behind all the others.
        """
        from sae_ray.sae.kernels import kernels_for
        from sae_ray.sae.product import rough_affine
        from sae_ray.sae.selection import padded_largest

        centred = x - weights.b_dec
        pre = rough_affine(centred, weights.W_enc_t, weights.b_enc)
        if self.cell.training.dtype == "bfloat16":
            return pre, *padded_largest(*self.rivals(pre))

        def exact(flat: Tensor) -> Tensor:
            kernels = kernels_for(x)
            assert kernels is not None
            rows, latents = flat // pre.shape[1], flat % pre.shape[1]
            return kernels.dots(rows, latents, centred, weights.W_enc_t) + weights.b_enc[latents]

        return pre, *padded_largest(*self.rivals(pre), exact)

    def _reconstruct_prefixes(
        self, values: Float[Tensor, " nnz"], pattern: Pattern, weights: Weights
    ) -> Float[Tensor, "n_prefixes rows d_in"]:
        import torch

        from sae_ray.sae.sparse import decode_entries
        from sae_ray.sae.whole_numbers import stable_order

        joined = self.split.latents.joined
        if len(self.prefixes) == 1:
            return (joined(decode_entries(values, weights.W_dec, pattern)) + weights.b_dec).unsqueeze(0)
        if self._ends is None:
            self._ends = torch.tensor(self.prefixes, device=values.device)
        n_groups = len(self.prefixes)
        group = torch.bucketize(pattern.latents, self._ends, right=True)
        # Each group decodes into a batch of its own; a prefix is the sum of the groups up to its end.
        rows = group * pattern.n_rows + pattern.rows
        order = stable_order(rows, n_groups * pattern.n_rows + pattern.n_rows)
        grouped = type(pattern)(rows[order], pattern.latents[order], n_groups * pattern.n_rows, pattern.n_latents)
        parts = joined(decode_entries(values.index_select(0, order), weights.W_dec, grouped))
        return parts.view(n_groups, pattern.n_rows, -1).cumsum(0) + weights.b_dec


class PenalisedArchitecture(Architecture):
    """Architectures whose sparsity is a penalty. How many latents are active is unbounded, so they train densely."""

    tuned_by = "sparsity"
    uses = Architecture.uses | {"sparsity_warmup_steps"}

    @abstractmethod
    def activate(self, pre: Tensor, weights: Weights) -> tuple[Float[Tensor, "rows latents"], Float[Tensor, ""]]:
        """Codes and sparsity penalty of this rank's latents; penalties are added up over latents."""

    def forward(self, weights: Weights, x: Tensor) -> Forward:
        import torch

        pre = self.pre_activations(weights, x)
        codes, penalty = self.activate(pre, weights)
        joined = self.split.latents.joined
        error = x - (joined(codes @ weights.W_dec) + weights.b_dec)
        kept = codes.detach()
        active = kept > 0
        return Forward(
            reconstruction_loss=self.weighed(error).square().sum(-1).mean(),
            sparsity_penalty=joined(penalty),
            residual=error.detach(),
            pre=pre.detach(),
            fired=active.any(0),
            n_active=active.sum().to(x.dtype),
            smallest_active=torch.where(active, kept, torch.inf).amin(),
        )
