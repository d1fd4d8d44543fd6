"""The names of a cell's neurons, by every method that has named some."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import numpy as np
import pyarrow as pa

from sae_ray.concepts.tables import ConceptTables
from sae_ray.report.neurons import Neurons
from sae_ray.report.packing import nullable
from sae_ray.steering.latent_names import NAMES
from sae_ray.study.plan import StudyPlan

if TYPE_CHECKING:
    from jaxtyping import Float, Int, Shaped


class Named(NamedTuple):
    """The neurons that a method has named, in the order of the cell. NaN and -1 where there is no value."""

    method: str
    """`soft_wpmi`, say."""
    place: Int[np.ndarray, " named"]
    """Of the neuron in the order."""
    name: Shaped[np.ndarray, " named"]
    score: Float[np.ndarray, " named"]
    margin: Float[np.ndarray, " named"]
    """The score less that of the next word of the vocabulary."""
    agreement: Float[np.ndarray, " named"]
    """Share of the top images that a LLaVA called so."""
    control_score: Float[np.ndarray, " named"]
    """Of a name that knows nothing of the neuron."""
    n_images: Int[np.ndarray, " named"]
    """Images that the name rests on."""

    @classmethod
    def of(cls, method: str, rows: pa.Table, cell: Neurons) -> Self:
        """From a table with a row per neuron. Those without a name, or not in the order, are left out."""
        place_of = np.full(cell.score.neurons, -1)
        place_of[cell.order] = np.arange(len(cell.order))
        place, name = place_of[rows["neuron"].to_numpy()], np.array(rows["name"].to_pylist(), object)
        kept = np.flatnonzero((place >= 0) & np.array([one is not None for one in name], bool))
        kept = kept[np.argsort(place[kept])]

        def column(key: str) -> Float[np.ndarray, " named"]:
            found = rows[key].to_numpy() if key in rows.column_names else np.full(len(rows), np.nan)
            return found.astype(np.float64)[kept]

        n_images = np.nan_to_num(column("n_images")).astype(np.int64)
        scores = {key: column(key) for key in ("score", "margin", "agreement", "control_score")}
        n_images = np.where(n_images > 0, n_images, -1)
        return cls(method=method, place=place[kept], name=name[kept], n_images=n_images, **scores)


def read_names(plan: StudyPlan, cells: Sequence[Neurons]) -> dict[str, list[Named]]:
    """The names of these cells that have some: those of a LLaVA first, as everywhere, then those of a vocabulary."""
    by_name = {cell.name: cell for cell in cells}
    found: dict[str, list[Named]] = {}
    for one in plan.namings:
        if one.name in by_name and one.step.finished and not one.step.failure:
            found.setdefault(one.name, []).extend(_of(one.step.folder.read_parquet(NAMES), by_name[one.name]))
    for one in plan.concepts:
        if one.name in by_name and one.step.finished and not one.step.failure:
            names = ConceptTables(one.step.folder).names
            first = names.filter(pa.array(names["rank"].to_numpy() == 0))
            found.setdefault(one.name, []).extend(_of(first, by_name[one.name]))
    return {name: named for name, named in found.items() if named}


def _of(table: pa.Table, cell: Neurons) -> list[Named]:
    methods = table["method"].to_pylist()
    found = [
        Named.of(one, table.filter(pa.array([method == one for method in methods], pa.bool_())), cell)
        for one in dict.fromkeys(methods)
    ]
    return [one for one in found if len(one.place)]


def names_of(named: Sequence[Named], first: int, n: int) -> list[list[list[Any]]]:
    """Method, name and score of each name of consecutive neurons of the order.

    Args:
        named: of their cell.
        first: the place of the first neuron.
        n: how many there are.
    """
    found: list[list[list[Any]]] = [[] for _ in range(n)]
    for one in named:
        rows = slice(*np.searchsorted(one.place, [first, first + n]))
        for place, name, score in zip(one.place[rows], one.name[rows], nullable(one.score[rows]), strict=True):
            found[place - first].append([one.method, name, score])
    return found
