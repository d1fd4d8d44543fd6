"""How pixels become RGB with 8 bits where files leave that open: transparency, and the range of values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from sae_ray.images.metadata import significant_bits

if TYPE_CHECKING:
    from jaxtyping import Shaped, UInt8
    from PIL import Image

DIM = "sae_ray_dim"
"""In the `info` of an image whose file has more than 8 bits per value and uses less than an eighth of their range."""
EIGHTH = 32
"""Of 256 grey levels."""


@dataclass(frozen=True)
class Rendering:
    """What is decided for all images of a set. The defaults are the conventions of CLIP's own preprocessing."""

    background: tuple[int, int, int] | None = None
    """RGB of what transparent images are composed over. None drops the transparency: the colours under it show."""
    white: int | None = None
    """The value that is white in grey images of more than 8 bits. None: as the file declares, see `_declared`."""


ON_WHITE = Rendering(background=(255, 255, 255))
"""As browsers show images, and as vLLM gives them to models."""


def rgb(colour: str) -> tuple[int, int, int]:
    """A colour by its name or as `#rrggbb`. Raises ValueError if it is none."""
    from PIL.ImageColor import getrgb

    found: Any = getrgb(colour)
    red, green, blue = found  # a fourth value would be its opacity
    return red, green, blue


def rendered(image: Image.Image, data: bytes, rendering: Rendering) -> Image.Image:
    """Converts a decoded image to RGB as `convert("RGB")` does it, apart from what that gets wrong or leaves open.

    Args:
        image: As Pillow decodes it.
        data: The file it comes from.
    """
    if image.mode[0] in "IF":
        image = _grey(image, data, rendering.white)
    elif image.mode == "LAB":
        image = _from_lab(image)
    if rendering.background is not None and image.has_transparency_data:
        return _composed(image, data, rendering.background)
    if image.mode == "RGB":
        return image  # convert() would copy it
    if image.mode in ("P", "PA", "La", "RGBa") and image.has_transparency_data:
        image = _with_alpha(image)  # converting directly to RGB warns, or cannot be done
    return image.convert("RGB")


def is_deep(image: Image.Image) -> bool:
    """Whether an image that is not decoded yet has more than 8 bits per value."""
    return image.mode[0] == "I" or any(";16" in str(tile[3]) for tile in getattr(image, "tile", ()))


def is_dim(image: Image.Image) -> bool:
    """Whether an RGB image is almost black."""
    extrema: Any = image.getextrema()
    return max(highest for _, highest in extrema) < EIGHTH


def _composed(image: Image.Image, data: bytes, background: tuple[int, int, int]) -> Image.Image:
    from PIL import Image

    key, depth = image.info.get("transparency"), data[24] if image.format == "PNG" else 8
    # Pillow leaves the transparent colour of a PNG in the depth of the file, though not the pixels.
    if image.mode == "L" and depth in (2, 4) and isinstance(key, int):
        image.info["transparency"] = key * (255 // (2**depth - 1))
    elif image.mode == "RGB" and depth == 16 and isinstance(key, tuple):
        image.info["transparency"] = tuple(value >> 8 for value in key)
    seen = _with_alpha(image)
    composed = Image.new("RGB", image.size, background)
    composed.paste(seen.convert("RGB"), mask=seen.getchannel("A"))
    return composed


def _with_alpha(image: Image.Image) -> Image.Image:
    return image.convert("LA").convert("RGBA") if image.mode == "La" else image.convert("RGBA")


def _from_lab(image: Image.Image) -> Image.Image:
    from PIL import ImageCms

    lab, srgb = (ImageCms.createProfile(name) for name in ("LAB", "sRGB"))
    converted = ImageCms.profileToProfile(image, lab, srgb, outputMode="RGB")
    assert converted is not None
    return converted


def _grey(image: Image.Image, data: bytes, white: int | None) -> Image.Image:
    """Grey of 16 or 32 bits, or floating point, as 8 bits. A transparent value becomes an alpha channel."""
    from PIL import Image

    values = np.asarray(image)
    ends = (0, white) if white is not None else _declared(image, values, data) or _found(values)
    if image.format == "TIFF" and _tag(image, 262) == 0:  # white is zero
        ends = ends[::-1]
    grey = Image.fromarray(_scaled(values, *ends))
    key = image.info.get("transparency")
    if isinstance(key, int):
        grey.putalpha(Image.fromarray(np.where(values == key, 0, 255).astype(np.uint8)))
    return grey


def _scaled(values: Shaped[np.ndarray, "h w"], black: float, white: float) -> UInt8[np.ndarray, "h w"]:
    """`black` to 0, `white` to 255; what is outside is clipped, and what is not a number becomes black."""
    if values.dtype == np.uint16:
        return _scaled(np.arange(2**16), black, white)[values]
    shares = (values.astype(np.float64) - black) / ((white - black) or 1)
    return np.rint(np.clip(np.nan_to_num(shares), 0, 1) * 255).astype(np.uint8)


def _declared(image: Image.Image, values: Shaped[np.ndarray, "h w"], data: bytes) -> tuple[float, float] | None:
    """The values that are black and white by the format or by the file.

    A TIFF declares them by its bits per sample, or by its smallest and largest sample value. A PNG of 16 bits uses all
    of them, except one whose sBIT chunk tells of fewer and whose values were not scaled up, as they ought to be.
    """
    match image.format:
        case "PPM":
            return (0, 1) if image.mode == "F" else (0, 65_535)  # Pillow scales by what the header declares
        case "TIFF":
            low, high = (_tag(image, signed) or _tag(image, plain) or 0 for signed, plain in ((340, 280), (341, 281)))
            if high > low:
                return low, high
            bits = _tag(image, 258) or 16
            return (0, 2**bits - 1) if _tag(image, 339) in (None, 1) and bits <= 16 else None
        case "PNG":
            bits = significant_bits(data) or 16
            bare = bits < 16 and values.max() < 2**bits and (values % 2 ** (16 - bits) > 1).any()
            return 0, 2 ** (bits if bare else 16) - 1
    return (0, 65_535) if image.mode.startswith("I;16") else None


def _found(values: Shaped[np.ndarray, "h w"]) -> tuple[float, float]:
    """The smallest and the largest value."""
    finite = values[np.isfinite(values)]
    return (float(finite.min()), float(finite.max())) if finite.size else (0, 1)


def _tag(image: Any, number: int) -> Any:
    """A tag of a TIFF file, its first value if there are several."""
    value = image.tag_v2.get(number)
    return value[0] if isinstance(value, tuple) else value
