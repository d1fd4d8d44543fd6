"""Readable names of classes, and whether an answer names one."""

from __future__ import annotations

import re
from collections.abc import Iterable

_SYNSET = re.compile(r"n\d{8}(?!\S)\s*")


def class_of(label_name: str) -> str:
    """The class of a label: the synset if the name begins with one (ImageNet), else the name."""
    synset = _SYNSET.match(label_name)
    return synset[0].strip() if synset else label_name


def class_names(label_names: Iterable[str]) -> dict[str, str]:
    """Class -> its readable name, if a label has one: both `n02012849 crane` and `n02012849` are named `crane`."""
    found = {class_of(label_name): _SYNSET.sub("", label_name, count=1) for label_name in sorted(set(label_names))}
    return {label: name for label, name in found.items() if words_of(name)}


def words_of(text: str) -> list[str]:
    """The words of a text in lower case, without punctuation."""
    return re.findall(r"[^\W_]+", text.lower())


def first_synonym(name: str) -> str:
    """The first of several names: `tench` for `tench, Tinca tinca`."""
    return name.split(",")[0].strip()


def names(answer: str, name: str) -> bool:
    """Whether an answer begins with the class's name, or with one of several names separated by commas."""
    said = words_of(answer)
    synonyms = filter(None, map(words_of, name.split(",")))
    return any(said[: len(words)] == words for words in synonyms)
