"""Which file formats are read: by what reader of Pillow, and what is refused."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cache, partial
from io import BytesIO
from typing import TYPE_CHECKING

from sae_ray.errors import SaeRayError
from sae_ray.images.imposters import not_an_image

if TYPE_CHECKING:
    from PIL import Image

ACCEPTED = {
    "JPEG": "`.jpg`",
    "PNG": "`.png`, of 1 to 16 bits; of an APNG the first frame",
    "WEBP": "`.webp`; the first frame",
    "AVIF": "`.avif`; the first frame",
    "BLP": "`.blp`, textures of Blizzard's games",
    "BMP": "`.bmp`",
    "CUR": "`.cur`, cursors of Windows",
    "DCX": "`.dcx`, several PCX; the first one",
    "DDS": "`.dds`, textures of DirectX",
    "DIB": "`.dib`, a BMP without file header",
    "FITS": "`.fits`, astronomy",
    "FLI": "`.fli`, `.flc`; the first frame",
    "FTEX": "`.ftc`, `.ftu`, textures of Independence War 2",
    "GBR": "`.gbr`, brushes of GIMP",
    "GIF": "`.gif`; the first frame",
    "HEIF": "`.heic`, `.heif`, with the extra `heif`",
    "ICNS": "`.icns`; the largest icon",
    "ICO": "`.ico`; the largest icon",
    "IM": "`.im`, IFUNC",
    "JPEG2000": "`.jp2`, `.j2k`, of up to 16 bits",
    "MCIDAS": "McIDAS area files, satellites",
    "MSP": "`.msp`, Microsoft Paint",
    "PCD": "`.pcd`, Photo CD; at 768 × 512 pixels",
    "PCX": "`.pcx`",
    "PIXAR": "`.pxr`, Pixar",
    "PPM": "`.pbm`, `.pgm`, `.ppm`, `.pnm`, `.pfm`",
    "PSD": "`.psd`, Photoshop; the merged picture",
    "QOI": "`.qoi`",
    "SGI": "`.sgi`, `.rgb`",
    "SPIDER": "`.spi`, electron microscopy; the first picture",
    "SUN": "`.ras`, Sun raster",
    "TGA": "`.tga`",
    "TIFF": "`.tif`; the first page",
    "XBM": "`.xbm`",
    "XPM": "`.xpm`",
    "XVTHUMB": "thumbnails of XV",
}
"""Pillow's name of a format -> which files those are."""
REFUSED = {
    "BUFR": "weather data, which Pillow recognises but cannot decode",
    "EPS": "a program, which Pillow has Ghostscript run",
    "FPX": "FlashPix, which Pillow cannot read by itself",
    "GRIB": "weather data, which Pillow recognises but cannot decode",
    "HDF5": "measurements, which Pillow recognises but cannot decode",
    "IMT": "has no signature, so that other files pass for it",
    "IPTC": "has no signature, so that other files pass for it",
    "MIC": "Microsoft Image Composer, which Pillow cannot read by itself",
    "MPEG": "video, which Pillow recognises but cannot decode",
    "WMF": "drawing commands, which Pillow can only have Windows run",
}
"""Pillow's name of a format -> why it is not read."""
UNKNOWN = {
    "BPG": rb"BPG\xfb",
    "DICOM": rb".{128}DICM",
    "DjVu": rb"AT&TFORM",
    "FLIF": rb"FLIF",
    "JPEG-LS": rb"\xff\xd8\xff\xf7",
    "JPEG XL": rb"\xff\x0a|\0\0\0\x0cJXL \r\n",
    "JPEG XR": rb"II\xbc",
    "KTX": rb"\xabKTX ",
    "NIfTI": rb".{344}n[+i]1\0",
    "OpenEXR": rb"v/1\x01",
    "PSB": rb"8BPS\0\x02",
    "Radiance HDR": rb"#\?R",
    "XCF": rb"gimp xcf ",
    "camera RAW": rb"....ftypcrx |FUJIFILMCCD-RAW|IIR[OS]|MMOR|IIU\0|II\x1a\0\0\0HEAPCCDR|FOVb|\0MRM",
}
"""Formats that Pillow does not know -> how their files begin."""
SUFFIXES = (
    "jpg jpeg jpe jfif png apng webp avif bmp gif heic heif ico jp2 j2k jpx pbm pgm ppm pnm pcx psd qoi tga tif tiff"
)
"""Of files that are images by their names. Their content decides what they are."""
HEIF = re.compile(rb"....ftyp(heic|heix|hevc|hevx|heim|heis|mif1|msf1)", re.DOTALL)
PNG = b"\x89PNG\r\n\x1a\n"
JPEG2000 = (b"\xff\x4f\xff\x51", b"\0\0\0\x0cjP  \r\n\x87\n")

Size = tuple[int, int]
"""Width and height in pixels."""
Reader = Callable[[BytesIO, str], "Image.Image"]


class BadImage(SaeRayError):
    """A file that is not a usable image. `reason` is short and stable, for the table of rejects."""

    @property
    def reason(self) -> str:
        return str(self)


def open_image(data: bytes, check: Callable[[Size], None]) -> Image.Image:
    """Reads the header of a file: the image has its size and no pixels yet.

    Args:
        data: The content of the file.
        check: Called with the size before anything is decoded; raises BadImage if that is too large.

    Raises BadImage as `sae_ray.images.decode_image`.
    """
    from PIL import Image

    refusal = None
    for reader, signed in _readers(data, check):
        stream = BytesIO(data)
        try:
            image = reader(stream, "")
            check(image.size)
            return image
        except BadImage:
            raise
        except Image.DecompressionBombError as error:
            raise BadImage(f"pixel bomb: {error}") from error
        except Exception as error:  # a damaged file can make a reader raise anything
            if signed and refusal is None:
                # A truncated header leaves the reader at the end of the file, as does the directory of a TIFF there.
                cut = stream.tell() >= len(data) and "unknown pixel mode" not in str(error)
                refusal = BadImage("truncated" if cut else reason_of(error))
    unsupported = _unsupported(data)
    raise BadImage(unsupported) if unsupported else refusal or BadImage(not_an_image(data))


def reason_of(error: Exception) -> str:
    """A decoder's own words, in short."""
    message = str(error) or type(error).__name__
    return "truncated" if "truncated" in message.lower() else f"unreadable: {message.splitlines()[0][:80]}"


def _readers(data: bytes, check: Callable[[Size], None]) -> Iterator[tuple[Reader, bool]]:
    """What may read a file, and whether the file has its signature. `Image.open` would hide the size of a bomb."""
    from PIL import Image, JpegImagePlugin, PngImagePlugin, WebPImagePlugin

    # What most files are needs no other plugins loaded.
    if data.startswith(b"\xff\xd8\xff"):
        yield JpegImagePlugin.JpegImageFile, True
    elif data.startswith(PNG):
        yield PngImagePlugin.PngImageFile, True
    elif data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        if len(data) < int.from_bytes(data[4:8], "little") + 8:
            raise BadImage("truncated")
        yield WebPImagePlugin.WebPImageFile, True
    else:
        _load_plugins()
        readers: dict[str, Reader] = {name: reader for name, (reader, _) in Image.OPEN.items()}
        readers |= {"ICO": partial(_icon, check=check), "ICNS": partial(_mac_icon, check=check)}
        known = [name for name in ACCEPTED if name in readers]
        yield from ((readers[name], True) for name in known if _signed(name, data))
        yield from ((readers[name], False) for name in known if Image.OPEN[name][1] is None)


@cache
def _load_plugins() -> None:
    from PIL import Image

    Image.init()
    with suppress(ImportError):
        from pillow_heif import register_heif_opener

        register_heif_opener()


def _signed(name: str, data: bytes) -> bool:
    """Whether a file has the signature of a format. TGA and a few others have none."""
    from PIL import Image

    accept = Image.OPEN[name][1]
    answer = accept is not None and accept(data[:16].ljust(16, b"\0"))  # some look at more than a short file has
    return bool(answer) and not isinstance(answer, str)  # words tell what Pillow was built without


def _unsupported(data: bytes) -> str | None:
    from PIL import Image

    if HEIF.match(data) and b"avif" not in data[:64] and "HEIF" not in Image.OPEN:
        return "unsupported format: HEIF; pip install 'sae-ray[heif]'"
    named = [name for name in REFUSED if name in Image.OPEN and _signed(name, data)]
    named += [name for name, begins in UNKNOWN.items() if re.match(begins, data[:400], re.DOTALL)]
    return f"unsupported format: {named[0]}" if named else None


def _icon(stream: BytesIO, filename: str, check: Callable[[Size], None]) -> Image.Image:
    """The largest picture of an icon, which Pillow's own reader decodes before its size can be known."""
    from PIL import BmpImagePlugin, IcoImagePlugin, PngImagePlugin

    icon = IcoImagePlugin.IcoFile(stream)
    place = icon.entry[0].offset
    stream.seek(place)
    signature = stream.read(len(PNG))
    stream.seek(place)
    if signature == PNG:
        return PngImagePlugin.PngImageFile(stream, filename)
    width, height = BmpImagePlugin.DibImageFile(stream, filename).size
    check((width, height // 2))  # the lower half is its mask
    return icon.frame(0)


def _mac_icon(stream: BytesIO, filename: str, check: Callable[[Size], None]) -> Image.Image:
    """The largest picture of an icon. If it is a file of its own, Pillow's own reader does not tell its true size."""
    from PIL import IcnsImagePlugin, Jpeg2KImagePlugin, PngImagePlugin

    icon = IcnsImagePlugin.IcnsFile(stream)
    best = icon.bestsize()
    for code, _ in icon.SIZES[best]:
        start, length = icon.dct.get(code, (0, 0))
        stream.seek(start)
        picture = BytesIO(stream.read(length))
        if picture.getvalue().startswith(PNG):
            return PngImagePlugin.PngImageFile(picture, filename)
        if picture.getvalue().startswith(JPEG2000):
            return Jpeg2KImagePlugin.Jpeg2KImageFile(picture, filename)
    return icon.getimage(best)  # bare pixels, at most 128 × 128
