"""Hierarchy: how deep in a taxonomy a neuron's top images meet (Pach et al., arXiv 2504.02821).

ExplainableML/sae-for-vlm at 69e211d, `inat_depth.py`, does so for iNaturalist.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from sae_ray.concepts.overlap import checked_top_images, live_neurons
from sae_ray.errors import UsageError, check

if TYPE_CHECKING:
    from jaxtyping import Float, Int

Path = Sequence[str]
"""The ranks of a class in a taxonomy, widest first: kingdom, phylum, … species."""


def lca_depth(
    top_images: Any, paths: Sequence[Path | None], rounding: Literal["none", "reference"] = "none"
) -> Float[np.ndarray, " neurons"]:
    """Mean depth of the lowest common ancestor over all pairs of a neuron's top images.

    The depth of two images is the number of ranks that their paths share, counted from the widest: 0 in different
    kingdoms, and the whole length for images of one class. So a high depth means a narrow concept.

    Args:
        top_images: `[neurons, n]`, positions of images in `paths`, -1 in unused places.
        paths: of each image; None for an image without a class, which is left out.
        rounding: `reference` rounds each mean to a whole number (halves to even), as the reference implementation does
            before it averages over neurons. The paper's text does not mention it.

    Returns:
        Ranks; NaN for a neuron with unused places or with fewer than two images that have a class. Neurons are
        independent, so blocks of them give the same.

    Raises:
        UsageError: the shape does not fit, a position is not one of `paths`, or `rounding` is none of the two.
    """
    check(rounding in ("none", "reference"), "rounding", rounding, 'make it "none" or "reference"')
    counts = lca_counts(top_images, paths)
    n_pairs = counts.sum(axis=1)
    with np.errstate(invalid="ignore"):
        mean = counts @ np.arange(counts.shape[1]) / n_pairs
    return np.round(mean) if rounding == "reference" else mean


def lca_mode(top_images: Any, paths: Sequence[Path | None]) -> Int[np.ndarray, " neurons"]:
    """The most common depth over the same pairs, the lower one in ties; -1 where `lca_depth` is NaN."""
    counts = lca_counts(top_images, paths)
    return np.where(counts.any(axis=1), counts.argmax(axis=1), -1)


def lca_counts(top_images: Any, paths: Sequence[Path | None]) -> Int[np.ndarray, "neurons depths"]:
    """Number of pairs of a neuron's top images with each depth, from 0 to the length of the longest path.

    Pairs are not formed: those that meet at depth d or below are Σ m (m - 1) / 2 over the prefixes of d ranks, each of
    which m images have. Arguments and errors as in `lca_depth`.
    """
    top = checked_top_images(top_images)
    if top.max(initial=-1) >= len(paths):
        raise UsageError(f"top_images has the image {top.max()}, but there are {len(paths)} paths; give one per image")
    prefix = _prefixes(paths)
    # At depth 0 all images with a path meet.
    reaching = np.stack([_pairs_alike(of_depth[top]) for of_depth in prefix], axis=1)
    counts = reaching - np.pad(reaching[:, 1:], ((0, 0), (0, 1)))
    counts[~live_neurons(top, None)] = 0
    return counts


def _prefixes(paths: Sequence[Path | None]) -> list[Int[np.ndarray, " images"]]:
    """For each depth a number per image, the same where paths begin with the same ranks; -1 without so many."""
    known = {tuple(path) for path in paths if path is not None}
    number: dict[tuple[str, ...], int] = {}
    columns = []
    for depth in range(max(map(len, known), default=0) + 1):
        of_path = {path: number.setdefault(path[:depth], len(number)) for path in known if len(path) >= depth}
        columns.append(np.array([-1 if path is None else of_path.get(tuple(path), -1) for path in paths], np.int64))
    return columns


def _pairs_alike(values: Int[np.ndarray, "neurons n"]) -> Int[np.ndarray, " neurons"]:
    """Number of pairs in each row with equal values of at least 0."""
    ordered = np.sort(values, axis=1)
    pairs = np.zeros(len(values), np.int64)
    run = np.zeros(len(values), np.int64)
    for place in range(1, values.shape[1]):
        # How many of those before it a value equals.
        run = np.where((ordered[:, place] == ordered[:, place - 1]) & (ordered[:, place] >= 0), run + 1, 0)
        pairs += run
    return pairs


def group_means(
    values: Float[np.ndarray, " neurons"], group_sizes: Sequence[int], live: Any = None
) -> list[float | None]:
    """The mean over the neurons of each group of a Matryoshka SAE, in order; None for a group without any.

    Args:
        values: per neuron, NaN where there is none.
        group_sizes: as `Cell.group_sizes` gives them; they sum to the number of neurons.
        live: which neurons count, as a mask or as their numbers. By default all.

    Raises:
        UsageError: the sizes do not sum to the number of neurons.
    """
    if sum(group_sizes) != len(values):
        raise UsageError(f"group_sizes = {list(group_sizes)} sum to {sum(group_sizes)}, not to {len(values)} neurons")
    counted = ~np.isnan(values)
    if live is not None:
        counted &= live_neurons(np.empty((len(values), 0), np.int64), live)
    ends = np.cumsum(group_sizes)
    groups = [slice(end - size, end) for size, end in zip(group_sizes, ends.tolist(), strict=True)]
    return [float(values[group][counted[group]].mean()) if counted[group].any() else None for group in groups]
