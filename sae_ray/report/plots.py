"""The plots of a study, as SVG. Text and axes take their colour from the page."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from io import StringIO
from textwrap import fill
from typing import TYPE_CHECKING, Any, TypeGuard

import numpy as np

from sae_ray.report.neurons import Neurons
from sae_ray.sae.config import Cell
from sae_ray.sae.history import HISTORY_FILE
from sae_ray.sae.weighing import label_of
from sae_ray.study.config import GridCell
from sae_ray.study.step_plans import TrainPlan
from sae_ray.study.summary import BEST, CellSummary

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from matplotlib.axes import Axes

# Okabe and Ito's colour-blind-safe palette, slightly darkened to work on white and on black.
COLOURS = ("#0b7bb5", "#d55e00", "#009e73", "#b5739d", "#c88a04", "#56b4e9", "#8c6bb1", "#7a7a7a")
INK = "#010203"
"""A placeholder for the page's text colour."""
WIDTH, HEIGHT = 4.6, 3.1
"""Size of a plot in inches of 72 points."""
POINTS = 256
"""Maximum number of points of a curve; more would not be visible at this size."""
CURVES: dict[str, dict[str, Any]] = {
    "loss": {"y_scale": "log", "y_from_0": False},
    "L0": {},
    "dead latents (share)": {},
}
"""What is drawn of training, and how."""


SETTINGS: dict[str, Callable[[GridCell], str]] = {
    "site": lambda grid_cell: grid_cell.site.name,
    "architecture": lambda grid_cell: grid_cell.cell.architecture,
    "expansion": lambda grid_cell: f"×{grid_cell.cell.expansion:g}",
    "amount": lambda grid_cell: (
        f"K\u00a0=\u00a0{grid_cell.cell.k}" if grid_cell.cell.k is not None else f"sparsity {grid_cell.cell.sparsity:g}"
    ),
    "weights": lambda grid_cell: label_of(grid_cell.cell.weights, grid_cell.cell.alpha, Cell.alpha),
    "monosemanticity": lambda grid_cell: f"MS goal {grid_cell.cell.monosemanticity:g}",
}
"""The settings by which the cells of a grid differ, their seeds apart, as text."""


@dataclass(frozen=True)
class Line:
    """One line of a plot."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    dashed: bool = False
    band: tuple[Sequence[float], Sequence[float]] | None = None
    """Lower and upper ends of intervals."""


@dataclass(frozen=True)
class Plot:
    """A line plot with its labels."""

    title: str
    x_label: str
    y_label: str
    lines: list[Line] = field(default_factory=list)
    x_scale: str = "linear"
    """`linear`, `log2` (with ticks at the points) or `log10`."""
    markers: bool = True
    y_from_0: bool = True
    y_scale: str = "linear"
    """`linear` or `log`; the latter needs values above 0, and not `y_from_0`."""
    group: str = ""
    """Of which plots it is one, where a page has many: a site, or a site and a seed."""

    @property
    def height(self) -> float:
        return HEIGHT

    @property
    def description(self) -> str:
        """A text alternative for screen readers."""
        ranges = [f"{line.name} from {min(line.y):.3g} to {max(line.y):.3g}" for line in self.lines]
        return f"{self.title}: {self.y_label} over {self.x_label}. {'; '.join(ranges)}."

    def paint(self, axes: Axes) -> None:
        from matplotlib.ticker import FixedLocator, LogLocator, NullLocator

        coloured = 0
        for line in self.lines:
            look: dict[str, Any] = {"color": INK, "linestyle": "--"}
            if not line.dashed:
                look = {"color": COLOURS[coloured % len(COLOURS)]}
                coloured += 1
            marker = "o" if self.markers and not line.dashed else None
            axes.plot(line.x, line.y, label=line.name, linewidth=1.8, marker=marker, markersize=4.5, **look)
            if line.band is not None:
                axes.fill_between(line.x, *line.band, alpha=0.15, linewidth=0, color=look["color"])
        axes.set(xlabel=self.x_label, ylabel=self.y_label if self.y_label != self.title else "")
        axes.grid(color=INK, alpha=0.12, linewidth=0.7)
        if self.x_scale != "linear":
            axes.set_xscale("log", base=int(self.x_scale.removeprefix("log")))
            seen = sorted({x for line in self.lines for x in line.x})
            major = FixedLocator(seen) if self.x_scale == "log2" else LogLocator(10, subs=(1.0, 2.0, 5.0))
            axes.xaxis.set_major_locator(major)
            axes.xaxis.set_minor_locator(NullLocator())
            axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.set_yscale(self.y_scale)
        if self.y_from_0:
            values = [y for line in self.lines for y in (*line.y, *(line.band[1] if line.band else ()))]
            axes.set_ylim(1.08 * min(0.0, *values), 1.08 * max(values) or 1.0)
        if len(self.lines) > 1:
            axes.legend(frameon=False, fontsize=8, handlelength=1.6)


@dataclass(frozen=True)
class Bars:
    """Bars of shares side by side, such as with and without an edit."""

    title: str
    names: Sequence[str]
    shares: Mapping[str, Sequence[float]]
    """Name of a colour -> one share per name; NaN for a missing share."""

    @property
    def height(self) -> float:
        return 0.8 + 0.4 * len(self.names)

    @property
    def description(self) -> str:
        """A text alternative for screen readers."""
        rows = [
            f"{name}: " + ", ".join(f"{colour} {values[row]:.0%}" for colour, values in self.shares.items())
            for row, name in enumerate(self.names)
        ]
        return f"{self.title}. {'; '.join(rows)}."

    def paint(self, axes: Axes) -> None:
        tall = 0.8 / len(self.shares)
        rows = np.arange(len(self.names))
        for place, (name, values) in enumerate(self.shares.items()):
            colour = COLOURS[0] if place == 0 else COLOURS[-1]
            axes.barh(rows + place * tall, values, height=tall, align="edge", color=colour, label=name)
        axes.set_yticks(rows + 0.4, [fill(name, 30) for name in self.names], fontsize=8)
        axes.set_xlim(0, 1)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        axes.invert_yaxis()
        axes.grid(axis="x", color=INK, alpha=0.12, linewidth=0.7)
        axes.legend(frameon=False, fontsize=8, ncols=len(self.shares), loc="lower left", bbox_to_anchor=(0, 1))


def grid_plots(rows: Sequence[CellSummary]) -> list[Plot]:
    """The effect of width and sparsity: a plot per measure over the expansion factor, a line per family of cells.

    SAEs that differ in their seeds alone are one line through their mean, with a band from the lowest to the highest.
    Where these are more lines than colours, every site has plots of its own.
    """
    measures: list[tuple[str, Callable[[CellSummary], float | None]]] = [
        ("mean MS", lambda row: row.mean_ms),
        (f"mean MS of the {BEST} best", lambda row: row.top_ms),
        ("best MS", lambda row: row.best_ms),
        ("R²", lambda row: row.r2),
        ("L0", lambda row: row.l0),
        ("dead latents", lambda row: row.dead_fraction),
    ]
    plots = []
    for site, saes in _legible(rows, "expansion"):
        for label, measure in measures:
            plot = Plot(_titled(label, site), "expansion factor", label, x_scale="log2", group=site)
            for name, family in _grouped(saes, lambda row, saes=saes: _family(row, saes, "expansion")):
                points = defaultdict(list)
                for row in family:
                    if _known(value := measure(row)):
                        points[row.grid_cell.cell.expansion].append(value)
                _append_seeds(plot, str(name), dict(sorted(points.items())))
            if plot.lines:
                plots.append(plot)
    return plots


def fidelity_plots(rows: Sequence[CellSummary]) -> list[Plot]:
    """R² against L0, with a line per family of cells that differ only in sparsity; means over seeds.

    Where these are more lines than colours, every site has a plot of its own.
    """
    plots = []
    for site, saes in _legible(rows, "amount"):
        title = _titled("R² against L0", site)
        plot = Plot(title, "L0 (active latents per activation)", "R²", x_scale="log10", y_from_0=False, group=site)
        measured = [row for row in saes if _known(row.l0) and _known(row.r2)]
        for name, family in _grouped(measured, lambda row, saes=saes: _family(row, saes, "amount")):
            seeds = [group for _, group in _grouped(family, lambda row: SETTINGS["amount"](row.grid_cell))]
            means = [(np.mean([row.l0 for row in group]), np.mean([row.r2 for row in group])) for group in seeds]
            _append(plot, str(name), sorted((float(l0), float(r2)) for l0, r2 in means))
        if plot.lines:
            plots.append(plot)
    return plots


def curve_plots(cells: Sequence[Neurons], min_images: int) -> list[Plot]:
    """MS of each cell's neurons from best to worst, per expansion and per sparsity, with the raw neurons dashed.

    SAEs of different seeds are on plots of their own, those of the first seed first.
    """
    raw = {cell.score.activations.site.name: cell for cell in cells if cell.score.sae is None}
    saes = [(cell.score.sae.grid_cell, cell) for cell in cells if cell.score.sae is not None]
    plots: list[tuple[int, Plot]] = []
    for varies, fixed in (("expansion", "amount"), ("amount", "expansion")):
        kin = _grouped(saes, lambda pair, fixed=fixed: _kin(pair[0], fixed))
        for (site, architecture, setting, seed), group in kin:
            if varies == "amount" and len(group) < 2:
                continue  # already part of the plots over the expansion factor
            of_seed = _of_seed(seed)
            title = f"{architecture} on {site}, {setting}{of_seed}"
            plot = Plot(title, "neurons, best first (share)", "MS", markers=False, group=site + of_seed)
            for grid_cell, cell in sorted(group, key=lambda pair: _size(pair[0].cell)):
                _append_curve(plot, SETTINGS[varies](grid_cell), cell, min_images)
            if site in raw:
                _append_curve(plot, "raw neurons", raw[site], min_images, dashed=True)
            if plot.lines:
                plots.append((seed, plot))
    return [plot for _, plot in sorted(plots, key=lambda found: found[0])]


def training_plots(trains: Sequence[TrainPlan]) -> list[Plot]:
    """Loss, L0 and dead latents over the steps of training, a line per expansion factor.

    SAEs of different seeds are on plots of their own. Left out are SAEs without a history, as of earlier versions, and
    plots on which nothing changes, such as the L0 of an architecture that fixes it.
    """
    written = [one for one in trains if one.step.folder.exists(HISTORY_FILE)]
    known = [(one, one.step.folder.read_parquet(HISTORY_FILE)) for one in written]
    plots = []
    for (site, architecture, setting, seed), group in _grouped(known, lambda pair: _kin(pair[0].grid_cell, "amount")):
        of_seed = _of_seed(seed)
        about = f"{architecture} on {site}, {setting}{of_seed}"
        curves = [
            Plot(f"{name}: {about}", "step", name, markers=False, group=site + of_seed, **look)
            for name, look in CURVES.items()
        ]
        for train, history in sorted(group, key=lambda pair: _size(pair[0].grid_cell.cell)):
            rows = history.take(_spread(len(history)))
            name = SETTINGS["expansion"](train.grid_cell)
            step, loss, l0, n_dead = (rows[key].to_numpy() for key in ("step", "loss", "l0", "n_dead"))
            for plot, values in zip(curves, (loss, l0, n_dead / train.d_sae), strict=True):
                _append(plot, name, list(zip(step.tolist(), values.tolist(), strict=True)))
        plots += [
            plot for plot in curves if plot.title.startswith("loss") or any(len(set(line.y)) > 1 for line in plot.lines)
        ]
    return plots


def ms_curve(ms: Float[np.ndarray, " neurons"]) -> tuple[Float[np.ndarray, " points"], Float[np.ndarray, " points"]]:
    """Relative rank and score of the neurons from best to worst: at most `POINTS` of them, including both ends."""
    ms = np.sort(ms)[::-1]
    kept = _spread(len(ms))
    return kept / max(1, len(ms) - 1), ms[kept]


def draw(plot: Plot | Bars) -> str:
    """The plot as an `<svg>` element."""
    import matplotlib
    from matplotlib.figure import Figure

    style: Any = {
        "svg.fonttype": "none",
        "svg.hashsalt": plot.description,  # ids must differ between the plots of the page
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(WIDTH, plot.height), layout="constrained")
        plot.paint(figure.add_subplot())
        out = StringIO()
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    return _inline(out.getvalue())


def figure(plot: Plot | Bars) -> dict[str, str]:
    """The plot as the template needs it."""
    return {"title": plot.title, "description": plot.description, "svg": draw(plot)}


def _inline(svg: str) -> str:
    """Only the `<svg>` element: without XML prologue, without styles that would affect the page, without fonts."""
    svg = re.sub(r'<svg [^>]*?viewBox="([^"]*)"[^>]*>', r'<svg viewBox="\1" aria-hidden="true">', svg, count=1)
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r"font-family: [^;]*; ?", "", svg)
    svg = re.sub(r' id="[a-z0-9_.]+_\d+"', "", svg)  # ids of parts, the same in every plot
    return svg.replace("xlink:href", "href").replace(INK, "currentColor")


def _spread(n: int) -> Int[np.ndarray, " points"]:
    """At most `POINTS` of n places, evenly apart, including both ends."""
    return np.unique(np.linspace(0, n - 1, min(POINTS, n)).round().astype(int))


def _kin(grid_cell: GridCell, fixed: str) -> tuple[str, str, str, int]:
    """What SAEs have in common that share a plot of curves."""
    return grid_cell.score_site.name, grid_cell.cell.architecture, SETTINGS[fixed](grid_cell), grid_cell.seed


def _of_seed(seed: int) -> str:
    return f", seed {seed}" if seed else ""


def _append(plot: Plot, name: str, points: Sequence[tuple[Any, Any]]) -> None:
    if points:
        plot.lines.append(Line(name, [x for x, _ in points], [y for _, y in points]))


def _append_seeds(plot: Plot, name: str, points: Mapping[float, Sequence[float]]) -> None:
    """A line through the means of what was measured at each x, and where there are several values their range."""
    if points:
        values = points.values()
        band = ([min(one) for one in values], [max(one) for one in values])
        has_band = any(len(one) > 1 for one in values)
        means = [float(np.mean(one)) for one in values]
        plot.lines.append(Line(name, list(points), means, band=band if has_band else None))


def _append_curve(plot: Plot, name: str, cell: Neurons, min_images: int, dashed: bool = False) -> None:
    ms = cell.columns.ms
    ms = ms[(cell.columns.n_active >= min_images) & ~np.isnan(ms)]
    if len(ms):
        x, y = ms_curve(ms)
        plot.lines.append(Line(name, x.tolist(), y.tolist(), dashed))


def _known(value: float | None) -> TypeGuard[float]:
    return value is not None and not np.isnan(value)


def _size(cell: Cell) -> tuple[float, float]:
    """Sorts by width, then from sparse to dense."""
    return cell.expansion, cell.k if cell.k is not None else -(cell.sparsity or 0.0)


def _legible(rows: Sequence[CellSummary], varies: str) -> list[tuple[str, list[CellSummary]]]:
    """The SAEs that share plots: all of them, or those of each site if their families are more than colours."""
    saes = [row for row in rows if row.grid_cell is not None]
    if len({_family(row, saes, varies) for row in saes}) <= len(COLOURS):
        return [("", saes)]
    return list(_grouped(saes, lambda row: row.site))


def _titled(label: str, site: str) -> str:
    return f"{label} on {site}" if site else label


def _family(row: CellSummary, rows: Sequence[CellSummary], varies: str) -> str:
    """The settings that a family of cells shares, leaving out seeds and those that are the same in all rows."""
    assert row.grid_cell is not None
    saes = [one.grid_cell for one in rows if one.grid_cell is not None]
    others = [of for name, of in SETTINGS.items() if name != varies]
    telling = [of for of in others if len({of(grid_cell) for grid_cell in saes}) > 1]
    return ", ".join(of(row.grid_cell) for of in telling) or row.grid_cell.cell.architecture


def _grouped(items: Sequence[Any], key: Callable[[Any], Hashable]) -> Iterator[tuple[Any, list[Any]]]:
    groups = defaultdict(list)
    for item in items:
        groups[key(item)].append(item)
    yield from groups.items()
