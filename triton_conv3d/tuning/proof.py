"""Whether an engine on trial works on the GPU at hand: a process of its own finds out, once.

A kernel that touches foreign memory, or never ends, takes its process with it. So an engine that has never run on a GPU
(``TRIAL``) is measured in no process before ``triton-conv3d try`` has run it in another one. What that found is kept beside
the plans, for this GPU and these versions. Nothing is locked: processes that begin together each find out.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import signal
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

from . import storage
from .progress import progress
from .storage import canonical

SCHEMA = 1
NAME = re.compile(r"[0-9a-f]{64}\.proof")
# What `triton-conv3d try` prints: between compiling, which may take long, and launching, which must not; before how it failed.
RUNNING, FAILED = "running", "failed: "
SECONDS = 300  # for both: some 30 kernels are compiled
SILENT = 60  # seconds without a line, while kernels of less than one run, after which one of them never ends
_MAX_BYTES = 64 * 1024  # of a file; they have about 0.5 KiB
_LONGEST = 1000  # characters of a reason that are kept
_CRASHES = (signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL)
_PYTHON = re.compile(r"(python|pypy)[\d.]*t?(\.exe)?", re.IGNORECASE)  # not of a program that has Python inside
_MPS = "/tmp/nvidia-mps"  # where NVIDIA's Multi-Process Service has its pipes, unless CUDA_MPS_PIPE_DIRECTORY says otherwise
_PATH = str(Path(__file__).resolve().parent.parent.parent)


@dataclass(frozen=True)
class Proof:
    """What came of a trial; ``failure`` says how it failed, None that all was right."""

    engine: str
    environment: dict[str, str]
    failure: str | None


class Outcome(NamedTuple):
    """Of an attempt: whether it tells anything, and how the engine failed, or why nothing is told."""

    conclusive: bool
    reason: str | None


_RIGHT, _UNKNOWN = Outcome(True, None), Outcome(False, None)
_found: dict[tuple[str, str], Outcome] = {}  # by engine and GPU


def outcome(engine: str, gpu: str) -> Outcome:
    """What this process knows of the engine on a GPU of this name."""
    return _found.get((engine, gpu), _UNKNOWN)


def works(engine: str, gpu: str) -> bool:
    return outcome(engine, gpu) == _RIGHT


def find_out(engine: str, index: int, environment: dict[str, str], directory: Path | None) -> None:
    """Have :func:`outcome` know: by an earlier trial's file, or else by a trial, which may take minutes.

    Args:
        index: of the GPU, as torch counts.
        environment: of this GPU; a file of another one says nothing.
        directory: of the plans; None: nothing is kept.
    """
    key = engine, environment["gpu"]
    if key in _found:
        return
    path = directory and Path(directory, _file_name(engine, environment))
    proof = path and _read(path)
    found = Outcome(True, proof.failure) if proof else _try(engine, index)
    if proof is None and found.conclusive:
        _write(path, Proof(engine, environment, found.reason))
    _found[key] = found
    if found.conclusive and found.reason is not None:
        storage.warn_once(
            f"proof {engine} {key[1]}",
            f"the engine {engine} failed its trial on {key[1]} and is left out: {found.reason}. Please report it; "
            "triton-conv3d cache clear forgets it",
        )


def kept(directory: Path | None) -> list[Proof]:
    """Every proof that can be read, in the order of the files' names."""
    return [proof for path in storage.listed(directory, NAME) if (proof := _read(path)) is not None]


def _file_name(engine: str, environment: dict[str, str]) -> str:
    return hashlib.sha256(canonical([SCHEMA, engine, environment]).encode()).hexdigest() + ".proof"


def _read(path: Path) -> Proof | None:
    """The proof that gives a file its name; None if there is none, or it is damaged or foreign."""
    try:
        storage.check_directory(path.parent)
        values = storage.parse(storage.read(path, _MAX_BYTES, private=True))
    except (OSError, ValueError):
        return None
    if not isinstance(values, dict) or canonical(values.pop("schema", None)) != canonical(SCHEMA):
        return None
    if set(values) != set(Proof.__dataclass_fields__):
        return None
    proof = Proof(**values)
    if not isinstance(proof.engine, str) or not (proof.failure is None or isinstance(proof.failure, str)):
        return None
    names = proof.environment
    if not isinstance(names, dict) or not all(isinstance(value, str) for value in names.values()):
        return None
    return proof if path.name == _file_name(proof.engine, names) else None


def _write(path: Path | None, proof: Proof) -> None:
    if path is None:
        return
    try:
        storage.keep(path, canonical({"schema": SCHEMA, **asdict(proof)}).encode())
    except (OSError, ValueError) as error:
        storage.warn_once("cache-write", f"what was measured is kept in memory only, not in {path.parent}: {error}")


def _command(engine: str, index: int) -> list[str]:
    """Of a process that finds this very package, and nothing in its working directory."""
    paths = [path for path in sys.path if isinstance(path, str) and path]
    program = f"import sys; sys.path[:] = {[*paths, _PATH]!r}\n"
    program += "from triton_conv3d.__main__ import main; sys.exit(main(sys.argv[1:]))"
    return [sys.executable, "-c", program, "try", engine, "--device", str(index)]


def _try(engine: str, index: int) -> Outcome:
    if not _PYTHON.fullmatch(Path(sys.executable or "").name):
        return Outcome(False, f"{sys.executable!r} is no Python that could be started")
    if os.path.exists(os.environ.get("CUDA_MPS_PIPE_DIRECTORY", _MPS)):
        return Outcome(False, "a fault of a process is one of all that share a GPU by NVIDIA's MPS")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_CONV3D_")}
    pipe = subprocess.PIPE
    try:
        child = subprocess.Popen(_command(engine, index), stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, env=environment)
    except OSError as error:
        return Outcome(False, str(error))
    try:
        out, err, silent = _output(child, f"trying the engine {engine} in a process of its own")
        status = child.poll()
    finally:
        child.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):  # a kernel that never ends may hold it for a while
            child.wait(timeout=5)
    if status == 0:
        return _RIGHT
    if status == 1 and out and out[-1].startswith(FAILED):
        return Outcome(True, out[-1].removeprefix(FAILED)[:_LONGEST])
    if status is None:
        return Outcome(silent, f"a kernel did not end within {SILENT} s" if silent else f"it did not end within {SECONDS} s")
    if -status in _CRASHES:
        return Outcome(True, f"{signal.Signals(-status).name} ended its process")
    return Outcome(False, err[-1][:_LONGEST] if err else f"its process ended with status {status}")


def _output(child: subprocess.Popen, title: str) -> tuple[list[str], list[str], bool]:
    """Lines of stdout and of stderr, as far as they came within the time; whether no more came while kernels ran."""
    out, err, since, silent = b"", b"", 0, False
    with progress(title, SECONDS) as step:
        for second in range(SECONDS):
            try:
                out, err = child.communicate(timeout=1)
                break
            except subprocess.TimeoutExpired as late:
                before, out, err = out, late.stdout or b"", late.stderr or b""
                since = second if out != before else since
                silent = RUNNING in _lines(out) and second - since >= SILENT
                if silent:
                    break
                step()
    return _lines(out), _lines(err), silent


def _lines(written: bytes) -> list[str]:
    return list(filter(None, written.decode(errors="replace").split("\n")))
