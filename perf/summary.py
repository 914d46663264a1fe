"""What result files say, case by case: which provider is fastest, by how much, and whether that is more than noise."""

from __future__ import annotations

import collections
import contextlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from . import results
from .end_to_end import EndToEnd
from .results import OK, Refused, Row, Stamp

OURS, OURS_COMPILE = "ours", "ours_compile"
TORCH = ("torch", "torch_cl", "torch_bench", "torch_cl_bench", "compile")
WIN, LEVEL, LOSS = "win", "level", "loss"
PASSES = ("forward", "dgrad", "wgrad", "train")

_Timed = TypeVar("_Timed", Row, EndToEnd)


def band(row: _Timed) -> tuple[float, float]:
    """(low, high) quantiles of the time in microseconds; the median stands for one that is missing."""
    return tuple(row.time_us if value is None else value for value in (row.low_us, row.high_us))


def separate(a: _Timed, b: _Timed) -> bool:
    """Whether the quantile bands of two measured rows do not overlap: they differ by more than noise."""
    (a_low, a_high), (b_low, b_high) = band(a), band(b)
    return a_high < b_low or b_high < a_low


def measured(row: _Timed | None) -> bool:
    return row is not None and row.status == OK and bool(row.time_us)


def verdict(ours: _Timed, theirs: _Timed) -> str:
    """Of two measured rows: a win or a loss of the first, or level where the bands overlap."""
    if not separate(ours, theirs):
        return LEVEL
    return WIN if ours.time_us < theirs.time_us else LOSS


@dataclass(frozen=True)
class Outcome:
    """All rows of one case, by provider."""

    rows: dict[str, Row]

    @property
    def any(self) -> Row:
        """Some row, a measured one if there is one: what describes the case is the same in all."""
        rows = list(self.rows.values())
        return next(filter(measured, rows), rows[0])

    @property
    def workload(self) -> str:
        """``nnunet3d.c32_k32_3x3x3_128x128x128``."""
        return self.any.case.split("/")[0]

    @property
    def group(self) -> str:
        """What it is shown with: the short name of its model, ``nnunet3d``, or its sweep, ``sweep.channels``."""
        parts = self.workload.split(".")
        return ".".join(parts[:2]) if self.sweep else parts[0]

    @property
    def layer(self) -> str:
        """Its name within the group."""
        return self.workload.removeprefix(f"{self.group}.")

    @property
    def sweep(self) -> bool:
        return self.workload.startswith("sweep.")

    @property
    def ours(self) -> Row | None:
        """Our measured row, if there is one."""
        return fastest(self.rows, (OURS,))

    @property
    def missing_ours(self) -> str:
        """The status of ours where it has no time, empty where it has one or was not run."""
        row = self.rows.get(OURS)
        if row is None or measured(row):
            return ""
        return row.status if row.status != OK else "no time"

    @property
    def torch(self) -> Row | None:
        """The fastest measured row of torch: the strongest peer of this case."""
        return fastest(self.rows, TORCH)

    @property
    def speedup(self) -> float | None:
        """Of ours over the fastest torch; None where either is missing."""
        return self.torch.time_us / self.ours.time_us if self.ours and self.torch else None

    @property
    def verdict(self) -> str | None:
        """A win or a loss, or level where the bands overlap; None where there is no speed-up."""
        return verdict(self.ours, self.torch) if self.ours and self.torch else None


@dataclass
class Results:
    """What a file or a folder of result files holds; of several rows for the same thing the one measured last.

    Attributes:
        outcomes: by case, in the order of the files.
        networks: whole networks, by (network, mode, shape) and provider.
        stamps: of the rows that count, and how many carry each.
        files: names of the files that were read, with the number of their rows.
        unread: names of the others, with the reason.
    """

    outcomes: dict[str, Outcome] = field(default_factory=dict)
    networks: dict[tuple[str, str, str], dict[str, EndToEnd]] = field(default_factory=dict)
    stamps: collections.Counter[Stamp] = field(default_factory=collections.Counter)
    files: dict[str, int] = field(default_factory=dict)
    unread: dict[str, str] = field(default_factory=dict)

    @property
    def gpus(self) -> str:
        return ", ".join(sorted({stamp.gpu for stamp in self.stamps})) or "no GPU"

    @property
    def rows(self) -> list[Row | EndToEnd]:
        """All that count."""
        by_provider = (*(outcome.rows for outcome in self.outcomes.values()), *self.networks.values())
        return [row for rows in by_provider for row in rows.values()]

    @property
    def layers(self) -> list[Outcome]:
        """Cases that belong to a model."""
        return [outcome for outcome in self.outcomes.values() if not outcome.sweep]

    @property
    def sweeps(self) -> list[Outcome]:
        return [outcome for outcome in self.outcomes.values() if outcome.sweep]


def load(path: Path) -> Results:
    """Read a result file, or every one in a folder, where files of other schemas are only named.

    Raises:
        Refused: the file is no result file; nothing in the folder is one.
        OSError: it cannot be read.
    """
    found = Results()
    paths = sorted(path.glob("*.csv")) if path.is_dir() else [path]
    latest: dict[tuple, tuple[Row | EndToEnd, Stamp]] = {}
    for one in paths:
        try:
            rows = _read(one)
        except Refused as error:
            if one is path:
                raise
            found.unread[one.name] = str(error)
            continue
        found.files[one.name] = len(rows)
        for row, stamp in rows:
            known = latest.get(_what(row))
            if known is None or known[0].measured <= row.measured:
                latest[_what(row)] = row, stamp
    if not found.files:
        raise Refused(f"{path} holds no result files: {'; '.join(found.unread.values()) or 'no *.csv'}")
    for row, stamp in latest.values():
        found.stamps[stamp] += 1
        if isinstance(row, Row):
            found.outcomes.setdefault(row.case, Outcome({})).rows[row.provider] = row
        else:
            found.networks.setdefault((row.network, row.mode, row.shape), {})[row.provider] = row
    return found


def _read(path: Path) -> list[tuple[Row | EndToEnd, Stamp]]:
    try:
        return results.read(path, Row)
    except Refused as error:
        with contextlib.suppress(Refused):
            return results.read(path, EndToEnd)
        raise error


def _what(row: Row | EndToEnd) -> tuple:
    return (row.case, row.provider) if isinstance(row, Row) else (row.network, row.mode, row.shape, row.provider)


def fastest(rows: Mapping[str, _Timed], providers: Sequence[str]) -> _Timed | None:
    """The measured row with the least median among these providers."""
    return min((rows[p] for p in providers if measured(rows.get(p))), key=lambda row: row.time_us, default=None)


def geometric_mean(values: Iterable[float]) -> float | None:
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs)) if logs else None


def by_group(outcomes: Iterable[Outcome]) -> dict[str, list[Outcome]]:
    groups: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        groups.setdefault(outcome.group, []).append(outcome)
    return groups


def by_layer(outcomes: Sequence[Outcome]) -> dict[str, dict[str, Outcome]]:
    """Passes of each layer of one model; type, precision and layout join the name where the model has several."""
    rows = [outcome.any for outcome in outcomes]
    varying = [f for f in ("dtype", "precision", "layout") if len({getattr(row, f) for row in rows}) > 1]
    layers: dict[str, dict[str, Outcome]] = {}
    for outcome in outcomes:
        name = " ".join((outcome.layer, *(getattr(outcome.any, f) for f in varying)))
        layers.setdefault(name, {})[outcome.any.pass_] = outcome
    return layers


def duration(us: float | None) -> str:
    """Three digits and a unit: ``12.3 us``, ``1.23 ms``."""
    if us is None:
        return "-"
    value, unit = next(((us / size, unit) for size, unit in ((1e6, "s"), (1e3, "ms")) if us >= size), (us, "us"))
    return f"{value:.{max(0, 2 - math.floor(math.log10(value or 1)))}f} {unit}"
