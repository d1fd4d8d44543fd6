"""Where an encoder's files come from, and what pins them."""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path

from sae_ray.errors import UsageError

FORMS = (
    "an encoder is named by a local directory in the transformers format, a model id on the Hugging Face hub, "
    "open_clip:<architecture>/<pretrained tag>, or open_clip:local-dir:<path>"
)

_CONFIGS = {"config.json", "preprocessor_config.json", "processor_config.json", "open_clip_config.json"}
_WEIGHTS = (".safetensors", ".safetensors.index.json", ".bin", ".pt", ".pth")


def local_directory(path: str) -> Path | None:
    """The directory at `path`, `~` expanded; None where there is none."""
    expanded = Path(path).expanduser()
    return expanded if expanded.is_dir() else None


def directory_digest(directory: Path) -> str:
    """SHA-256, in hexadecimal, over the names and bytes of the configuration, preprocessing and weight files."""
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
            total.update(f"{path.name} {hashlib.file_digest(stream, 'sha256').hexdigest()}\n".encode())
    return total.hexdigest()


def check_revision(model: str, wanted: str | None, found: str) -> None:
    """Refuses files of another revision than the pinned one.

    Raises:
        UsageError: The revisions differ; the message names both.
    """
    if wanted is not None and wanted != found:
        raise UsageError(f"revision is {wanted!r}, but that of {model} is {found!r}; name that one or leave it out")
