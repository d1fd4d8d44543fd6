"""Human agreement: how often people and a score of neurons prefer the same neuron of a pair.

People see the top images of two neurons and say which set looks more similar and focused on the same thing (Pach et
al., arXiv 2504.02821, Appendix C).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa

from sae_ray.concepts.inputs import as_numpy
from sae_ray.errors import UsageError, check

if TYPE_CHECKING:
    from jaxtyping import Float, Int, Num, Shaped
    from torch import Tensor

EDGES = np.arange(10) / 10
"""Lower edges of the paper's nine bins of |difference|, and of a tenth for pairs that differ by .9 or more."""
N_QUANTILES = 9
EDGE_ERROR = 1e-9
"""Share of the largest edge: a difference that is less than this below an edge counts as on it, as .3 - .2 does."""
AGREEMENT = "agreement.parquet"
AGREEMENT_SCHEMA = pa.schema(
    [
        ("bin", pa.float64()),
        ("n_pairs", pa.int64()),
        ("rate", pa.float64()),
        ("low", pa.float64()),
        ("high", pa.float64()),
    ]
)


class Pairs(NamedTuple):
    """Pairs of neurons, and which of them people chose."""

    first: Shaped[np.ndarray, " pairs"]
    """A neuron: its number, or any key if scores are given as a mapping."""
    second: Shaped[np.ndarray, " pairs"]
    """The neuron that it was compared with."""
    choice: Float[np.ndarray, " pairs"]
    """1 if the first was chosen, 0 if the second was, .5 if people were divided."""


@dataclass(frozen=True, eq=False)
class Agreement:
    """The agreement of people and a score, in bins of how much the score tells the two neurons apart."""

    edge: Float[np.ndarray, " bins"]
    """Lower edges of the bins of |difference|. A bin ends below the next edge; the last one has no end."""
    n_pairs: Int[np.ndarray, " bins"]
    rate: Float[np.ndarray, " bins"]
    """Share of pairs whose chosen neuron has the higher score; NaN in an empty bin."""
    low: Float[np.ndarray, " bins"]
    """Lower end of the rate's 95 % interval (Wilson); NaN in an empty bin."""
    high: Float[np.ndarray, " bins"]
    """Upper end of it."""
    n_unscored: int = 0
    """Pairs that are left out, since a neuron has no score."""

    @property
    def headline(self) -> float:
        """The unweighted mean of the bins that have pairs, as the paper's headline; NaN without any."""
        filled = self.rate[self.n_pairs > 0]
        return float(filled.mean()) if len(filled) else float("nan")

    @property
    def pooled(self) -> float:
        """The rate over all pairs; NaN without any."""
        return float(self.cumulative[0])

    @property
    def cumulative(self) -> Float[np.ndarray, " bins"]:
        """The rate over the pairs of a bin and of all bins above it; NaN without any."""
        points = np.where(self.n_pairs > 0, self.rate * self.n_pairs, 0)
        return _ratio(points[::-1].cumsum(), self.n_pairs[::-1].cumsum())[::-1]

    def table(self) -> pa.Table:
        """One row per bin, as in `agreement.parquet`; `bin` is the lower edge."""
        return pa.table([self.edge, self.n_pairs, self.rate, self.low, self.high], schema=AGREEMENT_SCHEMA)

    @classmethod
    def of(cls, table: pa.Table) -> Agreement:
        """From the table of `agreement.parquet`."""
        return cls(*(table[name].to_numpy() for name in AGREEMENT_SCHEMA.names))


def agreement(
    pairs: Pairs | Mapping[str, Any] | Sequence[Any],
    score: Num[np.ndarray, " neurons"] | Tensor | Mapping[Any, float],
    *,
    bins: Literal["paper", "quantiles"] = "paper",
) -> Agreement:
    """How often the neuron that people chose is the one with the higher score.

    A pair counts half if both neurons have the same score, or if people were divided. A rate below one half means that
    people prefer lower scores: that of the negated score is 1 minus it.

    Args:
        pairs: `first`, `second` and `choice`, as `Pairs`, a mapping, or three arrays of equal length.
        score: of every neuron, by its number, or a mapping of neurons to scores. Pairs with NaN are left out.
        bins: "paper": |difference| in steps of .1, for MS and other scores that use the range from 0 to 1.
            "quantiles": nine bins with equally many pairs, for scores of any scale. Equal differences share a bin, so
            there may be fewer.

    Raises:
        UsageError: the arrays do not fit one another, a neuron is not in `score`, or a choice is not from 0 to 1.
    """
    first, second, choice = _columns(pairs)
    check(bins in ("paper", "quantiles"), "bins", bins, 'choose "paper" or "quantiles"')
    difference = _looked_up(score, first) - _looked_up(score, second)
    scored = ~np.isnan(difference)
    difference, choice = difference[scored], choice[scored]
    points = np.where(difference > 0, choice, np.where(difference < 0, 1 - choice, 0.5))

    apart = np.abs(difference)
    edge = EDGES if bins == "paper" else _quantiles(apart)
    place = bin_of(apart, edge)
    n_pairs = np.bincount(place, minlength=len(edge))
    rate = _ratio(np.bincount(place, points, len(edge)), n_pairs)
    return Agreement(edge, n_pairs, rate, *wilson(rate, n_pairs), int((~scored).sum()))


def wilson(
    rate: Float[np.ndarray, " bins"], n: Int[np.ndarray, " bins"], confidence: float = 0.95
) -> tuple[Float[np.ndarray, " bins"], Float[np.ndarray, " bins"]]:
    """Lower and upper ends of the intervals of rates (Wilson 1927, JASA 22, 209-212); NaN where `n` is 0.

    Args:
        rate: shares, from 0 to 1.
        n: of how many trials.
        confidence: of the interval.
    """
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    rate, n = np.asarray(rate, np.float64), np.asarray(n, np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        middle = (rate + z**2 / (2 * n)) / (1 + z**2 / n)
        half = z / (1 + z**2 / n) * np.sqrt(rate * (1 - rate) / n + z**2 / (4 * n**2))
    return np.maximum(middle - half, 0.0), np.minimum(middle + half, 1.0)


def bin_of(apart: Float[np.ndarray, " pairs"], edge: Float[np.ndarray, " bins"]) -> Int[np.ndarray, " pairs"]:
    """The number of the bin of each |difference|. The first of the ascending lower edges is 0."""
    return np.searchsorted(edge, apart + EDGE_ERROR * edge[-1], side="right") - 1


def _quantiles(apart: np.ndarray) -> np.ndarray:
    if not len(apart):
        return np.zeros(1)
    inner = np.quantile(apart, np.arange(1, N_QUANTILES) / N_QUANTILES, method="higher")
    return np.unique([0.0, *inner])


def _ratio(points: np.ndarray, n: np.ndarray) -> np.ndarray:
    return np.where(n > 0, points / np.maximum(n, 1), np.nan)


def _columns(pairs: Pairs | Mapping[str, Any] | Sequence[Any]) -> Pairs:
    columns = [pairs[name] for name in Pairs._fields] if isinstance(pairs, Mapping) else list(pairs)
    if len(columns) != 3:
        raise UsageError(
            f"pairs has {len(columns)} columns; give the first neurons, the second neurons and the choices"
        )
    first, second, choice = (as_numpy(one) for one in columns)
    if not len(first) == len(second) == len(choice):
        raise UsageError(
            f"pairs has {len(first)} first neurons, {len(second)} second neurons and {len(choice)} choices; "
            "give one of each per pair"
        )
    choice = choice.astype(np.float64)
    wrong = choice[~((choice >= 0) & (choice <= 1))]
    if len(wrong):
        raise UsageError(f"pairs.choice has {wrong[0]}; give 1 for the first neuron, 0 for the second, .5 for a tie")
    return Pairs(first, second, choice)


def _looked_up(score: Any, neurons: np.ndarray) -> np.ndarray:
    if isinstance(score, Mapping):
        missing = [neuron for neuron in neurons.tolist() if neuron not in score]
        if missing:
            raise UsageError(f"score has no neuron {missing[0]!r}, which is in a pair; give the score of every neuron")
        return np.array([score[neuron] for neuron in neurons.tolist()], np.float64)
    values = as_numpy(score).astype(np.float64)
    if values.ndim != 1:
        raise UsageError(f"score has shape {values.shape}; give one number per neuron")
    if not len(neurons):
        return np.zeros(0)
    if neurons.dtype.kind not in "iu":
        raise UsageError(f"pairs has the neuron {neurons[0]!r}, which is not a whole number; give score as a mapping")
    wrong = neurons[(neurons < 0) | (neurons >= len(values))]
    if len(wrong):
        raise UsageError(
            f"score has {len(values)} neurons, but {wrong[0]} is in a pair; give the score of every neuron"
        )
    return values[neurons]
