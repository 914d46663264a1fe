"""Figures of results. Every function draws what it is given and nothing else; shape stands beside colour."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter

from .drawing import (
    BLACK,
    BLUE,
    GREEN,
    GREY,
    HATCH,
    ORANGE,
    PURPLE,
    SKY,
    VERMILLION,
    at_right,
    legend,
    lines_of_text,
    new_figure,
    on_white,
    plain_log,
    ratio_axis,
    styled,
)
from .drawing import save as save
from .end_to_end import EndToEnd
from .results import Row
from .summary import (
    LEVEL,
    LOSS,
    OURS,
    OURS_COMPILE,
    PASSES,
    TORCH,
    WIN,
    Outcome,
    band,
    by_group,
    by_layer,
    duration,
    fastest,
    geometric_mean,
    measured,
    verdict,
)

_VERDICTS = {WIN: (BLUE, "o"), LEVEL: (GREY, "s"), LOSS: (VERMILLION, "X")}
_VERDICT_NAMES = {
    WIN: "win: faster than the fastest torch provider",
    LEVEL: "level: quantile bands overlap",
    LOSS: "loss: slower",
}
_PASS_MARKS = {"forward": (BLUE, "o"), "dgrad": (ORANGE, "s"), "wgrad": (GREEN, "^"), "train": (PURPLE, "D")}
_LINES = {  # colour, line, marker: no two providers look alike, in grey neither
    OURS: (BLUE, "-", "o"),
    OURS_COMPILE: (SKY, "-.", "*"),
    "torch": (VERMILLION, "--", "s"),
    "torch_cl": (ORANGE, "--", "^"),
    "torch_bench": (VERMILLION, ":", "D"),
    "torch_cl_bench": (ORANGE, ":", "v"),
    "compile": (PURPLE, "-.", "P"),
}
_MORE_LINES = ((GREEN, "-", "<"), (SKY, "-", ">"), (BLACK, "-.", "h"), (GREY, "-", "d"))
_CUT = 3.0  # times the fastest torch provider, where bars of step times end


def _passes(outcomes: Sequence[Outcome]) -> list[str]:
    present = {outcome.any.pass_ for outcome in outcomes}
    return [name for name in PASSES if name in present]


@styled
def speedup_bars(outcomes: Sequence[Outcome], title: str) -> Figure:
    """Layers of one model: a bar for each pass, from 1 to the speed-up of ours over the fastest torch provider."""
    passes, layers = _passes(outcomes), by_layer(outcomes)
    figure, panels = new_figure(title, 1.15 + 0.17 * len(layers), columns=len(passes), sharey=True)
    for axes, pass_ in zip(panels, passes, strict=True):
        axes.set_title(pass_)
        ratio_axis(axes, [o.speedup for o in outcomes if o.speedup], room=0.08 * len(passes))
        for y, cells in enumerate(layers.values()):
            _bar(axes, y, cells.get(pass_))
    lines_of_text(panels[0], list(layers))
    handles = [
        Patch(facecolor=_VERDICTS[v][0], hatch=HATCH if v == LOSS else None, edgecolor="white", label=name)
        for v, name in _VERDICT_NAMES.items()
    ]
    legend(figure, handles, 3)
    return figure


def _bar(axes: Axes, y: int, outcome: Outcome | None) -> None:
    """A bar with its value; or in words why there is none."""
    if outcome is None or outcome.speedup is None:
        ours = outcome and outcome.missing_ours
        text = f"ours: {ours}" if ours else "not run" if outcome is None else "no torch time"
        axes.text(1, y, text, color=VERMILLION if ours else GREY, fontstyle="italic", **at_right(axes), **on_white())
        return
    speedup, loss, colour = outcome.speedup, outcome.verdict == LOSS, _VERDICTS[outcome.verdict][0]
    hatch = HATCH if loss else None
    axes.barh(y, speedup - 1, left=1, height=0.72, color=colour, hatch=hatch, edgecolor="white", linewidth=0)
    axes.text(
        max(speedup, 1), y, f" {speedup:.2f}x", va="center", color=colour if loss else BLACK,
        fontweight="bold" if loss else "normal", **on_white(),
    )  # fmt: skip


@styled
def speedup_overview(outcomes: Sequence[Outcome], title: str) -> Figure:
    """A line for each model, a panel for each pass, a mark for each layer; what we could not compute is counted."""
    passes, groups = _passes(outcomes), by_group(outcomes)
    failing = any(outcome.missing_ours for outcome in outcomes)
    figure, panels = new_figure(title, 1.2 + 0.27 * len(groups), columns=len(passes), sharey=True)
    for axes, pass_ in zip(panels, passes, strict=True):
        axes.set_title(pass_)
        ratio_axis(axes, [o.speedup for o in outcomes if o.speedup], room=0.22 * failing)
        for y, members in enumerate(groups.values()):
            _marks(axes, y, [outcome for outcome in members if outcome.any.pass_ == pass_])
    lines_of_text(panels[0], list(groups))
    handles = [
        Line2D([], [], color=colour, marker=marker, linestyle="", label=_VERDICT_NAMES[kind])
        for kind, (colour, marker) in _VERDICTS.items()
    ]
    mean = Line2D([], [], color=BLACK, marker="|", linestyle="", ms=9, mew=1.6, label="geometric mean")
    legend(figure, [*handles, mean], 4)
    return figure


def _marks(axes: Axes, y: int, outcomes: Sequence[Outcome]) -> None:
    for kind, (colour, marker) in _VERDICTS.items():
        values = [o.speedup for o in outcomes if o.verdict == kind]
        axes.scatter(
            values, [y] * len(values), color=colour, marker=marker, s=28, alpha=0.85, linewidth=0.4, edgecolor="white",
            zorder=4 if kind == LOSS else 3,
        )  # fmt: skip
    mean = geometric_mean(o.speedup for o in outcomes if o.speedup)
    if mean:
        axes.plot([mean] * 2, [y - 0.38, y + 0.38], color=BLACK, linewidth=1.6, zorder=2)
    failed = sum(bool(o.missing_ours) for o in outcomes)
    if failed:
        axes.text(1, y, f"{failed} failed", color=VERMILLION, fontstyle="italic", **at_right(axes))


@styled
def sweep_lines(outcomes: Sequence[Outcome], sizes: Mapping[str, int], name: str, title: str) -> Figure:
    """TFLOP/s of every provider over one size, a panel for each pass: medians, with bands between the quantiles.

    Args:
        sizes: the varied size of each workload. name: what that size is.
    """
    passes = _passes(outcomes)
    looks = _looks({provider for o in outcomes for provider in o.rows if ":" not in provider})  # not each tile of one
    figure, panels = new_figure(title, 3.7, columns=len(passes), sharey=True)
    for axes, pass_ in zip(panels, passes, strict=True):
        chosen = sorted((o for o in outcomes if o.any.pass_ == pass_), key=lambda o: sizes[o.workload])
        xs = [sizes[o.workload] for o in chosen]
        for provider, look in looks.items():
            _sweep_line(axes, xs, [o.rows.get(provider) for o in chosen], *look)
        roofs = [o.any.flops / o.any.roofline_us / 1e6 if o.any.roofline_us else math.nan for o in chosen]
        axes.plot(xs, roofs, color=BLACK, linewidth=0.8)
        axes.set(title=pass_, xscale="log", yscale="log", xlabel=name)
        plain_log(axes.xaxis, xs)
        plain_log(axes.yaxis)
        axes.grid()
    panels[0].set_ylabel("TFLOP/s")
    handles = [
        Line2D([], [], color=colour, linestyle=line, marker=marker, ms=4, label=provider)
        for provider, (colour, line, marker) in looks.items()
    ]
    legend(figure, [*handles, Line2D([], [], color=BLACK, linewidth=0.8, label="measured ceilings")], 5)
    return figure


def _looks(providers: set[str]) -> dict[str, tuple[str, str, str]]:
    """Colour, line and marker of each provider: the well-known ones in their order, then the others."""
    others = sorted(providers - set(_LINES))
    return {p: look for p, look in _LINES.items() if p in providers} | dict(zip(others, itertools.cycle(_MORE_LINES)))


def _sweep_line(axes: Axes, xs: Sequence[int], rows: Sequence[Row | None], colour: str, line: str, marker: str) -> None:
    """One provider: broken where it has no time, with a cross at the foot of the panel where it failed."""
    rates = [
        [row.flops / us / 1e6 for us in (row.time_us, *band(row))] if measured(row) else [math.nan] * 3 for row in rows
    ]
    median, high, low = zip(*rates, strict=True)
    axes.fill_between(xs, low, high, color=colour, alpha=0.2, linewidth=0)
    axes.plot(xs, median, color=colour, linestyle=line, marker=marker, ms=4, linewidth=1.4)
    failed = [x for x, row in zip(xs, rows, strict=True) if row is not None and not measured(row)]
    foot = axes.get_xaxis_transform()
    axes.plot(failed, [0.03] * len(failed), "x", color=colour, ms=6, mew=1.5, transform=foot)


@styled
def roofline(outcomes: Sequence[Outcome], title: str) -> Figure:
    """TFLOP/s over flops per byte, of ours and of the fastest torch provider, under the ceilings measured with them."""
    drawn = [o for o in outcomes if o.any.matmul_tflops and o.any.copy_gbps and o.any.min_bytes]
    kinds = sorted({(o.any.dtype, o.any.precision) for o in drawn})
    columns = min(2, len(kinds))
    lines = math.ceil(len(kinds) / columns)
    figure, panels = new_figure(title, 0.8 + 2.9 * lines, lines, columns)
    for axes in panels[len(kinds) :]:
        axes.set_axis_off()
    for axes, kind in zip(panels, kinds, strict=False):
        chosen = [o for o in drawn if (o.any.dtype, o.any.precision) == kind]
        _ceilings(axes, chosen, " ".join(kind))
        for outcome in chosen:
            x = outcome.any.flops / outcome.any.min_bytes
            if outcome.torch:
                axes.plot(x, _rate(outcome.torch), "o", color=GREY, ms=4, mfc="none", mew=0.8, zorder=2)
            if outcome.ours:
                colour, marker = _PASS_MARKS[outcome.any.pass_]
                axes.plot(x, _rate(outcome.ours), marker, color=colour, ms=5, mec="white", mew=0.4, zorder=3)
        plain_log(axes.xaxis)
        plain_log(axes.yaxis)
    marks = [
        Line2D([], [], color=colour, marker=marker, linestyle="", ms=5, label=f"ours, {pass_}")
        for pass_, (colour, marker) in _PASS_MARKS.items()
        if pass_ in _passes(drawn)
    ]
    peer = Line2D([], [], color=GREY, mfc="none", marker="o", linestyle="", ms=4, label="fastest torch provider")
    legend(figure, [*marks, peer], 5)
    return figure


def _rate(row: Row) -> float:
    """TFLOP/s."""
    return row.flops / row.time_us / 1e6


def _ceilings(axes: Axes, outcomes: Sequence[Outcome], name: str) -> None:
    product = statistics.median(o.any.matmul_tflops for o in outcomes)
    copy = statistics.median(o.any.copy_gbps for o in outcomes)
    ridge = product * 1e3 / copy
    intensities = [ridge, *(o.any.flops / o.any.min_bytes for o in outcomes)]
    xs = (min(intensities) / 1.5, ridge, max(intensities) * 1.5)
    axes.plot(xs, [min(product, x * copy / 1e3) for x in xs], color=BLACK, linewidth=1.2)
    axes.set(xscale="log", yscale="log", xlabel="FLOP per byte that has to be moved", ylabel="TFLOP/s")
    axes.set_title(f"{name}: product {product:.0f} TFLOP/s, copy {copy:.0f} GB/s")
    axes.grid()


@styled
def step_times(networks: Mapping[tuple[str, str, str], Mapping[str, EndToEnd]], title: str) -> Figure:
    """Time of a step of whole networks, a panel for each mode: bars relative to the fastest torch provider.

    Args:
        networks: by (network, mode, shape) and provider.
    """
    modes = sorted({mode for _, mode, _ in networks}, reverse=True)
    providers = _looks({provider for rows in networks.values() for provider in rows})
    names = list(dict.fromkeys(name for name, _, _ in networks))
    lines = [line for name in names for line in (name, *providers)]
    figure, panels = new_figure(title, 1.2 + 0.165 * len(lines), columns=len(modes), sharey=True)
    for axes, mode in zip(panels, modes, strict=True):
        axes.set(title=mode, xlabel="step time over fastest torch provider")
        axes.set_xlim(0, _CUT * 1.35)
        axes.set_xticks(range(math.ceil(_CUT) + 1))
        axes.grid(axis="x")
        axes.axvline(1, color=BLACK, linewidth=1)
        axes.tick_params(axis="y", length=0)
        for (name, of, _), rows in networks.items():
            if of == mode:
                first = names.index(name) * (1 + len(providers)) + 1
                for y, provider in enumerate(providers, first):
                    _step_time(axes, y, rows.get(provider), fastest(rows, TORCH))
    lines_of_text(panels[0], lines)
    for label, line in zip(panels[0].get_yticklabels(), lines, strict=True):
        label.set_fontweight("bold" if line in names else "normal")
    looks = (("ours", BLUE, None), ("ours: a loss", VERMILLION, HATCH), ("torch", GREY, None))
    legend(figure, [Patch(facecolor=c, hatch=hatch, edgecolor="white", label=name) for name, c, hatch in looks], 3)
    return figure


def _step_time(axes: Axes, y: int, row: EndToEnd | None, peer: EndToEnd | None) -> None:
    """A bar with its time, cut where it would squeeze the others; or why there is none."""
    ours = row is not None and row.provider not in TORCH
    if not measured(row) or peer is None:
        text = "not run" if row is None else f"{row.status}" if not measured(row) else duration(row.time_us)
        axes.text(0.04, y, text, va="center", color=VERMILLION if ours else GREY, fontstyle="italic", **on_white())
        return
    loss = ours and verdict(row, peer) == LOSS
    colour, hatch = (VERMILLION, HATCH) if loss else (BLUE if ours else GREY, None)
    ratio = row.time_us / peer.time_us
    axes.barh(y, min(ratio, _CUT), height=0.72, color=colour, hatch=hatch, edgecolor="white", linewidth=0)
    text = f" {duration(row.time_us)}" + (f", {ratio:.1f}x: cut" if ratio > _CUT else "")
    look = {"color": VERMILLION, "fontweight": "bold"} if loss else {"color": BLACK}
    axes.text(min(ratio, _CUT), y, text, va="center", **look, **on_white())


@styled
def heat_map(tiles: Mapping[str, Mapping[tuple[int, int], tuple[float, int]]], title: str, caption: str) -> Figure:
    """Tiles of the result, a panel for each pass.

    Args:
        tiles: by pass and (block_m, block_n): a share from 0 to 1, shown as colour and number; and a count.
        caption: what share and count mean.
    """
    figure, panels = new_figure(title, 3.4, columns=len(tiles))
    for axes, (pass_, cells) in zip(panels, tiles.items(), strict=True):
        rows, columns = (sorted({tile[side] for tile in cells}) for side in (0, 1))
        values = [[cells.get((m, n), (math.nan,))[0] for n in columns] for m in rows]
        image = axes.imshow(values, cmap="cividis", vmin=0, vmax=1, origin="lower", aspect="auto")
        for (m, n), (share, count) in cells.items():
            axes.text(
                columns.index(n), rows.index(m), f"{share:.0%}\n({count})", ha="center", va="center",
                color=BLACK if share > 0.55 else "white",
            )  # fmt: skip
        axes.set_xticks(range(len(columns)), columns)
        axes.set_yticks(range(len(rows)), rows)
        axes.set(title=pass_, xlabel="block_n", ylabel="block_m")
    figure.colorbar(image, ax=panels, format=FuncFormatter(lambda value, _: f"{value:.0%}"))
    figure.supxlabel(caption, x=0.01, ha="left")
    return figure
