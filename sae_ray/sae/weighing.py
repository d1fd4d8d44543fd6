"""Weights of the input's dimensions in the loss (WSAE, arXiv 2506.15963). Nothing here imports torch: plans read it."""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pyarrow as pa

from sae_ray.errors import UsageError
from sae_ray.store.files import address_shown, parent_and_name

if TYPE_CHECKING:
    from jaxtyping import Float

    from sae_ray.store.files import Folder

UNIFORM = "uniform"
BY_VARIANCE = ("variance", "inverse_variance")
"""Sources that are measured on the training activations."""
SOURCES = (UNIFORM, "ms", *BY_VARIANCE)
"""Where weights come from; anything else is the path of a table."""
TABLE = "weights.parquet"
SCHEMA = pa.schema([("dimension", pa.int64()), ("s", pa.float64()), ("gamma", pa.float64())])
FORM = "a parquet table with the columns dimension (0, 1, …) and s (finite, 0 or more, not all 0)"
NOTICEABLE = 1.1
"""With a smaller ratio of the largest weight to the smallest, the SAE is the one without weights."""
_FLOOR = 0.01
"""Least significance by MonoSemanticity, in parts of the largest."""
_RIDGE = 1e-6
"""What is added to variances, in parts of their mean: a coordinate may be constant."""


class Weighing(NamedTuple):
    """How much every dimension counts."""

    s: Float[np.ndarray, " d_in"]
    """Its significance."""
    gamma: Float[np.ndarray, " d_in"]
    """The factor of its error, inside the square: `s ** alpha`, scaled so that the mean of gamma² is 1."""

    @classmethod
    def of(cls, s: Float[np.ndarray, " d_in"], alpha: float) -> Weighing:
        """Raises UsageError if a significance is negative or not finite, or all are 0."""
        s = np.asarray(s, np.float64)
        if not _valid(s):
            raise UsageError("the significance of dimensions must be finite, 0 or more, and not 0 for all of them")
        powers = (s / s.max()) ** alpha
        return cls(s, powers / np.sqrt(np.square(powers).mean()))

    @property
    def ratio(self) -> float:
        """The largest weight by the smallest; infinite where a dimension does not count."""
        return float(self.gamma.max() / self.gamma.min()) if self.gamma.min() > 0 else float("inf")

    def write(self, folder: Folder) -> None:
        """Writes the sidecar `weights.parquet` of an SAE."""
        columns = {"dimension": np.arange(len(self.s)), "s": self.s, "gamma": self.gamma}
        folder.write_parquet(TABLE, pa.table(columns, SCHEMA))


def by_monosemanticity(ms: Float[np.ndarray, " d_in"]) -> Float[np.ndarray, " d_in"]:
    """Significance from the scores of raw coordinates. A coordinate without one, or with less than a hundredth of the
    largest, has that hundredth."""
    return np.maximum(np.nan_to_num(ms, nan=-np.inf), _FLOOR * np.nanmax(ms))


def by_variance(source: str, variances: Float[np.ndarray, " d_in"]) -> Float[np.ndarray, " d_in"]:
    """Significance from the variances of raw coordinates, by a source of `BY_VARIANCE`; all alike if all are 0."""
    shifted = variances + (_RIDGE * variances.mean() or 1.0)
    return shifted if source == "variance" else 1 / shifted


def read_table(path: str) -> Float[np.ndarray, " d_in"]:
    """The significance that a table gives.

    Raises UsageError, which does not name the field, if it cannot be read or has not this form.
    """
    folder, name = parent_and_name(path)
    try:
        table = folder.read_parquet(name)
        dimension, s = (table[column].to_numpy().astype(np.float64) for column in ("dimension", "s"))
    except (OSError, KeyError, ValueError, pa.ArrowException) as error:
        raise UsageError(f"cannot be read ({error}); give {FORM}") from error
    order = np.argsort(dimension)
    if not (np.array_equal(dimension[order], np.arange(len(s))) and _valid(s)):
        raise UsageError(f"has other values; give {FORM}")
    return s[order]


def _valid(s: Float[np.ndarray, " d_in"]) -> bool:
    return bool(np.isfinite(s).all() and (s >= 0).all() and s.any())


def label_of(weights: str, alpha: float, usual: float) -> str:
    """What a cell's name says of its weights."""
    source = weights if weights in SOURCES else PurePosixPath(address_shown(weights)).stem
    return f"weights.{source}" + ("" if alpha == usual else f".{alpha:g}")


def told(ratio: float) -> str:
    """The ratio of weights as text, with a warning where they change nothing."""
    text = f"max γ / min γ = {ratio:.4g}"
    if ratio >= NOTICEABLE:
        return text
    return (
        f"{text}: below {NOTICEABLE} this is nearly the SAE without weights; choose a larger grid.alpha, or a table of "
        "ranks"
    )
