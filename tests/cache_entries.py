"""An entry of the plan cache for tests, and files that pretend to be one."""

from __future__ import annotations

from pathlib import Path

import torch

from triton_conv3d.problem import Problem
from triton_conv3d.tuning import cache, environment

PROBLEM = Problem("forward", 2, 3, 5, (7, 8, 9), (3, 3, 3), padding=(1, 1, 1, 1, 1, 1))
ENVIRONMENT = environment.environment(torch.device("cpu"))
CONFIG = {"channels_last": False, "benchmark": False}
ENTRY = cache.Entry(PROBLEM.to_dict(), ENVIRONMENT, {"mode": "quick", "budget_s": 0.5}, "aten", CONFIG, 12.5, None, 3)
DATA = cache.encode(ENTRY)
NAME = cache.file_name(ENTRY.problem, ENTRY.environment)


def planted(directory: Path, content: bytes, name: str = NAME) -> Path:
    """A file of this content that the cache takes for its own."""
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    path = directory / name
    path.write_bytes(content)
    path.chmod(0o600)
    return path
