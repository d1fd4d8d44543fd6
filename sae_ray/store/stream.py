"""The training stream: shuffled batches of one site, the same for every cell, seekable to any step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from sae_ray.store.activations import ActivationStore

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor

    from sae_ray.store.sample import Sample


READS_AT_ONCE = 4
"""Parts of a window, so that the store's answers need not be waited for one by one."""


class _Group(NamedTuple):
    """A row group."""

    part: int
    place: int
    """Within the part."""
    rows: int
    """That are drawn."""


_Read = Callable[[tuple[int, ...]], "Tensor"]
"""What reads something of the rows of a window."""


class TrainingStream:
    """An endless sequence of batches, a pure function of (store, seed, batch size, shuffle rows, rows kept out).

    Each epoch permutes the row groups of all parts, joins them into windows, and permutes the rows of each window.
    Batches continue across epochs. A store of at most `shuffle_rows` rows is one window, which is read once and stays
    on the device. A larger store has windows of half that size, and the next window is read while the current one is
    used.

    Args:
        store: the activations of one site.
        batch_size: rows per batch.
        seed: the site's seed, not a cell's: all cells of a site see the same batches.
        shuffle_rows: approximate number of rows in memory.
        device: holds these rows, in the stored dtype.
        without: says which rows are never drawn; None if all are.
    """

    def __init__(
        self,
        store: ActivationStore,
        batch_size: int,
        seed: int,
        shuffle_rows: int,
        device: torch.device | str = "cpu",
        without: Sample | None = None,
    ):
        self.store = store
        self.batch_size = batch_size
        self.seed = seed
        self.device = torch.device(device)
        self._without = without
        self._groups = [
            _Group(number, place, rows - (int(without.kept_out(number, place).sum()) if without else 0))
            for number in store.parts
            for place, rows in enumerate(store.group_rows(number))
        ]
        self.n_rows = sum(group.rows for group in self._groups)
        """Of an epoch."""
        self._fits = self.n_rows <= shuffle_rows
        self._window_rows = shuffle_rows if self._fits else shuffle_rows // 2
        self._whole: dict[_Read, Tensor] = {}

    def batches(self, first_step: int = 0) -> Iterator[Float[Tensor, "batch d"]]:
        """Batches from `first_step` on, in the stored dtype and unscaled. Earlier ones are skipped without reading."""
        for [vectors] in self._batches(first_step, [self._read]):
            yield vectors

    def batches_with_images(
        self, first_step: int = 0
    ) -> Iterator[tuple[Float[Tensor, "batch d"], Int[Tensor, " batch"]]]:
        """The same, with the `image_index` of every row."""
        return ((vectors, images) for vectors, images in self._batches(first_step, [self._read, self._read_images]))

    def _batches(self, first_step: int, reads: Sequence[_Read]) -> Iterator[list[Tensor]]:
        """Rows of what each of these reads of a window."""
        pending: list[list[Tensor]] = []
        missing = self.batch_size
        windows = self._windows_from(first_step)
        epoch, window, offset = next(windows)
        with ThreadPoolExecutor(1) as reader:
            coming = reader.submit(self._load, window, reads)
            while True:
                held = [one.to(self.device) for one in coming.result()]
                order = torch.from_numpy(self._rng(epoch, *window).permutation(len(held[0]))).to(self.device)
                following = next(windows)
                coming = reader.submit(self._load, following[1], reads)
                while offset < len(order):
                    taken = order[offset : offset + missing]
                    pending.append([one.index_select(0, taken) for one in held])
                    offset += len(taken)
                    missing -= len(taken)
                    if missing == 0:
                        several = zip(*pending, strict=True)
                        yield pending[0] if len(pending) == 1 else [torch.cat(some) for some in several]
                        pending, missing = [], self.batch_size
                del held  # otherwise three windows would be in memory
                epoch, window, offset = following

    def _windows_from(self, first_step: int) -> Iterator[tuple[int, tuple[int, ...], int]]:
        """Epoch, row groups and first row of each window, starting at a step."""
        epoch, offset = divmod(first_step * self.batch_size, self.n_rows)
        while True:
            for window in self._windows(epoch):
                rows = sum(self._groups[number].rows for number in window)
                if offset < rows:
                    yield epoch, window, offset
                offset = max(0, offset - rows)
            epoch += 1

    def _windows(self, epoch: int) -> Iterator[tuple[int, ...]]:
        window: list[int] = []
        rows = 0
        for number in self._rng(epoch).permutation(len(self._groups)).tolist():
            group_rows = self._groups[number].rows
            if window and rows + group_rows > self._window_rows:
                yield tuple(sorted(window))
                window, rows = [], 0
            window.append(number)
            rows += group_rows
        yield tuple(sorted(window))

    def _load(self, window: tuple[int, ...], reads: Sequence[_Read]) -> list[Tensor]:
        if not self._fits:
            return [read(window) for read in reads]
        for read in reads:
            if read not in self._whole:
                self._whole[read] = read(window).to(self.device)
        return [self._whole[read] for read in reads]

    def _read(self, window: tuple[int, ...]) -> Float[Tensor, "rows d"]:
        dtype = getattr(torch, self.store.config["store_dtype"])
        vectors = torch.empty(self._rows(window), self.store.d, dtype=dtype)
        return self._filled(vectors, window, self.store.read_groups)

    def _read_images(self, window: tuple[int, ...]) -> Int[Tensor, " rows"]:
        images = torch.empty(self._rows(window), dtype=torch.int64)
        return self._filled(images, window, self.store.images_of_groups)

    def _rows(self, window: tuple[int, ...]) -> int:
        return sum(self._groups[number].rows for number in window)

    def _filled(
        self, window_rows: Tensor, window: tuple[int, ...], read_groups: Callable[[int, Sequence[int]], np.ndarray]
    ) -> Tensor:
        places = iter(window_rows.split([self._groups[number].rows for number in window]))
        of_part: dict[int, tuple[list[int], list[Tensor]]] = {}
        for group in (self._groups[number] for number in window):
            groups, targets = of_part.setdefault(group.part, ([], []))
            groups.append(group.place)
            targets.append(next(places))

        def read(part: int) -> None:
            groups, targets = of_part[part]
            rows = torch.tensor(read_groups(part, groups))  # a copy, since Arrow's memory is read-only
            stored = self.store.group_rows(part)
            pieces = rows.split([stored[group] for group in groups])
            for group, target, piece in zip(groups, targets, pieces, strict=True):
                drawn = piece[~torch.from_numpy(self._without.kept_out(part, group))] if self._without else piece
                target.copy_(drawn)

        with ThreadPoolExecutor(READS_AT_ONCE) as readers:
            list(readers.map(read, of_part))
        return window_rows

    def _rng(self, epoch: int, *window: int) -> np.random.Generator:
        # The 1 distinguishes a window from its epoch: numpy ignores trailing zeros of a seed.
        return np.random.default_rng([self.seed, epoch, 1, *window] if window else [self.seed, epoch])
