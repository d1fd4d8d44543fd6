"""The steering protocol (Pach et al., section 3.3, with controls and a baseline): the questions and edits to evaluate.

A question is about one image, held-out or white, with one edit:

| kind | edit | image |
|---|---|---|
| `unsteered` | none | white, held-out |
| `reconstruction` | the SAE without edits | held-out |
| `white` | a concept's latent set to the strength | white |
| `insertion` | the best latent of a class set to the strength | held-out, of other classes |
| `suppression` | that latent ablated | held-out, of its class |
| `impure` | control: a live latent that represents no class, set to the strength | white |
| `neuron` | control: a coordinate of the tower's activation, set to the strength | white |
| `diffmean_white`, `diffmean_insertion` | a class's mean activation minus that of the rest, scaled, added | as above |
| `diffmean_suppression` | the same vector with its own scale, subtracted | held-out, of its class |
| `profile_white`, `profile_insertion` | the best latent's profile (`sae_ray.steering.profiles`), scaled | as above |
| `profile_suppression` | the same edits with their own scale, reversed | held-out, of its class |

Held-out images are also asked about with the other prompts. A control counts as right if it names the most common class
of its top images. DiffMean and profiles use the scales that work best on training images.
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
    "profile_white",
    "profile_insertion",
    "profile_suppression",
]

WHITE = -1
"""`image_index` of the white image."""
SCALES = (0.5, 1.0, 2.0, 4.0, 8.0)
"""The candidate scales of what is added."""
CALIBRATION_IMAGES = 16
"""How many training images of a class, and how many of others, are used to choose its scales."""


class Question(NamedTuple):
    """One question with one edit."""

    kind: Kind
    latent: int
    """The edited latent (for `neuron`, the edited coordinate); -1 if none is edited."""
    concept: str | None
    """The class of the edit; without an edit, the class of the image."""
    strength: float
    """The value that the latent is set to, or the scale of the vector."""
    image_index: int
    """Of a held-out image; -1 for the white image."""
    prompt: str


class Added(NamedTuple):
    """What is added to activations with scales that are chosen on training images."""

    way: Literal["diffmean", "profile"]
    latent: int
    """Whose profile it is; -1 for DiffMean."""
    label: str

    def kind(self, place: Literal["white", "insertion", "suppression"]) -> Kind:
        """Of the questions about it."""
        return f"{self.way}_{place}"  # pyright: ignore[reportReturnType]


class Scales(NamedTuple):
    """The scales of what is added."""

    insertion: float
    suppression: float


class Subjects(NamedTuple):
    """The latents and neurons to steer with."""

    concepts: list[Concept]
    """Latents that represent a class; without labels, those that fire on most images."""
    best: list[Concept]
    """The best latent of each class; without labels, the first of the concepts."""
    impure: list[Concept]
    neurons: list[Concept]
    """Raw neurons."""


def choose_subjects(latents: Sequence[Concept], neurons: Sequence[Concept], steering: Steering) -> Subjects:
    """Chooses from all live latents and raw neurons which to steer with."""

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
    """A random sample of at most n images, ascending."""
    chosen = np.random.default_rng(seed).permutation(len(images))[:n]
    return sorted(images[place] for place in chosen)


def calibration_questions(
    added: Sequence[Added], classes: Sequence[str | None], images: Sequence[int], steering: Steering, seed: int
) -> list[Question]:
    """The questions about training images that choose the scales.

    Args:
        added: what scales are chosen for.
        classes: class of each training image, by `image_index`.
        images: the images to sample from.
    """
    asked: list[Question] = []
    for one in added:
        own, others = _split(images, classes, one.label)
        own, others = (sample(some, CALIBRATION_IMAGES, derived_seed(seed, one.label)) for some in (own, others))
        insertion, suppression = one.kind("insertion"), one.kind("suppression")
        for scale in SCALES:
            asked += [Question(insertion, *one[1:], scale, image, steering.prompt) for image in others]
            asked += [Question(suppression, *one[1:], -scale, image, steering.prompt) for image in own]
    return asked


def main_questions(
    subjects: Subjects,
    scales: Mapping[Added, Scales],
    classes: Sequence[str | None],
    images: Sequence[int],
    steering: Steering,
) -> list[Question]:
    """The questions about the white image and held-out images.

    Args:
        scales: of what is added, as chosen on training images.
        classes: class of each held-out image, by `image_index`.
        images: the images to ask about.
    """

    def of_images(kind: Kind, latent: int, label: str | None, strength: float, some: Sequence[int]) -> list[Question]:
        prompts = (steering.prompt, *steering.other_prompts)
        return [Question(kind, latent, label, strength, image, prompt) for image in some for prompt in prompts]

    asked = [Question("unsteered", -1, None, 0.0, WHITE, steering.prompt)]
    for image in images:
        for kind in ("unsteered", "reconstruction"):
            asked += of_images(kind, -1, classes[image], 0.0, [image])
    asked += white_questions("white", subjects.concepts, steering)
    asked += white_questions("impure", subjects.impure, steering)
    asked += white_questions("neuron", subjects.neurons, steering)
    for one in subjects.best:
        own, others = _split(images, classes, one.label)
        asked += of_images("insertion", one.latent, one.label, _strength(one, steering), others)
        asked += of_images("suppression", one.latent, one.label, 0.0, own)
        for added, (insertion, suppression) in scales.items():
            if added.label == one.label:
                subject = added[1:]
                asked.append(Question(added.kind("white"), *subject, insertion, WHITE, steering.prompt))
                asked += of_images(added.kind("insertion"), *subject, insertion, others)
                asked += of_images(added.kind("suppression"), *subject, -suppression, own)
    return asked


def white_questions(kind: Kind, some: Sequence[Concept], steering: Steering) -> list[Question]:
    """The study's question about a white image, each time with one latent or neuron set to the strength."""
    return [Question(kind, one.latent, one.label, _strength(one, steering), WHITE, steering.prompt) for one in some]


def _split(images: Sequence[int], classes: Sequence[str | None], label: str | None) -> tuple[list[int], list[int]]:
    """The images of a class, and the others."""
    own = [image for image in images if label is not None and classes[image] == label]
    return own, [image for image in images if label is None or classes[image] != label]


def _strength(concept: Concept, steering: Steering) -> float:
    return steering.strength * (concept.max_token if steering.unit == "max" else 1.0)
