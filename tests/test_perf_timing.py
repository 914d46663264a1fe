"""Timing: everybody in turns, nobody's first call counted, and the slow ones bounded."""

from __future__ import annotations

import contextlib
import types

import pytest
import torch

from perf import timing
from perf.timing import Call, DeviceTimer, Sample, Times, race


class ScriptedTimer:
    """Calls the function, which returns the seconds that it is said to take on the device; the host takes a tenth."""

    def __init__(self):
        self.aheads = []

    def time(self, function, ahead=0.0):
        self.aheads.append(ahead)
        seconds = function()
        return Sample(seconds, seconds / 10)


def contestant(log: list, name: str, *seconds: float) -> Call:
    """Takes these seconds in turn, the last of them from then on."""
    left = list(seconds)

    def call() -> float:
        log.append(name)
        taken = left.pop(0) if len(left) > 1 else left[0]
        if isinstance(taken, Exception):
            raise taken
        return taken

    return Call(call)


class TestRace:
    def test_in_turns_each_round_beginning_with_another(self):
        log: list[str] = []
        race({name: contestant(log, name, 1e-3) for name in "abc"}, ScriptedTimer())
        assert "".join(log[:12]) == "abc" + "bca" + "cab" + "abc"
        assert len(log) == 3 * (1 + timing.SAMPLES)

    def test_the_first_call_is_not_counted(self):
        times, _ = race({"a": contestant([], "a", 9.0, 1e-3)}, ScriptedTimer())
        assert times == {"a": Times(1e-3, 1e-3, 1e-3, 1e-4, timing.SAMPLES)}

    @pytest.mark.parametrize(
        "seconds, samples", [(1e-3, timing.SAMPLES), (0.03, 14), (0.2, timing.LEAST), (2.0, timing.LEAST), (60.0, 1)]
    )
    def test_the_slow_are_called_less_often(self, seconds, samples):
        times, _ = race({"slow": contestant([], "", seconds), "fast": contestant([], "", 1e-4)}, ScriptedTimer())
        assert times["slow"].samples == samples and times["fast"].samples == timing.SAMPLES

    def test_who_raises_leaves_and_the_others_go_on(self):
        log: list[str] = []
        error = RuntimeError("late")
        times, errors = race(
            {"a": contestant(log, "a", 1e-3), "b": contestant(log, "b", 1e-3, 1e-3, error)}, ScriptedTimer()
        )
        assert errors == {"b": error} and error.__traceback__ is None
        assert times["a"].samples == timing.SAMPLES and "b" not in times
        assert log.count("b") == 3

    def test_nobody_races(self):
        assert race({}, ScriptedTimer()) == ({}, {})

    def test_the_host_gets_ahead_by_what_it_needs(self):
        timer = ScriptedTimer()
        race({"a": contestant([], "a", 0.2, 0.4)}, timer)
        assert timer.aheads[:3] == [0.0, 2 * 0.02, 2 * 0.04]

    def test_the_context_is_around_each_call_and_not_timed(self):
        log: list[str] = []

        @contextlib.contextmanager
        def context():
            log.append("enter")
            yield
            log.append("exit")

        class Timer(ScriptedTimer):
            def time(self, function, ahead=0.0):
                log.append("start")
                return super().time(function, ahead)

        race({"a": Call(lambda: log.append("call") or 1.0, context)}, Timer())
        assert log[:8] == ["enter", "start", "call", "exit"] * 2


@pytest.mark.parametrize("count", (1, 2, 5, 30))
@pytest.mark.parametrize("q", (0.2, 0.5, 0.8))
def test_quantiles_are_torchs(count, q):
    values = torch.rand(count, dtype=torch.float64, generator=torch.Generator().manual_seed(count))
    expected = torch.quantile(values, q).item()
    assert timing.quantile(sorted(values.tolist()), q) == pytest.approx(expected)


def test_times_of_samples():
    times = Times.of([Sample(float(i), i / 10) for i in (3, 1, 2, 5, 4, 0)])
    assert times == Times(2.5, 1.0, 4.0, 0.25, 6)


def test_the_device_timer_keeps_the_device_busy_before_it_starts(monkeypatch):
    """On a stand-in for the device: the cache is overwritten, the device waits, and only then the clock is started."""
    log: list = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            log.append("record")

        def synchronize(self):
            log.append("synchronize")

        def elapsed_time(self, end):
            return 3.5  # milliseconds

    flush = types.SimpleNamespace(zero_=lambda: log.append("flush"))
    monkeypatch.setattr(timing.torch, "empty", lambda *size, **like: flush)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", log.append)
    sample = DeviceTimer(torch.device("cuda")).time(lambda: log.append("call"), ahead=1e-3)
    assert log == ["flush", 2_000_000, "record", "call", "record", "synchronize"]
    assert sample.device == pytest.approx(3.5e-3) and 0 < sample.host < 1


def test_the_device_timer_knows_the_memory_of_a_call(monkeypatch):
    log: list = []
    for name, value in (("memory_allocated", 5), ("reset_peak_memory_stats", None), ("synchronize", None),
                        ("max_memory_allocated", 9)):  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, lambda device, name=name, value=value: log.append(name) or value)
    timer = DeviceTimer(torch.device("cpu"))
    assert timer.allocated() == 5
    assert timer.highest(lambda: log.append("call") or "result") == ("result", 9)
    assert log[1:] == ["reset_peak_memory_stats", "call", "synchronize", "max_memory_allocated"]
