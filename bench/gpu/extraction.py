"""From pixels to activations: the forward pass, the taps and their way to the host."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import torch

from bench.gpu.in_turn import in_turn
from bench.gpu.models import info_of, make_clip
from bench.gpu.sizes import Sizes
from bench.gpu.timing import milliseconds
from bench.record import Table
from sae_ray.encoders.base import Encoder
from sae_ray.encoders.part import encode_part
from sae_ray.encoders.sites import Site

ROUNDS = 5


def forwards(sizes: Sizes, device: torch.device) -> Iterator[Table]:
    table = Table(
        title=f"Forward pass of {clip_title(sizes)}, random weights, pixels on the GPU",
        columns=["products in", "batch", "ms", "images/s"],
        rows=[],
    )

    def row(products: str, encoder: Encoder, batch: int, rounds: int) -> Table:
        ms = milliseconds(device, bare_forward(sizes, encoder, batch), rounds)
        table["rows"].append([products, batch, round(ms, 1), round(1000 * batch / ms)])
        return table

    encoder = make_clip(sizes, device, torch.bfloat16)
    for batch in sizes.images:
        yield row("bfloat16", encoder, batch, ROUNDS)
    encoder = make_clip(sizes, device, torch.float32)
    yield row("float32", encoder, sizes.images[0], 2)
    torch.set_float32_matmul_precision("high")
    try:
        yield row("TF32, weights and the rest in float32", encoder, sizes.images[0], 2)
    finally:
        torch.set_float32_matmul_precision("highest")


def taps(sizes: Sizes, device: torch.device) -> Iterator[Table]:
    """`encode_part` on one part: uint8 pixels in the CPU's memory to float16 rows there."""
    encoder = make_clip(sizes, device, torch.bfloat16)
    edge, n = sizes.vision["image_size"], sizes.scored
    pixels = np.random.default_rng(0).integers(0, 256, (n, 3, edge, edge), dtype=np.uint8)
    ids, index = [str(number) for number in range(n)], np.arange(n)
    deepest = sizes.vision["num_hidden_layers"] - 1
    cls = [f"layer{deepest}:cls"]
    ways = [
        ("CLS token of the last block", cls, sizes.images[0]),
        ("CLS token of the last block", cls, sizes.images[-1]),
        (f"CLS token of {len(sizes.sites) - 1} blocks, and projection", list(sizes.sites), sizes.images[-1]),
        ("2 random tokens of the last block", [f"layer{deepest}:random:2"], sizes.images[-1]),
        ("all tokens of the last block", [f"layer{deepest}:all"], sizes.images[-1]),
    ]
    table = Table(
        title=f"Activations of a part of {n} images, {clip_title(sizes)}, bfloat16, from and to the CPU's memory",
        columns=["sites", "batch", "images/s", "time / bare forward", "MB to the host"],
        rows=[],
    )
    bare_ms: dict[int, float] = {}
    for what, names, batch in ways:
        if batch not in bare_ms:
            bare_ms[batch] = milliseconds(device, bare_forward(sizes, encoder, batch), ROUNDS) / batch
            table["rows"].append(["none: bare forward, pixels on the GPU", batch, round(1000 / bare_ms[batch]), 1.0, 0])
        stored = [(Site.parse(name), "float16") for name in names]
        run = partial(encode_part, encoder, stored, pixels, index, ids, 0, batch)
        megabytes = sum(one.activation.nbytes for one in run()) / 1e6  # also the warm-up
        ms = milliseconds(device, run, 2, warmup=0) / n
        table["rows"].append([what, batch, round(1000 / ms), round(ms / bare_ms[batch], 3), round(megabytes)])
        yield table
    if device.type == "cuda":
        batch = torch.from_numpy(pixels[: sizes.images[-1]])
        run = partial(encoder.tap, batch, [Site.parse(ways[-1][1][0])], ids[: len(batch)], 0)
        ms = milliseconds(device, run, 2) / len(batch)
        row = ["all tokens of the last block, left on the GPU (Encoder.tap alone)", len(batch)]
        table["rows"].append([*row, round(1000 / ms), round(ms / bare_ms[len(batch)], 3), 0])
        yield table


def transfers(sizes: Sizes, device: torch.device) -> Iterator[Table]:
    if device.type != "cuda":
        return
    table = Table(title="Copies between GPU and host", columns=["what", "MB", "ms", "GB/s"], rows=[])
    n_rows = sizes.scored * info_of(sizes, "clip").n_tokens
    rows = torch.zeros(n_rows, sizes.d_in, dtype=torch.float16, device=device)
    pinned = torch.empty(rows.shape, dtype=rows.dtype, pin_memory=True)
    ready = torch.ones(rows.shape, dtype=rows.dtype)  # not zeros, whose pages would not exist yet
    edge = sizes.vision["image_size"]
    pixels = torch.ones(sizes.images[-1], 3, edge, edge, dtype=torch.uint8)
    part = f"all tokens of {sizes.scored} images in float16, to the host: "
    batch = f"pixels of {sizes.images[-1]} images, to the GPU: "
    pinned_pixels = pixels.pin_memory()
    copies = {
        part + "new pageable memory, as `.cpu()` takes it": (rows, lambda: rows.cpu()),
        part + "pageable memory already in use": (rows, lambda: ready.copy_(rows)),
        part + "pinned memory": (rows, lambda: pinned.copy_(rows, non_blocking=True)),
        batch + "from pageable memory": (pixels, lambda: pixels.to(device)),
        batch + "from pinned memory": (pixels, lambda: pinned_pixels.to(device, non_blocking=True)),
    }
    for what, (copied, run) in copies.items():
        ms = milliseconds(device, run, 3, warmup=1)
        table["rows"].append([what, round(copied.nbytes / 1e6), round(ms, 1), round(copied.nbytes / ms / 1e6, 1)])
    yield table


def bare_forward(sizes: Sizes, encoder: Encoder, batch: int) -> Any:
    edge = sizes.vision["image_size"]
    pixels = torch.randn(batch, 3, edge, edge, device=encoder.device, dtype=encoder.dtype)
    return torch.inference_mode()(lambda: encoder.tower.module(pixel_values=pixels))


def clip_title(sizes: Sizes) -> str:
    vision = sizes.vision
    return f"CLIP ({vision['num_hidden_layers']} layers, width {vision['hidden_size']}, {vision['image_size']} pixels)"


tables = in_turn(forwards, taps, transfers)
