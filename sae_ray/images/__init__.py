"""Images: the manifest of a folder, its labels, its split, and the decoding of one file.

A manifest lists every file of a folder in a fixed order, so that an image's index is the same on every machine. Labels
are kept apart from it. A file that cannot be decoded is rejected with a reason, never skipped silently."""

from typing import TYPE_CHECKING

from sae_ray.lazy import exports

if TYPE_CHECKING:
    from sae_ray.images.decode import PIXEL_LIMIT as PIXEL_LIMIT
    from sae_ray.images.decode import BadImage as BadImage
    from sae_ray.images.decode import decode_image as decode_image
    from sae_ray.images.manifest import ImageList as ImageList
    from sae_ray.images.manifest import list_images as list_images
    from sae_ray.images.manifest import manifest_digest as manifest_digest
    from sae_ray.images.manifest import select_split as select_split

__getattr__ = exports(
    __name__,
    {
        "decode": ["PIXEL_LIMIT", "BadImage", "decode_image"],
        "manifest": ["ImageList", "list_images", "manifest_digest", "select_split"],
    },
)
