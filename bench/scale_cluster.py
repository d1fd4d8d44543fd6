"""Studies of 1.28 and 100 million images on 8, 64 and 512 GPUs, on paper: `python -m bench.scale_cluster`.

A plain model. It multiplies and divides rates that other benchmarks measured (`bench/results`), requests that are
counted here against an S3 server on this machine, and a few assumptions. All of them stand in its tables. It knows no
stragglers and no failures.
"""

from __future__ import annotations

import heapq
import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache
from itertools import groupby
from math import ceil
from pathlib import Path
from typing import NamedTuple

import numpy as np
from sae_ray.jobs.extract import LONGEST_RUN, run_length
from sae_ray.jobs.placement import bundles

from bench.record import RESULTS, Table, record
from bench.scale import object_store
from sae_ray.encoders.info import EncoderInfo
from sae_ray.store.activations import finish_store, part_name, read_parts, write_part
from sae_ray.store.attempts import begin
from sae_ray.store.casting import stored_rows
from sae_ray.store.files import Folder
from sae_ray.store.steps import Step
from sae_ray.store.walking import LISTED_AHEAD
from sae_ray.study.config import GridCell, Study
from sae_ray.study.plan import StudyPlan
from sae_ray.study.survey import Survey, SurveyedImages, SurveyedModels

IMAGES = (1_281_167, 100_000_000)
GPUS = (8, 64, 512)
HELDOUT = 50_000
PER_PART = 512
STUDY = Path(__file__).parents[1] / "studies" / "pach2025.toml"
RANDOM = {"sites": ["layer22:random:2"], "expansions": [16, 64], "architectures": ["matryoshka_batch_topk"]}
"""In place of the study's own cell on two random tokens per image: one more."""
COUNTED_PARTS = (4, 12)

# What nobody measured here:
GPUS_PER_NODE = 8
CORES_PER_NODE = 128
NODE_BYTES_PER_SECOND = 3e9
LIST_SECONDS = 0.1
START_SECONDS = 60.0
"""Of the workers of a stage or a bundle."""


class Stage(NamedTuple):
    """How long a stage takes at least."""

    seconds: float
    limit: str
    """What takes that long."""


class Requests(NamedTuple):
    """Of one part."""

    attempts: float
    """Noted once for all sites."""
    written: float
    """The part of a site and its marker."""
    finished: float
    """Of a site: what was needed until then is deleted."""


def main() -> None:
    requests = counted()
    times, shares = [], []
    for n_images in IMAGES:
        for n_gpus in GPUS:
            stages = {
                "extraction": extraction(n_images, n_gpus),
                "training": training(n_images, n_gpus),
                "evaluation": evaluation(n_gpus),
                "scoring": scoring(n_images, n_gpus),
            }
            listing = planning(n_images)
            total = listing + sum(stage.seconds for stage in stages.values())
            cells = [cell for one in stages.values() for cell in (minutes(one.seconds), one.limit)]
            times.append([n_images, n_gpus, minutes(listing), *cells, round(total / 3600, 1)])
            shares.append(share(n_images, n_gpus, stages["extraction"].seconds, total))
    both = [moved(n_images, requests) for n_images in IMAGES]
    named = [name for stage in stages for name in (f"{stage}: min", "limited by")]
    tables = [
        Table(
            title=f"The least time of {len(cells_of_grid())} SAEs on {len(sites())} sites",
            columns=["images", "GPUs", "listing and planning: min", *named, "hours in all"],
            rows=times,
        ),
        Table(
            title="The driver while it extracts",
            columns=[
                "images",
                "GPUs",
                "parts in a run",
                "parts/s that the GPUs ask for",
                "parts/s that one core hands out",
                "its CPU time / time of the stage",
                "its CPU time / time of the study",
            ],
            rows=shares,
        ),
        Table(
            title="What is moved and kept, in an object store",
            columns=["what", *(f"{n_images:,} images" for n_images in IMAGES)],
            rows=[[what, few, many] for (what, few), (_, many) in zip(*both, strict=True)],
        ),
        Table(title="What this is made of", columns=["rate", "value", "from"], rows=ingredients(requests)),
    ]
    record("scale_cluster", tables, {"command": "python -m bench.scale_cluster"})


@cache
def measured(name: str, title: str, row: str | int, column: str, beside: int | None = None) -> float:
    """A figure of a committed result. `title`: how its table begins; `row`, `beside`: the first cells of its row."""
    tables = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))["tables"]
    [table] = [one for one in tables if one["title"].startswith(title)]
    [found] = [one for one in table["rows"] if one[0] == row and (beside is None or one[1] == beside)]
    return float(found[table["columns"].index(column)])


# Rates


def encoded() -> float:
    """Images per second and GPU."""
    title, row = "Activations of a part", "CLS token of 4 blocks, and projection"
    return measured("gpu_extraction", title, row, "images/s")


def decoded() -> float:
    """Images per second and core."""
    return measured("gpu_decoding", "JPEGs of 500", 16, 'images/s, pixels = "exact"') / 16


JPEG_BYTES = 98_000
"""Of those that `decoded` decodes."""


def streamed() -> float:
    """Rows per second of a training stream larger than memory."""
    row = "larger than shuffle_rows: one epoch, each window read when it is due"
    return measured("gpu_scoring", "TrainingStream", row, "rows/s")


def step_seconds(cell: GridCell) -> float:
    """Of one SAE, none of its latents dead. Fewer than 8,192 latents were not measured: they are taken for 8,192."""
    widths, row = (8192, 16384, 65536), f"{cell.cell.architecture}, float32"
    known = [measured("gpu_training", "Our training step", row, "ms", latents) for latents in widths]
    return float(np.interp(cell.cell.d_sae(width(cell.site.name)), widths, known)) / 1000


def codes_seconds(d_sae: int) -> float:
    """Of one row on a GPU."""
    row = "encode_sparse in chunks of 16,156 rows"
    return measured("gpu_scoring", "Codes of 512 images", row, "ms") / 1000 / (512 * 577) * d_sae / 65536


def scored_seconds(d_sae: int) -> float:
    """CPU time of one image and one SAE."""
    latents = (8192, 16384, 32768, 65536)
    known = [measured("scoring", "CPU time against latents", one, "CPU seconds") for one in latents]
    return float(np.interp(d_sae, latents, known)) / 50_000


def raw_seconds() -> float:
    """Of one row of raw neurons, read and scored by one task."""
    return measured("scale", "All 577 tokens", "scores of the raw neurons", "seconds (or MB)") / (64 * 577)


def planned_seconds() -> float:
    """Of one image, without waiting for a store: of the largest list that was planned."""
    row = planning_results()["tables"][0]["rows"][-1]
    n_images, listed, _, written, *_ = row
    return (listed + written) / n_images


def driver_seconds(n_images: int, n_gpus: int) -> float:
    """CPU time of the driver for a part."""
    per_run, per_part = driver_costs()
    return per_part + per_run / run_length(n_parts(n_images), n_gpus)


@cache
def driver_costs() -> tuple[float, float]:
    """CPU seconds of the driver for a run, and for each of its parts.

    From as many parts in runs of one and in long runs, and from the most parts that were handed out.
    """
    columns = planning_results()["tables"][1]["columns"]
    row = "CPU time of the driver per part: ms"
    alone, together, most = (
        measured("scale_planning", "The driver", row, column) / 1000 for column in (*columns[1:3], columns[-1])
    )
    per_run = (alone - together) / (1 - 1 / LONGEST_RUN)
    return per_run, most - per_run / LONGEST_RUN


@cache
def planning_results() -> dict:
    return json.loads((RESULTS / "scale_planning.json").read_text(encoding="utf-8"))


# The study


@cache
def study_plan(n_images: int) -> StudyPlan:
    """Of the grid of the paper, without its LLaVA. Nothing is listed or loaded."""
    values = Study.load(STUDY).to_dict() | {"steering": None}
    values["grid"] = [one for one in values["grid"] if list(one["sites"]) != RANDOM["sites"]] + [RANDOM]
    images = {name: SurveyedImages(n, name, name) for name, n in (("train", n_images), ("heldout", HELDOUT))}
    clip = EncoderInfo("clip", None, "clip", 24, 1024, 768, 1024, True, 0, 577, (336, 336), True)
    judge = replace(clip, model="judge", projection_width=None, pooled_width=768, has_text=False)
    return StudyPlan(Study.from_dict(values), Folder("/nowhere"), Survey(images, SurveyedModels(clip, judge)))


@cache
def cells_of_grid() -> list[GridCell]:
    return [train.grid_cell for train in study_plan(IMAGES[0]).trains]


def sites() -> dict[str, list[GridCell]]:
    """The cells of every site."""
    by_site = sorted(cells_of_grid(), key=lambda cell: cell.site.name)
    return {name: list(cells) for name, cells in groupby(by_site, key=lambda cell: cell.site.name)}


def width(site: str) -> int:
    """Of the vectors of CLIP ViT-L/14-336."""
    return 768 if site == "projection" else 1024


def tokens(site: str) -> int:
    """Rows per image."""
    return 2 if "random" in site else 1


def row_bytes(site: str) -> int:
    return 2 * width(site) + 10


def n_parts(n_images: int) -> int:
    return ceil(n_images / PER_PART)


# Stages


def planning(n_images: int) -> float:
    """Seconds: what the store's answers take, or the driver."""
    return max(n_images / 1000 * LIST_SECONDS / LISTED_AHEAD, n_images * planned_seconds())


def extraction(n_images: int, n_gpus: int) -> Stage:
    nodes = n_gpus / GPUS_PER_NODE
    per_second = {
        "GPUs": encoded() * n_gpus,
        "decoding": decoded() * nodes * CORES_PER_NODE,
        "network": NODE_BYTES_PER_SECOND * nodes / JPEG_BYTES,
        "driver": PER_PART / driver_seconds(n_images, n_gpus),
    }
    limit = min(per_second, key=lambda one: per_second[one])
    return Stage(START_SECONDS + n_images / per_second[limit], limit)


def training(n_images: int, n_gpus: int) -> Stage:
    """The bundles of the product, each on the GPU that is free first."""
    found = [bundle_seconds(site, cells, n_images) for site, cells in bundled(n_images, n_gpus)]
    times = [max(pair) for pair in found]
    last = placed(times, n_gpus)
    reading = sum(read for read, _ in found) > sum(stepping for _, stepping in found)
    if last > max(times):
        return Stage(last, "reading" if reading else "steps")
    read, stepping = max(found, key=max)
    return Stage(last, "reading of one bundle" if read > stepping else "steps of one bundle")


def bundled(n_images: int, n_gpus: int) -> Iterator[tuple[str, list[GridCell]]]:
    """The site and the cells of every bundle."""
    plan = study_plan(n_images)
    cells = {train.step.name: train.grid_cell for train in plan.trains}
    for bundle in bundles(plan, plan.trains, n_gpus, "cuda"):
        found = [cells[job.step.name] for job in bundle.cells]
        yield found[0].site.name, found


def bundle_seconds(site: str, cells: Sequence[GridCell], n_images: int) -> tuple[float, float]:
    """Reading, which goes on beside the steps, and these."""
    steps = cells[0].cell.training.steps
    stepping = START_SECONDS + steps * sum(map(step_seconds, cells))
    return START_SECONDS + bundle_rows(site, cells, n_images) / streamed(), stepping


def bundle_rows(site: str, cells: Sequence[GridCell], n_images: int) -> int:
    """Rows that are read: all of them once where they fit into memory, else those of every step."""
    rows, training = n_images * tokens(site), cells[0].cell.training
    return rows if rows <= study_plan(n_images).study.shuffle_rows else training.steps * training.batch_size


def placed(times: Sequence[float], n_workers: int) -> float:
    """When the last worker is done."""
    done = [0.0] * n_workers
    for seconds in sorted(times, reverse=True):
        heapq.heapreplace(done, done[0] + seconds)
    return max(done)


def evaluation(n_gpus: int) -> Stage:
    """One task for each SAE, which reads the held-out vectors."""
    times = [
        START_SECONDS + HELDOUT * tokens(site) * (1 / streamed() + codes_seconds(cell.cell.d_sae(width(site))))
        for site, cells in sites().items()
        for cell in cells
    ]
    return Stage(placed(times, n_gpus), "starts of workers")


def scoring(n_images: int, n_gpus: int) -> Stage:
    """Both passes of all SAEs and of the raw neurons, in as many tasks as there are GPUs."""
    images = n_images + HELDOUT
    cores = n_gpus / GPUS_PER_NODE * CORES_PER_NODE
    in_tasks = added = 0.0
    longest = 0.0
    for site, cells in sites().items():
        rows = images * tokens(site)
        in_tasks += rows * (raw_seconds() + 1 / streamed())
        for cell in cells:
            d_sae = cell.cell.d_sae(width(site))
            in_tasks += rows * codes_seconds(d_sae)
            added += images * scored_seconds(d_sae)
            longest = max(longest, images * scored_seconds(d_sae))
    seconds = {"tasks": in_tasks / n_gpus, "sums": added / cores, "sums of one SAE": longest}
    limit = max(seconds, key=lambda one: seconds[one])
    return Stage(START_SECONDS + seconds[limit], limit)


def share(n_images: int, n_gpus: int, extraction_seconds: float, total: float) -> list:
    asked, cpu = encoded() * n_gpus / PER_PART, driver_seconds(n_images, n_gpus)
    percent = (f"{100 * n_parts(n_images) * cpu / seconds:.1f} %" for seconds in (extraction_seconds, total))
    length = run_length(n_parts(n_images), n_gpus)
    return [n_images, n_gpus, length, round(asked, 1), round(1 / cpu, 1), *percent]


# Bytes, objects, requests


def moved(n_images: int, requests: Requests) -> list[tuple[str, str]]:
    parts, n_sites = n_parts(n_images), len(sites())
    stored = sum(n_images * tokens(site) * row_bytes(site) for site in sites())
    read = {
        n_gpus: [(site, bundle_rows(site, cells, n_images)) for site, cells in bundled(n_images, n_gpus)]
        for n_gpus in GPUS
    }
    trained = {n_gpus: sum(rows * row_bytes(site) for site, rows in found) for n_gpus, found in read.items()}
    trained_parts = sum(rows / (PER_PART * tokens(site)) for site, rows in read[GPUS[0]])
    pixels = n_images * 3 * 336 * 336
    writes = parts * (requests.attempts + n_sites * (requests.written + requests.finished))
    return [
        ("TB of images read", terabytes(n_images * JPEG_BYTES)),
        ("TB of pixels from decoders to encoders, in memory", terabytes(pixels)),
        ("TB of activations written", terabytes(stored)),
        *((f"TB read in training, {n_gpus} GPUs", terabytes(size)) for n_gpus, size in trained.items()),
        ("TB read in scoring", terabytes(2 * stored)),
        ("objects that the study keeps", f"{parts * n_sites:,}"),
        ("requests: lists of images", f"{ceil(n_images / 1000):,}"),
        ("requests: images", f"{n_images:,}"),
        ("requests: parts written and finished", f"{round(writes):,}"),
        (f"requests: parts read in training, {GPUS[0]} GPUs", f"{round(trained_parts):,}"),
        ("requests: parts read in scoring", f"{2 * parts * n_sites:,}"),
    ]


def counted() -> Requests:
    """Requests per part, from the difference of two stores."""

    def run(root: str, n: int, n_requests) -> list[int]:
        rows = stored_rows(np.arange(8), np.full(8, -1), np.ones((8, 4), np.float32), "float16")
        step = Step(Folder(root), "extract", f"store-{n}", {"store_dtype": "float16", "images_per_part": 8})
        seen = [n_requests()]
        for number in range(n):
            begin(step.folder, "run", part_name(number), "node")
        seen.append(n_requests())
        parts = [write_part(step.folder, number, rows, []) for number in range(n)]
        seen.append(n_requests())
        finish_store(step, read_parts(step.folder, dict(enumerate(parts))), 4, 0.0)
        seen.append(n_requests())
        return np.diff(seen).tolist()

    with tempfile.TemporaryDirectory() as scratch, object_store(Path(scratch) / "log") as (root, n_requests):
        few, many = (run(root, n, n_requests) for n in COUNTED_PARTS)
    added = COUNTED_PARTS[1] - COUNTED_PARTS[0]
    return Requests(*((after - before) / added for before, after in zip(few, many, strict=True)))


def ingredients(requests: Requests) -> list[list]:
    gpu = "bench.gpu, H200"
    fast = min(step_seconds(cell) for cell in cells_of_grid())
    slow = max(step_seconds(cell) for cell in cells_of_grid())
    return [
        ["images/s that a GPU encodes, five sites", round(encoded()), f"{gpu}"],
        ["images/s that a core decodes", round(decoded()), f"{gpu}'s machine"],
        ["rows/s of a training stream larger than `shuffle_rows`", round(streamed()), f"{gpu}'s machine, local disk"],
        [
            "ms of a training step in float32, up to 8,192 latents and 65,536",
            f"{1000 * fast:.1f}, {1000 * slow:.1f}",
            gpu,
        ],
        ["rows/s that a GPU encodes to codes of 65,536 latents", round(1 / codes_seconds(65536)), gpu],
        [
            "µs of a core per image scored, 8,192 latents and 65,536",
            f"{1e6 * scored_seconds(8192):.0f}, {1e6 * scored_seconds(65536):.0f}",
            "bench.scoring",
        ],
        ["µs of a task per row of raw neurons", round(1e6 * raw_seconds(), 1), "bench.scale"],
        [
            "µs per image listed, labelled, digested and written",
            round(1e6 * planned_seconds(), 1),
            "bench.scale_planning",
        ],
        [
            "ms of the driver's CPU per run, and for each of its parts",
            ", ".join(f"{1000 * one:.2f}" for one in driver_costs()),
            "bench.scale_planning",
        ],
        [
            "requests per part: attempts; written; finished, of one site",
            "; ".join(f"{one:.1f}" for one in requests),
            "counted here",
        ],
        ["bytes of an image", JPEG_BYTES, "those that were decoded"],
        ["GPUs per node, cores per node", f"{GPUS_PER_NODE}, {CORES_PER_NODE}", "assumed"],
        ["GB/s of a node from the store", NODE_BYTES_PER_SECOND / 1e9, "assumed"],
        [f"seconds of a request that lists 1,000 images, {LISTED_AHEAD} at once", LIST_SECONDS, "assumed"],
        ["seconds until the workers of a stage or a bundle are at work", START_SECONDS, "assumed"],
        ["latents that are dead; images that are rejected; parts that are repeated", 0, "assumed"],
    ]


def minutes(seconds: float) -> float:
    return round(seconds / 60, 1 if seconds < 6000 else None)


def terabytes(n_bytes: float) -> str:
    return f"{n_bytes / 1e12:,.3g}"


if __name__ == "__main__":
    main()
