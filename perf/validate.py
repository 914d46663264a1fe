"""``python -m perf validate``: the whole acceptance on a machine with a GPU, in calls of nine minutes.

Each call goes on where the last one stopped, until it says that all is done; without ``FOLDER/validate/steps.csv`` it
begins anew. A step that takes five times its estimate, and two minutes at least, has failed; one that never ends, or ends
the process twice, takes the process with it, and the next call goes on behind it. Exit status: 0 all done and right, 1
something is wrong, 3 nothing is wrong so far and steps are left.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

import torch

from . import machine, results
from .results import MEMORY, OK, UNSUPPORTED
from .validation import BAD, BUDGET, TIMED, UNFINISHED, Check, DeviceLost, Progress, Setting, advance, progress
from .validation.slices import SLICES, chosen

_ELSEWHERE = "unknown"  # of a machine without a GPU, for the folder that would hold its results


def setting(out: Path | None) -> Setting:
    """Of the current GPU, or of a machine that has none."""
    if not torch.cuda.is_available():
        return Setting(out or results.folder(_ELSEWHERE))
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return Setting(out or results.folder(properties.name), properties.name, properties.total_memory)


def run(
    slices: Sequence[ModuleType],
    where: Setting,
    stamp: results.Stamp,
    budget: float,
    clock: Callable[[], float] = time.monotonic,
) -> list[Progress]:
    """Run what is pending and fits into ``budget`` seconds; how far each slice is then."""
    deadline = clock() + budget
    states = []
    for module in slices:
        state = progress(module, where, finished(where, stamp))
        states.append(state)

        def record(row: Check, state: Progress = state) -> None:
            results.append(where.state, [row], stamp)
            print(_line(row, state), flush=True)

        try:
            advance(state, deadline, record, clock, where.state.with_name("begun.json"))
        except DeviceLost as lost:
            print(f"{lost}; the next call goes on", flush=True)
            break
    return states + [progress(module, where, finished(where, stamp)) for module in slices[len(states) :]]


def finished(where: Setting, stamp: results.Stamp) -> list[Check]:
    """The steps of earlier calls with the same versions on the same GPU."""
    if not where.state.exists():
        return []
    return [row for row, other in results.read(where.state, Check) if other == stamp]


def _line(row: Check, state: Progress) -> str:
    head = f"{row.slice} {len(state.rows)}/{len(state.steps)} {row.step}: {row.status}, {row.seconds:.0f} s"
    return head + (f": {row.reason}" if row.reason else f", {row.checks} checks")


def summary(states: Sequence[Progress]) -> str:
    """One line a slice, then what is wrong and what could not run here."""
    lines = [f"{'slice':<24}{'steps':>9}{'checks':>9}{'wrong':>7}{'not here':>10}{'took':>8}{'left, about':>13}"]
    notes = []
    for state in states:
        rows = state.rows.values()
        skipped = state.count(MEMORY, UNSUPPORTED)
        lines.append(
            f"{state.slice.NAME:<24}{f'{len(rows)}/{len(state.steps)}':>9}{sum(row.checks for row in rows):>9}"
            f"{state.count(*BAD):>7}{len(state.steps) if state.reason else skipped:>10}"
            f"{_duration(sum(row.seconds for row in rows)):>8}{_duration(state.seconds_left):>13}"
        )
        notes += [f"{row.slice}, {row.step}: {row.status}: {row.reason}" for row in rows if row.status != OK]
        notes += [f"{state.slice.NAME}, not here: {state.reason}"] if state.reason else []
    return "\n".join([*lines, *notes])


def plan(states: Sequence[Progress], gpu: str | None, budget: float) -> str:
    """What a run would do: the slices, estimated times, and what cannot run here."""
    lines = [f"{'slice':<24}{'steps':>9}{'left, about':>13}  what"]
    lines += [
        f"{state.slice.NAME:<24}{len(state.steps):>9}{_duration(state.seconds_left):>13}  {state.slice.WHAT}"
        for state in states
    ]
    lines += [f"{state.slice.NAME}, not here: {state.reason}" for state in states if state.reason]
    if gpu is None:
        lines.append("nothing of this can run here: torch sees no GPU")
    left = sum(state.seconds_left for state in states)
    lines.append(f"about {_duration(left)} in all, estimated: {math.ceil(left / budget)} calls of {_duration(budget)}")
    return "\n".join(lines)


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"


def arguments(parser: argparse.ArgumentParser) -> None:
    names = ", ".join(module.NAME for module in SLICES)
    parser.add_argument("--slice", metavar="NAME,NAME", help=f"some of {names}; or correctness (default: all)")
    parser.add_argument("--budget", type=float, default=BUDGET, metavar="SECONDS",
                        help=f"of this call (default: {BUDGET:.0f})")  # fmt: skip
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="of the results (default: perf/results/<gpu>)")
    parser.add_argument("--dry-run", action="store_true", help="list slices, times and what cannot run; needs no GPU")


def main(options: argparse.Namespace) -> int:
    slices = chosen(options.slice)
    where = setting(options.out)
    if options.dry_run:
        stamp = where.gpu and _stamp()
        rows = finished(where, stamp) if stamp else []
        print(plan([progress(module, where, rows) for module in slices], where.gpu, options.budget))
        return 0
    if where.gpu is None:
        raise ValueError("torch sees no GPU, so nothing can be validated; --dry-run lists what would be")
    states = run(slices, where, _stamp(), options.budget)
    print(f"\n{summary(states)}")
    left = sum(len(state.pending) for state in states)
    print(f"{left} steps are left: the same command goes on" if left else "all is done")
    if any(state.count(*BAD) for state in states):
        return 1
    return UNFINISHED if left else 0


def _stamp() -> results.Stamp:
    return machine.stamp(torch.device("cuda", torch.cuda.current_device()), TIMED)
