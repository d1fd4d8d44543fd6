"""Copies of what object stores hold, on the disk of a node: its processes make one between them and share it."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

from pyarrow.fs import FileSelector, FileType, LocalFileSystem, copy_files

from sae_ray.errors import SaeRayError, UsageError
from sae_ray.store.files import Folder
from sae_ray.store.steps import digest

CACHE = "SAE_RAY_CACHE"
"""The environment variable that names the directory of the copies. It may be emptied whenever nothing runs."""
DEFAULT_CACHE = "~/.cache/sae-ray"
_ACTIVATIONS = "activations"
IN_USE = ".in-use"
"""Ends the name of the file that all who read a copy of activations have locked."""


class _Copy(NamedTuple):
    path: Path
    files: dict[str, tuple[int, int]]
    """Of the folder that is copied: relative path -> size in bytes and time in ns."""

    @property
    def bytes(self) -> int:
        return sum(size for size, _ in self.files.values())

    def is_whole(self) -> bool:
        return _holds(self.path, self.files)


def local_copy(folder: Folder, kind: str, one_of: Sequence[str] = ()) -> Path:
    """The directory on this node that holds a copy of all files of `folder`.

    A copy is named by the names, sizes and times of the files, so that a changed folder is copied again. It appears
    completely or not at all. Of several processes that need it, one copies it and the others wait.

    Args:
        folder: In an object store.
        kind: Names the directory of the copies.
        one_of: Files, of which the folder must have one to be worth a copy.

    Raises:
        UsageError: The folder cannot be read, or has none of these files.
        SaeRayError: It changed while it was copied, or the copy cannot be written.
    """
    from filelock import FileLock

    copy = _copy_of(folder, kind)
    if one_of and not any(name in copy.files for name in one_of):
        raise UsageError(f"there are no {kind} in {folder}, which has none of the files {', '.join(one_of)}")
    if copy.is_whole():
        return copy.path
    try:
        copy.path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{copy.path}.lock"):
            if not copy.is_whole():
                _make(copy, folder)
    except OSError as error:
        raise SaeRayError(
            f"{folder} cannot be copied to {copy.path.parent} ({error}); free some space there, or name another "
            f"directory in the environment variable {CACHE}"
        ) from error
    return copy.path


@contextmanager
def shared_activations(folder: Folder) -> Iterator[Folder]:
    """Where to read activations from that are read more than once.

    That is a copy on this node, if they lie in an object store: the processes of the node fetch them once between
    them. It is the store itself if a copy would take more than half of the free space, or cannot be made. Copies that
    nobody reads are deleted when space is short, first those that were not read for longest.
    """
    with ExitStack() as reading:
        try:
            place = folder if folder.is_local else _kept(folder, reading)
        except (OSError, SaeRayError):
            place = folder  # a copy saves time, nothing else
        yield place


def _kept(folder: Folder, reading: ExitStack) -> Folder:
    """A copy of activations that stays until `reading` ends; the folder itself if there is no space for one."""
    from filelock import FileLock

    copy = _copy_of(folder, _ACTIVATIONS)
    cache = copy.path.parent
    cache.mkdir(parents=True, exist_ok=True)
    in_use = Path(f"{copy.path}{IN_USE}")
    lock = reading.enter_context(in_use.open("a"))
    fcntl.flock(lock, fcntl.LOCK_SH)  # ends with the process, however it ends
    in_use.touch()
    with FileLock(cache / "space.lock"):  # what is free changes while others copy
        if copy.is_whole() or _has_space(cache, copy.bytes):
            return Folder(local_copy(folder, _ACTIVATIONS))
    return folder


def _has_space(cache: Path, needed: int) -> bool:
    """Whether `needed` bytes take at most half of what is free, once copies that nobody reads are deleted."""
    for in_use in sorted(cache.glob(f"*{IN_USE}"), key=lambda path: path.stat().st_mtime):
        if shutil.disk_usage(cache).free >= 2 * needed:
            break
        with in_use.open("a") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            shutil.rmtree(in_use.with_suffix(""), ignore_errors=True)
    return shutil.disk_usage(cache).free >= 2 * needed


def _copy_of(folder: Folder, kind: str) -> _Copy:
    files = _listed(folder)
    cache = Path(os.environ.get(CACHE) or DEFAULT_CACHE).expanduser()
    return _Copy(cache / kind / f"{folder.name}-{digest([str(folder), files])[:16]}", files)


def _make(copy: _Copy, folder: Folder) -> None:
    """Its lock is held."""
    partial, damaged = (copy.path.with_name(f"{copy.path.name}.{what}") for what in ("partial", "damaged"))
    for left in (partial, damaged):
        shutil.rmtree(left, ignore_errors=True)
    partial.mkdir()
    copy_files(folder.path, str(partial), folder.filesystem, LocalFileSystem())
    if _listed(folder) != copy.files or not _holds(partial, copy.files):
        shutil.rmtree(partial, ignore_errors=True)
        raise SaeRayError(f"{folder} changed while it was copied; wait until its upload is complete and run again")
    if copy.path.exists():
        copy.path.rename(damaged)  # a directory with files cannot be replaced
    partial.rename(copy.path)
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


def _holds(directory: Path, files: dict[str, tuple[int, int]]) -> bool:
    return Folder(directory).files(recursive=True) == {name: size for name, (size, _) in sorted(files.items())}
