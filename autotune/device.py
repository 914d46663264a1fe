"""The GPU that a sweep runs on."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import torch

from triton_conv3d.problem import Problem
from triton_conv3d.tuning import measure
from triton_conv3d.tuning.select import ranking

from .suites import Case


class NoGPU(Exception):
    """Nothing can be measured here; the message says what can be done instead."""


def find() -> torch.device:
    """Raises :class:`NoGPU` where torch sees none."""
    if not torch.cuda.is_available():
        raise NoGPU(
            "torch sees no GPU, so nothing can be measured. Without one, sweeps made elsewhere can be merged, analyzed, "
            "fitted and exported, and a sweep can be planned: add --dry-run"
        )
    return torch.device("cuda", torch.cuda.current_device())


def benches(cases: dict[Problem, Case], device: torch.device) -> Callable[[Problem], measure.Bench | None]:
    """What opens the bench of a problem; None where the problem does not fit into memory."""

    def open_bench(problem: Problem) -> measure.Bench | None:
        try:
            _, operands = cases[problem].on(device)
            return measure.Bench(problem, operands, measure.own(ranking(problem, measuring=True)))
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            return None

    return open_bench


def commit() -> str:
    """Of the repository that this file stands in; ``unknown`` outside one."""
    command = ["git", "describe", "--always", "--dirty=+", "--abbrev=12", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return done.stdout.strip() or "unknown"
