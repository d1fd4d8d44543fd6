"""What a file is that is no image, though its name says so: what servers and tools leave in an image's place."""

from __future__ import annotations

import re

MAGIC = {
    b"%PDF-": "a PDF",
    b"PK\x03\x04": "a ZIP archive",
    b"\x1f\x8b": "a gzip file",
    b"BZh": "a bzip2 file",
    b"\xfd7zXZ\0": "an xz file",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive",
    b"Rar!\x1a\x07": "a RAR archive",
    b"SQLite format 3\0": "a database",
    b"\x89HDF\r\n": "an HDF5 file",
    b"\x93NUMPY": "a NumPy array",
    b"PAR1": "a parquet file",
    b"\x1aE\xdf\xa3": "a video",
    b"\0\0\x01\xba": "a video",
    b"OggS": "sound or video",
    b"ID3": "sound",
    b"fLaC": "sound",
    b"\0\x05\x16\x07": "what macOS keeps beside a file",
    b"version https://git-lfs.github.com/spec/": "a git-lfs pointer (run `git lfs pull`)",
    b"/annex/objects/": "a git-annex pointer (run `git annex get`)",
}
CONTAINERS = {b"WAVE": "sound", b"AVI ": "a video"}
"""By what follows RIFF and a length."""
VIDEOS = (b"isom", b"iso2", b"iso4", b"iso5", b"iso6", b"mp41", b"mp42", b"avc1", b"dash", b"M4V ", b"M4A ", b"qt  ")
"""Brands: images, such as HEIC, have others."""
LOOKED_AT = 4096
"""Bytes at the start."""


def not_an_image(data: bytes) -> str:
    """Why a file is rejected that no decoder knows: `not an image`, or `not an image: an HTML page`.

    Args:
        data: not empty.
    """
    kind = _kind(data)
    return f"not an image: {kind}" if kind else "not an image"


def _kind(data: bytes) -> str | None:
    head = data[:LOOKED_AT]
    for magic, kind in MAGIC.items():
        if head.startswith(magic):
            return kind
    if head.startswith(b"RIFF") and head[8:12] in CONTAINERS:
        return CONTAINERS[head[8:12]]
    if head[4:8] == b"ftyp" and head[8:12] in VIDEOS:
        return "a video"
    if head[257:262] == b"ustar":
        return "a tar archive"
    if data.count(0) == len(data):
        return "zeros only"
    text = _text(head)
    return None if text is None else _document(text)


def _document(text: str) -> str:
    start = re.sub(r"\A(\s|<\?xml.*?\?>|<!--.*?-->|<!doctype\s+svg.*?>)*", "", text, flags=re.DOTALL | re.IGNORECASE)
    lower = start.lower()
    if re.match(r"<(!doctype\s+html|html|head|body|title|meta|script|div|p|h1|center)\b", lower):
        return "an HTML page"
    if lower.startswith("<svg"):
        return "an SVG drawing"
    if failed := re.match(r"<Error>.*?<Code>(\w{1,40})</Code>", start, re.DOTALL):
        return f"an object store's error: {failed[1]}"
    if start.startswith("<") and text.lstrip().startswith("<"):
        return "an XML document"
    if re.match(r'(\{\s*("|\})|\[\s*[\[{"\]\d-])', start):
        return "a JSON document"
    if "git/annex/objects/" in start[:400]:
        return "a git-annex pointer (run `git annex get`)"
    if start.startswith("data:image/"):
        return "a data URL"
    return "text"


def _text(head: bytes) -> str | None:
    """None unless it is text. A character that is cut off at the end does not count."""
    encoding = "utf-16" if head.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8-sig"
    try:
        text = head.decode(encoding)
    except UnicodeDecodeError as error:
        if len(head) < LOOKED_AT or error.start < LOOKED_AT - 4:
            return None
        text = head[: error.start].decode(encoding)
    return None if re.search(r"[\0-\x08\x0e-\x1a\x1c-\x1f]", text) else text
