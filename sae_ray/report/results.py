"""The results of a study as tables and as neurons that notebooks show, read from the files under its root."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from sae_ray.concepts.labelling import Concept
from sae_ray.concepts.tables import NEURONS, NEURONS_SCHEMA
from sae_ray.errors import UsageError, check
from sae_ray.report.cards import NeuronCard, Pictures, TopImage
from sae_ray.report.neurons import Neurons, names_of_labels, read_neurons, shown_cells
from sae_ray.report.pictures import finished_pictures
from sae_ray.scores.tables import SCORES_SCHEMA
from sae_ray.store.schemas import read_columns
from sae_ray.study.names import Name, NeuronNames
from sae_ray.study.plan import StudyPlan
from sae_ray.study.root import recalled_plan
from sae_ray.study.summary import summarise

CELL_SETTINGS = ("architecture", "expansion", "k", "sparsity")
NAME_COLUMNS = ("name", "name_method", "name_score")


def open_study(root: str | Path) -> Results:
    """The study that was run last under a root, a directory or a URI. Models and images need not be there.

    Raises UsageError if there is none, or it was written by another version of sae-ray.
    """
    return Results(recalled_plan(str(root)))


class Results:
    """What is finished of a study. Tables are pyarrow's: `.to_pandas()` and `polars.from_arrow` convert them."""

    def __init__(self, plan: StudyPlan):
        self.plan = plan
        self._read: dict[str, tuple[Neurons, list[Name | None]]] = {}

    def __repr__(self) -> str:
        return f"Results({self.plan.study.name!r}, root={str(self.plan.root)!r}, cells={self.cells})"

    @property
    def cells(self) -> list[str]:
        """The names of what is scored: raw neurons of every site as `raw-<site>`, then the SAEs."""
        return shown_cells(self.plan)

    def scores(self) -> pa.Table:
        """A row for every raw site and every SAE: its settings, how many neurons are scored and how well, and how
        faithful it is, as in the summary of `sae-ray run`. Raw sites have no settings."""
        rows = []
        for row in summarise(self.plan):
            cell = row.grid_cell and row.grid_cell.cell
            settings = {name: getattr(cell, name, None) for name in CELL_SETTINGS}
            found = {name: value for name, value in vars(row).items() if name not in ("name", "grid_cell")}
            rows.append({"cell": row.name, **settings, **found})
        return _table(rows)

    def fidelity(self) -> pa.Table:
        """A row for every SAE that is evaluated: the fields of `FidelitySummary`, on held-out activations."""
        done = [(one.sae.grid_cell.name, one.step.record()) for one in self.plan.evaluations]
        return _table([{"cell": name, **record["counts"]} for name, record in done if record is not None])

    def neurons(self, cell: str | None = None) -> pa.Table:
        """A row per neuron: its scores (`SCORES_SCHEMA`), the commonest label of its top images and their share with
        it, its name, and what the stage `concepts` measured, if it ran.

        Args:
            cell: one of `cells`; by default the only SAE.

        Raises UsageError if there is no such cell.
        """
        neurons, names = self._neurons(cell)
        classes = self._classes(neurons)
        table = pa.table(neurons.columns._asdict(), schema=SCORES_SCHEMA)
        table = table.append_column("label", pa.array([classes[number] for number in neurons.label], pa.string()))
        table = table.append_column("purity", pa.array(neurons.purity))
        for place, name in enumerate(NAME_COLUMNS):
            kind = pa.float64() if name == "name_score" else pa.string()
            table = table.append_column(name, pa.array([one and one[place] for one in names], kind))
        for one in self.plan.concepts:
            if one.name == neurons.name and one.step.finished and not one.step.failure:
                measured = read_columns(one.step.folder, NEURONS, NEURONS_SCHEMA, "concepts")
                for name in measured.column_names:
                    if name not in table.column_names:
                        table = table.append_column(name, measured[name])
        return table

    def top_images(self, cell: str | None = None, neurons: int | Sequence[int] | None = None) -> pa.Table:
        """A row per neuron and top image, strongest first: `neuron`, `rank`, `image_index`, `image_id`, `label`,
        `activation`.

        Args:
            cell: one of `cells`; by default the only SAE.
            neurons: only of these, or of this one.

        Raises UsageError if there is no such cell or neuron.
        """
        read, _ = self._neurons(cell)
        wanted = range(len(read.top_image)) if neurons is None else np.atleast_1d(neurons).tolist()
        for number in wanted:
            self._check_neuron(read, number)
        chosen = np.array(wanted, np.int64)
        place, rank = np.nonzero(read.top_image[chosen] >= 0)
        neuron = chosen[place]
        index = read.top_image[neuron, rank].astype(np.int64)
        rows = pa.array(index)
        return pa.table(
            {
                "neuron": neuron,
                "rank": rank.astype(np.int16),
                "image_index": index,
                "image_id": read.pictures.manifest["image_id"].take(rows),
                "label": read.pictures.labels["label_name"].take(rows),
                "activation": read.top_activation[neuron, rank],
            }
        )

    def neuron(self, number: int, cell: str | None = None) -> NeuronCard:
        """One neuron, which a notebook shows with its top images and, where the report has them, its heat maps.

        Raises UsageError if there is no such cell or neuron.
        """
        read, names = self._neurons(cell)
        self._check_neuron(read, number)
        found = self.top_images(read.name, [number]).to_pylist()
        shown = [(row["image_id"], row["label"], row["activation"]) for row in found]
        pictures = self._pictures
        thumbnails = pictures.thumbnails(read, number) if pictures else [None] * len(shown)
        maps = pictures.maps(read.name, number) if pictures else {}
        images = [
            TopImage(*one, thumbnail, maps.get(rank))
            for rank, (one, thumbnail) in enumerate(zip(shown, thumbnails, strict=True))
        ]
        scores = {name: column[number].item() for name, column in read.columns._asdict().items()}
        return NeuronCard(read.name, number, names[number], scores, images)

    def best(self, n: int = 12, cell: str | None = None) -> list[int]:
        """The numbers of the neurons with the highest MonoSemanticity, among those scored on enough images."""
        read, _ = self._neurons(cell)
        return read.order[:n].tolist()

    @cached_property
    def _pictures(self) -> Pictures | None:
        """None where there are none."""
        pictures = finished_pictures(self.plan)
        return None if pictures is None else Pictures(self.plan, pictures)

    def _neurons(self, cell: str | None) -> tuple[Neurons, list[Name | None]]:
        name = self._chosen(cell)
        if name not in self._read:
            [neurons] = read_neurons(self.plan, {name})
            self._read[name] = neurons, self._names(neurons)
        return self._read[name]

    def _chosen(self, cell: str | None) -> str:
        there = self.cells
        saes = [name for name in there if not name.startswith("raw-")]
        if cell is None and len(saes) == 1:
            return saes[0]
        if cell not in there:
            known = ", ".join(there) or "none yet: run the score stage first"
            raise UsageError(f"cell = {cell!r}: choose one of those that are scored: {known}")
        return cell

    @staticmethod
    def _check_neuron(neurons: Neurons, number: int) -> None:
        n = neurons.score.neurons
        check(
            isinstance(number, int | np.integer) and 0 <= number < n,
            "neuron",
            number,
            f"{neurons.name} has neurons 0 to {n - 1}",
        )

    @staticmethod
    def _classes(neurons: Neurons) -> dict[int, str | None]:
        """By the number of the label; -1 is that of no label."""
        return names_of_labels(neurons.pictures.labels) | {-1: None}

    def _names(self, neurons: Neurons) -> list[Name | None]:
        classes = self._classes(neurons)
        names = NeuronNames.read(self.plan, neurons.name, [*classes.values()])
        columns = neurons.columns
        facts = zip(neurons.label, neurons.purity, columns.n_firing, columns.frequency, columns.max_token, strict=True)
        return [
            names.of(Concept(number, classes[label], float(purity), int(firing), float(frequency), float(largest)))
            for number, (label, purity, firing, frequency, largest) in enumerate(facts)
        ]


def _table(rows: list[dict[str, Any]]) -> pa.Table:
    """With every column that a row has."""
    names = dict.fromkeys(name for row in rows for name in row)
    return pa.table({name: [row.get(name) for row in rows] for name in names})
