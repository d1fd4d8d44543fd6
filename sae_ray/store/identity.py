"""What of a configuration decides a result: the settings that do not stand at their defaults.

A step is named after them. A new setting whose default changes nothing therefore renames no step. Where a default has
changed later, the name still leaves out the earlier one: what was made by it is found where it says so, and is never
taken for what the new default makes.
"""

from __future__ import annotations

import json
from dataclasses import MISSING, Field, fields, is_dataclass
from typing import Any

UNNAMED = "unnamed"
"""Key of a field's metadata: the earlier default."""


def changed(config: Any) -> dict[str, Any]:
    """The fields of a dataclass that differ from their (earlier) defaults, as JSON gives them back.

    Fields without a default always count. Of a nested dataclass only the fields that differ from its own defaults
    stand there.
    """
    found = {}
    for one in fields(config):
        value = getattr(config, one.name)
        if value != _default(one):
            found[one.name] = changed(value) if is_dataclass(value) else json.loads(json.dumps(value))
    return found


def defaults(kind: Any) -> dict[str, Any]:
    """The fields of a dataclass that have a default, with it."""
    found = {one.name: _default(one) for one in fields(kind)}
    return {name: default for name, default in found.items() if default is not MISSING}


def _default(one: Field) -> Any:
    if UNNAMED in one.metadata:
        return one.metadata[UNNAMED]
    return one.default if one.default_factory is MISSING else one.default_factory()
