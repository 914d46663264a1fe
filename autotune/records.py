"""Sweep files: JSON lines, a header and then one line for each measurement, each on disk before the next begins.

    {"schema": 1, "environment": {...}, "policy": {...}, "commit": "...", "created": "..."}
    {"problem": {...}, "engine": "...", "config": {...}, "seconds": 1.2e-4, "fault": null}

A file only grows. A last line that was cut off is dropped when the sweep goes on, so that a kill loses at most the
measurement that was under way. Of two lines about one candidate the later counts.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from triton_conv3d.problem import Problem
from triton_conv3d.tuning import storage
from triton_conv3d.tuning.storage import canonical

SCHEMA = 1
MAX_BYTES = 2**31
BINDING = ("gpu", "arch", "engines", "torch", "triton", "driver", "cudnn")  # that all times of a file have in common
WRONG, FAILED = "wrong", "failed"
_HEADER = {"schema", "environment", "policy", "commit", "created"}
_LINE = {"problem", "engine", "config", "seconds", "fault"}

Key = tuple[str, str]  # engine, canonical config


class Refused(ValueError):
    """A file that is no sweep of this schema, or of another GPU or other sources; the message says why."""


@dataclass(frozen=True)
class Record:
    """One candidate of one problem: its seconds, or why there are none (``wrong`` or ``failed``)."""

    problem: dict
    engine: str
    config: dict
    seconds: float | None
    fault: str | None = None

    @property
    def key(self) -> Key:
        return self.engine, canonical(self.config)

    def line(self) -> str:
        return canonical({name: getattr(self, name) for name in _LINE}) + "\n"


@dataclass
class Sweep:
    """A sweep file in memory.

    Attributes:
        header: ``environment``, ``policy``, ``commit`` and ``created``.
        records: by :attr:`Problem.key` and :attr:`Record.key`.
        problems: by key.
        wrong: candidates that gave a wrong result on some problem: they are not measured on any other.
        end: bytes of the file that are whole lines.
    """

    header: dict
    records: dict[str, dict[Key, Record]] = field(default_factory=dict)
    problems: dict[str, Problem] = field(default_factory=dict)
    wrong: set[Key] = field(default_factory=set)
    end: int = 0

    @property
    def environment(self) -> dict[str, str]:
        return self.header["environment"]

    def add(self, record: Record) -> None:
        problem = Problem.from_dict(record.problem)
        self.problems[problem.key] = problem
        self.records.setdefault(problem.key, {})[record.key] = record
        if record.fault == WRONG:
            self.wrong.add(record.key)

    def of(self, problem: Problem) -> dict[Key, Record]:
        return self.records.get(problem.key, {})

    def times(self, problem: Problem) -> dict[Key, float]:
        """Seconds of everything that was measured and has never been wrong."""
        return {k: r.seconds for k, r in self.of(problem).items() if r.seconds is not None and k not in self.wrong}

    def __len__(self) -> int:
        return sum(map(len, self.records.values()))


def header(environment: dict[str, str], policy: dict, commit: str, created: str) -> dict:
    return {"schema": SCHEMA, "environment": environment, "policy": policy, "commit": commit, "created": created}


def why_refused(mine: dict[str, str], other: dict[str, str]) -> str | None:
    """Why times of another environment may not join; None if they may."""
    for name in BINDING:
        if mine.get(name) != other.get(name):
            return f"it was measured with {name} {other.get(name)!r}, here it is {mine.get(name)!r}"
    return None


def read(path: Path) -> Sweep:
    """A sweep file, without a last line that was cut off. Raises OSError; :class:`Refused`, saying why and where."""
    try:
        data = storage.read(path, MAX_BYTES, private=False)
    except ValueError as error:
        raise Refused(f"{path}: {error}") from None
    *lines, _ = data.split(b"\n")  # what follows the last end of line is not a whole one
    if not lines:
        raise Refused(f"{path}: the header is cut off: nothing was measured; delete it to begin anew")
    sweep = Sweep(_header(path, lines[0]))
    for number, line in enumerate(lines[1:], 2):
        try:
            sweep.add(_record(storage.parse(line)))
        except (ValueError, TypeError) as error:
            raise Refused(f"{path}: line {number} is damaged: {error}") from None
    sweep.end = len(data) - len(data.rpartition(b"\n")[2])
    return sweep


def _header(path: Path, line: bytes) -> dict:
    try:
        values = storage.parse(line)
    except ValueError as error:
        raise Refused(f"{path}: no sweep: {error}") from None
    if not isinstance(values, dict) or "schema" not in values:
        raise Refused(f"{path}: no sweep: the first line is no header")
    if canonical(values["schema"]) != canonical(SCHEMA):
        raise Refused(f"{path}: schema {values['schema']!r}, expected {SCHEMA}")
    if set(values) != _HEADER or not isinstance(values["environment"], dict):
        raise Refused(f"{path}: the header's fields are {', '.join(sorted(_HEADER))}")
    texts = {name: values[name] for name in ("commit", "created")} | values["environment"]
    wrong = [name for name in {*texts, *BINDING} if not isinstance(texts.get(name), str)]
    if wrong or not isinstance(values["policy"], dict):
        raise Refused(f"{path}: {', '.join(sorted(wrong)) or 'policy'} in the header is missing or of another type")
    return values


def _record(values: object) -> Record:
    if not isinstance(values, dict) or set(values) != _LINE:
        raise ValueError(f"the fields are {', '.join(sorted(_LINE))}")
    record = Record(**values)
    if not (isinstance(record.engine, str) and isinstance(record.config, dict) and isinstance(record.problem, dict)):
        raise ValueError("engine, config or problem is of another type")
    timed = type(record.seconds) is float and record.seconds > 0 and record.fault is None
    if not timed and not (record.seconds is None and record.fault in (WRONG, FAILED)):
        raise ValueError("neither a time nor a fault")
    return record


class Begun:
    """What was being compiled when the process ended, and how often: JSON beside a sweep file, gone where nothing is."""

    def __init__(self, path: Path):
        self._path = path.with_name(path.name + ".begun")
        try:
            self._times = storage.parse(storage.read(self._path, MAX_BYTES, private=False))
        except (OSError, ValueError):  # nothing, or damaged: counted anew
            self._times = {}
        if not isinstance(self._times, dict) or not all(type(times) is int for times in self._times.values()):
            self._times = {}

    def times(self, what: str) -> int:
        """How often it was begun and not ended."""
        return self._times.get(what, 0)

    def begin(self, what: str) -> None:
        self._times[what] = self.times(what) + 1
        storage.write(self._path, canonical(self._times).encode())

    def end(self, what: str) -> None:
        self._times.pop(what, None)
        if self._times:
            storage.write(self._path, canonical(self._times).encode())
        else:
            storage.discard(self._path)


class Writer:
    """Appends to a sweep file; every :meth:`add` returns when its line is on disk."""

    def __init__(self, path: Path, fresh: dict):
        """A new file begins with the header ``fresh``; one that goes on is cut behind its last whole line.

        Raises:
            OSError: it cannot be read or written. Refused: it holds another environment's times, or another process is
                writing to it; the message says which.
        """
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115
        try:
            _lock(self._file, path)
            self.begun = Begun(path)
            if os.fstat(self._file.fileno()).st_size:
                self.sweep = read(path)
                reason = why_refused(fresh["environment"], self.sweep.environment)
                if reason:
                    raise Refused(f"{path} cannot go on: {reason}; give --out another file")
                self._file.truncate(self.sweep.end)
            else:
                self.sweep = Sweep(fresh)
                self._put(canonical(fresh) + "\n")
        except BaseException:
            self._file.close()
            raise

    def add(self, record: Record) -> None:
        self._put(record.line())
        self.sweep.add(record)

    def _put(self, text: str) -> None:
        rest = memoryview(text.encode())
        while rest:
            rest = rest[self._file.write(rest) :]
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *_) -> None:
        self.close()


def _lock(file: BinaryIO, path: Path) -> None:
    """Two processes would disturb each other's times. The lock ends with the process, however that ends."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise Refused(f"{path}: another process is sweeping into it") from None
    except OSError:  # a file system that has no locks
        pass


def merged(sweeps: Sequence[Sweep]) -> Sweep:
    """One sweep of several, of the same environment; of two times of one candidate that of the later file counts.

    Raises:
        Refused: environments differ; the message says in what.
    """
    ordered = sorted(sweeps, key=lambda sweep: sweep.header["created"])
    result = Sweep(ordered[-1].header)
    for sweep in ordered:
        reason = why_refused(result.environment, sweep.environment)
        if reason:
            raise Refused(f"the sweep of {sweep.header['created']} cannot be merged: {reason}")
        for of in sweep.records.values():
            for record in of.values():
                result.add(record)
    return result


def write(path: Path, sweep: Sweep) -> None:
    """A whole sweep at once. Raises OSError."""
    lines: Iterable[str] = (record.line() for of in sweep.records.values() for record in of.values())
    storage.write(path, (canonical(sweep.header) + "\n" + "".join(lines)).encode())
    os.chmod(path, 0o644)
