"""bench: the core suite by this package and by torch, as ``python -m perf run`` measures it."""

from __future__ import annotations

import functools

from triton_conv3d import settings

from .. import providers, results, workloads
from ..results import LOST
from ..run import DEFAULT_PROVIDERS, LEFT, measure
from ..workloads import Workload
from . import BAD, TUNING, DeviceLost, Outcome, Setting, Step, summed

NAME = "bench"
WHAT = "the core suite beside torch, every result checked"
WORKERS = 1  # times are taken
SUITE = "core"
_SECONDS = 7.0  # three passes of a small layer by five providers; an estimate
_PER_FLOP = 1e-12  # seconds: each result is compared with one in float64, made anew where it is more than one slab


def steps(setting: Setting) -> list[Step]:
    return [
        Step(workload.id, _seconds(workload), functools.partial(_bench, setting, workload))
        for workload in workloads.suite(SUITE)
    ]


def _seconds(workload: Workload) -> float:
    flops = sum(problem.flops for case in workloads.cases([workload]) for problem in case.problems())
    return _SECONDS + _PER_FLOP * flops


def _bench(setting: Setting, workload: Workload, limit: float) -> Outcome | None:
    path, machine = setting.out / f"{SUITE}.csv", setting.machine
    cases = workloads.cases([workload])
    with settings.configure(autotune=TUNING, cache_dir=setting.cache):
        chosen = providers.get(DEFAULT_PROVIDERS)
        counts = measure(cases, chosen, path, suite=SUITE, machine=machine, budget=limit, show=False)
    if counts[LOST]:
        raise DeviceLost
    if counts[LEFT]:
        return None
    keys = {case.key for case in cases}
    rows = [row for row, stamp in results.read(path) if stamp == machine.stamp and row.case in keys]
    bad = [Outcome(row.status, f"{row.case} by {row.provider}: {row.reason}") for row in rows if row.status in BAD]
    return summed([*bad, Outcome(checks=len(rows))])
