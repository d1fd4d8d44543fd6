"""What of a configuration decides a result."""

from __future__ import annotations

import dataclasses
from typing import Any


def changed(config: Any) -> dict[str, Any]:
    """The fields of a frozen dataclass that do not stand at their default, as plain values.

    A hash over these stays when a new setting with a neutral default is added.
    """
    values = dataclasses.asdict(config)
    return {
        item.name: values[item.name]
        for item in dataclasses.fields(config)
        if getattr(config, item.name) != _default(item)
    }


def defaults(kind: Any) -> dict[str, Any]:
    """The fields of a dataclass that have a default, with it."""
    found = {item.name: _default(item) for item in dataclasses.fields(kind)}
    return {name: default for name, default in found.items() if default is not dataclasses.MISSING}


def _default(item: dataclasses.Field) -> Any:
    return item.default_factory() if item.default_factory is not dataclasses.MISSING else item.default
