"""Logistic probes on one latent each: how well does a single latent tell whether an image shows a concept?

After the probes of saev (OSU-NLP-Group/saev at 3d73f1f, `tdiscovery`), whose unit is a patch with a segmentation label;
here it is an image with its labels, so formulas are the same and figures are not comparable.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from sae_ray.concepts.inputs import SparseMatrix, sparse_codes
from sae_ray.concepts.labels import Labels, check_same_rows

if TYPE_CHECKING:
    from jaxtyping import Float, Int

RIDGE = 1e-8
"""Weight of the squared distance from the probe that knows only how common the concept is."""
MAX_STEPS = 100
TOLERANCE = 1e-10
"""Of the mean loss: a probe is done when Newton's step promises to lower it by less."""
LOGIT_LIMIT = 20.0
"""Stands for certainty: a probability of 2e-9."""
CHUNK_ENTRIES = 2**20
"""Codes, counted once for each concept that they are fitted to, that are worked on at a time."""


class LatentProbes(NamedTuple):
    """Probabilities `1 / (1 + exp(−(weight · code + bias)))`. NaN for a concept that no image shows, or all show."""

    weight: Float[np.ndarray, "latents concepts"]
    bias: Float[np.ndarray, "latents concepts"]
    loss: Float[np.ndarray, "latents concepts"]
    """Mean cross-entropy on the images that the probe was fitted on, in nats."""


class BestProbes(NamedTuple):
    """For each concept the probe with the lowest loss on the images it was fitted on; the lowest latent in a tie."""

    latent: Int[np.ndarray, " concepts"]
    """-1 for a concept without a probe."""
    weight: Float[np.ndarray, " concepts"]
    bias: Float[np.ndarray, " concepts"]
    loss: Float[np.ndarray, " concepts"]
    prevalence: Float[np.ndarray, " concepts"]
    """Share of the known images that show the concept."""


class JudgedProbes(NamedTuple):
    """The best probes on other images than they were fitted on. NaN where no image shows the concept, or all do."""

    loss: Float[np.ndarray, " concepts"]
    """Mean cross-entropy, in nats."""
    bias_loss: Float[np.ndarray, " concepts"]
    """That of a probe without a latent, which says the prevalence of the fitted images."""
    average_precision: Float[np.ndarray, " concepts"]

    @property
    def r(self) -> Float[np.ndarray, " concepts"]:
        """Share of the uncertainty about each concept that its probe removes; below 0 if it misleads."""
        return 1 - self.loss / self.bias_loss

    @property
    def probe_r(self) -> float:
        """The same over all concepts: 1 less the ratio of the means, so common concepts weigh more."""
        known = ~np.isnan(self.loss)
        return float(1 - self.loss[known].mean() / self.bias_loss[known].mean()) if known.any() else np.nan

    @property
    def mean_average_precision(self) -> float:
        known = self.average_precision[~np.isnan(self.average_precision)]
        return float(known.mean()) if len(known) else np.nan

    def coverage(self, least: float = 0.3) -> float:
        """Share of the concepts whose best latent has at least this average precision."""
        known = self.average_precision[~np.isnan(self.average_precision)]
        return float((known >= least).mean()) if len(known) else np.nan


def latent_probes(codes: Any, labels: Any) -> LatentProbes:
    """Fits a logistic probe on each latent for each concept, exactly (Newton's method).

    A probe needs a latent's codes, the number of images without one, and the sum over the concept's images. So the cost
    is that of the codes that are not 0, once for each concept that one of their images shows. Latents can be split into
    blocks (`best_probes` joins them), images cannot.

    Args:
        codes: `[images, latents]`: torch, numpy or scipy.sparse.
        labels: `[images, concepts]` of 0, 1 and NaN for unknown; `[images]` classes (negative for none); or `Labels`.
            Each concept is fitted on the images of which it is known.

    Raises:
        UsageError: the two have different numbers of rows, or values that are not finite, or no labels.
    """
    matrix, labels = sparse_codes(codes), Labels.of(labels)
    check_same_rows(matrix, labels)
    found = LatentProbes(*(np.full((matrix.shape[1], labels.n_concepts), np.nan) for _ in LatentProbes._fields))
    for concepts, rows in _groups(labels):
        fitted = _fit(matrix[rows].tocsc(), labels.positive[rows][:, concepts])
        for target, values in zip(found, fitted, strict=True):
            target[:, concepts] = values
    return found


def best_probes(blocks: Iterable[LatentProbes], labels: Labels) -> BestProbes:
    """Of consecutive blocks of latents, of which one need be there at a time.

    Args:
        labels: Those that the probes were fitted to.
    """
    n_known = np.broadcast_to(labels.known.sum(axis=0), labels.n_positive.shape)
    weight, bias, loss = np.full((3, labels.n_concepts), np.nan)
    best = BestProbes(np.full(labels.n_concepts, -1), weight, bias, loss, labels.n_positive / np.maximum(n_known, 1))
    first = 0
    for block in blocks:
        lowest = np.where(np.isnan(block.loss), np.inf, block.loss)
        for concept in np.flatnonzero(lowest.min(axis=0, initial=np.inf) < np.where(np.isnan(loss), np.inf, loss)):
            latent = lowest[:, concept].argmin()
            best.latent[concept] = first + latent
            for target, values in zip((weight, bias, loss), block, strict=True):
                target[concept] = values[latent, concept]
        first += len(block.loss)
    return best


def judge_probes(best: BestProbes, codes: Any, labels: Any) -> JudgedProbes:
    """The best probes on other images.

    Average precision counts images of the same code as one step, as scikit-learn does: most codes are 0, and an order
    among these would be made up.

    Args:
        codes, labels: as in `latent_probes`, of all latents.

    Raises:
        UsageError: as in `latent_probes`.
    """
    from sklearn.metrics import average_precision_score

    matrix, labels = sparse_codes(codes), Labels.of(labels)
    check_same_rows(matrix, labels)
    columns = matrix.tocsc()
    found = JudgedProbes(*(np.full(labels.n_concepts, np.nan) for _ in JudgedProbes._fields))
    for concept, latent in enumerate(best.latent.tolist()):
        shown = labels.of_concept(concept)
        known = ~np.isnan(shown)
        shown = shown[known]
        if latent < 0 or len(np.unique(shown)) < 2:
            continue
        logit = columns[:, [latent]].toarray()[known, 0] * best.weight[concept] + best.bias[concept]
        found.loss[concept] = _cross_entropy(logit, shown)
        found.bias_loss[concept] = _cross_entropy(np.full(len(shown), _logit(best.prevalence[concept])), shown)
        found.average_precision[concept] = average_precision_score(shown, logit)
    return found


def _groups(labels: Labels) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Concepts that are known of the same images, and these images."""
    if labels.known.shape[1] == 1:
        yield np.arange(labels.n_concepts), np.flatnonzero(labels.known[:, 0])
    else:
        for concept in range(labels.n_concepts):
            yield np.array([concept]), np.flatnonzero(labels.known[:, concept])


def _fit(
    codes: Float[SparseMatrix, "images latents"], positive: Float[SparseMatrix, "images concepts"]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Weights, biases and losses of labels that are all known."""
    n = codes.shape[0]
    shown = np.bincount(positive.indices, minlength=positive.shape[1])
    listed = codes.copy()
    listed.data = np.ones(len(codes.data))
    total = (codes.T @ positive).toarray()
    together = (listed.T @ positive).toarray() > 0
    n_zero = n - np.diff(codes.indptr)[:, None]
    lowest = _lowest(codes)[:, None]

    # Nothing of the concept where the latent fires: the better the lower the weight, and the rest is a share of zeros.
    share = np.minimum(shown / np.maximum(n_zero, 1), 1)
    bias = _logit(share)
    with np.errstate(divide="ignore", invalid="ignore"):
        weight = np.where(np.isfinite(lowest), -(LOGIT_LIMIT + np.maximum(bias, 0)) / lowest, 0.0)
    loss = n_zero / max(n, 1) * _entropy(share)

    proper = (shown > 0) & (shown < n)
    wanted = proper & (together | (lowest <= 0))
    pairs = np.nonzero(wanted)
    for latent, concept in _chunks(pairs[0], pairs[1], np.diff(codes.indptr)):
        problem = _Problem(codes, latent, shown[concept], total[latent, concept])
        weight[latent, concept], bias[latent, concept], loss[latent, concept] = problem.solve()
    for target in (weight, bias, loss):
        target[:, ~proper] = np.nan
    return weight, bias, loss


class _Problem:
    """Pairs of a latent and a concept whose losses are lowered together."""

    def __init__(self, codes: SparseMatrix, latent: np.ndarray, shown: np.ndarray, total: np.ndarray):
        self.n = codes.shape[0]
        self.shown, self.total = shown / self.n, total / self.n
        self.prior = _logit(self.shown)
        length = np.diff(codes.indptr)[latent]
        self.zeros = 1 - length / self.n
        self.starts = np.r_[0, length.cumsum()[:-1]]
        self.pair = np.repeat(np.arange(len(latent)), length)
        self.code = codes.data[np.repeat(codes.indptr[latent] - self.starts, length) + np.arange(length.sum())]

    def of(self, kept: np.ndarray) -> _Problem:
        """Some of the pairs."""
        part = object.__new__(_Problem)
        part.n = self.n
        part.shown, part.total, part.prior, part.zeros = (
            column[kept] for column in (self.shown, self.total, self.prior, self.zeros)
        )
        length = np.diff(np.r_[self.starts, len(self.pair)])[kept]
        part.starts = np.r_[0, length.cumsum()[:-1]]
        part.pair = np.repeat(np.arange(len(length)), length)
        part.code = self.code[kept[self.pair]]
        return part

    def solve(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Weights, biases, and losses without the ridge."""
        x = np.stack([np.zeros(len(self.prior)), self.prior])  # weights and biases
        lost, step = self.at(x)
        length = np.ones(len(self.prior))
        solved = np.empty((3, len(self.prior)))
        place, problem = np.arange(len(self.prior)), self
        for _ in range(MAX_STEPS):
            tried = x + length * step
            lost_there, step_there = problem.at(tried)
            better = lost_there <= lost
            done = better & (length == 1) & (lost - lost_there < TOLERANCE) | (length < TOLERANCE)
            x = np.where(better, tried, x)
            lost = np.where(better, lost_there, lost)
            step = np.where(better, step_there, step)
            length = np.where(better, 1.0, length / 2)
            solved[:, place] = *x, lost
            if done.all():
                break
            if done.sum() * 4 > len(done):
                problem, place = problem.of(~done), place[~done]
                x, lost, step, length = x[:, ~done], lost[~done], step[:, ~done], length[~done]
        weight, bias, lost = solved
        return weight, bias, lost - RIDGE / 2 * (weight**2 + (bias - self.prior) ** 2)

    def at(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Losses, and Newton's steps from there."""
        weight, bias = x
        z = bias[self.pair] + weight[self.pair] * self.code
        said, said_zero = _sigmoid(z), _sigmoid(bias)
        spread, spread_zero = said * (1 - said), self.zeros * said_zero * (1 - said_zero)

        def mean(values: np.ndarray) -> np.ndarray:
            return np.add.reduceat(values, self.starts) / self.n

        away = bias - self.prior
        lost = mean(np.logaddexp(0, z)) + self.zeros * np.logaddexp(0, bias) - weight * self.total - bias * self.shown
        lost += RIDGE / 2 * (weight**2 + away**2)
        slope_w = mean(said * self.code) - self.total + RIDGE * weight
        slope_b = mean(said) + self.zeros * said_zero - self.shown + RIDGE * away
        ww = mean(spread * self.code**2) + RIDGE
        wb = mean(spread * self.code)
        bb = mean(spread) + spread_zero + RIDGE
        determinant = np.maximum(ww * bb - wb**2, RIDGE**2)
        return lost, np.stack([wb * slope_b - bb * slope_w, wb * slope_w - ww * slope_b]) / determinant


def _chunks(latent: np.ndarray, concept: np.ndarray, n_listed: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    ends = n_listed[latent].cumsum()
    for number in range(int(ends[-1] // CHUNK_ENTRIES) + 1 if len(ends) else 0):
        part = slice(*np.searchsorted(ends, (number * CHUNK_ENTRIES, (number + 1) * CHUNK_ENTRIES)))
        if part.start < part.stop:
            yield latent[part], concept[part]


def _lowest(codes: SparseMatrix) -> Float[np.ndarray, " latents"]:
    """Of the listed codes; inf without any."""
    lowest = np.full(codes.shape[1], np.inf)
    np.minimum.at(lowest, np.repeat(np.arange(codes.shape[1]), np.diff(codes.indptr)), codes.data)
    return lowest


def _sigmoid(z: np.ndarray) -> np.ndarray:
    small = np.exp(-np.abs(z))
    return np.where(z >= 0, 1, small) / (1 + small)


def _logit(share: Any) -> Any:
    with np.errstate(divide="ignore"):
        return np.clip(np.log(share) - np.log1p(-np.asarray(share)), -LOGIT_LIMIT, LOGIT_LIMIT)


def _entropy(share: np.ndarray) -> np.ndarray:
    """Of a coin, in nats."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return -np.nan_to_num(share * np.log(share)) - np.nan_to_num((1 - share) * np.log1p(-share))


def _cross_entropy(logit: np.ndarray, shown: np.ndarray) -> float:
    return float((np.logaddexp(0, logit) - logit * shown).mean())
