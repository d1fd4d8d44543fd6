"""Readable names of classes, and whether an answer names one."""

from __future__ import annotations

import re
from collections.abc import Iterable

from sae_ray.images.wordnet import imagenet_words, with_words

_SYNSET = re.compile(r"n\d{8}(?!\S)\s*")


def class_of(label_name: str) -> str:
    """The class of a label: the synset if the name begins with one (ImageNet), else the name."""
    synset = _SYNSET.match(label_name)
    return synset[0].strip() if synset else label_name


def class_names(label_names: Iterable[str]) -> dict[str, str]:
    """Class -> its readable name, if it has one: both `n02012849 crane` and `n02012849` are named `crane`.

    A synset without words has those of ImageNet.
    """
    found = {class_of(name): _without_synset(with_words(name, imagenet_words)) for name in sorted(set(label_names))}
    return {label: name for label, name in found.items() if words_of(name)}


def label_title(label_name: str) -> str:
    """A label as it is shown, what matters first: `tench, Tinca tinca (n01440764)`."""
    worded = with_words(label_name, imagenet_words)
    name = _without_synset(worded)
    return f"{name} ({class_of(worded)})" if name and name != worded else label_name


def _without_synset(label_name: str) -> str:
    return _SYNSET.sub("", label_name, count=1)


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


def mentions(answer: str, name: str) -> bool:
    """Whether an answer has the class's name anywhere, or one of several names separated by commas."""
    said = words_of(answer)
    synonyms = filter(None, map(words_of, name.split(",")))
    return any(said[at : at + len(words)] == words for words in synonyms for at in range(len(said)))
