"""Tries edits on a LLaVA: the same questions about the same images, with one edit after the other."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from sae_ray.editing.applying import edited
from sae_ray.editing.effects import WriterShares, on_answers, on_codes, seen_by_reader
from sae_ray.editing.operators import direction_of
from sae_ray.encoders.transformers_models import blocks_of
from sae_ray.steering.interventions import Intervention, LatentEdit
from sae_ray.steering.respondent import Directions, Respondent

if TYPE_CHECKING:
    from jaxtyping import Float
    from PIL import Image
    from torch import Tensor

    from sae_ray.editing.patch import Facts, Patch
    from sae_ray.sae import SAE
    from sae_ray.steering.config import Steering
    from sae_ray.steering.interventions import OnError
    from sae_ray.steering.llava import Llava
    from sae_ray.steering.protocol import Question

CODED_IMAGES = 128
"""Images whose activations are compared, at most. All of them are asked about."""


class Trial:
    """A LLaVA, an SAE of its vision tower, and questions about images, which are answered once without any edit.

    Rows are those of `EDIT_SCHEMA` (`sae_ray.editing.effects`).
    """

    def __init__(
        self,
        llava: Llava,
        sae: SAE,
        asked: Sequence[Question],
        image: Callable[[int], Image.Image],
        class_name: Mapping[str, str],
        steering: Steering,
        batch_size: int,
        of_mlp: bool = False,
    ):
        """
        Args:
            sae: Of the residual stream after a block, or of the output of its MLP (`of_mlp`).
            asked: Questions without an edit, whose `concept` is the class of the image.
            image: Returns an image by its index.
            class_name: Class -> its readable name.
            batch_size: Answers that are generated together.
        """
        self.llava, self.sae, self.class_name, self.steering = llava, sae, class_name, steering
        self._asked, self._image, self._batch_size, self._of_mlp = asked, image, batch_size, of_mlp
        self._before = self._answers(asked, steering)

    def of_patch(self, patch: Patch, concept: str | None) -> dict[str, Any]:
        """What a patch does. `concept` is the class that its latent stands for."""
        facts = patch.facts
        layer = self.llava.layer if facts.layer is None else facts.layer
        shares = WriterShares(self._tower, layer, direction_of(self.sae, facts.latent))
        with shares.watching():
            before = self._seen(layer)
        with edited(self.llava.model, patch):
            after = seen_by_reader(patch, self.sae, before) if facts.scope == "reader" else self._seen(layer)
            answers = self._answers(self._asked, self.steering)
        return {
            **labelled(facts, concept),
            **on_codes(self.sae, facts.latent, before, after)._asdict(),
            **self._compared(answers, concept),
            "own_share_by_writer": shares.shares(),
        }

    def of_hook(self, latent: int, concept: str | None, error: OnError) -> dict[str, Any]:
        """What ablating the latent by a hook does, for comparison: the intervention of steering."""
        hook = Intervention(self.sae, (LatentEdit(latent, "ablate"),), error=error)
        before = self._seen(self.llava.layer)
        asked = [question._replace(kind="suppression", latent=latent) for question in self._asked]
        answers = self._answers(asked, replace(self.steering, error=error))
        return {
            "latent": latent,
            "concept": concept,
            "mode": f"hook, error {error}",
            "scope": "reader",
            "keep": "origin",
            **on_codes(self.sae, latent, before, hook(before))._asdict(),
            **self._compared(answers, concept),
        }

    @property
    def _tower(self) -> Any:
        return self.llava.model.model.vision_tower

    def _answers(self, asked: Sequence[Question], steering: Steering) -> list[str]:
        return Respondent(self.llava, self.sae, Directions(), steering).answers(asked, self._image, self._batch_size)

    def _compared(self, answers: Sequence[str], concept: str | None) -> dict[str, float | None]:
        found = on_answers(self._asked, self._before, answers, concept, self.class_name, self.steering.prompt)
        return found._asdict()

    def _seen(self, layer: int) -> Float[Tensor, "rows d_in"]:
        """What the SAE is of at a block, on every token of the images."""
        indices = list(dict.fromkeys(question.image_index for question in self._asked))[:CODED_IMAGES]
        block: Any = blocks_of(self._tower)[layer]
        outputs: list[Any] = []
        module: torch.nn.Module = block.mlp if self._of_mlp else block
        hook = module.register_forward_hook(lambda _, args, output: outputs.append(output))
        try:
            for start in range(0, len(indices), self._batch_size):
                images = [self._image(index) for index in indices[start : start + self._batch_size]]
                self.llava.image_embeddings(images, [()] * len(images))
        finally:
            hook.remove()
        return torch.cat(outputs).flatten(0, 1).float()


def labelled(facts: Facts, concept: str | None) -> dict[str, Any]:
    """The columns that say which edit a row is of."""
    return {
        "latent": facts.latent,
        "concept": concept,
        "mode": facts.mode,
        "scope": facts.scope,
        "keep": facts.keep,
    }
