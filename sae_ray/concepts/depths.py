"""How deep in a taxonomy the top images of an SAE's neurons meet, by its Matryoshka levels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from sae_ray.concepts.findings import Findings, mean
from sae_ray.concepts.hierarchy import Path, group_means, lca_depth, lca_mode

if TYPE_CHECKING:
    from jaxtyping import Int


def add_depths(
    found: Findings, top_images: Int[np.ndarray, "neurons n"], paths: Sequence[Path | None], group_sizes: Sequence[int]
) -> None:
    """Depths of the neurons that have all n top images; their means, and those of each level.

    Args:
        found: what to add them to.
        top_images: positions in `paths`, -1 in unused places.
        paths: of each image.
        group_sizes: numbers of neurons of the levels; they sum to that of all.
    """
    depth = lca_depth(top_images, paths)
    found.hierarchy |= {
        "neuron": np.arange(len(depth)),
        "group": np.repeat(np.arange(len(group_sizes)), group_sizes),
        "lca_mean": depth,
        "lca_mode": lca_mode(top_images, paths),
    }
    found.counts |= {"depth": mean(depth), "depths": group_means(depth, group_sizes)}
