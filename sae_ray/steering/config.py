"""What decides the evaluation of a LLaVA that is steered."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le

from sae_ray.errors import UsageError

# Read by pydantic when a study file is opened; nothing here imports pydantic.
_PYDANTIC = {"extra": "forbid", "use_attribute_docstrings": True}
Dtype = Literal["float32", "bfloat16", "float16"]
Count = Annotated[int, Ge(1)]

ONE_WORD = "What is shown in this image? Use exactly one word!"
"""The question of Pach et al. (arXiv 2504.02821, sec. 3.3)."""
MAX_NEW_TOKENS = 32
"""Length of an answer, where none is asked for."""


@dataclass(frozen=True)
class Steering:
    """How a LLaVA is steered by the SAEs of the layer that it reads, and how that is judged."""

    __pydantic_config__ = _PYDANTIC

    llava: str
    """The LLaVA whose vision tower is the encoder: a hub id or a directory."""
    revision: str | None = None
    """Commit, tag or branch of a hub id."""
    dtype: Dtype = "float32"
    """Dtype of the LLaVA; float32 on CPU."""
    scorer: str = "openai/clip-vit-base-patch32"
    """The model of images and texts by which answers are compared with images, as `encoder.model`: CLIP, SigLIP or
    open_clip."""
    scorer_revision: str | None = None
    """Commit, tag or branch of a hub id."""
    prompt: str = ONE_WORD
    """The question; the first word of the answer counts."""
    other_prompts: tuple[str, ...] = ()
    """Questions about something else, whose answers steering should leave alone."""
    max_new_tokens: Count = 5
    """Length of an answer."""
    strength: float = 100.0
    """What the latent is set to."""
    unit: Literal["absolute", "max"] = "absolute"
    """`max`: the strength counts in multiples of the latent's largest value on a token."""
    error: Literal["drop", "keep"] = "drop"
    """What becomes of the part of an activation that the SAE does not reconstruct."""
    min_images: Count = 16
    """A latent stands for a class if it fires on so many training images ..."""
    min_purity: Annotated[float, Gt(0), Le(1)] = 0.75
    """... and this share of its top images is of the class."""
    ignore_labels: tuple[str, ...] = ()
    """Classes that are no concept, such as `blank`; their images are left out too."""
    n_white_latents: Count = 1000
    """Latents, at most, that a white image is steered by: those that fire on most images."""
    n_images: Count = 1000
    """Held-out images that are steered by a few latents."""
    n_image_latents: Count = 10
    """Those latents, at most: the best ones of their classes, or where there are no labels, as on the white image."""

    def __post_init__(self):
        _check(math.isfinite(self.strength), "steering.strength", self.strength, "choose a finite number")
        _check(self.prompt not in self.other_prompts, "steering.other_prompts", self.prompt,
               "it is steering.prompt already; leave it out")  # fmt: skip


def _check(holds: bool, name: str, value: object, remedy: str) -> None:
    if not holds:
        raise UsageError(f"{name} = {value!r}: {remedy}")
