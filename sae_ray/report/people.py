"""What people and scores agree on, as `sae-ray humans score` has written it under the root."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, NamedTuple

from sae_ray.concepts.agreeing import AGREEMENT, Agreement
from sae_ray.report.plots import Line, Plot
from sae_ray.store.files import Folder
from sae_ray.store.steps import RECORD, read_record

BENCHMARK = "benchmark"
"""What agreement on the released benchmark is of."""
TITLES = {"ms": "MS", "dino": "MS by DINO", "clip": "MS by CLIP"}
"""Score -> how it is called."""
BIN = ("n_pairs", "rate", "low", "high")


class Judged(NamedTuple):
    """The agreement of people and a score of some neurons."""

    of: str
    """The cell, or `BENCHMARK`."""
    score: str
    counts: dict[str, Any]
    """The figures of the whole."""
    found: Agreement

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The bins that have pairs."""
        columns = zip(self.found.edge.tolist(), *(getattr(self.found, name).tolist() for name in BIN), strict=True)
        return [dict(zip(("edge", *BIN), row, strict=True)) for row in columns if row[1]]

    @property
    def plot(self) -> Plot:
        """The rate over how far the score tells two neurons apart, beside chance."""
        filled = self.found.n_pairs > 0
        x, rate, low, high = (
            column[filled].tolist() for column in (self.found.edge, self.found.rate, self.found.low, self.found.high)
        )
        line = Line(f"people and {self.score}", x, rate, band=(low, high))
        chance = Line("chance", x, [0.5] * len(x), dashed=True)
        title = f"{self.score}, {self.of}"
        return Plot(title, f"difference of {self.score}, at least", "share of pairs that agree", [line, chance])


def agreement_steps(root: Folder) -> list[str]:
    """The finished steps of agreement under a root."""
    return [name for name in root.folders() if name.startswith("agreement-") and (root / name).exists(RECORD)]


def read_agreements(root: Folder, cells: Collection[str]) -> list[Judged]:
    """The latest agreement of each score that has pairs, on each of these cells and on the benchmark."""
    records = {name: read_record(root / name) for name in agreement_steps(root)}
    latest: dict[tuple[str, str], str] = {}
    for name, record in sorted(records.items(), key=lambda pair: pair[1]["finished_at"]):
        config = record["config"]
        if record["counts"]["pairs"] and (config["of"] in cells or config["of"] == BENCHMARK):
            latest[config["of"], config["score"]] = name
    return [_read(root / latest[key], *key, records[latest[key]]["counts"]) for key in sorted(latest, key=_turn)]


def _turn(key: tuple[str, str]) -> tuple[str, bool, str]:
    """By cell, and MS first."""
    of, score = key
    return of, score != "ms", score


def _read(folder: Folder, of: str, score: str, counts: dict[str, Any]) -> Judged:
    column = score.rpartition(":")[2]  # of a table, if it is none of ours
    return Judged(of, TITLES.get(column, column), counts, Agreement.of(folder.read_parquet(AGREEMENT)))
