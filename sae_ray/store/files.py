"""The file layer: folders on any filesystem that pyarrow supports (a local path, `s3://…`, `gs://…`)."""

from __future__ import annotations

import json
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from sae_ray.errors import SaeRayError, UsageError

OBJECT_STORES = ("s3", "gcs", "abfs")
"""As pyarrow names them."""
S3_ATTEMPTS = 12
"""Of a request that S3 refuses (500, 503) or does not answer: it is made again after 25 ms, and then after twice the
time before, for 50 to 100 seconds in all. By default pyarrow gives up after seconds."""


class Folder:
    """A directory, local or in an object store. Nothing is created until something is written.

    Names are POSIX paths relative to the folder. A written file appears completely or not at all: local files are
    written under a temporary name and renamed; object stores show an object only when its upload is complete.
    """

    def __init__(self, uri: str | os.PathLike[str]):
        """Raises UsageError if it is no path, or the URI's filesystem is not supported or cannot be reached."""
        if not isinstance(uri, str | os.PathLike) or not os.fspath(uri):
            raise UsageError(f"{uri!r:.100} names no folder; give a path or a URI such as s3://bucket/folder")
        self.uri = os.fspath(uri)
        if "://" in self.uri:
            try:
                self.filesystem, self.path = _opened(self.uri)
            except (pa.ArrowException, OSError) as error:
                reason = str(error).splitlines()[0]
                raise UsageError(
                    f"{self} cannot be opened ({reason}); give a local path or a URI such as s3://bucket/folder"
                ) from error
        else:
            self.uri = str(Path(self.uri).expanduser().absolute())
            self.filesystem, self.path = fs.LocalFileSystem(), self.uri
        self.is_local = isinstance(self.filesystem, fs.LocalFileSystem)

    def __truediv__(self, name: str) -> Folder:
        uri, mark, query = _without_query(self.uri)
        return Folder(f"{uri.rstrip('/')}/{name}{mark}{query}")

    def __str__(self) -> str:
        return address_shown(self.uri)

    def __repr__(self) -> str:
        return f"Folder({self.uri!r})"

    def __reduce__(self):
        return Folder, (self.uri,)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Folder) and self.uri == other.uri

    def __hash__(self) -> int:
        return hash(self.uri)

    @property
    def name(self) -> str:
        return PurePosixPath(self.path).name

    def path_of(self, name: str) -> str:
        """The path of `name` for `self.filesystem`."""
        return f"{self.path.rstrip('/')}/{name}"

    def path_to_write(self, name: str) -> str:
        """The path of `name`, whose folder exists. Object stores need none, and asking for one takes time."""
        path = self.path_of(name)
        if self.filesystem.type_name not in OBJECT_STORES:
            self.filesystem.create_dir(str(PurePosixPath(path).parent), recursive=True)
        return path

    def check_reachable(self) -> None:
        """Raises OSError within seconds if its store does not answer at all, or not to these keys.

        All other requests are made again for a minute or more: a store may be down for a while.
        """
        if not self.is_local:
            filesystem, path = fs.FileSystem.from_uri(self.uri)
            filesystem.get_file_info(path)

    def exists(self, name: str = "") -> bool:
        path = self.path_of(name) if name else self.path
        return self.filesystem.get_file_info(path).type != fs.FileType.NotFound

    def is_file(self) -> bool:
        """Whether there is a file instead of a folder."""
        return self.filesystem.get_file_info(self.path).type == fs.FileType.File

    def files(self, recursive: bool = False) -> dict[str, int]:
        """Relative path -> size in bytes of each file, sorted by path; empty if the folder does not exist."""
        prefix = len(self.path.rstrip("/")) + 1
        return dict(sorted((info.path[prefix:], info.size) for info in self._infos(fs.FileType.File, recursive)))

    def modified(self) -> dict[str, float]:
        """Name -> when it was last written, in seconds by the clock of the store, of each file that is not deeper."""
        return {info.base_name: info.mtime_ns / 1e9 for info in self._infos(fs.FileType.File)}

    def folders(self) -> list[str]:
        """Names of the direct sub-folders, sorted."""
        return sorted(info.base_name for info in self._infos(fs.FileType.Directory))

    def _infos(self, kind: fs.FileType, recursive: bool = False) -> list[fs.FileInfo]:
        selector = fs.FileSelector(self.path, recursive=recursive, allow_not_found=True)
        return [info for info in self.filesystem.get_file_info(selector) if info.type == kind]

    def read_bytes(self, name: str) -> bytes:
        with self.filesystem.open_input_stream(self.path_of(name)) as stream:
            return stream.read()

    def read_json(self, name: str) -> Any:
        """Raises SaeRayError if the file is not JSON. This program never leaves incomplete files."""
        try:
            return json.loads(self.read_bytes(name))
        except ValueError as error:
            remedy = "copy it again, or delete its folder and run again if sae-ray made it"
            raise SaeRayError(f"{self / name} is not JSON ({error}); {remedy}") from error

    @contextmanager
    def appearing(self, name: str) -> Iterator[str]:
        """The path to write a file to, which gets its name when the block ends."""
        path = self.path_to_write(name)
        target = f"{path}.{uuid.uuid4().hex[:8]}.tmp" if self.is_local else path
        try:
            yield target
            if self.is_local:
                self.filesystem.move(target, path)
        except BaseException:
            if self.is_local:
                Path(target).unlink(missing_ok=True)
            raise

    def write_bytes(self, name: str, data: bytes) -> None:
        with self.appearing(name) as target, self.filesystem.open_output_stream(target) as stream:
            stream.write(data)

    def write_copy(self, name: str, source: Folder, source_name: str) -> None:
        """Copies a file of another folder, of any size."""
        with self.appearing(name) as target:
            fs.copy_files(source.path_of(source_name), target, source.filesystem, self.filesystem)

    def write_json(self, name: str, value: Any) -> None:
        self.write_bytes(name, (json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode())

    def write_parquet(self, name: str, table: pa.Table) -> None:
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, compression="zstd")
        self.write_bytes(name, sink.getvalue().to_pybytes())

    def read_parquet(self, name: str) -> pa.Table:
        # In one request, where reading by parts would take several; `read_table` would import pandas.
        return pq.ParquetFile(pa.BufferReader(self.read_bytes(name))).read()

    def delete(self, name: str) -> None:
        """Removes a file or a whole sub-folder; does nothing if it does not exist."""
        info = self.filesystem.get_file_info(self.path_of(name))
        if info.type == fs.FileType.Directory:
            self.filesystem.delete_dir(info.path)
        elif info.type == fs.FileType.File:
            self.filesystem.delete_file(info.path)

    def free_bytes(self) -> int | None:
        """Free space in bytes; None for object stores."""
        if not self.is_local:
            return None
        here = Path(self.path)
        while not here.exists():
            here = here.parent
        return shutil.disk_usage(here).free


def address_shown(uri: str) -> str:
    """A path or URI as users read it: without what a URI says of keys and of how its store is reached."""
    address, _, _ = _without_query(uri)
    scheme, mark, rest = address.partition("://")
    store, slash, path = rest.partition("/")
    return f"{scheme}{mark}{store.rpartition('@')[2]}{slash}{path}" if mark else address


def without_keys(text: str) -> str:
    """A text for users: its URIs lose what they say of keys and of how their store is reached."""
    return re.sub(r"(\w+://)(?:[^/\s'\"]*@)?([^\s?'\"]*)(\?[^\s'\"]*)?", r"\1\2", text)


def parent_and_name(uri: str) -> tuple[Folder, str]:
    """The folder and the name of a file, from a local path or a URI."""
    path, mark, query = _without_query(uri)
    parent, slash, name = path.rpartition("/")
    return Folder((parent + slash or ".") + mark + query), name


@contextmanager
def writing(folder: Folder) -> Iterator[None]:
    """Raises SaeRayError, which names the folder, where something cannot be written in the block."""
    try:
        yield
    except OSError as error:
        raise SaeRayError(f"{folder} cannot be written ({error}); make room, or choose another folder") from error


def _opened(uri: str) -> tuple[fs.FileSystem, str]:
    """The filesystem of a URI, and its path there. A process has one object per store: making one may ask the store."""
    address, mark, query = _without_query(uri)
    scheme, _, rest = address.partition("://")
    store, _, path = rest.partition("/")
    if not store:
        return fs.FileSystem.from_uri(uri)
    filesystem, bucket = _store(f"{scheme}://{store}{mark}{query}")
    return filesystem, f"{bucket.rstrip('/')}/{unquote(path)}".rstrip("/")


@cache
def _store(uri: str) -> tuple[fs.FileSystem, str]:
    if not uri.startswith("s3://"):
        return fs.FileSystem.from_uri(uri)
    if "allow_delayed_open=" not in uri:
        uri += f"{'&' if '?' in uri else '?'}allow_delayed_open=true"  # small files in one request instead of three
    found, bucket = fs.FileSystem.from_uri(uri)
    make, (settings,) = found.__reduce__()  # its address has no place for the number of attempts
    return make(settings | {"retry_strategy": fs.AwsDefaultS3RetryStrategy(max_attempts=S3_ATTEMPTS)}), bucket


def _without_query(uri: str) -> tuple[str, str, str]:
    """Path, `?` and query of a URI: the query (`?region=…`) configures the store and follows the path."""
    return uri.partition("?") if "://" in uri else (uri, "", "")
