"""The user's cache of measured plans: one small JSON file for every problem in every environment.

A file is used only if it is whole (checksum), written by this user and about exactly the problem and environment asked
for; everything else is a miss, with one warning a process, and is overwritten by the next measurement. Writers need no
lock: each writes a temporary file and moves it into place, so that the last one wins and readers see whole files.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from ..problem import ACTIVATIONS, PASSES, Problem
from . import proof, quarantine, storage
from .storage import canonical, warn_once

SCHEMA = 2  # 1 knew no residual and no activation
MAX_BYTES = 64 * 1024  # of an entry; they have about 1.5 KiB
MAX_EXPORT_BYTES = 64 * 1024 * 1024
_NAME = re.compile(r"[0-9a-f]{64}\.json")
_TEMPORARY = re.compile(r"[0-9a-f]+" + re.escape(storage.TEMPORARY))


@dataclass(frozen=True)
class Entry:
    """One measured plan, with everything that it is valid for. All values are plain.

    Attributes:
        problem: as :meth:`Problem.to_dict`. environment: as :func:`.environment.environment`.
        policy: how it was measured.
        engine, config: the winner; to be used only through :func:`.plan.offered`.
        time_us, aten_us: microseconds of the winner and of torch's own convolution, if that was measured.
        candidates: how many plans were measured.
    """

    problem: dict
    environment: dict
    policy: dict
    engine: str
    config: dict
    time_us: float
    aten_us: float | None
    candidates: int

    @property
    def times(self) -> dict[str, float | None]:
        return {"time_us": self.time_us, "aten_us": self.aten_us}

    def to_dict(self) -> dict:
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    @classmethod
    def from_dict(cls, values: object) -> Entry:
        """Raises ValueError for anything that is not an entry; the config is not judged here."""
        names = {field.name for field in dataclasses.fields(cls)}
        if not isinstance(values, dict) or set(values) != names:
            raise ValueError("not an entry")
        entry = cls(**values)
        _check_problem(entry.problem)
        for name, value in (("environment", entry.environment), ("policy", entry.policy), ("config", entry.config)):
            if not isinstance(value, dict):
                raise ValueError(f"{name} is not an object")
        if not all(isinstance(value, str) for value in entry.environment.values()):
            raise ValueError("environment holds more than strings")
        if not isinstance(entry.engine, str):
            raise ValueError("engine is not a name")
        for name, value in entry.times.items():
            if not (type(value) is float and 0 < value < float("inf") or name == "aten_us" and value is None):
                raise ValueError(f"{name} is not a time")
        if type(entry.candidates) is not int or entry.candidates < 0:
            raise ValueError("candidates is not a count")
        return entry


_MODEL = Problem("forward", 1, 1, 1, (1, 1, 1), (1, 1, 1)).to_dict()


def _check_problem(values: object) -> None:
    """Raises ValueError unless these are the fields of a problem, each of its own type and in its range."""
    if not isinstance(values, dict) or set(values) != set(_MODEL):
        raise ValueError("not a problem of this schema")
    for name, model in _MODEL.items():
        items, models = (values[name], model) if isinstance(model, list) else ([values[name]], [model])
        if not isinstance(items, list) or list(map(type, items)) != list(map(type, models)):
            raise ValueError(f"{name} is not of its type")
        least = 1 if name in ("kernel_size", "stride", "dilation", "groups", "alignment") else 0
        if any(type(item) is int and item < least for item in items):
            raise ValueError(f"{name} is out of range")
    for name, known in (("pass_", PASSES), ("activation", ACTIVATIONS)):
        if values[name] not in known:
            raise ValueError(f"{name} is not known")


def checksum(values: object) -> str:
    """Of an entry as it stands in a file."""
    return hashlib.sha256(canonical([SCHEMA, values]).encode()).hexdigest()


def _sealed(entry: Entry) -> dict:
    times = {name: value if value is None else float(value) for name, value in entry.times.items()}
    values = Entry.from_dict({**entry.to_dict(), **times}).to_dict()
    return {"schema": SCHEMA, "checksum": checksum(values), "entry": values}


def _unsealed(values: object) -> Entry:
    if not isinstance(values, dict) or set(values) != {"schema", "checksum", "entry"}:
        raise ValueError("not an entry of the plan cache")
    if canonical(values["schema"]) != canonical(SCHEMA):
        raise ValueError("another schema")
    if values["checksum"] != checksum(values["entry"]):
        raise ValueError("the checksum does not fit")
    return Entry.from_dict(values["entry"])


def encode(entry: Entry) -> bytes:
    """The content of an entry's file. Raises ValueError or TypeError for values that no file may hold."""
    return canonical(_sealed(entry)).encode() + b"\n"


def decode(data: bytes) -> Entry:
    """The entry of a file's content. Raises ValueError, and nothing else, for any other bytes."""
    try:
        return _unsealed(storage.parse(data))
    except RecursionError:  # on the way back to text, which the checksum needs
        raise ValueError("nested too deeply") from None


def pack(entries: Iterable[Entry]) -> bytes:
    """Many entries as one content, for :func:`unpack`."""
    sealed = [canonical(_sealed(entry)) for entry in entries]
    return f'{{"schema":{SCHEMA},"plans":[\n'.encode() + ",\n".join(sealed).encode() + b"\n]}\n"


def unpack(data: bytes) -> tuple[list[Entry], Counter]:
    """The entries, and how many were left out for which reason. Raises ValueError, and nothing else, for other bytes."""
    content = storage.parse(data)
    if not isinstance(content, dict) or set(content) != {"schema", "plans"}:
        raise ValueError("not an export of the plan cache")
    if canonical(content["schema"]) != canonical(SCHEMA):
        raise ValueError("another schema")
    if not isinstance(content["plans"], list):
        raise ValueError("not an export of the plan cache")
    entries, skipped = [], Counter()
    for values in content["plans"]:
        try:
            entries.append(_unsealed(values))
        except (ValueError, RecursionError) as error:
            skipped[str(error)] += 1
    return entries, skipped


def file_name(problem: dict, environment: dict) -> str:
    """A hash of the whole key, nothing else."""
    return hashlib.sha256(canonical([SCHEMA, problem, environment]).encode()).hexdigest() + ".json"


@dataclass(frozen=True)
class ImportReport:
    """What became of plans from elsewhere: entries added, and how many were skipped for which reason."""

    added: int = 0
    skipped: dict[str, int] = field(default_factory=dict)


class PlanCache:
    """Measured plans in a directory of this user; ``None`` keeps nothing. Its methods never raise OSError, but for
    :meth:`export`, whose file the caller names."""

    def __init__(self, directory: Path | None):
        self.directory = None if directory is None else Path(directory)
        self._swept = False

    def load(self, problem: Problem, environment: dict) -> Entry | None:
        """The entry of exactly this problem in exactly this environment."""
        if self.directory is None:
            return None
        key = problem.to_dict()
        return self._read(self.directory / file_name(key, environment))

    def store(self, entry: Entry) -> bool:
        """Keep an entry in place of an older one; False, with one warning a process, if it cannot be kept."""
        if self.directory is None:
            return False
        try:
            data = encode(entry)
            if len(data) > MAX_BYTES:
                raise ValueError(f"an entry of {len(data)} bytes")
            storage.keep(self.directory / file_name(entry.problem, entry.environment), data)
        except (OSError, ValueError, TypeError) as error:
            warn_once("cache-write", f"measured plans are kept in memory only, not in {self.directory}: {error}")
            return False
        self._sweep()
        return True

    def entries(self) -> Iterator[tuple[Path, Entry]]:
        """Every readable entry with its file, in the order of the files' names."""
        for path in self._files(_NAME):
            entry = self._read(path)
            if entry is not None:
                yield path, entry

    def clear(self) -> int:
        """Delete all plans, damaged ones too, what ended processes, what was found of engines on trial, and temporary files;
        the number of plans deleted."""
        for pattern in (_TEMPORARY, quarantine.NAME, proof.NAME):
            for path in self._files(pattern):
                storage.discard(path)
        return sum(map(storage.discard, self._files(_NAME)))

    def export(self, path: str | os.PathLike) -> int:
        """Write all plans into one file for :meth:`import_`; their number. Raises OSError if it cannot be written."""
        path = Path(path)
        if path.exists() and not path.is_file():
            raise OSError(f"{path} is not a regular file")
        entries = [entry for _, entry in self.entries()]
        storage.write(path, pack(entries))
        return len(entries)

    def import_(self, path: str | os.PathLike) -> ImportReport:
        """Add the plans of an exported file. One that is already here stays, unless it was the best of fewer candidates,
        or of as many and slower."""
        try:
            entries, skipped = unpack(storage.read(path, MAX_EXPORT_BYTES, private=False))
        except (OSError, ValueError) as error:
            return ImportReport(skipped={f"the file: {error}": 1})
        added = 0
        for entry in entries:
            known = self.load(Problem.from_dict(entry.problem), entry.environment)
            if known is not None and (known.candidates, -known.time_us) >= (entry.candidates, -entry.time_us):
                skipped["already in the cache"] += 1
            elif self.store(entry):
                added += 1
            else:
                skipped["it could not be stored"] += 1
        return ImportReport(added, dict(skipped))

    def _read(self, path: Path) -> Entry | None:
        """The entry whose key gives this file's name."""
        try:
            storage.check_directory(self.directory)
            entry = decode(storage.read(path, MAX_BYTES, private=True))
            if file_name(entry.problem, entry.environment) != path.name:
                raise ValueError("it describes another problem or environment")
            return entry
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            warn_once("cache-read", f"plan cache: {path} is ignored: {error}")
            return None

    def _files(self, pattern: re.Pattern) -> list[Path]:
        if self.directory is None:
            return []
        try:
            storage.check_directory(self.directory)
            return sorted(self.directory / name for name in os.listdir(self.directory) if pattern.fullmatch(name))
        except FileNotFoundError:
            return []
        except (OSError, ValueError) as error:
            warn_once("cache-read", f"plan cache: {self.directory} is ignored: {error}")
            return []

    def _sweep(self) -> None:
        if not self._swept:
            self._swept = True
            try:
                storage.sweep(self.directory)
            except OSError:  # only tidiness: the plan is stored
                pass
