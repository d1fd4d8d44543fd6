"""Writes the world to disk."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path

from sae_ray.errors import UsageError

FIRST_HELDOUT = 40_000
"""The models were trained on images below this index, which include a study's training images. Images from this index
on are new to the models and to the SAEs."""

MODELS = Path(__file__).parent / "models"
"""The shipped model directories `clip`, `judge` and `llava`."""

_BATCH = 500


def write_world(
    folder: str | Path,
    n_train: int = 20_000,
    n_heldout: int = 4_000,
    processes: int = 2,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Writes `train/<shape>/<index>.png`, `heldout/<shape>/<index>.png`, and the models `clip`, `judge` and `llava`.

    The shape of a blank image is "blank". Files appear only when complete, and existing files are kept, so the next
    call finishes an interrupted one. `progress(written, missing)` is called with numbers of images. With more than one
    process, call it from an importable module (as multiprocessing requires).

    Raises:
        UsageError: `n_train` includes held-out images.
    """
    if n_train > FIRST_HELDOUT:
        raise UsageError(f"n_train = {n_train}: images from {FIRST_HELDOUT} on are held out; choose at most that many")
    folder = Path(folder)
    missing = [
        *_missing(folder / "train", range(n_train)),
        *_missing(folder / "heldout", range(FIRST_HELDOUT, FIRST_HELDOUT + n_heldout)),
    ]
    batches = [missing[low : low + _BATCH] for low in range(0, len(missing), _BATCH)]
    for written, _ in enumerate(_each(_write_images, batches, processes), start=1):
        if progress:
            progress(min(written * _BATCH, len(missing)), len(missing))
    for source in sorted(path for path in MODELS.glob("*/*") if path.is_file()):
        target, data = folder / source.relative_to(MODELS), source.read_bytes()
        if not target.exists() or target.read_bytes() != data:
            _write(target, data)


def _missing(split: Path, indices: range) -> list[tuple[Path, int]]:
    written = {path.name for path in split.glob("*/*.png")}
    return [(split, index) for index in indices if _name(index) not in written]


def _name(index: int) -> str:
    return f"{index:06d}.png"


def _each(work: Callable, items: list, processes: int) -> Iterator[None]:
    """Calls `work` with every item; with several items and processes, in worker processes."""
    if processes == 1 or len(items) < 2:
        yield from map(work, items)
        return
    from concurrent.futures import ProcessPoolExecutor
    from multiprocessing import get_context

    # A fork would copy locks held by the caller's threads (torch, Ray).
    with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
        yield from pool.map(work, items)


def _write_images(images: list[tuple[Path, int]]) -> None:
    from sae_ray.world.render import attributes, render

    for split, index in images:
        png = BytesIO()
        render(index).save(png, "png", compress_level=1)
        _write(split / (attributes(index).shape or "blank") / _name(index), png.getvalue())


def _write(target: Path, data: bytes) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.tmp")
    unfinished.write_bytes(data)
    os.replace(unfinished, target)
