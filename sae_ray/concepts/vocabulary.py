"""Vocabularies: the words that neurons can be named with."""

from __future__ import annotations

import io
from collections.abc import Iterable
from typing import NamedTuple

from sae_ray.concepts.naming import class_names, first_synonym
from sae_ray.errors import UsageError
from sae_ray.images.labels import text_of

FORM = "a vocabulary is a text file in UTF-8 with one word (or a few) per line"


class Vocabulary(NamedTuple):
    """Different words, in the order of the file."""

    words: list[str]
    n_blank: int = 0
    """Blank lines, which are left out. `words` is what is embedded and what names are read from, so none shifts."""
    n_repeated: int = 0
    """Lines that repeat an earlier word, which are left out: twice in a softmax, a word halves its own chances."""


def read_vocabulary(file: str) -> Vocabulary:
    """Reads a file with one word per line, without the space around it. UTF-8, or UTF-16 with its mark.

    Args:
        file: path or URI.

    Raises:
        UsageError: the file cannot be read, is in another encoding, or has fewer than two words.
    """
    vocabulary = _different(io.StringIO(text_of(file, FORM, "vocabulary"), newline=None))
    if len(vocabulary.words) < 2:
        raise UsageError(f"{file} has {len(vocabulary.words)} words; {FORM}, and a name is chosen among at least two")
    return vocabulary


def class_vocabulary(label_names: Iterable[str]) -> Vocabulary:
    """The readable names of classes, sorted: `tench` of `n01440764 tench, Tinca tinca`, `sports car` of `sports_car`.

    A synset without words is left out.
    """
    return _different(sorted(class_words(label_names).values()))


def class_words(label_names: Iterable[str]) -> dict[str, str]:
    """Class -> its word in `class_vocabulary`."""
    return {label: first_synonym(name).replace("_", " ") for label, name in class_names(label_names).items()}


def _different(lines: Iterable[str]) -> Vocabulary:
    stripped = [line.strip() for line in lines]
    filled = list(filter(None, stripped))
    words = list(dict.fromkeys(filled))
    return Vocabulary(words, len(stripped) - len(filled), len(filled) - len(words))
