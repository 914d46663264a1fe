"""``python -m perf compare BEFORE AFTER``: what became slower, beyond noise, between two results of one GPU.

Beyond noise: the quantile bands do not overlap, and the medians differ by more than a threshold. What had a time and has
none any more has become worse as well. Exit status 1 if anything has.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from . import summary
from .end_to_end import EndToEnd
from .results import Row, Stamp
from .summary import Results, band, duration, measured, separate

THRESHOLD = 0.03  # of the median: less than this comes and goes with clocks and temperature
_SHOWN = 20  # lines of what is in one of the two only

Key = tuple[str, str]  # case or network, and provider


@dataclass
class Comparison:
    """
    slower, faster: (ratio of the medians, key), the most changed first. lost, gained: times that are in one only.
    same: how many changed within noise. only_before, only_after: rows that the other does not have.
    """

    slower: list[tuple[float, Key]] = field(default_factory=list)
    faster: list[tuple[float, Key]] = field(default_factory=list)
    lost: list[Key] = field(default_factory=list)
    gained: list[Key] = field(default_factory=list)
    same: int = 0
    only_before: list[Key] = field(default_factory=list)
    only_after: list[Key] = field(default_factory=list)


def compare(before: Mapping[Key, Row | EndToEnd], after: Mapping[Key, Row | EndToEnd], threshold: float) -> Comparison:
    """Join two results row by row. threshold: see :data:`THRESHOLD`."""
    found = Comparison(
        only_before=[key for key in before if key not in after], only_after=[key for key in after if key not in before]
    )
    for key in before.keys() & after.keys():
        old, new = before[key], after[key]
        if not measured(old) or not measured(new):
            if measured(old) or measured(new):
                (found.lost if measured(old) else found.gained).append(key)
            continue
        ratio = new.time_us / old.time_us
        if not separate(old, new) or max(ratio, 1 / ratio) <= 1 + threshold:
            found.same += 1
        else:
            (found.slower if ratio > 1 else found.faster).append((ratio, key))
    found.slower.sort(reverse=True)
    found.faster.sort()
    found.lost.sort()
    found.gained.sort()
    return found


def rows(found: Results) -> dict[Key, Row | EndToEnd]:
    """Every row that counts, by what it is of."""
    layers = {(row.case, name): row for outcome in found.outcomes.values() for name, row in outcome.rows.items()}
    networks = {("/".join(of), name): row for of, by_name in found.networks.items() for name, row in by_name.items()}
    return layers | networks


def text(found: Comparison, before: Mapping[Key, Row | EndToEnd], after: Mapping[Key, Row | EndToEnd]) -> str:
    """For people: what became worse comes first."""

    def timed(ratio: float, key: Key) -> str:
        old, new = before[key], after[key]
        return f"{ratio:5.2f}x  {' '.join(key)}: {_times(old)} -> {_times(new)}"

    def statuses(key: Key) -> str:
        return f"{' '.join(key)}: {_outcome(before[key])} -> {_outcome(after[key])}"

    parts = [
        ("no time any more", [statuses(key) for key in found.lost]),
        ("slower", [timed(*item) for item in found.slower]),
        ("faster", [timed(*item) for item in found.faster]),
        ("a time at last", [statuses(key) for key in found.gained]),
        ("only before", _some(found.only_before)),
        ("only after", _some(found.only_after)),
    ]
    lines = [line for title, of in parts if of for line in (f"{title}:", *(f"  {line}" for line in of))]
    counts = f"{len(found.slower)} slower, {len(found.lost)} without a time any more, {len(found.faster)} faster"
    return "\n".join([*lines, f"{counts}, {found.same} within noise"])


def _some(keys: Sequence[Key]) -> list[str]:
    more = [f"and {len(keys) - _SHOWN} more"] if len(keys) > _SHOWN else []
    return [" ".join(key) for key in keys[:_SHOWN]] + more


def _times(row: Row | EndToEnd) -> str:
    low, high = band(row)
    return f"{duration(row.time_us)} ({duration(low)} to {duration(high)})"


def _outcome(row: Row | EndToEnd) -> str:
    return duration(row.time_us) if measured(row) else f"{row.status} ({row.reason})" if row.reason else row.status


def changed(before: collections.Counter[Stamp], after: collections.Counter[Stamp]) -> list[str]:
    """What the two were measured on and with, where it differs: ``torch: 2.11.0 -> 2.13.0``."""
    lines = []
    for name in (f.name for f in dataclasses.fields(Stamp)):
        old, new = (", ".join(sorted({getattr(stamp, name) for stamp in stamps})) for stamps in (before, after))
        if old != new:
            lines.append(f"{name}: {old} -> {new}")
    return lines


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("before", type=Path, help="a result file, or the folder of a GPU")
    parser.add_argument("after", type=Path, help="another")
    parser.add_argument("--threshold", type=float, default=THRESHOLD, metavar="PART",
                        help=f"of the median; smaller changes count as noise (default: {THRESHOLD})")  # fmt: skip
    parser.add_argument("--force", action="store_true", help="compare results of different GPUs")


def main(options: argparse.Namespace) -> int:
    if not options.threshold >= 0:
        raise ValueError(f"--threshold {options.threshold}: expected a part of the median, 0 or more")
    old, new = summary.load(options.before), summary.load(options.after)
    if old.gpus != new.gpus and not options.force:
        raise ValueError(
            f"{options.before} is of {old.gpus}, {options.after} of {new.gpus}: --force compares them nevertheless"
        )
    before, after = rows(old), rows(new)
    if not before.keys() & after.keys():
        raise ValueError(f"{options.before} and {options.after} have no case and provider in common")
    found = compare(before, after, options.threshold)
    print("\n".join([*changed(old.stamps, new.stamps), text(found, before, after)]))
    return 1 if found.slower or found.lost else 0
