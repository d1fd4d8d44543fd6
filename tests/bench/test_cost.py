"""What docs/cluster.md says that the paper's study takes follows from the plan and the committed results."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import cost
from bench.cost import PAGE, hours, measured, paper, storage, with_costs
from bench.record import RESULTS


@pytest.fixture(scope="module")
def plan():
    return paper()


def test_the_page_shows_what_the_results_give():
    page = PAGE.read_text(encoding="utf-8")
    assert page.count("<!-- costs -->") == page.count("<!-- /costs -->") == 1
    assert with_costs(page) == page, "run python -m bench.cost"


def test_storage_is_the_plans(plan):
    rows = {row[0]: row for row in storage(plan)}
    # Four sites of width 1024 and one of 768 on one vector per image, one of two; judge on held-out images, scorer on
    # training images; two bytes a number, and ten for image, token and the rest.
    train, heldout = 1_281_167, 50_000
    stored = (train + heldout) * (4 * 2058 + 1546 + 2 * 2058) + heldout * 1546 + train * 1034
    assert rows["extract"] == ["extract", 14, f"{stored / 1e9:,.1f}", f"{stored / 1e9:,.1f}", 7 * (2503 + 98)]
    weights = sum(2 * 4 * one.activations.width * one.d_sae for one in plan.trains)
    assert rows["train"][:4] == ["train", 67, f"{7 * weights / 1e9:,.1f}", f"{weights / 1e9:,.1f}"]


def test_hours_follow_the_rates(plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    before = {(row[0], row[1]): float(row[2]) for row in hours(plan) if row[0] != "all"}
    for file in RESULTS.glob("*.json"):
        (tmp_path / file.name).write_text(file.read_text())
    results = json.loads((tmp_path / "gpu_training.json").read_text())
    for line in results["tables"][0]["rows"]:
        line[2] = str(3 * float(line[2]))
    (tmp_path / "gpu_training.json").write_text(json.dumps(results))
    monkeypatch.setattr(cost, "RESULTS", tmp_path)
    after = {(row[0], row[1]): float(row[2]) for row in hours(plan) if row[0] != "all"}
    [alive] = [key for key in before if key[0] == "train"]
    assert after.pop(alive) == pytest.approx(3 * before.pop(alive), abs=0.2)
    assert after == before


def test_the_sum_has_training_once(plan):
    *rows, (_, _, one, many) = hours(plan)
    for column, text in ((2, one), (3, many)):
        extract, alive, dead, score, steering = (float(row[column]) for row in rows)
        low, high = map(float, text.split(" to "))
        assert low == pytest.approx(extract + alive + score + steering, abs=0.25)
        assert high == pytest.approx(extract + dead + score + steering, abs=0.25)


def test_a_figure_that_is_gone_is_not_made_up():
    assert measured("gpu_training", "Our training step", "ms", "batch_topk, float32", 65_536) > 0
    with pytest.raises(LookupError, match="0 figures"):
        measured("gpu_training", "Our training step", "ms", "batch_topk, int8")
    with pytest.raises(LookupError, match="4 figures"):
        measured("gpu_training", "Our training step", "GB", "batch_topk, bfloat16")
