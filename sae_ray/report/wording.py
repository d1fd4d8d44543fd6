"""Formats numbers and names for the report."""

from __future__ import annotations

import math

from sae_ray.text_table import number as number


def share(value: float | None) -> str:
    return "–" if value is None or math.isnan(value) else f"{value:.1%}"


def count(value: int | None) -> str:
    return "–" if value is None else f"{value:,}"


def duration(seconds: float | None) -> str:
    """`1 h 02 min`, `3 min 05 s`, `4.2 s`."""
    if seconds is None:
        return "–"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min"
