"""The statements of Pach et al. 2025 (arXiv 2504.02821), with their figures and those of a study of photographs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from bench.photo_saes import ARCHITECTURES, Sae, mean
from bench.record import Table

SURE, MOSTLY = 0.9, 0.6
"""Shares of comparisons from which a statement holds, or mostly does."""


class Claim(NamedTuple):
    """A statement that pairs of SAEs are to bear out."""

    statement: str
    paper: str
    here: str
    pairs: list[tuple[float | None, float | None]]
    """Each is for the statement if its first figure is the larger one."""


def claims(everything: Sequence[Sae]) -> Table:
    raw = {sae.site: sae for sae in everything if sae.architecture is None}
    saes = [sae for sae in everything if sae.architecture is not None]
    found = {sae.place: sae for sae in saes}

    def pairs(field: str, others: dict, figure: str) -> list[tuple[float | None, float | None]]:
        """The figures of SAEs and of those that have another value of one field."""
        places = [(sae, sae._replace(**{field: others.get(getattr(sae, field))}).place) for sae in saes]
        return [(sae.figure(figure), found[place].figure(figure)) for sae, place in places if place in found]

    def of_each(field: str, figure: str) -> str:
        """The mean figure of the SAEs with each value of a field, in order."""
        kinds = sorted({getattr(sae, field) for sae in saes})
        means = [mean(sae.figure(figure) for sae in saes if getattr(sae, field) == kind) for kind in kinds]
        return f"{' '.join(marked(field, kind) for kind in kinds)}: {' '.join(map(short, means))}"

    def of_raw_and_saes(figure: str) -> str:
        means = [one for sae in saes if (one := sae.figure(figure)) is not None]
        low, high = (min(means), max(means)) if means else (None, None)
        return f"raw {short(mean(one.figure(figure) for one in raw.values()))}, SAEs {short(low)} to {short(high)}"

    def against_raw(figure: str) -> list[tuple[float | None, float | None]]:
        return [(sae.figure(figure), raw[sae.site].figure(figure)) for sae in saes]

    flat = {"matryoshka_batch_topk": "batch_topk"}
    rows = [
        Claim("SAE latents are more monosemantic than raw neurons (mean MS)", "raw .01, SAEs .12 to .23",
              of_raw_and_saes("mean_ms"), against_raw("mean_ms")),
        Claim("so is the best one (best MS)", "raw .01, SAEs .57 to 1.00", of_raw_and_saes("best_ms"),
              against_raw("best_ms")),
        Claim("wider SAEs have better best neurons (mean of the 32 best)", "best MS, ×1 ×4 ×16: .57 .78 .85",
              of_each("expansion", "top_ms"), pairs("expansion", {4: 1, 16: 4}, "top_ms")),
        Claim("so they do beyond what chance gives (mean of the 32 best, less that by chance)", "not reported",
              of_each("expansion", "above_chance"), pairs("expansion", {4: 1, 16: 4}, "above_chance")),
        Claim("mean MS rises from ×1 to ×4", "×1 ×4: .12 .19, Matryoshka .16 .23",
              of_each("expansion", "mean_ms"), pairs("expansion", {4: 1}, "mean_ms")),
        Claim("mean MS falls from ×4 to ×16", "×4 ×16: .19 .16, Matryoshka .23 .19",
              of_each("expansion", "mean_ms"), pairs("expansion", {4: 16}, "mean_ms")),
        Claim("sparser SAEs are more monosemantic (mean MS)", "K 1 10 20 50: .37 .19 .16 .07",
              of_each("k", "mean_ms"), pairs("k", {5: 20}, "mean_ms")),
        Claim("sparser SAEs reconstruct less (R²)", "K 1 10 20 50: .31 .61 .67 .75",
              of_each("k", "r2"), pairs("k", {20: 5}, "r2")),
        Claim("Matryoshka is above BatchTopK (mean MS)", "×1 ×4 ×16: .16 .23 .19 against .12 .19 .16",
              of_each("architecture", "mean_ms"), pairs("architecture", flat, "mean_ms")),
        Claim("Matryoshka is above BatchTopK (best MS)", "×1 ×4 ×16: .82 .89 .91 against .57 .78 .85",
              of_each("architecture", "best_ms"), pairs("architecture", flat, "best_ms")),
        Claim("Matryoshka tells the classes better by single neurons (mAP)", "not reported",
              of_each("architecture", "average_precision"), pairs("architecture", flat, "average_precision")),
    ]  # fmt: skip
    return Table(
        part="claims",
        title="The paper's claims: its figures, and means over the grid here; how many of the comparisons of one SAE "
        "with another, or with raw neurons, are for it",
        columns=["claim", "paper", "here", "holds"],
        rows=[[one.statement, one.paper, one.here, verdict(one.pairs)] for one in rows],
    )


def verdict(pairs: Iterable[tuple[float | None, float | None]]) -> str:
    """Whether the first of most pairs is above the second."""
    there = [(a, b) for a, b in pairs if a is not None and b is not None]
    n = sum(a > b for a, b in there)
    word = "yes" if n >= SURE * len(there) else "mostly" if n >= MOSTLY * len(there) else "no"
    return f"{word}: {n} of {len(there)}" if there else "not compared"


def marked(field: str, kind: object) -> str:
    """A value of a field as tables show it."""
    match field:
        case "expansion":
            return f"×{kind:g}"
        case "k":
            return f"K {kind}"
    return ARCHITECTURES.get(str(kind), str(kind))


def short(value: float | None) -> str:
    """`.123`."""
    return "–" if value is None else f"{value:.3f}".removeprefix("0")
