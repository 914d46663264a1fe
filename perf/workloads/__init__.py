"""What is measured: the convolution layers of real models, and sweeps over one size at a time.

    suite("core")            the layers that count most, of every model
    suite("nnunet3d")        one model; also "kernelbench" and "stress" (shapes of reported failures)
    suite("sweep.channels")  one size varied, everything else at a usual value

``real.json`` holds one layer a line, in the format of :mod:`triton_conv3d.workload`, with the model, the layer's name
in it and the source of its shape.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path

import torch

from triton_conv3d.problem import CHANNELS_LAST, CONTIGUOUS, PASSES, Operands, Problem, describe
from triton_conv3d.workload import DTYPES, Layer, layer

REAL = Path(__file__).with_name("real.json")
TRAIN = "train"  # forward and backward of a module, beside the three passes
LAYOUTS = {CHANNELS_LAST: torch.channels_last_3d, CONTIGUOUS: torch.contiguous_format}
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
        layout: of all tensors, a key of :data:`LAYOUTS`.
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
        layer = self.workload.layer

        def empty(shape: tuple[int, ...]) -> torch.Tensor:
            return torch.empty(shape, dtype=DTYPES[self.dtype], device="meta", memory_format=LAYOUTS[self.layout])

        bias = empty((layer.out_channels, 1, 1, 1, 1)).flatten() if layer.bias and pass_ == "forward" else None
        operands = {
            "forward": lambda: Operands(empty(layer.input_shape), empty(layer.weight_shape), None, bias),
            "dgrad": lambda: Operands(None, empty(layer.weight_shape), empty(layer.output_shape)),
            "wgrad": lambda: Operands(empty(layer.input_shape), None, empty(layer.output_shape)),
        }[pass_]()
        return describe(
            pass_, operands, layer.input_shape, layer.weight_shape, layer.stride, layer.padding_both, layer.dilation,
            layer.groups, self.layout == CHANNELS_LAST, self.precision,
        )  # fmt: skip


def _workload(entry: dict) -> Workload:
    transposed = entry["op"] == "conv_transpose3d"
    return Workload(
        layer=layer(_adjoint(entry) if transposed else entry),
        suite=entry["id"].split(".")[0],
        model=entry["model"],
        transposed=transposed,
        core=entry["core"],
        calls=entry["calls_per_forward"],
        source=entry["source"],
    )


def _adjoint(entry: dict) -> dict:
    """The convolution whose input gradient a transposed one computes (torch.nn.ConvTranspose3d, output size)."""
    size = [
        (entry[name] - 1) * stride - 2 * padding + dilation * (kernel - 1) + extra + 1
        for name, stride, padding, dilation, kernel, extra in zip(
            "DHW", *(entry[f] for f in ("stride", "padding", "dilation", "kernel", "output_padding")), strict=True
        )
    ]
    return {**entry, "C": entry["K"], "K": entry["C"], **dict(zip("DHW", size, strict=True)), "bias": False}


@functools.cache
def real() -> tuple[Workload, ...]:
    """Every layer of ``real.json``."""
    return tuple(map(_workload, json.loads(REAL.read_text(encoding="utf-8"))))
