"""The training stream: shuffled batches of one site, the same for every cell, seekable to any step."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from sae_ray.activations import ActivationStore

if TYPE_CHECKING:
    from jaxtyping import Float


class TrainingStream:
    """An endless sequence of batches, a pure function of (store, seed, batch size, shuffle rows).

    Every epoch permutes the parts, cuts them into windows of about `shuffle_rows` rows, and permutes the rows of each
    window; epochs follow one another without a gap. Memory is one window, in the stored dtype. A store that fits into
    one window is read once and shuffled as a whole in every epoch.

    Args:
        store: the activations of one site.
        batch_size: rows per batch.
        seed: of the site, not of a cell: all cells of a site see the same batches.
        shuffle_rows: rows held at once.
    """

    def __init__(self, store: ActivationStore, batch_size: int, seed: int, shuffle_rows: int):
        self.store = store
        self.batch_size = batch_size
        self.seed = seed
        self.shuffle_rows = shuffle_rows
        self._loaded: tuple[tuple[int, ...], np.ndarray] | None = None

    def batches(self, first_step: int = 0) -> Iterator[Float[np.ndarray, "batch d"]]:
        """Batches from `first_step` on, in the stored dtype and unscaled; what lies before is skipped, not read."""
        epoch, offset = divmod(first_step * self.batch_size, self.store.n_rows)
        pending: list[np.ndarray] = []
        missing = self.batch_size
        while True:
            for window in self._windows(epoch):
                rows = sum(self.store.parts[number].rows for number in window)
                if offset >= rows:
                    offset -= rows
                    continue
                order = self._rng(epoch, *window).permutation(rows)
                vectors = self._load(window)
                while offset < rows:
                    taken = order[offset : offset + missing]
                    pending.append(vectors[taken])
                    offset += len(taken)
                    missing -= len(taken)
                    if missing == 0:
                        yield pending[0] if len(pending) == 1 else np.concatenate(pending)
                        pending, missing = [], self.batch_size
                del vectors  # else the next window would be read while this one is held
                offset = 0
            epoch += 1

    def _windows(self, epoch: int) -> Iterator[tuple[int, ...]]:
        window: list[int] = []
        rows = 0
        for number in self._rng(epoch).permutation(len(self.store.parts)).tolist():
            part_rows = self.store.parts[number].rows
            if window and rows + part_rows > self.shuffle_rows:
                yield tuple(sorted(window))
                window, rows = [], 0
            window.append(number)
            rows += part_rows
        yield tuple(sorted(window))

    def _load(self, window: tuple[int, ...]) -> np.ndarray:
        if self._loaded is None or self._loaded[0] != window:
            self._loaded = None  # frees the old window before the new one is read
            self._loaded = window, self._read(window)
        return self._loaded[1]

    def _read(self, window: tuple[int, ...]) -> Float[np.ndarray, "rows d"]:
        rows = sum(self.store.parts[number].rows for number in window)
        vectors = np.empty((rows, self.store.d), self.store.record["config"]["store_dtype"])
        start = 0
        for number in window:
            part = self.store.read(number)[2]
            vectors[start : start + len(part)] = part
            start += len(part)
        return vectors

    def _rng(self, epoch: int, *window: int) -> np.random.Generator:
        # The 1 keeps a window apart from its epoch: numpy ignores zeros at the end of a seed.
        return np.random.default_rng([self.seed, epoch, 1, *window] if window else [self.seed, epoch])
