"""A part of a set of images through an encoder with compiled blocks, and through the same one as it is."""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import torch

from bench.gpu.extraction import bare_forward, clip_title
from bench.gpu.in_turn import free, reason
from bench.gpu.models import make_clip
from bench.gpu.sizes import Sizes
from bench.gpu.timing import milliseconds
from bench.record import Table
from sae_ray.encoders.base import Encoder
from sae_ray.encoders.part import encode_part
from sae_ray.encoders.sites import Site

ROUNDS = 3


def tables(sizes: Sizes, device: torch.device) -> Iterator[Table]:
    if device.type != "cuda":
        return
    batch = sizes.images[-1]
    n = sizes.scored + batch // 4
    table = Table(
        title=f"A part of {n} images with and without `compile`, {clip_title(sizes)}, bfloat16, batch {batch}",
        columns=["what", "images/s", "times as it is", "smallest cosine to as it is", "seconds of the first batch"],
        rows=[],
    )
    edge = sizes.vision["image_size"]
    pixels = np.random.default_rng(0).integers(0, 256, (n, 3, edge, edge), dtype=np.uint8)
    deepest = sizes.vision["num_hidden_layers"] - 1
    one, several = [f"layer{deepest}:cls"], [*sizes.sites[:-1], f"layer{deepest}:random:2"]
    plain: dict[str, tuple[float, list[np.ndarray]]] = {}
    for compiled in (False, True):
        torch.manual_seed(0)
        encoder = make_clip(sizes, device, torch.bfloat16)
        seconds = 0.0
        if compiled:
            try:
                encoder.compile()
                began = time.perf_counter()
                encode(encoder, one, pixels[:batch], batch)
                seconds = time.perf_counter() - began
            except Exception as error:  # needs a compiler on this machine
                table["rows"].append([f"compiled: {reason(error)}", "", "", "", ""])
                yield table
                return
        for what, names in (("CLS token of the last block", one), (f"{len(several)} sites", several)):
            run = partial(encode, encoder, names, pixels, batch)
            found = run()  # also the warm-up
            rate = 1000 * n / milliseconds(device, run, ROUNDS, warmup=0)
            if not compiled:
                plain[what] = rate, found
            before, expected = plain[what]
            near = min(smallest_cosine(*pair) for pair in zip(found, expected, strict=True))
            way = "compiled" if compiled else "as it is"
            table["rows"].append([f"{what}, {way}", round(rate), round(rate / before, 3), round(near, 5),
                                  round(seconds, 1)])  # fmt: skip
            yield table
        if compiled:
            repeated = all(np.array_equal(*pair) for pair in zip(found, run(), strict=True))
            table["rows"].append(["the same bits again" if repeated else "OTHER BITS at a second time", "", "", "", ""])
        else:
            ms = milliseconds(device, bare_forward(sizes, encoder, batch), ROUNDS) / batch
            table["rows"].append(["bare forward, as it is, pixels on the GPU", round(1000 / ms), "", "", ""])
        yield table
        del encoder, run
        free(device)


def encode(encoder: Encoder, names: list[str], pixels: np.ndarray, batch: int) -> list[Any]:
    stored, n = [(Site.parse(name), "float16") for name in names], len(pixels)
    parts = encode_part(encoder, stored, pixels, np.arange(n), [str(number) for number in range(n)], 0, batch)
    return [rows.activation for rows in parts]


def smallest_cosine(ours: np.ndarray, theirs: np.ndarray) -> float:
    one, other = (torch.from_numpy(rows).float() for rows in (ours, theirs))
    return torch.nn.functional.cosine_similarity(one, other, dim=1).min().item()
