"""Stores of ImageNet's size: what processes cost that read no activation, on disk and in an object store. Then `all`
tokens: writing, reading, shuffling, scoring.

The store is simulated: its parts are listed as those of five sites on 1,281,167 images, but their files hold nothing.
The object store is moto's server on this machine, so that requests are counted rather than timed.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any
from urllib.parse import quote

import httpx
import numpy as np

from bench.record import Table, record
from sae_ray.scores.scoring import score_store
from sae_ray.store.activations import ActivationStore, Part, finish_store, write_part
from sae_ray.store.casting import stored_rows
from sae_ray.store.files import Folder
from sae_ray.store.steps import Step
from sae_ray.store.stream import TrainingStream
from sae_ray.study.config import Study
from sae_ray.study.plan import StudyPlan
from sae_ray.study.root import recalled_plan, remember
from sae_ray.study.survey import Survey, survey
from sae_ray.world import write_world

IMAGES = {"train": 1_281_167, "heldout": 50_000}
SITES = ["layer0:cls", "layer1:cls", "layer2:cls", "layer1:mean", "projection"]
CLASSES = 1000
TOKENS, WIDTH, IMAGES_PER_PART = 577, 1024, 512
"""Of CLIP ViT-L/14-336."""
STORED_IMAGES = 64
"""Of `all` tokens, written and read: 76 MB in float16."""
ROUNDS = 3
PLAN = """
from sae_ray.study.root import recalled_plan
assert len(list(recalled_plan({!r}).steps)) > 20
"""
OPEN = "from bench.scale import opened; opened({!r})"
STATUS = """
import sys
from sae_ray.jobs.cli import main
sys.argv = ["sae-ray", "status", "--root", {!r}]
main()
"""
PEAK = """
import atexit, pathlib, sys
def told():
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    [peak] = [line.split()[1] for line in lines if line.startswith("VmHWM")]
    print(peak, file=sys.stderr)
atexit.register(told)
"""
"""What a process says at its end, in kB: a child's `ru_maxrss` begins at its parent's."""


def main() -> None:
    tables = []
    with tempfile.TemporaryDirectory() as scratch, object_store(Path(scratch) / "log") as (bucket, n_requests):
        write_world(f"{scratch}/world", n_train=20, n_heldout=10)
        for where, root in (("disk", f"{scratch}/root"), ("S3", bucket)):
            simulate(Folder(root), f"{scratch}/world")
            print(f"simulated on {where}", flush=True)
            tables.append(commands(where, root, n_requests if where == "S3" else None))
    tables += [all_tokens(), shuffled()]
    record("scale", tables)


def opened(root: str) -> None:
    """What the drivers of training and scoring know of their stores."""
    for extract in recalled_plan(root).extracts:
        store = ActivationStore(extract.step.folder)
        if extract.images.name == "train":
            assert len(store.parts) == -(-IMAGES["train"] // IMAGES_PER_PART)
            assert store.root_mean_square_norm > 0
            TrainingStream(store, 4096, 0, 2**21)


def commands(where: str, root: str, n_requests: Callable[[], int] | None) -> Table:
    """Seconds, memory and requests of processes that work on the simulated root."""
    ways = {
        "the plan alone": PLAN,
        "`sae-ray status`": STATUS,
        "the plan, all stores opened, the training stream of each site": OPEN,
    }
    rows = []
    for what, code in ways.items():
        before = n_requests() if n_requests else 0
        runs = [measured(code.format(root)) for _ in range(ROUNDS)]
        requests = (n_requests() - before) // ROUNDS if n_requests else None
        rows.append([what, round(median(run[0] for run in runs), 2), round(max(run[1] for run in runs)), requests])
    parts = sum(-(-n // IMAGES_PER_PART) for n in IMAGES.values())
    title = f"A finished root of {len(SITES)} sites x {parts:,} parts, {sum(IMAGES.values()):,} images, on {where}"
    return Table(title=title, columns=["process", "seconds", "peak MB", "requests"], rows=rows)


def measured(code: str) -> tuple[float, float]:
    """Seconds and peak megabytes of a process of Python."""
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", PEAK + code], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    return time.perf_counter() - started, int(done.stderr.splitlines()[-1]) / 1000


def simulate(root: Folder, world: str) -> None:
    """Writes a root whose activations are extracted, with files that hold nothing."""
    values = {
        "name": "scale",
        "images": {name: {"path": f"{world}/{name}"} for name in IMAGES},
        "encoder": {"model": f"{world}/clip"},
        "judge": {"model": f"open_clip:local-dir:{world}/judge", "point": "projection"},
        "grid": [{"sites": SITES, "expansions": [4], "k": [8, 16]}],
    }
    study = Study.from_dict(values)
    known: dict[str, Any] = survey(study, root).to_dict()
    for name, n_images in IMAGES.items():
        known["images"][name]["n_images"] = n_images
    plan = StudyPlan(study, root, Survey.from_dict(known))
    remember(plan)
    for extract in plan.extracts:
        finish_without_data(extract.step, extract.images.n_images, extract.rows, extract.width)


def finish_without_data(step: Step, n_images: int, n_rows: int, width: int) -> None:
    per_part = step.config["images_per_part"]
    n_parts = -(-n_images // per_part)
    files = [f"data/part-{number:05d}-0.parquet" for number in range(n_parts)]
    with ThreadPoolExecutor(8) as writers:
        list(writers.map(lambda file: step.folder.write_bytes(file, b"-"), files))
    images = [min(per_part, n_images - number * per_part) for number in range(n_parts)]
    tokens = n_rows // n_images
    finish_store(step, [Part(file, tokens * n, n, float(n)) for file, n in zip(files, images, strict=True)], width, 0.0)


@contextmanager
def object_store(log: Path) -> Iterator[tuple[str, Callable[[], int]]]:
    """A root in a bucket of an S3 server on this machine, and how many requests it has had."""
    port = 20_000 + os.getpid() % 10_000
    address = f"http://127.0.0.1:{port}"
    with log.open("w") as output:
        server = subprocess.Popen(
            [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)], stdout=output, stderr=output
        )
    try:
        for _ in range(300):
            try:
                httpx.put(f"{address}/bench").raise_for_status()
                break
            except httpx.TransportError:
                time.sleep(0.2)
        root = f"s3://bench:bench@bench/root?endpoint_override={quote(address, safe='')}&region=us-east-1"
        yield root, lambda: log.read_text().count(" HTTP/1.1")
    finally:
        server.kill()
        server.wait()


def all_tokens() -> Table:
    """Rates of a part of `all` tokens, and scoring of its raw neurons."""
    rng = np.random.default_rng(0)
    n_rows = STORED_IMAGES * TOKENS
    image, token = np.repeat(np.arange(STORED_IMAGES), TOKENS), np.tile(np.arange(TOKENS), STORED_IMAGES)
    vectors = rng.standard_normal((n_rows, WIDTH), np.float32)
    megabytes = 2 * vectors.size / 1e6
    rows = []

    def add(what: str, work: Callable[[], Any]) -> Any:
        runs, found = [], None
        for _ in range(ROUNDS):
            started = time.perf_counter()
            found = work()
            runs.append(time.perf_counter() - started)
        rows.append([what, round(median(runs), 2), round(megabytes / median(runs))])
        return found

    with tempfile.TemporaryDirectory() as scratch:
        config = {"store_dtype": "float16", "images_per_part": STORED_IMAGES}
        step = Step(Folder(scratch), "extract", "all", config)
        stored = add("cast to float16, checked, norms", lambda: stored_rows(image, token, vectors, "float16"))
        part = add("parquet written", lambda: write_part(step.folder, 0, stored, []))
        finish_store(step, [part], WIDTH, 0.0)
        store = ActivationStore(step.folder)
        add("parquet read", lambda: store.read(0))
        embeddings_step = Step(Folder(scratch), "extract", "judge", config)
        judged = stored_rows(np.arange(STORED_IMAGES), np.full(STORED_IMAGES, -1), np.eye(STORED_IMAGES, 64), "float16")
        finish_store(embeddings_step, [write_part(embeddings_step.folder, 0, judged, [])], 64, 0.0)
        embeddings = ActivationStore(embeddings_step.folder)
        add("scores of the raw neurons", lambda: score_store(None, store, embeddings, n_top=16))
        code = (
            "from bench.scale import *\n"
            f"stores = [ActivationStore(Folder({scratch!r}) / name) for name in {[step.name, embeddings_step.name]}]\n"
            "score_store(None, *stores, n_top=16)"
        )
        _, peak = measured(code)
        _, base = measured("from bench.scale import *")
    rows.append(["scores of the raw neurons: peak MB of the process, above its imports", round(peak - base), None])
    title = f"All {TOKENS} tokens of {STORED_IMAGES} images, width {WIDTH}: {megabytes:.0f} MB in float16"
    return Table(title=title, columns=["work", "seconds (or MB)", "MB/s"], rows=rows)


def shuffled() -> Table:
    """Classes in a window of training, with images sorted by class."""
    rows = []
    for shuffle_rows in (2**20, 2**21):
        with tempfile.TemporaryDirectory() as scratch:
            config = {"store_dtype": "float16", "images_per_part": IMAGES_PER_PART}
            step = Step(Folder(scratch), "extract", "all", config)
            finish_without_data(step, IMAGES["train"], IMAGES["train"] * TOKENS, WIDTH)
            stream = TrainingStream(ActivationStore(step.folder), 4096, 0, shuffle_rows)
            classes = [len(classes_in(stream, window)) for window in stream._windows(0)]
        rows.append([shuffle_rows, len(classes), min(classes[:-1]), round(median(classes))])
    title = f"Classes in a window of training, all {TOKENS} tokens of {IMAGES['train']:,} images sorted by class"
    return Table(title=title, columns=["`shuffle_rows`", "windows per epoch", "fewest", "median"], rows=rows)


def classes_in(stream: TrainingStream, window: tuple[int, ...]) -> set[int]:
    found: set[int] = set()
    for number in window:
        group = stream._groups[number]
        first = group.place * stream.store.rows_per_group
        images = (group.part * IMAGES_PER_PART + row // TOKENS for row in (first, first + group.rows - 1))
        start, end = (image * CLASSES // IMAGES["train"] for image in images)
        found.update(range(start, end + 1))
    return found


if __name__ == "__main__":
    main()
