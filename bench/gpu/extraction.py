"""From JPEGs to activations: the forward pass, the taps and their way to the host, and the decoding before them."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.gpu.in_turn import in_turn
from bench.gpu.models import info_of, make_clip
from bench.gpu.photographs import SIZE, write_clip_config, write_photographs
from bench.gpu.sizes import Sizes
from bench.gpu.timing import milliseconds
from bench.record import Table
from sae_ray.encoders import load_preprocess
from sae_ray.encoders.base import Encoder
from sae_ray.encoders.part import encode_part
from sae_ray.encoders.sites import Site
from sae_ray.images import decode_image
from sae_ray.images.part import Preparation, decode_part
from sae_ray.store.files import Folder

ROUNDS = 5
PROCESSES = (1, 4, 8, 16)
DECODED = 64
"""Photographs that every process decodes."""
DECODED_ON_GPU = 200


def forwards(sizes: Sizes, device: torch.device) -> Iterator[Table]:
    table = Table(
        title=f"Forward pass of {_clip(sizes)}, random weights, pixels on the GPU",
        columns=["products in", "batch", "ms", "images/s"],
        rows=[],
    )

    def row(products: str, encoder: Encoder, batch: int, rounds: int) -> Table:
        ms = milliseconds(device, _bare(sizes, encoder, batch), rounds)
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
        title=f"Activations of a part of {n} images, {_clip(sizes)}, bfloat16, from and to the CPU's memory",
        columns=["sites", "batch", "images/s", "time / bare forward", "MB to the host"],
        rows=[],
    )
    bare_ms: dict[int, float] = {}
    for what, names, batch in ways:
        if batch not in bare_ms:
            bare_ms[batch] = milliseconds(device, _bare(sizes, encoder, batch), ROUNDS) / batch
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


def decoding(sizes: Sizes, device: torch.device) -> Iterator[Table]:
    """Read, decode, resize and crop photographs as the extraction stage's tasks do: processes of one thread each."""
    edge = sizes.vision["image_size"]
    counts = [count for count in PROCESSES if count <= len(os.sched_getaffinity(0))]
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        names = write_photographs(Path(folder), DECODED if device.type == "cuda" else 4)
        kilobytes = sum((Path(folder) / name).stat().st_size for name in names) / len(names) / 1000
        write_clip_config(Path(folder), sizes)
        table = Table(
            title=f"JPEGs of {SIZE[0]} × {SIZE[1]} pixels and {kilobytes:.0f} KB, decoded and resized to {edge}",
            columns=["processes", 'images/s, pixels = "exact"', 'images/s, pixels = "fast"'],
            rows=[],
        )
        started = context.Barrier(counts[-1] + 1)
        with context.Pool(counts[-1], _start, (folder, edge, started)) as pool:
            started.wait(timeout=40)
            for count in counts:
                rates = []
                for way in ("exact", "fast"):
                    began = time.perf_counter()
                    pool.map(_decode, [(way, names)] * count, chunksize=1)
                    rates.append(round(count * len(names) / (time.perf_counter() - began)))
                table["rows"].append([count, *rates])
                yield table


_worker: dict[str, Any] = {}


def _start(folder: str, edge: int, started: Any) -> None:
    torch.set_num_threads(1)
    fast = Preparation(load_preprocess(folder, fast=True), 2 * edge)
    _worker.update(folder=Folder(folder), exact=Preparation(load_preprocess(folder)), fast=fast)
    for way in ("exact", "fast"):
        _decode((way, ["0000.jpg"]))
    started.wait(timeout=40)


def _decode(work: tuple[str, list[str]]) -> None:
    way, names = work
    decode_part(_worker["folder"], names, [_worker[way]])


def decoding_on_gpu(sizes: Sizes, device: torch.device) -> Iterator[Table]:
    if device.type != "cuda":
        return
    table = Table(
        title=f"{DECODED_ON_GPU} JPEGs of {SIZE[0]} × {SIZE[1]} pixels at once, decoded by the GPU, not resized",
        columns=["way", "images/s", "mean absolute difference from Pillow", "largest"],
        rows=[],
    )
    with tempfile.TemporaryDirectory() as folder:
        names = write_photographs(Path(folder), 32)
        files = [(Path(folder) / name).read_bytes() for name in names]
    way = "torchvision's decode_jpeg"
    try:
        from torchvision.io import ImageReadMode, decode_jpeg

        data = [torch.frombuffer(bytearray(file), dtype=torch.uint8) for file in files]
        many = [data[number % len(data)] for number in range(DECODED_ON_GPU)]
        ms = milliseconds(device, lambda: decode_jpeg(many, ImageReadMode.RGB, device="cuda"), 3, warmup=1)
        found = decode_jpeg(data, ImageReadMode.RGB, device="cuda")
        exact = [torch.from_numpy(np.array(decode_image(file))).permute(2, 0, 1) for file in files]
        pairs = zip(found, exact, strict=True)
        difference = torch.stack([(one.cpu().int() - other.int()).abs() for one, other in pairs])
        rate = round(1000 * DECODED_ON_GPU / ms)
        table["rows"].append([way, rate, round(difference.float().mean().item(), 3), int(difference.max())])
    except Exception as error:  # depends on how torchvision was built
        table["rows"].append([f"{way}: {_reason(error)}", "", "", ""])
    yield table


def compiled(sizes: Sizes, device: torch.device) -> Iterator[Table]:
    """Last, since compiling may take all the time that is left."""
    if device.type != "cuda":
        return
    batch = sizes.images[-1]
    table = Table(
        title=f"Forward pass with compiled blocks, {_clip(sizes)}, bfloat16, batch {batch}",
        columns=["what", "ms", "images/s"],
        rows=[],
    )
    encoder = make_clip(sizes, device, torch.bfloat16)
    edge = sizes.vision["image_size"]
    pixels = torch.randint(0, 256, (batch, 3, edge, edge), dtype=torch.uint8)
    ids = [str(number) for number in range(batch)]
    sites = [Site.parse(f"layer{sizes.vision['num_hidden_layers'] - 1}:cls")]
    bare = _bare(sizes, encoder, batch)

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
        table["rows"].append([f"compiled: {_reason(error)}", "", ""])
    yield table


def _bare(sizes: Sizes, encoder: Encoder, batch: int) -> Any:
    edge = sizes.vision["image_size"]
    pixels = torch.randn(batch, 3, edge, edge, device=encoder.device, dtype=encoder.dtype)
    return torch.inference_mode()(lambda: encoder.tower.module(pixel_values=pixels))


def _clip(sizes: Sizes) -> str:
    vision = sizes.vision
    return f"CLIP ({vision['num_hidden_layers']} layers, width {vision['hidden_size']}, {vision['image_size']} pixels)"


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:100]}"


tables = in_turn(forwards, taps, transfers, decoding, decoding_on_gpu, compiled)
