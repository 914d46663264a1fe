"""What is measured: the convolution layers of real models, and sweeps over one size at a time.

    suite("core")            the layers that count most, of every model; "all": all of them
    suite("nnunet3d")        one model; also "kernelbench" and "stress" (shapes of reported failures)
    suite("sweep.channels")  one size varied, everything else at a usual value
    suite("r3d18,x3d_m")     several, one after the other

``real.json`` holds one layer a line, in the format of :mod:`triton_conv3d.workload`, with the model, the layer's name
in it and the source of its shape.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from triton_conv3d.functional import transposed_shape
from triton_conv3d.problem import CHANNELS_LAST, PASSES, Problem
from triton_conv3d.workload import DTYPES, LAYOUTS, PRECISIONS, Layer, layer

from . import sweeps

REAL = Path(__file__).with_name("real.json")
TRAIN = "train"  # forward and backward of a module, beside the three passes
_CORE, _ALL = "core", "all"
_SHOWN = 3  # keys that an error quotes
_ADJOINT = {"forward": "dgrad", "dgrad": "forward", "wgrad": "wgrad"}


@dataclass(frozen=True)
class Workload:
    """One layer of a model.

    Attributes:
        layer: its shapes. A transposed convolution is written as the convolution whose input gradient it computes:
            channels exchanged, the input's size that of what it produces; bias left out.
        suite: the model's short name, ``nnunet3d``. model: its whole name.
        transposed: the model calls it as a transposed convolution.
        core: it belongs to the suite ``core``. calls: how often one forward pass of the model calls it.
        source: where the shape comes from.
    """

    layer: Layer
    suite: str
    model: str
    transposed: bool = False
    core: bool = False
    calls: int = 1
    source: str = ""

    @property
    def id(self) -> str:
        return self.layer.id


@dataclass(frozen=True)
class Case:
    """What is measured as one: a pass of a layer, in one dtype, precision and memory format.

    Attributes:
        pass_: what the model asks for: ``forward``, ``dgrad``, ``wgrad``, or ``train`` for the three of a module.
        dtype: of all tensors, a key of :data:`triton_conv3d.workload.DTYPES`.
        precision: of float32 products: ``ieee``, ``tf32`` or ``tf32x3``.
        layout: of all tensors, a key of :data:`triton_conv3d.workload.LAYOUTS`.
    """

    workload: Workload
    pass_: str
    dtype: str
    precision: str = "ieee"
    layout: str = CHANNELS_LAST

    @property
    def key(self) -> str:
        """Readable and unique: ``nnunet3d.c32_k32_3x3x3_128x128x128/forward/fp16/ieee/channels_last``."""
        return "/".join((self.workload.id, self.pass_, self.dtype, self.precision, self.layout))

    def problems(self, device: str = "cpu", arch: str = "cpu") -> tuple[Problem, ...]:
        """What the engines are asked to compute, on dense and aligned tensors: one problem, or three for ``train``.

        Args:
            device, arch: name and architecture of the GPU, ``"NVIDIA H200"`` and ``"sm_90"``.
        """
        asked = PASSES if self.pass_ == TRAIN else (self.pass_,)
        adjoint = self.workload.transposed
        return tuple(self._problem(_ADJOINT[p] if adjoint else p).replace(device=device, arch=arch) for p in asked)

    def _problem(self, pass_: str) -> Problem:
        layer, memory_format = dataclasses.replace(self.workload.layer, dtype=self.dtype), LAYOUTS[self.layout]
        operands = layer.operands(pass_, "meta", memory_format)
        return layer.problem(pass_, operands, self.precision, memory_format)


def _workload(entry: dict) -> Workload:
    transposed = entry["op"] == "conv_transpose3d"
    return Workload(
        layer=layer(_adjoint(entry) if transposed else entry),
        suite=entry.get("suite") or entry["id"].split(".")[0],
        model=entry["model"],
        transposed=transposed,
        core=entry["core"],
        calls=entry["calls_per_forward"],
        source=entry["source"],
    )


def _adjoint(entry: dict) -> dict:
    """The convolution whose input gradient a transposed one computes (torch.nn.ConvTranspose3d, output size)."""
    shape, kernel = (entry[size] for size in "NCDHW"), (entry["C"], entry["K"] // entry["groups"], *entry["kernel"])
    ends = [end for padding in entry["padding"] for end in (padding, padding)]
    geometry = (entry["stride"], ends, entry["dilation"], entry["groups"], entry["output_padding"])
    sizes = dict(zip("NCDHW", transposed_shape(tuple(shape), kernel, *geometry), strict=True))
    return {**entry, **sizes, "K": entry["C"], "bias": False}


@functools.cache
def real() -> tuple[Workload, ...]:
    """Every layer of ``real.json``."""
    return tuple(map(_workload, json.loads(REAL.read_text(encoding="utf-8"))))


def suites() -> tuple[str, ...]:
    """The names that :func:`suite` takes."""
    return (_CORE, _ALL, *dict.fromkeys(workload.suite for workload in real()), *sweeps.NAMES)


def suite(name: str) -> tuple[Workload, ...]:
    """The layers of a suite, or of several in a comma-separated list, each layer once.

    Raises:
        ValueError: an unknown name; the message lists what exists.
    """
    return tuple(dict.fromkeys(workload for one in name.split(",") for workload in _suite(one.strip())))


def _suite(name: str) -> Iterable[Workload]:
    if name not in suites():
        raise ValueError(f"no suite named {name!r}: the suites are {', '.join(suites())}")
    if name in sweeps.NAMES:
        return map(_workload, sweeps.entries(name))
    return (w for w in real() if name == _ALL or name == w.suite or (name == _CORE and w.core))


def cases(
    workloads: Iterable[Workload],
    passes: Sequence[str] = PASSES,
    dtypes: Sequence[str] | None = None,
    layouts: Sequence[str] = (CHANNELS_LAST,),
    precisions: Sequence[str] = ("tf32",),
) -> list[Case]:
    """Every combination, layer by layer.

    Args:
        passes: some of ``forward``, ``dgrad``, ``wgrad`` and ``train``.
        dtypes: some of ``fp16``, ``bf16`` and ``fp32``; None: each layer's own.
        layouts: some of ``channels_last`` and ``contiguous``.
        precisions: of float32 products; ``tf32`` is torch's own default for convolutions. Other types have one case.

    Raises:
        ValueError: a value that none of these names has; the message lists what exists.
    """
    for what, values, known in (
        ("pass", passes, (*PASSES, TRAIN)), ("dtype", dtypes or (), DTYPES), ("layout", layouts, LAYOUTS),
        ("precision", precisions, PRECISIONS),
    ):  # fmt: skip
        for value in values:
            if value not in known:
                raise ValueError(f"no {what} named {value!r}: there are {', '.join(known)}")
    return [
        Case(workload, pass_, dtype, precision, layout)
        for workload in workloads
        for dtype in dtypes or (workload.layer.dtype,)
        for precision in (precisions if dtype == "fp32" else ("ieee",))
        for layout in layouts
        for pass_ in passes
    ]


def select(cases: Sequence[Case], filter: str) -> list[Case]:
    """The cases whose key contains ``filter``, or matches it if it is a pattern with ``*``, ``?`` or ``[``.

    Raises:
        ValueError: none does; the message says what there is.
    """
    pattern = filter if any(sign in filter for sign in "*?[") else f"*{filter}*"
    chosen = [case for case in cases if fnmatchcase(case.key, pattern)]
    if not chosen:
        shown = ", ".join(case.key for case in cases[:_SHOWN]) or "none"
        more = f" and {len(cases) - _SHOWN} more" if len(cases) > _SHOWN else ""
        raise ValueError(f"filter {filter!r} matches no case: there are {shown}{more}")
    return chosen
