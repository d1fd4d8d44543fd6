"""A part of an image set: a fixed range of images, read, decoded and prepared for every encoder."""

from __future__ import annotations

import os
import socket
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, nullcontext
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from sae_ray.errors import SaeRayError
from sae_ray.images.decode import BadImage, check_bytes, decode_image
from sae_ray.images.jpegs import Jpeg, usual_jpeg
from sae_ray.images.rendering import DIM, Rendering
from sae_ray.store.files import Folder

if TYPE_CHECKING:
    from jaxtyping import Int, UInt8
    from PIL import Image


READS_AT_ONCE = 8
"""Files that are read at the same time."""
RETRY_SECONDS = (0.5, 1.0, 2.0)
"""Waits before a file is tried again."""
DANGLING = "a link to nothing"


Prepared = tuple[list[np.ndarray] | Jpeg, bool]
"""An image's pixels, once for every preparation, and whether it is dim; or a file that a GPU is to decode."""


class Preparation(NamedTuple):
    """What one encoder does to an image before its forward pass."""

    preprocess: Callable[[Image.Image], UInt8[np.ndarray, "3 h w"]]
    """Resizes and crops, as `load_preprocess` gives it."""
    at_least: int | None = None
    """Pixels that the sides of a JPEG must keep which is decoded at reduced size; None decodes at full size."""


class DecodedPart(NamedTuple):
    """The images of a part."""

    accepted: Int[np.ndarray, " n"]
    """Places within the part of the images that could be read, ascending."""
    rejects: list[tuple[str, str]]
    """(`image_id`, reason) of the others."""
    pixels: list[UInt8[np.ndarray, "n 3 h w"]]
    """Of the accepted ones without `jpegs`, once for every preparation."""
    dim: list[str]
    """`image_id` of the accepted ones that use less than an eighth of their more than 8 bits."""
    jpegs: dict[int, Jpeg]
    """Those that are left to a GPU, by their place among the accepted ones."""


def decode_part(
    folder: Folder,
    image_ids: Sequence[str],
    preparations: Sequence[Preparation],
    apart: bool = False,
    after_image: Callable[[int], None] = lambda done: None,
    rendering: Rendering | None = None,
    sizes: Sequence[int] | None = None,
    for_gpu: bool = False,
) -> DecodedPart:
    """Reads and decodes images. One that cannot be read is rejected with a short, stable reason.

    Args:
        folder: where they are.
        image_ids: paths below it.
        preparations: what each encoder wants done to them.
        apart: decode in a process of its own, slowly: an image that ends it is rejected, and costs only that process.
        after_image: called with the number of images done.
        rendering: how pixels become RGB, as in `decode_image`.
        sizes: bytes of the files, as far as they are known; what is too large is not read.
        for_gpu: leave JPEGs of the usual kind to a GPU (`sae_ray.encoders.on_gpu`).

    Raises SaeRayError where this node does not have the folder.
    """
    accepted, rejects, dim = [], [], []
    pixels: list[list[np.ndarray]] = [[] for _ in preparations]
    jpegs: dict[int, Jpeg] = {}
    work = partial(_for_gpu if for_gpu else prepared_image, preparations, rendering)
    with _apart(work) if apart else nullcontext(work) as prepared:
        for place, coming in enumerate(_read_ahead(folder, image_ids, sizes)):
            after_image(place)
            try:
                found, is_dim = prepared(coming.result())
            except BadImage as error:
                rejects.append((image_ids[place], error.reason))
                continue
            accepted.append(place)
            if is_dim:
                dim.append(image_ids[place])
            if isinstance(found, Jpeg):
                jpegs[len(accepted) - 1] = found
                continue
            for column, array in zip(pixels, found, strict=True):
                column.append(array)
    return DecodedPart(np.array(accepted, np.int64), rejects, [_stacked(column) for column in pixels], dim, jpegs)


@contextmanager
def _apart(work: Callable[[bytes], Prepared]) -> Iterator[Callable[[bytes], Prepared]]:
    """The same in a child process, which is replaced when an image has ended it."""

    def started() -> ProcessPoolExecutor:
        return ProcessPoolExecutor(1, get_context("spawn"))

    child = started()

    def prepared(data: bytes) -> Prepared:
        nonlocal child
        try:
            return child.submit(work, data).result()
        except BrokenProcessPool as error:
            child = started()
            raise BadImage("ends the process that decodes it") from error

    try:
        yield prepared
    finally:
        child.shutdown()


def _read_ahead(folder: Folder, image_ids: Sequence[str], sizes: Sequence[int] | None) -> Iterator[Future[bytes]]:
    """The files in order. While one is decoded, a few of the next are read."""
    with ThreadPoolExecutor(READS_AT_ONCE) as readers:
        waiting: deque[Future[bytes]] = deque()
        for image_id, n_bytes in zip(image_ids, sizes or [0] * len(image_ids), strict=True):
            waiting.append(readers.submit(read_file, folder, image_id, n_bytes))
            if len(waiting) > READS_AT_ONCE:
                yield waiting.popleft()
        yield from waiting


def read_file(folder: Folder, image_id: str, n_bytes: int = 0) -> bytes:
    """The bytes of an image. Reads that fail are tried again.

    Raises:
        BadImage: the file cannot be read, or is too large by the `n_bytes` that it is known to have.
        SaeRayError: this node does not have the folder.
        OSError: its store does not answer at all, which is not the fault of the image.
    """
    check_bytes(n_bytes)
    problem = OSError()
    for wait in (*RETRY_SECONDS, None):
        if wait is None:
            folder.exists(image_id)
        try:
            return folder.read_bytes(image_id)
        except FileNotFoundError as error:
            if _leads_nowhere(folder, image_id):
                raise BadImage(DANGLING) from error
            if folder.is_local and not _has_files(Path(folder.path)):
                raise SaeRayError(
                    f"{folder} is missing or empty on {socket.gethostname()}; image folders must be on every node at "
                    "the same path, or be named by a URI such as s3://bucket/folder"
                ) from error
            raise BadImage("vanished since it was listed") from error
        except PermissionError as error:
            raise BadImage("no permission to read it") from error
        except OSError as error:
            if _leads_nowhere(folder, image_id):
                raise BadImage(DANGLING) from error
            problem = error
        time.sleep(wait or 0)
    reason = os.strerror(problem.errno) if problem.errno else "the store did not deliver it"
    raise BadImage(f"could not be read: {reason}") from problem


def _leads_nowhere(folder: Folder, image_id: str) -> bool:
    path = folder.path_of(image_id)
    return folder.is_local and os.path.islink(path) and not os.path.exists(path)


def _has_files(folder: Path) -> bool:
    """Not so for the place where a disk is to be mounted."""
    return folder.is_dir() and any(folder.iterdir())


def _for_gpu(preparations: Sequence[Preparation], rendering: Rendering | None, data: bytes) -> Prepared:
    jpeg = usual_jpeg(data)
    return (jpeg, False) if jpeg else prepared_image(preparations, rendering, data)


def prepared_image(
    preparations: Sequence[Preparation], rendering: Rendering | None, data: bytes
) -> tuple[list[np.ndarray], bool]:
    """The pixels of an image, once for every preparation, and whether it is dim. Raises BadImage."""
    sizes = {one.at_least for one in preparations}
    images = {at_least: decode_image(data, at_least=at_least, rendering=rendering) for at_least in sizes}
    arrays = [preprocess(images[at_least]) for preprocess, at_least in preparations]
    return arrays, any(DIM in image.info for image in images.values())


def _stacked(arrays: Sequence[np.ndarray]) -> np.ndarray:
    stacked = np.empty((len(arrays), *(arrays[0].shape if arrays else (3, 0, 0))), np.uint8)
    for place, array in enumerate(arrays):
        stacked[place] = array
    return stacked
