"""Where an encoder's files come from, and what pins them."""

from __future__ import annotations

import functools
import hashlib
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePath

from sae_ray.errors import SaeRayError, UsageError
from sae_ray.store.copies import local_copy
from sae_ray.store.files import Folder, address_shown

FORMS = (
    "an encoder is named by a directory in the transformers format (a path, or a URI such as s3://bucket/folder), a "
    "model id on the Hugging Face hub, open_clip:<architecture>/<pretrained tag>, timm:<model>.<pretrained tag>, or "
    "open_clip: or timm: followed by local-dir:<directory> or hf-hub:<model id>"
)

GIT_LFS = b"version https://git-lfs.github.com/spec/"
_LOCAL_DIRS = ("open_clip:local-dir:", "timm:local-dir:")

_MODEL_CONFIGS = ("config.json", "open_clip_config.json")
_CONFIGS = {*_MODEL_CONFIGS, "preprocessor_config.json", "processor_config.json"}
_WEIGHTS = (".safetensors", ".safetensors.index.json", ".bin", ".pt", ".pth")


def local_directory(path: str, revision: str | None, forms: str) -> Path | None:
    """The directory at a path or URI, if this names one: `~` is expanded, and what a URI names is copied to this node.

    Args:
        path: Of a directory; else a model id.
        revision: What is wanted of it.
        forms: How such a model is named; ends the error message.

    Raises:
        UsageError: `path` can only be that of a directory, and there is none; or as `local_copy`.
        SaeRayError: There was one where the work was planned, but this node has none; or as `local_copy`.
    """
    if not path:
        raise UsageError(f"the name of a model is empty; {forms}")
    if "://" in path:
        folder = Folder(path)
        if not folder.is_local:
            return local_copy(folder, "models", _MODEL_CONFIGS)
        path = folder.path
    directory = Path(path).expanduser()
    if directory.is_dir():
        return directory
    missing = f"there is no directory {path} on {socket.gethostname()}"
    if is_digest(revision):
        raise SaeRayError(
            f"{missing}, though there was one where the study was planned; put it there on every node, or name a model "
            "that every node can fetch: a directory as s3://bucket/folder, or a model id on the hub"
        )
    if is_path(path):
        raise UsageError(f"{missing}; {forms}")
    return None


def is_path(model: str) -> bool:
    """Whether this can only be the path or URI of a directory, and no model id."""
    return "://" in model or model.startswith(("/", "./", "../", "~"))


def directory_named(model: str) -> str | None:
    """The path or URI of the directory, if a specification says `local-dir:`."""
    return next((model.removeprefix(prefix) for prefix in _LOCAL_DIRS if model.startswith(prefix)), None)


def model_name(model: str, revision: str | None = None) -> str:
    """A short name to show: a model id unchanged, the last part of a path or URI.

    The revision tells a relative path from an id.
    """
    path = directory_named(model) or model
    of_directory = path != model or is_path(path) or is_digest(revision)
    return PurePath(address_shown(path)).name if of_directory else model


@contextmanager
def named_by(field: str, model: str) -> Iterator[None]:
    """Begins what is raised about a model with the field of the study that names it."""
    try:
        yield
    except SaeRayError as error:
        raise type(error)(f"{field} = {address_shown(model)!r}: {error}") from error


def is_digest(revision: str | None) -> bool:
    """Whether a revision is that of a directory (`directory_digest`)."""
    return revision is not None and len(revision) == 64


def is_unchanged(model: str, revision: str | None) -> bool:
    """Whether a model is a directory which still is of the revision that was found there (`directory_digest`).

    Raises as `local_directory`.
    """
    if not is_digest(revision):
        return False
    directory = local_directory(directory_named(model) or model, None, FORMS)
    return directory is not None and directory_digest(directory) == revision


def directory_digest(directory: Path) -> str:
    """SHA-256, in hexadecimal, over the names and bytes of the configuration, preprocessing and weight files.

    Raises UsageError if one of them is a git-lfs pointer.
    """
    files = [
        path
        for path in sorted(directory.iterdir())
        if path.is_file() and (path.name in _CONFIGS or path.name.endswith(_WEIGHTS))
    ]
    return _digest(tuple((path, path.stat().st_size, path.stat().st_mtime_ns) for path in files))


@functools.cache
def _digest(files: tuple[tuple[Path, int, int], ...]) -> str:
    """Cached by size and time: a directory is described many times, and its weights may be gigabytes."""
    total = hashlib.sha256()
    for path, _, _ in files:
        with path.open("rb") as stream:
            if stream.read(len(GIT_LFS)) == GIT_LFS:
                raise UsageError(f"{path} is a git-lfs pointer, not the file itself; run `git lfs pull` in its folder")
            stream.seek(0)
            total.update(f"{path.name} {hashlib.file_digest(stream, 'sha256').hexdigest()}\n".encode())
    return total.hexdigest()


def check_revision(model: str, wanted: str | None, found: str) -> None:
    """Refuses files of another revision than the pinned one.

    Raises:
        UsageError: The revisions differ; the message names both.
    """
    if wanted is not None and wanted != found:
        raise UsageError(f"revision is {wanted!r}, but that of {model} is {found!r}; name that one or leave it out")
