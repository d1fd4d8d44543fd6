"""BatchTopK whose first latents are guided by concepts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from sae_ray.sae.architectures.batch_topk import BatchTopK
from sae_ray.sae.architectures.guided_topk import GuidanceSettings


@dataclass(frozen=True)
class GuidedBatchTopKSettings(GuidanceSettings):
    """Settings of guided BatchTopK."""

    table: ClassVar[str] = "architectures.guided_batch_topk"


class GuidedBatchTopK(BatchTopK):
    """BatchTopK with the loss of G-SAE (arXiv 2506.19382) on the pre-activations of its first latents.

    Codes stay those of BatchTopK: the concept is present where the pre-activation is above 0, before the threshold.
    """

    name = "guided_batch_topk"
    Settings = GuidedBatchTopKSettings
    guided = True
