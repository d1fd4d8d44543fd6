"""The patch file: what is changed in which tensors of which model, and why. docs/formats.md describes it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from sae_ray.editing.changes import Change, RankOne, Replaced
from sae_ray.errors import SaeRayError, UsageError
from sae_ray.store.files import parent_and_name

if TYPE_CHECKING:
    from torch import Tensor

Mode = Literal["project", "rows", "vectors"]
Scope = Literal["reader", "writers", "mlp", "projection"]
Keep = Literal["origin", "mean"]

SCHEMA = 1
_FACTS = "sae_ray_edit"
_AXES = ("rows", "columns")


@dataclass(frozen=True)
class Facts:
    """What a patch is; plain values."""

    model: str
    """The model that it was made for, as it was named."""
    revision: str | None
    """What pins that model's weights (`EncoderInfo.revision`)."""
    sae: str
    """The SAE's directory, as it was named."""
    latent: int
    mode: Mode
    """How the latent's direction û is taken out: `project`, by `I − ûûᵀ`; `rows`, by setting the coordinates that carry
    most of it to zero; `vectors`, by encoding and decoding value vectors (PISCES, arXiv 2505.22586)."""
    scope: Scope
    """Where: `reader`, the first matrix of a LLaVA's projector; `writers`, all that writes into the residual stream up
    to a block; `mlp`, the second matrix of a block's MLP alone; `projection`, a CLIP's `visual_projection`."""
    layer: int | None = None
    """The block, from 0, of `writers` and `mlp`."""
    keep: Keep = "origin"
    """The value that stays along û: 0, or that of the SAE's `b_dec`."""


@dataclass(frozen=True, eq=False)
class Patch:
    """Changes of a model's weights, by the names of tensors in its files without what their prefix may be."""

    facts: Facts
    changes: Mapping[str, Change]

    def check_model(self, model: str, revision: str | None) -> None:
        """Raises UsageError unless it was made for these weights."""
        if revision != self.facts.revision:
            raise UsageError(
                f"the patch was made for {self.facts.model} of the revision {self.facts.revision}, but {model} is of "
                f"the revision {revision}; make it again for this model, or name that one"
            )


def save_patch(patch: Patch, path: str | Path) -> None:
    """Writes one file. Raises UsageError if it cannot be written."""
    from safetensors.torch import save

    tensors: dict[str, Tensor] = {}
    for name, change in patch.changes.items():
        match change:
            case RankOne(left, right):
                tensors |= {f"{name}/left": left, f"{name}/right": right}
            case Replaced(axis, index, values):
                tensors |= {f"{name}/{_AXES[axis]}": index, f"{name}/values": values}
    facts = {"schema": SCHEMA, **dataclasses.asdict(patch.facts)}
    target = Path(path).expanduser()
    partial = target.with_name(f"{target.name}.partial")
    try:
        partial.write_bytes(
            save({name: one.contiguous() for name, one in tensors.items()}, {_FACTS: json.dumps(facts)})
        )
        partial.replace(target)
    except OSError as error:
        raise UsageError(f"--out is {path}, which cannot be written ({error}); name another file") from error


def load_patch(path: str | Path) -> Patch:
    """Reads what `save_patch` wrote, from a path or a URI.

    Raises:
        UsageError: there is no such file, it is no patch, or one of another version of sae-ray.
        SaeRayError: it is damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        folder, name = parent_and_name(str(path))
        data = folder.read_bytes(name)
    except OSError as error:
        raise UsageError(f"the patch {path} cannot be read ({error}); name what `sae-ray edit make` wrote") from error
    try:
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        metadata = header.get("__metadata__", {})
        if _FACTS not in metadata:
            raise UsageError(f"{path} is not a patch; name what `sae-ray edit make` wrote")
        values = json.loads(metadata[_FACTS])
        schema = values.pop("schema")
        if schema != SCHEMA:
            raise UsageError(f"the patch {path} has the schema {schema}; this version reads {SCHEMA}: make it again")
        return Patch(_checked(Facts(**values)), _changes(load(data)))
    except (ValueError, KeyError, TypeError, SafetensorError) as error:
        raise SaeRayError(f"the patch {path} is damaged ({error!r}); make it again") from error


def _checked(facts: Facts) -> Facts:
    for name, known in (("mode", Mode), ("scope", Scope), ("keep", Keep)):
        if getattr(facts, name) not in get_args(known):
            raise ValueError(f"{name} is {getattr(facts, name)!r}")
    return facts


def _changes(tensors: Mapping[str, Tensor]) -> dict[str, Change]:
    changes: dict[str, Change] = {}
    for key, tensor in tensors.items():
        name, _, part = key.rpartition("/")
        if part == "left":
            changes[name] = RankOne(tensor, tensors[f"{name}/right"])
        elif part in _AXES:
            changes[name] = Replaced(_AXES.index(part), tensor, tensors[f"{name}/values"])
        elif part not in ("right", "values"):
            raise ValueError(f"{key} is no part of a change")
    return changes
