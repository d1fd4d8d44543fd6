"""Which SAE is best, by which measure: the figures of the stage `concepts` beside raw neurons and chance."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from sae_ray.concepts.naming import label_title
from sae_ray.concepts.tables import ConceptTables
from sae_ray.text_table import number, table_lines


class Compared(NamedTuple):
    """A figure by which SAEs are compared."""

    key: str
    """In `counts` of `step.json`."""
    title: str
    lower_is_better: bool = False
    chance: str | None = None
    """In `counts`, what chance gives. Default: the same key of shuffled labels."""


MEASURES = (
    Compared("n_found_concepts", "concepts found (ρ ≥ .5)"),
    Compared("rho", "ρ of a concept's best neuron"),
    Compared("mean_entropy_balanced", "entropy over concepts", lower_is_better=True),
    Compared("purity_16", "purity of 16 top images"),
    Compared("probe_r", "probe R"),
    Compared("average_precision", "mean average precision"),
    Compared("coverage", "coverage (AP ≥ .3)"),
    Compared("sparse_1", "sparse probing, 1 neuron"),
    Compared("sparse_5", "sparse probing, 5 neurons"),
    Compared("fms_1", "FMS@1"),
    Compared("fms_5", "FMS@5"),
    Compared("names_right", "names of pure neurons right"),
    Compared("overlapping", "pairs that share a top image", lower_is_better=True),
    Compared("coherence_aip", "coherence of atoms", lower_is_better=True),
    Compared("q_star_atom", "q*"),
    Compared("reachable", "samples within Welch's bound"),
    Compared("tpp_2", "targeted probe perturbation, 2 neurons"),
    Compared("stability", "stability between seeds", chance="stability_random"),
    Compared("spatial", "spatial coherence"),
    Compared("spliced", "accuracy with the reconstruction", chance="spliced_mean"),
    Compared("recovered", "share of the accuracy recovered"),
)
SHOWN_CONCEPTS = 10
"""Of an SAE's table."""


class Cell(NamedTuple):
    """An SAE, or the raw neurons of a site, that is measured."""

    name: str
    site: str
    is_sae: bool
    counts: Mapping[str, Any]


class Best(NamedTuple):
    """The best SAE by one measure. None where there is no value."""

    measure: Compared
    name: str
    value: float
    raw: float | None
    """Of the raw neurons of the same site."""
    chance: float | None
    """Of the same SAE: with shuffled labels; its stability with random directions in place of the other SAE, its
    accuracy with the mean activation in place of the reconstruction."""


def best_by_measure(cells: Sequence[Cell], measures: Sequence[Compared] = MEASURES) -> list[Best]:
    """One row per measure that an SAE has a value for; the first SAE in ties."""
    found = []
    for measure in measures:
        having = [one for one in cells if one.is_sae and one.counts.get(measure.key) is not None]
        if not having:
            continue
        sign = -1 if measure.lower_is_better else 1
        best = max(having, key=lambda one: sign * one.counts[measure.key])
        raw = [one.counts.get(measure.key) for one in cells if not one.is_sae and one.site == best.site]
        by_chance = best.counts if measure.chance else best.counts.get("shuffled", {})
        chance = by_chance.get(measure.chance or measure.key)
        found.append(Best(measure, best.name, best.counts[measure.key], raw[0] if raw else None, chance))
    return found


def comparison_lines(cells: Sequence[Cell]) -> list[str]:
    """The rows of `best_by_measure` as a table."""
    table = [["measure", "best SAE", "its value", "raw neurons", "by chance"]]
    for one in best_by_measure(cells):
        title = f"{one.measure.title}{' (lower is better)' if one.measure.lower_is_better else ''}"
        table.append([title, one.name, *map(_figure, (one.value, one.raw, one.chance))])
    return table_lines(table, "<<>>>") if len(table) > 1 else []


def concept_lines(cell: Cell, tables: ConceptTables) -> list[str]:
    """The concepts that an SAE has the best neurons for, with their scores, and how many there are."""
    concepts, names = tables.concepts, tables.neurons.name
    order = sorted(
        (place for place, neuron in enumerate(concepts.neuron) if neuron >= 0 and not math.isnan(concepts.rho[place])),
        key=lambda place: -concepts.rho[place],
    )
    table = [["concept", "images", "neuron", "named", "ρ", "shuffled", "AP", "1 neuron", "5", "FMS@1", "shuffled"]]
    for place in order[:SHOWN_CONCEPTS]:
        neuron = int(concepts.neuron[place])
        scores = (
            concepts.rho, concepts.shuffled_rho, concepts.average_precision, concepts.sparse_1, concepts.sparse_5,
            concepts.fms_1, concepts.shuffled_fms_1,
        )  # fmt: skip
        texts = [
            label_title(str(concepts.concept[place])),
            f"{concepts.n_images[place]:,}",
            str(neuron),
            names[neuron] or "–",
        ]
        table.append([*texts, *(number(float(column[place]), 2) for column in scores)])
    title = f"{cell.name}: {cell.counts['n_live']:,} of {cell.counts['neurons']:,} neurons fire"
    notes = list(filter(None, (note(cell.counts) for note in (_rho, _names, _q_star, _stability, _depths, _spliced))))
    if not order:
        return [title, *notes]
    more = len(order) - SHOWN_CONCEPTS
    listed = [*table_lines(table, "<>><>>>>>>>"), *([f"and {more:,} more concepts"] if more > 0 else [])]
    return [title, *notes, "", *listed]


def _rho(counts: Mapping[str, Any]) -> str | None:
    if counts.get("max_rho") is None:
        return None
    share, largest, chance = (
        number(one, 3) for one in (counts["share_rho_50"], counts["max_rho"], counts["shuffled"]["max_rho"])
    )
    return f"ρ of .5 or more with a concept: {share} of the neurons; the largest is {largest}, by chance {chance}"


def _names(counts: Mapping[str, Any]) -> str | None:
    if counts.get("named") is None:
        return None
    named, words, distinct = (f"{counts[key]:,}" for key in ("named", "words", "distinct_names"))
    text = f"names: {named} neurons have one of {words} words, {distinct} different ones"
    if counts.get("names_right") is None or counts.get("pure") is None:
        return text
    return f"{text}; {number(counts['names_right'], 3)} of the {counts['pure']:,} pure ones have that of their concept"


def _stability(counts: Mapping[str, Any]) -> str | None:
    if counts.get("stability") is None:
        return None
    own, random = (number(counts[key], 3) for key in ("stability", "stability_random"))
    return f"stability between seeds: {own}; with random directions {random}"


def _q_star(counts: Mapping[str, Any]) -> str | None:
    if counts.get("q_star_atom") is None:
        return None
    tenth, own, tenfold, reachable = (
        number(counts.get(key), 3) for key in ("q_star_tenth_ridge", "q_star_atom", "q_star_tenfold_ridge", "reachable")
    )
    return (
        f"q*: {own} ({tenth} with a tenth of the ridge, {tenfold} with ten times as much); {reachable} of the samples "
        "are within Welch's bound"
    )


def _spliced(counts: Mapping[str, Any]) -> str | None:
    if counts.get("spliced") is None:
        return None
    original, reconstruction, mean, zero = (
        number(counts[key], 3) for key in ("spliced_original", "spliced", "spliced_mean", "spliced_zero")
    )
    classifier = counts["spliced_by"].replace("_", " ").replace("zero shot", "zero-shot")
    return (
        f"accuracy ({classifier}) with the reconstruction in place: {reconstruction}; with the activations {original}, "
        f"with their mean {mean}, with zeros {zero}"
    )


def _depths(counts: Mapping[str, Any]) -> str | None:
    levels = counts.get("depths")
    if levels is None:
        return None
    text = f"depth in the taxonomy: {number(counts['depth'], 2)}"
    return text if len(levels) == 1 else f"{text}, by Matryoshka level {', '.join(number(one, 2) for one in levels)}"


def _figure(value: float | None) -> str:
    return f"{value:,}" if isinstance(value, int) else number(value, 3)
