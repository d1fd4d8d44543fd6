"""The benchmarks are run too rarely to notice by themselves that what they import has moved."""

import importlib
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[2] / "bench"


@pytest.mark.parametrize("name", sorted(file.stem for file in BENCH.glob("[a-z]*.py")))
def test_a_benchmark_can_be_imported(name: str):
    importlib.import_module(f"bench.{name}")
