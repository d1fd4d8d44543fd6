"""JPEGs that are decoded, turned, resized and cropped on a GPU, where an encoder then reads them."""

from __future__ import annotations

import math
import socket
from collections.abc import Iterator, Mapping, Sequence
from io import BytesIO
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from sae_ray.encoders.resizing import cut_tensor
from sae_ray.errors import UsageError
from sae_ray.images.formats import BadImage
from sae_ray.images.jpegs import Jpeg
from sae_ray.images.part import DecodedPart, Preparation, prepared_image
from sae_ray.images.rendering import Rendering

if TYPE_CHECKING:
    from jaxtyping import UInt8

AT_ONCE = 64
"""Files that are decoded by one call, at most."""
PIXELS_AT_ONCE = 2**26
"""Of the files of one call, unless a single one has more: 200 MB of a GPU once they are decoded."""


def check_decoder(device: torch.device) -> None:
    """Raises UsageError where torchvision cannot decode JPEGs on this device."""
    from PIL import Image

    file = BytesIO()
    Image.new("RGB", (32, 32), "teal").save(file, "JPEG")
    try:
        _decode([np.frombuffer(file.getvalue(), np.uint8)], device)
    except Exception as error:  # it depends on how torchvision was built, and on the driver
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UsageError(
            f"extraction.pixels = 'gpu': torchvision cannot decode JPEGs on the GPU of {socket.gethostname()} "
            f"({reason}); install one that is built with CUDA and nvJPEG, or choose exact or fast"
        ) from error


def decoded_on_gpu(
    part: DecodedPart,
    image_ids: Sequence[str],
    preparations: Sequence[Preparation],
    image_sizes: Sequence[tuple[int, int]],
    device: torch.device,
    rendering: Rendering | None = None,
) -> tuple[DecodedPart, list[UInt8[Tensor, "n 3 h w"]]]:
    """The part with all images decoded, and their pixels on the device, once for every preparation.

    A file that cannot be decoded or cut there is decoded exactly, and rejected if that fails, too. Rejects are in the
    order of the images.

    Args:
        part: as `decode_part` gives it with `for_gpu`.
        image_ids: of all images of the part.
        preparations: those that it was decoded with; their `preprocess` has a `cut`.
        image_sizes: height and width that they yield.
        rendering: how other pixels become RGB, as in `decode_part`.

    Raises UsageError where the memory of the GPU does not suffice.
    """
    try:
        return _decoded(part, image_ids, preparations, image_sizes, device, rendering)
    except torch.OutOfMemoryError as error:
        width, height = max((file.size for file in part.jpegs.values()), key=math.prod, default=(0, 0))
        raise UsageError(
            f"extraction.pixels = 'gpu': the memory of {device} on {socket.gethostname()} does not suffice to decode "
            f"images of up to {width} x {height} pixels beside the encoder; choose exact or fast, or lower "
            "extraction.images_per_part or resources.extract.batch_size"
        ) from error


def _decoded(
    part: DecodedPart,
    image_ids: Sequence[str],
    preparations: Sequence[Preparation],
    image_sizes: Sequence[tuple[int, int]],
    device: torch.device,
    rendering: Rendering | None,
) -> tuple[DecodedPart, list[UInt8[Tensor, "n 3 h w"]]]:
    n, kept = len(part.accepted), np.ones(len(part.accepted), bool)
    pixels = [torch.empty(n, 3, *size, dtype=torch.uint8, device=device) for size in image_sizes]
    exact = [place for place in range(n) if place not in part.jpegs]
    if exact:
        for whole, some in zip(pixels, part.pixels, strict=True):
            whole[torch.tensor(exact, device=device)] = torch.from_numpy(some).to(device)
    rejects = list(part.rejects)
    for chunk in _chunks(part.jpegs):
        for place, image in zip(chunk, _images([part.jpegs[one] for one in chunk], device), strict=True):
            try:
                rows = _cut(image, preparations)
                if rows is None:
                    arrays, _ = prepared_image(preparations, rendering, part.jpegs[place].data.tobytes())
                    rows = [torch.from_numpy(array) for array in arrays]
            except BadImage as error:
                kept[place] = False
                rejects.append((image_ids[int(part.accepted[place])], error.reason))
                continue
            for whole, row in zip(pixels, rows, strict=True):
                whole[place] = row
    if not kept.all():
        pixels = [whole[torch.from_numpy(kept).to(device)] for whole in pixels]
    place_of = {image_id: place for place, image_id in enumerate(image_ids)}
    rejects.sort(key=lambda reject: place_of[reject[0]])
    dropped = {image_id for image_id, _ in rejects}
    dim = [image_id for image_id in part.dim if image_id not in dropped]
    return DecodedPart(part.accepted[kept], rejects, [], dim, {}), pixels


def _chunks(files: Mapping[int, Jpeg]) -> Iterator[list[int]]:
    """Their places, as many as are decoded by one call."""
    chunk: list[int] = []
    pixels = 0
    for place in sorted(files):
        own = math.prod(files[place].size)
        if chunk and (len(chunk) == AT_ONCE or pixels + own > PIXELS_AT_ONCE):
            yield chunk
            chunk, pixels = [], 0
        chunk.append(place)
        pixels += own
    if chunk:
        yield chunk


def _cut(image: Tensor | None, preparations: Sequence[Preparation]) -> list[Tensor] | None:
    """Once for every preparation; None where one has to do more than resizing and cropping."""
    if image is None:
        return None
    height, width = image.shape[1:]
    cuts = [one.preprocess.cut((width, height)) for one in preparations]  # pyright: ignore[reportFunctionMemberAccess]
    return None if None in cuts else [cut_tensor(image, cut) for cut in cuts]


def _images(files: Sequence[Jpeg], device: torch.device) -> list[UInt8[Tensor, "3 h w"] | None]:
    """Upright; None for those that cannot be decoded, which does not depend on the others."""
    try:
        found = _decode([file.data for file in files], device)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:
        return [None] if len(files) == 1 else [one for file in files for one in _images([file], device)]
    sizes = [(image.shape[2], image.shape[1]) for image in found]
    return [
        turned(image, file.orientation) if size == file.size else None
        for image, file, size in zip(found, files, sizes, strict=True)
    ]


def _decode(files: Sequence[Any], device: torch.device) -> list[UInt8[Tensor, "3 h w"]]:
    from torchvision.io import ImageReadMode, decode_jpeg

    found: Any = decode_jpeg([torch.from_numpy(file) for file in files], ImageReadMode.RGB, device)
    return found


def turned(image: UInt8[Tensor, "3 h w"], orientation: int) -> UInt8[Tensor, "3 H W"]:
    """Upright, by the number that EXIF has for how it is stored."""
    if orientation >= 5:  # lies on its side
        image = image.transpose(1, 2)
    mirrored = {2: (2,), 3: (1, 2), 4: (1,), 6: (2,), 7: (1, 2), 8: (1,)}.get(orientation)
    return image.flip(mirrored) if mirrored else image
