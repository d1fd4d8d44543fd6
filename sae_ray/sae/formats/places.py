"""Where an SAE lies: what a user may name, and which files are meant."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from pyarrow import fs

from sae_ray.encoders.sources import is_path
from sae_ray.errors import UsageError
from sae_ray.store.files import Folder, parent_and_name

CONFIG_FILE = "cfg.json"
WEIGHTS_FILE = "sae_weights.safetensors"
LATENTS_FILE = "latents.parquet"
AE_FILE = "ae.pt"
AE_CONFIG_FILE = "config.json"
FORMS = (
    f"name a SAELens 6 directory ({CONFIG_FILE} and {WEIGHTS_FILE}), a .pt file of the reference code, or an SAE on "
    "the Hugging Face hub as owner/name or owner/name/folder"
)
_FILES = (CONFIG_FILE, WEIGHTS_FILE, LATENTS_FILE, AE_FILE, AE_CONFIG_FILE)
_SHOWN = 8
_LOOKED_AT = 200
"""Folders, in a search for SAEs."""


class Place(NamedTuple):
    """The files of one SAE."""

    folder: Folder
    file: str | None
    """A `.pt` file in the folder, where that is the SAE; else the folder is."""
    files: frozenset[str]
    """Names of all files in the folder."""

    def __str__(self) -> str:
        return str(self.folder / self.file if self.file else self.folder)


def place_of(path: str | Path | Folder) -> Place:
    """The SAE that a user names: its folder, a file in it, or its place on the Hugging Face hub.

    Raises:
        UsageError: there is nothing, no SAE or more than one; or the hub cannot be reached and its cache lacks the SAE.
    """
    if isinstance(path, str) and path.startswith("hf://"):
        return place_of(_downloaded(path.removeprefix("hf://")))
    folder = path if isinstance(path, Folder) else Folder(path)
    kind = folder.filesystem.get_file_info(folder.path).type
    if kind == fs.FileType.NotFound:
        if isinstance(path, str) and not is_path(path) and re.fullmatch(r"[\w.-]+/[\w.-]+(/.+)?", path):
            return place_of(_downloaded(path))
        raise UsageError(f"{folder} does not exist; check the path, or {FORMS}")
    name = None
    if kind == fs.FileType.File:
        folder, name = parent_and_name(folder.uri)
    files = frozenset(folder.files())
    if name is None and not files & {CONFIG_FILE, AE_FILE}:
        _refuse_several(folder)
    if name is None and CONFIG_FILE not in files and AE_FILE in files:
        name = AE_FILE
    return Place(folder, None if name in (CONFIG_FILE, WEIGHTS_FILE) else name, files)


def _downloaded(name: str) -> Folder:
    """The folder, or file, with this name on the hub, as the cache has it afterwards."""
    from huggingface_hub import snapshot_download

    from sae_ray.encoders.hub import refusing

    owner, model, *inside = name.split("/")
    within = "".join(f"{part}/" for part in inside)
    wanted = [within + file for file in _FILES] + ["/".join(inside)] * bool(inside)
    shown = f"{name} is neither a file nor a folder here, and {owner}/{model} on the Hugging Face hub"
    with refusing(shown, FORMS, of_hub=True):
        cached = Folder(snapshot_download(f"{owner}/{model}", allow_patterns=wanted))
    found = cached / "/".join(inside) if inside else cached
    if not found.exists():
        raise UsageError(
            f"{owner}/{model} on the Hugging Face hub has no SAE at {'/'.join(inside) or 'its top'}, or its cache "
            f"({cached}) lacks it; name the SAE's own folder, as in {owner}/{model}/folder"
        )
    return found


def _refuse_several(folder: Folder) -> None:
    """Raises UsageError if the SAEs lie in the folders below."""
    below = _saes_below(folder)
    if below:
        some = ", ".join(below[:_SHOWN]) + (" …" if len(below) > _SHOWN else "")
        raise UsageError(
            f"{folder} is not an SAE, but the folder of {len(below)}: {some}; name one, such as {folder / below[0]}"
        )


def _saes_below(folder: Folder) -> list[str]:
    """Names of the SAEs in the folders below, at most two levels deep."""
    found, looked_at = [], 0
    waiting = [(name, 1) for name in folder.folders()]
    while waiting and looked_at < _LOOKED_AT:
        name, depth = waiting.pop(0)
        looked_at += 1
        if (folder / name).files().keys() & {CONFIG_FILE, AE_FILE}:
            found.append(name)
        elif depth < 2:
            waiting += [(f"{name}/{below}", depth + 1) for below in (folder / name).folders()]
    return sorted(found)
