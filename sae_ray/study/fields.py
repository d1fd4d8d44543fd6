"""The fields of a study: their names and what their docstrings say. Nothing here imports pydantic."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import textwrap
from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from sae_ray.sae.architectures import ArchitectureSettings
from sae_ray.study.config import Study


def field_help(dotted: str) -> str:
    """The docstring of a study's field, such as `images.train.path`, as one line: the help text of the command line."""
    *parents, name = dotted.split(".")
    return " ".join(docstrings(_table(parents))[name].split())


def known_keys(where: Sequence[str]) -> list[str]:
    """The fields of a table of the study, which is named by the parts of its path; numbers are skipped."""
    return [item.name for item in dataclasses.fields(_table(where))]


def architecture_setting(key: str) -> str | None:
    """The path of an architecture's own setting, from `group_fractions` or, with its name, `jumprelu_bandwidth`."""
    for name, kind in get_type_hints(ArchitectureSettings).items():
        for item in dataclasses.fields(kind):
            if key in (item.name, f"{name}_{item.name}"):
                return f"architectures.{name}.{item.name}"
    return None


def _table(where: Sequence[str]) -> Any:
    kind: Any = Study
    for part in where:
        if part.isdigit():
            continue
        kind = get_type_hints(kind)[part]
        while get_origin(kind) in (Union, UnionType, tuple):
            kind = next(arg for arg in get_args(kind) if arg is not type(None))
    return kind


@cache
def docstrings(kind: type) -> dict[str, str]:
    """What the fields of a dataclass are documented with, those that it inherits included."""
    [body] = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    assert isinstance(body, ast.ClassDef)
    inherited = {
        name: text
        for base in reversed(kind.__bases__)
        if dataclasses.is_dataclass(base)
        for name, text in docstrings(base).items()
    }
    return inherited | {
        field.target.id: text.value.value
        for field, text in pairwise(body.body)
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
        if isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant) and isinstance(text.value.value, str)
    }
