"""Activations of images in this process, without a study: for notebooks and scripts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import torch

from sae_ray.encoders.info import check_site
from sae_ray.encoders.loading import load_encoder, load_preprocess
from sae_ray.encoders.part import encode_part
from sae_ray.encoders.sites import Site
from sae_ray.errors import SaeRayError, UsageError, check
from sae_ray.images.decode import BadImage, decode_image
from sae_ray.images.manifest import list_images
from sae_ray.images.part import DecodedPart, Preparation, decode_part
from sae_ray.store.activations import Rows
from sae_ray.store.files import Folder

if TYPE_CHECKING:
    from jaxtyping import Float

IMAGES_PER_PART = 512
"""As in a study, so that batches are formed alike."""


@dataclass(frozen=True, eq=False, repr=False)
class Extracted:
    """Activations of some images at some sites. `extracted["layer11:cls"]` is an array [rows, d]."""

    image_ids: list[str]
    """By `image_index`, also of images that could not be read: paths below the folder, or what names an image."""
    rejects: dict[str, str]
    """Of these `image_id` -> reason."""
    rows: dict[str, Rows]
    """By site, as it was asked for; sorted by image and token."""

    def __getitem__(self, site: str) -> Float[np.ndarray, "rows d"]:
        return self._rows(site).activation

    def __repr__(self) -> str:
        shapes = ", ".join(f"{site!r}: {list(self[site].shape)}" for site in self.rows)
        return f"Extracted({len(self.image_ids)} images, {len(self.rejects)} rejects, {{{shapes}}})"

    def table(self, site: str) -> pa.Table:
        """`image_id`, and the columns of an activation store: `image_index`, `token`, `activation`."""
        rows = self._rows(site)
        return rows.table().add_column(0, "image_id", pa.array(self.image_ids).take(pa.array(rows.image_index)))

    def _rows(self, site: str) -> Rows:
        check(site in self.rows, "site", site, f"choose one that was asked for: {', '.join(self.rows)}")
        return self.rows[site]


def extract(
    images: Any,
    model: str | Path,
    sites: str | Sequence[str],
    *,
    revision: str | None = None,
    device: str | None = None,
    dtype: str = "float32",
    store_dtype: str = "float32",
    batch_size: int = 64,
    seed: int = 0,
    progress: bool = True,
) -> Extracted:
    """Runs images through an encoder by the code of a study's extraction, in this process.

    Args:
        images: a folder, local or as a URI, or a sequence of paths of files or of Pillow images, such as a column of a
            Hugging Face dataset. Images that cannot be read are left out and named in `rejects`.
        model: the encoder, as `encoder.model` of a study: a hub id, a directory, `open_clip:…` or `timm:…`.
        sites: where to tap it, as `grid.sites` of a study: `layer11:cls`, `projection` …; all in one forward pass.
        revision: commit, tag or branch of what is on the hub.
        device: cuda where there is one, by default.
        dtype: of the forward pass.
        store_dtype: of what is returned, `float16` or `float32`.
        batch_size: images per forward pass.
        seed: of the draw of `random:n`.
        progress: show a bar.

    Raises:
        UsageError: the model or a site does not exist, the folder does not.
        SaeRayError: no image can be read; an activation is not finite or does not fit into `store_dtype`.
    """
    check(store_dtype in ("float16", "float32"), "store_dtype", store_dtype, "choose float16 or float32")
    check(bool(sites), "sites", sites, "name at least one")
    asked = {site: Site.parse(site) for site in ([sites] if isinstance(sites, str) else sites)}
    check(
        isinstance(model, str | Path) and bool(str(model)), "model", model, "name the encoder: a hub id or a directory"
    )
    check(batch_size >= 1, "batch_size", batch_size, "make it at least 1")
    model = str(model)
    encoder = load_encoder(model, revision, device or ("cuda" if torch.cuda.is_available() else "cpu"), dtype)
    for site in asked.values():
        check_site(encoder.info, site)
    preparation = Preparation(load_preprocess(model, revision))
    ids, parts = _parts(images, preparation)
    found: dict[str, list[Rows]] = {site: [] for site in asked}
    rejects: dict[str, str] = {}
    from tqdm.auto import tqdm

    with tqdm(total=len(ids), unit="image", disable=not progress) as bar:
        first = 0
        for part in parts:
            rejects |= dict(part.rejects)
            kept = [ids[first + place] for place in part.accepted]
            wanted = [(site, store_dtype) for site in asked.values()]
            if kept:
                encoded = encode_part(encoder, wanted, part.pixels[0], first + part.accepted, kept, seed, batch_size)
                for site, rows in zip(asked, encoded, strict=True):
                    found[site].append(rows)
            first += len(part.accepted) + len(part.rejects)
            bar.update(first - bar.n)
    if not any(found.values()):
        first, reason = next(iter(rejects.items()))
        raise SaeRayError(f"none of the {len(ids)} images can be read; {first}: {reason}")
    return Extracted(ids, rejects, {site: _joined(rows) for site, rows in found.items()})


def _parts(images: Any, preparation: Preparation) -> tuple[list[str], Iterator[DecodedPart]]:
    """The ids of all images, and the images part by part."""
    if isinstance(images, str | Path):
        folder = Folder(images)
        ids: list[str] = list_images(folder, "none").manifest["image_id"].to_pylist()
        return ids, (decode_part(folder, [ids[one] for one in part], [preparation]) for part in _ranges(len(ids)))
    check(not hasattr(images, "columns"), "images", type(images).__name__, "give one of its columns")
    if hasattr(images, "iloc"):  # a column of pandas, whose numbers need not count its places
        images = images.tolist()
    n = len(images) if hasattr(images, "__len__") else 0
    check(n > 0, "images", type(images).__name__, "give a folder, or a list of paths or Pillow images")
    named = isinstance(images[0], str | Path)
    ids = [str(one) for one in images] if named else [f"{place:0{len(str(n - 1))}}" for place in range(n)]
    return ids, (_decoded([(ids[one], images[one]) for one in part], preparation) for part in _ranges(n))


def _ranges(n: int) -> Iterator[range]:
    return (range(start, min(start + IMAGES_PER_PART, n)) for start in range(0, n, IMAGES_PER_PART))


def _decoded(images: Sequence[tuple[str, Any]], preparation: Preparation) -> DecodedPart:
    accepted, rejects, pixels = [], [], []
    for place, (image_id, image) in enumerate(images):
        try:
            pixels.append(preparation.preprocess(_opened(image)))
            accepted.append(place)
        except BadImage as error:
            rejects.append((image_id, error.reason))
    stacked = np.stack(pixels) if pixels else np.empty((0, 3, 0, 0), np.uint8)
    return DecodedPart(np.array(accepted, np.int64), rejects, [stacked], [], {})


def _opened(image: Any) -> Any:
    """As RGB."""
    if hasattr(image, "convert"):
        return image.convert("RGB")
    if not isinstance(image, str | Path):
        raise UsageError(
            f"images: {type(image).__name__} is no Pillow image and no path; convert it, as Image.fromarray does"
        )
    try:
        return decode_image(Path(image).expanduser().read_bytes())
    except OSError as error:
        raise BadImage(f"could not be read: {error.strerror}") from error


def _joined(rows: Sequence[Rows]) -> Rows:
    return Rows(*(np.concatenate(column) for column in zip(*rows, strict=True)))
