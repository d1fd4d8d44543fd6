"""Imports only ever point downwards, and the numeric rooms open where only their own needs are installed."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ABOVE = ("jobs", "serve", "sae_ray.jobs", "sae_ray.serve", "bench", "tests", "tools")
FORBIDDEN = {
    "sae_ray": (*ABOVE, "ray", "fastapi", "starlette"),
    # Siblings are imported relatively: absolute names of both packagings would load every module twice.
    "jobs": ABOVE,
    "serve": ABOVE,
}
COMMAND_LINE = ("jobs.cli", "sae_ray.serve.local.")
"""The command line lends its name to the command of the room beside it, when that is called."""
ROOMS = ("store", "images", "encoders", "sae", "scores", "concepts", "steering", "editing", "study", "report", "world")
"""From the ground up: a room may import those before it, and the modules beside the rooms."""
NUMERIC_ROOMS = (
    "sae_ray",
    "sae_ray.concepts.labelling",
    "sae_ray.editing.applying",
    "sae_ray.encoders.loading",
    "sae_ray.sae.training",
    "sae_ray.scores.scoring",
    "sae_ray.steering.interventions",
    "sae_ray.steering.llava",
    "sae_ray.store.activations",
    "sae_ray.store.checkpoints",
    "sae_ray.store.stream",
)
NOT_NEEDED = (
    "PIL",
    "click",
    "duckdb",
    "hypothesis",
    "jaxtyping",
    "jinja2",
    "matplotlib",
    "open_clip",
    "polars",
    "pydantic",
    "ray",
    "sae_lens",
    "torchvision",
    "tqdm",
    "vllm",
)


def modules_of(room: Path) -> dict[str, Path]:
    """Dotted name -> file of every module of a room."""
    found = {}
    for file in sorted(room.rglob("*.py")):
        parts = [*file.relative_to(room.parent).with_suffix("").parts]
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


def imports_of(nodes: list[ast.AST]) -> Iterator[tuple[int, str]]:
    """(level, dotted name) of every import; what `from a import b` binds is named `a.b`, since b may be a module."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from ((0, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.level, ".".join(filter(None, [node.module, alias.name]))) for alias in node.names)


def violations(room: Path) -> list[str]:
    """Imports anywhere in a room, functions included, that do not point downwards."""
    found = []
    for module, file in modules_of(room).items():
        depth = len(module.split(".")) - (file.name != "__init__.py")
        for level, name in imports_of(list(ast.walk(ast.parse(file.read_text(encoding="utf-8"))))):
            upwards = any(name == banned or name.startswith(f"{banned}.") for banned in FORBIDDEN[room.name])
            lent = module == COMMAND_LINE[0] and name.startswith(COMMAND_LINE[1])
            if level > depth or (level == 0 and upwards and not lent):
                found.append(f"{module}: {'.' * level}{name}")
    return found


def that_run(tree: ast.AST, functions: bool) -> Iterator[ast.AST]:
    """All nodes but those for type checkers; those in functions only if wanted, since these run later."""
    for node in ast.iter_child_nodes(tree):
        if not functions and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            for other in node.orelse:
                yield other
                yield from that_run(other, functions)
            continue
        yield node
        yield from that_run(node, functions)


def ancestors(module: str) -> list[str]:
    parts = module.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts) + 1)]


def import_graph(room: Path) -> dict[str, set[str]]:
    """Module -> the modules of the room that must be there before it. Importing `a.b.c` first imports `a.b`."""
    modules = modules_of(room)
    graph: dict[str, set[str]] = {}
    for module, file in modules.items():
        package = module if file.name == "__init__.py" else module.rpartition(".")[0]
        graph[module] = set()
        for level, name in imports_of(list(that_run(ast.parse(file.read_text(encoding="utf-8")), functions=False))):
            base = package.split(".")[: len(package.split(".")) - level + 1] if level else []
            reached = [part for part in ancestors(".".join([*base, name])) if part in modules]
            # A package whose `__init__` is running is there already.
            graph[module].update(part for part in reached if part not in ancestors(module) or part == reached[-1])
        graph[module].discard(module)
    return graph


@pytest.mark.parametrize("room", FORBIDDEN)
def test_imports_point_downwards(room: str):
    assert violations(ROOT / room) == []


def room_of(module: str) -> str | None:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in ROOMS else None


def upward(graph: dict[str, set[str]]) -> list[str]:
    """Imports of the science that go from a room to one above it."""
    return [
        f"{module}: {other}"
        for module, others in graph.items()
        for other in others
        if room_of(other) and (room_of(module) is None or ROOMS.index(room_of(other)) > ROOMS.index(room_of(module)))
    ]


def test_the_rooms_of_the_science_have_an_order():
    graph = import_graph(ROOT / "sae_ray")
    assert "sae_ray.errors" in graph["sae_ray.store.files"]  # the graph is not empty
    assert "sae_ray.sae.config" in graph["sae_ray.study.config"]
    TopologicalSorter(graph).prepare()
    assert upward(graph) == []
    folders = {path.name for path in (ROOT / "sae_ray").iterdir() if (path / "__init__.py").exists()}
    assert folders == set(ROOMS)


@pytest.mark.parametrize(
    ("room", "statement"),
    [
        ("sae_ray", "import ray.data"),
        ("sae_ray", "def f():\n    from jobs.cluster import connect"),
        ("sae_ray", "from sae_ray import serve"),
        ("sae_ray", "from ..jobs import cli"),
        ("jobs", "from sae_ray.jobs.stage import readable"),
        ("jobs", "import jobs.stage"),
        ("jobs", "from .. import serve"),
        ("jobs", "from sae_ray.serve.local import run"),
        ("serve", "from sae_ray.jobs.find import found"),
    ],
)
def test_an_import_that_points_upwards_is_seen(tmp_path: Path, room: str, statement: str):
    (tmp_path / room).mkdir()
    (tmp_path / room / "__init__.py").touch()
    (tmp_path / room / "ok.py").write_text(
        "import pyarrow\nfrom sae_ray.store.files import Folder\nfrom . import other\n"
    )
    assert violations(tmp_path / room) == []
    (tmp_path / room / "bad.py").write_text(statement)
    assert len(violations(tmp_path / room)) == 1


def test_a_circle_of_imports_is_seen(tmp_path: Path):
    room = tmp_path / "sae_ray"
    (room / "sae").mkdir(parents=True)
    (room / "__init__.py").touch()
    (room / "sae" / "__init__.py").write_text("from sae_ray.sae.model import SAE")
    (room / "sae" / "model.py").write_text("def f():\n    import sae_ray.study.config")
    (room / "study.py").write_text(
        "from typing import TYPE_CHECKING\nfrom sae_ray.sae.model import SAE\n"
        "if TYPE_CHECKING:\n    import sae_ray.study.config"
    )
    TopologicalSorter(import_graph(room)).prepare()
    (room / "sae" / "model.py").write_text("class SAE:\n    import sae_ray.study.config")
    with pytest.raises(CycleError):
        TopologicalSorter(import_graph(room)).prepare()


def test_the_numeric_rooms_open_without_what_they_do_not_need():
    code = f"""
import sys

class Refusing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {NOT_NEEDED!r}:
            raise ModuleNotFoundError(f"refused: {{name}}", name=name)

sys.meta_path.insert(0, Refusing())
import {", ".join(NUMERIC_ROOMS)}
sae_ray.monosemanticity, sae_ray.load_sae
assert not set({NOT_NEEDED!r}) & set(sys.modules)
try:
    sae_ray.Study.load("nowhere.toml")
except sae_ray.errors.UsageError:
    print("open")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout == "open\n", done.stderr
