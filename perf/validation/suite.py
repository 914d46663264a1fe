"""correctness.tests: the project's tests on this GPU, every engine x config x dtype x layout among them."""

from __future__ import annotations

import functools

from . import Setting, Step, pytested

NAME = "correctness.tests"
WHAT = "the project's tests on the GPU: every engine, config, dtype and layout"
WORKERS = pytested.WORKERS
_SHARDS = {"test_engines.py": 32, "test_fuzz.py": 16}  # of the files that compile most; the others are one step each
_SECONDS = {"test_engines.py": 90.0, "test_fuzz.py": 90.0}  # of a shard, compiling included; estimates
_OTHER_SECONDS = 60.0
unavailable = pytested.unavailable


def steps(setting: Setting) -> list[Step]:
    found = []
    for path in sorted(pytested.TESTS.glob("test_*.py")):
        count = _SHARDS.get(path.name, 1)
        for index in range(count):
            name = path.name if count == 1 else f"{path.name} {index}/{count}"
            arguments = [f"tests/{path.name}", "--shard", f"{index}/{count}"]
            seconds = _SECONDS.get(path.name, _OTHER_SECONDS)
            found.append(Step(name, seconds, functools.partial(pytested.run, arguments)))
    return found
