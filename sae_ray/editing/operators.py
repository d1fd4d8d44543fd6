"""What takes a latent's direction out: linear operators on the space of an SAE, and PISCES' exchange of value vectors.

With û the direction of a latent's decoder row d:

- `Projection` is `I − ûûᵀ`: nothing is left along û, and the value of another latent j, `o·d_j`, changes by
  `(o·û)(û·d_j)` and no more.
- `Mask` sets the coordinates to zero that carry a share of ‖d‖² (FeatureEdit, arXiv 2502.12483): some of the latent is
  left, and others lose what they have there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch

from sae_ray.editing.changes import Change, RankOne, Replaced
from sae_ray.errors import UsageError

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor

    from sae_ray.sae import SAE


def direction_of(sae: SAE, latent: int) -> Float[Tensor, " d_in"]:
    """û in float64. Raises UsageError if there is no such latent, or its decoder row is zero."""
    if not 0 <= latent < sae.d_sae:
        raise UsageError(f"latent is {latent}; the SAE has latents 0 to {sae.d_sae - 1} (d_sae = {sae.d_sae})")
    row = sae.W_dec[latent].double().cpu()
    if not row.norm() > 0:
        raise UsageError(f"latent is {latent}, whose decoder row is zero, so that there is no direction; take another")
    return row / row.norm()


@dataclass(frozen=True, eq=False)
class Projection:
    """`P = I − ûûᵀ`."""

    direction: Float[Tensor, " d"]

    def __call__(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
        """`P x`."""
        unit = self.direction.to(x)
        return x - (x @ unit)[..., None] * unit

    def written(self, weight: Float[Tensor, "d n"], scale: Float[Tensor, " d"] | None = None) -> Change:
        """The change that makes `P diag(scale) W` of `diag(scale) W`."""
        unit, matrix = self.direction, weight.double()
        scaled, left = (unit, unit) if scale is None else (unit * scale, unit / scale)
        return RankOne(-left, matrix.T @ scaled)

    def read(self, weight: Float[Tensor, "n d"]) -> Change:
        """The change that makes `W P` of `W`."""
        return RankOne(-(weight.double() @ self.direction), self.direction)


@dataclass(frozen=True, eq=False)
class Mask:
    """Sets some coordinates to zero."""

    coordinates: Int[Tensor, " n"]

    @classmethod
    def of(cls, direction: Float[Tensor, " d"], share: float) -> Mask:
        """The fewest coordinates that carry at least this share of the direction's squared norm."""
        largest = direction.square().sort(descending=True, stable=True)
        needed = int((largest.values.cumsum(0) < share * largest.values.sum()).sum()) + 1
        return cls(largest.indices[:needed].sort().values)

    def __call__(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
        return x.index_fill(-1, self.coordinates.to(x.device), 0)

    def written(self, weight: Float[Tensor, "d n"], scale: Float[Tensor, " d"] | None = None) -> Change:
        return Replaced(0, self.coordinates, weight.new_zeros(len(self.coordinates), weight.shape[1]))

    def read(self, weight: Float[Tensor, "n d"]) -> Change:
        return Replaced(1, self.coordinates, weight.new_zeros(len(weight), len(self.coordinates)))


Operator = Projection | Mask


class Exchanged(NamedTuple):
    """Value vectors that PISCES changes."""

    index: Int[Tensor, " n"]
    """Ascending."""
    vectors: Float[Tensor, "n d"]


def exchanged_vectors(
    vectors: Float[Tensor, "m d"], sae: SAE, signs: Mapping[int, float], kappa: float, value: float
) -> Exchanged:
    """Value vectors of an MLP whose share of some latents is set to another value (PISCES, arXiv 2505.22586).

    A latent is set in the vectors v with `|v·w| > κ max|v·w|`, w being its encoder column, without biases. There its
    code becomes `value · sign · M`, M being the largest `|v·w|` of all vectors and latents; all else of the vector,
    the SAE's error included, stays. Vectors that come out unchanged are left out, as in the authors' code.

    Args:
        vectors: the columns of the MLP's second matrix.
        sae: of the MLP's output.
        signs: latent -> 1; -1 pushes it the other way.
        kappa: between 0 and 1.
        value: 0 ablates, a negative value pushes away.
    """
    latents, sign = list(signs), torch.tensor(list(signs.values()), dtype=sae.W_dec.dtype)
    likeness = (vectors.to(sae.W_enc) @ sae.W_enc[:, latents]).abs()
    largest = likeness.amax(dim=0)
    chosen = likeness > kappa * largest
    codes = sae.encode(vectors)
    change = (value * sign * largest.max() - codes[:, latents]).where(chosen, torch.tensor(0.0, dtype=codes.dtype))
    after = vectors + (change @ sae.W_dec[latents].to(change)).to(vectors)
    same = torch.isclose(after, vectors).all(dim=1)  # torch's own tolerances are the authors'
    index = (chosen.any(dim=1) & ~same).nonzero().flatten()
    return Exchanged(index, after[index])
