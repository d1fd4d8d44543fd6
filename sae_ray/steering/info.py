"""What is known of a LLaVA without its weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sae_ray.encoders.info import EncoderInfo


@dataclass(frozen=True)
class LlavaInfo:
    """What is known of a LLaVA without its weights; `dataclasses.asdict` and `from_dict` store it as JSON."""

    tower: EncoderInfo
    layer: int
    """The tower's block, from 0, whose output the language model reads."""
    n_image_tokens: int
    """Places that an image takes in the language model's input."""

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LlavaInfo:
        """The inverse of `dataclasses.asdict`, also from JSON."""
        return cls(**{**values, "tower": EncoderInfo.from_dict(values["tower"])})
