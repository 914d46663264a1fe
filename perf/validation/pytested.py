"""The project's own tests as steps: pytest in a process of its own, its report read back."""

from __future__ import annotations

import importlib.util
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

from ..results import FAILED, OK, WRONG
from . import Outcome, process

TESTS = process.ROOT / "tests"
WORKERS = max(1, min(8, (os.cpu_count() or 1) // 2))  # each compiles on one core, with torch's threads beside it
_THREADS = str(max(1, (os.cpu_count() or 1) // WORKERS))  # of torch's, or each worker has as many as there are cores
_NOTHING_COLLECTED = 5  # pytest's exit status
EVERY_CASE = ("--cases", "0")  # of the project's own tests: on a GPU they run some of every test by default
_NAMED = 5  # failing tests that a reason names
SANITIZER = 99  # exit status asked for where a sanitizer reports something


def unavailable() -> str | None:
    if not TESTS.is_dir():
        return f"{TESTS} is not there"
    return None if importlib.util.find_spec("pytest") else "pytest is not installed"


def run(
    arguments: Sequence[str], limit: float, prefix: Sequence[str] = (), **environment: str
) -> Outcome | None:
    """What pytest finds with these arguments; None if ``limit`` seconds were not enough.

    Args:
        prefix: a command that pytest is run by, such as a sanitizer with its options.
        environment: more variables.
    """
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        options = ["-q", "-p", "no:cacheprovider", "-p", "perf.shard", f"--junitxml={report}"]
        command = [*prefix, sys.executable, "-m", "pytest", *options, *arguments]
        done = process.run(command, limit, OMP_NUM_THREADS=_THREADS, **environment)
        if done is None:
            return None
        counts, failing = _read(report) if report.exists() else (0, [])
    if failing:
        more = f" and {len(failing) - _NAMED} more" if len(failing) > _NAMED else ""
        return Outcome(WRONG, "; ".join(failing[:_NAMED]) + more, counts)
    if done.status not in (0, _NOTHING_COLLECTED):
        return Outcome(WRONG if prefix and done.status == SANITIZER else FAILED, done.tail, counts)
    return Outcome(OK, "", counts)


def _read(report: Path) -> tuple[int, list[str]]:
    """(tests that ran, what failed) of a JUnit report."""
    cases = ElementTree.parse(report).getroot().findall(".//testcase")
    failing = []
    for case in cases:
        for kind in ("failure", "error"):
            fault = case.find(kind)
            if fault is not None:
                lines = (fault.get("message") or "").strip().splitlines()
                failing.append(f"{case.get('name')}: {(lines or [kind])[0][:160]}")
    return sum(case.find("skipped") is None for case in cases), failing
