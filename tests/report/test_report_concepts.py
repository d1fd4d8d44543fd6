"""The report's page of concepts, and what the pages of neurons say of them."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from html import unescape
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from sae_ray.concepts.agreeing import AGREEMENT, Pairs, agreement
from sae_ray.concepts.summary import MEASURES
from sae_ray.concepts.tables import HIERARCHY_SCHEMA, NEURONS_SCHEMA, ConceptTables
from sae_ray.report import write_report
from sae_ray.report.meanings import MEASURED
from sae_ray.report.neurons import Neurons
from sae_ray.store.steps import RECORD, Step
from sae_ray.study.plan import StudyPlan
from sae_ray.study.summary import summarise
from tests.report_data import data, unpacked
from tests.small_study import LABELS, STEERED, make_report

Plan = Callable[..., StudyPlan]
MATRYOSHKA = "layer1.all-matryoshka_batch_topk-x4-k4"


@pytest.fixture(scope="module")
def tables(plan: StudyPlan) -> dict[str, ConceptTables]:
    return {one.name: ConceptTables(one.step.folder) for one in plan.concepts}


@pytest.fixture(scope="module")
def report(plan: StudyPlan) -> Path:
    write_report(plan)
    return Path((plan.root / "report").path)


@pytest.fixture
def copy(small_study: Path, plan_small_study: Plan, tmp_path: Path) -> StudyPlan:
    """The study once more, to be written to, without a report and what people were asked."""
    left_out = shutil.ignore_patterns("report", "agreement-*")
    shutil.copytree(small_study, tmp_path / "study", ignore=left_out)
    return plan_small_study(tmp_path / "study")


def page_of(plan: StudyPlan, name: str = "concepts.html") -> Path:
    return Path((plan.root / "report").path) / name


def rows_of(page: str, table: str) -> list[list[str]]:
    """The texts of the cells of a table, with all digits where there are more than are shown."""
    [found] = re.findall(rf'<table[^>]* id="{table}">(.*?)</table>', page, re.DOTALL)
    rows = re.findall(r"<tr>(.*?)</tr>", found, re.DOTALL)
    return [[_cell(*one) for one in re.findall(r"<t[hd]([^>]*)>(.*?)</t[hd]>", row, re.DOTALL)] for row in rows]


def _cell(attributes: str, content: str) -> str:
    exact = re.search(r'data-value="([^"]*)"', attributes)
    return exact[1] if exact else unescape(re.sub(r"<[^>]*>", "", content)).strip()


def test_every_score_of_a_neuron_has_a_title():
    schemas = (*NEURONS_SCHEMA, *HIERARCHY_SCHEMA)
    scores = {field.name for field in schemas if pa.types.is_floating(field.type)}
    assert sorted(one.key for one in MEASURED) == sorted(scores)


def test_scores_and_concepts_are_those_of_the_tables(
    report: Path, cells: dict[str, Neurons], tables: dict[str, ConceptTables]
):
    assert set(tables) == set(cells)
    for name, found in tables.items():
        order, neurons, concepts = cells[name].order, found.neurons, found.concepts
        page = data(report, f"{name}/concepts")
        concept_of = [page["names"][one] if one >= 0 else None for one in unpacked(page["of_neuron"], "<i4")]
        assert concept_of == neurons.concept[order].tolist()
        for one in MEASURED:
            expected, file = found.score(one.key)[order], f"{name}/scores/{one.key}"
            there = (report / "data" / f"{file}.js").exists()
            assert there == (not np.isnan(expected).all())
            if there:
                np.testing.assert_array_equal(unpacked(data(report, file), "<f4"), expected.astype("f4"))

        rows = [concepts.concept.tolist().index(one) for one in page["concept"]]
        assert sorted(rows) == list(range(len(LABELS)))
        rho = np.nan_to_num(concepts.rho[rows], nan=-2)
        assert (np.diff(rho) <= 0).all(), "best first"
        for key, values in page["scores"].items():
            known = np.array([np.nan if one is None else one for one in values])
            expected = getattr(concepts, key)[rows].astype(float)
            np.testing.assert_allclose(known, np.where(expected == -1, np.nan, expected), rtol=1e-3)
        for concept, best in zip(page["concept"], page["best"], strict=True):
            listed = found.correlations.concept == concept
            assert [neuron for neuron, _ in best] == found.correlations.neuron[listed].tolist()
            np.testing.assert_allclose([rho for _, rho in best], found.correlations.rho[listed], rtol=1e-3)


def test_names_come_with_what_speaks_for_them(
    report: Path, cells: dict[str, Neurons], tables: dict[str, ConceptTables]
):
    neurons, order = tables[MATRYOSHKA].neurons, cells[MATRYOSHKA].order.tolist()
    by_llava, by_words = data(report, f"{MATRYOSHKA}/names")
    assert (by_llava["method"], by_words["method"]) == ("vlm", "soft_wpmi")

    named = {order[place]: row for row, place in enumerate(unpacked(by_llava["place"], "<i4"))}
    assert sorted(named) == sorted(STEERED)
    for key, right, wrong in (("score", 0.9, 0.5), ("control_score", 0.5, 0.5), ("agreement", 0.75, 0.75)):
        values = unpacked(by_llava[key], "<f4")
        expected = [wrong if latent == STEERED[-1] else right for latent in STEERED]
        np.testing.assert_allclose([values[named[latent]] for latent in STEERED], expected)
    assert "margin" not in by_llava

    places, words = unpacked(by_words["place"], "<i4"), np.array(by_words["words"])
    assert (np.diff(places) > 0).all()
    mine = neurons.name[[order[place] for place in places]]
    assert words[unpacked(by_words["word"], "<i4")].tolist() == mine.tolist()
    assert len(places) == sum(neurons.name[neuron] is not None for neuron in order)
    for place, name, fits in zip(places, mine, unpacked(by_words["fits"], "<i4"), strict=True):
        concept = neurons.concept[order[place]]
        assert fits == (-1 if concept is None else concept == name)


def test_the_page_of_a_neuron_has_its_names_and_every_score(
    report: Path, cells: dict[str, Neurons], tables: dict[str, ConceptTables]
):
    chunk, found = data(report, f"{MATRYOSHKA}/0"), tables[MATRYOSHKA]
    neurons = found.neurons
    measured = [one for one in MEASURED if not np.isnan(found.score(one.key)[cells[MATRYOSHKA].order]).all()]
    assert len(measured) > 10
    assert "lca_mean" in [one.key for one in measured]
    for place, neuron in enumerate(cells[MATRYOSHKA].order):
        meaning = chunk["meaning"][place]
        assert meaning["concept"] == neurons.concept[neuron]
        shown = [np.nan if value is None else value for value in meaning["scores"]]
        np.testing.assert_allclose(shown, [found.score(one.key)[neuron] for one in measured], rtol=1e-3)
        methods = {method: name for method, name, _ in chunk["names"][place]}
        assert ("vlm" in methods) == (neuron in STEERED)
        assert methods.get("soft_wpmi") == neurons.name[neuron]


def test_which_sae_is_best_is_told_by_every_measure(report: Path, plan: StudyPlan):
    page = (report / "concepts.html").read_text()
    counts = {one.name: (one.step.record() or {})["counts"] for one in plan.concepts if one.sae is not None}
    raw = {one.activations.site.name: (one.step.record() or {})["counts"] for one in plan.concepts if one.sae is None}
    site = {one.name: one.activations.site.name for one in plan.concepts}
    found = {row[0].removesuffix(" (lower is better)"): row[1:] for row in rows_of(page, "best-table")[1:]}
    for measure in MEASURES:
        values = {name: one[measure.key] for name, one in counts.items() if one.get(measure.key) is not None}
        assert (measure.title in found) == bool(values)
        if not values:
            continue
        name, value, of_raw, chance = found[measure.title]
        assert float(value) == values[name] == (min if measure.lower_is_better else max)(values.values())
        by_chance = counts[name] if measure.chance else counts[name]["shuffled"]
        expected = raw[site[name]].get(measure.key), by_chance.get(measure.chance or measure.key)
        assert [float(one) if one else None for one in (of_raw, chance)] == list(expected)
    rows = {row.name: row for row in summarise(plan)}
    name, value, of_raw, _ = found["mean MS"]
    assert float(value) == rows[name].mean_ms == max(row.mean_ms for row in rows.values() if row.grid_cell)
    assert float(of_raw) == rows[f"raw-{site[name]}"].mean_ms
    assert [row[0] for row in rows_of(page, "all-table")[1:]] == list(rows)


def test_depths_are_told_by_level(report: Path, plan: StudyPlan):
    head, *rows = rows_of((report / "concepts.html").read_text(), "depth-table")
    counts = {one.name: (one.step.record() or {})["counts"] for one in plan.concepts}
    n_levels = len(counts[MATRYOSHKA]["depths"])
    assert n_levels > 1
    assert head == ["SAE", "all neurons", *(f"level {level}" for level in range(n_levels))]
    found = {row[0]: row[1:] for row in rows}
    assert set(found) == set(counts)
    for name, values in found.items():
        levels = counts[name]["depths"] if len(counts[name]["depths"]) > 1 else [None] * n_levels
        assert [float(value) if value else None for value in values] == [counts[name]["depth"], *levels]


def test_what_the_user_wrote_is_escaped(report: Path):
    page = (report / "concepts.html").read_text()
    assert "small &lt;study&gt;" in page
    assert "<study>" not in page
    assert LABELS[2] not in page
    ids = re.findall(r'\bid="(.*?)"', page)
    assert len(ids) == len(set(ids))
    assert 'href="concepts.html"' in (report / "index.html").read_text()


def test_the_page_is_bounded(copy: StudyPlan, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("sae_ray.report.meanings.MOST_NEURONS", 10)
    monkeypatch.setattr("sae_ray.report.meanings.MOST_CONCEPTS", 2)
    assert make_report(copy)
    report = page_of(copy).parent
    page = data(report, f"{MATRYOSHKA}/concepts")
    assert (page["n_concepts"], len(page["concept"]), len(page["best"]), len(page["scores"]["rho"])) == (3, 2, 2, 2)
    assert (
        len(unpacked(page["of_neuron"], "<i4")) == len(unpacked(data(report, f"{MATRYOSHKA}/scores/rho"), "<f4")) == 10
    )
    for names in data(report, f"{MATRYOSHKA}/names"):
        assert max(unpacked(names["place"], "<i4")) < 10


def test_without_concepts_there_is_no_page_of_them(copy: StudyPlan, plan_small_study: Plan, tmp_path: Path):
    plan = plan_small_study(tmp_path / "study", concepts=None)
    assert make_report(plan)
    assert not page_of(plan).exists()
    assert not page_of(plan, "concepts.js").exists()
    assert "concepts.html" not in page_of(plan, "index.html").read_text()
    chunk = data(page_of(plan).parent, f"{MATRYOSHKA}/0")
    assert "meaning" not in chunk
    assert sum(map(len, chunk["names"])) == len(STEERED), "what the LLaVA said is still there"


def test_the_page_shows_the_cells_that_are_measured(copy: StudyPlan):
    for one in copy.concepts[1:]:
        shutil.rmtree(one.step.folder.path)
    assert make_report(copy)
    page = page_of(copy).read_text()
    assert [row[0] for row in rows_of(page, "all-table")[1:]] == [copy.concepts[0].name]
    assert "No SAE has been measured yet" in page
    shutil.rmtree(copy.concepts[0].step.folder.path)
    assert make_report(copy), "another state is another report"
    assert not page_of(copy).exists()


def judge(plan: StudyPlan, of: str, score: str, choice: list[float], year: int = 2030) -> None:
    """Writes an agreement on pairs of neurons whose scores differ by .55, finished in a certain year."""
    n = len(choice)
    found = agreement(Pairs(np.zeros(n, int), np.ones(n, int), np.array(choice)), np.array([0.9, 0.35]))
    step = Step(plan.root, "agreement", f"agreement-{of}", {"of": of, "score": score, "inputs": choice})
    step.folder.write_parquet(AGREEMENT, found.table())
    counts = {"headline": found.headline, "pooled": found.pooled, "low": 0.1, "high": 0.9, "pairs": n}
    step.finish(0.1, counts | {"raters": ["Ann"]})
    step.folder.write_json(RECORD, step.folder.read_json(RECORD) | {"finished_at": f"{year}-01-01T00:00:00Z"})


def test_people_are_shown_as_soon_as_they_have_been_asked(copy: StudyPlan):
    assert make_report(copy)
    assert "People have not been asked yet" in page_of(copy).read_text()
    judge(copy, "an SAE of another study", "ms", [0, 0])
    judge(copy, MATRYOSHKA, "runs/neurons.parquet:rho", [1, 0, 0, 0])
    judge(copy, MATRYOSHKA, "ms", [1, 1, 1, 0])
    assert make_report(copy), "new answers make a new report"
    page = page_of(copy).read_text()
    assert "another study" not in page
    assert "75.0% of 4 pairs agree" in page
    assert "MS, layer1.all" in page
    rows = [row[:5] for row in rows_of(page, "people-table")[1:]]
    assert rows == [[MATRYOSHKA, "MS", "0.5", "4", "0.75"], [MATRYOSHKA, "rho", "0.5", "4", "0.25"]]
    assert not make_report(copy)


def test_the_latest_answers_are_shown(copy: StudyPlan):
    judge(copy, MATRYOSHKA, "ms", [1, 1], year=2031)
    judge(copy, MATRYOSHKA, "ms", [0, 0], year=2030)
    assert make_report(copy)
    [row] = rows_of(page_of(copy).read_text(), "people-table")[1:]
    assert row[4] == "1.0"
