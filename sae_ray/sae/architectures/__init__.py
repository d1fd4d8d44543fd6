"""The architectures, each a class in a file of its own. Importing them does not import torch: plans read them too."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sae_ray.sae.architectures.base import Architecture
from sae_ray.sae.architectures.batch_topk import BatchTopK
from sae_ray.sae.architectures.jumprelu import JumpReLU
from sae_ray.sae.architectures.matryoshka_batch_topk import MatryoshkaBatchTopK
from sae_ray.sae.architectures.relu import ReLU
from sae_ray.sae.architectures.topk import TopK

if TYPE_CHECKING:
    from sae_ray.sae.config import ArchitectureName

ARCHITECTURES: dict[ArchitectureName, type[Architecture]] = {
    "batch_topk": BatchTopK,
    "matryoshka_batch_topk": MatryoshkaBatchTopK,
    "topk": TopK,
    "relu": ReLU,
    "jumprelu": JumpReLU,
}
