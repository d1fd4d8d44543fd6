"""Matryoshka BatchTopK whose first latents are guided by concepts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from sae_ray.sae.architectures.guided_topk import GuidanceSettings
from sae_ray.sae.architectures.matryoshka_batch_topk import MatryoshkaBatchTopK, MatryoshkaSettings


@dataclass(frozen=True)
class GuidedMatryoshkaSettings(GuidanceSettings, MatryoshkaSettings):
    """Settings of guided Matryoshka BatchTopK."""

    table: ClassVar[str] = "architectures.guided_matryoshka_batch_topk"

    def __post_init__(self):
        GuidanceSettings.__post_init__(self)
        MatryoshkaSettings.__post_init__(self)


class GuidedMatryoshkaBatchTopK(MatryoshkaBatchTopK):
    """Matryoshka BatchTopK with the loss of G-SAE (arXiv 2506.19382) on the pre-activations of its first latents,
    which are in the first nested prefix as far as they fit."""

    name = "guided_matryoshka_batch_topk"
    Settings = GuidedMatryoshkaSettings
    guided = True
