"""The tables of the documentation are those of the committed results."""

import json
import re
from pathlib import Path

import pytest

from bench.record import RESULTS
from bench.tables import PAGES, PLACE, faults_table, shown_faults, with_tables

REPOSITORY = Path(__file__).parents[2]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_pages_show_the_results_as_they_are(page: Path):
    text = page.read_text(encoding="utf-8")
    assert with_tables(text) == text, "run python -m bench.tables"


def test_every_table_has_its_place_on_a_page():
    places = {place.groups() for page in PAGES for place in PLACE.finditer(page.read_text(encoding="utf-8"))}
    results = {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in RESULTS.glob("*.json")}
    assert {(name, None) for name in results} <= places
    parts = {(name, one["part"]) for name, result in results.items() for one in result["tables"] if "part" in one}
    assert parts == {(name, part) for name, part in places if part is not None and name in results}


def test_what_the_table_of_faults_shows_is_tested():
    for one in shown_faults():
        file, _, name = one["test"].partition("::")
        assert f"def {name}(" in (REPOSITORY / file).read_text(encoding="utf-8"), f"{one} is tested no more: delete it"


def test_stages_of_the_same_outcome_share_a_row():
    outcomes = [("extract", "same bits"), ("train", "same bits"), ("score", "an error")]
    shown = [{"fault": "fire", "stage": stage, "outcome": outcome, "test": "t::a"} for stage, outcome in outcomes]
    assert faults_table(shown).splitlines()[2:] == [
        "| fire | score | an error | `t::a` |",
        "| fire | extract, train | same bits | `t::a` |",
    ]


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

    result["tables"].append({"title": "Apart", "columns": ["a"], "rows": [[1]], "part": "later"})
    (tmp_path / "steps.json").write_text(json.dumps(result))
    assert with_tables(first, tmp_path) == first
    apart = with_tables("<!-- bench: steps, later -->\n<!-- end -->\n", tmp_path)
    assert apart == "<!-- bench: steps, later -->\n**Apart**\n\n| a |\n| --- |\n| 1 |\n<!-- end -->\n"

    result["tables"][0]["rows"][0][1] = 1.25
    (tmp_path / "steps.json").write_text(json.dumps(result))
    assert with_tables(first, tmp_path) != first
