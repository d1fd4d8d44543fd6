"""Finds the concepts that neurons represent, by the labels of their top images or by a text that describes these."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pyarrow as pa

from sae_ray.concepts.inputs import unit
from sae_ray.concepts.naming import class_of
from sae_ray.scores.scoring import majority
from sae_ray.scores.tables import Scores
from sae_ray.store.activations import ActivationStore

if TYPE_CHECKING:
    from jaxtyping import Float, Int


class Concept(NamedTuple):
    """A live neuron and the most common class of its top images."""

    latent: int
    """The number of the latent; for raw neurons the coordinate."""
    label: str | None
    """The class, as given by `class_of`; None if no top image has a class."""
    purity: float
    """Share of the top images that are of the class."""
    n_firing: int
    """Number of images that it fires on."""
    frequency: float
    """Share of images that it fires on."""
    max_token: float
    """Its largest value on a token."""

    @property
    def support(self) -> tuple[int, int]:
        """Sort key: most images that it fires on first, then by number."""
        return -self.n_firing, self.latent

    def stands_for_its_class(self, min_images: int, min_purity: float) -> bool:
        return self.label is not None and self.n_firing >= min_images and self.purity >= min_purity


class Found(NamedTuple):
    """A result of a text search."""

    concept: Concept
    similarity: float
    """Cosine of the text's embedding and the mean embedding of the neuron's top images."""


def image_classes(labels: pa.Table, ignored: Sequence[str] = ()) -> list[str | None]:
    """The class of every image of a table of labels; None without a label, or with one of the ignored."""
    names = labels["label_name"].to_pylist()
    return [None if name is None or name in ignored else class_of(name) for name in names]


def label_concepts(
    scores: Scores,
    top_image: Int[np.ndarray, "neurons top"],
    classes: Sequence[str | None],
    max_token: Float[np.ndarray, " neurons"],
) -> list[Concept]:
    """The concept of each live neuron: one that fires on at least one image and has a `max_token` above 0.

    Args:
        scores: of one scoring pass.
        top_image: `TopImages.image` of the same pass.
        classes: class of each image of that pass, by `image_index`.
        max_token: each neuron's largest value on a token.
    """
    known = sorted({label for label in classes if label is not None})
    code_of = {label: code for code, label in enumerate(known)}
    codes = np.array([-1 if label is None else code_of[label] for label in classes], np.int64)

    neuron, rank = np.nonzero(top_image >= 0)
    code, purity = majority(neuron, codes[top_image[neuron, rank]], len(top_image))
    return [
        Concept(
            latent,
            None if code[latent] < 0 else known[code[latent]],
            float(purity[latent]),
            int(scores.n_firing[latent]),
            float(scores.frequency[latent]),
            float(max_token[latent]),
        )
        for latent in np.flatnonzero((scores.n_firing > 0) & (max_token > 0)).tolist()
    ]


def best_of_each(concepts: Sequence[Concept]) -> list[Concept]:
    """The concept with the highest `max_token` times `frequency` of each class, highest first."""

    def order(concept: Concept) -> tuple[float, int]:
        return -concept.max_token * concept.frequency, concept.latent

    best: dict[str | None, Concept] = {}
    for concept in sorted(concepts, key=order):
        best.setdefault(concept.label, concept)
    return list(best.values())


def mean_embeddings(
    top_image: Int[np.ndarray, "neurons top"], embeddings: ActivationStore, neurons: Sequence[int]
) -> Float[np.ndarray, "chosen d"]:
    """The mean embedding of each neuron's top images, as a unit vector; NaN for a neuron without top images.

    Args:
        top_image: `TopImages.image` of a scoring pass.
        embeddings: of the same images, the `projection` of the model that texts are compared with.
        neurons: the neurons to compute.
    """
    top = top_image[np.asarray(neurons, np.int64)]
    row, rank = np.nonzero(top >= 0)
    image = top[row, rank]
    order = np.argsort(image, kind="stable")
    row, image = row[order], image[order]
    total = np.zeros((len(neurons), embeddings.d))
    for number in range(len(embeddings.parts)):
        index, _, vectors = embeddings.read(number)
        if not len(index):
            continue
        first, last = np.searchsorted(image, (index[0], index[-1] + 1))
        vectors = unit(vectors[np.searchsorted(index, image[first:last])])
        np.add.at(total, row[first:last], vectors)
    return unit(total)


def search(
    text: Float[np.ndarray, " d"], means: Float[np.ndarray, "concepts d"], concepts: Sequence[Concept]
) -> list[Found]:
    """Neurons sorted by how similar their top images are to a text, most similar first.

    Args:
        text: the text's unit embedding.
        means: `mean_embeddings` of the neurons.
        concepts: the neurons.
    """
    similarity = means @ text.astype(np.float64)
    found = [Found(concept, value) for concept, value in zip(concepts, similarity.tolist(), strict=True)]
    return sorted(found, key=lambda one: (-one.similarity, one.concept.latent))
