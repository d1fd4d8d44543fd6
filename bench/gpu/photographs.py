"""JPEGs that decode like photographs, and a CLIP's preprocessing of them."""

from __future__ import annotations

import json
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

from bench.gpu.models import CLIP_MEAN, CLIP_STD
from bench.gpu.sizes import Sizes

SIZE = (500, 375)


def photograph(seed: int) -> Image.Image:
    """Smooth shapes of several sizes and some grain."""
    rng = np.random.default_rng(seed)
    width, height = SIZE
    total = np.full((height, width, 3), 128.0)
    for edge, amount in ((125, 55), (32, 25), (8, 12)):
        coarse = rng.normal(0, amount, (height // edge + 2, width // edge + 2, 3))
        channels = [Image.fromarray(coarse[..., c].astype(np.float32)) for c in range(3)]
        total += np.stack([np.asarray(one.resize(SIZE, Image.Resampling.BICUBIC)) for one in channels], axis=-1)
    total += rng.normal(0, 17, (height, width, 1))
    return Image.fromarray(total.round().clip(0, 255).astype(np.uint8))


def write_photographs(folder: Path, n: int) -> list[str]:
    """Writes `n` JPEGs; returns their names."""
    names = [f"{number:04d}.jpg" for number in range(n)]
    for number, name in enumerate(names):
        out = BytesIO()
        photograph(number).save(out, "JPEG", quality=90)
        (folder / name).write_bytes(out.getvalue())
    return names


def write_clip_config(folder: Path, sizes: Sizes) -> None:
    """The configuration of a CLIP vision tower and its preprocessing: a model without weights."""
    from transformers import CLIPVisionConfig

    edge = sizes.vision["image_size"]
    config = CLIPVisionConfig(**sizes.vision)
    config.architectures = ["CLIPVisionModelWithProjection"]
    config.save_pretrained(folder)
    processing = {
        "image_processor_type": "CLIPImageProcessor", "do_resize": True, "size": {"shortest_edge": edge}, "resample": 3,
        "do_center_crop": True, "crop_size": {"height": edge, "width": edge}, "do_rescale": True,
        "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": CLIP_MEAN, "image_std": CLIP_STD,
        "do_convert_rgb": True,
    }  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(processing), encoding="utf-8")
