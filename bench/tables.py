"""The tables of docs/speed.md, made from the results: `python -m bench.tables` rewrites them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from bench.record import RESULTS

PAGE = Path(__file__).parents[1] / "docs" / "speed.md"
PLACE = re.compile(r"<!-- bench: (\w+) -->\n.*?<!-- end -->", re.DOTALL)

MACHINE = ("gpu", "cpu", "vectors", "cores", "threads", "load_average", "python", "torch", "date")


def with_tables(page: str, results: Path = RESULTS) -> str:
    """The page with what lies between `<!-- bench: NAME -->` and `<!-- end -->` made from `NAME.json`."""
    return PLACE.sub(lambda place: f"<!-- bench: {place[1]} -->\n{section(results, place[1])}\n<!-- end -->", page)


def section(results: Path, name: str) -> str:
    """All tables of one benchmark and the machine they are from."""
    file = results / f"{name}.json"
    command = f"python -m bench.{name.replace('_', ' ')}"
    if not file.exists():
        return table([f"`{command}`", ""], [["unmeasured", ""]])
    result = json.loads(file.read_text(encoding="utf-8"))
    tables = [f"**{one['title']}**\n\n{table(one['columns'], one['rows'])}" for one in result["tables"]]
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
    PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
