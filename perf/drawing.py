"""What all figures share: 800 px wide in a README, no text below 8 points there, colours of Okabe and Ito."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

WIDTH = 8.0  # inches, shown at 800 px
DPI = 200
# Okabe and Ito (2008), "Color Universal Design"; and a grey
BLACK, ORANGE, SKY, GREEN, BLUE, VERMILLION, PURPLE, GREY = (
    "#000000", "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#CC79A7", "#8C8C8C",
)  # fmt: skip
HATCH = "////"  # of losses, beside their colour
_TICKS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500)
_FINE_TICKS = (0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1, 1.2, 1.4, 1.6, 1.8, 2, 2.5, 3)
_STYLE = {
    "font.size": 8,
    "axes.titlesize": 9,
    "axes.labelsize": 8,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.fontsize": 8,
    "figure.titlesize": 10,
    "figure.labelsize": 8,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.edgecolor": "#666666",
    "grid.color": "#DDDDDD",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "figure.constrained_layout.h_pad": 0.06,
}


def styled(function: Callable) -> Callable:
    @functools.wraps(function)
    def inner(*args, **kwargs):
        with matplotlib.rc_context(_STYLE):
            return function(*args, **kwargs)

    return inner


@styled
def save(figure: Figure, path: Path) -> Path:
    """Write a PNG whose bytes depend on the figure alone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure).print_png(path, metadata={"Software": None})
    return path


def new_figure(title: str, height: float, rows: int = 1, columns: int = 1, **options) -> tuple[Figure, list[Axes]]:
    """An empty figure of WIDTH x height inches with a title, and its panels row by row."""
    figure = Figure(figsize=(WIDTH, height), dpi=DPI, layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False, **options)
    figure.suptitle(title, x=0.01, ha="left", fontweight="bold")
    return figure, list(panels.flat)


def legend(figure: Figure, handles: Sequence, columns: int) -> None:
    figure.legend(handles=handles, loc="outside lower center", ncols=columns)


def plain_log(axis: Axis, ticks: Sequence[float] | None = None) -> None:
    """Plain numbers on a logarithmic axis that is drawn: exponents would be set smaller than anyone can read.

    Args:
        ticks: where, if not at decades; those that would touch the one before them are left out.
    """
    low, high = map(math.log10, axis.get_view_interval())
    if ticks is None:
        axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high - low < 2.5 else (1,)))
    else:
        kept: list[float] = []
        for tick in sorted(ticks):
            if not kept or math.log10(tick / kept[-1]) > 0.09 * (high - low):
                kept.append(tick)
        axis.set_major_locator(FixedLocator(kept))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())


def ratio_axis(axes: Axes, values: Sequence[float], room: float) -> None:
    """A logarithmic axis of speed-ups with 1 in view; ``room``: the part of it on the right that is left to text."""
    low, high = min((*values, 1.0)), max((*values, 1.0))
    span = max(high / low, 1.3)
    axes.set_xscale("log")
    axes.set_xlim(low / span**0.08, high * span ** (0.08 + 1.16 * room / (1 - room)))
    ticks = [t for t in (_FINE_TICKS if span < 3 else _TICKS) if low / 1.05 <= t <= high * 1.05]
    plain_log(axes.xaxis, ticks)
    axes.grid(axis="x")
    axes.axvline(1, color=BLACK, linewidth=1)
    axes.tick_params(axis="y", length=0)


def at_right(axes: Axes) -> dict:
    """Options of a text at x = 1: flush with the right edge of the panel."""
    return {"transform": axes.get_yaxis_transform(), "ha": "right", "va": "center"}


def on_white() -> dict:
    """Options of a text that lines pass behind."""
    return {"bbox": {"facecolor": "white", "edgecolor": "none", "pad": 0.5}}


def lines_of_text(axes: Axes, names: Sequence[str]) -> None:
    """One line for each name, from the top down."""
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)
