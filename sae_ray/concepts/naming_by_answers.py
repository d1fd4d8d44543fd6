"""Names of neurons from what a vision-language model answers about their top images, and whether they hold on others.

MedSAE (arXiv 2510.26411) lets such a model name neurons and verifies the names; neither its prompts nor its procedure
are published, so both are ours. The model is asked what each image shows, in one word, so an answer belongs to an image
and serves every neuron. Names come from training images and are tried on held-out ones. Nothing here calls a model.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from sae_ray.concepts.inputs import SparseMatrix, sparse_codes
from sae_ray.concepts.naming import words_of
from sae_ray.errors import UsageError
from sae_ray.seeds import derived_seed

if TYPE_CHECKING:
    from jaxtyping import Float, Int

N_IMAGES = 16
"""Images that a name comes from, and images of either kind that it is tried on."""
MIN_TRIED = 5
"""A name that can be tried on fewer images of either kind has no score."""
TOP_SHARE = 0.1
"""Names are tried on images among this share of those that a neuron fires on, the strongest."""
VERIFIED = 0.8
"""A name holds if its score is at least this high."""
POOL = 512
"""Random images that controls and images without firing are drawn from, so that few answers serve all neurons."""


class AnsweredNames(NamedTuple):
    """One name per neuron."""

    name: list[str | None]
    """The commonest answer in lower case, of equal ones that of the higher rank; None without any."""
    agreement: Float[np.ndarray, " neurons"]
    """Share of the neuron's images whose answer this is; NaN without a name."""
    n_images: Int[np.ndarray, " neurons"]
    """How many images were asked about."""


class Trials(NamedTuple):
    """The images on which the name of each neuron is tried: positions, -1 in unused places, which are the last."""

    firing: Int[np.ndarray, "neurons n"]
    """Drawn from the strongest images."""
    silent: Int[np.ndarray, "neurons n"]
    """Drawn from the images on which the neuron is 0."""


def answered_names(top_images: Any, answers: Mapping[int, str]) -> AnsweredNames:
    """Each neuron's name: the commonest answer about its top images.

    Args:
        top_images: `[neurons, n]`, images in the order of rank, -1 in unused places.
        answers: Image -> what the model said that it shows, for all of these images. An answer without a word counts as
            an image that has no name.
    """
    rows = [[image for image in row if image >= 0] for row in np.asarray(top_images).tolist()]
    found = [_commonest([answers[image] for image in row]) for row in rows]
    return AnsweredNames(
        [name for name, _ in found], np.array([share for _, share in found]), np.array([len(row) for row in rows])
    )


def _commonest(answers: Sequence[str]) -> tuple[str | None, float]:
    counts = Counter(filter(None, map(plain, answers)))
    if not counts:
        return None, np.nan
    [(name, count)] = counts.most_common(1)  # in a tie the first that was counted
    return name, count / len(answers)


def plain(answer: str) -> str:
    """An answer in lower case, without punctuation: `A star.` becomes `a star`."""
    return " ".join(words_of(answer))


def affirms(answer: str) -> bool:
    """Whether the answer to `Is there a star in this image?` is yes."""
    return words_of(answer)[:1] == ["yes"]


def trials(codes: Any, neurons: Sequence[int], seed: int, *, n: int = N_IMAGES) -> Trials:
    """Draws the images on which names are tried.

    Those of a neuron are the same whichever others are named: they depend on the codes, the seed and its number.

    Args:
        codes: `[images, latents]` of held-out images: torch, numpy or scipy.sparse.
        neurons: The latents to try names of.
        seed: The study's.
        n: Images of either kind; fewer where there are fewer.

    Raises:
        UsageError: codes are no finite matrix.
    """
    matrix: SparseMatrix = sparse_codes(codes)
    columns = matrix[:, list(neurons)].tocsc()
    pool = np.random.default_rng(derived_seed(seed, "silent images")).permutation(matrix.shape[0])[:POOL]
    found = Trials(*(np.full((len(neurons), n), -1) for _ in Trials._fields))
    for place, neuron in enumerate(neurons):
        entries = slice(*columns.indptr[place : place + 2])
        image, value = columns.indices[entries], columns.data[entries]
        rng = np.random.default_rng(derived_seed(seed, f"trials: {neuron}"))
        firing, strength = image[value > 0], value[value > 0]
        strongest = firing[np.lexsort((firing, -strength))[: max(n, int(np.ceil(TOP_SHARE * len(firing))))]]
        silent = np.setdiff1d(pool, image[value != 0])
        for target, images in zip(found, (strongest, silent), strict=True):
            drawn = rng.permutation(images)[:n]
            target[place, : len(drawn)] = drawn
    return found


def random_images(images: Any, n_neurons: int, seed: int, *, n: int = N_IMAGES) -> Int[np.ndarray, "neurons n"]:
    """Random images in place of each neuron's top images: what a name is worth that comes from nothing.

    Args:
        images: `[images]`, the images to draw from.
    """
    rng = np.random.default_rng(derived_seed(seed, "random images"))
    pool = rng.permutation(np.asarray(images))[:POOL]
    return np.stack([rng.permutation(pool)[:n] for _ in range(n_neurons)]) if n_neurons else np.zeros((0, n), np.int64)


def name_scores(
    names: Sequence[str | None], tried: Trials, fits: Callable[[str, int], float]
) -> Float[np.ndarray, " neurons"]:
    """How well each name tells images on which the neuron fires strongly from images on which it does not.

    The probability that the name fits an image of the first kind better than one of the second, equal fits counting
    half (the area under the ROC curve). For fits of yes and no it is the balanced accuracy. A name that says nothing
    has .5.

    Args:
        names: One per neuron of `tried`; None for a neuron without one.
        tried: As `trials` draws it.
        fits: (name, image) -> how well the name fits the image, in any unit: whether the model's answer about the image
            is the name (`sae_ray.concepts.naming.names`), whether it affirms it (`affirms`), or a cosine of CLIP
            embeddings.

    Returns:
        NaN for a neuron without a name or with fewer than 5 images of either kind.

    Raises:
        UsageError: there are not as many names as neurons.
    """
    if len(names) != len(tried.firing):
        raise UsageError(f"{len(names)} names came with images of {len(tried.firing)} neurons; give one per neuron")
    found = np.full(len(names), np.nan)
    for place, name in enumerate(names):
        kinds = [row[place][row[place] >= 0].tolist() for row in tried]
        if name is None or min(map(len, kinds)) < MIN_TRIED:
            continue
        firing, silent = (np.array([float(fits(name, image)) for image in images]) for images in kinds)
        ahead = np.sign(firing[:, None] - silent)
        found[place] = (ahead.mean() + 1) / 2
    return found
