"""The tensors in a model's files: by names that all files and loaded models share, and by where their bytes are."""

from __future__ import annotations

import json
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sae_ray.encoders.hub import Source, refusing
from sae_ray.encoders.sources import FORMS
from sae_ray.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

_PREFIX = re.compile(r"^(?:model\.)?(?:vision_tower\.)?(?:vision_model\.)?(?:dinov2(?:_with_registers)?\.)?")
_AS_IN_FILES = {".attention.o_proj.": ".attention.output.dense.", ".mlp.down_proj.": ".mlp.weights_out."}
"""DINOv2's names in memory (transformers 5.19) -> in its files."""


def shared_name(name: str) -> str:
    """The name of a tensor without what comes and goes with the class that it is loaded as: `encoder.layers.3…`."""
    name = _PREFIX.sub("", name)
    for ours, theirs in _AS_IN_FILES.items():
        name = name.replace(ours, theirs)
    return name


@dataclass(frozen=True)
class Stored:
    """A tensor in a safetensors file."""

    file: Path
    name: str
    """In the file."""
    start: int
    """Of its bytes in the file."""

    def read(self) -> Tensor:
        from safetensors import safe_open

        with safe_open(self.file, "pt") as file:
            return file.get_tensor(self.name)

    def overwrite(self, tensor: Tensor) -> None:
        """Puts other bytes in its place, of a tensor of its dtype and shape."""
        import torch

        with self.file.open("r+b") as file:
            file.seek(self.start)
            file.write(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())


def stored_tensors(directory: Path) -> dict[str, Stored]:
    """All tensors of a model in the transformers format, by `shared_name`.

    Raises UsageError where there are no weights as safetensors.
    """
    found = {}
    for file in _weight_files(directory):
        with file.open("rb") as stream:
            [length] = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        for name, about in header.items():
            found[shared_name(name)] = Stored(file, name, 8 + length + about["data_offsets"][0])
    return found


def _weight_files(directory: Path) -> list[Path]:
    index = directory / "model.safetensors.index.json"
    names = {"model.safetensors"}
    if index.exists():
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    files = [directory / name for name in sorted(names)]
    for file in files:
        if not file.exists():
            raise UsageError(f"{directory} has no {file.name}; edits need weights as safetensors in one directory")
    return files


def directory_of(source: Source) -> Path:
    """The directory on this machine that holds a model's files; those of a model on the hub are fetched.

    Raises UsageError where they cannot be fetched.
    """
    if source.commit is None:
        return Path(source.path)
    from huggingface_hub import snapshot_download

    with refusing(source.model, FORMS, of_hub=True):
        wanted = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]
        return Path(snapshot_download(source.path, revision=source.commit, allow_patterns=wanted))
