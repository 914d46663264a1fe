"""Kernels of launches, compiled with no GPU, in processes of their own: Triton's interpreter, where it is on, cannot.

Kernels that differ in nothing but run-time numbers are one variant, and the first of them is compiled for all. Triton
itself may prove more about some numbers (that they are 1, or multiples of 16) and compile such a launch once more.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch

from triton_conv3d import engines
from triton_conv3d.engines.base import Config
from triton_conv3d.problem import Problem

from . import machine_code
from .disassembly import Report, read

_ROOT = Path(__file__).resolve().parent.parent
_COMMAND = (sys.executable, "-W", "ignore", "-m", "perf.compiling")
_INT32_LIMIT = 2**31  # Triton passes larger numbers as 64-bit ones

Variant = tuple  # hashable: what a kernel is compiled for


@dataclass(frozen=True)
class Kernel:
    """The kernel that this launch of an engine, given by its name, starts as its ``index``-th."""

    problem: Problem
    engine: str
    config: Config
    index: int


@dataclass(frozen=True)
class Compiled:
    """What became of a kernel, and what of it must not be."""

    report: Report
    faults: tuple[str, ...]


def variants(problem: Problem, engine: ModuleType, config: Config) -> list[Variant]:
    """The variant of each kernel that this launch would start, in their order. No tensor is allocated."""
    return [
        (problem.arch, kernel.__name__, tuple(map(_kind, args)), tuple((name, str(v)) for name, v in options.items()))
        for kernel, args, options in machine_code.launches(problem, machine_code.operands_of(problem), engine, config)
    ]


def _kind(argument) -> object:
    if isinstance(argument, tuple):
        return tuple(map(_kind, argument))
    if isinstance(argument, int):
        return "i32" if -_INT32_LIMIT <= argument < _INT32_LIMIT else "i64"
    if hasattr(argument, "block_shape"):  # a descriptor, Triton's or Gluon's
        return str(argument.base.dtype), tuple(argument.block_shape)
    return str(argument.dtype) if isinstance(argument, torch.Tensor) else argument


def compiled(kernels: Sequence[Kernel], processes: int) -> Iterator[Compiled | str]:
    """Compile kernels; yields in their order what became of each, or why nothing did.

    Raises:
        RuntimeError: a process ended before its work was done.
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    workers: list[subprocess.Popen] = []
    with contextlib.ExitStack() as stack:
        for first in range(min(processes, len(kernels))):
            worker = stack.enter_context(subprocess.Popen(_COMMAND, cwd=_ROOT, env=environment, **pipes))
            stack.callback(worker.kill)
            workers.append(worker)
            with contextlib.suppress(BrokenPipeError):  # it ended early: its answers will be missed
                pickle.dump(kernels[first::processes], worker.stdin)
                worker.stdin.close()
        for index in range(len(kernels)):
            worker = workers[index % processes]
            answer = worker.stdout.readline()
            if not answer:
                raise RuntimeError(f"a compiling process ended early, with status {worker.wait()}")
            found = json.loads(answer)
            yield found if isinstance(found, str) else Compiled(Report(**found[0]), tuple(found[1]))


def _work() -> None:
    """A compiling process: kernels on stdin, pickled, and an answer a line on stdout."""
    for kernel in pickle.load(sys.stdin.buffer):
        print(json.dumps(_compile(kernel)), flush=True)


def _compile(kernel: Kernel) -> tuple[dict, list[str]] | str:
    problem, engine, config, index = kernel.problem, engines.get(kernel.engine), kernel.config, kernel.index
    try:
        with machine_code.compiling_for(problem.arch):
            launch = machine_code.launches(problem, machine_code.operands_of(problem), engine, config)[index]
            report = read(problem, engine, config, *machine_code.compiled(launch))
    except Exception as error:  # of whatever kind: the other kernels are still wanted
        return f"{type(error).__name__}: {error}"
    return dataclasses.asdict(report), report.faults()


if __name__ == "__main__":
    _work()
