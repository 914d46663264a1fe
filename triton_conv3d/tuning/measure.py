"""Measuring candidates: compiled together, verified, then timed in interleaved rounds that the slow ones leave.

All of it happens on private operands: the caller's tensors are not touched, and no random numbers of theirs are drawn.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import ModuleType
from typing import Protocol

import torch

from ..engines import launching
from ..engines.base import Config
from ..problem import Operands, Problem, interpreted
from . import verify
from .faults import is_illegal_access, is_out_of_memory, is_out_of_resources
from .progress import progress

QUICK_SECONDS = 1.0  # on top of compiling: a network of 50 different layers, three passes each, tunes in minutes
FULL_SECONDS = 60.0  # a bound for enormous volumes; of usual ones everything is measured within it
QUICK_CANDIDATES = 8  # besides torch's own; beyond them, ranked candidates seldom win
_COMPILERS = 8  # threads
_ROUNDS = 7
_LIMITS = (3.0, 2.0, 1.5, 1.25, 1.1, 1.05)  # times the fastest, beyond which a candidate leaves after each round
_FLUSH_BYTES = 256 * 2**20  # more than any L2 cache, MI300X's 256 MiB of last-level cache included
_ATEN = "aten"

Candidate = tuple[ModuleType, Config]

_quarantine: set[tuple[str, Config, str]] = set()  # of this process, and so of one version of Triton
_budget: float | None = None


def quarantined(engine: str, config: Config, arch: str) -> bool:
    """Whether this config gave a wrong result on this architecture in this process."""
    return (engine, config, arch) in _quarantine


@contextlib.contextmanager
def budget(seconds: float | None) -> Iterator[None]:
    """Within the block, each problem is measured for at most so long, compiling not counted; None: the mode's own."""
    global _budget
    before, _budget = _budget, seconds
    try:
        yield
    finally:
        _budget = before


@dataclass(frozen=True)
class Result:
    """The winner of a measurement, its time and that of torch's own convolution in microseconds.

    ``candidates`` counts those that were right and timed; ``policy`` says how.
    """

    engine: str
    config: Config
    time_us: float
    aten_us: float | None
    candidates: int
    policy: dict


class Timer(Protocol):
    def time(self, function: Callable[[], object]) -> float:
        """Seconds that the device needs for one call."""


class EventTimer:
    """Device events around one call. The L2 cache is overwritten first; meanwhile the host gets ahead of the device,
    so that launching is not counted."""

    def __init__(self, device: torch.device):
        self._flush = torch.empty(_FLUSH_BYTES, dtype=torch.int8, device=device)

    def time(self, function: Callable[[], object]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._flush.zero_()
        start.record()
        function()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e-3


def pick(ranked: list, mode: str) -> list[Candidate]:
    """What to measure of (seconds, engine, config), in this order: the best, torch's own, then the others.

    ``quick`` takes the first few that differ from each better one of their engine in two knobs at least, then fills up;
    every engine is among them. ``full`` takes all.
    """
    own = [(engine, config) for _, engine, config in ranked if engine.NAME == _ATEN]
    others = [(engine, config) for _, engine, config in ranked if engine.NAME != _ATEN]
    if mode != "full":
        firsts = list({engine.NAME: (engine, config) for engine, config in reversed(others)}.values())
        distinct = firsts[::-1]
        for candidate in others:
            if all(_differences(candidate, chosen) > 1 for chosen in distinct):
                distinct.append(candidate)
        rest = [candidate for candidate in others if candidate not in distinct]
        chosen = [*distinct, *rest][:QUICK_CANDIDATES]
        others = [candidate for candidate in others if candidate in chosen]
    return [*others[:1], *own, *others[1:]]


def _differences(one: Candidate, other: Candidate) -> float:
    if one[0] is not other[0]:
        return float("inf")
    mine, theirs = one[1].to_dict(), other[1].to_dict()
    return sum(mine[name] != theirs.get(name) for name in mine)


def best(
    problem: Problem,
    operands: Operands,
    ranked: list,
    mode: str,
    timer: Timer | None = None,
    seconds: float | None = None,
) -> Result | None:
    """Measure candidates and return the fastest right one; None if none could be measured.

    Args:
        operands: tensors like those that will be computed; only their shapes, strides and addresses are looked at.
        ranked: (predicted seconds, engine, config), the most promising first.
        mode: ``quick`` or ``full``, see :func:`pick`.
        timer: measures one call; device events if None.
        seconds: budget for verifying and timing; :func:`budget` or else the mode's own if None. The best candidate and
            torch's own are measured whatever it is.

    Raises:
        RuntimeError: a candidate accessed memory illegally; the message names it.
    """
    device = next(t for t in operands[:3] if t is not None).device
    if not problem.torch_dtype.is_floating_point:
        return None
    if seconds is None:
        seconds = _budget if _budget is not None else FULL_SECONDS if mode == "full" else QUICK_SECONDS
    policy = {"mode": mode, "budget_s": float(seconds), "rounds": _ROUNDS, "flush_bytes": _FLUSH_BYTES}
    guard = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
    with guard, torch.no_grad(), torch.autocast(device.type, enabled=False):
        try:
            return _Contest(problem, operands, device, timer, seconds).winner(pick(ranked, mode), policy)
        except torch.OutOfMemoryError:  # not even the operands have room
            torch.cuda.empty_cache()
            return None


class _Contest:
    """One measurement: the operands it works on, and what is left of its time."""

    def __init__(self, problem: Problem, operands: Operands, device: torch.device, timer: Timer | None, seconds: float):
        self.problem, self.device, self.seconds = problem, device, seconds
        self.operands = verify.private_operands(operands)
        self.timer = EventTimer(device) if timer is None else timer
        self.deadline = float("inf")
        self.must = 0  # candidates, from the first on, that are measured beyond the deadline too

    def late(self, index: int) -> bool:
        return index >= self.must and time.monotonic() > self.deadline

    def winner(self, candidates: list[Candidate], policy: dict) -> Result | None:
        self.must = 1 + sum(engine.NAME == _ATEN for engine, _ in candidates)
        with progress(f"tuning {self.problem}", len(candidates) + _ROUNDS + 1) as step:
            _compile(self.problem, self.operands, self.device, candidates)
            step()
            begin = time.monotonic()
            self.deadline = begin + self.seconds / 2
            right = self.verified(candidates, step)
            self.deadline = begin + self.seconds
            times = self.timed(right, step)
        if not times:
            return None
        medians = {candidate: statistics.median(samples) for candidate, samples in times.items()}
        engine, config = min(medians, key=medians.__getitem__)
        own = min((median for (name, _), median in medians.items() if name == _ATEN), default=None)
        return Result(
            engine, config, medians[engine, config] * 1e6, None if own is None else own * 1e6, len(times), policy
        )

    def verified(self, candidates: list[Candidate], step: Callable[[], None]) -> list[Candidate]:
        """Those that run and are right."""
        aten = next((candidate for candidate in candidates if candidate[0].NAME == _ATEN), candidates[0])
        expected = self.attempt(*aten, lambda: verify.trusted(self.problem, self.operands))
        if expected is None:  # nothing to judge by
            return []
        right, wrong = [], []
        for index, (engine, config) in enumerate(candidates):
            if self.late(index):
                break
            good = self.attempt(engine, config, lambda: self.is_right(engine, config, expected))
            if good is not None:
                (right if good else wrong).append((engine, config))
            step()
        self.report(right, wrong)
        return right

    def timed(self, candidates: list[Candidate], step: Callable[[], None]) -> dict[tuple[str, Config], list[float]]:
        """Seconds of each candidate, by the names of engine and config."""
        times: dict[tuple[str, Config], list[float]] = {}
        racing = {(engine.NAME, config): engine for engine, config in candidates}
        for round_, limit in enumerate((*_LIMITS, 1.0)):
            for index, ((name, config), engine) in enumerate(list(racing.items())):
                if self.late(self.must if round_ else index):
                    break
                seconds = self.attempt(engine, config, lambda: self.timer.time(lambda: self.launch(engine, config)))
                if seconds is None:
                    del racing[name, config]
                    times.pop((name, config), None)
                else:
                    times.setdefault((name, config), []).append(seconds)
            medians = {key: statistics.median(times[key]) for key in racing if key in times}
            fastest = min(medians.values(), default=0.0)
            own = min((median for (name, _), median in medians.items() if name == _ATEN), default=0.0)
            stay = {key for key, median in medians.items() if median <= limit * fastest or median == own}
            racing = {key: engine for key, engine in racing.items() if key in stay}  # torch's own, to be compared with
            step()
        return times

    def is_right(self, engine: ModuleType, config: Config, expected: torch.Tensor) -> bool:
        result = self.launch(engine, config)
        return verify.is_right(
            self.problem,
            result,
            expected,
            negative_slope=self.operands.negative_slope,
            coarse=engine.NAME == _ATEN,
            stepwise=self.problem.fused and not hasattr(engine, "work"),  # not a kernel of ours
        )

    def launch(self, engine: ModuleType, config: Config) -> torch.Tensor:
        return engine.launch(self.problem, self.operands, config)

    def attempt(self, engine: ModuleType, config: Config, action: Callable):
        """What ``action()`` returns once the device is done; None if the candidate cannot run here."""
        try:
            value = action()
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            return value
        except Exception as error:
            if is_illegal_access(error):
                raise RuntimeError(f"{engine.NAME} [{config}] failed on {self.problem}: {error}") from error
            if is_out_of_memory(error):
                torch.cuda.empty_cache()
            elif not is_out_of_resources(error) and engine.NAME != _ATEN:
                _warn(f"{engine.NAME} [{config}] failed on {self.problem} and is left out: {error!r:.300}")
            return None

    def report(self, right: list[Candidate], wrong: list[Candidate]) -> None:
        """Quarantine what was wrong, but torch's own: it stays the last resort."""
        if not wrong:
            return
        if not right and any(engine.NAME == _ATEN for engine, _ in wrong):
            _warn(f"no engine, torch's own included, agrees with torch's wider result on {self.problem}; not tuned")
            return
        _quarantine.update((e.NAME, config, self.problem.arch) for e, config in wrong if e.NAME != _ATEN)
        names = ", ".join(f"{engine.NAME} [{config}]" for engine, config in wrong)
        where = f"{self.problem} on {self.problem.device} ({self.problem.arch}, {_triton()})"
        _warn(f"{names} gave a wrong result for {where} and is not used in this process; please report it")


def _warn(message: str) -> None:
    warnings.warn(f"triton_conv3d: {message}", RuntimeWarning, stacklevel=2)


def _triton() -> str:
    try:
        import triton
    except ImportError:
        return "no triton"
    return f"triton {triton.__version__}"


def _compile(problem: Problem, operands: Operands, device: torch.device, candidates: list[Candidate]) -> None:
    """Compile what the candidates will launch, in threads and without launching it; failures show again at the launch.

    Other threads' launches go on meanwhile: what happens to a launch depends on the thread it comes from.
    """
    ours = [candidate for candidate in candidates if candidate[0].NAME != _ATEN]
    if device.type != "cuda" or interpreted() or len(ours) < 2:
        return
    begun: set = set()
    compiling = threading.local()
    launch = launching._runner

    def compile_only(kernel, grid, args, options) -> None:
        if not getattr(compiling, "here", False):
            return launch(kernel, grid, args, options)
        key = (id(kernel), repr(options), repr([getattr(argument, "dtype", argument == 1) for argument in args]))
        if key not in begun:
            begun.add(key)
            kernel.run(*args, grid=(*grid, 1), warmup=True, **options)

    def one(candidate: Candidate) -> None:
        compiling.here = True
        with torch.cuda.device(device), torch.no_grad():
            candidate[0].launch(problem, operands, candidate[1])

    workers = min(_COMPILERS, os.cpu_count() or 1, len(ours))
    with launching.replaced(compile_only), ThreadPoolExecutor(workers) as pool:
        pool.submit(one, ours[0]).exception()  # alone: it fills what compilations share
        for future in [pool.submit(one, candidate) for candidate in ours[1:]]:
            error = future.exception()
            if error is not None and is_illegal_access(error):
                raise RuntimeError(f"a kernel failed while {problem} was being tuned: {error}") from error
