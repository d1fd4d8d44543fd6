"""Answers questions with a LLaVA, applying the edits that they ask for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple, assert_never

from sae_ray.steering.interventions import Intervention, LatentEdit, TowerEdit
from sae_ray.steering.llava import Llava
from sae_ray.steering.profiles import Profile
from sae_ray.steering.protocol import WHITE, Question

if TYPE_CHECKING:
    from jaxtyping import Float
    from PIL import Image
    from torch import Tensor

    from sae_ray.sae import SAE
    from sae_ray.steering.config import Steering


class Directions(NamedTuple):
    """What questions may add to activations."""

    diffmean: Mapping[str, Float[Tensor, " d_in"]] = MappingProxyType({})
    """By class."""
    profiles: Mapping[int, Profile] = MappingProxyType({})
    """By latent."""


class Respondent:
    """Answers questions with greedy decoding.

    Args:
        llava: the model to steer.
        sae: an SAE of the layer that it reads.
        directions: what it can be asked to add.
        steering: the configuration: prompt, length of answers, handling of the SAE's error.
    """

    def __init__(self, llava: Llava, sae: SAE, directions: Directions, steering: Steering):
        self.llava = llava
        self.sae = sae
        self.directions = directions
        self.steering = steering

    def answers(self, questions: Sequence[Question], image: Callable[[int], Image.Image], batch_size: int) -> list[str]:
        """One answer per question.

        Args:
            image: returns an image by its index.
            batch_size: number of answers generated together.
        """
        answers: list[str] = []
        for start in range(0, len(questions), batch_size):
            batch = questions[start : start + batch_size]
            # Several prompts in a row are often about the same image with the same edit: embed it once.
            shown = list({question._replace(prompt=""): question for question in batch}.values())
            pictures = {
                index: self.llava.white() if index == WHITE else image(index)
                for index in {one.image_index for one in shown}
            }
            embeddings = self.llava.image_embeddings(
                [pictures[one.image_index] for one in shown], [self._edits(one) for one in shown]
            )
            seen = {question._replace(prompt=""): one for question, one in zip(shown, embeddings, strict=True)}
            answers += self.llava.generate(
                [seen[question._replace(prompt="")] for question in batch],
                [question.prompt for question in batch],
                self.steering.max_new_tokens,
            )
        return answers

    def _edits(self, question: Question) -> tuple[TowerEdit, ...]:
        match question.kind:
            case "unsteered":
                return ()
            case "reconstruction":
                return (self._intervention(),)
            case "white" | "insertion" | "impure":
                return (self._intervention(LatentEdit(question.latent, "set", question.strength)),)
            case "suppression":
                return (self._intervention(LatentEdit(question.latent, "ablate")),)
            case "neuron":
                return (partial(_with_coordinate, question.latent, question.strength),)
            case "diffmean_white" | "diffmean_insertion" | "diffmean_suppression":
                assert question.concept is not None, "every DiffMean vector belongs to a class"
                return (partial(_with_added, question.strength * self.directions.diffmean[question.concept]),)
            case "profile_white" | "profile_insertion" | "profile_suppression":
                return (self.directions.profiles[question.latent].intervention(self.sae, question.strength),)
            case _:
                assert_never(question.kind)

    def _intervention(self, *edits: LatentEdit) -> Intervention:
        return Intervention(self.sae, edits, error=self.steering.error)


def _with_coordinate(coordinate: int, value: float, x: Float[Tensor, "tokens d_in"]) -> Float[Tensor, "tokens d_in"]:
    x = x.clone()
    x[:, coordinate] = value
    return x


def _with_added(vector: Float[Tensor, " d_in"], x: Float[Tensor, "tokens d_in"]) -> Float[Tensor, "tokens d_in"]:
    return x + vector.to(x)
