"""What is swept: layers of workload files and of a designed set, in all passes, types and layouts."""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from triton_conv3d import workload
from triton_conv3d.posing import cut
from triton_conv3d.problem import PASSES, Operands, Problem
from triton_conv3d.workload import DTYPES, LAYOUTS, PRECISIONS, Layer

DESIGNED = "designed"

# The designed set: what a table's look-up tells problems apart by, each at values an octave or two apart, so that any
# layer of a network has a neighbour (triton_conv3d.tuning.table.MAX_DISTANCE is three octaves in all).
_KERNELS = (((3, 3, 3), (1, 1, 1)), ((3, 3, 3), (2, 2, 2)), ((1, 3, 3), (1, 1, 1)), ((3, 1, 1), (1, 1, 1)),
            ((5, 5, 5), (1, 1, 1)), ((1, 1, 1), (1, 1, 1)), ((2, 2, 2), (2, 2, 2)))  # fmt: skip
_CHANNELS = ((1, 32), (4, 32), (32, 32), (64, 64), (128, 128), (320, 320), (512, 512), (64, 4))
_SIZES = (8, 32, 96)
_MOST_ELEMENTS = 2**28  # of input or output


@dataclass(frozen=True)
class Case:
    """One layer in one pass, precision and layout."""

    layer: Layer
    pass_: str
    precision: str
    layout: str

    def on(self, device: torch.device | str) -> tuple[Problem, Operands]:
        """The problem that a call asks for, and operands without values."""
        memory_format = LAYOUTS[self.layout]
        operands = self.layer.operands(self.pass_, device, memory_format)
        problem, _, operands = cut(self.layer.problem(self.pass_, operands, self.precision, memory_format), operands)
        return problem, operands

    def problem(self, gpu: str, arch: str) -> Problem:
        """As the GPU of this name and architecture sees it; needs no GPU."""
        return self.on("meta")[0].replace(device=gpu, arch=arch)


def designed() -> list[Layer]:
    """The designed set of shapes, dense and depthwise."""
    layers = []
    for (kernel, stride), (into, out), size in itertools.product(_KERNELS, _CHANNELS, _SIZES):
        padding = tuple(k // 2 for k in kernel) if stride != kernel else (0, 0, 0)
        layers.append(_layer(into, out, size, kernel, stride, padding, 1))
    for channels, size, k in itertools.product((32, 128, 384), _SIZES, (3, 5, 7)):
        layers.append(_layer(channels, channels, size, (k,) * 3, (1, 1, 1), (k // 2,) * 3, channels))
    return [layer for layer in layers if _elements(layer) <= _MOST_ELEMENTS]


def _layer(into: int, out: int, size: int, kernel, stride, padding, groups: int) -> Layer:
    name = f"{DESIGNED}.c{into}_k{out}_{'x'.join(map(str, kernel))}_s{stride[-1]}_g{groups}_{size}"
    return Layer(name, 1, into, out, (size,) * 3, kernel, stride, padding, (1, 1, 1), groups, False, "fp16")


def _elements(layer: Layer) -> int:
    return max(torch.Size(layer.input_shape).numel(), torch.Size(layer.output_shape).numel())


def layers(names: Iterable[str]) -> list[Layer]:
    """The layers of workload files, by path, and of the set ``designed``.

    Raises:
        OSError, ValueError: as :func:`triton_conv3d.workload.read`; the message names the file.
    """
    found = []
    for name in names:
        if name != DESIGNED and not os.path.isfile(name):
            raise ValueError(f"suite {name!r} is no file: expected a JSON list of layers, or {DESIGNED!r}")
        found += designed() if name == DESIGNED else workload.read(name)[0]
    return found


def cases(
    layers: Sequence[Layer],
    passes: Sequence[str] = PASSES,
    dtypes: Sequence[str] = (),
    precisions: Sequence[str] = ("tf32",),
    layouts: Sequence[str] = ("channels_last",),
) -> list[Case]:
    """Every combination, each problem once; without ``dtypes`` every layer in its own.

    Raises:
        ValueError: a value that does not exist, or nothing to sweep; the message says what there is.
    """
    for what, values, known in (
        ("pass", passes, PASSES), ("dtype", dtypes, DTYPES),
        ("precision", precisions, PRECISIONS), ("layout", layouts, LAYOUTS),
    ):  # fmt: skip
        for value in values:
            if value not in known:
                raise ValueError(f"{what} {value!r} is not known: expected some of {', '.join(known)}")
    found: dict[Problem, Case] = {}
    for layer, pass_, layout in itertools.product(layers, passes, layouts):
        for dtype in dtypes or (layer.dtype,):
            for precision in precisions if dtype == "fp32" else ("ieee",):
                case = Case(dataclasses.replace(layer, dtype=dtype), pass_, precision, layout)
                found.setdefault(case.problem("any", "sm_90"), case)
    if not found:
        raise ValueError("no layer of these suites is left: nothing to sweep")
    return list(found.values())
