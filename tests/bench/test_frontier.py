"""The comparison at equal R², and its figure."""

from __future__ import annotations

import numpy as np
import pytest

from bench.frontier import DOCS, Measured, drawn_figure, margin, mean_r2, one_hot
from sae_ray.world.render import attributes


def cell(method: str, *seeds: tuple[float, float]) -> list[Measured]:
    """Of seeds with these R² and MS."""
    return [Measured(f"{method} {seeds}", method, 5, r2, 9, 0, 1, {"j": ms}, {"j": 2 * ms}) for r2, ms in seeds]


def found(*cells: list[Measured], of: int = -1, statistic: str = "mean") -> float | None:
    return margin({str(place): one for place, one in enumerate(cells)}, cells[of], statistic, "j")


def test_the_worst_seed_is_compared_with_the_best_of_both_at_equal_r2():
    flat = [cell("BatchTopK", (0.90, 0.5), (0.90, 0.6)), cell("BatchTopK", (0.96, 0.2), (0.98, 0.1))]
    nested = [cell("Matryoshka", (0.92, 0.3)), cell("Matryoshka", (0.98, 0.3))]
    ours = cell("TopK", (0.93, 0.7), (0.94, 0.65))  # R² .935: halfway from .6 to .2
    assert mean_r2(ours) == pytest.approx(0.935)
    assert found(*flat, *nested, ours) == pytest.approx(0.65 - 0.4)
    assert found(*flat, *nested, ours, statistic="best") == pytest.approx(2 * (0.65 - 0.4))
    assert found(*flat, *nested, cell("TopK", (0.97, 0.25))) == pytest.approx(0.25 - 0.3)


def test_who_does_not_reach_an_r2_is_not_compared_there():
    flat = [cell("BatchTopK", (0.90, 0.6)), cell("BatchTopK", (0.96, 0.2))]
    nested = [cell("Matryoshka", (0.92, 0.8)), cell("Matryoshka", (0.98, 0.4))]
    assert found(*flat, *nested, cell("TopK", (0.90, 0.7))) == pytest.approx(0.1)
    assert found(*flat, *nested, cell("TopK", (0.98, 0.7))) == pytest.approx(0.3)
    assert found(*flat, *nested, cell("TopK", (0.89, 0.7))) is None
    assert found(*flat, *nested, cell("TopK", (0.99, 0.7))) is None


def test_what_was_drawn_judges_by_what_images_have_in_common():
    shown = [attributes(number) for number in range(40_000, 40_200)]
    rows = one_hot(shown)
    common = [[sum(a == b for a, b in zip(one, other, strict=True)) for other in shown] for one in shown]
    assert np.array_equal(rows @ rows.T, np.array(common, "float32"))


@pytest.mark.parametrize("study", ["frontier", "photos_frontier"])
def test_the_figure_is_that_of_the_results(study: str):
    drawn = (DOCS / f"{study}.svg").read_text(encoding="utf-8")
    assert drawn == drawn_figure(study), "run python -m bench.frontier, or draw it again"
