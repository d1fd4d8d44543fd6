"""The forward pass of an encoder with compiled blocks."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from typing import Any

import torch

from bench.gpu.extraction import bare_forward, clip_title
from bench.gpu.in_turn import reason
from bench.gpu.models import make_clip
from bench.gpu.sizes import Sizes
from bench.gpu.timing import milliseconds
from bench.record import Table
from sae_ray.encoders.sites import Site


def tables(sizes: Sizes, device: torch.device) -> Iterator[Table]:
    if device.type != "cuda":
        return
    batch = sizes.images[-1]
    table = Table(
        title=f"Forward pass with compiled blocks, {clip_title(sizes)}, bfloat16, batch {batch}",
        columns=["what", "ms", "images/s"],
        rows=[],
    )
    encoder = make_clip(sizes, device, torch.bfloat16)
    edge = sizes.vision["image_size"]
    pixels = torch.randint(0, 256, (batch, 3, edge, edge), dtype=torch.uint8)
    ids = [str(number) for number in range(batch)]
    sites = [Site.parse(f"layer{sizes.vision['num_hidden_layers'] - 1}:cls")]
    bare = bare_forward(sizes, encoder, batch)

    def tapped() -> None:
        for one in encoder.tap(pixels, sites, ids, 0).values():
            one.activation.cpu()

    def row(what: str, run: Any) -> None:
        ms = milliseconds(device, run, 3)
        table["rows"].append([what, round(ms, 1), round(1000 * batch / ms)])

    row("as it is", bare)
    row("as it is, with the CLS token of the last block", tapped)
    yield table
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # processes of its own would outlive a stop
    try:
        for block in encoder.tower.blocks:
            block.forward = torch.compile(block.forward)
        began = time.perf_counter()
        bare()
        torch.cuda.synchronize(device)
        seconds = time.perf_counter() - began
        row(f"compiled, which took {seconds:.0f} s", bare)
        row("compiled, with the CLS token of the last block", tapped)
    except Exception as error:  # needs a compiler on this machine
        table["rows"].append([f"compiled: {reason(error)}", "", ""])
    yield table
