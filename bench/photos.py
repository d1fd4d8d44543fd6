"""What a study of photographs found, as figures and names of classes: python -m bench.photos ROOT

Of a finished `make photos`. No picture leaves the root.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import numpy as np

from bench.photo_claims import claims
from bench.photo_neurons import class_table, contact_sheets, level_table, name_table, short_names
from bench.photo_saes import CONCEPTS, RANKS, Sae, judged_images, mean, read, shown, vectors
from bench.record import Table, record
from sae_ray.encoders.sources import model_name
from sae_ray.report.neurons import image_labels
from sae_ray.store.activations import ActivationStore
from sae_ray.study.plan import StudyPlan
from sae_ray.study.root import recalled_plan
from sae_ray.study.summary import BEST


def scale(plan: StudyPlan) -> Table:
    """The MS of neurons that know nothing, and of neurons that know a class and nothing else."""
    unit = judged_images(plan)
    table = plan.images["heldout"].labels
    labels, names = image_labels(table), short_names(plan)
    label_names = np.array(table["label_name"].to_pylist())
    alike = {names[label_names[labels == one][0]]: likeness(unit[labels == one]) for one in np.unique(labels)}
    low, high = min(alike, key=alike.__getitem__), max(alike, key=alike.__getitem__)
    rows = [
        ["all held-out photographs alike", shown(likeness(unit))],
        ["all photographs of one class alike, mean of the classes", shown(mean(alike.values()))],
        [f"the same, lowest class ({low})", shown(alike[low])],
        [f"the same, highest class ({high})", shown(alike[high])],
    ]
    return Table(part="scale", title="The MS of a neuron that fires on", columns=["", "MS"], rows=rows)


def likeness(unit: np.ndarray) -> float:
    """Mean cosine of two rows of length 1."""
    n = len(unit)
    return float(((unit.sum(0) ** 2).sum() - n) / (n**2 - n))


def grids(saes: Sequence[Sae]) -> list[Table]:
    """A table for each site."""
    columns = ["", "neurons", "scored", "mean MS", f"best {BEST}", "by chance", "best", "seeds apart", "L0", "R²",
               "dead"]  # fmt: skip
    tables = []
    for site in dict.fromkeys(sae.site for sae in saes):
        here = [sae for sae in saes if sae.site == site]
        rows = []
        for sae in here:
            seeds = [cell.mean_ms for cell in sae.cells]
            apart = shown(max(seeds) - min(seeds)) if len(seeds) > 1 else None
            mean_ms, top, best, r2 = (shown(sae.figure(of)) for of in ("mean_ms", "top_ms", "best_ms", "r2"))
            n_scored = round(sae.figure("n_scored") or 0)
            rows.append([sae.title, sae.cells[0].n_neurons, n_scored, mean_ms, top, shown(sae.top_chance), best, apart,
                         shown(sae.figure("l0"), 1), r2, shown(sae.figure("dead_fraction"), 2)])  # fmt: skip
        n_seeds = max(len(sae.cells) for sae in here)
        title = f"{site}, means over {n_seeds} seeds" if n_seeds > 1 else site
        tables.append(Table(part="grid", title=title, columns=columns, rows=rows))
    return tables


def curves(saes: Sequence[Sae]) -> Table:
    rows = [[f"{sae.site}, {sae.title}", *(shown(sae.at_rank(rank)) for rank in RANKS)] for sae in saes]
    columns = ["", *(f"{rank:,}" for rank in RANKS)]
    return Table(part="curves", title="MS of the neuron of each rank", columns=columns, rows=rows)


def concepts(saes: Sequence[Sae]) -> Table:
    rows = [[f"{sae.site}, {sae.title}", *(shown(sae.concepts[key]) for key in CONCEPTS)] for sae in saes]
    chance = (shown(mean(sae.shuffled[key] for sae in saes if sae.architecture)) for key in CONCEPTS)
    rows.append(["shuffled labels, mean of all SAEs", *chance])
    return Table(part="probes", title="What neurons know of the ten classes", columns=["", *CONCEPTS.values()],
                 rows=rows)  # fmt: skip


def activations(plan: StudyPlan) -> Table:
    """How far activations are from 0, beside how far they are from one another."""
    sites = {train.activations.site.name: train.activations for train in plan.trains}
    rows = []
    for name, one in sites.items():
        found = vectors(ActivationStore(one.step.folder))
        centre, variance = found.mean(0), found.var(0)
        rows.append([name, round(float(np.linalg.norm(centre) / variance.sum() ** 0.5), 2),
                     round(float((abs(centre) / variance**0.5).max()), 1)])  # fmt: skip
    columns = ["site", "all", "largest dimension"]
    return Table(part="activations", title="Length of the activations' mean over their spread, |μ|/σ", columns=columns,
                 rows=rows)  # fmt: skip


def main() -> None:
    plan = recalled_plan(sys.argv[1])
    saes = read(plan)
    best = max((sae for sae in saes if sae.architecture), key=lambda sae: sae.figure("top_ms") or 0)
    tables = [
        scale(plan),
        claims(saes),
        *grids(saes),
        curves(saes),
        activations(plan),
        concepts(saes),
        class_table(plan, best),
        name_table(plan, saes),
        level_table(plan, saes),
        *contact_sheets(plan, best),
    ]
    for table in tables:
        print(f"\n{table['title']}")
        for row in [table["columns"], *table["rows"]]:
            print("  ".join(map(str, row)))
    facts = {
        "command": "python -m bench.photos",
        "encoder": model_name(plan.study.encoder.model),
        "judge": model_name(plan.study.judge.model),
        "images": {name: images.n_images for name, images in plan.images.items()},
    }
    record("photos", tables, facts)


if __name__ == "__main__":
    main()
