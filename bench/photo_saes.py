"""The SAEs of a study of photographs, cells that differ in their seeds alone together."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from sae_ray.concepts.image_codes import image_codes
from sae_ray.sae import load_sae
from sae_ray.scores.statistics import monosemanticity
from sae_ray.scores.tables import ScoreTables
from sae_ray.store.activations import ActivationStore
from sae_ray.study.plan import StudyPlan
from sae_ray.study.step_plans import ScorePlan
from sae_ray.study.summary import BEST, CellSummary, summarise

if TYPE_CHECKING:
    from jaxtyping import Float

RANKS = (1, 4, 16, 64, 256, 1024)
ARCHITECTURES = {"batch_topk": "BatchTopK", "matryoshka_batch_topk": "Matryoshka"}
CONCEPTS = {
    "n_found_concepts": "classes found (ρ ≥ .5)", "rho": "ρ of a class's best neuron", "probe_r": "probe R",
    "average_precision": "mAP", "sparse_1": "1 neuron", "sparse_5": "5 neurons", "fms_1": "FMS@1", "purity": "purity",
    "stability": "stability",
}  # fmt: skip


class Sae(NamedTuple):
    """Cells that differ in their seeds alone, or the raw neurons of a site."""

    site: str
    architecture: str | None
    """None for raw neurons."""
    expansion: float
    k: int
    cells: list[CellSummary]
    curves: list[Float[np.ndarray, " scored"]]
    """MS of the scored neurons of each cell, best first."""
    chance: list[Float[np.ndarray, " scored"]]
    """The same if the judge's view of every image is that of another one."""
    concepts: dict[str, float | None]
    shuffled: dict[str, float | None]
    """The same with shuffled labels."""

    @property
    def place(self) -> tuple:
        """In the grid."""
        return self.site, self.architecture, self.expansion, self.k

    @property
    def title(self) -> str:
        """Among those of its site."""
        return title_of(self.architecture, self.expansion, self.k)

    def figure(self, of: str) -> float | None:
        """The mean over its cells of a field of `CellSummary`; or one of `CONCEPTS`, or a property."""
        if of in CellSummary.__dataclass_fields__:
            return mean(getattr(cell, of) for cell in self.cells)
        return self.concepts[of] if of in CONCEPTS else getattr(self, of)

    @property
    def top_chance(self) -> float | None:
        """Mean of the best neurons by chance."""
        return mean(float(curve[:BEST].mean()) for curve in self.chance)

    @property
    def above_chance(self) -> float | None:
        """How much better its best neurons are than that."""
        top, chance = self.figure("top_ms"), self.top_chance
        return None if top is None or chance is None else top - chance

    def at_rank(self, rank: int) -> float | None:
        """MS of the neuron of that rank, which the mean over cells has if one of them has."""
        return mean(float(curve[rank - 1]) for curve in self.curves if rank <= len(curve))


def title_of(architecture: str | None, expansion: float, k: int) -> str:
    """What SAEs of one kind are called in tables."""
    if architecture is None:
        return "raw neurons"
    return f"{ARCHITECTURES.get(architecture, architecture)} ×{expansion:g}, K {k}"


def mean(values: Iterable[float | None]) -> float | None:
    there = [value for value in values if value is not None]
    return float(np.mean(there)) if there else None


def shown(value: float | None, digits: int = 3) -> float | None:
    return None if value is None else round(value, digits)


def read(plan: StudyPlan) -> list[Sae]:
    """In the order of the study."""
    groups: dict[str, list[CellSummary]] = defaultdict(list)
    for row in summarise(plan):
        groups[row.grid_cell.recipe if row.grid_cell else row.name].append(row)
    counts = {one.name: record["counts"] for one in plan.concepts if (record := one.step.record())}
    scores = {one.name: one for one in plan.scores if one.embeddings is not None}
    judged = judged_images(plan)
    saes = []
    for rows in groups.values():
        found = [counts[row.name] for row in rows]
        grid_cell = rows[0].grid_cell
        curves = [curves_of(scores[row.name], judged, plan.study.scoring.min_images) for row in rows]
        saes.append(
            Sae(
                site=rows[0].site,
                architecture=grid_cell.cell.architecture if grid_cell else None,
                expansion=grid_cell.cell.expansion if grid_cell else 0,
                k=(grid_cell.cell.k or 0) if grid_cell else 0,
                cells=rows,
                curves=[curve for curve, _ in curves],
                chance=[chance for _, chance in curves],
                concepts={key: mean(one.get(key) for one in found) for key in CONCEPTS},
                shuffled={key: mean(one.get("shuffled", {}).get(key) for one in found) for key in CONCEPTS},
            )
        )
    return saes


def curves_of(
    score: ScorePlan, judged: Float[np.ndarray, "images d"], min_images: int
) -> tuple[Float[np.ndarray, " scored"], Float[np.ndarray, " scored"]]:
    """MS of the scored neurons of a cell, best first: as it is, and for shuffled images."""
    columns = ScoreTables(score.step.folder).scores
    scored = (columns.n_active >= min_images) & ~np.isnan(columns.ms)
    sae = load_sae(score.sae.step.folder) if score.sae else None
    codes = image_codes(sae, ActivationStore(score.activations.step.folder)).codes.tocsc()[:, np.flatnonzero(scored)]
    order = np.random.default_rng(0).permutation(len(judged))
    chance = monosemanticity(torch.from_numpy(codes.toarray()), torch.from_numpy(judged[order])).numpy()
    return np.sort(columns.ms[scored])[::-1], np.sort(chance)[::-1]


def judged_images(plan: StudyPlan) -> Float[np.ndarray, "images d"]:
    """What the judge makes of the held-out images, of length 1."""
    [judge] = {one.embeddings.step.name: one.embeddings for one in plan.scores if one.embeddings is not None}.values()
    found = vectors(ActivationStore(judge.step.folder))
    return found / np.linalg.norm(found, axis=1, keepdims=True)


def vectors(store: ActivationStore) -> Float[np.ndarray, "rows d"]:
    return np.concatenate([store.read(part)[2].astype(np.float64) for part in store.parts])
