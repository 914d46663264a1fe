"""One step in a process of its own: a kernel that reads outside its tensors takes the whole device context with it.

    python -m perf.validation.child MODULE STEP    prints the outcome of ``MODULE.compute(STEP)`` as its last line
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import sys

from ..results import FAILED
from . import Outcome, process


def step(module: str, name: str, limit: float) -> Outcome | None:
    """The outcome of ``module.compute(name)``; None if it was not done within ``limit`` seconds."""
    done = process.run([sys.executable, "-m", __name__, module, name], limit)
    if done is None:
        return None
    try:
        return Outcome(**json.loads(done.output.splitlines()[-1]))
    except (IndexError, ValueError, TypeError):
        return Outcome(FAILED, done.tail)


def main(module: str, name: str) -> None:
    print(json.dumps(dataclasses.asdict(importlib.import_module(module).compute(name))))


if __name__ == "__main__":
    main(*sys.argv[1:])
