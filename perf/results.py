"""Result files: CSV, one row for each case and provider, every row stamped with what it was measured on and with.

A file only grows. The rows of a case are appended together once all its providers are done, so that an interrupted run
keeps every finished case; a line that was cut off is dropped when the file is opened to go on.
"""

from __future__ import annotations

import csv
import dataclasses
import os
import re
from dataclasses import dataclass
from pathlib import Path

SCHEMA = 1
RESULTS = Path(__file__).with_name("results")
OK, UNSUPPORTED, WRONG, MEMORY, FAILED = "ok", "unsupported", "wrong", "memory", "failed"
STATUSES = (OK, UNSUPPORTED, WRONG, MEMORY, FAILED)


class Refused(ValueError):
    """A file that is no result file of this schema; the message says why."""


@dataclass(frozen=True)
class Stamp:
    """What every row of a run has in common."""

    gpu: str
    arch: str
    driver: str
    torch: str
    cuda: str
    cudnn: str
    triton: str
    commit: str  # of the project, "+" behind it if files differ from that commit
    policy: str  # how times were taken, in a few words


@dataclass(frozen=True)
class Row:
    """One measurement, or why there is none.

    Attributes:
        suite, case: name of the suite and :attr:`perf.workloads.Case.key`.
        layer, model, op, pass_, dtype, precision, layout: the case in parts. op: ``conv3d`` or ``conv_transpose3d``.
        shape: of the problem, for people: ``2x32x128x128x128 -> 64, kernel 3x3x3``.
        calls: how often one forward pass of the model calls the layer.
        provider: whose time it is. status: one of :data:`STATUSES`. reason: why, if not ``ok``.
        plan: what the provider chose, if it tells: ``implicit_gemm [block_m=128 ...] from measured``.
        time_us: median. low_us, high_us: quantiles 0.2 and 0.8. samples: how many.
        host_us: the host's time for one call, the device not waited for.
        peak_bytes: memory allocated on the device at most, operands included.
        error: RMS error against float64, relative to the RMS of the magnitude (:class:`triton_conv3d.reference.Errors`).
        flops, min_bytes: of the case: what has to be computed and moved.
        tflops, gbps: those, divided by the median.
        matmul_tflops, copy_gbps: ceilings measured in the same run: a large matrix product in this dtype, a large copy.
        roofline_us: the least time that the ceilings allow. roofline: that, divided by the median.
        speedups: over every other provider of the case: ``torch=1.31 torch_cl=0.98``.
        measured: when, ISO 8601 in UTC.
    """

    suite: str
    case: str
    layer: str
    model: str
    op: str
    pass_: str
    dtype: str
    precision: str
    layout: str
    shape: str
    calls: int
    provider: str
    status: str
    reason: str = ""
    plan: str = ""
    time_us: float | None = None
    low_us: float | None = None
    high_us: float | None = None
    samples: int = 0
    host_us: float | None = None
    peak_bytes: int | None = None
    error: float | None = None
    flops: int = 0
    min_bytes: int = 0
    tflops: float | None = None
    gbps: float | None = None
    matmul_tflops: float | None = None
    copy_gbps: float | None = None
    roofline_us: float | None = None
    roofline: float | None = None
    speedups: str = ""
    measured: str = ""


COLUMNS = ("schema", *(f.name for f in dataclasses.fields(Row)), *(f.name for f in dataclasses.fields(Stamp)))
_KINDS = {f.name: f.type.split(" ")[0] for kind in (Row, Stamp) for f in dataclasses.fields(kind)}


def folder(gpu: str) -> Path:
    """Where the results of a GPU stand: ``NVIDIA H200`` in ``perf/results/nvidia-h200``."""
    return RESULTS / (re.sub("[^a-z0-9]+", "-", gpu.lower()).strip("-") or "unknown")


def append(path: Path, rows: list[Row], stamp: Stamp) -> None:
    """Add rows at the end, all of them or, if the process dies, none that would be read.

    Raises:
        Refused: the file that is there is of another schema.
        OSError: it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _mend(path)
    fresh = not path.exists()
    with open(path, "a", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        if fresh:
            writer.writerow(COLUMNS)
        for row in rows:
            values = [SCHEMA, *dataclasses.astuple(row), *dataclasses.astuple(stamp)]
            writer.writerow("" if value is None else f"{value:.6g}" if type(value) is float else value for value in values)
        file.flush()
        os.fsync(file.fileno())


def read(path: Path) -> list[tuple[Row, Stamp]]:
    """Every whole row. Raises Refused for a file of another schema, or with values that are none; OSError."""
    with open(path, newline="", encoding="utf-8") as file:
        text = file.read()
    whole = text[: text.rfind("\n") + 1]
    lines = list(csv.reader(whole.splitlines()))
    if not lines or tuple(lines[0]) != COLUMNS:
        raise Refused(f"{path} is no result file of schema {SCHEMA}: its first line must name the columns {', '.join(COLUMNS)}")
    return [_parse(path, number, values) for number, values in enumerate(lines[1:], 2)]


def _parse(path: Path, number: int, values: list[str]) -> tuple[Row, Stamp]:
    if len(values) != len(COLUMNS):
        raise Refused(f"{path}, line {number}: {len(values)} values for {len(COLUMNS)} columns")
    named = dict(zip(COLUMNS, values, strict=True))
    if named.pop("schema") != str(SCHEMA):
        raise Refused(f"{path}, line {number}: schema {values[0]}, expected {SCHEMA}")
    try:
        typed = {name: _typed(_KINDS[name], value) for name, value in named.items()}
    except ValueError as error:
        raise Refused(f"{path}, line {number}: {error}") from None
    if typed["status"] not in STATUSES:
        raise Refused(f"{path}, line {number}: status={typed['status']!r}, expected one of {', '.join(STATUSES)}")
    stamps = {f.name: typed.pop(f.name) for f in dataclasses.fields(Stamp)}
    return Row(**typed), Stamp(**stamps)


def _typed(kind: str, value: str):
    if kind == "str":
        return value
    if value == "":
        return None
    return int(value) if kind == "int" else float(value)


def _mend(path: Path) -> None:
    """Cut off a last line that was not finished, and refuse a file of another schema before anything is added to it."""
    if not path.exists() or path.stat().st_size == 0:
        path.unlink(missing_ok=True)
        return
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if not whole:
        if not ",".join(COLUMNS).encode().startswith(data):
            raise Refused(f"{path} is no result file of schema {SCHEMA}")
        path.unlink()
        return
    read(path)
    if len(whole) < len(data):
        with open(path, "r+b") as file:
            file.truncate(len(whole))
