"""What the vision tower makes of every training image: computed once and kept, since the tower never changes."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open
from safetensors.torch import save

from sae_ray.encoders import Site, load_encoder, load_preprocess
from sae_ray.errors import SaeRayError
from sae_ray.images.part import Preparation, decode_part
from sae_ray.steering.info import LlavaInfo
from sae_ray.store.files import Folder
from tools.llava.progress import Progress, Rate

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

PER_PART = 256
BATCH = 32
NAME = "features"


def compute_features(
    info: LlavaInfo, images: Folder, image_ids: Sequence[str], folder: Folder, device: str, progress: Progress
) -> None:
    """Writes what the language model of a LLaVA will read of each image, before the projector, as float16.

    Parts appear whole and are never written again, so that the next call goes on where this one was killed. An image
    that cannot be read is left out, and told of.

    Args:
        info: of the LLaVA; the tower is read from its directory.
        images: the folder of the images.
        image_ids: paths below it.
        folder: gets `part-00000.safetensors` with `features` [images, tokens, width], and `part-00000.json` with their
            `image_ids`, and so on.

    Raises:
        SaeRayError: No image can be read.
    """
    encoder = load_encoder(info.tower.model, info.tower.revision, device)
    preparation = Preparation(load_preprocess(info.tower.model, info.tower.revision))
    site = Site("residual", info.layer, "all")
    written, rate = 0, None
    for number, start in enumerate(range(0, len(image_ids), PER_PART)):
        wanted = list(image_ids[start : start + PER_PART])
        if not folder.exists(f"part-{number:05d}.json"):
            rate = rate or Rate(start, len(image_ids), "images")
            part = decode_part(images, wanted, [preparation])
            for image_id, reason in part.rejects:
                progress.say(f"{image_id} is left out: {reason}")
            kept = [wanted[place] for place in part.accepted]
            rows = []
            for low in range(0, len(kept), BATCH):
                pixels, some = torch.from_numpy(part.pixels[0][low : low + BATCH]), kept[low : low + BATCH]
                rows.append(encoder.tap(pixels, [site], some, 0)[site].activation.unflatten(0, (len(some), -1)))
                progress(f"vision tower: {rate.line(start + low + len(some))}")
            if kept:
                # LLaVA drops the first token, or none.
                features = torch.cat(rows)[:, info.tower.n_tokens - info.n_image_tokens :].half().cpu().contiguous()
                folder.write_bytes(f"part-{number:05d}.safetensors", save({NAME: features}))
            folder.write_json(f"part-{number:05d}.json", {"image_ids": kept})  # last: it makes the part exist
        written += len(folder.read_json(f"part-{number:05d}.json")["image_ids"])
    if not written:
        raise SaeRayError(f"none of the {len(image_ids):,} images in {images} can be read; give a folder of images")


class Features:
    """The features of a folder that `compute_features` has written, read from disk as they are asked for."""

    def __init__(self, folder: Folder):
        self.image_ids: list[str] = []
        self._files: list = []
        self._places: list[tuple[int, int]] = []
        with ExitStack() as opened:
            for name in [name for name in folder.files() if name.endswith(".json")]:
                kept = folder.read_json(name)["image_ids"]
                if kept:
                    path = folder.path_of(name.replace(".json", ".safetensors"))
                    self._files.append(opened.enter_context(safe_open(path, "pt")).get_slice(NAME))
                    self._places += [(len(self._files) - 1, row) for row in range(len(kept))]
                    self.image_ids += kept
            self._opened = opened.pop_all()

    def __len__(self) -> int:
        return len(self.image_ids)

    def rows(self, places: Sequence[int]) -> Float[Tensor, "places tokens width"]:
        """float32, of the images at these places of `image_ids`."""
        found = (self._places[place] for place in places)
        return torch.cat([self._files[file][row : row + 1] for file, row in found]).float()

    def close(self) -> None:
        self._opened.close()
