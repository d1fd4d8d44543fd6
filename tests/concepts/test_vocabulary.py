"""Files of words, and the words of classes."""

from __future__ import annotations

from pathlib import Path

import pytest

from sae_ray.concepts import class_vocabulary, read_vocabulary
from sae_ray.errors import UsageError


def test_blank_lines_shift_no_name_and_repeated_words_count_once(tmp_path: Path):
    file = tmp_path / "words.txt"
    file.write_bytes("\ufeffcat\r\n\r\n  red  panda \r\ncat\r\n\t\r\nBär".encode())
    vocabulary = read_vocabulary(str(file))
    assert vocabulary == (["cat", "red  panda", "Bär"], 2, 1)
    file.write_text("cat\nBär\n\n", encoding="utf-16")
    assert read_vocabulary(str(file)).words == ["cat", "Bär"]
    file.write_bytes(b"cat\rdog\r")
    assert read_vocabulary(str(file)) == (["cat", "dog"], 0, 0)


def test_a_file_that_is_none_is_refused_by_name(tmp_path: Path):
    file = tmp_path / "words.txt"
    with pytest.raises(UsageError, match=r"words\.txt cannot be read .* one word"):
        read_vocabulary(str(file))
    file.write_bytes("cat\nBär".encode("latin-1"))
    with pytest.raises(UsageError, match=r"words\.txt is not UTF-8 text .*position 5.*save it as UTF-8"):
        read_vocabulary(str(file))
    file.write_text("\n \n")
    with pytest.raises(UsageError, match="has 0 words"):
        read_vocabulary(str(file))
    file.write_text("cat\ncat\n")
    with pytest.raises(UsageError, match="has 1 words"):
        read_vocabulary(str(file))


def test_classes_are_named_as_people_name_them():
    labels = ["n01440764 tench, Tinca tinca", "sports_car", "n02012849 crane", "n03126707 crane", "sports_car"]
    assert class_vocabulary(labels) == (["crane", "sports car", "tench"], 0, 1)
