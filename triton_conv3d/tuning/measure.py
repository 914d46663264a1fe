"""Measuring candidates on a device, as :mod:`.search` asks for it: compiled together, verified, then timed.

All of it happens on private operands: the caller's tensors are not touched, and no random numbers of theirs are drawn.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import ModuleType
from typing import Protocol

import torch

from ..engines import launching
from ..engines.base import Config
from ..problem import Operands, Problem, interpreted
from . import quarantine, search, verify
from .faults import blamed, is_illegal_access, is_out_of_memory, is_out_of_resources
from .progress import progress
from .search import OWN, Candidate, Ranked

QUICK_SECONDS = 1.0  # on top of compiling: a network of 50 different layers, three passes each, tunes in minutes
FULL_SECONDS = 60.0  # a bound for enormous volumes; of usual ones everything is measured within it
QUICK_CANDIDATES = 12  # torch's own among them: tests/test_search.py shows what the search misses with so many
_COMPILERS = 8  # threads
FLUSH_BYTES = 256 * 2**20  # more than any L2 cache, MI300X's 256 MiB of last-level cache included
_AHEAD_CYCLES = 1_000_000  # half a millisecond at 2 GHz; the host takes 0.03 to 0.2 to launch a candidate

_budget: float | None = None


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


Trial = Callable[[str, Config], contextlib.AbstractContextManager]


def untold(engine: str, config: Config) -> contextlib.AbstractContextManager:
    """For measurements that keep books of their own."""
    return contextlib.nullcontext()


class EventTimer:
    """Device events around one call. The L2 cache is overwritten first; then the device waits, so that the host gets ahead
    of it and launching is not counted."""

    def __init__(self, device: torch.device):
        self._flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device)

    def time(self, function: Callable[[], object]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._flush.zero_()
        torch.cuda._sleep(_AHEAD_CYCLES)
        start.record()
        function()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e-3


def best(
    problem: Problem,
    operands: Operands,
    ranked: list[Ranked],
    mode: str,
    timer: Timer | None = None,
    seconds: float | None = None,
    hints: Sequence[Candidate] = (),
    trial: Trial = untold,
) -> Result | None:
    """Measure candidates and return the fastest right one; None if none could be measured.

    Args:
        operands: tensors like those that will be computed; only their shapes, strides and addresses are looked at.
        ranked: (predicted seconds, engine, config), the most promising first.
        mode: ``quick`` measures at most ``QUICK_CANDIDATES`` of them, ``full`` all.
        timer: measures one call; device events if None.
        seconds: budget for verifying and timing candidates; :func:`budget` or else the mode's own if None. The best one
            and torch's own are measured whatever it is.
        hints: candidates that were the fastest of similar problems.
        trial: around the first run of each candidate, as :func:`.quarantine.trial`.

    Raises:
        RuntimeError: a candidate accessed memory illegally; the message names it.
    """
    device = next(t for t in operands[:3] if t is not None).device
    if not problem.torch_dtype.is_floating_point:
        return None
    if seconds is None:
        seconds = _budget if _budget is not None else FULL_SECONDS if mode == "full" else QUICK_SECONDS
    policy = {"mode": mode, "budget_s": float(seconds), "rounds": search.REPETITIONS, "flush_bytes": FLUSH_BYTES}
    most = None if mode == "full" else QUICK_CANDIDATES
    guard = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
    with guard, torch.no_grad(), torch.autocast(device.type, enabled=False):
        try:
            return _winner(Bench(problem, operands, own(ranked), timer, seconds, trial), ranked, most, hints, policy)
        except torch.OutOfMemoryError:  # not even the operands have room
            torch.cuda.empty_cache()
            return None


def own(ranked: Sequence[Ranked]) -> Candidate:
    """Torch's own among the candidates, or else the first: what is blamed if there is nothing to judge by."""
    return next(((engine, config) for _, engine, config in ranked if engine.NAME == OWN), tuple(ranked[0][1:]))


def _winner(
    bench: Bench, ranked: list[Ranked], most: int | None, hints: Sequence[Candidate], policy: dict
) -> Result | None:
    if not bench.ready:
        return None
    with progress(f"tuning {bench.problem}", min(most or len(ranked), len(ranked))) as step:

        def prepare(batch: list[Candidate]) -> None:
            bench.prepare(batch)
            for _ in batch:
                step()

        times = search.search(ranked, bench.measure, most, hints, prepare, bench.late)
    bench.report()
    if not times:
        return None
    medians = search.median(times)
    engine, config = min(medians, key=medians.__getitem__)
    own_us = min((median * 1e6 for (name, _), median in medians.items() if name == OWN), default=None)
    return Result(engine, config, medians[engine, config] * 1e6, own_us, len(times), policy)


class Bench:
    """Measures candidates of one problem, as :func:`.search.search` asks for it, within so many seconds.

    Attributes:
        ready: whether there is something to judge results by.
        right, wrong: candidates whose result was compared.
    """

    def __init__(
        self,
        problem: Problem,
        operands: Operands,
        own: Candidate,
        timer: Timer | None = None,
        seconds: float = float("inf"),
        trial: Trial = untold,
    ):
        self.problem, self.seconds, self.trial = problem, seconds, trial
        self.device = next(t for t in operands[:3] if t is not None).device
        self.operands = verify.private_operands(operands)
        self.timer = EventTimer(self.device) if timer is None else timer
        self.right: list[Candidate] = []
        self.wrong: list[Candidate] = []
        self.expected = self.attempt(*own, lambda: verify.trusted(self.problem, self.operands))
        self.begin = time.monotonic()
        self.ready = self.expected is not None

    def late(self, part: float) -> bool:
        return time.monotonic() - self.begin > self.seconds * part

    def prepare(self, batch: list[Candidate]) -> None:
        """Compile a batch; the time it takes does not count."""
        before = time.monotonic()
        _compile(self.problem, self.operands, self.device, batch)
        self.begin += time.monotonic() - before

    def measure(self, candidate: Candidate, repetitions: int) -> float | None:
        """Seconds of a launch, the median of so many; None if the candidate is wrong or cannot run here."""
        engine, config = candidate
        first = candidate not in self.right and engine.NAME != OWN
        with self.trial(engine.NAME, config) if first else contextlib.nullcontext():
            return self._timed(candidate, repetitions)

    def _timed(self, candidate: Candidate, repetitions: int) -> float | None:
        engine, config = candidate
        if candidate not in self.right and not self.is_usable(candidate):
            return None
        samples = []
        for _ in range(repetitions):
            seconds = self.attempt(engine, config, lambda: self.timer.time(lambda: self.launch(engine, config)))
            if seconds is None:
                return None
            samples.append(seconds)
        return statistics.median(samples)

    def is_usable(self, candidate: Candidate) -> bool:
        """Whether a candidate runs and is right. What cuDNN searches meanwhile does not count, as compiling does not."""
        before = time.monotonic()
        good = self.attempt(*candidate, lambda: self.is_right(*candidate))
        if candidate[0].NAME == OWN:
            self.begin += time.monotonic() - before
        if good is not None:
            (self.right if good else self.wrong).append(candidate)
        return bool(good)

    def is_right(self, engine: ModuleType, config: Config) -> bool:
        result = self.launch(engine, config)
        return verify.is_right(
            self.problem,
            result,
            self.expected,
            negative_slope=self.operands.negative_slope,
            coarse=engine.NAME == OWN,
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
                raise blamed(engine.NAME, config, self.problem, error) from error
            if is_out_of_memory(error):
                torch.cuda.empty_cache()
            elif not is_out_of_resources(error) and engine.NAME != OWN:
                _warn(f"{engine.NAME} [{config}] failed on {self.problem} and is left out: {error!r:.300}")
            return None

    def report(self) -> None:
        """Quarantine what was wrong, but torch's own: it stays the last resort."""
        right, wrong = self.right, self.wrong
        if not wrong:
            return
        if not right and any(engine.NAME == OWN for engine, _ in wrong):
            _warn(f"no engine, torch's own included, agrees with torch's wider result on {self.problem}; not tuned")
            return
        for engine, config in wrong:
            if engine.NAME != OWN:
                quarantine.leave_out(engine.NAME, config.to_dict(), self.problem.arch)
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


def _specialised(argument: object) -> object:
    """What Triton compiles a kernel anew for: a tensor's type, and a number that is 1, divisible by 16 or long."""
    if isinstance(argument, int):
        return argument == 1, argument % 16 == 0, abs(argument) >> 31 > 0
    if isinstance(argument, tuple):
        return tuple(map(_specialised, argument))
    return getattr(argument, "dtype", None)


def _compile(problem: Problem, operands: Operands, device: torch.device, candidates: list[Candidate]) -> None:
    """Compile what the candidates will launch, in threads and without launching it; failures show again at the launch.

    Other threads' launches go on meanwhile: what happens to a launch depends on the thread it comes from.
    """
    ours = [candidate for candidate in candidates if candidate[0].NAME != OWN]
    if device.type != "cuda" or interpreted() or not ours:
        return
    begun: set = set()
    compiling = threading.local()
    launch = launching._runner

    def compile_only(kernel, grid, args, options) -> None:
        if not getattr(compiling, "here", False):
            return launch(kernel, grid, args, options)
        key = (id(kernel), repr(options), tuple(map(_specialised, args)))
        if key not in begun:
            begun.add(key)
            compiled = kernel.run(*args, grid=(*grid, 1), warmup=True, **options)
            # Loads it, and builds what launches it: up to Triton 3.6, and longer than a measurement, by a C compiler.
            getattr(compiled, "run", None)

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
