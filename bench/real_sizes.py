"""Encoders and SAEs of the sizes that people use, with random weights: memory and time of each stage's work.

A piece of work runs in a process of its own, by the functions that the stage calls, on as many threads as a task has by
default: one. What is told is the peak of each step of it, without and with the pages of files that are mapped, such as
weights: processes share these, and the system drops them where memory is short.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from threading import Event, Thread
from typing import Any

import numpy as np
import torch
from PIL import Image

from bench.real_models import RealModel, encoders
from bench.record import Table, record
from sae_ray.encoders import Site, load_encoder, load_preprocess
from sae_ray.encoders.part import encode_part
from sae_ray.images.part import Preparation, decode_part
from sae_ray.sae import Cell, CellTrainer, TrainingConfig, load_sae, save_sae
from sae_ray.sae.metrics import evaluate_store
from sae_ray.sae.product import release
from sae_ray.scores.scoring import score_store
from sae_ray.scores.tables import write_tables
from sae_ray.store.activations import ActivationStore, finish_store, write_part
from sae_ray.store.checkpoints import save_checkpoint
from sae_ray.store.files import Folder
from sae_ray.store.steps import Step, hold

IMAGES = 64
"""Of a part: one batch of the study's default, to save time. By default a part has 512, in eight batches."""
PHOTO = (500, 375)
FULL, SMALL = (65_536, 64), (512, 4)
"""Latents, and tokens per image of the activations that an SAE is trained, evaluated and scored on."""
BATCH_SIZES = (512, 4096)
K, TOP_IMAGES = 20, 16
COLUMNS = ["work", "seconds of CPU", "peak GB", "with mapped files"]

SAMPLE_SECONDS = 0.02

Rows = list[list[Any]]
"""`COLUMNS` of each step of a piece of work."""
Run = Callable[..., Any]
"""Calls a function, its first argument, with the others."""


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.real_sizes", description=__doc__)
    parser.add_argument("--scratch", type=Path, help="folder for what is written and deleted again, 10 GB at once")
    parser.add_argument("--images", type=int, default=IMAGES, help=f"of a part, {IMAGES} by default")
    parser.add_argument("--small", action="store_true", help="tiny models, in this process; figures are only printed")
    given = parser.parse_args(arguments)
    tables = []
    for model in encoders(given.small):
        with tempfile.TemporaryDirectory(dir=given.scratch) as scratch:
            sizes = (*SMALL, here) if given.small else (*FULL, apart)
            rows = of_encoder(model, Path(scratch), given.images, *sizes)
        title = f"{model.name}: one part of {given.images} images, SAEs of 65,536 latents"
        tables.append(Table(title=title, columns=COLUMNS, rows=rows))
    finish("real_sizes", tables, given.small)


def finish(name: str, tables: list[Table], small: bool) -> None:
    """Prints the tables, and records them unless they are of tiny models."""
    for table in tables:
        print(table["title"], *table["rows"], sep="\n")
    if not small:
        record(name, tables, {"command": f"python -m bench.{name}"})


def of_encoder(model: RealModel, scratch: Path, n_images: int, d_sae: int, tokens: int, run: Run) -> Rows:
    folder, root = scratch / "model", scratch / "root"
    run(model.write, folder)
    write_photos(scratch / "photos", n_images)
    everything, some = f"layer{model.layer}:all", f"layer{model.layer}:random:{tokens}"
    return [
        *run(extract, folder, scratch / "photos", root, (everything, some, "pooled")),
        *run(train, root, some, "batch_topk", d_sae),
        *run(train, root, some, "jumprelu", d_sae),
        *run(evaluate, root, some),
        *run(score, root, some),
    ]


def apart(work: Callable[..., Any], *arguments: Any) -> Any:
    """What it returns in a new process; where memory runs out, one row that says so."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        try:
            return pool.submit(work, *arguments).result()
        except BrokenProcessPool:
            return [[f"{work.__name__}: ended, most likely for want of memory", None, None, None]]


def here(work: Callable[..., Any], *arguments: Any) -> Any:
    """What it returns in this process."""
    return work(*arguments)


def step(rows: Rows, what: str, work: Callable[[], Any]) -> Any:
    """Does it, and adds its row."""
    with peaks() as found:
        begun = time.process_time()  # of all threads; other programs do not count
        result = work()
        seconds = time.process_time() - begun
    rows.append([what, round(seconds, 1), *(round(kilobytes * 1024 / 1e9, 2) for kilobytes in found)])
    return result


@contextmanager
def peaks() -> Iterator[list[int]]:
    """Kilobytes of this process at the peak, without and with mapped files. Linux tells the latter, the former is
    sampled. A child's `ru_maxrss` begins at its parent's, so it is not asked."""
    found, ended = [0, 0], Event()
    forget, status = Path("/proc/self/clear_refs"), Path("/proc/self/status")
    forget.write_text("5")  # the peak so far

    def sample() -> None:
        while True:
            kilobytes = dict(line.split(":", 1) for line in status.read_text().splitlines())
            own, peak = (int(kilobytes[name].split()[0]) for name in ("RssAnon", "VmHWM"))
            found[:] = max(found[0], own), peak
            if ended.wait(SAMPLE_SECONDS):
                return

    thread = Thread(target=sample)
    thread.start()
    try:
        yield found
    finally:
        ended.set()
        thread.join()


def extract(model: Path, photos: Path, root: Path, sites: Sequence[str]) -> Rows:
    """One part through an encoder, as an actor of the extraction does it."""
    torch.set_num_threads(1)
    rows: Rows = []
    ids = sorted(path.name for path in photos.iterdir())
    preparation = Preparation(load_preprocess(str(model)))
    encoder = step(rows, "extract: the encoder loaded, float32", lambda: load_encoder(str(model)))
    part = step(rows, "extract: the part decoded", lambda: decode_part(Folder(photos), ids, [preparation]))
    wanted = [(Site.parse(site), "float16") for site in sites]
    n_tokens = encoder.info.n_tokens
    encoded = step(
        rows,
        f"extract: encoded in one batch, {n_tokens} tokens per image kept",
        lambda: encode_part(encoder, wanted, part.pixels[0], part.accepted, ids, 0, len(ids)),
    )

    def write() -> None:
        for site, found in zip(sites, encoded, strict=True):
            store = step_of(root, site, len(ids))
            with hold([store]):
                finish_store(store, [write_part(store.folder, 0, found, [])], found.activation.shape[1], 0.0)

    step(rows, "extract: written", write)
    return rows


def train(root: Path, site: str, architecture: str, d_sae: int) -> Rows:
    """Steps of one SAE, a checkpoint, and the SAE, as a task of the training does them."""
    torch.set_num_threads(1)
    rows: Rows = []
    store = ActivationStore(folder_of(root, site))
    vectors = torch.tensor(store.read(0)[2]).float() / store.root_mean_square_norm
    dense = architecture == "jumprelu"
    training = TrainingConfig(steps=10, warmup_steps=1, threshold_start_step=0, dead_after_samples=10**6)
    tuned = {"sparsity": 0.1} if dense else {"k": K}
    cell = Cell(architecture, expansion=(d_sae + 0.5) / store.d, training=training, **tuned)
    trainer = step(rows, f"train {architecture}: the beginning", lambda: CellTrainer(cell, store.d))

    def batch(size: int) -> torch.Tensor:
        return vectors[torch.arange(size) % len(vectors)]

    for size in BATCH_SIZES:
        step(rows, f"train {architecture}: a step of {size:,}", lambda: trainer.step(batch(size)))  # noqa: B023
    if dense:
        return rows
    trainer.samples_since_fired[::2] = training.dead_after_samples
    large = BATCH_SIZES[-1]
    with_dead = f"train {architecture}: a step of {large:,}, half of the latents dead"
    step(rows, with_dead, lambda: trainer.step(batch(large)))
    checkpoints = Folder(root / "checkpoints")
    step(rows, f"train {architecture}: a checkpoint", lambda: save_checkpoint(checkpoints, 1, *trainer.state(False)))
    release()

    def write() -> None:
        sae = trainer.export(store.root_mean_square_norm)
        assert sae is not None, "there is one rank"
        save_sae(sae, Folder(root / "sae"))

    step(rows, f"train {architecture}: the SAE written", write)
    return rows


def evaluate(root: Path, site: str) -> Rows:
    """Fidelity on all activations of the part, as a task of the evaluation measures it."""
    torch.set_num_threads(1)
    rows: Rows = []
    store = ActivationStore(folder_of(root, site))
    sae = step(rows, "evaluate: the SAE loaded", lambda: load_sae(root / "sae"))
    step(rows, f"evaluate: {store.n_rows:,} activations", lambda: evaluate_store(sae, store).summary())
    return rows


def score(root: Path, site: str) -> Rows:
    """Scores on the part, as tasks of the scoring compute and write them."""
    torch.set_num_threads(1)
    rows: Rows = []
    store, judge = (ActivationStore(folder_of(root, one)) for one in (site, "pooled"))
    sae = step(rows, "score: the SAE loaded", lambda: load_sae(root / "sae"))
    found = step(rows, f"score: {store.n_rows:,} activations", lambda: score_store(sae, store, judge, TOP_IMAGES))
    step(rows, "score: written", lambda: write_tables(Folder(root / "scores"), found))
    return rows


def step_of(root: Path, site: str, n_images: int) -> Step:
    config = {"store_dtype": "float16", "images_per_part": n_images}
    return Step(Folder(root), "extract", site.replace(":", "-"), config)


def folder_of(root: Path, site: str) -> Folder:
    [found] = root.glob(f"*{site.replace(':', '-')}-*")
    return Folder(found)


def write_photos(folder: Path, n: int) -> None:
    """JPEGs of coarse random patches."""
    folder.mkdir()
    random = np.random.default_rng(0)
    for number in range(n):
        image = Image.fromarray(random.integers(0, 256, (15, 20, 3), np.uint8))
        image.resize(PHOTO, Image.Resampling.BICUBIC).save(folder / f"{number:05d}.jpg", quality=90)


if __name__ == "__main__":
    main()
