"""The configuration of the steering evaluation."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal, get_args

from annotated_types import Gt, Le

from sae_ray.config import STRICT, Count, Dtype
from sae_ray.errors import check

ONE_WORD = "What is shown in this image? Use exactly one word!"
"""The question of Pach et al. (arXiv 2504.02821, sec. 3.3)."""
ONE_WORD_FOR_ALL = "What do these images have in common? Use exactly one word!"
"""The question about a grid of images."""
NamingMethod = Literal["vlm", "steering"]
ShownImages = Literal["one_by_one", "grid"]
MAX_NEW_TOKENS = 32
"""Length of an answer, where none is asked for."""


@dataclass(frozen=True)
class Steering:
    """How a LLaVA is steered with SAEs of the layer that it reads, and how its answers are evaluated."""

    __pydantic_config__ = STRICT

    llava: str
    """The LLaVA whose vision tower is the encoder: a hub id or a directory, given as `encoder.model`."""
    revision: str | None = None
    """Commit, tag or branch of a hub id."""
    dtype: Dtype = "float32"
    """Dtype of the LLaVA; float32 on CPU."""
    scorer: str = "openai/clip-vit-base-patch32"
    """The model that compares answers with images: CLIP, SigLIP or open_clip, given as `encoder.model`."""
    scorer_revision: str | None = None
    """Commit, tag or branch of a hub id."""
    prompt: str = ONE_WORD
    """The question. An answer is right if it begins with the name of the class."""
    other_prompts: tuple[str, ...] = ()
    """Questions about something else. Steering should not change their answers."""
    max_new_tokens: Count = 5
    """Maximum number of tokens per answer."""
    strength: float = 100.0
    """The value that latents are set to."""
    unit: Literal["absolute", "max"] = "absolute"
    """`max`: the strength is a multiple of the latent's largest value on a token."""
    error: Literal["drop", "keep"] = "drop"
    """Whether to drop or keep the part of an activation that the SAE does not reconstruct."""
    min_images: Count = 16
    """A latent represents a class if it fires on at least this many training images and meets `min_purity`."""
    min_purity: Annotated[float, Gt(0), Le(1)] = 0.75
    """A latent represents a class if at least this share of its top images is of the class and it meets
    `min_images`."""
    ignore_labels: tuple[str, ...] = ()
    """Classes that are not concepts, such as `blank`. Their images are left out too."""
    n_white_latents: Count = 1000
    """Maximum number of latents to steer a white image with: those that fire on most images."""
    n_images: Count = 1000
    """Number of held-out images to steer with `n_image_latents` latents."""
    n_image_latents: Count = 10
    """Maximum number of latents to steer held-out images with: the best latent of each class, or without labels those
    that fire on most images."""

    def __post_init__(self):
        check(math.isfinite(self.strength), "steering.strength", self.strength, "choose a finite number")
        check(self.prompt not in self.other_prompts, "steering.other_prompts", self.prompt,
              "this is already steering.prompt; remove it")  # fmt: skip


@dataclass(frozen=True)
class Naming:
    """How the study's LLaVA names latents. An empty table is enough; without it naming is skipped."""

    __pydantic_config__ = STRICT

    methods: tuple[NamingMethod, ...] = get_args(NamingMethod)
    """`vlm`: what the LLaVA answers to `steering.prompt` about a latent's top training images. `steering`: what it
    answers about a white image with the latent set to `steering.strength`, for SAEs of the layer that it reads. The
    first method that has a name for a latent is the one that is shown."""
    images: ShownImages = "one_by_one"
    """How `vlm` shows top images: `one_by_one`, with the commonest answer as the name, or all 16 in a `grid` with one
    question, for models that read grids. The world's LLaVA does not."""
    n_latents: Count = 1000
    """Maximum number of latents of each SAE to name: those that fire on most training images. Up to 16 training and 32
    held-out images are asked about for each, every image once."""

    def __post_init__(self):
        check(bool(self.methods), "naming.methods", [], "name at least one, or remove [naming]")
        check(len(set(self.methods)) == len(self.methods), "naming.methods", list(self.methods), "name each one once")
        check(self.images == "one_by_one" or "vlm" in self.methods, "naming.images", self.images,
              'only the method "vlm" shows top images; add it to naming.methods, or leave this out')  # fmt: skip
