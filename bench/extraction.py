"""Images to activations on the CPU: ours, through Ray, against a DataLoader with the model's processor and a hook.

The loop runs with the versions that the reference pins and with those of today.
Images are renders of the embedded world scaled up to 400 × 500 pixels, with noise so that they weigh as much as
photographs, and the renders themselves; each lies under several names (hard links). Memory is measured on the renders.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from io import BytesIO
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import ray
import torch
from PIL import Image
from sae_ray.jobs import extract as stage
from sae_ray.jobs.cluster import connect

from bench import environments
from bench.contestants.loop import THREADS
from bench.record import record
from sae_ray.encoders import load_encoder, load_preprocess
from sae_ray.encoders.sites import Site
from sae_ray.images import decode_image
from sae_ray.store.activations import ActivationStore, write_part
from sae_ray.store.casting import stored_rows
from sae_ray.store.files import Folder
from sae_ray.study.config import Study
from sae_ray.study.plan import StudyPlan
from sae_ray.study.step_plans import ExtractPlan
from sae_ray.world import write_world
from sae_ray.world.render import SIDE, render

SIZE = (500, 400)
N_IMAGES = {"photos": 5_000, "small": 20_000}
ROUNDS = 2
"""Rounds of all ways, of which the fastest run of each counts: whatever else the machine does meets all alike."""
N_LOOP = {"photos": 3_840, "small": 6_400}
"""The loops take the first ones: full batches, of which each of ten workers makes as many."""
LOOPS = {
    "reference": ("own:0", "own:2", "own:10"),
    "today": ("pil:0", "pil:2", "torchvision:0", "torchvision:2"),
}
"""Backends of the processor and workers; 10 is what the reference's script takes."""
N_DISTINCT = 500
MEMORY_SIZES = (5_000, 50_000)
SITE, LAYER = "layer3:cls", 3
"""The last block but one of five, which a LLaVA reads."""
BATCH = 64
IMAGES_PER_PART = 256
SKIPPED_PARTS = 4
"""Parts that are done before rates are taken: the actors start together and finish their first parts late."""
N_PROFILED = 400
TOLERANCE = 1e-4
"""Allowed difference of activations relative to the largest: both compute in float32, in batches of other sizes."""


class Extracted(NamedTuple):
    """One run of ours."""

    plan: ExtractPlan
    seconds: float
    """All of the stage, the start of its actors included, that of Ray not."""
    images_per_second: float
    """Once the actors are at work."""


class Contest(NamedTuple):
    """All ways on the same images."""

    loops: dict[str, float]
    """Images per second by backend and workers."""
    ours: Extracted
    fast: Extracted
    ray_seconds: float

    def fastest(self, backend: str) -> float:
        return max(rate for way, rate in self.loops.items() if way.startswith(backend))

    def rows(self) -> list[list[Any]]:
        rates = {
            "ours": self.ours.images_per_second,
            'ours, `pixels = "fast"`': self.fast.images_per_second,
            **{described(way): rate for way, rate in self.loops.items()},
        }
        own, pil = self.fastest("own"), self.fastest("pil")
        return [[way, round(rate), round(rate / own, 2), round(rate / pil, 2)] for way, rate in rates.items()]


def main() -> None:
    scratch = Path(tempfile.mkdtemp(prefix="sae-ray-bench-"))
    try:
        measure(scratch)
    finally:
        shutil.rmtree(scratch)


def measure(scratch: Path) -> None:
    write_world(scratch / "world", n_train=0, n_heldout=64)
    photos, small = scratch / "photos", scratch / "small"
    n_photos = N_IMAGES["photos"]
    write_images(photos, n_photos, SIZE)
    write_images(small, max(MEMORY_SIZES), None)
    clip = str(scratch / "world" / "clip")
    photographs = contest(scratch, photos, clip)
    renders = contest(scratch, small, clip)
    connect()
    memory = [[n, *memory_of(scratch, small, n)] for n in MEMORY_SIZES]
    profiles = [profile(folder, clip, scratch / f"part-{folder.name}") for folder in (photos, small)]
    differences = relative(stored(photographs.fast.plan), stored(photographs.ours.plan))
    columns = ["way", "images/s", "times the reference's loop", "times today's loop, pil processor"]
    record(
        "extraction",
        [
            {
                "title": f"CLS token of layer {LAYER}, {n_photos:,} JPEGs of {SIZE[0]} × {SIZE[1]} pixels, 2 cores",
                "columns": columns,
                "rows": photographs.rows(),
            },
            {
                "title": f"The same, of the embedded world's own {SIDE} × {SIDE} pixels",
                "columns": columns,
                "rows": renders.rows(),
            },
            {
                "title": "Where the time goes, one thread",
                "columns": ["work", "ms per photograph", f"ms per image of {SIDE} × {SIDE}"],
                "rows": [[work, *(round(one[work], 3) for one in profiles)] for work in profiles[0]],
            },
            {
                "title": "Change of activations by fast pixels, relative to their distance from the mean",
                "columns": ["images", "change"],
                "rows": [[share, found] for share, found in differences.items()],
            },
            {
                "title": "Start-up",
                "columns": ["of", "seconds"],
                "rows": [
                    ["Ray", round(photographs.ray_seconds, 1)],
                    ["actors", round(photographs.ours.seconds - n_photos / photographs.ours.images_per_second, 1)],
                ],
            },
            {
                "title": "Memory of all processes at the peak, images of 56 × 56 pixels",
                "columns": ["images", "MB", "images/s"],
                "rows": memory,
            },
        ],
        {
            "kilobytes_per_image": round(sum(f.stat().st_size for f in photos.iterdir()) / n_photos / 1000, 1),
            "distinct_images": N_DISTINCT,
            "reference": environments.PEERS["reference"],
            "threads": THREADS,
        },
    )
    for name, one in (("photographs", photographs), ("renders", renders)):
        exact, fast = (run.images_per_second / one.fastest("own") for run in (one.ours, one.fast))
        print(f"{name}: {exact:.2f} times the reference's loop, {fast:.2f} times with fast pixels")


def contest(scratch: Path, images: Path, clip: str) -> Contest:
    """The fastest of some rounds of each way, and whether the activations are equal."""
    n, n_loop = N_IMAGES[images.name], N_LOOP[images.name]
    pythons = {"reference": environments.python_of("reference"), "today": Path(sys.executable)}
    loops: dict[str, float] = {}
    runs: dict[str, list[Extracted]] = {"exact": [], "fast": []}
    for turn in range(ROUNDS):
        for versions, ways in LOOPS.items():
            found = loop(pythons[versions], images, n_loop, clip, scratch, ways)
            loops |= {way: max(loops.get(way, 0.0), rate) for way, rate in zip(ways, found, strict=True)}
        begun = time.perf_counter()
        connect()
        ray_seconds = time.perf_counter() - begun
        for pixels, extracted in runs.items():
            root = scratch / f"{images.name}-{pixels}-{turn}"
            extracted.append(extract(root, images, scratch / "world", n, **{"extraction.pixels": pixels}))
        ray.shutdown()  # its processes would get in the way of the loops
    ours, fast = (max(extracted, key=lambda run: run.images_per_second) for extracted in runs.values())
    for backend in ("own", "pil"):
        check(stored(ours.plan)[:n_loop], torch.load(scratch / f"{backend}.pt", weights_only=True).numpy())
    return Contest(loops, ours, fast, ray_seconds)


def loop(python: Path, images: Path, n: int, clip: str, target: Path, ways: Sequence[str]) -> list[float]:
    """Images per second of the usual loop, one way after the other in one process."""
    command = [python, "-W", "ignore", "-m", "bench.contestants.loop", images, str(n), clip, str(LAYER), target, *ways]
    root = Path(__file__).parents[1]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, cwd=root).stdout)


def described(way: str) -> str:
    backend, workers = way.split(":")
    if backend == "own":
        return f"DataLoader, the reference's versions, {workers} workers"
    return f"DataLoader, {backend} processor, {workers} workers"


def write_images(folder: Path, n: int, size: tuple[int, int] | None) -> None:
    """`n` JPEGs, of which `N_DISTINCT` differ."""
    folder.mkdir()
    with ProcessPoolExecutor(2, get_context("spawn")) as pool:
        for number, data in enumerate(pool.map(partial(jpeg, size=size), range(N_DISTINCT), chunksize=25)):
            first = folder / f"{number:06d}.jpg"
            first.write_bytes(data)
            for copy in range(number + N_DISTINCT, n, N_DISTINCT):
                os.link(first, folder / f"{copy:06d}.jpg")


def jpeg(index: int, size: tuple[int, int] | None) -> bytes:
    image = render(index)
    if size is not None:
        pixels = np.asarray(image.resize(size, Image.Resampling.BICUBIC), np.float32)
        noise = np.random.default_rng(index).normal(0, 8, (*pixels.shape[:2], 1))
        image = Image.fromarray((pixels + noise).round().clip(0, 255).astype(np.uint8))
    out = BytesIO()
    image.save(out, "JPEG", quality=90)
    return out.getvalue()


def extract(root: Path, images: Path, world: Path, n: int, **overrides: Any) -> Extracted:
    """The extraction stage on the first `n` images, as `sae-ray run` calls it."""
    root.mkdir()
    chosen = root / "images"
    chosen.mkdir()
    for file in sorted(images.iterdir())[:n]:
        os.link(file, chosen / file.name)
    values = {
        "name": "bench",
        "images": {"train": {"path": str(chosen)}, "heldout": {"path": f"{world}/heldout"}},
        "encoder": {"model": f"{world}/clip"},
        "judge": {"model": f"{world}/clip", "point": "projection"},
        "grid": [{"sites": [SITE]}],
        "extraction": {"store_dtype": "float32", "images_per_part": IMAGES_PER_PART},
        "resources": {"extract": {"workers": 2, "batch_size": BATCH}},
    }
    plan = StudyPlan(Study.from_dict(values, overrides), Folder(root / "study"))
    [wanted] = [one for one in plan.extracts if one.images.name == "train"]
    begun = time.perf_counter()
    stage.run_only(plan, [wanted])
    seconds = time.perf_counter() - begun
    written = sorted(path.stat().st_mtime for path in Path(str(wanted.step.folder / "data")).iterdir())
    rate = (n - SKIPPED_PARTS * IMAGES_PER_PART) / (written[-1] - written[SKIPPED_PARTS - 1])
    return Extracted(wanted, seconds, rate)


def stored(plan: ExtractPlan) -> np.ndarray:
    store = ActivationStore(plan.step.folder)
    return np.concatenate([store.read(number)[2] for number in range(len(store.parts))])


def check(ours: np.ndarray, theirs: np.ndarray) -> None:
    difference = np.abs(ours - theirs).max() / np.abs(theirs).max()
    print(f"largest difference of activations, relative to the largest activation: {difference:.1e}")
    assert difference <= TOLERANCE


def relative(found: np.ndarray, exact: np.ndarray) -> dict[str, float]:
    """Lengths of the differences of activations from the exact ones, relative to these less their mean."""
    errors = np.linalg.norm(found - exact, axis=1) / np.linalg.norm(exact - exact.mean(0), axis=1)
    shares = {"half of them below": 0.5, "99 % below": 0.99, "all below": 1.0}
    return {name: round(float(np.quantile(errors, share)), 4) for name, share in shares.items()}


def memory_of(scratch: Path, images: Path, n: int) -> tuple[int, int]:
    """MB at the peak over this process and all below it, shared memory counted once; and images per second."""
    with peak_memory() as peak:
        run = extract(scratch / f"memory-{n}", images, scratch / "world", n)
    return round(max(peak) / 1024), round(run.images_per_second)


@contextmanager
def peak_memory() -> Iterator[list[int]]:
    """Kilobytes, sampled twice a second."""
    import psutil

    samples, stop = [0], threading.Event()

    def sample() -> None:
        own = psutil.Process()
        while not stop.wait(0.5):
            samples.append(sum(map(proportional, [own.pid, *(one.pid for one in own.children(recursive=True))])))

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield samples
    finally:
        stop.set()
        thread.join()


def proportional(pid: int) -> int:
    """Kilobytes of a process, pages that several share divided among them; 0 once it has ended."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("Pss:")), 0)


def profile(folder: Path, clip: str, target: Path) -> dict[str, float]:
    """Milliseconds per image of everything that an encoder actor does, one thread."""
    torch.set_num_threads(1)
    paths = sorted(folder.iterdir())[:N_PROFILED]
    preprocess, fast, encoder = load_preprocess(clip), load_preprocess(clip, fast=True), load_encoder(clip)
    site = Site.parse(SITE)
    spent: dict[str, float] = {}

    def timed(name: str, work: Callable) -> Any:
        begun = time.perf_counter()
        found = work()
        spent[name] = spent.get(name, 0) + time.perf_counter() - begun
        return found

    pixels = []
    for path in paths:
        data = timed("reading the file", path.read_bytes)
        image = timed("decoding", partial(decode_image, data))
        pixels.append(timed("resizing and cropping", partial(preprocess, image)))
        reduced = timed("decoding, fast pixels", partial(decode_image, data, at_least=2 * SIDE))
        timed("resizing and cropping, fast pixels", partial(fast, reduced))
    ids = [path.name for path in paths]
    tapped = []
    for start in range(0, len(pixels), BATCH):
        batch = slice(start, start + BATCH)
        tensor = torch.from_numpy(np.stack(pixels[batch]))
        rows = timed("encoder", lambda: encoder.tap(tensor, [site], ids[batch], 0)[site])  # noqa: B023
        tapped.append((np.arange(start, start + len(tensor)), rows.token.numpy(), rows.activation.numpy()))
    columns = [np.concatenate(column) for column in zip(*tapped, strict=True)]
    timed("writing parquet", lambda: write_part(Folder(target), 0, stored_rows(*columns, "float32"), []))
    return {name: 1000 * seconds / len(paths) for name, seconds in spent.items()}


if __name__ == "__main__":
    main()
