"""Reading a study: a TOML file, values that override it, and errors that name the field, the value and the remedy."""

from __future__ import annotations

import difflib
import json
import tomllib
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sae_ray.errors import UsageError
from sae_ray.study.config import Study
from sae_ray.study.fields import architecture_setting, field_help, known_keys
from sae_ray.study.shipped import shipped_studies, study_file

if TYPE_CHECKING:
    from pydantic import TypeAdapter


def read_toml(path: str | Path) -> dict[str, Any]:
    """The values of a study file, or of a shipped study by its name.

    Raises UsageError when the file is missing or not TOML.
    """
    try:
        data = study_file(path).read_bytes()
    except OSError as error:
        problem = (
            f"study file {path} cannot be read ({error.strerror}); give the path of a TOML file, or the name of a "
            f"study that sae-ray ships: {', '.join(shipped_studies())}"
        )
        raise UsageError(problem) from error
    try:
        return tomllib.loads(data.decode())
    except ValueError as error:
        raise UsageError(f"study file {path} is not TOML: {error}") from error


def validated(values: Mapping[str, Any], overrides: Mapping[str, Any]) -> Study:
    """A study from nested dictionaries.

    Args:
        overrides: dotted field -> value.

    Raises:
        UsageError: a key is unknown or a value is invalid; all such problems are listed, one per line.
    """
    from pydantic import ValidationError

    merged = json.loads(json.dumps(values, default=str))  # a copy of plain values: TOML also knows dates
    for key, value in overrides.items():
        _override(merged, key, value)
    try:
        return _adapter().validate_python(merged)
    except ValidationError as error:
        raise UsageError("\n".join(_explain(problem) for problem in error.errors())) from None


@cache
def _adapter() -> TypeAdapter[Study]:
    from pydantic import TypeAdapter

    return TypeAdapter(Study)


def _override(values: dict[str, Any], dotted: str, value: Any) -> None:
    *parents, last = dotted.split(".")
    below: Any = values
    for part in parents:
        below = _descend(below, part, dotted)
    for table in below if isinstance(below, list) else [below]:
        table[last] = value


def _descend(values: Any, part: str, dotted: str) -> Any:
    """The table `part` of `values`, created if missing; for `grid` a list of tables."""
    below = values.get(part) if isinstance(values, dict) else 0
    if below is None:
        below = values[part] = [{}] if part == "grid" else {}
    tables = below if isinstance(below, list) else [below]
    if not all(isinstance(table, dict) for table in tables):
        remedy = "; write grid.<field>, which sets the field in every [[grid]]" if isinstance(values, list) else ""
        raise UsageError(f"{dotted}: {part} is not a table of the study file{remedy}")
    return below


def _explain(problem: Any) -> str:
    where = [str(part) for part in problem["loc"]]
    if problem["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        known = known_keys(where[:-1])
        near = difflib.get_close_matches(where[-1], known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"
        if own := architecture_setting(where[-1]):
            hint = f"write {own}"
        return f"{'.'.join(where)}: unknown key; {hint}"
    if problem["type"] == "missing":
        meaning = field_help(".".join(part for part in where if not part.isdigit()))
        return f"{'.'.join(where)}: missing; add it: {meaning}"
    message = problem["msg"].replace("a valid tuple", "a list")  # what TOML calls it
    return f"{'.'.join(where)} = {problem['input']!r}: {message}"
