"""Photographs decoded and resized before an encoder: by processes of the CPU, and by the GPU."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.gpu.in_turn import in_turn, reason
from bench.gpu.photographs import SIZE, write_clip_config, write_photographs
from bench.gpu.sizes import Sizes
from bench.gpu.timing import milliseconds
from bench.record import Table
from sae_ray.encoders import load_preprocess
from sae_ray.images import decode_image
from sae_ray.images.part import Preparation, decode_part
from sae_ray.store.files import Folder

PROCESSES = (1, 4, 8, 16)
DECODED = 64
"""Photographs that every process decodes."""
DECODED_ON_GPU = 200


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
        table["rows"].append([f"{way}: {reason(error)}", "", "", ""])
    yield table


tables = in_turn(decoding, decoding_on_gpu)
