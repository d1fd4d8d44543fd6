"""Lists the files below a folder, at any depth and however many there are."""

from __future__ import annotations

import errno
import os
import stat
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Literal, NamedTuple

from pyarrow import fs

if TYPE_CHECKING:
    from sae_ray.store.files import Folder

LISTED_AHEAD = 8
"""Folders, so that the store's answers need not be waited for one by one."""


LINKS_TO_NOTHING = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)
"""What following one ends with."""


class Found(NamedTuple):
    """A file or folder. Its path is relative to where the walk began; that of a folder ends in a slash."""

    path: str
    kind: Literal["file", "special file", "folder", "linked folder"]
    """`special file`: a pipe, socket or device. A link to a file is a file."""
    size: int = 0
    """Of a file, in bytes; 0 for a link to nothing."""

    @property
    def name(self) -> str:
        return self.path.rstrip("/").rpartition("/")[2]


def walk(folder: Folder, left_out: Callable[[str], bool] = lambda name: False) -> Iterator[Found]:
    """The files below a folder, sorted by path, without hidden files and folders (their names start with a dot).

    Folders are listed one by one: what is in memory depends on the largest of them, not on their number. Links are
    followed, but of a local directory each real one is listed once: where it really is, if that is below the folder.

    Args:
        folder: where to begin; empty if it does not exist.
        left_out: whether a folder of this name is not to be listed.

    Yields:
        Files, and the folders that were not listed: those left out, and those that are listed elsewhere.

    Raises PermissionError for a local folder that cannot be read; its `filename` says which.
    """
    listed = partial(_listed_locally if folder.is_local else _listed, folder)
    places = _Places(folder.path, left_out) if folder.is_local else None

    def below(found: list[Found], place: str) -> Iterator[Found]:
        folders = (one for one in found if one.path[-1] == "/" and not left_out(one.name))
        coming: deque[Future[list[Found]]] = deque()
        for one in found:
            if one.path[-1] != "/" or left_out(one.name):
                yield one
                continue
            while len(coming) < LISTED_AHEAD and (following := next(folders, None)):
                coming.append(reader.submit(listed, following.path))
            listing = coming.popleft()
            entered = places.entered(place, one) if places else place
            if entered is None:
                yield one
            else:
                yield from below(listing.result(), entered)

    with ThreadPoolExecutor(LISTED_AHEAD) as reader:
        yield from below(listed(""), places.root if places else "")


class _Places:
    """The real directories that a local walk goes through, to list none of them twice.

    Only those that links lead to are kept: all others have but one way to them.
    """

    def __init__(self, root: str, left_out: Callable[[str], bool]):
        self.root = os.path.realpath(root)
        self.left_out = left_out
        self._tops = {self.root}

    def entered(self, parent: str, found: Found) -> str | None:
        """The real path of a folder in `parent` that is to be listed; None if it is listed elsewhere."""
        place = os.path.join(parent, found.name)
        if found.kind == "folder":
            return None if place in self._tops else place
        place = os.path.realpath(place)
        if os.path.commonpath([place, parent]) == place or self._is_listed(place):
            return None
        self._tops.add(place)
        return place

    def _is_listed(self, place: str) -> bool:
        """Whether a directory is listed where it really is."""
        while place not in self._tops:
            place, _, name = place.rpartition("/")
            if not place or name[0] == "." or self.left_out(name):
                return False
        return True


def _listed(folder: Folder, path: str) -> list[Found]:
    """Files and folders in a folder of a store, as their paths are sorted."""
    prefix = len(folder.path_of(""))
    place = folder.path_of(path).rstrip("/") if path else folder.path
    found = []
    for info in folder.filesystem.get_file_info(fs.FileSelector(place, allow_not_found=True)):
        if info.base_name[:1] == ".":
            continue
        if info.size is not None:  # quicker to ask for than the type
            found.append(Found(info.path[prefix:], "file", info.size))
        elif info.type == fs.FileType.Directory:
            found.append(Found(info.path[prefix:] + "/", "folder"))
    return sorted(found)


def _listed_locally(folder: Folder, path: str) -> list[Found]:
    """As `_listed`, and tells links and special files."""
    found = []
    try:
        with os.scandir(folder.path_of(path)) as entries:
            for entry in entries:
                if entry.name[0] != "." and (one := _found(entry, path + entry.name)):
                    found.append(one)
    except (FileNotFoundError, NotADirectoryError):  # it has vanished
        return []
    return sorted(found)


def _found(entry: os.DirEntry[str], path: str) -> Found | None:
    """None if it has vanished."""
    try:
        if entry.is_dir():
            return Found(path + "/", "linked folder" if entry.is_symlink() else "folder")
        status = entry.stat()
    except PermissionError:  # to follow it, or to ask for anything in the folder
        return Found(path, "file")
    except OSError as error:
        if entry.is_symlink() and error.errno in LINKS_TO_NOTHING:
            return Found(path, "file")
        if isinstance(error, FileNotFoundError):
            return None
        raise
    return Found(path, "file" if stat.S_ISREG(status.st_mode) else "special file", status.st_size)
