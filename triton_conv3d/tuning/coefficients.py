"""Fitted coefficients of the cost model: one small JSON file for each GPU model, beside its table.

    {"schema": 1, "gpu": "NVIDIA H200", "arch": "sm_90", "engines": "...", "created": "...", "measurements": 4711,
     "coefficients": {"tensor_part": 0.64, ...}}

``python -m autotune fit`` writes it. A file of another GPU or schema, or with values that cannot be, is ignored with one
warning; one of other engine sources is used, for coefficients say more about the GPU than about a kernel.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import TypeVar

from . import storage
from .storage import canonical, warn_once
from .table import SHIPPED, path_for

SCHEMA = 1
MAX_BYTES = 64 * 1024
_FIELDS = {"schema", "gpu", "arch", "engines", "created", "measurements", "coefficients"}
_ANY = TypeVar("_ANY")

# What a sweep can tell, and how far from the default it may be: beyond that a fit has gone wrong.
FITTED = (
    "tensor_part", "warp_part", "shared_part", "fma_part", "cache_part", "memory_part", "issue_part", "launch",
    "prologue", "latency", "aten_part", "aten_grouped_part", "aten_depthwise_part", "aten_other_layout", "matmul_part",
)  # fmt: skip
MOST_FACTOR = 20.0


def path(directory: Path, gpu: str) -> Path:
    return path_for(directory, gpu).with_suffix(".coefficients.json")


def fitted(defaults: _ANY, gpu: str, own: Path | None) -> _ANY:
    """``defaults``, a frozen dataclass, with the fitted values of this GPU: the user's own before the shipped ones."""
    for directory in (own, SHIPPED):
        if directory is not None:
            file = path(directory, gpu)
            try:
                return dataclasses.replace(defaults, **_read(file, defaults, gpu))
            except (FileNotFoundError, NotADirectoryError):
                continue
            except (OSError, ValueError) as error:
                warn_once(f"coefficients {file}", f"the coefficients {file} are ignored: {error}")
    return defaults


def _read(file: Path, defaults: object, gpu: str) -> dict[str, float]:
    values = storage.parse(storage.read(file, MAX_BYTES, private=False))
    if not isinstance(values, dict) or set(values) != _FIELDS:
        raise ValueError(f"the fields are {', '.join(sorted(_FIELDS))}")
    if canonical(values["schema"]) != canonical(SCHEMA):
        raise ValueError(f"schema {values['schema']!r}, expected {SCHEMA}")
    if values["gpu"] != gpu:
        raise ValueError(f"they are for {values['gpu']!r}, not for {gpu!r}")
    return checked(values["coefficients"], defaults)


def checked(values: object, defaults: object) -> dict[str, float]:
    """Raises ValueError for anything but plausible values of some of :data:`FITTED`."""
    if not isinstance(values, dict):
        raise ValueError("coefficients is not an object")
    for name, value in values.items():
        if name not in FITTED:
            raise ValueError(f"{name} is not one of {', '.join(FITTED)}")
        default = getattr(defaults, name)
        if type(value) is not float or not default / MOST_FACTOR <= value <= default * MOST_FACTOR:
            raise ValueError(f"{name}={value!r} is not within a factor of {MOST_FACTOR:g} of {default}")
    return values


def write(values: dict[str, float], defaults: object, directory: Path, header: dict) -> Path:
    """Write the fitted values of ``header["gpu"]``; the header has the other fields. Raises OSError, ValueError."""
    file = path(directory, header["gpu"])
    content = {"schema": SCHEMA, **header, "coefficients": checked(values, defaults)}
    storage.write(file, canonical(content).encode() + b"\n")
    os.chmod(file, 0o644)  # made to be shared, as tables are
    _read(file, defaults, header["gpu"])
    return file
