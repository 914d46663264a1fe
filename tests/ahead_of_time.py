"""Test files that compile with no GPU, run as programs: the interpreter of the other tests cannot compile."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Of C, as Triton looks for it; None without Python's headers, which its launchers need.
COMPILER = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
COMPILER = COMPILER if Path(sysconfig.get_path("include"), "Python.h").is_file() else None


def run(*arguments: str, limit: float = 600.0) -> subprocess.CompletedProcess:
    """``python ARGUMENTS`` in the project's root, with a kernel cache of its own."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["CUDA_VISIBLE_DEVICES"] = ""  # a GPU that is there is not to be found
    paths = (str(ROOT), str(ROOT / "tests"), environment.get("PYTHONPATH", ""))
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    with tempfile.TemporaryDirectory() as cache:
        environment["TRITON_CACHE_DIR"] = cache
        command = [sys.executable, "-W", "ignore", *arguments]
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=limit)


def reports(file: str, *arguments: str) -> list[dict]:
    """What ``python FILE ARGUMENTS`` prints, a JSON object a line."""
    done = run(file, *arguments)
    assert done.returncode == 0, done.stderr[-3000:]
    return list(map(json.loads, done.stdout.splitlines()))


def print_first(wanted: Iterable[tuple]) -> None:
    """Print the reports of (architecture, layer, pass, text): of its first config with this text, if there is one."""
    from perf.machine_code import KEPT, configs
    from perf.machine_code import reports as compiled

    for arch, layer, pass_, text in wanted:

        def first(problem, engine):
            return [config for config in configs(problem, engine) if problem.pass_ == pass_ and text in str(config)][:1]

        dtype, precision = KEPT[layer.engine == "rounded"]  # which computes tf32 alone
        for report in compiled(arch, dtype, precision, layer, first):
            print(json.dumps(dataclasses.asdict(report)), flush=True)
