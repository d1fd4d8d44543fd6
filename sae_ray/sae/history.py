"""How the training of an SAE went: some of its steps, as a table."""

from __future__ import annotations

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


class History:
    """Metrics of about 1,000 steps, evenly apart, and of the last; they survive a resume."""

    def __init__(self, steps: int, earlier: Float[Tensor, "rows columns"] | None = None):
        """`earlier`: `tensor` of the training that is resumed."""
        self.steps, self.every = steps, max(1, steps // _ROWS)
        self._rows: list[list[float]] = [] if earlier is None else earlier.tolist()

    def add(self, metrics: Iterable[StepMetrics]) -> list[StepMetrics]:
        """Keeps those that are due, and returns them."""
        due = [one for one in metrics if (one.step + 1) % self.every == 0 or one.step + 1 == self.steps]
        self._rows += [[*map(float, one)] for one in due]
        return due

    def tensor(self) -> Float[Tensor, "rows columns"]:
        """float64, for a checkpoint."""
        return torch.tensor(self._rows, dtype=torch.float64).reshape(-1, len(StepMetrics._fields))

    def table(self) -> pa.Table:
        """A row per step that is kept: the fields of `StepMetrics`; the threshold is null before there is one."""
        columns = {
            name: pa.array(values, pa.float64(), from_pandas=name == "threshold")
            for name, values in zip(StepMetrics._fields, self.tensor().T.numpy(), strict=True)
        }
        for name in ("step", "n_dead"):
            columns[name] = columns[name].cast(pa.int64())
        return pa.table(columns)
