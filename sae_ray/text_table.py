"""Text tables for the terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence


def table_lines(rows: Sequence[Sequence[str]], align: str) -> list[str]:
    """The rows as lines, with columns aligned and two spaces apart.

    Args:
        rows: the texts of the cells, the header first if there is one.
        align: `<` (left) or `>` (right) for each column.

    Raises:
        ValueError: a row does not have one cell per column.
    """
    if any(len(row) != len(align) for row in rows):
        raise ValueError(f"align is {align!r}; every row needs {len(align)} cells")
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(f"{text:{side}{width}}" for text, side, width in zip(row, align, widths, strict=True)).rstrip()
        for row in rows
    ]


def number(value: float | None, digits: int) -> str:
    """A dash where there is none."""
    return "–" if value is None or math.isnan(value) else f"{value:.{digits}f}"
