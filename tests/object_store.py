"""A real S3 server."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote

import httpx
from pyarrow.fs import LocalFileSystem, copy_files

from sae_ray.store.files import Folder
from tests.machine import until

KEY = "s3cr3t"
"""Access key and secret. They are a part of the addresses, so that every worker of a cluster knows them."""


@contextmanager
def object_store(log: Path, host: str, port: int, inside: Sequence[str] = ()) -> Iterator[str]:
    """Serves an empty bucket. Yields its address, to be formatted with a path.

    Args:
        log: where the server writes one line per request.
        host: the server's own address.
        inside: the command that runs another one where the server shall run.
    """
    address = f"http://{host}:{port}"
    with served([*inside, sys.executable, "-m", "moto.server", "-H", host, "-p", str(port)], address, log):
        yield bucket(address)


def bucket(address: str) -> str:
    """The URI of what a server keeps, to be formatted with a path."""
    return f"s3://{KEY}:{KEY}@study/{{}}?endpoint_override={quote(address, safe='')}&region=us-east-1"


@contextmanager
def served(command: Sequence[str], address: str, log: Path) -> Iterator[None]:
    """Runs a server of moto's kind, with an empty bucket."""
    with log.open("w") as output:
        server = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)

    def serves() -> bool:
        try:
            return httpx.get(f"{address}/moto-api/").status_code == 200
        except httpx.TransportError:
            assert server.poll() is None, log.read_text()
            return False

    try:
        until(serves)
        httpx.put(f"{address}/study").raise_for_status()
        yield
    finally:
        server.kill()
        server.wait()


def upload(directory: Path | str, uri: str) -> str:
    """Copies a directory to a URI, and returns that."""
    target = Folder(uri)
    copy_files(str(directory), target.path, LocalFileSystem(), target.filesystem)
    return uri
