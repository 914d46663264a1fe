"""``python -m autotune sweep``: measure candidates of many problems into a sweep file. The logic knows no device."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from triton_conv3d.problem import Problem
from triton_conv3d.tuning import search
from triton_conv3d.tuning.search import OWN, REPETITIONS, Candidate, Ranked
from triton_conv3d.tuning.storage import canonical

from .records import FAILED, WRONG, Record, Writer

COMPILE_SECONDS = 1.0  # of one candidate, as seen for sm_90: 0.2 to 1.5 s
HANGING_SECONDS = 120.0  # of measuring one candidate, after which it is taken never to end; usual ones take less than one
_TOGETHER = 16  # candidates that are compiled before any of them is measured: little is lost where a sweep is ended
_ENDED = 2  # processes that ended while a batch was compiled, after which the compiler is taken to have ended them
_LAUNCHES = 2 + REPETITIONS  # of one candidate: compiled, verified, timed


class Impossible(ValueError):
    """A budget that cannot be kept; the message says the least that is needed."""


class Bench(Protocol):
    """What measures the candidates of one problem: :class:`triton_conv3d.tuning.measure.Bench`, or a made-up one."""

    ready: bool
    wrong: list[Candidate]

    def prepare(self, batch: list[Candidate]) -> None: ...

    def measure(self, candidate: Candidate, repetitions: int) -> float | None: ...


@dataclass(frozen=True)
class Outcome:
    """What became of a sweep: problems done and left, measurements made, seconds."""

    done: int
    left: int
    measured: int
    seconds: float


def least_seconds(problems: Sequence[Problem], ranking: Callable[[Problem], list[Ranked]]) -> float:
    """A prediction of what the least costs that a table can be made of: of every problem, its most promising candidate
    and torch's own."""
    total = 0.0
    for problem in problems:
        ranked = ranking(problem)
        first = [seconds for seconds, engine, _ in ranked if engine.NAME != OWN][:1]
        own = [seconds for seconds, engine, _ in ranked if engine.NAME == OWN]
        total += sum(COMPILE_SECONDS + _LAUNCHES * seconds for seconds in first) + _LAUNCHES * sum(own)
    return total


def run(
    problems: Sequence[Problem],
    ranking: Callable[[Problem], list[Ranked]],
    open_bench: Callable[[Problem], Bench | None],
    writer: Writer,
    *,
    most: int | None = None,
    budget: float | None = None,
    clock: Callable[[], float] = time.monotonic,
    report: Callable[[str], None] = lambda line: None,
) -> Outcome:
    """Measure what the file does not have yet, problem by problem.

    Args:
        ranking: every candidate of a problem with its predicted seconds.
        open_bench: what measures a problem; None if there is no room for it.
        most: guided: so many candidates of a problem are searched; None: all are measured.
        budget: seconds, after which no further candidate is begun.
        report: is given a line for every problem.

    Raises:
        Impossible: the budget is below :func:`least_seconds` of what is left.
        RuntimeError: a candidate accessed memory illegally; it is quarantined, and the sweep can go on in a new process.
    """
    begin, measured, done = clock(), 0, 0
    left = [problem for problem in problems if not _complete(problem, ranking(problem), writer, most)]
    if budget is not None and budget < (least := least_seconds(left, ranking)):
        raise Impossible(
            f"--budget {budget:g} s is too little for {len(left)} problems: the least is about {least:.0f} s, by the cost "
            "model's predictions; take more, or fewer suites, passes or dtypes"
        )

    def late(part: float = 1.0) -> bool:
        return budget is not None and clock() - begin > budget

    for number, problem in enumerate(left, 1):
        if late():
            break
        before = len(writer.sweep)
        finished = _sweep_one(problem, ranking(problem), open_bench(problem), writer, most, late)
        measured += len(writer.sweep) - before
        done += finished
        report(f"[{number}/{len(left)}] {problem}: {_summary(problem, writer)}, {clock() - begin:.0f} s")
    return Outcome(done + len(problems) - len(left), len(left) - done, measured, clock() - begin)


def _key(candidate: Candidate) -> tuple[str, str]:
    return candidate[0].NAME, canonical(candidate[1].to_dict())


def _todo(problem: Problem, ranked: Sequence[Ranked], writer: Writer) -> list[Candidate]:
    known, wrong = writer.sweep.of(problem), writer.sweep.wrong
    candidates = [(engine, config) for _, engine, config in ranked]
    return [c for c in candidates if _key(c) not in known and (_key(c) not in wrong or c[0].NAME == OWN)]


def _complete(problem: Problem, ranked: Sequence[Ranked], writer: Writer, most: int | None) -> bool:
    """Nothing is left to measure; a guided sweep leaves a problem of which it measured something as it is."""
    left = _todo(problem, ranked, writer)
    if most is None or not left:
        return not left
    return bool(writer.sweep.of(problem)) and not any(engine.NAME == OWN for engine, _ in left)


def _sweep_one(
    problem: Problem, ranked: list[Ranked], bench: Bench | None, writer: Writer, most: int | None, late: Callable
) -> bool:
    """Whether everything of this problem is done."""
    left = _todo(problem, ranked, writer)
    if bench is None or not bench.ready:  # no room, or nothing to judge by
        for candidate in left:
            writer.add(_record(problem, candidate, None, FAILED))
        return True

    def prepare(batch: list[Candidate]) -> None:
        """Compile a batch; one that ends the process again and again by single candidates, so that only one of them fails."""
        what = canonical([problem.key, *map(_key, batch)])
        if writer.begun.times(what) < _ENDED:
            writer.begun.begin(what)
            bench.prepare(batch)
        elif len(batch) > 1:
            for candidate in batch:
                prepare([candidate])
        else:
            writer.add(_record(problem, batch[0], None, FAILED))
        writer.begun.end(what)

    def measure(candidate: Candidate, repetitions: int) -> float | None:
        known = writer.sweep.of(problem).get(_key(candidate))
        if known is not None and known.fault == FAILED:  # its compiler ends the process
            return None

        def leave() -> None:  # nothing ends a kernel from within: the process goes, as after an illegal access
            writer.add(_record(problem, candidate, None, WRONG))
            print(f"{candidate[0].NAME} [{candidate[1]}] does not end on {problem}: quarantined; the same command goes on",
                  file=sys.stderr, flush=True)  # fmt: skip
            os._exit(1)

        watch = threading.Timer(HANGING_SECONDS, leave)
        watch.daemon = True
        watch.start()
        try:
            seconds = bench.measure(candidate, repetitions)
        except RuntimeError:  # an illegal access: the device is lost to this process, and the candidate to the sweep
            writer.add(_record(problem, candidate, None, WRONG))
            raise
        finally:
            watch.cancel()
        wrong = seconds is None and candidate in bench.wrong
        writer.add(_record(problem, candidate, seconds, None if seconds is not None else WRONG if wrong else FAILED))
        return seconds

    if most is None:
        for first in range(0, len(left), _TOGETHER):
            batch = left[first : first + _TOGETHER]
            if late():
                return False
            prepare(batch)
            for candidate in batch:
                if late():
                    return False
                measure(candidate, REPETITIONS)
        return True
    kept = {_key(candidate) for candidate in left}
    offers = [item for item in ranked if _key(item[1:]) in kept]
    times = search.search(offers, measure, most, prepare=prepare, late=late)
    by_key = {_key(candidate): candidate for candidate in left}
    for (name, config), median in search.median(times).items():  # of all repetitions, where the last line has a few
        key = (name, canonical(config.to_dict()))
        if median != writer.sweep.of(problem)[key].seconds:
            writer.add(_record(problem, by_key[key], median, None))
    return not late()


def _record(problem: Problem, candidate: Candidate, seconds: float | None, fault: str | None) -> Record:
    return Record(problem.to_dict(), candidate[0].NAME, candidate[1].to_dict(), seconds, fault)


def _summary(problem: Problem, writer: Writer) -> str:
    times = writer.sweep.times(problem)
    if not times:
        return "nothing could be measured"
    (engine, config) = min(times, key=times.get)
    return f"{len(times)} measured, best {engine} {config} {times[engine, config] * 1e6:.1f} us"
