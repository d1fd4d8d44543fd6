"""When it helps to centre activations and to calibrate the inference threshold: R², L0 and dead latents on images that
were not trained on.

`python -m bench.centring [ROOT ...]`: synthetic activations, and those of the studies under these roots.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch

from bench.record import Table, record
from sae_ray.sae import BundleJob, Cell, CellJob, TrainingConfig, evaluate_store, load_sae, train_cells
from sae_ray.scores.scoring import score_store
from sae_ray.scores.tables import score_table
from sae_ray.store.activations import ActivationStore, finish_store, write_part
from sae_ray.store.casting import stored_rows
from sae_ray.store.files import Folder
from sae_ray.store.steps import Step

TRAINING = TrainingConfig(
    batch_size=512, steps=1500, warmup_steps=100, decay_start=1200, threshold_beta=0.99, threshold_start_step=375,
    dead_after_samples=75_000, centre=True, threshold="calibrated",
)  # fmt: skip
"""The demo's, but for AuxK, and for what is compared."""
CELLS = (Cell("batch_topk", 4, k=5), Cell("batch_topk", 4, k=20))
OFFSETS = (0, 3, 29)
WIDTH, DIRECTIONS, PRESENT = 64, 128, 0.03
N_TRAIN, N_HELDOUT, PER_PART = 16_384, 4096, 1024
BEST, MIN_IMAGES = 32, 5


class Site(NamedTuple):
    """Activations to train on, others to measure on, and the judge's embeddings of the latter if there are any."""

    name: str
    train: ActivationStore
    heldout: ActivationStore
    embeddings: ActivationStore | None = None


class Measured(NamedTuple):
    """An SAE: where its activations lie, how many latents are dead in training, and what it is on held-out images."""

    offset: float
    dead: float
    l0: float
    r2: float
    ms: float | None
    """Mean monosemanticity of the 32 best latents."""


def synthetic(root: Folder, offset: float) -> Site:
    """Sparse mixtures of fixed directions, whose mean is moved so many spreads away from 0."""
    rng = np.random.default_rng(0)
    directions = rng.normal(size=(DIRECTIONS, WIDTH))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    n = N_TRAIN + N_HELDOUT
    x = (rng.random((n, DIRECTIONS)) < PRESENT) * rng.uniform(0.5, 1.5, (n, DIRECTIONS)) @ directions
    x -= x.mean(0)
    towards = rng.normal(size=WIDTH)
    x += offset * np.sqrt(np.square(x).sum(1).mean()) * towards / np.linalg.norm(towards)
    train, heldout = (stored(root, f"{len(rows)}-{offset}", rows) for rows in (x[:N_TRAIN], x[N_TRAIN:]))
    return Site(f"synthetic, moved by {offset}", train, heldout)


def stored(root: Folder, label: str, x: np.ndarray) -> ActivationStore:
    step = Step(root, "extract", label, {"store_dtype": "float16", "images_per_part": PER_PART})
    parts = []
    for number, rows in enumerate(np.split(x.astype("float32"), len(x) // PER_PART)):
        image = np.arange(PER_PART) + number * PER_PART
        parts.append(write_part(step.folder, number, stored_rows(image, np.zeros(PER_PART), rows, "float16"), []))
    finish_store(step, parts, x.shape[1], 0.0)
    return ActivationStore(step.folder)


def sites_of(root: Path) -> list[Site]:
    """The sites of a study that were extracted."""

    def opened(pattern: str) -> ActivationStore:
        [path] = root.glob(pattern)
        return ActivationStore(Folder(str(path)))

    names = [path.name.rpartition("-")[0] for path in sorted(root.glob("activations-train-*"))]
    sites = [name.removeprefix("activations-train-") for name in names]
    judge = opened("embeddings-heldout-[0-9a-f]*")
    return [
        Site(f"{root.name}, {site}", opened(f"{name}-*"), opened(f"activations-heldout-{site}-*"), judge)
        for name, site in zip(names, sites, strict=True)
    ]


@cache
def measured(site: Site, cell: Cell) -> Measured:
    with tempfile.TemporaryDirectory() as scratch:
        job = CellJob(Step(Folder(scratch), "train", "sae", {}), cell)
        train_cells(BundleJob(site.train.folder, (job,), stream_seed=0, shuffle_rows=2**21, checkpoint_every=10**9))
        record = job.step.record()
        assert record is not None
        counts, sae = record["counts"], load_sae(job.step.folder)
    fidelity, ms = evaluate_store(sae, site.heldout).summary(), None
    if site.embeddings is not None:
        scores = score_table(score_store(sae, site.heldout, site.embeddings, 1))
        scored = scores["ms"].to_numpy()[scores["n_active"].to_numpy() >= MIN_IMAGES]
        ms = float(np.sort(scored[~np.isnan(scored)])[-BEST:].mean())
    dead = (counts["never_fired"] + counts["stopped_firing"]) / sae.d_sae
    return Measured(counts["mean_over_spread"], dead, fidelity.l0, fidelity.r2, ms)


def cells_of(site: Site) -> list[tuple[Cell, Literal["post", "pre"]]]:
    """What is trained on it, and how AuxK selects."""
    if site.embeddings is None:
        return [(CELLS[0], "post"), (CELLS[0], "pre")]
    return [(cell, "pre") for cell in CELLS]


def centring_table(sites: Sequence[Site]) -> Table:
    rows = []
    for site in sites:
        for cell, select in cells_of(site):
            training = replace(TRAINING, auxk_select=select)
            off, on = (
                measured(site, replace(cell, training=replace(training, centre=centre))) for centre in (False, True)
            )
            figures = [off.r2, on.r2, off.ms, on.ms, off.dead, on.dead]
            rows.append([site.name, round(off.offset, 2), cell.k, select, *map(rounded, figures)])
            print(rows[-1], flush=True)
    return Table(
        title=f"Without and with centring: BatchTopK of {CELLS[0].expansion} times the width, on held-out images",
        columns=[
            *("activations", "mean / spread", "k", "AuxK", "R²", "centred"),
            *(f"MS of the {BEST} best", "centred", "dead in training", "centred"),
        ],
        rows=rows,
    )


def threshold_table(sites: Sequence[Site]) -> Table:
    rows = []
    for site in sites:
        for cell, select in cells_of(site):
            training = replace(TRAINING, auxk_select=select)
            average, calibrated = (
                measured(site, replace(cell, training=replace(training, threshold=threshold)))
                for threshold in ("average", "calibrated")
            )
            figures = [average.l0, calibrated.l0, average.r2, calibrated.r2, average.ms, calibrated.ms]
            rows.append([site.name, site.train.n_images, cell.k, select, *map(rounded, figures)])
            print(rows[-1], flush=True)
    return Table(
        title="The threshold by the average and calibrated, on held-out images",
        columns=[
            *("activations", "training images", "k", "AuxK", "L0", "calibrated", "R²", "calibrated"),
            *(f"MS of the {BEST} best", "calibrated"),
        ],
        rows=rows,
    )


def rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 3)


def main(roots: Sequence[str]) -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        made = [synthetic(Folder(scratch), offset) for offset in OFFSETS]
        given = [site for root in roots for site in sites_of(Path(root))]
        tables = [centring_table([*made, *given]), threshold_table(given)]
    names = [Path(root).name for root in roots]
    record("centring", tables, {"command": " ".join(["python -m bench.centring", *names])})


if __name__ == "__main__":
    main(sys.argv[1:])
