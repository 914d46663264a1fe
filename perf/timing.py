"""Times that can be compared: device events, a cold L2 cache, and everybody measured in turns.

A sample is one call. The L2 cache is overwritten before it, and the device is kept busy until the host has launched
the whole call, so that the device's time holds no waiting for the host; the host's time is taken apart.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, Protocol

import torch

from triton_conv3d.tuning.measure import FLUSH_BYTES

SAMPLES = 30  # of each contestant
LEAST = 5  # samples, though they take longer than SECONDS
SECONDS = 0.4  # of device time that a contestant may take, over all of its samples
LONG = 10.0  # seconds after which it has to do with the samples it has
_CYCLES = 2e9  # a second, at most, of the clocks of the GPUs in use
_LONGEST_WAIT = 0.02  # seconds; a call that takes the host longer waits for the device itself
POLICY = f"device events, host ahead, {FLUSH_BYTES >> 20} MiB through L2, median of {LEAST}-{SAMPLES} calls in turns"


def policy(mode: str) -> str:
    """How times are taken, in a few words, where ours is tuned in this mode: for the stamp of a result."""
    return f"{POLICY}; ours tuned: {mode}"


class Sample(NamedTuple):
    """Seconds of one call, on the device and on the host."""

    device: float
    host: float


class Timer(Protocol):
    def time(self, function: Callable[[], object], ahead: float = 0.0) -> Sample:
        """Time one call; the host needs about ``ahead`` seconds for it."""

    def allocated(self) -> int | None:
        """Bytes allocated on the device; None if that is not known."""

    def highest(self, function: Callable[[], object]) -> tuple[object, int | None]:
        """What ``function()`` returns, and the most bytes that were allocated meanwhile."""


class DeviceTimer:
    """Of a GPU."""

    def __init__(self, device: torch.device):
        self.device = device
        self._flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device)

    def time(self, function: Callable[[], object], ahead: float = 0.0) -> Sample:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._flush.zero_()
        torch.cuda._sleep(int(min(ahead, _LONGEST_WAIT) * _CYCLES))
        start.record()
        begin = time.perf_counter()
        function()
        host = time.perf_counter() - begin
        end.record()
        end.synchronize()
        return Sample(start.elapsed_time(end) * 1e-3, host)

    def allocated(self) -> int:
        return torch.cuda.memory_allocated(self.device)

    def highest(self, function: Callable[[], object]) -> tuple[object, int]:
        torch.cuda.reset_peak_memory_stats(self.device)
        result = function()
        torch.cuda.synchronize(self.device)
        return result, torch.cuda.max_memory_allocated(self.device)


class Contestant(Protocol):
    call: Callable[[], object]
    context: Callable[[], AbstractContextManager]  # entered around each call, and not timed


@dataclass(frozen=True)
class Call:
    """A contestant that needs nothing around its call."""

    call: Callable[[], object]
    context: Callable[[], AbstractContextManager] = contextlib.nullcontext


@dataclass(frozen=True)
class Times:
    """Seconds: median, quantiles 0.2 and 0.8, and the host's median."""

    median: float
    low: float
    high: float
    host: float
    samples: int

    @classmethod
    def of(cls, samples: Sequence[Sample]) -> Times:
        device = sorted(sample.device for sample in samples)
        host = statistics.median(sample.host for sample in samples)
        return cls(quantile(device, 0.5), quantile(device, 0.2), quantile(device, 0.8), host, len(samples))


def quantile(ordered: Sequence[float], q: float) -> float:
    """Of numbers in ascending order, interpolated between the two nearest."""
    place = q * (len(ordered) - 1)
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


def _at_once(name: str, function: Callable[[], Sample]) -> Sample:
    return function()


def race(
    contestants: Mapping[str, Contestant],
    timer: Timer,
    run: Callable[[str, Callable[[], Sample]], Sample] = _at_once,
) -> tuple[dict[str, Times], dict[str, Exception]]:
    """Time all of them in turns, each round starting with another, after one round that is not counted.

    Args:
        run: ``run(name, function)`` takes a sample by calling ``function()``, in that contestant's thread for instance.

    Returns:
        The times by name, and the errors of those that raised instead.
    """
    racing = dict(contestants)
    taken: dict[str, list[Sample]] = {name: [] for name in racing}
    errors: dict[str, Exception] = {}
    round_, ahead = 0, dict.fromkeys(racing, 0.0)
    while racing:
        for name in _rotated(list(racing), round_):
            try:
                with racing[name].context():
                    sample = run(name, partial(timer.time, racing[name].call, ahead[name]))
            except Exception as error:
                errors[name] = error.with_traceback(None)  # which holds tensors
                del racing[name], taken[name]
                continue
            ahead[name] = 2 * sample.host
            if round_:
                taken[name].append(sample)
                if _enough(taken[name]):
                    del racing[name]
        round_ += 1
    return {name: Times.of(samples) for name, samples in taken.items()}, errors


def _rotated(names: list[str], round_: int) -> list[str]:
    first = round_ % len(names)
    return names[first:] + names[:first]


def _enough(samples: Sequence[Sample]) -> bool:
    spent = sum(sample.device for sample in samples)
    return len(samples) >= SAMPLES or spent >= LONG or (spent >= SECONDS and len(samples) >= LEAST)
