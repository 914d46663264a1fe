"""Candidates that are left out: those that gave a wrong result in this process, and those that ended one.

A kernel that touches foreign memory, or never ends, takes its process with it, which can say no more. So while a candidate
runs for the first time, a small file beside the cached plans names it. Where its process has ended meanwhile, later ones in
the same environment leave it out. Nothing is locked, and without a directory nothing is kept.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import re
import secrets
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ..engines.base import Config
from ..problem import Problem
from . import storage
from .faults import is_illegal_access
from .storage import canonical

SCHEMA = 1
NAME = re.compile(r"[0-9a-f]{32}\.trial")
MAX_BYTES = 64 * 1024  # of a file; they have about 0.6 KiB

_left_out: dict[tuple[str, str], set[str]] = {}  # configs by (engine, architecture), of this process
_recalled: set[tuple[Path, str]] = set()  # (directory, environment) of which the files have been read


@dataclass(frozen=True)
class Trial:
    """A candidate while it runs for the first time.

    ``problem`` is text, for people. ``process`` is :func:`_process` of the one that runs it; None if it said itself that the
    candidate accessed memory illegally.
    """

    environment: dict[str, str]
    engine: str
    config: dict
    problem: str
    process: list[str] | None

    def __str__(self) -> str:
        return f"{self.engine} [{' '.join(f'{name}={value}' for name, value in self.config.items())}]"


def quarantined(engine: str, config: Config, arch: str) -> bool:
    """Whether this config is left out on this architecture."""
    if not _left_out or (configs := _left_out.get((engine, arch))) is None:  # most often so, and the rest takes its time
        return False
    return canonical(config.to_dict()) in configs


def leave_out(engine: str, config: dict, arch: str) -> None:
    """From now on, in this process."""
    _left_out.setdefault((engine, arch), set()).add(canonical(config))


@contextlib.contextmanager
def trial(
    directory: Path | None, environment: dict[str, str], problem: Problem, engine: str, config: Config
) -> Iterator[None]:
    """A candidate's first run, within the block. If the process ends in it, or by its illegal access, a file stays."""
    noted = Trial(environment, engine, config.to_dict(), str(problem), _process(os.getpid()))
    path = directory and Path(directory, secrets.token_hex(16) + ".trial")
    if path is None or not _written(path, noted):
        yield
        return
    try:
        yield
    except BaseException as error:
        if is_illegal_access(error):
            _written(path, dataclasses.replace(noted, process=None))
        else:
            storage.discard(path)
        raise
    storage.discard(path)


def recall(directory: Path | None, environment: dict[str, str]) -> None:
    """Leave out what ended a process in this environment. Files are read once; each is told of in one warning."""
    key = directory, canonical(environment)
    if directory is None or key in _recalled:
        return
    _recalled.add(key)
    for path, found in ended(directory):
        if found.environment == environment:
            leave_out(found.engine, found.config, environment["arch"])
            storage.warn_once(
                f"trial {path.name}",
                f"{found} ended a process while it was measured on {found.problem}, and is left out. Please report it; "
                "triton-conv3d cache clear forgets it",
            )


def ended(directory: Path | None) -> Iterator[tuple[Path, Trial]]:
    """What ended the process that ran it, with its file, in the order of the files' names."""
    for path in files(directory):
        with contextlib.suppress(OSError, ValueError):  # removed meanwhile, damaged or foreign: nothing that counts
            found = _parsed(storage.read(path, MAX_BYTES, private=True))
            if _has_ended(found.process, path):
                yield path, found


def files(directory: Path | None) -> list[Path]:
    """Of all trials, running ones too."""
    return storage.listed(directory, NAME)


def _written(path: Path, trial: Trial) -> bool:
    try:
        # What is read after the process has ended, and not the machine, need not be on the disk.
        storage.keep(path, canonical({"schema": SCHEMA, **vars(trial)}).encode(), durable=False)
    except (OSError, ValueError, TypeError):
        return False
    return True


def _parsed(data: bytes) -> Trial:
    """Raises ValueError for anything that is no trial of this schema."""
    values = storage.parse(data)
    if not isinstance(values, dict) or canonical(values.pop("schema", None)) != canonical(SCHEMA):
        raise ValueError("another schema")
    if set(values) != set(Trial.__dataclass_fields__):
        raise ValueError("not a trial")
    process = values["process"]
    plain = isinstance(values["environment"], dict) and isinstance(values["config"], dict)
    if not plain or not (process is None or isinstance(process, list) and len(process) == 3):
        raise ValueError("not a trial")
    if not all(isinstance(text, str) for text in (values["engine"], values["problem"], *(process or ()))):
        raise ValueError("not a trial")
    return Trial(**values)


def _has_ended(process: list[str] | None, path: Path) -> bool:
    """Where that cannot be seen (another machine or container, or before a restart), no trial takes an hour."""
    if process is None:
        return True
    place, number, _ = process
    if place and place == _place():
        return _process(number) != process
    return time.time() - path.stat().st_mtime > storage.STALE_SECONDS


def _process(number: int | str) -> list[str]:
    """[where it runs, its number, when it began]; the last is empty where there is no such process any more."""
    try:
        state, *rest = Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()  # proc(5)
        began = "" if state in "ZX" else rest[18]  # a zombie runs no more
    except (OSError, IndexError, ValueError):
        began = ""
    return [_place(), str(number), began]


@functools.cache
def _place() -> str:
    """Within what process numbers are looked up: a start of the machine, and a namespace. Empty where nothing tells."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + " " + os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""
