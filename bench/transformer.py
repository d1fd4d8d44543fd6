"""A vision transformer on the CPU: the extraction stage against its bare forward pass on all cores.

    python -m bench.transformer [--images 500] [--rounds 2] [--layers 12] [--encoder DIRECTORY]

The encoder has the shape of DINOv2-small and random weights, if no other is named. Bare are as many processes of one
thread as there are cores, without Ray; their rate is that of their own busy time, so that it has no last batch that
the others wait for. Ours does have one. All ways take turns. Only the default encoder's figures are recorded.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import tempfile
import time
from functools import partial
from pathlib import Path
from statistics import mean, median
from typing import Any, NamedTuple

import numpy as np
import torch
from sae_ray.jobs import extract as stage
from sae_ray.jobs.cluster import connect, usable_cpus

from bench.gpu.photographs import SIZE, write_photographs
from bench.record import Table, record
from sae_ray.encoders import describe_encoder, load_encoder, load_preprocess
from sae_ray.images.part import Preparation, decode_part
from sae_ray.store.files import Folder
from sae_ray.study.config import Study
from sae_ray.study.plan import StudyPlan

EDGE, LAYERS = 224, 12
BATCH = 64
HELDOUT = 2
"""A study needs some; they are not extracted."""


class Bare(NamedTuple):
    """Images per second of all processes."""

    forward: float
    """Of pixels that are decoded and normalised."""
    with_decoding: float
    """Of files: one process decodes a batch, encodes it, decodes the next."""


class Ours(NamedTuple):
    """One extraction."""

    rate: float
    """Images per second from the first part of every actor to the last of all."""
    seconds: float
    """Of the stage, with the start of its actors."""
    actors: int


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--layers", type=int, default=LAYERS, help="fewer, to see that all of it runs")
    parser.add_argument("--encoder", help="a directory in the transformers format")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="sae-ray-bench-") as folder:
        scratch = Path(folder)
        if options.encoder is None:
            write_encoder(scratch / "encoder", options.layers)
        table = measure(scratch, options.images, options.rounds, options.encoder or str(scratch / "encoder"))
    print(json.dumps(table, indent=1, ensure_ascii=False))
    if options.encoder is None and options.layers == LAYERS:
        record("transformer", [table], {"images": options.images, "rounds": options.rounds, "batch": BATCH})


def measure(scratch: Path, n: int, rounds: int, model: str) -> Table:
    for name, count in {"train": n, "heldout": HELDOUT}.items():
        (scratch / name).mkdir()
        write_photographs(scratch / name, count)
    connect()
    cores = usable_cpus()
    bare: list[Bare] = []
    ours: list[Ours] = []
    context = multiprocessing.get_context("spawn")
    with context.Pool(cores, _start, (str(scratch / "train"), model)) as pool:
        for turn in range(rounds):
            bare.append(measure_bare(pool, cores))
            ours.append(extract(scratch / f"root-{turn}", scratch, model))
            print(bare[-1], ours[-1], flush=True)
    forward, decoding = (median(column) for column in zip(*bare, strict=True))
    rate = median(one.rate for one in ours)
    of_forward, of_both = (
        median(one.rate / getattr(other, name) for one, other in zip(ours, bare, strict=True)) for name in Bare._fields
    )
    seconds = median(one.seconds for one in ours)
    return Table(
        title=f"{n} JPEGs of {SIZE[0]} × {SIZE[1]} pixels, a transformer of the shape of DINOv2-small, {cores} cores",
        columns=["way", "images/s", "share of the bare forward", "share of decoding and forward"],
        rows=[
            [f"bare forward, {cores} processes of one thread", round(forward, 2), 1.0, round(forward / decoding, 3)],
            ["decoding and forward, the same processes", round(decoding, 2), round(decoding / forward, 3), 1.0],
            [f"ours, {ours[-1].actors} actors, once they are at work", round(rate, 2), round(of_forward, 3),
             round(of_both, 3)],
            ["ours, with the start of the actors", round(n / seconds, 2), round(n / seconds / forward, 3),
             round(n / seconds / decoding, 3)],
        ],
    )  # fmt: skip


def write_encoder(folder: Path, layers: int) -> None:
    """DINOv2-small with random weights."""
    from transformers import BitImageProcessor, Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=384, num_attention_heads=6, num_hidden_layers=layers, image_size=518, patch_size=14
    )
    Dinov2Model(config).save_pretrained(folder)
    BitImageProcessor(
        size={"shortest_edge": 256}, crop_size={"height": EDGE, "width": EDGE}, do_center_crop=True, resample=3
    ).save_pretrained(folder)


_worker: dict[str, Any] = {}


def _start(folder: str, model: str) -> None:
    torch.set_num_threads(1)
    encoder, preparation = load_encoder(model), Preparation(load_preprocess(model))
    names = sorted(path.name for path in Path(folder).iterdir())[:BATCH]
    [pixels] = decode_part(Folder(folder), names, [preparation]).pixels
    _worker.update(folder=Folder(folder), names=names, encoder=encoder, preparation=preparation, pixels=pixels)
    _forward(pixels[:2])


def _forward(pixels: np.ndarray) -> None:
    encoder = _worker["encoder"]
    with torch.inference_mode():
        encoder.tower.embed(encoder._normalise(torch.from_numpy(pixels)))


def _bare(decode: bool, call: int) -> float:
    """Images per second of this process."""
    began = time.perf_counter()
    if decode:
        [pixels] = decode_part(_worker["folder"], _worker["names"], [_worker["preparation"]]).pixels
    else:
        pixels = _worker["pixels"]
    _forward(pixels)
    return len(pixels) / (time.perf_counter() - began)


def measure_bare(pool: Any, cores: int) -> Bare:
    """All processes do the same at the same time, twice."""
    pool.map(partial(_bare, False), range(cores), chunksize=1)
    rates: dict[bool, list[float]] = {False: [], True: []}
    for decode in (False, True, True, False):
        rates[decode].append(sum(pool.map(partial(_bare, decode), range(cores), chunksize=1)))
    return Bare(mean(rates[False]), mean(rates[True]))


def extract(root: Path, images: Path, model: str) -> Ours:
    """The extraction stage as `sae-ray run` calls it, with its defaults."""
    values = {
        "name": "bench",
        "images": {"train": {"path": f"{images}/train"}, "heldout": {"path": f"{images}/heldout"}},
        "encoder": {"model": model},
        "judge": {"model": model},
        "grid": [{"sites": [f"layer{describe_encoder(model).n_layers - 1}:cls"]}],
        "resources": {"extract": {"batch_size": BATCH}},
    }
    root.mkdir()
    plan = StudyPlan(Study.from_dict(values), Folder(root))
    [wanted] = [one for one in plan.extracts if one.images.name == "train" and one.field == "encoder.model"]
    chosen = _actors()
    began = time.perf_counter()
    stage.run_only(plan, [wanted])
    seconds = time.perf_counter() - began
    actors = chosen.pop()
    return Ours(rate_of(Path(str(wanted.step.folder / "data")), actors, wanted), seconds, actors)


def _actors() -> list[int]:
    """Filled with the number of actors that the stage starts."""
    chosen: list[int] = []
    shares = stage.shares

    def noted(*args: Any) -> Any:
        found = shares(*args)
        chosen.append(found[0])
        return found

    stage.shares = noted
    return chosen


def rate_of(data: Path, actors: int, wanted: Any) -> float:
    """By the times of the files. From the mean of those of the actors' first parts: whoever was earlier has begun the
    next one by as much as others lack of their first."""
    files = sorted((path.stat().st_mtime, path.name) for path in data.iterdir())
    per_part, n = wanted.step.config["images_per_part"], wanted.images.n_images
    sizes = [min(per_part, n - int(name.split("-")[1]) * per_part) for _, name in files]
    return sum(sizes[actors:]) / (files[-1][0] - mean(time for time, _ in files[:actors]))


if __name__ == "__main__":
    main()
