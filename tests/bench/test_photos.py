"""The figures of docs/photos.md, of a small study whose figures are known otherwise."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from bench.photo_claims import claims, verdict
from bench.photo_neurons import anchor, class_table, contact_sheets, levels, name_table
from bench.photo_saes import read
from bench.photos import curves, grids, likeness
from bench.record import RESULTS
from sae_ray.sae import evaluate_store, load_sae
from sae_ray.store.activations import ActivationStore
from sae_ray.study.plan import StudyPlan
from sae_ray.study.summary import summarise
from tests.small_study import LABELS

MATRYOSHKA = "layer1.all-matryoshka_batch_topk-x4-k4"


@pytest.fixture(scope="module")
def plan(small_study: Path, plan_small_study: Callable[..., StudyPlan]) -> StudyPlan:
    return plan_small_study(small_study)


def test_curves_are_those_of_the_summary(plan: StudyPlan):
    saes = read(plan)
    rows = {row.name: row for row in summarise(plan)}
    assert len(saes) == len(rows)
    for sae in saes:
        [cell], [curve], [chance] = sae.cells, sae.curves, sae.chance
        assert (len(curve), len(chance)) == (cell.n_scored, cell.n_scored)
        assert sae.at_rank(1) == pytest.approx(cell.best_ms)
        assert sae.at_rank(cell.n_scored + 1) is None
    assert sum(len(table["rows"]) for table in grids(saes)) == len(curves(saes)["rows"]) == len(rows)


def test_all_levels_together_are_the_sae(plan: StudyPlan):
    found = levels(plan, MATRYOSHKA)
    train = next(one for one in plan.trains if one.grid_cell.name == MATRYOSHKA)
    assert [one.neurons for one in found] == train.grid_cell.cell.group_sizes(train.activations.width)
    heldout = next(one.activations for one in plan.evaluations if one.sae is train)
    whole = evaluate_store(load_sae(train.step.folder), ActivationStore(heldout.step.folder)).summary()
    assert found[-1].r2 == pytest.approx(whole.r2, abs=1e-4)
    assert sum(one.scored for one in found) == next(one for one in summarise(plan) if one.name == MATRYOSHKA).n_scored


def test_classes_can_be_reached_from_the_sheets(plan: StudyPlan):
    sae = next(one for one in read(plan) if one.cells[0].name == MATRYOSHKA)
    classes = class_table(plan, sae)["rows"]
    assert [row[0].partition("</a>")[2] for row in classes] == sorted(LABELS)
    for table in contact_sheets(plan, sae):
        for row in table["rows"]:
            assert {f'<a id="{anchor(label)}"></a>{label}' for label in LABELS if f"[{label}]" in row[0]} <= {
                row[0] for row in classes
            }
    assert len(name_table(plan, [sae])["rows"]) == 1


def test_a_claim_is_judged_by_its_comparisons(plan: StudyPlan):
    assert verdict([(2.0, 1.0)] * 9 + [(1.0, 2.0)]) == "yes: 9 of 10"
    assert verdict([(2.0, 1.0)] * 6 + [(1.0, 1.0)] * 4) == "mostly: 6 of 10"
    assert verdict([(1.0, 2.0), (2.0, None)]) == "no: 0 of 1"
    assert verdict([(None, 1.0)]) == "not compared"
    saes = read(plan)
    above_raw, *others = claims(saes)["rows"]
    raw = {sae.site: sae.cells[0].mean_ms for sae in saes if sae.architecture is None}
    found = [sae for sae in saes if sae.architecture is not None]
    n = sum(sae.cells[0].mean_ms > raw[sae.site] for sae in found)
    assert above_raw[3].endswith(f"{n} of {len(found)}")
    assert any(row[3] == "not compared" for row in others), "no two SAEs here differ in their architecture alone"


def test_likeness_is_the_mean_cosine_of_pairs():
    rows = np.random.default_rng(0).normal(size=(7, 3))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    pairs = (rows @ rows.T)[np.triu_indices(7, 1)]
    assert likeness(rows) == pytest.approx(pairs.mean())


def test_the_committed_figures_show_no_photograph():
    """Their licence does not allow it; nor are paths of the machine that has them anybody's business."""
    text = (RESULTS / "photos.json").read_text(encoding="utf-8")
    assert not any(one in text for one in (".JPEG", ".jpg", "data:", "/imagenette"))
    assert "/" not in json.loads(text)["facts"]["encoder"]
