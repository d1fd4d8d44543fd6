"""How the training of an SAE went: some of its steps, as a table."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import TYPE_CHECKING

import pyarrow as pa
import torch

from sae_ray.sae.training import StepMetrics

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

HISTORY_FILE = "metrics.parquet"
_ROWS = 1000
"""At most, about."""
_COLUMNS = (*StepMetrics._fields, "rows_per_second")


class History:
    """Metrics of about 1,000 steps, evenly apart, and of the last; they survive a resume."""

    def __init__(self, steps: int, batch_size: int, earlier: Float[Tensor, "rows columns"] | None = None):
        """`earlier`: `tensor` of the training that is resumed."""
        self.steps, self.batch_size = steps, batch_size
        self.every = max(1, steps // _ROWS)
        self._rows: list[list[float]] = [] if earlier is None else earlier.tolist()
        self._clock: tuple[float, float] | None = None
        """Time and step of the row before, in this process."""

    def add(self, metrics: Iterable[StepMetrics]) -> list[StepMetrics]:
        """Keeps those that are due, and returns them."""
        due = [one for one in metrics if (one.step + 1) % self.every == 0 or one.step + 1 == self.steps]
        for one in due:
            now = time.monotonic()
            pace = float("nan")
            if self._clock is not None and now > self._clock[0]:
                pace = (one.step - self._clock[1]) * self.batch_size / (now - self._clock[0])
            self._clock = now, one.step
            self._rows.append([*map(float, one), pace])
        return due

    def tensor(self) -> Float[Tensor, "rows columns"]:
        """float64, for a checkpoint."""
        return torch.tensor(self._rows, dtype=torch.float64).reshape(-1, len(_COLUMNS))

    def table(self) -> pa.Table:
        """A row per step that is kept: the fields of `StepMetrics`, with `step` counted from 0, and `rows_per_second`,
        the activations trained on per second since the row before; null for the first row of a process."""
        columns = list(zip(*self._rows, strict=True)) or [()] * len(_COLUMNS)
        arrays = [
            pa.array(values, pa.float64(), from_pandas=name in ("threshold", "rows_per_second"))
            for name, values in zip(_COLUMNS, columns, strict=True)
        ]
        table = pa.table(arrays, names=list(_COLUMNS))
        for name in ("step", "n_dead"):
            table = table.set_column(table.column_names.index(name), name, table[name].cast(pa.int64()))
        return table
