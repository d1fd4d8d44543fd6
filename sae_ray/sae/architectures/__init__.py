"""The architectures, each a class in a file of its own. Importing them does not import torch: plans read them too."""

from __future__ import annotations

import difflib
from dataclasses import field, fields, make_dataclass
from typing import TYPE_CHECKING, Any

from sae_ray.config import STRICT
from sae_ray.errors import check
from sae_ray.sae.architectures.base import Architecture
from sae_ray.sae.architectures.batch_topk import BatchTopK
from sae_ray.sae.architectures.frozen_decoder import FrozenDecoder
from sae_ray.sae.architectures.guided_batch_topk import GuidedBatchTopK
from sae_ray.sae.architectures.guided_matryoshka_batch_topk import GuidedMatryoshkaBatchTopK
from sae_ray.sae.architectures.guided_topk import GuidedTopK
from sae_ray.sae.architectures.jumprelu import JumpReLU
from sae_ray.sae.architectures.matryoshka_batch_topk import MatryoshkaBatchTopK
from sae_ray.sae.architectures.random import Random
from sae_ray.sae.architectures.relu import ReLU
from sae_ray.sae.architectures.topk import TopK

ARCHITECTURES: dict[str, type[Architecture]] = {
    kind.name: kind
    for kind in (
        BatchTopK,
        MatryoshkaBatchTopK,
        TopK,
        ReLU,
        JumpReLU,
        GuidedTopK,
        GuidedBatchTopK,
        GuidedMatryoshkaBatchTopK,
        FrozenDecoder,
        Random,
    )
}
"""The one list of them: name -> class."""


def architecture(name: object, field: str = "architecture", remedy: str = "") -> type[Architecture]:
    """The architecture of this name. Raises UsageError, about `field` and with a `remedy`, when there is none."""
    near = difflib.get_close_matches(str(name), ARCHITECTURES, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    check(isinstance(name, str) and name in ARCHITECTURES, field, name,
          f"unknown architecture; {hint}known here: {', '.join(ARCHITECTURES)}{remedy}")  # fmt: skip
    return ARCHITECTURES[str(name)]


if TYPE_CHECKING:

    class ArchitectureSettings:
        """The settings of all architectures that have any, each under the name of its architecture."""

        def __getattr__(self, name: str) -> Any: ...

else:
    ArchitectureSettings = make_dataclass(
        "ArchitectureSettings",
        [
            (kind.name, kind.Settings, field(default_factory=kind.Settings))
            for kind in ARCHITECTURES.values()
            if fields(kind.Settings)
        ],
        namespace={
            "__module__": __name__,
            "__doc__": "The settings of all architectures that have any, each under the name of its architecture.",
            "__pydantic_config__": STRICT,
        },
        frozen=True,
    )
