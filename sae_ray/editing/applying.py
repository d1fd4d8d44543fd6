"""Applies patches to loaded models."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from sae_ray.editing.changes import changed
from sae_ray.editing.checkpoint import shared_name
from sae_ray.editing.patch import Patch, load_patch
from sae_ray.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from sae_ray.steering.llava import Llava


@torch.no_grad()
def apply_patch(module: nn.Module, patch: Patch) -> dict[str, Tensor]:
    """Changes the weights of a loaded model, in memory, and returns what they were.

    Raises UsageError if the model lacks a tensor of the patch, or has one of another shape; nothing is changed then.
    """
    weights = _weights(module, patch)
    after = {name: changed(weights[name], change, name) for name, change in patch.changes.items()}
    before = {name: weights[name].detach().clone() for name in after}
    for name, tensor in after.items():
        weights[name].copy_(tensor)
    return before


@contextmanager
def edited(module: nn.Module, patch: Patch) -> Iterator[None]:
    """While it lasts, the model is edited. Then it has the very bits that it had before. Raises as `apply_patch`."""
    before = apply_patch(module, patch)
    try:
        yield
    finally:
        weights = _weights(module, patch)
        with torch.no_grad():
            for name, tensor in before.items():
                weights[name].copy_(tensor)


def load_edited(
    model: str, patch: str | Path, revision: str | None = None, device: str = "cpu", dtype: str = "float32"
) -> Llava:
    """A LLaVA with a patch applied.

    Raises UsageError as `load_llava` and `load_patch` do, or if the patch was made for other weights.
    """
    from sae_ray.steering.llava import load_llava

    read = load_patch(patch)
    llava = load_llava(model, revision, device, dtype)
    read.check_model(llava.info.name, llava.info.revision)
    apply_patch(llava.model, read)
    return llava


def _weights(module: nn.Module, patch: Patch) -> Mapping[str, Tensor]:
    found = {shared_name(name): one for name, one in module.named_parameters()}
    for name in patch.changes:
        if name not in found:
            raise UsageError(f"the model has no {name}, which the patch changes; it was made for {patch.facts.model}")
    return found
