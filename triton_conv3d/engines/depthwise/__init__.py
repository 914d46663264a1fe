"""Depthwise convolution: groups == in_channels, with any channel multiplier. Direct, and bound by memory.

    y[n, c, o] = sum over taps t of  x[n, c, o * stride + t * dilation - padding] * w[c, t]      (+ bias[c])

forward as it stands, dgrad with the parity of a stride known at compile time, wgrad in two stages: float32 partial sums
of at most 64 MiB, then a reduction in a fixed order. A program slides a strip of rows and columns through the volume
along D and keeps what the next plane needs in registers; the kernel ``rows`` takes over where that does not fit.
Channels-last and contiguous tensors are both read and written as they are. Bytes that a config reads are worked out in
:func:`.configs.read_bytes`; by design each tensor is written once, and read once but for the overlap of strips.
"""

from __future__ import annotations

import math

import torch
import triton.language as tl

from ...problem import CHANNELS_LAST, CONTIGUOUS, STRIDED, VECTOR_BYTES, Operands, Problem, interpreted
from ..base import Memory, Work
from ..launching import launch_kernel
from .configs import (
    ROWS,
    SLIDE,
    WORKSPACE_LIMIT,
    DepthwiseConfig,
    Plan,
    axes,
    block_of_taps,
    channel_unit,
    channels_dense,
    configs,
    instructions,
    lanes_last,
    met_taps,
    partial_bytes,
    parts_of_row,
    plan,
    produced,
    read_bytes,
    smallest,
)
from .axes import ring_size, strip_step
from .kernels import rows, slide
from .wgrad import reduce_partials, wgrad

__all__ = ["NAME", "DepthwiseConfig", "configs", "launch", "memory", "supports", "work"]

NAME = "depthwise"
_REDUCE_SPLITS, _REDUCE_ELEMENTS = 64, 16  # of one program of the second stage of wgrad


def supports(problem: Problem) -> str | None:
    if problem.dtype not in ("float16", "bfloat16", "float32"):
        return f"no kernel for {problem.dtype}"
    if problem.arch == "cpu":
        return "CPU tensors need Triton's interpreter (TRITON_INTERPRET=1)"
    if problem.empty:
        return "nothing to multiply"
    if problem.groups != problem.in_channels:
        return f"groups={problem.groups} is not in_channels={problem.in_channels}"
    if problem.pass_ == "dgrad" and problem.stride[2] > 16:
        return f"stride {problem.stride[2]} along W is more than the 16 outputs of a strip"
    if problem.pass_ == "wgrad" and partial_bytes(problem, smallest(problem)) > WORKSPACE_LIMIT:
        return f"partial sums of more than {WORKSPACE_LIMIT} bytes"
    return None


def memory(problem: Problem, config: DepthwiseConfig) -> Memory:
    read = {"forward": (0,), "dgrad": (2,), "wgrad": (0, 2)}[problem.pass_]
    shapes = (problem.input_shape, problem.weight_shape, problem.output_shape)
    copies = sum(problem.itemsize * math.prod(shapes[i]) for i in read if problem.layouts[i] == STRIDED)
    if problem.pass_ == "wgrad":
        return Memory(partial_bytes(problem, config), copies)
    if config.kernel == ROWS:
        copies += 4 * problem.out_channels * met_taps(problem).count
    return Memory(0, copies)


def launch(problem: Problem, operands: Operands, config: DepthwiseConfig) -> torch.Tensor:
    if problem.pass_ == "wgrad":
        return _wgrad(problem, operands, config)
    return _gather(problem, operands, config)


def work(problem: Problem, config: DepthwiseConfig) -> Work:
    """The launch as the cost model sees it: one step computes one plane of the result, for a program's tile."""
    at = plan(problem, config)
    outputs = config.rows * config.columns * at.lanes
    steps = at.chunk + (ring_size(axes(problem).depth, False) - 1 if config.kernel == SLIDE else 0)
    item = problem.itemsize
    if problem.pass_ == "wgrad":
        programs = at.tiles[0] * math.prod(at.blocks) * config.splits
        written, steps = 4.0 * at.tile[0] * math.prod(at.block), steps * at.share
        issued, read = 1 / math.prod(at.blocks), read_bytes(problem, config, at.tile) / math.prod(at.blocks)
    else:
        programs = math.prod(at.tiles) * at.chunks * problem.batch * math.prod(at.classes)
        written, issued, read = float(outputs * item * at.chunk), 1.0, read_bytes(problem, config, at.tile)
    used = memory(problem, config)
    return Work(
        programs=programs,
        iterations=steps,
        flops=2.0 * outputs * instructions(problem, config) * issued,
        bytes_read=read,
        bytes_written=written,
        num_warps=config.num_warps,
        shared_bytes=0,
        extra_bytes=2.0 * used.copies + used.workspace,
        launches=1 + (problem.pass_ == "wgrad" or config.kernel == ROWS),
        tensor_cores=False,
    )


class _Side:
    """A tensor as kernels address it: (n, c, d, h) strides in vectors of ``unit`` elements, ``pixel`` elements along W.

    ``last``: channels are dense. ``group``: pixels along W that are loaded or stored as one vector.
    """

    def __init__(self, tensor: torch.Tensor, last: bool, whole_steps: int):
        strides = [0 if tensor.size(dim) == 1 else tensor.stride(dim) for dim in range(5)]
        self.last = last
        self.pixel = strides[4] if last else 1
        dense = (tensor.size(1), strides[4]) if last else (strides[1], tensor.size(4))
        self.unit = 1
        if tensor.data_ptr() % VECTOR_BYTES == 0:  # Triton proves a base aligned to 16 bytes or not at all
            self.unit = math.gcd(VECTOR_BYTES // tensor.element_size(), strides[0], *strides[2:4], *dense)
        self.strides = tuple(stride // self.unit for stride in (strides[0], 0 if last else strides[1], *strides[2:4]))
        self.group = 1 if last else math.gcd(self.unit, whole_steps)


def _read(tensor: torch.Tensor, layout: str, whole_steps: int) -> tuple[torch.Tensor, _Side]:
    """An operand as kernels take it, a copy only if neither its channels nor its rows are dense."""
    channels = tensor.size(1)
    if layout == STRIDED:
        tensor = tensor.contiguous(memory_format=torch.channels_last_3d if channels > 1 else torch.contiguous_format)
    return tensor, _Side(tensor, channels_dense(layout, channels), whole_steps)


def _even(size: int, strips: int, step: int) -> bool:
    """Whether every strip's own positions are inside."""
    return size >= strips * step


def _upcast(problem: Problem) -> bool:
    """The interpreter truncates to bfloat16."""
    return problem.dtype == "bfloat16" and interpreted()


def _common(problem: Problem, config: DepthwiseConfig, at: Plan) -> dict:
    return {
        "C_UNIT": channel_unit(problem),
        "LAST": lanes_last(problem),
        "INDEX": tl.int64 if problem.index64 else tl.int32,
        "COLUMNS": config.columns,
        "BLOCK": at.lanes,
        "num_warps": config.num_warps,
    }


def _gather(problem: Problem, operands: Operands, config: DepthwiseConfig) -> torch.Tensor:
    dgrad = problem.pass_ == "dgrad"
    at, axis, met = plan(problem, config), axes(problem), met_taps(problem)
    step = strip_step(config.columns, axis.width, dgrad)
    part, parts, shift = parts_of_row(problem)
    source, layout = (operands.grad, problem.layouts[2]) if dgrad else (operands.input, problem.layouts[0])
    x, read = _read(source, layout, step if config.kernel == SLIDE or parts == 1 else math.gcd(step, shift))
    y = problem.empty_result(x.device)
    written = _Side(y, channels_dense(problem.result_layout, y.size(1)), config.columns)
    unit = channel_unit(problem)
    multiplier = problem.out_channels // problem.in_channels
    tile = (at.tile[0] // unit, *at.tile[1:])
    constants = dict(
        X_UNIT=read.unit, Y_UNIT=written.unit, X_PIXEL=read.pixel, Y_PIXEL=written.pixel,
        X_GROUP=read.group, Y_GROUP=written.group,
        Y_EVEN=_even(y.size(4), at.strips[1], config.columns),
        Y_LAST=written.last, DGRAD=dgrad, BIAS=operands.bias is not None, UPCAST=_upcast(problem),
        **_common(problem, config, at),
    )  # fmt: skip
    even = _even(x.size(4), at.strips[1], step)
    taps = operands.weight[:, 0]
    for dim, (first, count) in enumerate(zip(met.first, met.kernel, strict=True)):
        taps = taps.narrow(dim + 1, first, count)
    programs = math.prod(at.tiles) * at.chunks * problem.batch
    sizes = (tuple(x.shape[2:]), tuple(y.shape[2:]))
    if config.kernel == SLIDE:
        launch_kernel(
            slide,
            (programs, 1),
            (
                x, taps, operands.bias, y, *sizes, met.pad[0], read.strides, taps.stride(), written.strides,
                produced(problem)[0] // unit, tile, at.tiles, at.strips, at.chunk, at.chunks,
            ),
            dict(
                **constants, X_EVEN=even, MULTIPLIER=multiplier, DEPTH=axis.depth, HEIGHT=axis.height, WIDTH=axis.width,
                ROWS=config.rows,
            ),
        )  # fmt: skip
        return y
    weights = torch.empty((*met.kernel, problem.out_channels), dtype=torch.float32, device=x.device)
    weights.copy_(taps.permute(1, 2, 3, 0))
    pad, stride, dilation = met.pad[:2], problem.stride[:2], problem.dilation[:2]
    common = tuple(map(math.gcd, stride, dilation))
    if dgrad:  # output o reads the gradient at (o + pad - t * dilation) / stride, for the taps that divide
        scale, start, step = (1, 1), pad, tuple(-d // g for d, g in zip(dilation, common, strict=True))
    else:
        scale, start, step = stride, tuple(-p for p in pad), dilation
    strided = dgrad and at.classes != (1, 1)
    launch_kernel(
        rows,
        (programs, math.prod(at.classes)),
        (
            x, weights, operands.bias, y, *sizes, met.kernel, scale, start, step, at.classes, dilation,
            tuple(s // g for s, g in zip(stride, common, strict=True)) if strided else (1, 1),
            read.strides, written.strides, produced(problem)[0] // unit, problem.out_channels // unit, multiplier, parts,
            tile, at.tiles, at.strips[1], at.chunk, at.chunks,
        ),
        dict(
            **constants, X_EVEN=even and parts == 1 and part == axis.width[0], MULTIPLIED=multiplier > 1, STRIDED=strided,
            WIDTH=(part, *axis.width[1:]), REST=(axis.width[0] - parts * part, *axis.width[1:]), SHIFT=shift,
        ),
    )  # fmt: skip
    return y


def _wgrad(problem: Problem, operands: Operands, config: DepthwiseConfig) -> torch.Tensor:
    at, axis, met = plan(problem, config), axes(problem), met_taps(problem)
    block = block_of_taps(problem, config)
    step = strip_step(config.columns, axis.width, False)
    shift = block[2] * problem.dilation[2] if at.blocks[2] > 1 else 0
    x, x_side = _read(operands.input, problem.layouts[0], math.gcd(step, shift))
    grad, g_side = _read(operands.grad, problem.layouts[2], config.columns)
    dw = problem.empty_result(x.device)
    taps = dw[:, 0]
    if met.kernel != problem.kernel_size:  # what only meets padding has no gradient
        dw.zero_()
    for dim, (first, count) in enumerate(zip(met.first, met.kernel, strict=True)):
        taps = taps.narrow(dim + 1, first, count)
    partials = torch.empty((config.splits, *met.kernel, problem.out_channels), dtype=torch.float32, device=x.device)
    unit = channel_unit(problem)
    launch_kernel(
        wgrad,
        (at.tiles[0] * math.prod(at.blocks) * config.splits, 1),
        (
            grad, x, partials, problem.input_size, problem.output_size, met.pad[0], met.kernel, at.blocks,
            x_side.strides, g_side.strides, problem.out_channels // unit, problem.out_channels // problem.in_channels,
            (at.tile[0] // unit, *at.tile[1:]), at.tiles, at.strips, at.chunk, at.chunks,
            problem.batch * at.chunks * at.tiles[1] * at.tiles[2], at.share,
        ),
        dict(
            X_UNIT=x_side.unit, G_UNIT=g_side.unit, X_PIXEL=x_side.pixel, G_PIXEL=g_side.pixel,
            X_GROUP=x_side.group, G_GROUP=g_side.group,
            X_EVEN=at.blocks[2] == 1 and _even(x.size(4), at.strips[1], step),
            G_EVEN=_even(grad.size(4), at.strips[1], config.columns),
            G_LAST=g_side.last, DEPTH=(block[0], *axis.depth[1:]), HEIGHT=(block[1], *axis.height[1:]),
            WIDTH=(block[2], *axis.width[1:]), ROWS=config.rows, CHANNELS=at.tile[0], **_common(problem, config, at),
        ),
    )  # fmt: skip
    launch_kernel(
        reduce_partials,
        (-(-met.count * problem.out_channels // _REDUCE_ELEMENTS), 1),
        (partials, taps, met.kernel, problem.out_channels, taps.stride(), config.splits),
        dict(UPCAST=_upcast(problem), SPLITS=_REDUCE_SPLITS, ELEMENTS=_REDUCE_ELEMENTS, num_warps=4),
    )
    return dw
