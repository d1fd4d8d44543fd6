"""Neurons of a study of photographs, by the names of the classes that they respond to. No picture is shown."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from bench.photo_saes import Sae, mean, shown, title_of, vectors
from bench.record import Table
from sae_ray.concepts.naming import class_names, class_of, first_synonym
from sae_ray.concepts.tables import ConceptTables
from sae_ray.report.neurons import Neurons, image_labels, read_neurons
from sae_ray.sae import load_sae
from sae_ray.store.activations import ActivationStore
from sae_ray.study.plan import StudyPlan
from sae_ray.study.step_plans import ConceptsPlan
from sae_ray.study.summary import BEST

N_SHOWN = 12
"""Neurons in each table of them."""
PURE = 0.75
"""From this share of its top images on a neuron bears the name of their class."""


class Level(NamedTuple):
    """The neurons of one level of a Matryoshka SAE."""

    neurons: int
    scored: int
    mean_ms: float | None
    top_ms: float | None
    purity: float | None
    r2: float
    """Of the reconstruction by this level and those before it."""


def short_names(plan: StudyPlan) -> dict[str, str]:
    """Label -> `tench`, for the classes of all images."""
    labels = {one for images in plan.images.values() for one in images.labels["label_name"].to_pylist() if one}
    names = class_names(labels)
    return {label: first_synonym(names[of] if (of := class_of(label)) in names else label) for label in labels}


def anchor(name: str) -> str:
    return name.lower().replace(" ", "-")


def link(name: str) -> str:
    """To the row of a class."""
    return f"[{name}](#{anchor(name)})"


def concepts_of(plan: StudyPlan, name: str) -> ConceptsPlan:
    return next(one for one in plan.concepts if one.name == name)


def scored(cell: Neurons, min_images: int) -> np.ndarray:
    """Which neurons fire on enough held-out images to be judged."""
    return (cell.columns.n_active >= min_images) & ~np.isnan(cell.columns.ms)


def class_table(plan: StudyPlan, sae: Sae) -> Table:
    """What an SAE knows of each class. Rows can be linked to."""
    name, names = sae.cells[0].name, short_names(plan)
    found = ConceptTables(concepts_of(plan, name).step.folder).concepts
    [cell] = read_neurons(plan, [name])
    rows = []
    for place, label in enumerate(found.concept):
        neuron, short = int(found.neuron[place]), names[label]
        figures = (found.rho, found.average_precision, found.probe_r, found.sparse_1, found.sparse_5, found.fms_1)
        own = [None] * 2 if neuron < 0 else [str(neuron), shown(float(cell.columns.ms[neuron]))]
        rows.append([f'<a id="{anchor(short)}"></a>{short}', *own, *(shown(float(one[place])) for one in figures)])
    columns = ["class", "its best neuron", "MS", "ρ", "AP", "probe R", "1 neuron", "5 neurons", "FMS@1"]
    return Table(part="classes", title=f"What `{name}` knows of each class", columns=columns, rows=rows)


def contact_sheets(plan: StudyPlan, sae: Sae) -> list[Table]:
    """The best neurons of an SAE, and those in the middle, of those that respond to as many training images as a sheet
    shows: the classes of these."""
    name, names = sae.cells[0].name, short_names(plan)
    [cell] = read_neurons(plan, [name])
    label_name = cell.pictures.labels["label_name"].to_pylist()
    found = ConceptTables(concepts_of(plan, name).step.folder).neurons
    shown_ones = scored(cell, plan.study.scoring.min_images) & (cell.top_image >= 0).all(1)
    judged = [int(one) for one in cell.order if shown_ones[one]]
    middle = len(judged) // 2 - N_SHOWN // 2
    tables = []
    for what, chosen in (("best", judged[:N_SHOWN]), ("middle", judged[middle : middle + N_SHOWN])):
        rows = []
        for neuron in chosen:
            images = cell.top_image[neuron]
            counted = Counter(names[label_name[image]] for image in images[images >= 0])
            sheet = ", ".join(f"{link(one)} {n}" for one, n in counted.most_common())
            concept, rho = found.concept[neuron], float(found.rho[neuron])
            known = [None, None] if concept is None else [names[concept], shown(rho)]
            rows.append([sheet, str(neuron), shown(float(cell.columns.ms[neuron])), int(cell.columns.n_active[neuron]),
                         *known])  # fmt: skip
        title = f"The {len(rows)} {what} of {len(judged):,} neurons of `{name}` with 16 top training photographs"
        columns = ["top 16 training photographs", "neuron", "MS", "held-out photographs", "class by ρ", "ρ"]
        tables.append(Table(part="neurons", title=title, columns=columns, rows=rows))
    return tables


def name_table(plan: StudyPlan, saes: Sequence[Sae]) -> Table:
    """Neurons that their top training images name, and whether held-out images give them the same name."""
    min_images = plan.study.scoring.min_images
    kinds: dict[tuple, list[tuple[int, int, int, float | None]]] = {}
    for sae in saes:
        for row in sae.cells:
            [cell] = read_neurons(plan, [row.name])
            labels = dict(zip(image_labels(cell.pictures.labels).tolist(),
                              cell.pictures.labels["label_name"].to_pylist(), strict=True))  # fmt: skip
            concept = ConceptTables(concepts_of(plan, row.name).step.folder).neurons.concept
            known = scored(cell, min_images) & np.array([one is not None for one in concept])
            named = np.flatnonzero(known & (cell.purity >= PURE))
            right = [labels[int(cell.label[one])] == concept[one] for one in named]
            distinct = len({int(cell.label[one]) for one in named})
            share = float(np.mean(right)) if right else None
            kinds.setdefault((sae.architecture, sae.expansion, sae.k), []).append(
                (int(known.sum()), len(named), distinct, share)
            )
    rows = []
    for (architecture, expansion, k), found in kinds.items():
        judged, named, distinct, right = (mean(column) for column in zip(*found, strict=True))
        rows.append(
            [title_of(architecture, expansion, k), shown(judged, 0), shown(named, 0), shown(distinct, 1), shown(right)]
        )
    columns = ["", "neurons with a ρ", "named", "different names", "right on held-out photographs"]
    return Table(
        part="names", title=f"Names by top training photographs, means over sites and seeds: a neuron is named if "
        f"{PURE:.0%} of its 16 are of one class", columns=columns, rows=rows,
    )  # fmt: skip


def level_table(plan: StudyPlan, saes: Sequence[Sae]) -> Table:
    """What each level of the Matryoshka SAEs holds."""
    kinds: dict[tuple, list[list[Level]]] = {}
    for sae in saes:
        if sae.architecture == "matryoshka_batch_topk":
            kinds.setdefault((sae.expansion, sae.k), []).extend(levels(plan, row.name) for row in sae.cells)
    rows = []
    for (expansion, k), found in kinds.items():
        for number, of_level in enumerate(zip(*found, strict=True), start=1):
            figures = [mean(column) for column in zip(*of_level, strict=True)]
            neurons, judged, *others = figures
            rows.append([f"×{expansion:g}, K {k}, level {number}", shown(neurons, 0), shown(judged, 0),
                         *map(shown, others)])  # fmt: skip
    columns = ["", "neurons", "scored", "mean MS", f"best {BEST}", "purity", "R² up to here"]
    return Table(part="levels", title="Levels of Matryoshka SAEs, means over sites and seeds", columns=columns,
                 rows=rows)  # fmt: skip


@torch.no_grad()
def levels(plan: StudyPlan, name: str) -> list[Level]:
    """Of a Matryoshka SAE, on held-out activations."""
    [cell] = read_neurons(plan, [name])
    judged = scored(cell, plan.study.scoring.min_images)
    assert cell.score.sae is not None
    sae = load_sae(cell.score.sae.step.folder)
    x = torch.from_numpy(vectors(ActivationStore(cell.score.activations.step.folder))).float()
    codes = sae.encode(x)
    variance = (x - x.mean(0)).square().sum()
    found, start = [], 0
    for end in cell.level_ends:
        own = np.arange(start, end)[judged[start:end]]
        ms = np.sort(cell.columns.ms[own])[::-1]
        error = (x - codes[:, :end] @ sae.W_dec[:end] - sae.b_dec).square().sum()
        mean_ms, top_ms, purity = (float(one.mean()) if len(one) else None for one in (ms, ms[:BEST], cell.purity[own]))
        found.append(Level(end - start, len(own), mean_ms, top_ms, purity, float(1 - error / variance)))
        start = end
    return found
