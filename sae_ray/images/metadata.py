"""Texts, colour profiles and EXIF data in image files, which can be damaged where the pixels are not."""

from __future__ import annotations

import re
import struct
import zlib

PNG_PICTURE = {b"IHDR", b"PLTE", b"IDAT", b"IEND"}
PNG_TRANSPARENCY_BYTES = {0: 2, 2: 6}
"""By the colour type: grey, RGB."""
WEBP_PICTURE = {b"VP8X", b"ALPH", b"VP8 ", b"VP8L", b"ANIM", b"ANMF"}
TIFF_METADATA = {270, 271, 272, 305, 306, 315, 700, 33432, 33723, 34377, 34665, 34675, 34853}
"""Texts, XMP, IPTC, Photoshop's blocks, EXIF, the colour profile, GPS. The orientation is a tag of its own."""


def without_metadata(data: bytes) -> bytes:
    """A JPEG, PNG, WebP, TIFF, AVIF or HEIF file without metadata, as far as they can be told from the picture.

    The EXIF orientation of a JPEG and PNG stays. Other files come back as they are.
    """
    try:
        if data.startswith(b"\xff\xd8\xff"):
            return _jpeg(data)
        if data.startswith(b"\x89PNG\r\n\x1a\n"):
            return _png(data)
        if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
            return _webp(data)
        if data.startswith((b"II*\0", b"MM\0*")):
            return _tiff(data)
    except (struct.error, IndexError):  # cut off within a header
        return data
    if data[4:8] == b"ftyp":
        # Readers pass over an item of a type that they do not know.
        return re.sub(rb"(infe.{8,10}?)Exif", rb"\1free", data, flags=re.DOTALL)
    return data


def significant_bits(data: bytes) -> int | None:
    """What the sBIT chunk of a grey PNG file declares."""
    found = re.search(rb"\0\0\0[\1\2]sBIT(.)", data[:4096], flags=re.DOTALL)
    return found[1][0] if found else None


def _jpeg(data: bytes) -> bytes:
    def is_picture(marker: int, length: int) -> bool:
        match marker:
            case 0xE0:  # JFIF, which tells the colour space
                return length >= 16
            case 0xEE:  # Adobe's segment, which does so too
                return length >= 14
        return marker == 0xE1 or not (0xE2 <= marker <= 0xEF or marker == 0xFE)

    kept, place = [data[:2]], 2
    while data[place] == 0xFF and data[place + 1] != 0xDA:  # where the pixels begin
        marker, length = struct.unpack_from(">xBH", data, place)
        if is_picture(marker, length):
            kept.append(data[place : place + 2 + length])
        place += 2 + length
    return b"".join([*kept, data[place:]])


def _png(data: bytes) -> bytes:
    def is_picture(kind: bytes, content: bytes, checksum: bytes) -> bool:
        if kind in PNG_PICTURE:
            return True
        least = PNG_TRANSPARENCY_BYTES.get(data[25], 1) if kind == b"tRNS" else 1
        whole = checksum == struct.pack(">I", zlib.crc32(kind + content))
        return kind in (b"tRNS", b"eXIf") and len(content) >= least and whole

    kept, place = [data[:8]], 8
    while place < len(data):
        length, kind = struct.unpack_from(">I4s", data, place)
        end = place + 12 + length
        if is_picture(kind, data[place + 8 : end - 4], data[end - 4 : end]):
            kept.append(data[place:end])
        place = end
    return b"".join(kept)


def _webp(data: bytes) -> bytes:
    kept, place = [], 12
    while place + 8 <= len(data):
        kind, length = struct.unpack_from("<4sI", data, place)
        chunk = data[place : place + 8 + length + length % 2]
        if kind == b"VP8X":
            chunk = chunk[:8] + bytes([chunk[8] & ~0b0010_1100]) + chunk[9:]  # tells of the others
        if kind in WEBP_PICTURE:
            kept.append(chunk)
        place += len(chunk)
    body = b"WEBP" + b"".join(kept)
    return b"RIFF" + struct.pack("<I", len(body)) + body


def _tiff(data: bytes) -> bytes:
    """The tags stay, each with one byte for a value."""
    order = "<" if data.startswith(b"II") else ">"
    (place,) = struct.unpack_from(f"{order}I", data, 4)
    (n_tags,) = struct.unpack_from(f"{order}H", data, place)
    changed = bytearray(data)
    for entry in range(place + 2, place + 2 + 12 * n_tags, 12):
        (tag,) = struct.unpack_from(f"{order}H", data, entry)
        if tag in TIFF_METADATA:
            struct.pack_into(f"{order}HHI4x", changed, entry, tag, 1, 1)
    return bytes(changed)
