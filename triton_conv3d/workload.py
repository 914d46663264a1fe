"""Workloads: JSON lists of convolution layers, as ``triton-conv3d tune`` reads them.

A layer is an object with the fields ``id``, ``N``, ``C``, ``D``, ``H``, ``W``, ``K`` (sizes), ``kernel``, ``stride``,
``padding``, ``dilation`` (three numbers each), ``groups``, ``bias`` (true or false) and ``dtype`` (fp16, bf16, fp32).
A layer may also have an ``activation`` (a name of conv3d's) and ``residual`` (true or false): its forward pass is tuned
fused with them. Fields beyond these are notes. A layer whose ``op`` is given and not ``conv3d`` is left out.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from . import ops
from .problem import ACTIVATIONS, CHANNELS_LAST, CONTIGUOUS, NO_ACTIVATION, Operands, Problem, Triple, describe

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
LAYOUTS = {CHANNELS_LAST: torch.channels_last_3d, CONTIGUOUS: torch.contiguous_format}
PRECISIONS = ("ieee", "tf32", "tf32x3")  # of float32 products


@dataclass(frozen=True)
class Layer:
    """One convolution layer of a workload. Raises ValueError naming the layer, the field and what would be right."""

    id: str
    batch: int
    in_channels: int
    out_channels: int
    input_size: Triple
    kernel_size: Triple
    stride: Triple
    padding: Triple
    dilation: Triple
    groups: int
    bias: bool
    dtype: str
    activation: str = NO_ACTIVATION
    residual: bool = False

    def __post_init__(self):
        for name, least in (("kernel_size", 1), ("stride", 1), ("dilation", 1), ("padding", 0)):
            if min(getattr(self, name)) < least:
                raise ValueError(f"layer {self.id}: {name}={list(getattr(self, name))} must not be below {least}")
        if self.in_channels % self.groups or self.out_channels % self.groups:
            raise ValueError(
                f"layer {self.id}: groups={self.groups} does not divide C={self.in_channels} and K={self.out_channels}"
            )
        if min(self.output_shape[2:]) < 1:
            raise ValueError(f"layer {self.id}: kernel={list(self.kernel_size)} is larger than the padded input")

    @property
    def input_shape(self) -> tuple[int, ...]:
        return (self.batch, self.in_channels, *self.input_size)

    @property
    def weight_shape(self) -> tuple[int, ...]:
        return (self.out_channels, self.in_channels // self.groups, *self.kernel_size)

    @property
    def output_shape(self) -> tuple[int, ...]:
        geometry = (self.stride, self.padding_both, self.dilation)
        return tuple(ops.output_shape(self.input_shape, self.weight_shape, *geometry))

    @property
    def padding_both(self) -> tuple[int, ...]:
        """Zeros before and after each dimension."""
        return tuple(pad for pad in self.padding for _ in range(2))

    def operands(self, pass_: str, device: torch.device | str, memory_format: torch.memory_format) -> Operands:
        """Uninitialised tensors that a pass reads, all of them in this memory format."""

        def empty(shape: tuple[int, ...]) -> torch.Tensor:
            return torch.empty(shape, dtype=DTYPES[self.dtype], device=device, memory_format=memory_format)

        if pass_ == "forward":
            bias = torch.empty(self.out_channels, dtype=DTYPES[self.dtype], device=device) if self.bias else None
            residual = empty(self.output_shape) if self.residual else None
            return Operands(empty(self.input_shape), empty(self.weight_shape), None, bias, residual)
        if pass_ == "dgrad":
            return Operands(None, empty(self.weight_shape), empty(self.output_shape))
        return Operands(empty(self.input_shape), None, empty(self.output_shape))

    def problem(self, pass_: str, operands: Operands, precision: str, memory_format: torch.memory_format) -> Problem:
        """What a pass asks the engines for, on :meth:`operands`; precision: of float32 products."""
        geometry = (self.stride, self.padding_both, self.dilation, self.groups)
        last = memory_format == torch.channels_last_3d
        activation = self.activation if pass_ == "forward" else NO_ACTIVATION
        return describe(pass_, operands, self.input_shape, self.weight_shape, *geometry, last, precision, activation)

    def run(self, passes: Sequence[str], device: torch.device, memory_format: torch.memory_format) -> None:
        """Compute these passes once on random tensors, with input and weight in this memory format."""
        like = {"dtype": DTYPES[self.dtype], "device": device}
        geometry = (self.stride, self.padding_both, self.dilation, self.groups)
        last = memory_format == torch.channels_last_3d

        def random(shape: tuple[int, ...]) -> torch.Tensor:
            return torch.randn(shape, **like).contiguous(memory_format=memory_format)

        input, weight = random(self.input_shape), random(self.weight_shape)
        if "forward" in passes:
            bias = torch.randn(self.out_channels, **like) if self.bias else None
            if self.residual or self.activation != NO_ACTIVATION:
                residual = random(self.output_shape) if self.residual else None
                ops.conv3d_fused(input, weight, bias, residual, *geometry, self.activation, 0.01)
            else:
                ops.conv3d(input, weight, bias, *geometry)
        if "dgrad" in passes:
            ops.conv3d_dgrad(random(self.output_shape), weight, self.input_shape, *geometry, last)
        if "wgrad" in passes:
            ops.conv3d_wgrad(random(self.output_shape), input, self.weight_shape, *geometry, last)


def read(path: str | os.PathLike) -> tuple[list[Layer], int]:
    """The layers of a file, and how many entries were left out because they are no conv3d.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not a workload; the message names the layer, the field, its value and what would be right.
    """
    with open(path, encoding="utf-8") as file:
        try:
            entries = json.load(file)
        except ValueError as error:
            raise ValueError(f"workload {path} is not JSON: {error}") from None
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"workload {path} is not a list of layers")
    ours = [(i, entry) for i, entry in enumerate(entries) if not _other_op(entry)]
    return [layer(entry, i) for i, entry in ours], len(entries) - len(ours)


def _other_op(entry: object) -> bool:
    return isinstance(entry, dict) and entry.get("op", "conv3d") != "conv3d"


def layer(entry: object, index: int = 0) -> Layer:
    """The layer that an entry describes. Raises ValueError naming the field, its value and what would be right."""
    if not isinstance(entry, dict):
        raise ValueError(f"layer {index} is not an object with fields: {entry!r}")
    name = entry.get("id", index)

    def field(key: str, valid, expected: str, default=None):
        if key not in entry and default is not None:
            return default
        if key not in entry:
            raise ValueError(f"layer {name}: {key} is missing: expected {expected}")
        if not valid(entry[key]):
            raise ValueError(f"layer {name}: {key}={entry[key]!r} is not valid: expected {expected}")
        return entry[key]

    def size(key: str) -> int:
        return field(key, lambda v: type(v) is int and v > 0, "a whole number above 0")

    def triple(key: str) -> Triple:
        def valid(value) -> bool:
            return isinstance(value, list) and len(value) == 3 and all(type(v) is int and v >= 0 for v in value)

        return tuple(field(key, valid, "three whole numbers"))

    return Layer(
        id=str(field("id", lambda v: isinstance(v, str), "a name")),
        batch=size("N"),
        in_channels=size("C"),
        out_channels=size("K"),
        input_size=(size("D"), size("H"), size("W")),
        kernel_size=triple("kernel"),
        stride=triple("stride"),
        padding=triple("padding"),
        dilation=triple("dilation"),
        groups=size("groups"),
        bias=field("bias", lambda v: isinstance(v, bool), "true or false"),
        dtype=field("dtype", lambda v: v in DTYPES, " or ".join(DTYPES)),
        activation=field("activation", lambda v: v in ACTIVATIONS, " or ".join(ACTIVATIONS), NO_ACTIVATION),
        residual=field("residual", lambda v: isinstance(v, bool), "true or false", False),
    )
