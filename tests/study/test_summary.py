"""The summary of a study, from hand-written scores."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from sae_ray.scores.tables import SCORES, SCORES_SCHEMA
from sae_ray.store.files import Folder
from sae_ray.study.config import Study
from sae_ray.study.plan import StudyPlan
from sae_ray.study.step_plans import ScorePlan
from sae_ray.study.summary import CellSummary, compare, summarise, summary_lines

MakePlan = Callable[..., StudyPlan]
RAW = "raw-projection"


@pytest.fixture
def make_plan(tmp_path: Path, tiny_clip: str, tiny_judge: str) -> MakePlan:
    (tmp_path / "images").mkdir()
    for number in range(20):
        (tmp_path / "images" / f"{number}.png").touch()

    def make(**overrides: Any) -> StudyPlan:
        values = {
            "name": "s",
            "images": {"train": {"path": str(tmp_path / "images")}, "heldout_fraction": 0.5},
            "encoder": {"model": tiny_clip},
            "judge": {"model": tiny_judge, "point": "projection"},
            "grid": [{"sites": ["projection"], "expansions": [1, 4], "k": [2, 8]}],
        }
        return StudyPlan(Study.from_dict(values, overrides), Folder(tmp_path / "root"))

    return make


def write_scores(plan: StudyPlan, name: str, ms: Sequence[float], n_active: Sequence[int] | int = 100) -> ScorePlan:
    """Finishes a scoring step with these scores."""
    [score] = [score for score in plan.scores if score.name == name and score.embeddings is not None]
    columns = {name: np.zeros(len(ms)) for name in SCORES_SCHEMA.names}
    columns |= {"ms": np.array(ms, float), "n_active": np.broadcast_to(n_active, len(ms))}
    score.step.folder.write_parquet(SCORES, pa.table(columns).cast(SCORES_SCHEMA))
    score.step.finish(0.0, {})
    return score


def cell(expansion: int, k: int) -> str:
    return f"projection-batch_topk-x{expansion}-k{k}"


def test_neurons_are_averaged_where_enough_images_activate_them(make_plan: MakePlan):
    plan = make_plan(**{"scoring.min_images": 10})
    write_scores(plan, RAW, [0.2, 0.4, 0.9, np.nan], [10, 50, 9, 0])
    [row] = summarise(plan)
    assert (row.name, row.site, row.grid_cell) == (RAW, "projection", None)
    assert (row.n_neurons, row.n_scored) == (4, 2)
    assert (row.mean_ms, row.top_ms, row.best_ms) == pytest.approx((0.3, 0.3, 0.4))
    assert (row.l0, row.r2, row.dead_fraction) == (None, None, None)
    [paper] = summarise(make_plan(**{"scoring.min_images": 2}))  # the same steps, read as the paper does
    assert (paper.n_scored, paper.mean_ms, paper.best_ms) == pytest.approx((3, 0.5, 0.9))


def test_the_32_best_are_averaged_for_themselves(make_plan: MakePlan):
    plan = make_plan()
    ms = np.r_[np.full(100, 0.1), np.linspace(0.5, 0.81, 32)]
    write_scores(plan, cell(1, 2), np.random.default_rng(0).permutation(ms).tolist())
    [row] = summarise(plan)
    assert row.top_ms == pytest.approx(np.linspace(0.5, 0.81, 32).mean())
    assert row.mean_ms == pytest.approx(ms.mean())
    assert row.best_ms == pytest.approx(0.81)


def test_where_no_neuron_is_scored_the_means_are_nan(make_plan: MakePlan):
    plan = make_plan()
    write_scores(plan, cell(1, 2), [np.nan, np.nan], 0)
    [row] = summarise(plan)
    assert row.n_scored == 0
    assert np.isnan([row.mean_ms, row.top_ms, row.best_ms]).all()
    assert summary_lines([row])[1].split() == [cell(1, 2), "2", "0", *"––––––"]


def test_claims_about_cells_without_a_scored_neuron_are_left_out(make_plan: MakePlan):
    plan = make_plan()
    write_scores(plan, RAW, [0.2])
    write_scores(plan, cell(1, 2), [np.nan], 0)
    write_scores(plan, cell(1, 8), [0.3])
    assert [one.statement for one in compare(summarise(plan))] == [
        f"{cell(1, 8)}: mean MS 0.300 above the raw neurons' 0.200"
    ]


def test_fidelity_is_that_of_the_evaluation(make_plan: MakePlan):
    plan = make_plan()
    score = write_scores(plan, cell(4, 8), [0.5])
    assert score.sae is not None
    [before] = summarise(plan)
    assert before.l0 is None
    [evaluation] = [one for one in plan.evaluations if one.sae is score.sae]
    evaluation.step.finish(0.0, {"l0": 7.5, "r2": 0.625, "dead_fraction": 0.25})
    [row] = summarise(plan)
    assert (row.l0, row.r2, row.dead_fraction) == (7.5, 0.625, 0.25)
    assert row.grid_cell == score.sae.grid_cell
    header, line = summary_lines([row])
    assert header.split() == ["neurons", "scored", "mean", "MS", "best", "32", "best", "L0", "R²", "dead"]
    assert line.split() == [cell(4, 8), "1", "1", "0.500", "0.500", "0.500", "7.5", "0.625", "0.25"]


def test_rows_stand_in_the_order_of_the_study_and_pictures_are_no_row(make_plan: MakePlan):
    plan = make_plan(**{"scoring.pictures": "train"})
    names = [cell(expansion, k) for expansion in (1, 4) for k in (2, 8)]
    for name in reversed([RAW, *names[:3]]):  # the fourth is not scored
        write_scores(plan, name, [0.5])
    pictures = [score for score in plan.scores if score.embeddings is None]
    assert len(pictures) == 5
    for score in pictures:
        score.step.finish(0.0, {})
    rows = summarise(plan)
    assert [row.name for row in rows] == [RAW, *names[:3]]
    lines = summary_lines(rows)
    assert len({len(line) for line in lines}) == 1
    assert lines[1].split() == [RAW, "1", "1", "0.500", "0.500", "0.500", "–", "–", "–"]


def test_the_papers_claims_are_put_to_the_test_pair_by_pair(make_plan: MakePlan):
    plan = make_plan()
    # Mean over all, and mean of the 32 best, apart.
    means = {RAW: 0.2, cell(1, 2): 0.5, cell(1, 8): 0.4, cell(4, 2): 0.1, cell(4, 8): 0.3}
    bests = {RAW: 0.2, cell(1, 2): 0.6, cell(1, 8): 0.5, cell(4, 2): 0.9, cell(4, 8): 0.5}
    for name in means:
        rest = 2 * means[name] - bests[name]
        write_scores(plan, name, [bests[name]] * 32 + [rest] * 32)
    found = {comparison.statement: comparison.holds for comparison in compare(summarise(plan))}
    assert found == {
        f"{cell(1, 2)}: mean MS 0.500 above the raw neurons' 0.200": True,
        f"{cell(1, 8)}: mean MS 0.400 above the raw neurons' 0.200": True,
        f"{cell(4, 2)}: mean MS 0.100 above the raw neurons' 0.200": False,
        f"{cell(4, 8)}: mean MS 0.300 above the raw neurons' 0.200": True,
        f"{cell(1, 2)} above {cell(1, 8)}: mean MS 0.500, 0.400": True,
        f"{cell(4, 2)} above {cell(4, 8)}: mean MS 0.100, 0.300": False,
        f"{cell(4, 2)} above {cell(1, 2)}: mean MS of the 32 best 0.900, 0.600": True,
        f"{cell(4, 8)} above {cell(1, 8)}: mean MS of the 32 best 0.500, 0.500": False,  # not above, but equal
    }


def test_only_saes_that_differ_in_one_thing_are_compared(make_plan: MakePlan):
    grid = [
        {"sites": ["projection", "pooled"], "expansions": [2], "k": [4]},
        {"sites": ["projection"], "architectures": ["topk", "relu"], "expansions": [1, 8, 2], "k": [4],
         "sparsity": [0.1]},
    ]  # fmt: skip
    plan = make_plan(grid=grid)
    for score in plan.scores:
        write_scores(plan, score.name, [0.5])
    statements = [one.statement for one in compare(summarise(plan)) if "raw" not in one.statement]
    # Neither sites nor architectures are mixed; widths by size, each with the next; relu has no k to compare by.
    assert [statement.partition(":")[0] for statement in statements] == [
        "projection-topk-x2-k4 above projection-topk-x1-k4",
        "projection-topk-x8-k4 above projection-topk-x2-k4",
    ]
    against_raw = [one.statement for one in compare(summarise(plan)) if "raw" in one.statement]
    assert len(against_raw) == len(plan.trains) == 8


def test_saes_of_different_seeds_are_not_compared(make_plan: MakePlan):
    plan = make_plan(**{"grid.seeds": [0, 1], "grid.k": [2]})
    for score in plan.scores:
        write_scores(plan, score.name, [0.5])
    statements = [one.statement.partition(":")[0] for one in compare(summarise(plan)) if "raw" not in one.statement]
    assert len(statements) == 2
    for statement in statements:
        wide, _, narrow = statement.partition(" above ")
        assert ("seed1" in wide) == ("seed1" in narrow)


def test_without_raw_neurons_nothing_is_compared_with_them(make_plan: MakePlan):
    plan = make_plan()
    write_scores(plan, cell(1, 2), [0.5])
    assert compare(summarise(plan)) == []
    assert isinstance(summarise(plan)[0], CellSummary)
