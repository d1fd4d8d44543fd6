"""Whether centring helps on photographs: `python -m bench.photo_centring ROOT`, ROOT being that of a finished
`studies/photos.toml`.

SAEs of its class token without centring and with it, each also with the learning rate that centring would need for
steps of the same length.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from dataclasses import replace

import torch

from bench.centring import BEST, Site, measured
from bench.methods import spread
from bench.record import Table, record
from sae_ray.sae import Cell
from sae_ray.store.activations import ActivationStore
from sae_ray.store.sample import Sample
from sae_ray.study.plan import StudyPlan
from sae_ray.study.root import recalled_plan

SITE = "layer10.cls"
CELLS = (Cell("batch_topk", 4, k=5), Cell("batch_topk", 16, k=20))
SEEDS = (0, 1)


def site_of(plan: StudyPlan) -> Site:
    [score] = [one for one in plan.scores if one.embeddings and one.name == f"raw-{SITE}"]
    train = next(one for one in plan.trains if one.activations.site.name == SITE)
    folders = (train.activations.step.folder, score.activations.step.folder, score.embeddings.step.folder)
    return Site(SITE, *map(ActivationStore, folders))


def ways(cell: Cell, offset: float, d_in: int) -> Iterator[tuple[str, Cell]]:
    """The cell as it is and centred; with a calibrated threshold also with a learning rate that is as many times as
    high as activations are longer than their spread."""
    training = cell.training
    rate = training.learning_rate_at(training.effective("warmup_steps"), cell.d_sae(d_in)) * math.hypot(1, offset)
    for centre, how in ((False, "as it is"), (True, "centred")):
        yield how, replace(cell, training=replace(training, centre=centre))
        if training.threshold == "calibrated":
            yield f"{how}, faster", replace(cell, training=replace(training, centre=centre, learning_rate=rate))


def main() -> None:
    torch.set_num_threads(1)
    plan = recalled_plan(sys.argv[1])
    site, rows = site_of(plan), []
    offset = Sample(site.train).location().offset
    for cell in CELLS:
        for threshold in ("calibrated", "average"):
            trained = replace(cell, training=replace(plan.study.training, threshold=threshold))
            for how, one in ways(trained, offset, site.train.d):
                saes = [measured(site, replace(one, seed=seed)) for seed in SEEDS]
                figures = zip(*((sae.l0, sae.r2, sae.ms, sae.dead) for sae in saes), strict=True)
                title = f"×{cell.expansion:g}, K {cell.k}, {threshold}, {how}"
                rows.append([title, *(spread(list(seeds), 3) for seeds in figures)])
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
