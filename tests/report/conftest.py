"""The finished study whose report is tested."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from sae_ray.report.neurons import Neurons, read_neurons
from sae_ray.study.plan import StudyPlan


@pytest.fixture(scope="module")
def plan(small_study: Path, plan_small_study: Callable[..., StudyPlan]) -> StudyPlan:
    """Of the finished study; nothing is written to it but its report."""
    return plan_small_study(small_study)


@pytest.fixture(scope="module")
def cells(plan: StudyPlan) -> dict[str, Neurons]:
    return {cell.name: cell for cell in read_neurons(plan)}
