"""Names of all neurons from a vocabulary of any size, in blocks of words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from sae_ray.concepts.best_words import BestWords
from sae_ray.concepts.cosines import decoder_cosine
from sae_ray.concepts.dissect import Prior, log_likelihood, log_total, soft_wpmi_weights, word_probabilities
from sae_ray.concepts.findings import Findings, mean
from sae_ray.concepts.image_codes import ImageCodes
from sae_ray.concepts.inputs import unit
from sae_ray.concepts.neuron_measures import top_positions
from sae_ray.errors import SaeRayError
from sae_ray.store.activations import ActivationStore

if TYPE_CHECKING:
    from jaxtyping import Float, Int

TOP_K = 100
"""Top images that a name rests on."""
PURE = 0.75
"""Neurons with at least this purity stand for their concept."""
_A = 10.0
_BLOCK_NUMBERS = 2**24
"""Of images or neurons times words, 8 bytes each."""


def soft_wpmi_names(
    top_images: Int[np.ndarray, "neurons top_k"],
    embeddings: Float[np.ndarray, "images d"],
    texts: Float[np.ndarray, "words d"],
) -> BestWords:
    """The best words of each neuron by `soft_wpmi`, without the matrix of images and words.

    Args:
        top_images: positions in `embeddings`, best first, -1 in unused places.
        embeddings: unit vectors of the images, in the space of the texts.
        texts: unit vectors of the words.
    """
    weights = soft_wpmi_weights(top_images.shape[1])
    n_images = (top_images >= 0).sum(axis=1)
    size = max(1, _BLOCK_NUMBERS // max(len(embeddings), len(top_images), 1))
    blocks = [slice(start, start + size) for start in range(0, len(texts), size)]
    total = np.full(len(embeddings), -np.inf)
    for words in blocks:
        total = np.logaddexp(total, log_total(embeddings @ texts[words].T, _A))
    parts = []
    for words in blocks:
        probabilities = word_probabilities(embeddings @ texts[words].T, _A, total)
        scores = log_likelihood(top_images, probabilities, weights)
        scores -= Prior.of(scores, n_images, len(weights)).log_mean()
        parts.append(BestWords.of(scores, words.start))
    return BestWords.merged(parts)


def decoder_names(decoder: Float[np.ndarray, "neurons d"], texts: Float[np.ndarray, "words d"]) -> BestWords:
    """The best words of each neuron by `decoder_cosine`, in blocks of neurons."""
    size = max(1, _BLOCK_NUMBERS // max(1, len(texts)))
    parts = [
        BestWords.of(decoder_cosine(decoder[start : start + size], texts)) for start in range(0, len(decoder), size)
    ]
    return BestWords(*(np.concatenate(column) for column in zip(*parts, strict=True)))


@dataclass(frozen=True, eq=False)
class Texts:
    """A vocabulary, and images in the space of its embeddings."""

    words: list[str]
    embeddings: Float[np.ndarray, "words d"]
    """Unit vectors."""
    image_index: Int[np.ndarray, " images"]
    images: Float[np.ndarray, "images d"]
    """Unit vectors of the images that have codes, by the model that embedded the words."""
    word_of: Mapping[str, str]
    """The word of each concept that has one in the vocabulary."""
    holds_decoder: bool = False
    """Whether decoder rows are in this space: those of an SAE that was trained on these very vectors."""

    @classmethod
    def of(
        cls,
        words: list[str],
        embeddings: Float[np.ndarray, "words d"],
        store: ActivationStore,
        word_of: Mapping[str, str],
        holds_decoder: bool = False,
    ) -> Texts:
        """`store`: the `projection` of the model, one row per image."""
        parts = [store.read(number) for number in store.parts]
        index, vectors = (np.concatenate([part[column] for part in parts]) for column in (0, 2))
        return cls(words, embeddings, index, unit(vectors), word_of, holds_decoder)


def add_names(
    found: Findings,
    decoder: Float[np.ndarray, "latents d"] | None,
    images: ImageCodes,
    judged: Int[np.ndarray, " judged"],
    texts: Texts,
) -> None:
    """Names by SoftWPMI, and beside them those by decoder cosine.

    Args:
        found: what to add them to; knows concept and purity if there are labels.
        decoder: of an SAE; None for raw neurons.
        images: the codes.
        judged: positions of images that something is judged on, so that no name rests on them.
        texts: the vocabulary.

    Raises:
        SaeRayError: the images of the texts are others.
    """
    if not np.array_equal(texts.image_index, images.image_index):
        raise SaeRayError(
            "the embeddings that names are found with are of other images than the activations; extract both from the "
            "same manifest"
        )
    used = np.delete(np.arange(len(texts.images)), judged)
    top = top_positions(images.codes.tocsr()[used].tocsc(), TOP_K)
    n_images = (top >= 0).sum(axis=1)
    best = soft_wpmi_names(top, texts.images[used], texts.embeddings)
    named = best.first >= 0
    words = np.array([*texts.words, None], object)  # the last one is that of -1
    found.names.append(best.table("soft_wpmi", texts.words, n_images))
    score, following = np.where(np.isfinite(best.score[:, :2]), best.score[:, :2], np.nan).T
    found.neurons |= {
        "name": words[best.first],
        "name_method": np.array([None, "soft_wpmi"], object)[named.astype(int)],
        "name_score": score,
        "name_margin": score - following,
        "name_images": np.where(named, n_images, -1),
    }
    found.counts |= {"words": len(texts.words), "named": int(named.sum()), "distinct_names": best.n_distinct}
    right = _right(found, words[best.first], texts)
    found.counts |= {"pure": len(right), "names_right": mean(right)}
    if decoder is not None and texts.holds_decoder:
        by_decoder = decoder_names(decoder, texts.embeddings)
        found.names.append(by_decoder.table("decoder_cosine", texts.words, np.zeros(len(n_images), np.int64)))
        found.counts["decoder_names_right"] = mean(_right(found, words[by_decoder.first], texts))


def _right(found: Findings, names: np.ndarray, texts: Texts) -> Float[np.ndarray, " pure"]:
    """Of each neuron that stands for a concept with a word, whether it has that as its name: 0 also for none."""
    purity, concept = (found.neurons.get(column) for column in ("purity", "concept"))
    if purity is None or concept is None:
        return np.zeros(0)
    right = [
        name == texts.word_of[one]
        for name, one, share in zip(names, concept, purity, strict=True)
        if share >= PURE and one in texts.word_of
    ]
    return np.array(right, np.float64)
