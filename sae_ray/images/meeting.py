"""How the rows of a label file and the images of a folder meet, whose paths people and systems spell in many ways."""

from __future__ import annotations

import posixpath
import unicodedata
from collections.abc import Iterable
from pathlib import PurePosixPath
from urllib.parse import unquote

from sae_ray.errors import UsageError
from sae_ray.store.files import Folder


def meetings(file: str, names: dict[str, str | None], keys: Iterable[str], before: Iterable[str]) -> dict[str, str]:
    """Key of an image -> the row that names it: the very same, or one that is only spelled otherwise."""
    wanted = set(keys)
    spelled: dict[str, str] = {}
    for row, name in names.items():
        other = spelled.setdefault(_spelled(row), row)
        if names[other] != name and not {row, other} <= wanted:
            raise UsageError(f"{file}: the rows {other!r} and {row!r} name the same image; keep one of them")
    found = {}
    for key in wanted:
        tried = (spelled.get(prefix + _spelled(key)) for prefix in ("", *before))
        row = key if key in names else next(filter(None, tried), None)
        if row is not None:
            found[key] = row
    return found


def _spelled(path: str) -> str:
    """A path in one of its spellings: NFC, no backslashes, no `.`, no needless slashes or spaces, no `file:` URI."""
    if path.strip().lower().startswith("file:/"):
        path = unquote(path.strip()[len("file:") :])
    path = unicodedata.normalize("NFC", path.strip()).replace("\\", "/")
    return posixpath.normpath(f"/{path}").lstrip("/")


def prefixes(folder: Folder, parent: Folder) -> list[str]:
    """What paths may begin with that are not relative to the image folder: itself, from anywhere or from the file."""
    below = folder.path.removeprefix(parent.path_of(""))
    return [f"{_spelled(place)}/" for place in (folder.uri.partition("?")[0], folder.path, below, folder.name)]


def nearest(key: str, rows: Iterable[str]) -> str:
    """Tells of the row that is most like a key that has none."""
    name = PurePosixPath(key).name
    stem = PurePosixPath(name).stem
    cousin = example = None
    for row in rows:
        if _look_alike(key, row):
            ours, theirs = _difference(key, row)
            return f" (the row {row!r} differs from it only in {theirs}, where the image's name has {ours})"
        last = PurePosixPath(row.replace("\\", "/")).name
        cousin = cousin or (row if last == name or PurePosixPath(last).stem == stem else None)
        example = example or row
    if cousin:
        return f" (the row {cousin!r} is nearest; rows are paths below the image folder, with suffixes)"
    return f" (its first row is {example!r})" if example else " (it has no rows)"


def _look_alike(one: str, other: str) -> bool:
    """Whether two names differ in invisible characters or case only, or in one or two letters not both of ASCII."""
    if _look(one) == _look(other):
        return True
    if len(one) != len(other) or (one.isascii() and other.isascii()):
        return False
    pairs = [pair for pair in zip(one, other, strict=True) if pair[0] != pair[1]]
    return len(pairs) <= 2 and not any(a.isascii() and b.isascii() for a, b in pairs)


def _look(text: str) -> str:
    shown = (letter for letter in unicodedata.normalize("NFKC", text) if unicodedata.category(letter)[0] not in "CZ")
    return "".join(shown).casefold()


def _difference(one: str, other: str) -> tuple[str, str]:
    """The code points of two texts, from where they begin to differ to where they cease to."""
    start = len(posixpath.commonprefix([one, other]))
    end = len(posixpath.commonprefix([one[start:][::-1], other[start:][::-1]]))
    parts = (text[start : len(text) - end] for text in (one, other))
    first, second = (" ".join(f"U+{ord(letter):04X}" for letter in part[:8]) or "nothing" for part in parts)
    return first, second
