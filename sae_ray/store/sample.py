"""A part of an activation store that is read apart from training: its mean, and rows that training never draws."""

from __future__ import annotations

from functools import cached_property
from itertools import accumulate
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from sae_ray.store.activations import ActivationStore

if TYPE_CHECKING:
    from collections.abc import Iterator

    from jaxtyping import Bool, Float

GROUPS = 256
"""Row groups of a store that are looked at: at most 1 GiB, and all there are where there are fewer."""
KEPT_OUT_EVERY = 10
"""Of so many images one is kept out of training, where it is asked for; fewer where that makes many rows."""
KEPT_OUT_ROWS = 2**14
"""Enough: an average over them is known to a part in a hundred."""


class Location(NamedTuple):
    """Where the activations of a site lie, and how far they spread."""

    mean: Float[np.ndarray, " d"]
    """float64."""
    spread: float
    """Root of the mean squared distance from the mean."""

    @property
    def offset(self) -> float:
        """|mean| / spread: far above 1 where a few dimensions are always large, as in many residual streams."""
        return float(np.linalg.norm(self.mean)) / self.spread if self.spread > 0 else float("inf")


class Sample:
    """`GROUPS` row groups of a store, evenly spread over it. A function of the store alone."""

    def __init__(self, store: ActivationStore):
        self.store = store
        groups = [(part, place) for part in store.parts for place in range(len(store.group_rows(part)))]
        n = min(GROUPS, len(groups))
        self.groups: dict[int, list[int]] = {}
        """Part -> places of its row groups that belong to the sample, ascending."""
        for number in range(n):
            part, place = groups[number * len(groups) // n]
            self.groups.setdefault(part, []).append(place)
        ends = accumulate(part.images for part in store.parts.values())
        self._first_image = dict(zip(store.parts, (0, *ends), strict=False))

    @cached_property
    def kept_out_every(self) -> int:
        """Of so many images of the sample one is kept out."""
        rows = sum(self.store.group_rows(part)[place] for part, places in self.groups.items() for place in places)
        return max(KEPT_OUT_EVERY, rows // KEPT_OUT_ROWS)

    def kept_out(self, part: int, place: int) -> Bool[np.ndarray, " rows"]:
        """Which rows of a row group are kept out of training: those of every tenth image or so of the sample."""
        whole, start = self.store.parts[part], place * self.store.rows_per_group
        n = min(self.store.rows_per_group, whole.rows - start)
        if place not in self.groups.get(part, ()):
            return np.zeros(n, dtype=bool)
        images = self._first_image[part] + np.arange(start, start + n) // (whole.rows // whole.images)
        return images % self.kept_out_every == self.kept_out_every - 1

    def kept_out_rows(self) -> Float[np.ndarray, "rows d"]:
        """The vectors of all of them, in the stored dtype; none where there are fewer than ten images."""
        found = [np.empty((0, self.store.d), dtype=self.store.config["store_dtype"])]
        for part, places, rows in self._read():
            found.append(rows[np.concatenate([self.kept_out(part, place) for place in places])])
        return np.concatenate(found)

    def location(self) -> Location:
        """Of all rows of the sample, summed in float64."""
        n, total, power = 0, np.zeros(self.store.d), 0.0
        for _, _, rows in self._read():
            rows = rows.astype(np.float64)
            n, total, power = n + len(rows), total + rows.sum(0), power + np.square(rows).sum()
        n = max(1, n)
        mean = total / n
        return Location(mean, float(np.sqrt(max(0.0, power / n - mean @ mean))))

    def _read(self) -> Iterator[tuple[int, list[int], np.ndarray]]:
        """Part, places and vectors of the row groups, part by part."""
        for part, places in self.groups.items():
            yield part, places, self.store.read_groups(part, places)
