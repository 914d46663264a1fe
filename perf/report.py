"""``python -m perf report``: what result files say, as one Markdown file with pictures beside it.

It holds no figure that is not in the files or computed from two that are.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import os
import statistics
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from . import plots, summary
from .end_to_end import EndToEnd
from .markdown import cell, table
from .plots import NETWORKS, Picture
from .results import UNSUPPORTED, Row
from .summary import (
    LEVEL,
    LOSS,
    OURS,
    PASSES,
    TORCH,
    WIN,
    Outcome,
    Results,
    band,
    duration,
    fastest,
    geometric_mean,
    measured,
    verdict,
)

FILE = "report.md"
_LOSSES = 30  # that are named first; every one stands in the tables
_REASONS = 60  # kinds of failures that are listed
_ABOUT = (
    "Speed-up of a case: the median time of the fastest torch provider over that of ours. Win, loss: the quantile bands "
    "(0.2 to 0.8) of the two do not overlap; level: they do. By torch's own: ours chose torch's convolution."
)


def write(found: Results, folder: Path) -> Path:
    """The report and its pictures; returns the path of the report.

    Raises:
        ValueError: there is no matplotlib.
        OSError: something cannot be written.
    """
    pictures = plots.draw(found, folder / plots.PICTURES)
    path = folder / FILE
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(markdown(found, pictures, folder), encoding="utf-8")
    return path


def markdown(found: Results, pictures: Sequence[Picture], folder: Path) -> str:
    """The report's text; pictures are embedded relative to ``folder``."""

    def shown(group: str) -> list[str]:
        return [f"![{p.caption}]({os.path.relpath(p.path, folder)})" for p in pictures if p.group == group]

    files = ", ".join(f"{name} ({count} rows)" for name, count in found.files.items())
    parts = [f"# {found.gpus}", f"Written by `python -m perf report` from {files}, and from nothing else."]
    parts += [f"Not read: {cell(reason)}" for reason in found.unread.values()]
    parts += ["## Measured on", _stamps(found)]
    if not any(map(measured, found.rows)):
        parts.append("**No row has the status ok: nothing was measured.**")
    if found.layers:
        parts += ["## Summary", _ABOUT, *_absent(found.layers), _totals(found.layers), *shown("")]
        parts += ["### Losses", *_losses(found.layers)]
    if found.outcomes:
        parts += ["## Providers", _providers(found.outcomes.values()), *_failures(found.outcomes.values())]
    if found.networks:
        parts += [f"## {NETWORKS.capitalize()}", *shown(NETWORKS), _networks(found)]
    for group, outcomes in (summary.by_group(found.layers) | summary.by_group(found.sweeps)).items():
        models = {outcome.any.model for outcome in outcomes}
        parts += [f"## {group}", *(models if len(models) == 1 else ()), *shown(group), _layers(outcomes)]
    return "\n\n".join(parts) + "\n"


def _stamps(found: Results) -> str:
    header = "GPU | arch | driver | torch | CUDA | cuDNN | Triton | commit | policy | rows:"
    return table(header, ((*dataclasses.astuple(stamp), count) for stamp, count in found.stamps.items()))


def _absent(outcomes: Sequence[Outcome]) -> list[str]:
    """Torch's providers that no case was run by: the fastest may be among them."""
    absent = [name for name in TORCH if not any(name in outcome.rows for outcome in outcomes)]
    return [f"**Not run, and so not among the peers: {', '.join(absent)}.**"] if absent else []


def _totals(outcomes: Sequence[Outcome]) -> str:
    """A line for each pass, and one for all."""
    header = "pass | cases: | geometric mean: | wins: | level: | losses: | worst: | ours has no time: | by torch's own:"
    by_pass = {name: [o for o in outcomes if o.any.pass_ == name] for name in PASSES}
    lines = [(name, *_total(of)) for name, of in by_pass.items() if of]
    return table(header, [*lines, ("all", *_total(outcomes))] if len(lines) > 1 else lines)


def _total(outcomes: Sequence[Outcome]) -> Iterator[object]:
    speedups = [outcome.speedup for outcome in outcomes if outcome.speedup]
    verdicts = [outcome.verdict for outcome in outcomes]
    yield from (len(outcomes), _times(geometric_mean(speedups)), *map(verdicts.count, (WIN, LEVEL, LOSS)))
    yield from (_times(min(speedups, default=None)), sum(bool(o.missing_ours) for o in outcomes))
    yield sum(o.ours is not None and _engine(o.ours) == "aten" for o in outcomes)


def _losses(outcomes: Sequence[Outcome]) -> list[str]:
    """Where torch is faster, the worst first."""
    losses = sorted((o for o in outcomes if o.verdict == LOSS), key=lambda outcome: outcome.speedup)
    if not losses:
        return ["None among the cases that have a speed-up."]
    header = "speed-up: | layer | pass | ours: | by | fastest torch | its time:"
    lines = (
        (_times(o.speedup), o.workload, o.any.pass_, duration(o.ours.time_us), _engine(o.ours), o.torch.provider,
         duration(o.torch.time_us))
        for o in losses[:_LOSSES]
    )  # fmt: skip
    more = [f"And {len(losses) - _LOSSES} more, in the tables below."] if len(losses) > _LOSSES else []
    return [table(header, lines), *more]


def _providers(outcomes: Iterable[Outcome]) -> str:
    rows: dict[str, list[Row]] = {}
    over: dict[str, list[float]] = {}  # speed-ups of ours
    for outcome in outcomes:
        for name, row in outcome.rows.items():
            rows.setdefault(name, []).append(row)
            if measured(row) and outcome.ours:
                over.setdefault(name, []).append(row.time_us / outcome.ours.time_us)
    header = "provider | measured: | no time | speed-up of ours over it (geometric mean): | host, median:"
    return table(header, ((name, *_provider(of, over.get(name, []))) for name, of in rows.items()))


def _provider(rows: Sequence[Row], over: Sequence[float]) -> Iterator[object]:
    without = collections.Counter(row.status for row in rows if not measured(row))
    host = [row.host_us for row in rows if measured(row) and row.host_us is not None]
    yield from (sum(map(measured, rows)), ", ".join(f"{n} {status}" for status, n in without.items()) or None)
    yield from (_times(geometric_mean(over)), duration(statistics.median(host)) if host else None)


def _failures(outcomes: Iterable[Outcome]) -> list[str]:
    """Rows without a time, by provider and reason, ours first, what no provider is made for last."""
    found: dict[tuple[str, str, str], list[Row]] = {}
    for outcome in outcomes:
        for row in outcome.rows.values():
            if not measured(row):
                found.setdefault((row.provider, row.status, row.reason), []).append(row)
    if not found:
        return []
    ordered = sorted(found.items(), key=lambda item: (item[0][1] == UNSUPPORTED, item[0][0] != OURS, -len(item[1])))
    header = "provider | status | cases: | reason | first"
    lines = ((*what[:2], len(rows), what[2], rows[0].case) for what, rows in ordered[:_REASONS])
    more = [f"And {len(ordered) - _REASONS} more reasons, in the files."] if len(ordered) > _REASONS else []
    return ["### No time", table(header, lines), *more]


def _networks(found: Results) -> str:
    header = (
        "network | mode | shape | type | provider | step: | band | peak: | over fastest torch: | deviation: | status"
    )
    lines = []
    for rows in found.networks.values():
        peer = fastest(rows, TORCH)
        for row in rows.values():
            timed = measured(row)
            ours = timed and peer and row.provider not in TORCH
            lines.append(
                (row.title, row.mode, row.shape, row.dtype, row.provider, duration(row.time_us) if timed else None,
                 _band(row) if timed else None, None if row.peak_bytes is None else f"{row.peak_bytes / 2**30:.2f} GiB",
                 _judged(row, peer) if ours else None, None if row.deviation is None else f"{row.deviation:.2g}",
                 row.status if not row.reason else f"{row.status}: {row.reason}")
            )  # fmt: skip
    return table(header, lines)


def _layers(outcomes: Sequence[Outcome]) -> str:
    header = "layer | shape | pass | ours: | band | TFLOP/s: | roofline: | by | fastest torch | its time: | speed-up:"
    lines = []
    for name, cells in summary.by_layer(outcomes).items():
        label = (name, next(iter(cells.values())).any.shape)
        for pass_ in filter(cells.__contains__, PASSES):
            lines.append((*label, pass_, *_layer(cells[pass_])))
            label = ("", "")
    return table(header, lines)


def _layer(outcome: Outcome) -> Iterator[object]:
    ours, theirs = outcome.ours, outcome.torch
    if ours:
        yield from (duration(ours.time_us), _band(ours), _number(ours.tflops), _percent(ours.roofline), _engine(ours))
    else:
        yield from (outcome.missing_ours or "not run", None, None, None, None)
    yield from (theirs.provider, duration(theirs.time_us)) if theirs else (None, None)
    yield _judged(ours, theirs) if ours and theirs else None


def _judged(ours: Row | EndToEnd, theirs: Row | EndToEnd) -> str:
    text, found = _times(theirs.time_us / ours.time_us), verdict(ours, theirs)
    return {WIN: text, LEVEL: f"{text} level", LOSS: f"**{text} loss**"}[found]


def _engine(row: Row) -> str:
    """The engines of a plan, or of the three of a module: ``implicit_gemm``."""
    return ", ".join(dict.fromkeys(plan.split(" ")[0] for plan in row.plan.split("; ")))


def _band(row: Row | EndToEnd) -> str:
    low, high = band(row)
    return f"{duration(low)} to {duration(high)}"


def _times(ratio: float | None) -> str | None:
    return None if ratio is None else f"{ratio:.2f}x"


def _percent(part: float | None) -> str | None:
    return None if part is None else f"{part:.0%}"


def _number(value: float | None) -> str | None:
    return None if value is None else f"{value:.3g}"


arguments = plots.arguments


def main(options: argparse.Namespace) -> int:
    for source, folder in plots.sources(options):
        print(write(summary.load(source), folder))
    return 0
