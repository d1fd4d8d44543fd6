"""What guided latents learn: which concepts each image shows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor


@dataclass(frozen=True, eq=False)
class Targets:
    """Which concepts the images of a set show, by `image_index`."""

    concepts: tuple[str, ...]
    """Sorted names: concept c is that of latent c."""
    values: Int[Tensor, " images"] | Float[Tensor, "images concepts"]
    """The one concept of each image, the number of concepts for none, -1 where it is unknown. Or of every concept how
    far the image shows it, from 0 to 1, NaN where that is unknown."""

    @classmethod
    def of_classes(cls, classes: Sequence[str | None]) -> Targets:
        """From the class of each image; None for an image without one."""
        names = tuple(sorted({name for name in classes if name is not None}))
        place = {name: number for number, name in enumerate(names)}
        return cls(names, torch.tensor([-1 if name is None else place[name] for name in classes], dtype=torch.int64))

    @classmethod
    def of_matrix(cls, names: Sequence[str], matrix: Float[np.ndarray, "images concepts"]) -> Targets:
        """From fractions; `names` are sorted."""
        return cls(tuple(names), torch.from_numpy(matrix).float())

    def of(self, concepts: Sequence[str]) -> Targets:
        """Those of other concepts. An image of another class shows none of them; a matrix knows nothing of others."""
        if tuple(concepts) == self.concepts:
            return self
        place = {name: number for number, name in enumerate(concepts)}
        if self.values.ndim == 1:
            none = len(concepts)
            other = torch.tensor([place.get(name, none) for name in self.concepts] + [-1])  # the last one for -1
            return Targets(tuple(concepts), other[self.values])
        unknown = torch.full((len(self.values), 1), torch.nan)
        own = {name: number for number, name in enumerate(self.concepts)}
        columns = [own.get(name, len(self.concepts)) for name in concepts]
        return Targets(tuple(concepts), torch.cat([self.values, unknown], 1)[:, columns])

    def to(self, device: torch.device) -> Targets:
        return Targets(self.concepts, self.values.to(device))

    def rows(self, image_index: Int[Tensor, " rows"]) -> Float[Tensor, "rows concepts"]:
        """Those of the images that rows belong to, NaN where they are unknown."""
        values = self.values.index_select(0, image_index)
        if values.ndim == 2:
            return values
        values = values.unsqueeze(1)
        shown = values == torch.arange(len(self.concepts), device=values.device)
        return shown.float().masked_fill(values < 0, torch.nan)
