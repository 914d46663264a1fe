"""The acceptance in slices. A slice is a module with these names; it is a list of steps that are run once each.

    NAME, WHAT                 "correctness.large", and one line for people
    WORKERS                    steps that run at the same time
    unavailable()              why none of it can run here beside the lack of a GPU, or None; without it all can
    steps(setting)             its steps; without a GPU too, for their number and estimated times

Each finished step is a row of a result file; the next call goes on with what has none.
"""

from __future__ import annotations

import json
import math
import os
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import ModuleType

from .. import machine
from ..machine import Machine
from ..results import FAILED, MEMORY, OK, UNSUPPORTED, now
from ..run import BAD
from ..timing import policy
from . import process

BUDGET = 540.0  # seconds of one call: nine minutes
TUNING = "quick"  # the mode in which the slices tune
TIMED = policy(TUNING)  # as ``python -m perf run`` stamps it by default
_WHOLE = 0.9 * BUDGET  # seconds: a step that had so many and was not done would never be
_PATIENCE, _LEAST_PATIENCE = 5, 120.0  # times what a step is estimated to take, and seconds, after which it hangs
_GRACE = 30.0  # seconds: a call ends within ten minutes even if one of its steps never does
_REASON = 500  # characters
UNFINISHED = 3  # exit status: nothing is wrong so far, and steps are left
_MOST_BEGUN = 2  # times: a step that ended its process so often, as a crash of a compiler does, has failed


@dataclass(frozen=True)
class Outcome:
    """What came of a step: one of :data:`perf.results.STATUSES`, why if not ``ok``, and how much was checked."""

    status: str = OK
    reason: str = ""
    checks: int = 0


class DeviceLost(Exception):
    """After an illegal memory access this process can compute nothing more.

    outcome: of the step that it happened in; None if the next call has to go on with it.
    """

    def __init__(self, outcome: Outcome | None = None):
        super().__init__("a kernel accessed memory illegally: this process can compute nothing more")
        self.outcome = outcome


@dataclass(frozen=True)
class Step:
    """
    name: unique in its slice. seconds: that it is estimated to take.
    run: ``run(limit)`` returns what came of it; None if ``limit`` seconds were not enough: the next call goes on.
    keeps: what it did in part is kept, so that a later call needs less time; or it ends by itself, however long it takes.
    """

    name: str
    seconds: float
    run: Callable[[float], Outcome | None]
    keeps: bool = False

    @property
    def patience(self) -> float:
        """Seconds after which it has failed."""
        return _WHOLE if self.keeps else min(_WHOLE, max(_LEAST_PATIENCE, _PATIENCE * self.seconds))


@dataclass(frozen=True)
class Check:
    """A row of the result file: one finished step. seconds: that it took. measured: when, ISO 8601 in UTC."""

    slice: str
    step: str
    status: str
    reason: str
    checks: int
    seconds: float
    measured: str = field(default_factory=now)


@dataclass(frozen=True)
class Setting:
    """Where the acceptance runs, and where its files go.

    out: folder of the results. gpu: its name; None where torch sees none. memory: of the GPU, in bytes.
    """

    out: Path
    gpu: str | None = None
    memory: int = 0

    @property
    def state(self) -> Path:
        """Which steps are done."""
        return self.out / "validate" / "steps.csv"

    @property
    def cache(self) -> Path:
        """Plans that the slices tune, for each other and for the next call."""
        return self.out / "validate" / "plans"

    @cached_property
    def machine(self) -> Machine:
        """The GPU with its ceilings, measured when first asked for."""
        return machine.here(TIMED)


@dataclass
class Progress:
    """How far a slice is. rows: of its finished steps, by name. reason: why none of it can run here."""

    slice: ModuleType
    steps: list[Step]
    reason: str | None
    rows: dict[str, Check]

    @property
    def pending(self) -> list[Step]:
        return [] if self.reason else [step for step in self.steps if step.name not in self.rows]

    @property
    def seconds_left(self) -> float:
        """Estimated, of what is pending."""
        steps = self.pending
        longest = max((step.seconds for step in steps), default=0.0)
        return max(longest, math.fsum(step.seconds for step in steps) / self.slice.WORKERS)

    def count(self, *statuses: str) -> int:
        return sum(row.status in statuses for row in self.rows.values())


def progress(module: ModuleType, setting: Setting, rows: Iterable[Check]) -> Progress:
    """What is left of a slice, given the rows of earlier calls; of two for one step the later one counts."""
    steps = module.steps(setting)
    names = {step.name for step in steps}
    known = {row.step: row for row in rows if row.slice == module.NAME and row.step in names}
    return Progress(module, steps, getattr(module, "unavailable", lambda: None)(), known)


def advance(
    state: Progress,
    deadline: float,
    record: Callable[[Check], None],
    clock: Callable[[], float] = time.monotonic,
    begun: Path | None = None,
) -> None:
    """Run the pending steps that fit before the deadline, several at a time where the slice allows it.

    Args:
        deadline: of ``clock``, in seconds.
        record: told of every finished step.
        begun: a file that names the step that this process is in; where it is ended, nothing else tells the next call.

    Raises:
        DeviceLost: no further step can run in this process.
    """
    pending, running = state.pending, {}
    with ThreadPoolExecutor(state.slice.WORKERS) if state.slice.WORKERS > 1 else _Inline() as pool:
        try:
            while True:
                while len(running) < state.slice.WORKERS:
                    step = next((step for step in pending if clock() + step.seconds <= deadline), None)
                    if step is None:
                        break
                    pending.remove(step)
                    if _begin(begun, state.slice, step) > _MOST_BEGUN:
                        reason = f"the process ended {_MOST_BEGUN} times while it ran"
                        state.rows[step.name] = row = Check(state.slice.NAME, step.name, FAILED, reason, 0, 0.0)
                        record(row)
                        continue
                    begin = clock()
                    limit = deadline - begin if step.keeps else min(deadline - begin, step.patience)
                    running[pool.submit(_watched, state, step, limit, record)] = (step, begin, limit)
                if not running:
                    return
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    step, begin, limit = running.pop(future)
                    outcome = _outcome(future, step, limit)
                    if outcome is not None:
                        row = Check(state.slice.NAME, step.name, **vars(outcome), seconds=clock() - begin)
                        state.rows[step.name] = row
                        record(row)
                    if isinstance(future.exception(), DeviceLost):
                        raise future.exception()
        finally:
            process.end_all()
            if begun:
                begun.unlink(missing_ok=True)


def _begin(begun: Path | None, module: ModuleType, step: Step) -> int:
    """How often in a row this step is begun; of several at a time, which have processes of their own, always once."""
    if begun is None or module.WORKERS > 1:
        return 1
    here = [module.NAME, step.name]
    *before, times = json.loads(begun.read_text()) if begun.exists() else (0,)
    times = times + 1 if before == here else 1
    begun.parent.mkdir(parents=True, exist_ok=True)
    begun.write_text(json.dumps([*here, times]))
    return times


def _watched(state: Progress, step: Step, limit: float, record: Callable[[Check], None]) -> Outcome | None:
    """``step.run(limit)``. Nothing ends a kernel from within: if one never does, this process goes; the next call goes on."""
    seconds = limit + _GRACE

    def leave() -> None:
        failed = limit >= step.patience
        if failed:
            record(Check(state.slice.NAME, step.name, FAILED, f"still not done after {seconds:.0f} s", 0, seconds))
        process.end_all()
        os._exit(1 if failed else UNFINISHED)

    watch = threading.Timer(seconds, leave)
    watch.daemon = True
    watch.start()
    try:
        return step.run(limit)
    finally:
        watch.cancel()


class _Inline(Executor):
    """Runs what is submitted at once and here, so that an interrupt reaches it."""

    def submit(self, function, /, *args, **kwargs) -> Future:
        future: Future = Future()
        try:
            future.set_result(function(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future


def _outcome(future: Future, step: Step, limit: float) -> Outcome | None:
    """What a step returned; one that raises has failed, and the others go on."""
    error = future.exception()
    if isinstance(error, DeviceLost):
        return error.outcome
    if error is not None:
        return Outcome(FAILED, f"{type(error).__name__}: {error}"[:_REASON])
    if future.result() is None and not step.keeps and limit >= step.patience:
        return Outcome(FAILED, f"not done within {limit:.0f} s")
    return future.result()


def summed(outcomes: Iterable[Outcome]) -> Outcome:
    """One for several: the worst status, the reasons of all that are not ``ok``, and all checks."""
    outcomes = list(outcomes)
    statuses = {outcome.status for outcome in outcomes}
    status = next(status for status in (*BAD, MEMORY, UNSUPPORTED, OK) if status in statuses)
    reasons = "; ".join(dict.fromkeys(o.reason for o in outcomes if o.reason))
    return Outcome(status, reasons[:_REASON], sum(o.checks for o in outcomes))
