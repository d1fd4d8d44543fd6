"""The tables of the documentation, made from results of benchmarks and from what tests of faults showed:
`python -m bench.tables` rewrites them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from bench.record import RESULTS

DOCS = Path(__file__).parents[1] / "docs"
PAGES = sorted(DOCS.glob("*.md"))
FAULTS = DOCS / "faults"
"""One file per test: what it showed. `pytest --record-faults` rewrites them."""
PLACE = re.compile(r"<!-- bench: (\w+)(?:, (\w+))? -->\n.*?<!-- end -->", re.DOTALL)
FAULTS_PLACE = re.compile(r"<!-- faults -->\n.*?<!-- /faults -->", re.DOTALL)

MACHINE = ("gpu", "cpu", "vectors", "cores", "threads", "load_average", "python", "torch", "date")


def with_tables(page: str, results: Path = RESULTS) -> str:
    """The page with what lies between `<!-- bench: NAME -->` or `<!-- bench: NAME, PART -->` and `<!-- end -->` made
    from `NAME.json`, and what lies between `<!-- faults -->` and `<!-- /faults -->` from the tests of faults."""

    def filled(place: re.Match) -> str:
        first, _, _ = place[0].partition("\n")
        return f"{first}\n{section(results, place[1], place[2])}\n<!-- end -->"

    page = PLACE.sub(filled, page)
    return FAULTS_PLACE.sub(lambda _: f"<!-- faults -->\n{faults_table(shown_faults())}\n<!-- /faults -->", page)


def shown_faults() -> list[dict[str, str]]:
    """`fault`, `stage`, `outcome` and `test`."""
    return [row for file in sorted(FAULTS.glob("*.json")) for row in json.loads(file.read_text(encoding="utf-8"))]


def faults_table(shown: list[dict[str, str]]) -> str:
    """One row per fault, outcome and test, with the stages for which it showed that."""
    stages: dict[tuple[str, str, str], list[str]] = {}
    for one in shown:
        stages.setdefault((one["fault"], one["outcome"], one["test"]), []).append(one["stage"])
    rows = [[fault, ", ".join(at), outcome, f"`{test}`"] for (fault, outcome, test), at in sorted(stages.items())]
    lines = [["fault", "stages", "outcome", "shown by"], ["---"] * 4, *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def section(results: Path, name: str, part: str | None = None) -> str:
    """The tables of one part of a benchmark; without a part those that are in none, and the machine they are from."""
    file = results / f"{name}.json"
    command = f"python -m bench.{name.replace('gpu_', 'gpu ')}"
    if not file.exists():
        return table([f"`{command}`", ""], [["unmeasured", ""]])
    result = json.loads(file.read_text(encoding="utf-8"))
    of_part = [one for one in result["tables"] if one.get("part") == part]
    tables = [f"**{one['title']}**\n\n{table(one['columns'], one['rows'])}" for one in of_part]
    if part is not None:
        return "\n\n".join(tables)
    facts = result["facts"]
    command = facts.get("command", command)
    machine = ", ".join(f"{fact.replace('_', ' ')} {facts[fact]}" for fact in MACHINE if fact in facts)
    return "\n\n".join([*tables, f"Measured by `{command}`: {machine}."])


def table(columns: list[str], rows: list[list[Any]]) -> str:
    lines = [columns, ["---" if column == columns[0] else "---:" for column in columns], *rows]
    return "\n".join(f"| {' | '.join(map(cell, line))} |" for line in lines)


def cell(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:,}" if isinstance(value, int | float) else str(value)


if __name__ == "__main__":
    for each in PAGES:
        each.write_text(with_tables(each.read_text(encoding="utf-8")), encoding="utf-8")
