"""How many files of a folder are decoded, of those that Pillow itself decodes: python -m bench.decoding FOLDER …

Meant for the test files of image libraries, which are odd or broken on purpose. Files are decoded in a child process:
if one ends it, or raises anything but BadImage, that is a crash.
"""

from __future__ import annotations

import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from io import BytesIO
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from sae_ray.images import BadImage, decode_image


class Outcome(NamedTuple):
    """Of one file."""

    format: str | None
    """As Pillow decodes it; None if it does not."""
    refusal: str | None
    """Why it is not decoded here; None if it is."""


def outcome(file: Path) -> Outcome:
    warnings.simplefilter("ignore")
    data = file.read_bytes()
    try:
        with Image.open(BytesIO(data)) as image:
            image.load()
        by_pillow = image.format
    except Exception:  # whatever it raises, Pillow does not decode it
        by_pillow = None
    try:
        decode_image(data)
    except BadImage as refusal:
        return Outcome(by_pillow, refusal.reason)
    return Outcome(by_pillow, None)


def outcomes(files: list[Path]) -> Iterator[tuple[Path, Outcome | None]]:
    """None for a file that ended its process, or that anything but BadImage came of."""
    child = ProcessPoolExecutor(1, get_context("spawn"))
    for file in files:
        try:
            yield file, child.submit(outcome, file).result()
        except BrokenProcessPool:
            child = ProcessPoolExecutor(1, get_context("spawn"))
            yield file, None
        except Exception as error:
            print(f"{file}: {type(error).__name__}: {error}")
            yield file, None
    child.shutdown()


def main() -> None:
    for folder in map(Path, sys.argv[1:]):
        found = dict(outcomes(sorted(file for file in folder.rglob("*") if file.is_file())))
        opened = {file: one for file, one in found.items() if one and one.format}
        refused = {file: one for file, one in opened.items() if one.refusal}
        by_format = Counter(one.format for one in opened.values())
        crashes = [file for file, one in found.items() if one is None]
        beyond = sum(one is not None and not one.format and not one.refusal for one in found.values())
        print(f"{folder}: {len(found)} files, of which Pillow decodes {len(opened)}")
        share = 1 - len(refused) / max(1, len(opened))
        print(f"decoded: {len(opened) - len(refused)} of them ({share:.1%}), and {beyond} others")
        print(f"crashes: {len(crashes)} {[str(file) for file in crashes]}")
        for file, one in refused.items():
            print(f"  refused: {file.relative_to(folder)} ({one.format}): {one.refusal}")
        print("formats:", ", ".join(f"{name} {count}" for name, count in by_format.most_common()))


if __name__ == "__main__":
    main()
