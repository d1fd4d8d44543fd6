"""What a file is that is no image, though its name says so: what servers and tools leave in an image's place."""

from __future__ import annotations

import re

MAGIC = {
    b"%PDF-": "a PDF",
    b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1": "an old Office document",
    b"PK\x03\x04": "a ZIP archive",
    b"PK\x05\x06": "a ZIP archive",
    b"\x1f\x8b": "a gzip file",
    b"BZh": "a bzip2 file",
    b"\xfd7zXZ\0": "an xz file",
    b"\x28\xb5\x2f\xfd": "a zstd file",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive",
    b"Rar!\x1a\x07": "a RAR archive",
    b"SQLite format 3\0": "a database",
    b"\x89HDF\r\n": "an HDF5 file",
    b"CDF\1": "a NetCDF file",
    b"CDF\2": "a NetCDF file",
    b"\x93NUMPY": "a NumPy array",
    b"\x80\2}": "a pickle",
    b"\x80\4\x95": "a pickle",
    b"\x80\5\x95": "a pickle",
    b"PAR1": "a parquet file",
    b"ARROW1": "an Arrow file",
    b"\x1aE\xdf\xa3": "a video",
    b"\0\0\x01\xba": "a video",
    b"FLV\1": "a video",
    b"\x30\x26\xb2\x75\x8e\x66\xcf\x11": "sound or video",
    b"OggS": "sound or video",
    b"ID3": "sound",
    b"\xff\xfb": "sound",
    b"\xff\xf3": "sound",
    b"fLaC": "sound",
    b"MThd": "sound",
    b"#!AMR": "sound",
    b"\x7fELF": "a program",
    b"MZ": "a program",
    b"\xcf\xfa\xed\xfe": "a program",
    b"L\0\0\0\1\x14\2\0": "a shortcut of Windows",
    b"book\0\0\0\0mark": "an alias of macOS",
    b"bplist00": "settings of macOS",
    b"\0\x05\x16\x07": "what macOS keeps beside a file",
    b"HTTP/": "a server's answer with its header",
    b"version https://git-lfs.github.com/spec/": "a git-lfs pointer (run `git lfs pull`)",
    b"/annex/objects/": "a git-annex pointer (run `git annex get`)",
}
CONTAINERS = {b"WAVE": "sound", b"AVI ": "a video", b"AIFF": "sound"}
"""By what follows RIFF or FORM and a length."""
VIDEO = re.compile(
    rb"....(ftyp(isom|iso\d|mp4\d|mp4v|avc1|hvc1|dash|M4[ABV] |qt  |3g[2p].|MSNV|XAVC|f4v |mmp4)|moov|mdat|wide|pnot)",
    re.DOTALL,
)
"""Brands of MP4 files, of which images, such as HEIC, have others; and how a QuickTime file begins that has none."""
HTML = (
    "!doctype a abbr article b base big body br button center code div em embed fieldset font footer form frameset h1 "
    "h2 h3 h4 h5 h6 head header hr html i iframe img input label li link main meta nav noscript object ol p pre script "
    "section small span strong style table tbody td th thead title tr tt u ul"
)
"""Elements that a page may begin with, or what is left of one."""
BASE64 = ("/9j/", "iVBORw0KGgo", "R0lGODlh", "R0lGODdh", "UklGR")
"""How JPEG, PNG, GIF and WebP begin in base64."""
LOOKED_AT = 4096
"""Bytes at the start."""

_HTML = re.compile(rf"<({HTML.replace(' ', '|')})\b|<\?php")
_FAILED = re.compile(r"(?:<ErrorResponse\b[^>]*>\s*)?<Error\b[^>]*>.*?<Code>([\w.]{1,40})</Code>", re.DOTALL)
_JSON = re.compile(r'(\{\s*("|\})|\[\s*([\[{"\]\d-]|null|true|false)|(null|true|false)\s*\Z)')
_CONTROL = re.compile(r"[\0-\x08\x0e-\x1a\x1c-\x1f]")


def not_an_image(data: bytes) -> str:
    """Why a file is rejected that no decoder knows: `not an image`, or `not an image: an HTML page`.

    Args:
        data: not empty.
    """
    kind = kind_of(data)
    return f"not an image: {kind}" if kind else "not an image"


def kind_of(data: bytes) -> str | None:
    """What a file is by its content, as `a git-lfs pointer (…)`; None if it is nothing of this page."""
    head = data[:LOOKED_AT]
    for magic, kind in MAGIC.items():
        if head.startswith(magic):
            return kind
    if head.startswith((b"RIFF", b"FORM")) and head[8:12] in CONTAINERS:
        return CONTAINERS[head[8:12]]
    if VIDEO.match(head):
        return "a video"
    if head[257:262] == b"ustar":
        return "a tar archive"
    if data.count(0) == len(data):
        return "zeros only"
    text = _text(head)
    if text is not None:
        return _document(text) or "text"
    text = head.decode("latin-1")  # documents in older encodings begin in ASCII
    return None if _CONTROL.search(text) else _document(text)


def _document(text: str) -> str | None:
    start = re.sub(r"\A(\s|<\?xml.*?\?>|<!--.*?-->|<!doctype\s+svg.*?>)*", "", text, flags=re.DOTALL | re.IGNORECASE)
    lower = start.lower()
    if _HTML.match(lower):
        return "an HTML page"
    if lower.startswith("<svg"):
        return "an SVG drawing"
    if failed := _FAILED.match(start):
        return f"an object store's error: {failed[1]}"
    if start.startswith("<") and text.lstrip().startswith("<"):
        return "an XML document"
    if _JSON.match(start):
        return "a JSON document"
    if "git/annex/objects/" in start[:400]:
        return "a git-annex pointer (run `git annex get`)"
    if start.startswith("data:image/"):
        return "a data URL"
    return "base64" if start.startswith(BASE64) else None


def _text(head: bytes) -> str | None:
    """None unless it is text. A character that is cut off at the end does not count."""
    encoding = "utf-16" if head.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8-sig"
    try:
        text = head.decode(encoding)
    except UnicodeDecodeError as error:
        if len(head) < LOOKED_AT or error.start < LOOKED_AT - 4:
            return None
        text = head[: error.start].decode(encoding)
    return None if _CONTROL.search(text) else text
