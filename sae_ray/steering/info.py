"""What is known of a LLaVA without its weights."""

from dataclasses import dataclass

from sae_ray.encoders.info import EncoderInfo


@dataclass(frozen=True)
class LlavaInfo:
    """A LLaVA, from its configuration alone."""

    tower: EncoderInfo
    """Its vision tower."""
    layer: int
    """The tower's block, from 0, whose output the language model reads."""
    n_image_tokens: int
    """Places that an image takes in the language model's input."""
