"""How many atoms at once a dictionary tells apart: what coherence says about sparse codes being the only ones.

If the coherence of a dictionary is below 1 / (2 k - 1), a combination of k of its atoms is no other combination of k
(Donoho and Elad 2003). arXiv 2509.20784 makes q* of this, the share of a dictionary and its samples for which it holds.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from sae_ray.concepts.atoms import coherence, largest_cosines
from sae_ray.concepts.inputs import as_numpy
from sae_ray.concepts.overlap import live_neurons
from sae_ray.errors import UsageError
from sae_ray.sae.second_moment import RIDGE, whitening

if TYPE_CHECKING:
    from jaxtyping import Float, Int

SAMPLED_ATOMS = 8192
"""Atoms that `q_star_of_ridge` compares with all, at most."""


class QStar(NamedTuple):
    """What `q_star` finds. Print `reachable` beside both."""

    atom: float
    """q*, with the distribution of the atoms' coherences: the strict reading."""
    pair: float
    """q*, with the distribution of |cosine| over pairs of atoms. The paper does not say which of both it means."""
    largest_k: int
    """The largest L0 that any dictionary of as many atoms can satisfy for all of them, whatever the metric."""
    reachable: float
    """Share of the samples with an L0 up to `largest_k`: what q* is at most if all atoms are about equally coherent."""
    condition: float
    """Condition number of the second moment with its ridge."""
    ridge: float
    """What was added to its eigenvalues."""
    coherence: Float[np.ndarray, " live"]
    """Of each live atom under the atomic inner product, as `sae_ray.concepts.coherence` gives it."""


def q_star(decoder: Any, second_moment: Any, l0: Any, *, ridge: float = RIDGE, live: Any = None) -> QStar:
    """q* = sup {q : μ_q < 1 / (2 K_q - 1)}: μ_q the q-quantile of coherence, K_q that of L0 (arXiv 2509.20784).

    So q* is 1 if every atom is distinct enough for the densest sample, and q if that holds for the share q of both. An
    L0 below 1 counts as 1. The atomic inner product makes atoms of an SAE that fits its data look orthogonal, in part
    by construction: compare with q* of other dictionaries under the same second moment, and with `reachable`.

    Args:
        decoder: `W_dec [latents, d]`, of any length.
        second_moment: `[d, d]` of the activations, as `SecondMoment.matrix` gives it.
        l0: `[samples]`, number of active latents per sample at inference.
        ridge: as in `whitening`. Where `condition` is large, look at `q_star_of_ridge` for ten times the ridge and a
            tenth of it.
        live: latents that count, as a mask or as numbers. By default those with a decoder row that is not 0; leave out
            those that never fire.

    Raises:
        UsageError: shapes do not fit, there are fewer than two live latents, or no sample.
    """
    chosen, density = _checked(decoder, second_moment, l0, live)
    metric = whitening(as_numpy(second_moment), ridge)
    found = coherence(chosen @ metric.matrix, max_k=max(1, int(density.max())))
    limit = largest_k(*chosen.shape)
    of_samples = np.bincount(np.maximum(density, 1))
    return QStar(
        _quantile(_by_k(found.coherence, int(density.max())), of_samples),
        _quantile(found.pairs, of_samples),
        limit,
        float(of_samples[: limit + 1].sum() / of_samples.sum()),
        metric.condition,
        metric.ridge,
        found.coherence,
    )


def q_star_of_ridge(decoder: Any, second_moment: Any, l0: Any, ridge: float, *, live: Any = None) -> float:
    """`q_star(…).atom` under another ridge, to see whether it depends on that.

    Of more than 8,192 live atoms so many are compared with all, evenly spread: q* is then off by about .01 at most.
    Arguments and errors as in `q_star`.
    """
    atoms, density = _checked(decoder, second_moment, l0, live)
    chosen = np.arange(len(atoms))[:: -(-len(atoms) // SAMPLED_ATOMS)]
    largest = largest_cosines(atoms @ whitening(as_numpy(second_moment), ridge).matrix, chosen)
    return _quantile(_by_k(largest, int(density.max())), np.bincount(np.maximum(density, 1)))


def _checked(decoder: Any, second_moment: Any, l0: Any, live: Any) -> tuple[np.ndarray, np.ndarray]:
    """The live atoms, and the number of active latents of each sample."""
    atoms, density = as_numpy(decoder), as_numpy(l0)
    if atoms.ndim != 2 or atoms.shape[1] != len(as_numpy(second_moment)):
        raise UsageError(
            f"decoder {atoms.shape} and second_moment {as_numpy(second_moment).shape} differ in width; take the "
            "activations that the SAE was trained on"
        )
    if density.ndim != 1 or not len(density) or density.dtype.kind not in "iu" or density.min() < 0:
        raise UsageError(
            f"l0 has the shape {density.shape}; give the number of active latents of every sample [samples]"
        )
    chosen = atoms[live_neurons(atoms, live) if live is not None else atoms.any(axis=1)]
    if len(chosen) < 2:
        raise UsageError(f"decoder has {len(chosen)} live latents; q* compares at least two")
    return chosen, density


def _by_k(coherences: Float[np.ndarray, " atoms"], max_l0: int) -> Int[np.ndarray, " ks"]:
    """Numbers of atoms by the largest k that they allow."""
    return np.bincount(np.minimum(k_unique(coherences), max(1, max_l0)).astype(np.int64))


def _quantile(by_k: Int[np.ndarray, " ks"], l0: Int[np.ndarray, " ks"]) -> float:
    """q* from numbers of atoms (or pairs) by the largest k they allow, and numbers of samples by L0.

    q is in the set if both distributions have reached it at a common k: as many samples with an L0 up to k, as many
    atoms that allow k.
    """
    samples = np.cumsum(l0) / l0.sum()
    allowing = np.cumsum(by_k[::-1])[::-1] / by_k.sum()
    allowing = np.pad(allowing, (0, max(0, len(samples) - len(allowing))))[: len(samples)]
    return float(np.minimum(samples, allowing)[1:].max())


def k_unique(mu: Any) -> Float[np.ndarray, " atoms"]:
    """The largest k for which a coherence μ is below 1 / (2 k - 1): ⌈(1 + 1/μ) / 2⌉ - 1, infinite at 0, 0 at 1.

    A latent of an SAE with a larger L0 may stand for other latents, as far as coherence can tell.
    """
    with np.errstate(divide="ignore"):
        return np.ceil((1 + 1 / as_numpy(mu)) / 2) - 1


def welch_bound(n: int, d: int) -> float:
    """The least coherence that n unit vectors in d dimensions can have, √((n - d) / (d (n - 1))), or 0 for n ≤ d.

    It holds under every inner product, as these only choose other vectors (Welch 1974).
    """
    return math.sqrt((n - d) / (d * (n - 1))) if n > d else 0.0


def largest_k(n: int, d: int) -> int:
    """The largest k for which a dictionary of n atoms in d dimensions can have a coherence below 1 / (2 k - 1).

    With n ≤ d atoms it is n, since they can be orthogonal. For 768 dimensions it is 20 at twice as many atoms, 16 at
    four times, 14 at 64 times: an SAE with an L0 of 20 and a fourfold dictionary or a larger one never satisfies it.
    """
    return n if n <= d else int(k_unique(welch_bound(n, d)))


def rip_bound(mu: Any, k: int) -> Any:
    """(k - 1) μ, which is at least the restricted isometry constant δ_k of a dictionary of coherence μ, equal at k = 2.

    The constant itself takes all sets of k atoms. This is no estimate of it: above 1 it says nothing.
    """
    return (k - 1) * mu
