"""Result files: CSV, one row for each case and provider, every row stamped with what it was measured on and with.

A file only grows. The rows of a case are appended together once all its providers are done, so that an interrupted run
keeps every finished case; a line that was cut off is not read, and is dropped when rows are added. Of two rows for one
case and provider the later one counts.

Rows are of any dataclass; :class:`Row` is that of ``python -m perf run``.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import fcntl
import io
import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

from triton_conv3d.tuning.table import path_for

SCHEMA = 1
RESULTS = Path(__file__).with_name("results")
OK, UNSUPPORTED, WRONG, MEMORY, FAILED = "ok", "unsupported", "wrong", "memory", "failed"
STATUSES = (OK, UNSUPPORTED, WRONG, MEMORY, FAILED)
LOST = "lost"  # counted beside the statuses where an illegal memory access ended all computing of a process


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
        error: RMS error against float64, relative to the RMS of the magnitude (:func:`triton_conv3d.reference.magnitude`).
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


_TYPES = {"str": str, "int": int, "float": float}


def columns(kind: type) -> tuple[str, ...]:
    """The first line of a file whose rows are of this dataclass."""
    return ("schema", *(f.name for f in dataclasses.fields(kind)), *(f.name for f in dataclasses.fields(Stamp)))


def folder(gpu: str) -> Path:
    """Where the results of a GPU stand: ``NVIDIA H200`` in ``perf/results/nvidia-h200``."""
    return path_for(RESULTS, gpu).with_suffix("")


def now() -> str:
    """For the column ``measured``: ISO 8601 in UTC, to the second."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def append(path: Path, rows: Sequence, stamp: Stamp) -> None:
    """Add rows at the end, all of one dataclass whose fields are ``str``, ``int`` or ``float``, or None as well.

    Whatever happens to the process, the file stays readable. Line breaks in text become spaces.

    Raises:
        Refused: the file that is there is of another schema.
        OSError: it cannot be written.
    """
    if not rows:
        return
    names = columns(type(rows[0]))
    path.parent.mkdir(parents=True, exist_ok=True)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    for row in rows:
        writer.writerow(map(_text, (SCHEMA, *dataclasses.astuple(row), *dataclasses.astuple(stamp))))
    with open(path, "ab") as file:
        with contextlib.suppress(OSError):  # a file system that has no locks
            fcntl.flock(file, fcntl.LOCK_EX)  # or what another process adds meanwhile would be cut off
        whole = _whole_lines(path, names)
        file.truncate(len(whole))  # a last line that was cut off
        file.write((text.getvalue() if whole else f"{','.join(names)}\n{text.getvalue()}").encode())
        file.flush()
        os.fsync(file.fileno())


def read(path: Path, kind: type = Row) -> list[tuple]:
    """Every whole row with its stamp, in the order of the file.

    Args:
        kind: the dataclass of the rows.

    Raises:
        Refused: a file of another schema, or with values that are none.
        OSError: it cannot be read.
    """
    try:
        lines = list(csv.reader(_whole_lines(path, columns(kind)).decode().split("\n")[:-1]))
    except (UnicodeDecodeError, csv.Error) as error:
        raise Refused(f"{path} is no result file: {error}") from None
    return [_parse(path, number, values, kind) for number, values in enumerate(lines[1:], 2)]


def _whole_lines(path: Path, names: Sequence[str]) -> bytes:
    """What stands in a file up to its last line break. Refused if it does not begin as one of this schema."""
    data = path.read_bytes()
    head, line_break, _ = data.partition(b"\n")
    expected = ",".join(names).encode()
    if head != expected if line_break else not expected.startswith(head):
        wanted = ", ".join(names)
        raise Refused(f"{path} is no result file of schema {SCHEMA}: its first line must name the columns {wanted}")
    return data[: data.rfind(b"\n") + 1]


def _text(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.6g}" if type(value) is float else " ".join(str(value).split())


def _parse(path: Path, number: int, values: list[str], kind: type) -> tuple:
    names = columns(kind)
    if len(values) != len(names):
        raise Refused(f"{path}, line {number}: {len(values)} values for {len(names)} columns")
    named = dict(zip(names, values, strict=True))
    if named["schema"] != str(SCHEMA):
        raise Refused(f"{path}, line {number}: schema {values[0]}, expected {SCHEMA}")
    if named.get("status", OK) not in STATUSES:
        raise Refused(f"{path}, line {number}: status={named['status']!r}, expected one of {', '.join(STATUSES)}")
    try:
        row, stamp = (
            part(**{f.name: _typed(f, named[f.name]) for f in dataclasses.fields(part)}) for part in (kind, Stamp)
        )
        return row, stamp
    except ValueError as error:
        raise Refused(f"{path}, line {number}: {error}") from None


def _typed(field: dataclasses.Field, value: str):
    of = field.type.split(" ")[0]
    return None if value == "" and of != "str" else _TYPES[of](value)
