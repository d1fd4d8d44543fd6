"""The words of WordNet's ids, by which ImageNet names its classes: `n01440764` is a tench."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from pyarrow import fs

from sae_ray.errors import SaeRayError
from sae_ray.store.files import Folder

TABLES = ("LOC_synset_mapping.txt", "words.txt", "synset_words.txt")
"""Files of lines such as `n01440764 tench, Tinca tinca`: Kaggle's, Tiny ImageNet's and Caffe's names."""

_BARE = re.compile(r"(n\d{8})(?=/|$)")


def with_words(label_name: str, table: Callable[[], Mapping[str, str]]) -> str:
    """A class name that begins with an id, with its words after the id; other names as they are.

    Args:
        label_name: the path of a class folder, such as `n01440764` or Tiny ImageNet's `n01443537/images`.
        table: gives id -> words; is called only for names that begin with an id without words.
    """
    bare = _BARE.match(label_name)
    words = table().get(bare[1]) if bare else None
    return f"{bare[1]} {words}{label_name[bare.end() :]}" if bare and words else label_name


def read_words(folder: Folder, name: str) -> dict[str, str]:
    """Id -> words, from a file with one of each per line; empty if it does not exist.

    Raises SaeRayError if it may not be read.
    """
    if folder.filesystem.get_file_info(folder.path_of(name)).type != fs.FileType.File:
        return {}
    try:
        return _words(folder.read_bytes(name).decode("utf-8-sig", errors="replace"))
    except PermissionError as error:
        raise SaeRayError(
            f"{folder / name}, which names classes, cannot be read: no permission; make it readable"
        ) from error


@cache
def imagenet_words() -> dict[str, str]:
    """Id -> words of the 21 844 classes of ImageNet. timm ships them, and is not loaded: it needs torch."""
    found = find_spec("timm")
    for place in (found.submodule_search_locations or ()) if found else ():
        file = Path(place) / "data" / "_info" / "imagenet_synset_to_lemma.txt"
        if file.exists():
            return _words(file.read_text(encoding="utf-8"))
    return {}


def _words(text: str) -> dict[str, str]:
    lines = (line.split(maxsplit=1) for line in text.splitlines())
    return {line[0]: line[1].strip() for line in lines if len(line) == 2 and _BARE.fullmatch(line[0])}
