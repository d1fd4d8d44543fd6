"""MonoSemanticity against R² of the methods: `python -m bench.frontier ROOT [JUDGE]`, ROOT being that of a finished
`studies/frontier.toml` or `studies/photos_frontier.toml`.

Some methods have seen what they are scored by: the judge, or labels. So every SAE is scored by other judges, too: by
what images show, and by JUDGE, an encoder that nothing was trained with. In the world these see no blank images, which
are easy to be alike on. Writes `bench/results/NAME.json`, NAME being that of the study, and a figure, `docs/NAME.svg`.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import NamedTuple

import numpy as np
import torch

from bench.frontier_figure import figure
from bench.methods import purities_of, spread
from bench.record import RESULTS, Table, record
from sae_ray.concepts.labelling import image_classes
from sae_ray.encoders import Site, load_encoder, load_preprocess
from sae_ray.encoders.sources import model_name
from sae_ray.images.decode import decode_image
from sae_ray.sae import Cell, load_sae
from sae_ray.sae.monosemanticity import embeddings_by_image
from sae_ray.scores.scoring import score_store
from sae_ray.scores.tables import score_table
from sae_ray.store.activations import ActivationStore, finish_store, write_part
from sae_ray.store.casting import stored_rows
from sae_ray.store.files import Folder
from sae_ray.store.steps import Step
from sae_ray.study.plan import StudyPlan
from sae_ray.study.root import recalled_plan
from sae_ray.study.step_plans import ImagePlan
from sae_ray.study.summary import BEST, CellSummary, summarise
from sae_ray.world.render import attributes

DOCS = Path(__file__).parents[1] / "docs"
PAPER = ("BatchTopK", "Matryoshka")
"""The architectures of the paper, by the names in `NAMES`."""
NAMES = {
    "batch_topk": "BatchTopK", "matryoshka_batch_topk": "Matryoshka", "topk": "TopK", "jumprelu": "JumpReLU",
    "guided_batch_topk": "guided BatchTopK", "guided_matryoshka_batch_topk": "guided Matryoshka",
    "guided_topk": "guided TopK", "frozen_decoder": "frozen decoder", "random": "random",
}  # fmt: skip
BASELINES = ("frozen decoder", "random")
STUDYS, DRAWN, CLASS = "the judge", "what was drawn", "the class"
NO_BLANKS = "{}, no blanks"
STATISTICS = {"mean": "mean MS", "best": f"best {BEST}"}
BLANK, RAW = "blank", "raw neurons"
PARTS, BATCH = 16, 32


class Measured(NamedTuple):
    """One SAE on held-out images, or the raw neurons."""

    recipe: str
    method: str
    l0: float | None
    r2: float | None
    """Raw neurons have neither."""
    scored: int
    dead: float | None
    purity: float
    mean: dict[str, float]
    """Judge -> mean MS of the latents that are active on enough images."""
    best: dict[str, float]
    """The same of the 32 best."""


def main() -> None:
    torch.set_num_threads(2)
    plan = recalled_plan(sys.argv[1])
    stranger = sys.argv[2] if len(sys.argv) > 2 else None
    cells = measured_cells(plan, stranger)
    name = plan.study.name
    facts = {
        "command": f"python -m bench.frontier runs/{name}",
        "stranger": model_name(stranger) if stranger else None,
        "cells": [one._asdict() for of_recipe in cells.values() for one in of_recipe],
    }
    of_images = "shape" if has_blanks(plan.images["heldout"]) else "class"
    tables = [farthest(cells), verdicts(cells), everything(cells, plan.study.scoring.min_images, of_images)]
    print(record(name, tables, facts))
    (DOCS / f"{name}.svg").write_text(drawn_figure(name), encoding="utf-8")
    for table in tables:
        print(table["title"], table["columns"], *table["rows"], sep="\n")


def drawn_figure(name: str, results: Path = RESULTS) -> str:
    """The figure of what is recorded of the study of this name."""
    facts = json.loads((results / f"{name}.json").read_text(encoding="utf-8"))["facts"]
    return figure([cell for cell in facts["cells"] if cell["method"] not in BASELINES], PAPER)


# Measuring


def measured_cells(plan: StudyPlan, stranger: str | None) -> dict[str, list[Measured]]:
    """The SAEs of every recipe, one per seed."""
    scores = {score.name: score for score in plan.scores if score.embeddings}
    trains = {train.grid_cell.name: train for train in plan.trains}
    heldout, min_images = plan.images["heldout"], plan.study.scoring.min_images
    classes = image_classes(heldout.labels, (BLANK,))
    [stores] = {(one.activations.step.folder, one.embeddings.step.folder) for one in scores.values() if one.embeddings}
    activations, judge = map(ActivationStore, stores)
    if has_blanks(heldout):
        drawn = [attributes(int(Path(name).stem)) for name in heldout.manifest["image_id"].to_pylist()]
        judges = {STUDYS: embeddings_by_image(judge, activations).numpy(), DRAWN: one_hot(drawn)}
    else:
        judges = {CLASS: one_hot([[one] for one in classes])}
    if stranger:
        judges[model_name(stranger)] = embedded(heldout, stranger)
    if has_blanks(heldout):
        judges = {NO_BLANKS.format(name): vectors for name, vectors in judges.items()}
    kept = np.array([image for image, label in enumerate(classes) if label is not None])
    found: dict[str, list[Measured]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as scratch:
        x = stored(Folder(scratch), "x", kept, embeddings_by_image(activations, activations).numpy())
        others = {name: stored(Folder(scratch), name, kept, vectors) for name, vectors in judges.items()}
        for row in summarise(plan):
            sae = load_sae(trains[row.name].step.folder) if row.grid_cell else None
            means, bests = {STUDYS: row.mean_ms}, {STUDYS: row.top_ms}
            for name, embeddings in others.items():
                table = score_table(score_store(sae, x, embeddings, 1))
                ms = table["ms"].to_numpy()[table["n_active"].to_numpy() >= min_images]
                ms = np.sort(ms[~np.isnan(ms)])
                means[name], bests[name] = float(ms.mean()), float(ms[-BEST:].mean())
            purity = float(np.mean(purities_of(scores[row.name], classes, min_images)))
            one = measured(row, purity, means, bests)
            found[one.recipe].append(one)
    return found


def measured(row: CellSummary, purity: float, means: dict[str, float], bests: dict[str, float]) -> Measured:
    def rounded(value: float | None, digits: int = 4) -> float | None:
        return None if value is None else round(value, digits)

    return Measured(
        recipe=row.grid_cell.recipe if row.grid_cell else row.name,
        method=method_of(row.grid_cell.cell) if row.grid_cell else RAW,
        l0=rounded(row.l0, 2),
        r2=rounded(row.r2),
        scored=row.n_scored,
        dead=rounded(row.dead_fraction),
        purity=round(purity, 4),
        mean={name: round(value, 4) for name, value in means.items()},
        best={name: round(value, 4) for name, value in bests.items()},
    )


def method_of(cell: Cell) -> str:
    """All that is chosen but the number of active latents."""
    weights = f", {cell.weights.replace('_', ' ')}" if cell.weighted else ""
    goal = f", MS goal {cell.monosemanticity:g}" if cell.monosemanticity else ""
    return NAMES[cell.architecture] + weights + goal


def has_blanks(images: ImagePlan) -> bool:
    """Images of the world have; photographs have none."""
    return BLANK in image_classes(images.labels)


def one_hot(shown: Sequence[Sequence[object]]) -> np.ndarray:
    """What images show, such as shape, colour and background: the cosine of two rows is the share of these that they
    have in common."""
    columns = []
    for values in zip(*shown, strict=True):
        known = sorted({str(value) for value in values})
        columns.append(np.eye(len(known), dtype="float32")[[known.index(str(value)) for value in values]])
    return np.concatenate(columns, axis=1)


def embedded(images: ImagePlan, model: str) -> np.ndarray:
    """The pooled output of an encoder for each image."""
    encoder, preprocess, site = load_encoder(model), load_preprocess(model), Site.parse("pooled")
    names, rows = images.manifest["image_id"].to_pylist(), []
    for start in range(0, len(names), BATCH):
        some = names[start : start + BATCH]
        pixels = [preprocess(decode_image(images.folder.read_bytes(name), rendering=images.rendering)) for name in some]
        rows.append(encoder.tap(torch.from_numpy(np.stack(pixels)), [site], some, 0)[site].activation.numpy())
    return np.concatenate(rows)


def stored(root: Folder, label: str, image: np.ndarray, vectors: np.ndarray) -> ActivationStore:
    """Some images, whose vectors stand at their `image_index`, as a store."""
    pieces = np.array_split(image, PARTS)
    config = {"store_dtype": "float32", "images_per_part": len(pieces[0]), "label": label}
    step = Step(root, "extract", "vectors", config)
    parts = []
    for number, piece in enumerate(pieces):
        rows = stored_rows(piece, np.full(len(piece), -1), vectors[piece].astype("float32"), "float32")
        parts.append(write_part(step.folder, number, rows, []))
    finish_store(step, parts, vectors.shape[1], 0.0)
    return ActivationStore(step.folder)


# Comparing


def margin(
    cells: Mapping[str, Sequence[Measured]], one: Sequence[Measured], statistic: str, judge: str
) -> float | None:
    """How far its worst seed is above the best seeds of both of the paper's architectures at the same R²; one that does
    not come as low in R², or as high, is left out. None where neither does."""

    def scores(seeds: Sequence[Measured]) -> list[float]:
        return [getattr(sae, statistic)[judge] for sae in seeds]

    papers = [at_r2(cells, method, mean_r2(one), lambda seeds: max(scores(seeds))) for method in PAPER]
    known = [score for score in papers if score is not None]
    return min(scores(one)) - max(known) if known else None


def at_r2(
    cells: Mapping[str, Sequence[Measured]], method: str, r2: float, score: Callable[[Sequence[Measured]], float]
) -> float | None:
    """What a method would score at this R², which is on the line between two values of k; None beyond all of them."""
    of_method = [seeds for seeds in cells.values() if seeds[0].method == method]
    x, y = zip(*sorted((mean_r2(seeds), score(seeds)) for seeds in of_method), strict=True)
    return float(np.interp(r2, x, y)) if x[0] <= r2 <= x[-1] else None


def mean_r2(seeds: Sequence[Measured]) -> float:
    return mean(one.r2 for one in seeds if one.r2 is not None)


def farthest(cells: Mapping[str, Sequence[Measured]]) -> Table:
    """The cell whose mean MS is farthest above both, by the last judge, beside what the paper's have at its R²."""
    judges = judges_of(cells)
    saes = {name: seeds for name, seeds in cells.items() if seeds[0].r2 is not None}
    margins = {name: margin(cells, seeds, "mean", judges[-1]) for name, seeds in saes.items()}
    name = max((name for name in saes if saes[name][0].method not in PAPER), key=lambda name: margins[name] or -1)
    [raw] = next(seeds for seeds in cells.values() if seeds[0].method == RAW)
    r2, rows = mean_r2(saes[name]), []
    for judge in judges:
        papers = [at_r2(cells, one, r2, lambda seeds, judge=judge: mean(sae.mean[judge] for sae in seeds))
                  for one in PAPER]  # fmt: skip
        figures = [raw.mean[judge], *papers, mean(sae.mean[judge] for sae in saes[name])]
        rows.append([judge, *(None if one is None else f"{one:.3f}" for one in figures)])
    return Table(
        title=f"Mean MS of {name}, which is farthest above both by {judges[-1]}, and of others at its R² of {r2:.3f}",
        columns=["judge", RAW, *PAPER, "this one"],
        rows=rows,
    )


def judges_of(cells: Mapping[str, Sequence[Measured]]) -> list[str]:
    return list(next(iter(cells.values()))[0].mean)


def verdicts(cells: Mapping[str, Sequence[Measured]]) -> Table:
    """For every method and judge, how many of its cells lie above both of the paper's architectures."""
    judges = judges_of(cells)
    methods = dict.fromkeys(seeds[0].method for seeds in cells.values())
    rows = []
    for method in methods:
        if method in (*PAPER, RAW):
            continue
        of_method = [seeds for seeds in cells.values() if seeds[0].method == method]
        row = [method]
        for statistic in STATISTICS:
            for judge in judges:
                margins = [margin(cells, seeds, statistic, judge) for seeds in of_method]
                known = [one for one in margins if one is not None]
                text = f"{sum(one > 0 for one in known)} of {len(known)}"
                row.append(f"{text} ({min(known):+.3f} to {max(known):+.3f})" if known else "–")
        rows.append(row)
    columns = [f"{statistic}, {judge}" for statistic in STATISTICS.values() for judge in judges]
    return Table(
        title="In how many of its cells the worst seed of a method is above the best seeds of both of the paper's "
        "architectures at equal R², and by how much, least to most",
        columns=["method", *columns],
        rows=rows,
    )


def everything(cells: Mapping[str, Sequence[Measured]], min_images: int, of_images: str) -> Table:
    judges = judges_of(cells)
    rows = []
    for recipe, seeds in cells.items():
        fields = {"l0": 1, "r2": 3, "scored": 0, "dead": 2, "purity": 3}
        row = [recipe, *(spread([getattr(one, name) for one in seeds], digits) for name, digits in fields.items())]
        rows.append([*row, *(spread([one.mean[judge] for one in seeds], 3) for judge in judges)])
    return Table(
        title="Every cell, mean of two seeds, in brackets half of their difference: latents active on "
        f"{min_images} held-out images or more; purity is the share of the commonest {of_images} among 16 top images",
        columns=["SAE", "L0", "R²", "latents", "dead", "purity", *(f"MS, {judge}" for judge in judges)],
        rows=rows,
    )


if __name__ == "__main__":
    main()
