"""Every package that is imported is declared in pyproject.toml, also those that another dependency happens to bring."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from tests.test_imports import imports_of, that_run

ROOT = Path(__file__).resolve().parent.parent
OURS = ("sae_ray", "jobs", "serve", "cluster", "tests", "bench", "tools")
USED = {
    "sae_ray": ("vllm", "heif", "datasets", "wandb", "mlflow", "trackio"),
    "jobs": (),
    "serve": ("vllm",),
    "tests": ("vllm", "test", "mlflow", "trackio", "tensorboard"),
    "tools/llava": (),
}
"""Folder -> the extras that it may need besides the dependencies."""
ELSEWHERE = ROOT / "tests" / "serve" / "clients"
"""Scripts for interpreters of their own, with a list of packages beside them."""
WITH_TORCH = "triton"
"""Comes with torch's builds for GPUs; an extra names it for the tests, which run it on CPUs too."""


def declared(extras: tuple[str, ...]) -> set[str]:
    """Names of the distributions that pyproject.toml lists, normalised."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    requirements = [*project["dependencies"]]
    for extra in extras:
        requirements += project["optional-dependencies"][extra]
    return {normalised(re.match(r"[\w.-]+", requirement)[0]) for requirement in requirements}  # type: ignore[index]


def normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def undeclared(files: list[Path], known: set[str]) -> list[str]:
    """`file: module` of every import of a package that is not among the known distributions."""
    distributions = packages_distributions()
    found = []
    for file in files:
        nodes = list(that_run(ast.parse(file.read_text(encoding="utf-8")), functions=True))
        for level, name in imports_of(nodes):
            top = name.split(".")[0]
            if level or top in sys.stdlib_module_names or top in OURS:
                continue
            # What is not installed here, such as vLLM, is looked for by its own name.
            if not known & {normalised(one) for one in (top, *distributions.get(top, ()))}:
                found.append(f"{file.name}: {top}")
    return sorted(set(found))


@pytest.mark.parametrize("folder", USED)
def test_what_is_imported_is_declared(folder: str):
    files = sorted(file for file in (ROOT / folder).rglob("*.py") if file.parent != ELSEWHERE)
    assert files
    assert undeclared(files, declared(USED[folder]) | {WITH_TORCH}) == []


def test_an_import_that_is_not_declared_is_seen(tmp_path: Path):
    file = tmp_path / "module.py"
    file.write_text(
        "from typing import TYPE_CHECKING\nimport json, yaml\nfrom . import pytest\n"
        "if TYPE_CHECKING:\n    import jaxtyping\nelse:\n    import click\n"
        "def f():\n    from PIL import Image\n"
    )
    assert undeclared([file], declared(())) == []
    assert undeclared([file], set()) == ["module.py: PIL", "module.py: click", "module.py: yaml"]
