"""Where an SAE lies: what a user may name, and which files are meant."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from pyarrow import fs

from sae_ray.encoders.sources import is_path
from sae_ray.errors import UsageError
from sae_ray.sae.formats.hub_names import SCHEME, HubName, downloaded, listed
from sae_ray.store.files import Folder, parent_and_name

CONFIG_FILE = "cfg.json"
WEIGHTS_FILE = "sae_weights.safetensors"
LATENTS_FILE = "latents.parquet"
FIGURES_FILE = "figures.json"
"""What is known of an SAE that was uploaded (`sae_ray.sae.figures`)."""
SIDECARS = (LATENTS_FILE, "metrics.parquet", "weights.parquet")
"""Tables that go with an SAE to the hub."""
AE_FILE = "ae.pt"
AE_CONFIG_FILE = "config.json"
SPARSIFY_FILE = "sae.safetensors"
OVERCOMPLETE_FILES = ("sae.pt", "model.safetensors")
OVERCOMPLETE_CONFIG_FILES = (AE_CONFIG_FILE, "config.yaml")
FORMS = (
    "name the folder of an SAE in a form that docs/sharing.md lists, a .pt file of the reference code, or an SAE on "
    "the Hugging Face hub as owner/name/folder or hf://owner/name/folder@revision"
)
_MARKS = {CONFIG_FILE, AE_FILE, "sae.pt"}
"""Files by which the folder of an SAE is recognised."""
_OF_HUB = (
    *(CONFIG_FILE, WEIGHTS_FILE, FIGURES_FILE, AE_FILE, SPARSIFY_FILE),
    *(*SIDECARS, *OVERCOMPLETE_FILES, *OVERCOMPLETE_CONFIG_FILES),
)
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
    if isinstance(path, str) and path.startswith(SCHEME):
        return _of_hub(HubName.parse(path))
    if isinstance(path, str) and re.match(r"(https?|hf):", path, re.IGNORECASE):
        raise UsageError(f"{path} is not how an SAE is named; {FORMS}")
    folder = path if isinstance(path, Folder) else Folder(path)
    kind = folder.filesystem.get_file_info(folder.path).type
    if kind == fs.FileType.NotFound:
        if isinstance(path, str) and not is_path(path) and HubName.fits(path):
            return _of_hub(HubName.parse(path))
        raise UsageError(f"{folder} does not exist; check the path, or {FORMS}")
    name = None
    if kind == fs.FileType.File:
        folder, name = parent_and_name(folder.uri)
    files = frozenset(folder.files())
    if name is None and not files & _MARKS and (saes := _saes_below(folder)):
        raise _several(folder, saes, folder / saes[0])
    if name is None and CONFIG_FILE not in files and AE_FILE in files:
        name = AE_FILE
    return Place(folder, None if name and _stands_for_folder(name, files) else name, files)


def _stands_for_folder(name: str, files: frozenset[str]) -> bool:
    """Whether a file is part of an SAE, which the others beside it complete."""
    if name in OVERCOMPLETE_FILES:
        return bool(files & {*OVERCOMPLETE_CONFIG_FILES})
    return name in (CONFIG_FILE, WEIGHTS_FILE, SPARSIFY_FILE)


def _of_hub(name: HubName) -> Place:
    snapshot = downloaded(name, _OF_HUB, FORMS)
    found = snapshot / name.inside if name.inside else snapshot
    if found.is_file() or found.files().keys() & _MARKS:
        return place_of(found)
    within = f"{name.inside}/" if name.inside else ""
    below = [file.removeprefix(within) for file in listed(name, snapshot, FORMS) if file.startswith(within)]
    if saes := sorted({file.rpartition("/")[0] for file in below if file.rpartition("/")[2] in _MARKS}):
        raise _several(name, saes, name._replace(inside=within + saes[0]))
    if not below:
        raise UsageError(
            f"{name.repo} on the Hugging Face hub has no SAE at {name.inside or 'its top'}, or its cache "
            f"({snapshot}) lacks it; name the SAE's own folder, as in {name.repo}/folder"
        )
    return Place(found, None, frozenset(file for file in below if "/" not in file))


def _several(where: Folder | HubName, saes: list[str], first: Folder | HubName) -> UsageError:
    """The error for a folder in which these SAEs lie."""
    some = ", ".join(saes[:_SHOWN]) + (" …" if len(saes) > _SHOWN else "")
    return UsageError(f"{where} is not an SAE, but the folder of {len(saes)}: {some}; name one, such as {first}")


def _saes_below(folder: Folder) -> list[str]:
    """Names of the SAEs in the folders below, at most two levels deep."""
    found, looked_at = [], 0
    waiting = [(name, 1) for name in folder.folders()]
    while waiting and looked_at < _LOOKED_AT:
        name, depth = waiting.pop(0)
        looked_at += 1
        if (folder / name).files().keys() & _MARKS:
            found.append(name)
        elif depth < 2:
            waiting += [(f"{name}/{below}", depth + 1) for below in (folder / name).folders()]
    return sorted(found)
