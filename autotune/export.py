"""The table of a sweep: the fastest plan of every problem."""

from __future__ import annotations

from triton_conv3d.problem import Problem
from triton_conv3d.tuning.cache import Entry
from triton_conv3d.tuning.search import OWN
from triton_conv3d.tuning.storage import parse
from triton_conv3d.tuning.table import Table

from .records import Sweep


def table(sweep: Sweep, created: str) -> Table:
    """The fastest plan of every problem of a sweep.

    Raises:
        ValueError: nothing was measured.
    """
    entries = [entry for problem in sweep.problems.values() if (entry := _entry(sweep, problem))]
    if not entries:
        raise ValueError("nothing was measured in this sweep: no plan to export")
    return Table(sweep.environment, sweep.header["policy"], sweep.header["commit"], created, tuple(entries))


def _entry(sweep: Sweep, problem: Problem) -> Entry | None:
    times = sweep.times(problem)
    if not times:
        return None
    engine, config = min(times, key=times.get)
    own = min((seconds * 1e6 for (name, _), seconds in times.items() if name == OWN), default=None)
    return Entry(
        problem.to_dict(), sweep.environment, sweep.header["policy"], engine, parse(config.encode()),
        times[engine, config] * 1e6, own, len(times),
    )  # fmt: skip
