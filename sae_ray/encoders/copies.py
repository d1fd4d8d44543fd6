"""Models in object stores: a node copies one when it first needs it, and all its processes load that copy."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from pyarrow.fs import FileSelector, FileType, LocalFileSystem, copy_files

from sae_ray.errors import SaeRayError, UsageError
from sae_ray.store.files import Folder
from sae_ray.store.steps import digest

CACHE = "SAE_RAY_MODEL_CACHE"
"""The environment variable that names the directory of the copies. It may be emptied at any time."""
DEFAULT_CACHE = "~/.cache/sae-ray/models"
_CONFIGS = ("config.json", "open_clip_config.json")


def local_copy(folder: Folder) -> Path:
    """The directory on this node that holds a copy of all files of `folder`.

    A copy is named by the names, sizes and times of the files, so that a changed model is copied again. It appears
    completely or not at all. Of several processes that need it, one copies it and the others wait.

    Raises:
        UsageError: There is no model in the folder, or it cannot be read.
        SaeRayError: It changed while it was copied, or the copy cannot be written.
    """
    from filelock import FileLock

    files = _listed(folder)
    if not any(name in files for name in _CONFIGS):
        raise UsageError(f"there is no model in {folder}, which has neither of the files {' and '.join(_CONFIGS)}")
    cache = Path(os.environ.get(CACHE) or DEFAULT_CACHE).expanduser()
    copy = cache / f"{folder.name}-{digest([str(folder), files])[:16]}"
    if _is_whole(copy, files):
        return copy
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{copy}.lock"):
            if not _is_whole(copy, files):
                _copy(folder, files, copy)
    except OSError as error:
        raise SaeRayError(
            f"{folder} cannot be copied to {cache} ({error}); free some space there, or name another directory in the "
            f"environment variable {CACHE}"
        ) from error
    return copy


def _copy(folder: Folder, files: dict[str, tuple[int, int]], copy: Path) -> None:
    """Makes the copy; its lock is held."""
    partial, damaged = copy.with_name(f"{copy.name}.partial"), copy.with_name(f"{copy.name}.damaged")
    for left in (partial, damaged):
        shutil.rmtree(left, ignore_errors=True)
    partial.mkdir()
    copy_files(folder.path, str(partial), folder.filesystem, LocalFileSystem())
    if _listed(folder) != files or not _is_whole(partial, files):
        shutil.rmtree(partial, ignore_errors=True)
        raise SaeRayError(f"{folder} changed while it was copied; wait until its upload is complete and run again")
    if copy.exists():
        copy.rename(damaged)  # a directory with files cannot be replaced
    partial.rename(copy)
    shutil.rmtree(damaged, ignore_errors=True)


def _listed(folder: Folder) -> dict[str, tuple[int, int]]:
    """Relative path -> size in bytes and time in ns."""
    selector = FileSelector(folder.path, recursive=True, allow_not_found=True)
    try:
        infos = folder.filesystem.get_file_info(selector)
    except OSError as error:
        raise UsageError(f"{folder} cannot be read ({error}); check the address and the keys") from error
    found = (info for info in infos if info.type == FileType.File)
    return {str(Path(info.path).relative_to(folder.path)): (info.size, info.mtime_ns) for info in found}


def _is_whole(copy: Path, files: dict[str, tuple[int, int]]) -> bool:
    return Folder(copy).files(recursive=True) == {name: size for name, (size, _) in sorted(files.items())}
