"""DiffMean vectors: the mean activation of a class less that of everything else, the plainest way to steer."""

from __future__ import annotations

from collections.abc import Iterable
from functools import reduce
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from sae_ray.store.activations import ActivationStore

if TYPE_CHECKING:
    from jaxtyping import Float, Int


class ClassSums(NamedTuple):
    """Sums of activations over some images; those of several sets of images add up."""

    total: Float[np.ndarray, " d"]
    n: int
    of_class: Float[np.ndarray, "classes d"]
    n_of_class: Int[np.ndarray, " classes"]


def class_sums(store: ActivationStore, part: int, codes: Int[np.ndarray, " images"], n_classes: int) -> ClassSums:
    """Sums over the tokens of one part.

    Args:
        store: activations of the tower's layer.
        part: its number.
        codes: the class of every image, by `image_index`; -1 for none of those that are wanted.
        n_classes: how many are wanted.
    """
    index, _, activation = store.read(part)
    x, code = activation.astype(np.float64), codes[index]
    members = code[:, None] == np.arange(n_classes)
    return ClassSums(x.sum(axis=0), len(x), members.T.astype(np.float64) @ x, members.sum(axis=0))


def _merge(one: ClassSums, two: ClassSums) -> ClassSums:
    return ClassSums(one.total + two.total, one.n + two.n, one.of_class + two.of_class, one.n_of_class + two.n_of_class)


def diffmean(sums: Iterable[ClassSums]) -> Float[np.ndarray, "classes d"]:
    """The vector of every class; NaN where the class, or everything else, has no image."""
    total, n, of_class, n_of_class = reduce(_merge, sums)
    with np.errstate(invalid="ignore"):
        return of_class / n_of_class[:, None] - (total - of_class) / (n - n_of_class)[:, None]
