"""Which pairs of neurons people are asked about."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from sae_ray.concepts.agreeing import EDGE_ERROR, EDGES

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int


def choose_pairs(
    score: Float[np.ndarray, " neurons"], eligible: Bool[np.ndarray, " neurons"], n_pairs: int, seed: int
) -> Int[np.ndarray, "pairs 2"]:
    """Different pairs of neurons, spread as evenly as possible over the paper's bins of |difference|.

    Bins that have too few pairs give all they have. Within a bin all pairs are equally likely. Pairs come in random
    order, and which neuron of a pair is first is random, too.

    Args:
        score: of every neuron.
        eligible: the neurons to choose from. All need a score.
        n_pairs: at most this many.
        seed: of the choice.
    """
    neurons = np.flatnonzero(eligible)
    neurons = neurons[np.argsort(score[neurons], kind="stable")]
    upwards = score[neurons]

    # In ascending order the partners of a neuron that are above it by a bin's difference follow one another.
    edges = EDGES - EDGE_ERROR * EDGES[-1]
    starts = np.stack([np.searchsorted(upwards, upwards + edge, side="left") for edge in edges])
    starts[0] = np.arange(1, len(neurons) + 1)
    ends = np.concatenate([starts[1:], np.full((1, len(neurons)), len(neurons))])
    partners = np.maximum(ends - starts, 0)

    rng = np.random.default_rng(seed)
    chosen = [np.zeros((0, 2), np.int64)]
    for one, take in enumerate(_even(partners.sum(axis=1), n_pairs)):
        total = partners[one].cumsum()
        number = rng.choice(total[-1], take, replace=False) if take else np.zeros(0, np.int64)
        lower = np.searchsorted(total, number, side="right")
        upper = starts[one, lower] + number - (total[lower] - partners[one, lower])
        chosen.append(np.stack([neurons[lower], neurons[upper]], axis=1))
    return rng.permuted(rng.permutation(np.concatenate(chosen)), axis=1)


def _even(available: Int[np.ndarray, " bins"], wanted: int) -> list[int]:
    """How many to take from each bin: the scarcest first, so that the others can share what it cannot give."""
    taken = [0] * len(available)
    for place, one in enumerate(np.argsort(available, kind="stable")):
        taken[one] = min(int(available[one]), (wanted - sum(taken)) // (len(available) - place))
    return taken
