"""``python -m perf run``: every case by every provider, checked, then timed in turns, into one result file."""

from __future__ import annotations

import argparse
import collections
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import torch

from triton_conv3d import settings
from triton_conv3d.problem import PASSES
from triton_conv3d.tuning.progress import progress
from triton_conv3d.workload import DTYPES, LAYOUTS, PRECISIONS

from . import machine as machines
from . import providers as providers_
from . import results, workloads
from .machine import Machine
from .measurement import Measurement
from .providers import Provider
from .results import FAILED, LOST, OK, UNSUPPORTED, WRONG, Row
from .timing import policy
from .workloads import TRAIN, Case

LEFT = "left"  # cases that are still to be measured, beside the statuses that :func:`measure` counts
BAD = (WRONG, FAILED)
DEFAULT_PROVIDERS = ("ours", "torch", "torch_cl", "torch_bench", "torch_cl_bench")


def measure(
    cases: Sequence[Case],
    providers: Sequence[Provider],
    path: Path,
    *,
    suite: str,
    machine: Machine,
    budget: float | None = None,
    show: bool = True,
) -> collections.Counter[str]:
    """Measure cases and add a row for each of them and each provider.

    What ``path`` holds already, by the same stamp, is not measured again. Tuning follows the settings in force.

    Args:
        suite: its name, for the rows.
        budget: seconds; no case is begun that would not be done within them if it took as long as the longest so far.
        show: a line for each row without a time, and a progress bar where stderr is a terminal.

    Returns:
        How many rows of each status were added, and under :data:`LEFT` how many cases are still to be measured: those
        beyond the budget, or behind an illegal memory access, which is counted under :data:`.results.LOST`.

    Raises:
        results.Refused: ``path`` is a result file of another schema.
        OSError: it cannot be read or written.
    """
    begin = time.monotonic()
    held = _held(path, machine)
    wanted = [(case, [p for p in providers if (case.key, p.name) not in held]) for case in cases]
    wanted = [(case, some) for case, some in wanted if some]
    statuses: collections.Counter[str] = collections.Counter()
    longest, done = 0.0, 0
    with progress(f"measuring {suite}", len(wanted)) if show else nullcontext(lambda: None) as step:
        for case, some in wanted:
            start = time.monotonic()
            if budget is not None and start - begin + longest >= budget:
                break
            rows, lost = _measured(case, some, suite, machine)
            results.append(path, rows, machine.stamp)
            statuses.update(row.status for row in rows)
            for row in rows if show else ():
                if row.status not in (OK, UNSUPPORTED):
                    print(f"{row.case} by {row.provider}: {row.status}: {row.reason}", flush=True)
            if lost:
                statuses[LOST] += 1
                break
            longest = max(longest, time.monotonic() - start)
            done += 1
            step()
    if done < len(wanted):
        statuses[LEFT] = len(wanted) - done
    return statuses


def _held(path: Path, machine: Machine) -> set[tuple[str, str]]:
    rows = results.read(path) if path.exists() else []
    return {(row.case, row.provider) for row, stamp in rows if stamp == machine.stamp}


def _measured(case: Case, providers: Sequence[Provider], suite: str, machine: Machine) -> tuple[list[Row], bool]:
    """The rows of a case, and whether this process can compute nothing more; its tensors are freed."""
    measurement = Measurement(case, suite, machine)
    rows, lost = measurement.rows(providers), measurement.lost
    del measurement
    if machine.device.type == "cuda" and not lost:
        torch.cuda.empty_cache()  # the next case has other sizes
    return rows, lost


def arguments(parser: argparse.ArgumentParser) -> None:
    def several(flag: str, known: Sequence[str], default: str | None, meaning: str) -> None:
        shown = default or "each layer's own"
        parser.add_argument(f"--{flag}", default=default, metavar="A,B", type=lambda text: text.split(","),
                            help=f"{meaning}: some of {', '.join(known)} (default: {shown})")  # fmt: skip

    parser.add_argument("--suite", default="core", metavar="A,B",
                        help=f"some of {', '.join(workloads.suites())} (default: core)")  # fmt: skip
    parser.add_argument("--filter", metavar="TEXT",
                        help="only cases whose key contains this, or matches it: *k64*/fp16/*")  # fmt: skip
    several("provider", tuple(providers_.PROVIDERS), ",".join(DEFAULT_PROVIDERS), "whose time is taken")
    several("pass", (*PASSES, TRAIN), ",".join(PASSES), "train is forward and backward of a module")
    several("dtype", tuple(DTYPES), None, "of all tensors")
    several("precision", PRECISIONS, "tf32", "of float32 products")
    several("layout", tuple(LAYOUTS), "channels_last", "memory format of the tensors")
    parser.add_argument("--mode", choices=("quick", "full"), default="quick",
                        help="how many candidates are tried when ours is tuned (default: quick)")  # fmt: skip
    parser.add_argument("--budget", type=float, metavar="SECONDS", help="stop in time; the same command goes on later")
    parser.add_argument("--out", type=Path, metavar="FILE",
                        help="result file (default: perf/results/<gpu>/<suite>.csv)")  # fmt: skip


def main(options: argparse.Namespace) -> int:
    chosen = providers_.get(options.provider)
    cases = workloads.cases(
        workloads.suite(options.suite), getattr(options, "pass"), options.dtype, options.layout, options.precision
    )
    if options.filter is not None:
        cases = workloads.select(cases, options.filter)
    machine = machines.here(policy(options.mode))
    path = options.out or results.folder(machine.gpu) / f"{options.suite.replace(',', '+')}.csv"
    with settings.configure(autotune=options.mode):
        counts = measure(cases, chosen, path, suite=options.suite, machine=machine, budget=options.budget)
    left, _ = counts.pop(LEFT, 0), counts.pop(LOST, 0)
    print(f"{path}: {counts.total()} rows added, " + ", ".join(f"{n} {status}" for status, n in counts.items()))
    if left:
        print(f"{left} of {len(cases)} cases are left: run the same command again to go on")
    return 1 if any(counts[status] for status in BAD) else 0
