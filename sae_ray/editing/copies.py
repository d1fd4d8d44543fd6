"""Edited copies of a model's directory, which every program can load, and the way back to its very bytes.

A copy has what the directory has, with other bytes where tensors are changed, and beside that a folder `edit` with the
patch and with those tensors as they were. The files of the model itself are only read.
"""

from __future__ import annotations

import shutil
import uuid
from pathlib import Path

from sae_ray.editing.changes import changed
from sae_ray.editing.checkpoint import directory_of, stored_tensors
from sae_ray.editing.patch import load_patch, save_patch
from sae_ray.encoders.hub import find
from sae_ray.encoders.sources import FORMS, directory_digest
from sae_ray.errors import SaeRayError, UsageError

FOLDER = "edit"
"""A folder of its own: some programs read every safetensors file that lies beside a model's."""
_PATCH, _BEFORE = "patch.safetensors", "before.safetensors"
_DIGEST = "digest"


def edited_copy(patch_file: str | Path, model: str, out: str | Path, revision: str | None = None) -> Path:
    """Writes a copy of a model's directory with a patch applied, and returns its path.

    Weights keep the dtype that they are stored in, so that what a patch takes out is gone up to the rounding of that.

    Args:
        model: The model that the patch was made for: a directory or a hub id.
        out: The new directory.

    Raises:
        UsageError: The patch does not fit the model, the model is such a copy itself, or `out` exists or cannot be
            written.
    """
    from safetensors.torch import save_file

    patch, target = load_patch(patch_file), Path(out).expanduser()
    source = find(model, revision, FORMS)
    patch.check_model(source.model, source.revision)
    directory = directory_of(source)
    if (directory / FOLDER).exists():
        raise UsageError(f"{source.model} is itself an edited copy; apply the patch to the model that it was made from")
    if target.exists():
        raise UsageError(f"--out is {out}, which exists; name a new directory")
    partial = target.with_name(f"{target.name}.partial-{uuid.uuid4().hex[:8]}")
    try:
        shutil.copytree(directory, partial)
        digest, stored = directory_digest(partial), stored_tensors(partial)
        missing = sorted(set(patch.changes) - set(stored))
        if missing:
            raise UsageError(f"{source.model} has no {missing[0]}, which the patch changes")
        before = {name: stored[name].read().clone() for name in patch.changes}
        (partial / FOLDER).mkdir()
        save_patch(patch, partial / FOLDER / _PATCH)
        save_file(before, partial / FOLDER / _BEFORE, {_DIGEST: digest})
        for name, tensor in before.items():
            stored[name].overwrite(changed(tensor, patch.changes[name], name))
        partial.rename(target)
    except OSError as error:
        raise UsageError(f"--out is {out}, which cannot be written ({error}); name another directory") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


def undo(directory: str | Path) -> None:
    """Gives an edited copy the bytes of the model that it was made from. Interrupted, it can be run again.

    Raises:
        UsageError: It is no edited copy.
        SaeRayError: Something else changed its files, too.
    """
    from safetensors import safe_open

    place = Path(directory).expanduser()
    kept = place / FOLDER / _BEFORE
    if not kept.exists():
        raise UsageError(f"{directory} is not an edited copy of a model; name a directory of `sae-ray edit apply`")
    stored = stored_tensors(place)
    with safe_open(kept, "pt") as file:
        digest = file.metadata()[_DIGEST]
        for name in file.keys():  # noqa: SIM118  # a safe_open is no dictionary
            stored[name].overwrite(file.get_tensor(name))
    if directory_digest(place) != digest:
        raise SaeRayError(
            f"{directory} still differs from the model that it was made from: something else changed it, too; copy "
            "that model again"
        )
    shutil.rmtree(place / FOLDER)
