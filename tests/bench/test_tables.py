"""The tables of the page on speed are those of the committed results."""

import json
import re
from pathlib import Path

from bench.record import RESULTS
from bench.tables import PAGE, PLACE, with_tables


def test_the_page_shows_the_results_as_they_are():
    page = PAGE.read_text(encoding="utf-8")
    assert with_tables(page) == page, "run python -m bench.tables"


def test_every_result_has_its_place_on_the_page():
    places = {place[1] for place in PLACE.finditer(PAGE.read_text(encoding="utf-8"))}
    assert {file.stem for file in RESULTS.glob("*.json")} <= places


def test_tables_follow_the_results(tmp_path: Path):
    page = "before\n<!-- bench: steps -->\nold\n<!-- end -->\nbetween\n<!-- bench: gpu -->\n<!-- end -->\nafter\n"
    result = {
        "facts": {"cores": 2, "load_average": 0.5, "anything": [1]},
        "tables": [{"title": "Steps", "columns": ["of", "ms"], "rows": [["ours", 1.5], ["theirs", 2000]]}],
    }
    (tmp_path / "steps.json").write_text(json.dumps(result))
    first = with_tables(page, tmp_path)
    assert re.findall(r"^\|.*", first, re.MULTILINE) == [
        "| of | ms |",
        "| --- | ---: |",
        "| ours | 1.5 |",
        "| theirs | 2,000 |",
        "| `python -m bench.gpu` |  |",
        "| --- | ---: |",
        "| unmeasured |  |",
    ]
    assert [line for line in first.splitlines() if line in ("before", "old", "between", "after")] == [
        "before",
        "between",
        "after",
    ]
    assert "by `python -m bench.steps`: cores 2, load average 0.5." in first
    assert with_tables(first, tmp_path) == first

    result["tables"][0]["rows"][0][1] = 1.25
    (tmp_path / "steps.json").write_text(json.dumps(result))
    assert with_tables(first, tmp_path) != first
