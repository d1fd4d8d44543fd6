"""What is measured of an SAE without labels: how alike its latents' top images and directions are."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from sae_ray.concepts.atoms import coherence
from sae_ray.concepts.findings import Findings, mean
from sae_ray.concepts.image_codes import ImageCodes
from sae_ray.concepts.overlap import uniqueness
from sae_ray.concepts.recovery import k_unique, q_star, q_star_of_ridge
from sae_ray.concepts.stability import matched_cosine
from sae_ray.errors import SaeRayError
from sae_ray.sae.second_moment import RIDGE
from sae_ray.seeds import derived_seed

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int


def add_overlap(found: Findings, top_images: Int[np.ndarray, "neurons n"]) -> None:
    """Uniqueness of the neurons that have all n top images; how far each one overlaps with the nearest other."""
    live = (top_images >= 0).all(axis=1)
    unique = uniqueness(top_images, live)
    overlap = np.where(live, 0.0, np.nan)
    for side in (unique.pairs.neuron_a, unique.pairs.neuron_b):
        np.maximum.at(overlap, side, unique.pairs.jaccard)
    found.neurons["overlap"] = overlap
    found.counts |= {
        "overlapping": float(unique.shares[0]),
        "overlap_counts": unique.counts.tolist(),
        "overlap_pairs": unique.n_pairs,
    }


def add_atoms(
    found: Findings, decoder: Float[np.ndarray, "latents d"], firing: Bool[np.ndarray, " latents"], images: ImageCodes
) -> None:
    """Coherence of the latents that fire; that under the atomic inner product, and q*, if there are enough activations
    for it."""
    live = np.flatnonzero(firing & decoder.any(axis=1))
    if len(live) < 2:
        return

    def of_live(values: np.ndarray) -> np.ndarray:
        column = np.full(len(decoder), np.nan)
        column[live] = values
        return column

    plain = coherence(decoder[live]).coherence
    found.neurons["coherence"] = of_live(plain)
    found.counts["coherence"] = mean(plain)
    try:
        moment = images.moment.matrix()
    except SaeRayError:  # too few activations to invert it
        return
    density = np.repeat(np.arange(len(images.l0)), images.l0)
    measured = q_star(decoder, moment, density, live=live)
    found.neurons["coherence_aip"] = of_live(measured.coherence)
    found.neurons["k_unique"] = of_live(k_unique(measured.coherence))
    found.counts |= {
        "coherence_aip": mean(measured.coherence),
        "q_star_atom": measured.atom,
        "q_star_pair": measured.pair,
        "largest_k": measured.largest_k,
        "reachable": measured.reachable,
        "condition": measured.condition,
        "moment_rows": images.moment.n_rows,
        "q_star_tenth_ridge": q_star_of_ridge(decoder, moment, density, RIDGE / 10, live=live),
        "q_star_tenfold_ridge": q_star_of_ridge(decoder, moment, density, RIDGE * 10, live=live),
    }


def add_stability(
    found: Findings,
    decoder: Float[np.ndarray, "latents d"],
    firing: Bool[np.ndarray, " latents"],
    counterpart: Float[np.ndarray, "others d"],
    seed: int,
) -> None:
    """Cosines of the latents that fire with their counterparts in another SAE, beside those with random directions."""
    live = np.flatnonzero(firing & decoder.any(axis=1))
    counterpart = counterpart[counterpart.any(axis=1)]
    if not len(live) or not len(counterpart):
        return
    matched = matched_cosine(decoder[live], counterpart)
    stability = np.full(len(decoder), np.nan)
    stability[live] = matched.cosine
    random = np.random.default_rng(derived_seed(seed, "random directions")).normal(size=counterpart.shape)
    found.neurons["stability"] = stability
    found.counts |= {"stability": matched.mean, "stability_random": matched_cosine(decoder[live], random).mean}
