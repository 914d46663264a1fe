"""Commands in processes of their own, ended with all that they started when their time is up."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
_TAIL = 400  # characters of the output that are kept of a crash
_running: set[subprocess.Popen] = set()


@dataclass(frozen=True)
class Done:
    """Exit status and output, standard error included, of a process that ended by itself."""

    status: int
    output: str

    @property
    def tail(self) -> str:
        return f"exit status {self.status}: {self.output.strip()[-_TAIL:]}"


def run(command: list[str], limit: float, **environment: str) -> Done | None:
    """Run a command in the project's root; None if it was ended, after ``limit`` seconds or by :func:`end_all`."""
    process = subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, **environment}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, errors="replace", start_new_session=True,
    )  # fmt: skip
    _running.add(process)
    try:
        output, _ = process.communicate(timeout=limit)
        return Done(process.returncode, output) if process in _running else None
    except subprocess.TimeoutExpired:
        return None
    finally:
        _end(process)
        process.communicate()
        _running.discard(process)


def end_all() -> None:
    """End everything that runs."""
    while _running:
        _end(_running.pop())


def _end(process: subprocess.Popen) -> None:
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):  # it has just ended by itself
            os.killpg(process.pid, signal.SIGKILL)
