"""Pixels: every format, transparency, the range of values, damaged metadata, and limits. Files are written by Pillow or
byte by byte."""

from __future__ import annotations

import io
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms
from PIL.PngImagePlugin import PngInfo

from sae_ray.images import BadImage, decode_image
from sae_ray.images.decode import BYTE_LIMIT
from sae_ray.images.formats import ACCEPTED, REFUSED, UNKNOWN
from sae_ray.images.part import Preparation, decode_part
from sae_ray.images.rendering import DIM, ON_WHITE, Rendering, rendered
from sae_ray.store.files import Folder

from .test_images import encoded, jpeg_bomb, noise, png_bomb, reason

DOCS = Path(__file__).parents[2] / "docs" / "inputs.md"
SIZE = (48, 32)


def smooth(size: tuple[int, int] = SIZE) -> Image.Image:
    """A picture that no lossy codec spoils, and whose corners differ."""
    y, x = np.mgrid[: size[1], : size[0]] / (max(size) - 1)
    return Image.fromarray(np.rint(np.stack([x, y, 1 - x], 2) * 255).astype(np.uint8))


# Formats


def raw(mode: str = "RGB", size: tuple[int, int] = SIZE) -> bytes:
    return smooth(size).convert(mode).tobytes()


def cursor() -> bytes:
    icon = encoded(smooth((16, 16)).convert("RGBA"), "ICO", bitmap_format="bmp", sizes=[(16, 16)])
    return b"\0\0\2\0" + icon[4:]


def dcx() -> bytes:
    return struct.pack("<III", 0x3ADE68B1, 12, 0) + encoded(smooth(), "PCX")


def fits() -> bytes:
    cards = ["SIMPLE  =                    T", "BITPIX  =                    8", "NAXIS   =                    2"]
    cards += [f"NAXIS1  = {SIZE[0]:20}", f"NAXIS2  = {SIZE[1]:20}", "END"]
    return (
        "".join(f"{card:80}" for card in cards).encode().ljust(2880)
        + smooth().convert("L").transpose(Image.Transpose.FLIP_TOP_BOTTOM).tobytes()
    )


def fli() -> bytes:
    """One frame of one chunk, FLI_COPY."""
    chunk = struct.pack("<IH", 6 + SIZE[0] * SIZE[1], 16) + raw("L")
    frame = struct.pack("<IHH8x", 16 + len(chunk), 0xF1FA, 1) + chunk
    header = struct.pack("<IHHHHHHI108x", 128 + len(frame), 0xAF11, 1, *SIZE, 8, 3, 5)
    return header + frame


def ftex() -> bytes:
    pixels = raw()
    start = 8 + 4 * 4 + 8
    return b"FTEX" + struct.pack("<6iI", 1, *SIZE, 1, 1, 1, start) + struct.pack("<I", len(pixels)) + pixels


def gbr() -> bytes:
    return struct.pack(">5I4sI", 30, 2, *SIZE, 1, b"GIMP", 10) + b"b\0" + raw("L")


def mcidas() -> bytes:
    words = [0] * 64
    words[1], words[8], words[9], words[10], words[13], words[14], words[33] = 4, SIZE[1], SIZE[0], 1, 1, 0, 256
    return struct.pack(">64i", *words) + raw("L")


def photo_cd() -> bytes:
    return (b"\0" * 2048 + b"PCD_").ljust(96 * 2048) + b"\x80" * (768 * 512 * 3 // 2)


def pixar() -> bytes:
    header = bytearray(1024)
    header[:4] = b"\x80\xe8\0\0"
    struct.pack_into("<HH", header, 416, SIZE[1], SIZE[0])
    struct.pack_into("<HH", header, 424, 14, 2)
    return bytes(header) + raw()


def photoshop() -> bytes:
    planes = np.asarray(smooth()).transpose(2, 0, 1).tobytes()
    return b"8BPS" + struct.pack(">H6xHIIHH", 1, 3, SIZE[1], SIZE[0], 8, 3) + b"\0" * 12 + b"\0\0" + planes


def sun() -> bytes:
    bgr = np.asarray(smooth())[:, :, ::-1].tobytes()
    return struct.pack(">8I", 0x59A66A95, *SIZE, 24, len(bgr), 1, 0, 0) + bgr


def xpm() -> bytes:
    rows = ",\n".join(f'"{"ab" * (SIZE[0] // 2)}"' for _ in range(SIZE[1]))
    colours = '"a c #ff0000",\n"b c #00ff00"'
    return f'/* XPM */\nstatic char *x[] = {{\n"{SIZE[0]} {SIZE[1]} 2 1",\n{colours},\n{rows}\n}};'.encode()


def xv_thumbnail() -> bytes:
    return f"P7 332\n#END_OF_COMMENTS\n{SIZE[0]} {SIZE[1]} 255\n".encode() + raw("L")


FILES: dict[str, bytes | Callable[[], bytes]] = {
    "AVIF": encoded(smooth(), "AVIF", quality=95),
    "BLP": encoded(smooth().convert("P"), "BLP"),
    "BMP": encoded(smooth(), "BMP"),
    "CUR": cursor,
    "DCX": dcx,
    "DDS": encoded(smooth(), "DDS"),
    "DIB": encoded(smooth(), "DIB"),
    "FITS": fits,
    "FLI": fli,
    "FTEX": ftex,
    "GBR": gbr,
    "GIF": encoded(smooth(), "GIF"),
    "ICNS": encoded(smooth((128, 128)), "ICNS"),
    "ICO": encoded(smooth((32, 32)), "ICO", sizes=[(16, 16), (32, 32)]),
    "IM": lambda: encoded(smooth(), "IM"),
    "JPEG": encoded(smooth(), "JPEG", quality=95),
    "JPEG2000": encoded(smooth(), "JPEG2000"),
    "MCIDAS": mcidas,
    "MSP": encoded(smooth().convert("1"), "MSP"),
    "PCD": photo_cd,
    "PCX": encoded(smooth(), "PCX"),
    "PIXAR": pixar,
    "PNG": encoded(smooth()),
    "PPM": encoded(smooth(), "PPM"),
    "PSD": photoshop,
    "QOI": encoded(smooth(), "QOI"),
    "SGI": encoded(smooth(), "SGI"),
    "SPIDER": encoded(smooth().convert("F"), "SPIDER"),
    "SUN": sun,
    "TGA": encoded(smooth(), "TGA"),
    "TIFF": encoded(smooth(), "TIFF"),
    "WEBP": encoded(smooth(), "WEBP", quality=95),
    "XBM": encoded(smooth().convert("1"), "XBM"),
    "XPM": xpm,
    "XVTHUMB": xv_thumbnail,
}
EXACT = {"BMP", "DCX", "DDS", "DIB", "FTEX", "ICO", "IM", "JPEG2000", "PCX", "PIXAR", "PNG", "PPM", "PSD", "QOI"}
EXACT |= {"CUR", "SGI", "SUN", "TGA", "TIFF"}
GREY = {"FITS", "FLI", "GBR", "MCIDAS"}
"""These files have the picture in grey."""
NEARLY = {"AVIF": 8, "GIF": 16, "JPEG": 8, "ICNS": 1, "WEBP": 8}
"""Largest difference in grey levels, at the quality above."""


def content(name: str) -> bytes:
    file = FILES[name]
    return file if isinstance(file, bytes) else file()


@pytest.mark.parametrize("name", sorted(ACCEPTED.keys() - {"HEIF"}))
def test_every_accepted_format_is_decoded(name: str):
    decoded = decode_image(content(name))
    assert decoded.mode == "RGB"
    expected = smooth(decoded.size).convert("L").convert("RGB") if name in GREY else smooth(decoded.size)
    difference = np.abs(np.asarray(decoded, int) - np.asarray(expected, int)).max()
    if name in EXACT | GREY:
        assert difference == 0
    elif name in NEARLY:
        assert difference <= NEARLY[name]
    else:  # two colours, few colours, or a picture that is too large to write here
        assert decoded.size in (SIZE, (768, 512))


def test_heif_is_decoded_with_its_extra():
    from pillow_heif import from_pillow

    stream = io.BytesIO()
    from_pillow(smooth((64, 64))).save(stream, quality=95)
    decoded = decode_image(stream.getvalue())
    assert np.abs(np.asarray(decoded, int) - np.asarray(smooth((64, 64)), int)).max() <= 8


def test_heif_names_its_extra_where_that_is_missing():
    """In a process of its own: whatever Pillow has once been taught, it keeps."""
    code = (
        "import sys; sys.modules['pillow_heif'] = None\n"
        "from sae_ray.images import decode_image\n"
        "decode_image(b'\\0\\0\\0\\x18ftypheic\\0\\0\\0\\0mif1heic')"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "BadImage: unsupported format: HEIF; pip install 'sae-ray[heif]'" in ended.stderr


NAMED = {
    "BUFR": b"BUFR\0\0\0\4",
    "EPS": encoded(smooth(), "EPS"),
    "GRIB": b"GRIB\0\0\0\1" + bytes(64),
    "HDF5": b"\x89HDF\r\n\x1a\n" + bytes(64),
    "MPEG": b"\0\0\1\xb3\x03\x00\x20",
    "WMF": b"\xd7\xcd\xc6\x9a\0\0" + bytes(64),
}
"""Files of the refused formats that have a signature, and need no other package to be told by it."""


@pytest.mark.parametrize("name", REFUSED)
def test_every_refused_format_is_refused(name: str):
    if name in NAMED:
        assert reason(NAMED[name]) == f"unsupported format: {name}"
    else:
        imt = b"*\n* a comment\nwidth 4\nheight 2\n\x0c\0\0\0\0\0\0\0\0"
        olefile = bytes.fromhex("d0cf11e0a1b11ae1") + bytes(504)
        iptc = b"\x1c\x03\x3c\0\2\1\0"
        assert reason({"IMT": imt, "IPTC": iptc}.get(name, olefile)).startswith(("not an image", "unsupported format"))


BEGINNINGS = {
    "BPG": b"BPG\xfb",
    "DICOM": bytes(128) + b"DICM\2\0",
    "DjVu": b"AT&TFORM\0\0\0\0DJVU",
    "FLIF": b"FLIF1",
    "JPEG-LS": b"\xff\xd8\xff\xf7\0\x0b\x08",
    "JPEG XL": b"\xff\x0a\xfa\x1f",
    "JPEG XR": b"II\xbc\1\x20",
    "KTX": b"\xabKTX 11\xbb\r\n\x1a\n",
    "NIfTI": struct.pack("<I340s4s", 348, b"", b"n+1\0"),
    "OpenEXR": b"v/1\1\2",
    "PSB": b"8BPS\0\2" + bytes(20),
    "Radiance HDR": b"#?RADIANCE\n",
    "XCF": b"gimp xcf v011\0",
    "camera RAW": b"\0\0\0\x18ftypcrx \0\0\0\1",
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_formats_that_pillow_does_not_know_are_refused_by_name(name: str):
    assert reason(BEGINNINGS[name]) == f"unsupported format: {name}"
    if name == "JPEG XL":
        assert reason(b"\0\0\0\x0cJXL \r\n\x87\n") == "unsupported format: JPEG XL"


def test_every_format_of_pillow_is_accepted_or_refused():
    """A new Pillow may read more."""
    Image.init()
    known = set(Image.OPEN)
    assert known <= ACCEPTED.keys() | REFUSED.keys()
    assert not ACCEPTED.keys() & REFUSED.keys()
    assert FILES.keys() | {"HEIF"} == ACCEPTED.keys()


def test_the_documentation_lists_the_formats():
    page = DOCS.read_text(encoding="utf-8")
    for table in (ACCEPTED, REFUSED):
        rows = "\n".join(f"| {name} | {text} |" for name, text in table.items())
        assert rows in page, f"docs/inputs.md is stale; its rows must be\n{rows}"
    assert f"by name: {', '.join(UNKNOWN)}." in page.replace("\n", " ")


def test_text_is_no_image_of_a_format_without_signature():
    for text in (b"image_id,label\na.jpg,cat\n", b"Name: x\nwidth: 4\n", "width 4\n".encode("utf-16"), bytes(2000)):
        assert reason(text).startswith("not an image")


# Limits

HUGE = (16_000, 16_000)
SIZES = {
    **{name: ("<II",) for name in ("BMP", "DIB", "DDS", "FTEX")},
    **{name: (">II",) for name in ("AVIF", "GBR", "JPEG2000", "PSD", "QOI", "SUN")},
    **{name: ("<HH",) for name in ("GIF", "FLI", "PIXAR", "TGA")},
    "SGI": (">HH",),
}
"""How a format's header has width and height, in this order or the other."""


def bomb(name: str) -> bytes:
    data = content(name)
    for code in SIZES[name]:
        for size in (SIZE, SIZE[::-1]):
            data = data.replace(struct.pack(code, *size), struct.pack(code, *HUGE))
    return data


def icon_of(png: bytes) -> bytes:
    return struct.pack("<3H4B2H2I", 0, 1, 1, 0, 0, 0, 0, 1, 32, len(png), 22) + png


def bitmap_icon() -> bytes:
    data = encoded(smooth((16, 16)), "ICO", bitmap_format="bmp", sizes=[(16, 16)])
    return data.replace(struct.pack("<ii", 16, 32), struct.pack("<ii", HUGE[0], 2 * HUGE[1]))


def mac_icon_of(picture: bytes) -> bytes:
    return b"icns" + struct.pack(">I4sI", 16 + len(picture), b"ic10", 8 + len(picture)) + picture


def tiff_bomb() -> bytes:
    data = bytearray(encoded(smooth(), "TIFF"))
    (first,) = struct.unpack_from("<I", data, 4)
    for entry in range(first + 2, first + 2 + 12 * data[first], 12):
        tag, kind = struct.unpack_from("<HH", data, entry)
        if tag in (256, 257):
            struct.pack_into("<I" if kind == 4 else "<H", data, entry + 8, HUGE[0])
    return bytes(data)


def pcx_bomb() -> bytes:
    data = bytearray(encoded(smooth(), "PCX"))
    struct.pack_into("<HH", data, 8, HUGE[0] - 1, HUGE[1] - 1)
    return bytes(data)


BOMBS = {
    **{name: bomb(name) for name in SIZES},
    "JPEG": jpeg_bomb(*HUGE),
    "PNG": png_bomb(*HUGE),
    "PPM": content("PPM").replace(b"48 32", b"16000 16000"),
    "FITS": content("FITS").replace(b"   48", b"16000").replace(b"   32", b"16000"),
    "XPM": content("XPM").replace(b"48 32", b"16000 16000"),
    "TIFF": tiff_bomb(),
    "PCX": pcx_bomb(),
    "ICO of a PNG": icon_of(png_bomb(*HUGE)),
    "ICO of a bitmap": bitmap_icon(),
    "CUR": b"\0\0\2\0" + bitmap_icon()[4:],
    "ICNS of a PNG": mac_icon_of(png_bomb(*HUGE)),
    "ICNS of a JPEG 2000": mac_icon_of(bomb("JPEG2000")),
}


@pytest.mark.parametrize("name", BOMBS)
def test_the_pixels_are_counted_before_they_are_decoded(name: str):
    assert reason(BOMBS[name]).startswith(("pixel bomb: 16000x16000", "pixel bomb: Image size (256000000 pixels)"))


@pytest.mark.parametrize("name", sorted(FILES))
def test_a_lower_limit_holds_for_every_format(name: str):
    """As the server sets it."""
    width, height = decode_image(content(name)).size
    with pytest.raises(BadImage, match=f"^pixel bomb: {width}x{height}$"):
        decode_image(content(name), max_pixels=width * height - 1)


@pytest.mark.parametrize("name", ["AVIF", "BMP", "GIF", "JPEG", "PNG", "PPM", "TGA", "TIFF", "WEBP"])
def test_the_aspect_is_limited_for_every_format(name: str):
    assert reason(encoded(Image.new("RGB", (2010, 10)), name)) == "aspect ratio: 2010x10"


def test_a_file_of_too_many_bytes_is_not_even_read(tmp_path: Path):
    smooth().save(tmp_path / "a.png")
    names, sizes = ["a.png", "b.png"], [0, BYTE_LIMIT + 1]  # there is no b.png
    decoded = decode_part(Folder(tmp_path), names, [Preparation(pixels)], sizes=sizes)
    assert decoded.accepted.tolist() == [0]
    assert decoded.rejects == [("b.png", "too large: 1,073,741,825 bytes")]


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).transpose(2, 0, 1)


# Metadata


def chunk(kind: bytes, data: bytes, checksum: int | None = None) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", checksum or zlib.crc32(kind + data))


def segment(marker: int, data: bytes) -> bytes:
    return bytes([0xFF, marker]) + struct.pack(">H", len(data) + 2) + data


BOMB = zlib.compress(bytes(70 * 2**20))
CHUNKS = {
    "a text of 70 MB": chunk(b"zTXt", b"k\0\0" + BOMB),
    "an international text of 70 MB": chunk(b"iTXt", b"k\0\1\0\0\0" + BOMB),
    "a profile of 70 MB": chunk(b"iCCP", b"k\0\0" + BOMB),
    "70 texts of 1 MB": 70 * chunk(b"tEXt", b"k\0" + b"a" * 2**20),
    "a text with a wrong checksum": chunk(b"tEXt", b"k\0a", 1),
    "a text that does not inflate": chunk(b"zTXt", b"k\0\0junk"),
    "a text of an unknown compression": chunk(b"zTXt", b"k\0\7junk"),
    "a profile of an unknown compression": chunk(b"iCCP", b"k\0\7junk"),
    "an empty profile": chunk(b"iCCP", b""),
    "EXIF data that are none": chunk(b"eXIf", b"junk"),
    "a short pHYs": chunk(b"pHYs", b"\0"),
    "a pHYs with a wrong checksum": chunk(b"pHYs", bytes(9), 1),
    "a short gAMA": chunk(b"gAMA", b"\0"),
    "a short cHRM": chunk(b"cHRM", b"\0"),
    "an empty sRGB": chunk(b"sRGB", b""),
    "a short tRNS": chunk(b"tRNS", b""),
    "an animation without frames": chunk(b"acTL", bytes(3)),
    "an unknown chunk with a wrong checksum": chunk(b"abCd", b"x", 1),
}
SEGMENTS = {
    "EXIF data that are none": segment(0xE1, b"Exif\0\0junk"),
    "EXIF data that loop": segment(0xE1, b"Exif\0\0II*\0\x08\0\0\0\1\0\x69\x87\4\0\1\0\0\0\x08\0\0\0"),
    "a profile that is none": segment(0xE2, b"ICC_PROFILE\0\1\1junk"),
    "a profile with missing parts": segment(0xE2, b"ICC_PROFILE\0\1\x09junk"),
    "a profile without numbers": segment(0xE2, b"ICC_PROFILE\0"),
    "a profile of 12 MB": b"".join(
        segment(0xE2, b"ICC_PROFILE\0" + bytes([n, 200]) + bytes(60_000)) for n in range(200)
    ),
    "Photoshop's blocks, cut off": segment(0xED, b"Photoshop 3.0\x008BIM\x03\xed\0"),
    "several pictures, damaged": segment(0xE2, b"MPF\0junk"),
    "a comment that is no text": segment(0xFE, b"\xff\xfe\0"),
    "a short JFIF": segment(0xE0, b"JFIF\0"),
    "a short Adobe": segment(0xEE, b"Adobe"),
}


@pytest.mark.parametrize("after", [False, True], ids=["before the pixels", "after them"])
@pytest.mark.parametrize("what", CHUNKS)
def test_what_is_wrong_with_the_metadata_of_a_png_is_ignored(what: str, after: bool):
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(noise(), exif=exif)
    place = len(data) - 12 if after else 33
    decoded = decode_image(data[:place] + CHUNKS[what] + data[place:])
    upright = noise().transpose(Image.Transpose.ROTATE_270)
    assert decoded.tobytes() == (noise() if decoded.size == noise().size else upright).tobytes()
    assert decoded.size == upright.size or "EXIF" in what, "of two orientations, either may hold"


@pytest.mark.parametrize("what", SEGMENTS)
def test_what_is_wrong_with_the_metadata_of_a_jpeg_is_ignored(what: str):
    data = encoded(noise(), "JPEG")
    assert decode_image(data[:2] + SEGMENTS[what] + data[2:]).tobytes() == decode_image(data).tobytes()


def webp() -> bytes:
    return encoded(
        noise(), "WEBP", lossless=True, exif=b"Exif\0\0MM\0*\0\0\0\x08\0\0", icc_profile=b"x" * 10, xmp=b"<x/>"
    )


@pytest.mark.parametrize("cut", [1, 5, 12, 24], ids=lambda cut: f"{cut} bytes missing")
def test_a_webp_whose_metadata_are_cut_off_is_whole(cut: str):
    assert decode_image(webp()[:-cut]).tobytes() == noise().tobytes()


@pytest.mark.parametrize("length", [0, 1, 7, 100, 2**32 - 1])
@pytest.mark.parametrize("kind", [b"EXIF", b"XMP "])
def test_a_webp_with_metadata_of_a_wrong_length_is_whole(kind: bytes, length: int):
    data, place = webp(), webp().index(kind)
    assert (
        decode_image(data[: place + 4] + struct.pack("<I", length) + data[place + 8 :]).tobytes() == noise().tobytes()
    )


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("value", [(1, 2**31, 0), (2, 50, 2**32 - 10), (99, 1, 0), (5, 2**20, 8)], ids=str)
@pytest.mark.parametrize("tag", [270, 34675, 282, 700], ids=["text", "profile", "resolution", "XMP"])
def test_a_tiff_with_damaged_metadata_is_decoded(tag: int, value: tuple[int, int, int]):
    options = {"description": "hello" * 10, "icc_profile": b"x" * 100, "dpi": (72, 72), "tiffinfo": {700: b"<x/>" * 10}}
    data = bytearray(encoded(noise(), "TIFF", **options))
    (first,) = struct.unpack_from("<I", data, 4)
    entries = range(first + 2, first + 2 + 12 * data[first], 12)
    [entry] = [entry for entry in entries if struct.unpack_from("<H", data, entry) == (tag,)]
    struct.pack_into("<HII", data, entry + 2, *value)
    assert decode_image(bytes(data)).tobytes() == noise().tobytes()


@pytest.mark.parametrize("place", range(0, 40, 3))
def test_an_avif_with_damaged_exif_data_is_decoded(place: int):
    exif = Image.Exif()
    exif[270] = "hello hello hello"
    data = bytearray(encoded(smooth(), "AVIF", exif=exif))
    start = data.index(b"hello") - 30
    data[start + place : start + place + 3] = b"\xff\xff\xff"
    assert decode_image(bytes(data)).size == SIZE


XMP = b'<rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="6"/>'
PROFILE = "\nexif\n 34\n" + (b"Exif\0\0II*\0\x08\0\0\0\1\0\x12\1\3\0\1\0\0\0\6" + bytes(7)).hex() + "\n"
TURNED_ELSEWHERE = {
    "a JPEG by XMP data": lambda: encoded(noise(), "JPEG", xmp=XMP),
    "a WebP by XMP data": lambda: encoded(noise(), "WEBP", xmp=XMP),
    "a PNG by XMP data": lambda: png_with_text("XML:com.adobe.xmp", XMP.decode()),
    "a PNG by a text of ImageMagick": lambda: png_with_text("Raw profile type exif", PROFILE),
}


def png_with_text(key: str, text: str) -> bytes:
    texts = PngInfo()
    texts.add_itxt(key, text)
    return encoded(noise(), pnginfo=texts)


@pytest.mark.parametrize("what", TURNED_ELSEWHERE)
def test_only_exif_data_turn_an_image_as_in_browsers(what: str):
    data = TURNED_ELSEWHERE[what]()
    with Image.open(io.BytesIO(data)) as image:
        assert image.getexif()[0x0112] == 6, "Pillow would turn it"
    assert decode_image(data).size == noise().size


@pytest.mark.parametrize("bits", [10, 14, 24])
def test_a_tiff_of_unusual_depth_is_not_called_truncated(bits: int):
    data = tiff_of_twelve_bits().replace(struct.pack("<HHII", 258, 4, 1, 12), struct.pack("<HHII", 258, 4, 1, bits))
    assert reason(data) == "unreadable: unknown pixel mode"


@pytest.mark.parametrize("missing", [2, 10, 300])
def test_a_jpeg_whose_last_bytes_are_missing_says_so(missing: int):
    assert reason(encoded(noise(size=(120, 90)), "JPEG")[:-missing]) == "truncated"


# The range of values


def greys(data: bytes, white: int | None = None) -> list[int]:
    return np.asarray(decode_image(data, rendering=Rendering(white=white)))[0, :, 0].tolist()


pytestmark = pytest.mark.filterwarnings("ignore:IM image format is deprecated", "ignore::UserWarning:PIL")

TWELVE = np.array([[0, 16, 2048, 4095]], np.uint16)
SCALED = [0, 1, 128, 255]


def tiff(values: np.ndarray, **tags: int) -> bytes:
    numbers = {"smallest": 280, "largest": 281, "largest_signed": 341, "photometric": 262}
    return encoded(Image.fromarray(values), "TIFF", tiffinfo={numbers[name]: value for name, value in tags.items()})


def tiff_of_twelve_bits() -> bytes:
    """4 × 1, 12 bits per sample, without padding."""
    tags = [(256, 4), (257, 1), (258, 12), (259, 1), (262, 1), (273, 8), (277, 1), (278, 1), (279, 6)]
    packed = (0 << 36 | 16 << 24 | 2048 << 12 | 4095).to_bytes(6, "big")
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    return b"II*\0" + struct.pack("<I", 14) + packed + struct.pack("<H", len(tags)) + entries + bytes(4)


def png_with_sbit(values: np.ndarray, bits: int) -> bytes:
    data = encoded(Image.fromarray(values))
    return data[:33] + chunk(b"sBIT", bytes([bits])) + data[33:]


def pgm(values: np.ndarray, largest: int) -> bytes:
    return f"P5 {values.shape[1]} {values.shape[0]} {largest}\n".encode() + values.astype(">u2").tobytes()


def test_twelve_bits_in_sixteen_are_scaled_by_what_the_file_declares():
    assert greys(tiff_of_twelve_bits()) == SCALED
    assert greys(tiff(TWELVE, largest=4095)) == SCALED
    assert greys(png_with_sbit(TWELVE, 12)) == SCALED
    assert greys(pgm(TWELVE, 4095)) == SCALED
    assert greys(tiff(TWELVE + 1000, smallest=1000, largest=5095)) == SCALED


def test_a_png_whose_values_were_scaled_up_is_left_alone():
    """As the PNG specification asks: sBIT tells where the values come from, not what they are."""
    assert greys(png_with_sbit(TWELVE << 4 | TWELVE >> 8, 12)) == SCALED
    dark = (TWELVE >> 4) << 4
    assert greys(png_with_sbit(dark, 12)) == greys(encoded(Image.fromarray(dark)))


def test_what_declares_nothing_takes_a_setting():
    for data in (
        encoded(Image.fromarray(TWELVE)),
        tiff(TWELVE),
        pgm(TWELVE, 65_535),
        encoded(Image.fromarray(TWELVE), "PPM"),
    ):
        assert max(greys(data)) == 16
        assert greys(data, white=4095) == SCALED
    assert greys(encoded(Image.fromarray(TWELVE)), white=2048) == [0, 2, 255, 255]


def test_a_negative_tiff_is_turned():
    assert greys(tiff(np.array([[0, 65_535]], np.uint16), photometric=0)) == [255, 0]


def test_values_without_a_white_are_stretched():
    hounsfield = np.array([[-1024, 0, 3071]], np.int32)
    assert greys(tiff(hounsfield)) == [0, 64, 255]
    assert greys(tiff(hounsfield.astype(np.float32) / 7)) == [0, 64, 255]
    assert greys(tiff(np.array([[np.nan, 0, 1]], np.float32))) == [0, 0, 255]
    assert greys(tiff(np.full((1, 2), 5.0, np.float32))) == [0, 0]


def is_marked(data: bytes) -> bool:
    return DIM in decode_image(data).info


def test_deep_images_that_are_almost_black_are_marked():
    assert is_marked(encoded(Image.fromarray(TWELVE)))
    assert not is_marked(encoded(Image.fromarray(TWELVE << 2)))
    assert not is_marked(png_with_sbit(TWELVE, 12))
    assert not is_marked(encoded(Image.new("L", (4, 4), 3)))
    assert not is_marked(encoded(Image.new("RGB", (4, 4))))
    assert is_marked(deep_png(2, [(4095, 0, 100)]))
    assert is_marked(deep_png(4, [(4095, 65_535)]))


def deep_png(colour_type: int, pixels: list[tuple[int, ...]], *before: bytes, depth: int = 16) -> bytes:
    """One row."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", len(pixels), 1, depth, colour_type, 0, 0, 0))
    if depth == 16:
        row = b"".join(struct.pack(">H", value) for one in pixels for value in one)
    else:
        row = sum(value << depth * (8 // depth - 1 - place) for place, (value,) in enumerate(pixels)).to_bytes(1, "big")
    return (
        b"\x89PNG\r\n\x1a\n"
        + header
        + b"".join(before)
        + chunk(b"IDAT", zlib.compress(b"\0" + row))
        + chunk(b"IEND", b"")
    )


def test_a_part_names_the_images_that_are_almost_black(tmp_path: Path):
    for name, values in {"a.png": TWELVE, "b.png": TWELVE << 4, "c.png": TWELVE}.items():
        Image.fromarray(np.tile(values, (4, 1))).save(tmp_path / name)
    names = ["a.png", "b.png", "c.png"]
    assert decode_part(Folder(tmp_path), names, [Preparation(pixels)]).dim == ["a.png", "c.png"]
    white = decode_part(Folder(tmp_path), names, [Preparation(pixels)], rendering=Rendering(white=4095))
    assert white.dim == []
    assert white.pixels[0][0, 0, 0].tolist() == SCALED


# Transparency


def over_white(colour: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    alpha = alpha[..., None].astype(float)
    return np.rint((colour * alpha + 255 * (255 - alpha)) / 255)


@pytest.mark.parametrize("name", ["PNG", "WEBP", "TIFF", "ICO", "TGA", "QOI", "JPEG2000", "DDS"])
def test_transparent_images_are_composed_over_a_background(name: str):
    size = (32, 32)
    image = noise("RGBA", size)
    options = {"lossless": True, "exact": True} if name == "WEBP" else {"sizes": [size]} if name == "ICO" else {}
    data = encoded(image, name, **options)
    values = np.asarray(image)
    expected = over_white(values[..., :3], values[..., 3])
    assert np.abs(np.asarray(decode_image(data, rendering=ON_WHITE)) - expected).max() <= 1
    assert decode_image(data).tobytes() == image.convert("RGB").tobytes()


@pytest.mark.parametrize("mode", ["LA", "La", "RGBa", "PA"])
def test_every_mode_with_transparency(mode: str):
    image = noise("RGBA").convert("LA" if mode in ("LA", "La") else "RGBA")
    if mode in ("La", "RGBa"):  # as TIFF files with premultiplied alpha come
        image = image.convert(mode)
    elif mode == "PA":
        image = Image.new("PA", image.size)
    assert rendered(image, b"", ON_WHITE).mode == rendered(image, b"", Rendering()).mode == "RGB"
    clear = Image.new(mode, (1, 1))
    assert rendered(clear, b"", ON_WHITE).getpixel((0, 0)) == (255, 255, 255)


KEYS = {
    "palette": encoded(Image.new("P", (2, 1)), transparency=0),
    "palette with alpha": encoded(Image.new("P", (2, 1)), transparency=b"\0"),
    "GIF": encoded(Image.new("P", (2, 1)), "GIF", transparency=0),
    "grey": encoded(Image.new("L", (2, 1), 7), transparency=7),
    "RGB": encoded(Image.new("RGB", (2, 1), (1, 2, 3)), transparency=(1, 2, 3)),
    "grey of 1 bit": deep_png(0, [(1,)], chunk(b"tRNS", b"\0\1"), depth=1),
    "grey of 2 bits": deep_png(0, [(2,)], chunk(b"tRNS", b"\0\2"), depth=2),
    "grey of 4 bits": deep_png(0, [(9,)], chunk(b"tRNS", b"\0\x09"), depth=4),
    "grey of 16 bits": deep_png(0, [(0x1234,)], chunk(b"tRNS", b"\x12\x34")),
    "RGB of 16 bits": deep_png(2, [(0x1234, 0x5678, 0x9ABC)], chunk(b"tRNS", bytes.fromhex("123456789abc"))),
    "grey and alpha of 16 bits": deep_png(4, [(0x1234, 0)]),
    "RGB and alpha of 16 bits": deep_png(6, [(1, 2, 3, 0)]),
}


@pytest.mark.parametrize("what", KEYS)
def test_a_transparent_colour_is_the_background(what: str):
    decoded = decode_image(KEYS[what], rendering=Rendering(background=(10, 200, 30)))
    assert decoded.getpixel((0, 0)) == (10, 200, 30)
    assert decode_image(KEYS[what]).getpixel((0, 0)) != (10, 200, 30)


def test_opaque_images_do_not_depend_on_the_background():
    for mode in ("1", "L", "P", "RGB"):
        data = encoded(noise("RGB").convert(mode))
        assert decode_image(data, rendering=ON_WHITE).tobytes() == decode_image(data).tobytes()
    for mode in ("CMYK", "YCbCr", "L"):
        data = encoded(noise("RGB").convert(mode), "TIFF")
        assert decode_image(data, rendering=ON_WHITE).tobytes() == decode_image(data).tobytes()


def test_lab_is_converted():
    data = encoded(
        ImageCms.profileToProfile(smooth(), *map(ImageCms.createProfile, ("sRGB", "LAB")), outputMode="LAB"), "TIFF"
    )
    assert np.abs(np.asarray(decode_image(data), int) - np.asarray(smooth(), int)).mean() < 4
