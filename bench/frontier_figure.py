"""The figure of docs/frontier.md as SVG: MonoSemanticity against R², one panel per judge, one point per SAE."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any, NamedTuple

from sae_ray.report.plots import COLOURS

WIDTH, HEIGHT, LEFT, TOP, BOTTOM, GAP = 430, 300, 44, 30, 44, 18
PANELS = 2
"""Side by side."""
LEGEND_LINE, LEGEND_COLUMNS = 18, 4
INK, PAPER_INK = "#444", "#000"
GOAL = "goal"
"""In the names of methods that are trained for the score; they are diamonds."""


class Axes(NamedTuple):
    """Where a panel has its values."""

    left: float
    top: float
    x: tuple[float, float]
    y: tuple[float, float]

    def at(self, x: float, y: float) -> tuple[float, float]:
        across = (x - self.x[0]) / (self.x[1] - self.x[0])
        up = (y - self.y[0]) / (self.y[1] - self.y[0])
        return self.left + across * (WIDTH - LEFT - GAP), self.top + (1 - up) * (HEIGHT - TOP - BOTTOM)


def figure(cells: Sequence[Mapping[str, Any]], paper: Sequence[str]) -> str:
    """The figure.

    Args:
        cells: `recipe`, `method`, `r2`, `l0` and `mean`, the mean MS by each judge, of every SAE; and of the raw
            neurons, which have no R², and at whose MS the axes begin.
        paper: the methods that are joined by lines through the means of their seeds.
    """
    shown = [cell for cell in cells if cell["r2"] is not None]
    judges = list(shown[0]["mean"])
    methods = list(dict.fromkeys(cell["method"] for cell in shown))
    others = [method for method in methods if method not in paper]
    looks = dict(zip(paper, ((PAPER_INK, "circle"), (PAPER_INK, "square")), strict=True))
    for shape, of_shape in (("circle", [one for one in others if GOAL not in one]),
                            ("diamond", [one for one in others if GOAL in one])):  # fmt: skip
        looks |= {method: (COLOURS[place % len(COLOURS)], shape) for place, method in enumerate(of_shape)}
    bottom = HEIGHT * -(-len(judges) // PANELS)
    width = WIDTH * PANELS
    height = bottom + LEGEND_LINE * -(-len(methods) // LEGEND_COLUMNS) + 8
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
        f'font-size="11" fill="{INK}">',
        "<title>MonoSemanticity against R² of every SAE, by each judge</title>",
        f'<rect width="{width}" height="{height}" fill="#fff"/>',
    ]
    r2s = [cell["r2"] for cell in shown]
    for place, judge in enumerate(judges):
        most = max(cell["mean"][judge] for cell in shown)
        [raw] = [cell["mean"][judge] for cell in cells if cell["r2"] is None]
        left, top = place % PANELS * WIDTH + LEFT, place // PANELS * HEIGHT + TOP
        axes = Axes(left, top, (min(r2s) - 0.003, max(r2s) + 0.003), (raw, most + 0.08 * (most - raw)))
        lines += frame(axes, f"MS by {judge}")
        for method in others:
            lines += points(axes, shown, judge, method, *looks[method])
        for method in paper:
            lines += joined(axes, shown, judge, method)
            lines += points(axes, shown, judge, method, *looks[method])
    for place, method in enumerate([*paper, *others]):
        x = LEFT + (place % LEGEND_COLUMNS) * (width - LEFT) / LEGEND_COLUMNS
        y = bottom + (place // LEGEND_COLUMNS) * LEGEND_LINE
        lines += [mark(x, y, *looks[method]), f'<text x="{x + 9:.1f}" y="{y + 4}">{method}</text>']
    return "\n".join([*lines, "</svg>"]) + "\n"


def frame(axes: Axes, title: str) -> list[str]:
    (x0, y0), (x1, y1) = axes.at(axes.x[0], axes.y[0]), axes.at(axes.x[1], axes.y[1])
    lines = [
        f'<text x="{x0:.1f}" y="{y1 - 12:.1f}" font-weight="bold">{title}</text>',
        f'<path d="M{x0:.1f} {y1:.1f}V{y0:.1f}H{x1:.1f}" fill="none" stroke="{INK}"/>',
        f'<text x="{(x0 + x1) / 2:.1f}" y="{y0 + 32:.1f}" text-anchor="middle">R²</text>',
    ]
    for value in ticks(*axes.x):
        x, y = axes.at(value, axes.y[0])
        lines.append(f'<text x="{x:.1f}" y="{y + 15:.1f}" text-anchor="middle">{value:g}</text>')
    for value in ticks(*axes.y):
        x, y = axes.at(axes.x[0], value)
        lines.append(f'<path d="M{x:.1f} {y:.1f}H{x1:.1f}" stroke="{INK}" stroke-opacity=".15"/>')
        lines.append(f'<text x="{x - 5:.1f}" y="{y + 4:.1f}" text-anchor="end">{value:g}</text>')
    return lines


def ticks(low: float, high: float) -> list[float]:
    """Round numbers between, about five."""
    step = next(one for one in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5) if (high - low) / one <= 6)
    return [round(number * step, 2) for number in range(round(high / step) + 1) if low <= number * step <= high]


def points(
    axes: Axes, cells: Sequence[Mapping[str, Any]], judge: str, method: str, colour: str, shape: str
) -> list[str]:
    """One for each seed; its text says what it is."""
    return [
        mark(*axes.at(cell["r2"], cell["mean"][judge]), colour, shape, f"{method}, L0 {cell['l0']:.1f}")
        for cell in cells
        if cell["method"] == method
    ]


def joined(axes: Axes, cells: Sequence[Mapping[str, Any]], judge: str, method: str) -> list[str]:
    """A line through the means of the seeds, which stand in a row for every k."""
    seeds: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for cell in cells:
        if cell["method"] == method:
            seeds[cell["recipe"]].append((cell["r2"], cell["mean"][judge]))
    places = sorted((mean(x for x, _ in of), mean(y for _, y in of)) for of in seeds.values())
    path = "L".join("{:.1f} {:.1f}".format(*axes.at(*place)) for place in places)
    dash = "" if method == "BatchTopK" else ' stroke-dasharray="5 3"'
    return [f'<path d="M{path}" fill="none" stroke="{PAPER_INK}" stroke-width="1.6"{dash}/>']


def mark(x: float, y: float, colour: str, shape: str, title: str = "") -> str:
    look = f'fill="{colour}" fill-opacity=".85"'
    told = f"<title>{title}</title>" if title else ""
    if shape == "circle":
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" {look}>{told}</circle>'
    turn = "" if shape == "square" else f' transform="rotate(45 {x:.1f} {y:.1f})"'
    return f'<rect x="{x - 3.5:.1f}" y="{y - 3.5:.1f}" width="7" height="7" {look}{turn}>{told}</rect>'
