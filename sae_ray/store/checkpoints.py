"""Training checkpoints of one SAE: tensors as safetensors, the rest as JSON. The newest two are kept."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sae_ray.store.files import Folder
from sae_ray.store.tensors import read_tensors, write_tensors

if TYPE_CHECKING:
    from torch import Tensor

KEPT = 2


def save_checkpoint(folder: Folder, step: int, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
    """Writes the state after `step` steps and removes all but the newest two. A half-written checkpoint is ignored."""
    name = f"step-{step:09d}"
    write_tensors(folder, f"{name}.safetensors", tensors)
    folder.write_json(f"{name}.json", facts)  # last: it makes the checkpoint exist
    for old in _steps(folder)[:-KEPT]:
        folder.delete(f"step-{old:09d}.json")
        folder.delete(f"step-{old:09d}.safetensors")


def newest_checkpoint(folder: Folder) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Tensors and facts of the newest complete checkpoint, or None."""
    steps = _steps(folder)
    if not steps:
        return None
    name = f"step-{steps[-1]:09d}"
    return read_tensors(folder, f"{name}.safetensors"), folder.read_json(f"{name}.json")


def _steps(folder: Folder) -> list[int]:
    names = folder.files()
    found = (name.removeprefix("step-").removesuffix(".json") for name in names if name.endswith(".json"))
    return sorted(int(step) for step in found if f"step-{step}.safetensors" in names)
