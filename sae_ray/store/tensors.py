"""Tensors as safetensors files. On a local disk they are neither written nor read by way of a second copy of all."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save, save_file

from sae_ray.errors import UsageError
from sae_ray.store.files import Folder

if TYPE_CHECKING:
    from torch import Tensor


def as_tensor(values: Any) -> Tensor:
    """What users give as numbers: a tensor as it is, an array or lists as a tensor of the same dtype.

    Raises UsageError if it is neither, or numpy masks some of its values.
    """
    if isinstance(values, torch.Tensor):
        return values
    if np.ma.is_masked(values):
        raise UsageError(f"{type(values).__name__} has masked values, which are no numbers; leave their rows out")
    try:
        return torch.from_numpy(np.require(values, requirements=["C", "W"]))  # torch warns of what is read-only
    except (TypeError, ValueError) as error:
        raise UsageError(f"{type(values).__name__} is no tensor and no array of numbers ({error}); give one") from error


def write_tensors(folder: Folder, name: str, tensors: dict[str, Tensor]) -> None:
    """Writes contiguous tensors that share no memory. Raises OSError if they cannot be written."""
    if folder.is_local:
        with folder.appearing(name) as target:
            path = Path(target)
            path.touch()
            mode = path.stat().st_mode
            try:
                save_file(tensors, path)
            except SafetensorError as error:
                raise OSError(f"{folder.path_of(name)}: {error}") from error
            path.chmod(mode)  # safetensors' files are their owner's alone
    else:
        folder.write_bytes(name, save(tensors))


def read_tensors(folder: Folder, name: str) -> dict[str, Tensor]:
    """The tensors, in memory of their own: the file may change. Raises SafetensorError if it is damaged."""
    if not folder.is_local:
        return load(folder.read_bytes(name))
    with safe_open(folder.path_of(name), "pt") as file:
        return {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118
