"""What guidance brings and costs: `python -m bench.guidance ROOT`, ROOT being that of a finished `studies/demo.toml`.

SAEs of the embedded world with the loss of concepts and without it, everything else being equal, by trees of one split
on held-out images; and a step of each kind beside that of BatchTopK. Writes `bench/results/guidance.json`.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np
import torch

from bench.record import Table, record
from bench.train import BATCH, D_IN, THREADS, K, activations
from sae_ray.concepts import Labels, balanced_rows, fms
from sae_ray.concepts.image_codes import image_codes
from sae_ray.concepts.labelling import image_classes
from sae_ray.sae import BundleJob, Cell, CellJob, CellTrainer, TrainingConfig, evaluate_store, load_sae, train_cells
from sae_ray.sae.guidance import ConceptSums
from sae_ray.sae.targets import Targets
from sae_ray.store.activations import ActivationStore
from sae_ray.store.files import Folder
from sae_ray.store.steps import Step
from sae_ray.study.plan import StudyPlan
from sae_ray.study.root import recalled_plan

CELLS = {
    "projection": [
        ("guided_topk", 4.0, 5),
        ("guided_topk", 4.0, 20),
        ("guided_batch_topk", 4.0, 5),
        ("guided_batch_topk", 4.0, 20),
    ],
    "layer3:random:4": [("guided_matryoshka_batch_topk", 8.0, 5)],
}
SEEDS = (0, 1)
NO_CONCEPT = "blank"
EXPANSION, CONCEPTS, ROUNDS, STEPS = 16, 16, 5, 4
"""Of the steps that are timed. Kinds take turns in rounds of so many steps; the first round does not count."""


def main() -> None:
    torch.set_num_threads(1)
    plan = recalled_plan(sys.argv[1])
    world = Table(
        title="The embedded world with the loss of concepts and without: mean of 16 shapes and two seeds, in brackets "
        "half of the difference between seeds",
        columns=["SAE", "loss", "accs_0", "accs_0, unseen", "own latent is root", "local@1", "FMS@1", "L0", "NMSE",
                 "accuracy", "selected"],
        rows=[row for site in CELLS for row in world_rows(plan, site)],
    )  # fmt: skip
    steps = Table(
        title=f"One step on a CPU: d_in {D_IN}, d_sae {EXPANSION * D_IN}, k {K}, {CONCEPTS} concepts, batch {BATCH}, "
        f"float32, {THREADS} threads",
        columns=["architecture", "ms (median)", "ms (fastest)", "times BatchTopK, by the fastest"],
        rows=step_rows(),
    )
    print(record("guidance", [world, steps]))
    for table in (world, steps):
        print(table["title"], *table["rows"], sep="\n")


def world_rows(plan: StudyPlan, site: str) -> list[list[Any]]:
    """One row for each kind of SAE, with the loss and without."""
    name = site.replace(":", ".", 1).replace(":", "-")
    stores = {}
    for images in ("train", "heldout"):
        label = f"activations-{images}-{name}"
        stores[images] = ActivationStore(next(one.step.folder for one in plan.extracts if one.step.label == label))
    targets = {images: Targets.of_classes(image_classes(plan.images[images].labels)) for images in stores}
    wanted = [
        guided_cell(kind, expansion, k, weight, seed, plan.study.training)
        for kind, expansion, k in CELLS[site]
        for weight in (1.0, 0.0)
        for seed in SEEDS
    ]
    with tempfile.TemporaryDirectory() as scratch:
        steps = [Step(Folder(Path(scratch)), "train", f"sae-{number}", {}) for number in range(len(wanted))]
        jobs = tuple(
            CellJob(step, cell, targets["train"] if cell.guided else None)
            for step, cell in zip(steps, wanted, strict=True)
        )
        train_cells(BundleJob(stores["train"].folder, jobs, 0, plan.study.shuffle_rows, checkpoint_every=10**9))
        found: dict[tuple[str, str], list[list[float]]] = defaultdict(list)
        for job in jobs:
            cell = job.cell
            title = f"{site} {cell.architecture} ×{cell.expansion:g}, k {cell.k}"
            found[title, "on" if cell.guided else "off"].append(measured(job, stores["heldout"], targets["heldout"]))
    rows = []
    for what, runs in found.items():
        rows.append([*what, *(spread([run[place] for run in runs]) for place in range(len(runs[0])))])
    return rows


def guided_cell(kind: str, expansion: float, k: int, weight: float, seed: int, training: TrainingConfig) -> Cell:
    plain = Cell(kind, expansion, k=k, seed=seed, training=training)
    return replace(plain, settings=replace(plain.settings, concept_weight=weight))


def measured(job: CellJob, store: ActivationStore, targets: Targets) -> list[float]:
    """The figures of one SAE, as in the columns of the table."""
    sae = load_sae(job.step.folder)
    guided = replace(sae, concepts=targets.concepts)  # also where it is not: the same latents are looked at
    sums = ConceptSums(guided, targets)
    summary = evaluate_store(sae, store, also=sums.update).summary()
    images = image_codes(sae, store)
    labels = Labels.of(targets.rows(torch.from_numpy(images.image_index)).numpy(), targets.concepts)
    codes, trees = images.codes.tocsr(), []
    for place, concept in enumerate(targets.concepts):
        rows = balanced_rows(labels, place, 0)
        if concept == NO_CONCEPT or rows is None:
            continue
        shown = labels.of_concept(place)[rows]
        fitted, unseen = (fms(codes[rows], shown, evaluation=one) for one in ("fitted", "heldout"))
        trees.append([fitted.accs[0], unseen.accs[0], fitted.root == place, fitted.local[0], fitted.fms[0]])
    learnt = [one for name, one in sums.summary()["concepts"].items() if name != NO_CONCEPT]
    of_shapes = [np.mean([one[field] for one in learnt]) for field in ("accuracy", "selected")]
    return [*np.mean(trees, axis=0).tolist(), summary.l0, summary.nmse, *map(float, of_shapes)]


def spread(values: list[float]) -> str:
    half = (max(values) - min(values)) / 2
    return f"{mean(values):.3f} ({half:.3f})"


def step_rows() -> list[list[Any]]:
    torch.set_num_threads(THREADS)
    batches = torch.from_numpy(activations(ROUNDS * STEPS * BATCH, 0)).split(BATCH)
    targets = (torch.rand(BATCH, CONCEPTS, generator=torch.Generator().manual_seed(0)) < 1 / CONCEPTS).float()
    training = TrainingConfig(batch_size=BATCH, steps=1000, learning_rate=1e-3)
    trainers = {}
    for kind in ("batch_topk", "guided_batch_topk", "topk", "guided_topk"):
        cell = Cell(kind, EXPANSION, k=K, training=training)
        trainers[kind] = CellTrainer(cell, D_IN, concepts=tuple(map(str, range(CONCEPTS))) if cell.guided else ())
    taken: dict[str, list[float]] = defaultdict(list)
    for number in range(ROUNDS):
        for kind, trainer in trainers.items():
            for batch in batches[number * STEPS : (number + 1) * STEPS]:
                started = time.perf_counter()
                trainer.step(batch, targets if trainer.concepts else None)
                taken[kind].append(1000 * (time.perf_counter() - started))
    fastest = {kind: min(times[STEPS:]) for kind, times in taken.items()}
    return [
        [kind, round(median(taken[kind][STEPS:]), 1), round(one, 1), f"{one / fastest['batch_topk']:.2f}"]
        for kind, one in fastest.items()
    ]


if __name__ == "__main__":
    main()
