"""How data are written for the pages: `.js` files that pass a name and a value to `report(…)`.

A page opened from disk can load scripts but not fetch files, so the data are scripts.
"""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from jaxtyping import Float, Num

DIGITS = 4
"""Significant digits of numbers that are written as text."""


def write_data(folder: Path, name: str, value: Any) -> None:
    """Writes `<name>.js` under the data folder."""
    path = folder / f"{name}.js"
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    path.write_text(f"report({json.dumps(name)},{text})\n", encoding="utf-8")


def packed(values: np.ndarray, dtype: str) -> str:
    """The values as base64 of their bytes."""
    return base64.b64encode(np.ascontiguousarray(values, dtype=dtype).tobytes()).decode()


def rounded(values: Float[np.ndarray, "*shape"]) -> Any:
    """The values with `DIGITS` significant digits, as nested lists."""
    values = np.asarray(values, dtype=np.float64)
    with np.errstate(divide="ignore"):
        exponent = np.floor(np.log10(np.abs(values)))
    scale = 10.0 ** (DIGITS - 1 - np.where(np.isfinite(exponent), exponent, 0))
    return (np.rint(values * scale) / scale).tolist()


def nullable(values: Num[np.ndarray, "*shape"]) -> Any:
    """As `rounded`, with None where there is no value: not finite, or -1 in whole numbers, which are not rounded."""
    whole = values.dtype.kind == "i"
    missing = values == -1 if whole else ~np.isfinite(values)
    found = np.array(values if whole else rounded(np.where(missing, 0, values)), object)
    found[missing] = None
    return found.tolist()
