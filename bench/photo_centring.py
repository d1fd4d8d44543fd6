"""Whether centring helps on photographs: `python -m bench.photo_centring ROOT`, ROOT being that of a finished
`studies/photos.toml`.

SAEs of its class token without centring, with it, and with it and a learning rate that makes up for the other scale.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from dataclasses import replace

import torch

from bench.centring import BEST, Measured, Site, measured
from bench.methods import spread
from bench.record import Table, record
from sae_ray.sae import Cell
from sae_ray.store.activations import ActivationStore
from sae_ray.study.plan import StudyPlan
from sae_ray.study.root import recalled_plan

SITE = "layer10.cls"
CELLS = (Cell("batch_topk", 4, k=5), Cell("batch_topk", 16, k=20))
SEEDS = (0, 1)
WAYS = ("as it is", "centred", "centred, faster")


def site_of(plan: StudyPlan) -> Site:
    [score] = [one for one in plan.scores if one.embeddings and one.name == f"raw-{SITE}"]
    train = next(one for one in plan.trains if one.activations.site.name == SITE)
    folders = (train.activations.step.folder, score.activations.step.folder, score.embeddings.step.folder)
    return Site(SITE, *map(ActivationStore, folders))


def ways(site: Site, cell: Cell) -> Iterator[list[Measured]]:
    """The seeds of a cell as it is and centred; with a calibrated threshold also centred with a learning rate that is
    as many times as high as activations are longer than their spread."""
    centred = replace(cell.training, centre=True)
    yield [measured(site, replace(cell, seed=seed)) for seed in SEEDS]
    yield (found := [measured(site, replace(cell, seed=seed, training=centred)) for seed in SEEDS])
    if cell.training.threshold == "average":
        return
    rate = cell.training.learning_rate_at(cell.training.effective("warmup_steps"), cell.d_sae(site.train.d))
    faster = replace(centred, learning_rate=rate * math.hypot(1, found[0].offset))
    yield [measured(site, replace(cell, seed=seed, training=faster)) for seed in SEEDS]


def main() -> None:
    torch.set_num_threads(1)
    plan = recalled_plan(sys.argv[1])
    site, rows, offset = site_of(plan), [], 0.0
    for cell in CELLS:
        for threshold in ("calibrated", "average"):
            trained = replace(cell, training=replace(plan.study.training, threshold=threshold))
            title = f"×{cell.expansion:g}, K {cell.k}, {threshold}"
            for way, saes in zip(WAYS, ways(site, trained), strict=False):
                figures = zip(*((one.l0, one.r2, one.ms, one.dead) for one in saes), strict=True)
                rows.append([f"{title}, {way}", *(spread(list(seeds), 3) for seeds in figures)])
                offset = saes[0].offset
                print(rows[-1], flush=True)
    table = Table(
        title=f"BatchTopK at {SITE} of {site.train.n_images:,} photographs, the mean of which is {offset:.2f} spreads "
        "long, measured on others: mean of two seeds, in brackets half of their difference",
        columns=["SAE", "L0", "R²", f"MS of the {BEST} best", "dead in training"],
        rows=rows,
    )
    record("photo_centring", [table], {"command": "python -m bench.photo_centring runs/photos"})


if __name__ == "__main__":
    main()
