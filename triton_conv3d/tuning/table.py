"""Tables: measured plans for one GPU model, shipped or the user's own; tables/README.md describes the format.

A table is looked up by the GPU's name in the user's directory and then in the shipped one. Its configs are hints: what
they were measured with stands in the table, and one runs only if its engine still offers it (:func:`.plan.offered`).
"""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass
from pathlib import Path

from ..problem import Problem
from . import storage
from .cache import Entry
from .storage import canonical, warn_once

SCHEMA = 2  # 1 knew no residual and no activation
MAX_BYTES = 64 * 1024 * 1024
SHIPPED = Path(__file__).resolve().parent / "tables"

# Octaves between two problems beyond which a measured config says nothing: a factor of 8 in one size, or of 2 in nine.
MAX_DISTANCE = 3.0

_PROVENANCE = ("gpu", "arch", "torch", "triton", "driver", "cudnn", "package", "engines")  # as in environment()
_BINDING = ("gpu", "arch", "engines")  # of these, what has to be the same for a table to be used
_PLAN = ("problem", "engine", "config", "time_us", "aten_us", "candidates")
_ALIKE = ("pass_", "dtype", "precision", "kernel_size", "stride", "dilation")
_SIZES = ("batch", "in_channels", "out_channels", "groups", "alignment")
_CHOICES = ("layouts", "padding", "bias", "residual", "activation", "index64")


@dataclass(frozen=True)
class Table:
    """The plans of one GPU model.

    Attributes:
        environment: what they were measured with, as :func:`.environment.environment`; its ``gpu`` and ``arch`` must
            be those of every problem.
        policy: how they were measured. commit: of the package, then. created: ISO 8601.
        entries: one for each problem.
    """

    environment: dict
    policy: dict
    commit: str
    created: str
    entries: tuple[Entry, ...]

    def to_dict(self) -> dict:
        header = {"schema": SCHEMA, **{name: self.environment[name] for name in _PROVENANCE}}
        header |= {"commit": self.commit, "created": self.created, "policy": self.policy}
        return {**header, "plans": [{name: entry.to_dict()[name] for name in _PLAN} for entry in self.entries]}

    @classmethod
    def from_dict(cls, values: object) -> Table:
        """Raises ValueError, saying what is wrong, for anything that :meth:`to_dict` would not have written."""
        if not isinstance(values, dict):
            raise ValueError("not a table")
        if canonical(values.get("schema")) != canonical(SCHEMA):
            raise ValueError(f"schema {values.get('schema')!r}, expected {SCHEMA}")
        names = {"schema", *_PROVENANCE, "commit", "created", "policy", "plans"}
        if set(values) != names:
            raise ValueError(f"fields {', '.join(sorted(set(values) ^ names))} are missing or unknown")
        for name in (*_PROVENANCE, "commit", "created"):
            if not isinstance(values[name], str):
                raise ValueError(f"{name} is not a string")
        if not isinstance(values["plans"], list):
            raise ValueError("plans is not a list")
        environment = {name: values[name] for name in _PROVENANCE}
        entries = []
        for plan in values["plans"]:
            if not isinstance(plan, dict) or set(plan) != set(_PLAN):
                raise ValueError(f"a plan has the fields {', '.join(_PLAN)}")
            entry = Entry.from_dict({**plan, "environment": environment, "policy": values["policy"]})
            if (entry.problem["device"], entry.problem["arch"]) != (environment["gpu"], environment["arch"]):
                raise ValueError(f"a plan is for {entry.problem['device']}, the table for {environment['gpu']}")
            entries.append(entry)
        return cls(environment, values["policy"], values["commit"], values["created"], tuple(entries))

    @property
    def families(self) -> dict[tuple, list[Entry]]:
        """Entries by what two problems must have in common for one to tell something about the other."""
        families: dict[tuple, list[Entry]] = {}
        for entry in self.entries:
            families.setdefault(_family(Problem.from_dict(entry.problem)), []).append(entry)
        return families


def path_for(directory: Path, gpu: str) -> Path:
    """Where the table of a GPU stands: ``NVIDIA H200`` in ``nvidia-h200.json``."""
    return Path(directory) / f"{re.sub('[^a-z0-9]+', '-', gpu.lower()).strip('-') or 'unknown'}.json"


def read(path: Path) -> Table:
    """Raises OSError if the file cannot be read, ValueError, saying why, if it is not a table."""
    try:
        return Table.from_dict(storage.parse(storage.read(path, MAX_BYTES, private=False)))
    except RecursionError:
        raise ValueError("nested too deeply") from None


def write(table: Table, directory: Path) -> Path:
    """Write a table under its GPU's name, one line for each plan. Raises OSError; ValueError for an invalid table."""
    values = Table.from_dict(storage.parse(canonical(table.to_dict()).encode())).to_dict()
    plans = ",\n".join(map(canonical, values.pop("plans")))
    header = ",\n".join(f"{canonical(name)}: {canonical(value)}" for name, value in values.items())
    path = path_for(directory, table.environment["gpu"])
    storage.write(path, f'{{\n{header},\n"plans": [\n{plans}\n]\n}}\n'.encode())
    os.chmod(path, 0o644)  # tables are made to be shared
    return path


def why_refused(table: Table, environment: dict) -> str | None:
    """Why a table tells nothing about this machine; None if it does.

    Another GPU, architecture or engine source is refused (another schema already is by :func:`read`). Other versions
    are not: the order of configs hardly depends on them.
    """
    for name in _BINDING:
        if table.environment[name] != environment[name]:
            return f"it was measured with {name} {table.environment[name]!r}, here it is {environment[name]!r}"
    return None


def lookup(problem: Problem, environment: dict, tables_dir: Path | None) -> list[tuple[Entry, float]]:
    """Plans of the same or similar problems, with their distances; best first.

    Exact ones come first, at distance 0, the user's before the shipped one; then the nearest, up to
    ``MAX_DISTANCE``. See :func:`distance`.

    Args:
        tables_dir: the user's own tables, read before the shipped ones.
    """
    found = []
    for directory in (tables_dir, SHIPPED):
        if directory is not None:
            for entry in _families(path_for(directory, environment["gpu"]), environment).get(_family(problem), ()):
                apart = distance(problem, Problem.from_dict(entry.problem))
                if apart <= MAX_DISTANCE:
                    found.append((entry, apart))
    return sorted(found, key=lambda pair: pair[1])


def distance(one: Problem, other: Problem) -> float:
    """How far apart two problems are, in octaves; 0 only if they are equal, infinite if nothing can be learnt.

    They must agree in pass, dtype, precision, kernel, stride, dilation, device and kind of groups (1, depthwise,
    other). Then: the root of the sum of squares of log2 of the ratio of batch, channels, input sizes, groups and
    alignment, where each of layouts, padding, bias, residual, activation and index64 that differs counts as a factor of 2.
    """
    if _family(one) != _family(other):
        return math.inf
    sizes = [(getattr(one, name), getattr(other, name)) for name in _SIZES]
    sizes += zip(one.input_size, other.input_size, strict=True)
    squares = sum(math.log2(max(a, 0.5) / max(b, 0.5)) ** 2 for a, b in sizes)
    return math.sqrt(squares + sum(getattr(one, name) != getattr(other, name) for name in _CHOICES))


def _family(problem: Problem) -> tuple:
    if problem.groups == 1:
        kind = "1"
    else:
        kind = "depthwise" if problem.groups == problem.in_channels else "other"
    return (*(getattr(problem, name) for name in _ALIKE), problem.device, problem.arch, kind)


_known: dict[str, tuple[tuple[int, int], Table | None, dict]] = {}  # by path: its stamp, the table and its families


def _families(path: Path, environment: dict) -> dict[tuple, list[Entry]]:
    """The plans of a table file that fits this machine; none, with one warning, if it is damaged or foreign."""
    try:
        status = os.stat(path)
        stamp = (status.st_mtime_ns, status.st_size)
        if str(path) not in _known or _known[str(path)][0] != stamp:
            _known[str(path)] = (stamp, *_read_once(path))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError) as error:
        _ignore(path, error)
        return {}
    _, table, families = _known[str(path)]
    reason = why_refused(table, environment) if table is not None else None
    if reason:
        _ignore(path, reason)
        return {}
    return families


def _read_once(path: Path) -> tuple[Table | None, dict]:
    """A damaged file is remembered as such, so that it is read once and not at every look-up."""
    try:
        table = read(path)
    except (OSError, ValueError) as error:
        _ignore(path, error)
        return None, {}
    return table, table.families


def _ignore(path: Path, reason: object) -> None:
    warn_once(f"table {path}", f"the table {path} is ignored: {reason}")
