"""The steering protocol (Pach et al., section 3.3, with controls and a rival): who is asked what under which edits.

A question is about one image, held-out or white, under one edit:

| kind | edit | image |
|---|---|---|
| `unsteered` | none | white, held-out |
| `reconstruction` | the SAE without edits | held-out |
| `white` | a concept's latent set to the strength | white |
| `insertion` | the best latent of a class set to the strength | held-out, of other classes |
| `suppression` | that latent ablated | held-out, of its class |
| `impure` | a live latent that stands for no class, set to the strength: a control | white |
| `neuron` | a coordinate of the tower's activation set likewise: a control | white |
| `diffmean_white`, `diffmean_insertion` | a class's mean activation less that of the rest, scaled, added | as above |
| `diffmean_suppression` | the same, with a scale of its own, subtracted | held-out, of its class |

What has a held-out image is also asked the other prompts. A control is credited with the class that most of its top
images share. The scales of DiffMean are those that work best on training images.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

from sae_ray.concepts.labelling import Concept, best_of_each
from sae_ray.seeds import derived_seed
from sae_ray.steering.config import Steering

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

Kind = Literal[
    "unsteered",
    "reconstruction",
    "white",
    "insertion",
    "suppression",
    "impure",
    "neuron",
    "diffmean_white",
    "diffmean_insertion",
    "diffmean_suppression",
]

WHITE = -1
"""`image_index` of the white image."""
SCALES = (0.5, 1.0, 2.0, 4.0, 8.0)
"""What a DiffMean vector may be multiplied by."""
CALIBRATION_IMAGES = 16
"""Training images, of a class and of others, by which its scales are chosen."""


class Question(NamedTuple):
    """One question under one edit."""

    kind: Kind
    latent: int
    """The latent, or for `neuron` the coordinate, that is edited; -1 where there is none."""
    concept: str | None
    """The class that the answer is about: of the edit; without one, of the image."""
    strength: float
    """What the latent is set to, or the vector multiplied by."""
    image_index: int
    """Among the held-out images; -1 for the white one."""
    prompt: str


class Scales(NamedTuple):
    """What the DiffMean vector of a class is multiplied by."""

    insertion: float
    suppression: float


class Subjects(NamedTuple):
    """Who is steered."""

    concepts: list[Concept]
    """Latents that stand for a class; where nothing is labelled, those that fire on most images."""
    best: list[Concept]
    """The best of each class; where nothing is labelled, the first of the concepts."""
    impure: list[Concept]
    neurons: list[Concept]
    """Raw neurons."""


def choose_subjects(latents: Sequence[Concept], neurons: Sequence[Concept], steering: Steering) -> Subjects:
    """Picks whom to steer out of all live latents and raw neurons."""

    def most_supported(some: Sequence[Concept]) -> list[Concept]:
        often = [one for one in some if one.n_firing >= steering.min_images]
        return sorted(often, key=lambda one: one.support)[: steering.n_white_latents]

    if all(one.label is None for one in latents):
        concepts = most_supported(latents)
        return Subjects(concepts, concepts[: steering.n_image_latents], [], most_supported(neurons))
    pure = [one for one in latents if one.stands_for_its_class(steering.min_images, steering.min_purity)]
    best = best_of_each(pure)[: steering.n_image_latents]
    impure = [one for one in latents if one.label is not None and one not in set(pure)]
    return Subjects(most_supported(pure), best, most_supported(impure), most_supported(neurons))


def usable_images(
    image_ids: Sequence[str], label_names: Sequence[str | None], rejected: Collection[str], ignored: Collection[str]
) -> list[int]:
    """`image_index` of the images that could be read and whose label is not ignored."""
    rows = enumerate(zip(image_ids, label_names, strict=True))
    return [index for index, (image_id, label) in rows if image_id not in rejected and label not in ignored]


def sample(images: Sequence[int], n: int, seed: int) -> list[int]:
    """At most n of the images, ascending."""
    chosen = np.random.default_rng(seed).permutation(len(images))[:n]
    return sorted(images[place] for place in chosen)


def calibration_questions(
    labels: Sequence[str], classes: Sequence[str | None], images: Sequence[int], steering: Steering, seed: int
) -> list[Question]:
    """What is asked about training images to choose the scales of DiffMean.

    Args:
        labels: the classes that have a vector.
        classes: of the training images, by `image_index`.
        images: those that may be asked about.
    """
    asked: list[Question] = []
    for label in labels:
        own, others = _split(images, classes, label)
        own, others = (sample(some, CALIBRATION_IMAGES, derived_seed(seed, label)) for some in (own, others))
        for scale in SCALES:
            asked += [Question("diffmean_insertion", -1, label, scale, image, steering.prompt) for image in others]
            asked += [Question("diffmean_suppression", -1, label, -scale, image, steering.prompt) for image in own]
    return asked


def main_questions(
    subjects: Subjects,
    scales: Mapping[str, Scales],
    classes: Sequence[str | None],
    images: Sequence[int],
    steering: Steering,
) -> list[Question]:
    """All that is asked about white and held-out images.

    Args:
        scales: of the classes that have a DiffMean vector.
        classes: of the held-out images, by `image_index`.
        images: those that are asked about.
    """

    def of_white(kind: Kind, some: Sequence[Concept]) -> list[Question]:
        return [Question(kind, one.latent, one.label, _strength(one, steering), WHITE, steering.prompt) for one in some]

    def of_images(kind: Kind, latent: int, label: str | None, strength: float, some: Sequence[int]) -> list[Question]:
        prompts = (steering.prompt, *steering.other_prompts)
        return [Question(kind, latent, label, strength, image, prompt) for image in some for prompt in prompts]

    asked = [Question("unsteered", -1, None, 0.0, WHITE, steering.prompt)]
    for image in images:
        for kind in ("unsteered", "reconstruction"):
            asked += of_images(kind, -1, classes[image], 0.0, [image])
    asked += of_white("white", subjects.concepts)
    asked += of_white("impure", subjects.impure)
    asked += of_white("neuron", subjects.neurons)
    for one in subjects.best:
        own, others = _split(images, classes, one.label)
        asked += of_images("insertion", one.latent, one.label, _strength(one, steering), others)
        asked += of_images("suppression", one.latent, one.label, 0.0, own)
        if one.label is not None and one.label in scales:
            insertion, suppression = scales[one.label]
            asked.append(Question("diffmean_white", -1, one.label, insertion, WHITE, steering.prompt))
            asked += of_images("diffmean_insertion", -1, one.label, insertion, others)
            asked += of_images("diffmean_suppression", -1, one.label, -suppression, own)
    return asked


def _split(images: Sequence[int], classes: Sequence[str | None], label: str | None) -> tuple[list[int], list[int]]:
    """The images of a class, and the others."""
    own = [image for image in images if label is not None and classes[image] == label]
    return own, [image for image in images if label is None or classes[image] != label]


def _strength(concept: Concept, steering: Steering) -> float:
    return steering.strength * (concept.max_token if steering.unit == "max" else 1.0)
