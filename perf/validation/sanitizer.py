"""correctness.sanitizer: cases of the fuzzer under NVIDIA's compute-sanitizer."""

from __future__ import annotations

import functools
import shutil

from . import Outcome, Setting, Step, pytested

NAME = "correctness.sanitizer"
WHAT = "compute-sanitizer: memcheck of 48 cases a pass, the other tools 12"
WORKERS = 2  # each is many times slower than without
_TOOL = "compute-sanitizer"
_OPTIONS = {"memcheck": ["--padding", "4096"], "racecheck": [], "initcheck": [], "synccheck": []}
_SHARDS = 67  # of 900 cases about 13 each; a prime, so that a shard has as many of each pass
_TAKEN = {"memcheck": 12, "racecheck": 3, "initcheck": 3, "synccheck": 3}  # shards: 161 cases, and 40
_SECONDS = 150.0  # a shard, compiling included; an estimate


def unavailable() -> str | None:
    missing = None if shutil.which(_TOOL) else f"{_TOOL} is not on the PATH"
    return missing or pytested.unavailable()


def steps(setting: Setting) -> list[Step]:
    return [
        Step(f"{tool} {index}/{_SHARDS}", _SECONDS, functools.partial(_step, tool, f"{index}/{_SHARDS}"))
        for tool, count in _TAKEN.items()
        for index in range(count)
    ]


def _step(tool: str, shard: str, limit: float) -> Outcome | None:
    prefix = [_TOOL, "--tool", tool, *_OPTIONS[tool], "--error-exitcode", str(pytested.SANITIZER)]
    chosen = ["tests/test_fuzz.py", *pytested.EVERY_CASE, "--shard", shard]
    return pytested.run(chosen, limit, prefix, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
