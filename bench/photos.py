"""What a study of photographs found, as figures and names of classes: python -m bench.photos ROOT

Of a finished `make photos`. No picture leaves the root.
"""

from __future__ import annotations

import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from bench.record import Table, record
from sae_ray.encoders.sources import model_name
from sae_ray.report.neurons import Neurons, image_labels, read_neurons
from sae_ray.scores.tables import ScoreTables
from sae_ray.store.activations import ActivationStore
from sae_ray.study.plan import ExtractPlan, StudyPlan
from sae_ray.study.root import recalled_plan
from sae_ray.study.summary import CellSummary, summarise

RANKS = (1, 4, 16, 64, 256, 1024)
N_SHOWN = 12
"""Neurons in each table of them."""
CONCEPTS = {
    "n_found_concepts": "classes found (ρ ≥ .5)", "rho": "ρ of a class's best neuron", "probe_r": "probe R",
    "average_precision": "mAP", "sparse_1": "1 neuron", "sparse_5": "5 neurons", "fms_1": "FMS@1", "purity": "purity",
    "stability": "stability",
}  # fmt: skip


class Sae(NamedTuple):
    """Cells that differ in their seeds alone, or the raw neurons of a site."""

    name: str
    site: str
    architecture: str | None
    """None for raw neurons."""
    expansion: float
    k: int
    cells: list[CellSummary]
    ranks: list[float | None]
    """MS of the neurons of `RANKS`."""
    concepts: dict[str, float | None]
    chance: dict[str, float | None]
    """The same with shuffled labels."""

    @property
    def place(self) -> tuple:
        """In the grid."""
        return self.site, self.architecture, self.expansion, self.k

    def mean(self, of: str) -> float | None:
        return mean(getattr(cell, of) for cell in self.cells)


def mean(values: Iterable[float | None]) -> float | None:
    there = [value for value in values if value is not None]
    return float(np.mean(there)) if there else None


def read(plan: StudyPlan) -> list[Sae]:
    groups: dict[str, list[CellSummary]] = defaultdict(list)
    for row in summarise(plan):
        groups[row.grid_cell.recipe if row.grid_cell else row.name].append(row)
    counts = {one.name: record["counts"] for one in plan.concepts if (record := one.step.record())}
    scores = {one.name: ScoreTables(one.step.folder).scores for one in plan.scores if one.embeddings is not None}
    saes = []
    for name, rows in groups.items():
        curves = []
        for row in rows:
            columns = scores[row.name]
            ms = columns.ms[(columns.n_active >= plan.study.scoring.min_images) & ~np.isnan(columns.ms)]
            curves.append(np.sort(ms)[::-1])
        ranks = [mean(float(curve[rank - 1]) if rank <= len(curve) else None for curve in curves) for rank in RANKS]
        found = [counts[row.name] for row in rows]
        cell = rows[0].grid_cell
        saes.append(
            Sae(
                name=name,
                site=rows[0].site,
                architecture=cell.cell.architecture if cell else None,
                expansion=cell.cell.expansion if cell else 0,
                k=(cell.cell.k or 0) if cell else 0,
                cells=rows,
                ranks=ranks,
                concepts={key: mean(one.get(key) for one in found) for key in CONCEPTS},
                chance={key: mean(one.get("shuffled", {}).get(key) for one in found) for key in CONCEPTS},
            )
        )
    return saes


def shown(value: float | None, digits: int = 3) -> float | None:
    return None if value is None else round(value, digits)


def grid(saes: Sequence[Sae]) -> Table:
    rows = []
    for sae in saes:
        seeds = [cell.mean_ms for cell in sae.cells]
        figures = [shown(sae.mean(of)) for of in ("mean_ms", "top_ms", "best_ms", "l0", "r2", "dead_fraction")]
        rows.append([f"`{sae.name}`", sae.cells[0].n_neurons, round(sae.mean("n_scored") or 0), *figures])
        rows[-1].append(shown(max(seeds) - min(seeds)) if len(seeds) > 1 else None)
    columns = ["", "neurons", "scored", "mean MS", "best 32", "best", "L0", "R²", "dead", "mean MS, seeds apart"]
    n_seeds = max(len(sae.cells) for sae in saes)
    title = f"The grid, means over {n_seeds} seeds where there are so many" if n_seeds > 1 else "The grid"
    return Table(title=title, columns=columns, rows=rows)


def curves(saes: Sequence[Sae]) -> Table:
    rows = [[f"`{sae.name}`", *map(shown, sae.ranks)] for sae in saes]
    return Table(title="MS of the neuron of each rank", columns=["", *(f"{rank:,}" for rank in RANKS)], rows=rows)


def concepts(saes: Sequence[Sae]) -> Table:
    rows = [[f"`{sae.name}`", *(shown(sae.concepts[key]) for key in CONCEPTS)] for sae in saes]
    chance = (shown(mean(sae.chance[key] for sae in saes if sae.architecture)) for key in CONCEPTS)
    rows.append(["shuffled labels, mean of all SAEs", *chance])
    return Table(title="What neurons know of the ten classes", columns=["", *CONCEPTS.values()], rows=rows)


def vectors(plan: ExtractPlan) -> np.ndarray:
    store = ActivationStore(plan.step.folder)
    return np.concatenate([store.read(part)[2].astype(np.float64) for part in store.parts])


def activations(plan: StudyPlan) -> Table:
    """How far activations are from 0, beside how far they are from one another."""
    sites = {train.activations.site.name: train.activations for train in plan.trains}
    rows = []
    for name, one in sites.items():
        found = vectors(one)
        centre, variance = found.mean(0), found.var(0)
        rows.append([name, round(float(np.linalg.norm(centre) / variance.sum() ** 0.5), 2),
                     round(float((abs(centre) / variance**0.5).max()), 1)])  # fmt: skip
    return Table(
        title="Mean of the activations over their spread", columns=["site", "all", "largest dimension"], rows=rows
    )


def likeness(plan: StudyPlan) -> float:
    """The judge's mean cosine of two held-out images: the MS of a neuron that fires whatever the image."""
    [judge] = {one.step.name: one for one in plan.extracts if one.field == "judge.model"}.values()
    found = vectors(judge)
    found /= np.linalg.norm(found, axis=1, keepdims=True)
    n = len(found)
    return float(((found.sum(0) ** 2).sum() - n) / (n**2 - n))


def class_counts(neurons: Neurons, neuron: int, names: dict[int, str], labels: np.ndarray) -> str:
    images = neurons.top_image[neuron]
    counted = Counter(names[int(label)] for label in labels[images[images >= 0]])
    return ", ".join(f"{name} {n}" for name, n in counted.most_common())


def neuron_tables(plan: StudyPlan, sae: Sae) -> list[Table]:
    """The best neurons of an SAE, and those in the middle."""
    [neurons] = read_neurons(plan, [sae.cells[0].name])
    table = neurons.pictures.labels
    labels = image_labels(table)
    words = zip(labels.tolist(), table["label_name"].to_pylist(), strict=True)
    names = {label: name.partition(",")[0] for label, name in words if name}
    scored = [int(one) for one in neurons.order if neurons.columns.n_active[one] >= plan.study.scoring.min_images]
    middle = len(scored) // 2 - N_SHOWN // 2
    tables = []
    for what, chosen in (("best", scored[:N_SHOWN]), ("middle", scored[middle : middle + N_SHOWN])):
        rows = [
            [str(one), shown(float(neurons.columns.ms[one])), int(neurons.columns.n_active[one]),
             class_counts(neurons, one, names, labels)]
            for one in chosen
        ]  # fmt: skip
        title = f"The {len(rows)} {what} of {len(scored):,} neurons of `{sae.cells[0].name}`"
        columns = ["neuron", "MS", "held-out images", "classes of its 16 top training images"]
        tables.append(Table(title=title, columns=columns, rows=rows))
    return tables


def of_each(saes: Sequence[Sae], by: str, figure: str) -> str:
    """The mean figure of the SAEs of each kind, in order."""
    kinds = sorted({getattr(sae, by) for sae in saes})
    means = [mean(sae.mean(figure) for sae in saes if getattr(sae, by) == kind) for kind in kinds]
    return " ".join(f"{one:.3f}".removeprefix("0") for one in means)


def held(pairs: Iterable[tuple[float | None, float | None]]) -> str:
    """In how many pairs the first is above the second."""
    there = [(a, b) for a, b in pairs if a is not None and b is not None]
    return f"{sum(a > b for a, b in there)} of {len(there)}"


def claims(everything: Sequence[Sae], base: float) -> Table:
    """The statements of Pach et al. 2025 (arXiv 2504.02821), with their figures and ours."""
    raw = {sae.site: sae for sae in everything if sae.architecture is None}
    saes = [sae for sae in everything if sae.architecture is not None]
    found = {sae.place: sae for sae in saes}

    def against(field: str, others: dict, figure: str) -> str:
        """In how many pairs an SAE is above the one with another value of a field."""
        places = [(sae, sae._replace(**{field: others.get(getattr(sae, field))}).place) for sae in saes]
        pairs = [(sae, found[place]) for sae, place in places if place in found]
        return held((sae.mean(figure), other.mean(figure)) for sae, other in pairs)

    flat = {"matryoshka_batch_topk": "batch_topk"}
    means = [sae.mean("mean_ms") or 0 for sae in saes]
    raw_mean = mean(one.mean("mean_ms") for one in raw.values()) or 0
    rows = [
        ["latents are more monosemantic than raw neurons (mean MS)", "raw .014, SAEs .12 to .23",
         f"raw {raw_mean:.3f}, SAEs {min(means):.3f} to {max(means):.3f}; two random images {base:.3f}",
         held((sae.mean("mean_ms"), raw[sae.site].mean("mean_ms")) for sae in saes)],
        ["sparser is more monosemantic (mean MS)", "K 1 10 20 50: .37 .19 .16 .07",
         f"K 5 20: {of_each(saes, 'k', 'mean_ms')}", against("k", {5: 20}, "mean_ms")],
        ["sparser reconstructs less (R²)", "K 1 10 20 50: .31 .61 .67 .75",
         f"K 5 20: {of_each(saes, 'k', 'r2')}", against("k", {20: 5}, "r2")],
        ["wider has better best neurons (mean of 32)", "best, ×1 ×4 ×16: .57 .78 .85",
         f"×1 ×4 ×16: {of_each(saes, 'expansion', 'top_ms')}", against("expansion", {4: 1, 16: 4}, "top_ms")],
        ["Matryoshka is above BatchTopK (mean MS)", "×1 ×4 ×16: .16 .23 .19 against .12 .19 .16",
         f"BatchTopK, Matryoshka: {of_each(saes, 'architecture', 'mean_ms')}",
         against("architecture", flat, "mean_ms")],
        ["Matryoshka is above BatchTopK (best MS)", "×1 ×4 ×16: .82 .89 .91 against .57 .78 .85",
         f"BatchTopK, Matryoshka: {of_each(saes, 'architecture', 'best_ms')}",
         against("architecture", flat, "best_ms")],
    ]  # fmt: skip
    columns = ["claim", "paper", "here, means over the grid", "holds"]
    return Table(title="The paper's claims", columns=columns, rows=rows)


def main() -> None:
    plan = recalled_plan(sys.argv[1])
    saes, base = read(plan), likeness(plan)
    best = max((sae for sae in saes if sae.architecture), key=lambda sae: sae.mean("top_ms") or 0)
    tables = [
        claims(saes, base),
        grid(saes),
        curves(saes),
        activations(plan),
        concepts(saes),
        *neuron_tables(plan, best),
    ]
    for table in tables:
        print(f"\n{table['title']}")
        for row in [table["columns"], *table["rows"]]:
            print("  ".join(map(str, row)))
    seconds: dict[str, float] = defaultdict(float)
    for step in plan.steps:
        if found := step.record():
            seconds[step.stage] += found["seconds"]
    facts = {
        "command": "python -m bench.photos",
        "encoder": model_name(plan.study.encoder.model),
        "judge": model_name(plan.study.judge.model),
        "images": {name: images.n_images for name, images in plan.images.items()},
        "seconds_of_all_steps": {stage: round(value) for stage, value in seconds.items()},
    }
    record("photos", tables, facts)


if __name__ == "__main__":
    main()
