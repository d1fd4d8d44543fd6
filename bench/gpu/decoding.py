"""Photographs decoded and resized before an encoder: by processes of the CPU, and by the GPU."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import torch

from bench.gpu.in_turn import in_turn, reason
from bench.gpu.models import make_clip
from bench.gpu.photographs import SIZE, write_clip_config, write_photographs
from bench.gpu.sizes import Sizes
from bench.gpu.timing import milliseconds
from bench.record import Table
from sae_ray.encoders import Encoder, load_encoder, load_preprocess
from sae_ray.encoders.on_gpu import check_decoder, decoded_on_gpu
from sae_ray.encoders.part import encode_part
from sae_ray.encoders.sites import Site
from sae_ray.errors import UsageError
from sae_ray.images.part import Preparation, decode_part
from sae_ray.store.files import Folder
from sae_ray.world.write import MODELS

PROCESSES = (1, 4, 8, 16)
DECODED = 64
"""Photographs that every process decodes."""
PARTS = 6


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
    """A part with `pixels = "gpu"`: from files that a task has read to what an encoder takes, on the GPU."""
    if device.type != "cuda":
        return
    edge, n = sizes.vision["image_size"], sizes.scored
    table = Table(
        title=f'A part of {n} JPEGs of {SIZE[0]} × {SIZE[1]} pixels with `pixels = "gpu"`',
        columns=["what", "images/s"],
        rows=[],
    )
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        distinct = write_photographs(folder, DECODED)
        write_clip_config(folder, sizes)
        names = [distinct[number % DECODED] for number in range(n)]
        preparation = Preparation(load_preprocess(scratch))
        began = time.perf_counter()
        part = decode_part(Folder(scratch), names, [preparation], for_gpu=True)
        rate = n / (time.perf_counter() - began)
        table["rows"].append(["read and looked at by a task, one thread", round(rate)])
        try:
            check_decoder(device)
        except UsageError as error:  # depends on how torchvision was built
            table["rows"].append([reason(error), ""])
            yield table
            return
        run = partial(decoded_on_gpu, part, names, [preparation], [(edge, edge)], device)
        table["rows"].append(
            [f"decoded and resized to {edge} by the GPU", round(1000 * n / milliseconds(device, run, 3))]
        )
        yield table
        encoder = make_clip(sizes, device, torch.bfloat16)
        encode = partial(_encoded, encoder, sizes, n)
        _, [shown] = run()
        rate = 1000 * n / milliseconds(device, partial(encode, shown), 3)
        table["rows"].append([f"encoded alone, pixels on the GPU, batch {sizes.images[0]}", round(rate)])
        lock = Lock()

        def through(_number: int) -> None:
            _, [pixels] = run()
            with lock:
                encode(pixels)

        with ThreadPoolExecutor(2) as threads:
            began = time.perf_counter()
            list(threads.map(through, range(PARTS)))
            rate = PARTS * n / (time.perf_counter() - began)
        table["rows"].append(["decoded and encoded, two parts at a time as by an actor", round(rate)])
        yield table
        yield _changes(folder, distinct, device)


def _encoded(encoder: Encoder, sizes: Sizes, n: int, pixels: torch.Tensor) -> None:
    site = Site("residual", sizes.vision["num_hidden_layers"] - 1, "cls")
    ids = [str(number) for number in range(n)]
    encode_part(encoder, [(site, "float16")], pixels, np.arange(n), ids, 0, sizes.images[0])


def _changes(folder: Path, names: list[str], device: torch.device) -> Table:
    """Of pixels and of activations of the embedded world's CLIP, which has real weights and is small."""
    clip = str(MODELS / "clip")
    encoder, site = load_encoder(clip), Site("residual", 3, "cls")
    exact, fast = (Preparation(load_preprocess(clip, fast=fast), 2 * 56 if fast else None) for fast in (False, True))
    [expected] = decode_part(Folder(str(folder)), names, [exact]).pixels
    [reduced] = decode_part(Folder(str(folder)), names, [fast]).pixels
    part = decode_part(Folder(str(folder)), names, [exact], for_gpu=True)
    _, [found] = decoded_on_gpu(part, names, [exact], [encoder.info.image_size], device)
    by = {"gpu": found.cpu().numpy(), "fast": reduced}

    def tapped(pixels: np.ndarray) -> torch.Tensor:
        return encoder.tap(torch.from_numpy(pixels), [site], names, 0)[site].activation

    reference = tapped(expected)
    spread = (reference - reference.mean(0)).norm(dim=1)
    table = Table(
        title=f'{len(names)} JPEGs against `pixels = "exact"`, resized to 56 pixels, CLS token of the embedded CLIP',
        columns=["pixels", "mean difference of a value, of 255", "largest", "smallest cosine",
                 "change / distance from the mean, median", "largest"],
        rows=[],
    )  # fmt: skip
    for way, pixels in by.items():
        difference = np.abs(pixels.astype(int) - expected)
        activation = tapped(pixels)
        near = torch.nn.functional.cosine_similarity(activation, reference, dim=1).min().item()
        change = (activation - reference).norm(dim=1) / spread
        table["rows"].append([way, round(float(difference.mean()), 3), int(difference.max()), round(near, 6),
                              round(change.median().item(), 4), round(change.max().item(), 4)])  # fmt: skip
    return table


tables = in_turn(decoding, decoding_on_gpu)
