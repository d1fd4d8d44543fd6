"""All that is measured of what the neurons of one SAE, or of one site, mean."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from sae_ray.concepts.config import Concepts, Patches
from sae_ray.concepts.depths import add_depths
from sae_ray.concepts.findings import Findings, mean
from sae_ray.concepts.hierarchy import Path
from sae_ray.concepts.image_codes import ImageCodes, image_codes
from sae_ray.concepts.inputs import as_numpy
from sae_ray.concepts.label_findings import add_labels, add_tpp, usable_labels
from sae_ray.concepts.labels import Labels
from sae_ray.concepts.neuron_measures import top_positions
from sae_ray.concepts.patch_maps import spatial_coherence
from sae_ray.concepts.splits import halves
from sae_ray.concepts.structure import add_atoms, add_overlap, add_stability
from sae_ray.concepts.word_names import Texts, add_names

if TYPE_CHECKING:
    from jaxtyping import Float, Int

    from sae_ray.sae import SAE
    from sae_ray.store.activations import ActivationStore

TOP_IMAGES = 16
"""Of purity, uniqueness, depth and spatial coherence."""


def measure(
    sae: SAE | None,
    store: ActivationStore,
    labels: Labels | None,
    settings: Concepts,
    *,
    texts: Texts | None = None,
    patches: Patches | None = None,
    counterpart: Float[np.ndarray, "others d"] | None = None,
    paths: Sequence[Path | None] | None = None,
    group_sizes: Sequence[int] | None = None,
    seed: int = 0,
    after_images: Callable[[int], None] = lambda done: None,
) -> Findings:
    """Measures the latents of an SAE, or the raw neurons of a site, on the images of a store.

    The same inputs give the same bits. What is computed with are codes that are not 0, in blocks of neurons; beside
    these, memory grows with images, neurons and concepts, and never with the product of two of them.

    Args:
        sae: on any device; None for the raw coordinates of the activation.
        store: activations of the site that the SAE was trained on, of images that it was not trained on.
        labels: of all images by `image_index`; None without any. Concepts of too few images are left out here.
        settings: what is measured.
        texts: what neurons are named with; None: they get no names.
        patches: of the encoder, if the store has all tokens; None: no spatial coherence.
        counterpart: decoder rows of the latents that fire of an SAE with another seed, for stability.
        paths: of all images by `image_index`, in a taxonomy of their classes; None: no depths.
        group_sizes: of the levels of a Matryoshka SAE, as `Cell.group_sizes` gives them; None: one level.
        seed: the study's.
        after_images: called with the number of images encoded.

    Raises:
        UsageError: the SAE takes activations of another width.
        SaeRayError: the images of `texts` are others.
    """
    # A latent's part in an activation is its code times its decoder row, unless rows are standardised.
    with_tpp = "tpp" in settings.measures and not (sae is not None and sae.kind.standardises_rows)
    images = image_codes(sae, store, with_tpp, after_images)
    decoder = None if sae is None else as_numpy(sae.W_dec)
    labels = None if labels is None else labels.take(images.image_index)
    top_images = top_positions(images.codes, TOP_IMAGES)
    found = measure_codes(images, top_images, decoder, labels, settings, texts, counterpart, seed)
    if "spatial" in settings.measures and patches is not None:
        found.neurons["spatial"] = spatial_coherence(sae, store, top_images, patches)
        found.counts["spatial"] = mean(found.neurons["spatial"])
    if paths is not None:
        own = [paths[index] for index in images.image_index.tolist()]
        add_depths(found, top_images, own, group_sizes or [len(top_images)])
    return found


def measure_codes(
    images: ImageCodes,
    top_images: Int[np.ndarray, "neurons n"],
    decoder: Float[np.ndarray, "latents d"] | None,
    labels: Labels | None,
    settings: Concepts,
    texts: Texts | None = None,
    counterpart: Float[np.ndarray, "others d"] | None = None,
    seed: int = 0,
) -> Findings:
    """All that `measure` finds once images are encoded, but for maps of patches.

    Args:
        images: the codes.
        top_images: `top_positions` of the codes.
        decoder: None for raw neurons.
        labels: of these images.
        settings, texts, counterpart, seed: as in `measure`.
    """
    wanted = set(settings.measures)
    labels = None if labels is None else usable_labels(labels, settings.min_images)
    split = None if labels is None else halves(labels, seed)
    firing = top_images[:, 0] >= 0
    found = Findings(len(top_images))
    found.counts |= {"images": len(images.image_index), "n_live": int(firing.sum())}
    if labels is not None and split is not None:
        if wanted & {"labels", "probes", "fms", "sparse_probing"}:
            add_labels(found, images, top_images, labels, split, settings, seed)
        if "tpp" in wanted and decoder is not None and images.activations is not None:
            add_tpp(found, decoder, images, labels, split, settings, seed)
    if "uniqueness" in wanted:
        add_overlap(found, top_images)
    if "atoms" in wanted and decoder is not None:
        add_atoms(found, decoder, firing, images)
    if "stability" in wanted and decoder is not None and counterpart is not None:
        add_stability(found, decoder, firing, counterpart, seed)
    if "names" in wanted and texts is not None:
        judged = np.zeros(0, np.int64) if split is None else split.judged
        add_names(found, decoder, images, judged, texts)
    return found
