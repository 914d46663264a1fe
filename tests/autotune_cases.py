"""Sweeps without a GPU: few small problems, benches of a simulated GPU, and a clock that they move."""

from __future__ import annotations

from simulated import SimulatedGPU

from autotune import __main__ as command
from autotune import records, sweep
from triton_conv3d.problem import Problem
from triton_conv3d.tuning.environment import source_hash
from triton_conv3d.tuning.select import ranking

GPU, ARCH = "NVIDIA H200", "sm_90"
ENVIRONMENT = {"gpu": GPU, "arch": ARCH, "torch": "2.13.0", "triton": "3.9.0", "driver": "13000, cuda 13.0",
               "cudnn": "91900", "package": "0.1.0", "engines": source_hash()}  # fmt: skip
PROBLEMS = tuple(
    Problem(pass_, 2, channels, channels, (size,) * 3, (3, 3, 3), padding=(1,) * 6, device=GPU, arch=ARCH)
    for pass_, channels, size in (("forward", 64, 16), ("dgrad", 128, 8), ("wgrad", 64, 24), ("forward", 40, 31))
)


def header(created="2026-01-01T00:00:00Z", **changes) -> dict:
    return records.header({**ENVIRONMENT, **changes}, {"mode": "full"}, "abc", created)


def call(capsys, *arguments) -> tuple[int, str, str]:
    """(exit status, stdout, stderr) of a command."""
    status = command.main([str(argument) for argument in arguments])
    return (status, *capsys.readouterr())


def offers(problem: Problem) -> list:
    return ranking(problem, measuring=True)


class Bench:
    """Of one problem; every launch takes its simulated time of the clock."""

    ready = True

    def __init__(self, gpu: SimulatedGPU, problem: Problem, clock, wrong=(), failed=(), fatal=(), limit=None, compiled=None):
        self.times, self.clock, self.wrong, self.asked = gpu.times(problem, offers(problem)), clock, [], []
        self._wrong, self._failed, self._fatal, self.limit, self._compiled = wrong, failed, fatal, limit, compiled

    def prepare(self, batch) -> None:
        if self._compiled is not None:
            self._compiled([(engine.NAME, config) for engine, config in batch])

    def measure(self, candidate, repetitions):
        key = candidate[0].NAME, candidate[1]
        self.asked.append(key)
        if self.limit is not None:
            self.limit()
        self.clock.wait(1.0)
        if key in self._fatal:
            raise RuntimeError("an illegal memory access was encountered")
        if key in self._failed:
            return None
        if key in self._wrong:
            self.wrong.append(candidate)
            return None
        return self.times[key]


class World:
    """A GPU, its clock, and the benches that were opened on it."""

    def __init__(self, clock, seed=1, **how):
        self.gpu, self.clock, self.how, self.benches = SimulatedGPU(seed), clock, how, []

    def open_bench(self, problem: Problem) -> Bench:
        self.benches.append(Bench(self.gpu, problem, self.clock, **self.how))
        return self.benches[-1]

    @property
    def asked(self) -> list:
        return [key for bench in self.benches for key in bench.asked]

    def run(self, path, problems=PROBLEMS, created=None, **options) -> sweep.Outcome:
        with records.Writer(path, created or header()) as writer:
            return sweep.run(problems, offers, self.open_bench, writer, clock=self.clock, **options)
