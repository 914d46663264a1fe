"""Depthwise convolution: groups == in_channels, with any channel multiplier. Direct, in float32.

    y[n, c, o] = sum over taps t of  x[n, c, o * stride + t * dilation - padding] * w[c, t]      (+ bias[c])

forward as it stands, dgrad with the parity of a stride known at compile time, wgrad in two stages: float32 partial sums
of at most 64 MiB, then a reduction in a fixed order. Every thread computes a strip of neighbouring pixels for a few
channels, so that an input is loaded and converted once for all the outputs and taps of the strip that it meets
(kernels.py, wgrad.py). Channels-last tensors and views of them are read and written in vectors of channels, contiguous
ones in vectors of pixels; others are copied.

Bytes by design. From memory: input, weight and output once; planes between two parts of the depth twice, in all at most
1.25 times the least where tensors outgrow L2, and in wgrad its partial sums. From L2: the input times the halo of a
tile, (rows + 2) (columns + 2) / (rows columns) for a kernel of 3, at most 1.5 from 12 x 12 pixels on ("rows": again for
taps along D that L1 no longer holds). From L1, with strips of 4 x 4 pixels: 2.25 times.

Instructions by design. Each output and channel takes one FMA a tap, and what the SASS of sm_90 shows beside them for
3x3x3: "slide" 36 in all with strips of 4 x 4 in 16-bit types (38 with 2 x 2), 34 in float32 and along dense rows;
"rows" 49; wgrad 36 to 38. A multiprocessor starts 128 a cycle, so 16-bit layers of 3x3x3 (4 bytes an output) are
bound by that rate where memory is fast: 3.6 outputs and 14.2 bytes a cycle at most. On 132 multiprocessors at 1.75 GHz
that is 3.3 TB/s: 98 % of what an H100's memory gives (3.35 by its data sheet), 68 % of an H200's. float32 layers (8
bytes), kernels of up to 16 taps and strided layers are bound by memory on both. Kernels above 64 taps are bound by
products: 62 % of the instructions of 5x5x5 are FMAs. Since all 27 taps of a channel stay in registers, "slide" holds 2
channels of a 16-bit type in a thread and loads 4 bytes at a time (a warp the same whole lines of memory as with wider
loads), or 4 channels in strips of 2 x 2: 8 bytes, 38 instructions. "rows", float32, smaller kernels and dense rows
load 16.

Why "slide" does not load 16 bytes (8 channels) in 16-bit types at 3x3x3: 27 float32 taps alone would take 216 of 255
registers; that spills 170 to 776 times and takes 52 to 60 instructions. Forms that load float32 taps where they are
used, forward with bias, beside 36.3 on sm_90 and 35.5 on sm_80 of the 4 x 4 strips of 2 channels (1 x 4: one row of 4
columns; on sm_90 with Triton 3.9 where nothing else is said):

    one block of code            1 x 4, 2 x 2    210 and 168 spills; 43 and 42 instructions
    a loop over rows of taps     1 x 4           none on sm_80, sm_90 and gfx942, with 3.6 too; 39.1 to 39.3
                                 1 x 6           68 spills; 39.4
                                 1 x 8, 8 bytes  none on sm_80 and sm_90; 37.6
    a branch around every row    1 x 4           none on sm_80 and sm_90; 40.5 and 40.9
    of inputs                    1 x 6           none, with 3.6 too; 40.2. On sm_80 with 3.9: 12; 40.4
                                 2 x 3           392 spills; 53

Strips of few pixels need more inputs for an output, 4.5 of 1 x 4 against 2.25 of 4 x 4, and each is converted to
float32: without spills, 16 bytes cost at least 8 % more instructions of a kernel that is bound by them.
"""

from __future__ import annotations

import functools
import math

import torch
import triton.language as tl

from ...problem import STRIDED, VECTOR_BYTES, Operands, Problem, met_taps
from ..base import (
    WORKSPACE_LIMIT,
    Memory,
    Work,
    aligned,
    dgrad_steps,
    format_strides,
    refused_by_kernels,
    residual_and_slope,
    upcast,
)
from ..launching import launch_kernel, same_options
from .configs import DepthwiseConfig, configs, partial_bytes, register_limit, smallest
from .geometry import Plan, plan, unsplit, whole_plan
from .kernels import rows, slide
from .strips import ROWS, SLIDE, axes, channels_dense, parts_of_row, ring_size, strip_step
from .wgrad import reduce_partials, wgrad

__all__ = ["NAME", "DepthwiseConfig", "configs", "launch", "memory", "supports", "work"]

NAME = "depthwise"
_KNOWN_LAUNCHES = 4096  # whose arguments are kept: working them out takes longer than all else of an eager call
_REDUCE_SPLITS, _REDUCE_ELEMENTS = 64, 16  # of one program of the second stage of wgrad


def supports(problem: Problem) -> str | None:
    if reason := refused_by_kernels(problem):
        return reason
    if problem.groups != problem.in_channels:
        return f"groups={problem.groups} is not in_channels={problem.in_channels}"
    if problem.pass_ == "dgrad" and problem.stride[2] > 16:
        return f"stride {problem.stride[2]} along W is more than the 16 outputs of a strip"
    if problem.pass_ == "wgrad" and partial_bytes(problem, smallest(problem)) > WORKSPACE_LIMIT:
        return f"partial sums of more than {WORKSPACE_LIMIT} bytes"
    return None


def memory(problem: Problem, config: DepthwiseConfig) -> Memory:
    at = axes(problem)
    if at.wgrad:
        return Memory(partial_bytes(problem, config), at.copies)
    return Memory(0, at.copies + (4 * problem.out_channels * at.count if config.kernel == ROWS else 0))


def launch(problem: Problem, operands: Operands, config: DepthwiseConfig) -> torch.Tensor:
    if problem.pass_ == "wgrad":
        return _wgrad(problem, operands, config)
    return _gather(problem, operands, config)


def work(problem: Problem, config: DepthwiseConfig) -> Work:
    """The launch as the cost model sees it: one step computes one plane of the result, for a program's tile."""
    whole = whole_plan(problem, unsplit(config))
    chunk, chunks, share = whole.parts(config.splits)
    outputs = config.rows * config.columns * whole.lanes
    at, item = axes(problem), problem.itemsize
    steps = chunk + (ring_size(at.depth, False) - 1 if config.kernel == SLIDE else 0)
    if at.wgrad:
        blocks = math.prod(whole.blocks)
        programs, steps = whole.tiles[0] * blocks * config.splits, steps * share
        written, issued, read = 4.0 * whole.tile[0] * math.prod(whole.block), 1 / blocks, whole.read_bytes / blocks
    else:
        programs = math.prod(whole.tiles) * chunks * problem.batch * math.prod(whole.classes)
        written, issued, read = float(outputs * item * chunk), 1.0, whole.read_bytes
    used = memory(problem, config)
    return Work(
        programs=programs,
        iterations=steps,
        flops=2.0 * outputs * whole.instructions * issued,
        bytes_read=read,
        bytes_written=written,
        num_warps=config.num_warps,
        shared_bytes=0,
        extra_bytes=2.0 * used.copies + used.workspace,
        launches=1 + (at.wgrad or config.kernel == ROWS),
        tensor_cores=False,
        operations=config.rows * config.columns * whole.instructions,  # unrolled
    )


class _Side:
    """A tensor as kernels address it: (n, c, d, h) strides in vectors of ``unit`` elements, ``pixel`` elements along W.

    ``last``: channels are dense. ``group``: pixels along W that are loaded or stored as one vector.
    """

    def __init__(self, problem: Problem, role: int, strides: tuple[int, ...], aligned: bool, whole_steps: int):
        shape = problem.shapes[role]
        n, c, d, h, w = (0 if size == 1 else stride for size, stride in zip(shape, strides, strict=True))
        self.last = last = channels_dense(problem.layouts[role], shape[1])
        self.pixel = w if last else 1
        dense = (shape[1], w) if last else (c, shape[4])
        self.unit = math.gcd(VECTOR_BYTES // problem.itemsize, n, d, h, *dense) if aligned else 1
        self.strides = tuple(stride // self.unit for stride in (n, 0 if last else c, d, h))
        self.group = 1 if last else math.gcd(self.unit, whole_steps)


def _readable(problem: Problem, tensor: torch.Tensor, role: int) -> torch.Tensor:
    """An operand as kernels take it, a copy only if neither its channels nor its rows are dense."""
    if problem.layouts[role] != STRIDED:
        return tensor
    return tensor.contiguous(memory_format=torch.channels_last_3d if tensor.size(1) > 1 else torch.contiguous_format)


def _even(size: int, strips: int, step: int) -> bool:
    """Whether every strip's own positions are inside."""
    return size >= strips * step


def _gather(problem: Problem, operands: Operands, config: DepthwiseConfig) -> torch.Tensor:
    dgrad = problem.pass_ == "dgrad"
    x = _readable(problem, operands.grad if dgrad else operands.input, 2 if dgrad else 0)
    w = met_taps(problem).of(operands.weight)
    y = problem.empty_result(x.device)
    if config.kernel == SLIDE:
        grid, arguments, options = _slide_launch(problem, config, x.stride(), aligned(x), w.stride())
        launch_kernel(
            slide, grid, (x, w, operands.bias, y, *arguments, *residual_and_slope(problem, operands)), options
        )
        return y
    taps = torch.empty((*w.shape[2:], problem.out_channels), dtype=torch.float32, device=x.device)
    taps.copy_(w[:, 0].permute(1, 2, 3, 0))
    grid, arguments, options = _rows_launch(problem, config, x.stride(), aligned(x))
    launch_kernel(rows, grid, (x, taps, operands.bias, y, *arguments, *residual_and_slope(problem, operands)), options)
    return y


def _common(problem: Problem, config: DepthwiseConfig, at: Plan) -> dict:
    return {
        "C_UNIT": axes(problem).unit,
        "LAST": axes(problem).last,
        "INDEX": tl.int64 if problem.index64 else tl.int32,
        "COLUMNS": config.columns,
        "BLOCK": at.lanes,
        "num_warps": config.num_warps,
        **register_limit(problem, config),
    }


def _sides(problem: Problem, config: DepthwiseConfig, strides: tuple[int, ...], aligned: bool, whole_steps: int):
    """The sizes and what is read and written, and the options that both kernels of forward and dgrad have in common."""
    dgrad = problem.pass_ == "dgrad"
    at, step = plan(problem, config), strip_step(config.columns, axes(problem).width, dgrad)
    sizes = (problem.output_size, problem.input_size) if dgrad else (problem.input_size, problem.output_size)
    x = _Side(problem, 2 if dgrad else 0, strides, aligned, whole_steps)
    y_strides = format_strides(problem.result_shape, problem.memory_format)
    y = _Side(problem, 0 if dgrad else 2, y_strides, True, config.columns)
    options = dict(
        X_UNIT=x.unit, Y_UNIT=y.unit, X_PIXEL=x.pixel, Y_PIXEL=y.pixel, X_GROUP=x.group, Y_GROUP=y.group,
        X_EVEN=_even(sizes[0][2], at.strips[1], step), Y_EVEN=_even(sizes[1][2], at.strips[1], config.columns),
        Y_LAST=y.last, DGRAD=dgrad, BIAS=problem.bias, ACTIVATION=problem.activation, UPCAST=upcast(problem),
        **_common(problem, config, at),
    )  # fmt: skip
    return sizes, x, y, options


@functools.lru_cache(maxsize=_KNOWN_LAUNCHES)
def _slide_launch(
    problem: Problem, config: DepthwiseConfig, strides: tuple[int, ...], aligned: bool, w_strides: tuple[int, ...]
) -> tuple[tuple[int, int], tuple, dict]:
    """(grid, arguments behind the tensors, options) for an x and a weight of these strides."""
    at, axis, unit = plan(problem, config), axes(problem), axes(problem).unit
    step = strip_step(config.columns, axis.width, axis.dgrad)
    sizes, x, y, options = _sides(problem, config, strides, aligned, step)
    arguments = (
        *sizes, met_taps(problem).pad[0], x.strides, (w_strides[0], *w_strides[2:]), y.strides,
        axis.channels // unit, (at.tile[0] // unit, *at.tile[1:]), at.tiles, at.strips, at.chunk, at.chunks,
    )  # fmt: skip
    options = dict(
        **options, MULTIPLIER=problem.out_channels // problem.in_channels, DEPTH=axis.depth, HEIGHT=axis.height,
        WIDTH=axis.width, ROWS=config.rows,
    )  # fmt: skip
    return (math.prod(at.tiles) * at.chunks * problem.batch, 1), arguments, options


@functools.lru_cache(maxsize=_KNOWN_LAUNCHES)
def _rows_launch(
    problem: Problem, config: DepthwiseConfig, strides: tuple[int, ...], aligned: bool
) -> tuple[tuple[int, int], tuple, dict]:
    """(grid, arguments behind the tensors, options) for an x of these strides."""
    dgrad = problem.pass_ == "dgrad"
    at, axis, met, unit = plan(problem, config), axes(problem), met_taps(problem), axes(problem).unit
    part, parts, shift = parts_of_row(problem)
    whole = part == axis.width[0]
    step = strip_step(config.columns, axis.width, dgrad)
    sizes, x, y, options = _sides(problem, config, strides, aligned, step if whole else math.gcd(step, shift))
    pad, stride, dilation = met.pad[:2], problem.stride[:2], problem.dilation[:2]
    if dgrad:
        scale, start, (step, tap_step) = (1, 1), pad, dgrad_steps(stride, dilation)
    else:
        scale, start, step, tap_step = stride, tuple(-p for p in pad), dilation, (1, 1)
    arguments = (
        *sizes, met.kernel, scale, start, step, at.classes, dilation, tap_step, x.strides, y.strides,
        axis.channels // unit, problem.out_channels // unit, problem.out_channels // problem.in_channels, parts,
        (at.tile[0] // unit, *at.tile[1:]), at.tiles, at.strips[1], at.chunk, at.chunks,
    )  # fmt: skip
    options.update(
        X_EVEN=options["X_EVEN"] and whole, MULTIPLIED=problem.out_channels > problem.in_channels,
        STRIDED=at.classes != (1, 1), WIDTH=(part, *axis.width[1:]),
        REST=(axis.width[0] - parts * part, *axis.width[1:]), SHIFT=shift,
    )  # fmt: skip
    return (math.prod(at.tiles) * at.chunks * problem.batch, math.prod(at.classes)), arguments, options


def _wgrad(problem: Problem, operands: Operands, config: DepthwiseConfig) -> torch.Tensor:
    x, grad = _readable(problem, operands.input, 0), _readable(problem, operands.grad, 2)
    dw = problem.empty_result(x.device)
    taps = met_taps(problem).of(dw)
    if taps is not dw:  # what only meets padding has no gradient
        dw.zero_()
    filters, _, *kernel = taps.shape
    partials = torch.empty((config.splits, *kernel, filters), dtype=torch.float32, device=x.device)
    strides = (x.stride(), grad.stride())
    grid, arguments, options = _wgrad_launch(problem, config, *strides, aligned(x), aligned(grad))
    launch_kernel(wgrad, grid, (grad, x, partials, *arguments), options)
    launch_kernel(
        reduce_partials,
        (-(-taps.numel() // _REDUCE_ELEMENTS), 1),
        (partials, taps, tuple(kernel), filters, (taps.stride(0), *taps.stride()[2:]), config.splits),
        same_options(UPCAST=upcast(problem), SPLITS=_REDUCE_SPLITS, ELEMENTS=_REDUCE_ELEMENTS, num_warps=4),
    )
    return dw


@functools.lru_cache(maxsize=_KNOWN_LAUNCHES)
def _wgrad_launch(
    problem: Problem,
    config: DepthwiseConfig,
    x_strides: tuple[int, ...],
    grad_strides: tuple[int, ...],
    x_aligned: bool,
    grad_aligned: bool,
) -> tuple[tuple[int, int], tuple, dict]:
    """(grid, arguments behind the tensors, options) for operands of these strides."""
    at, axis, unit = plan(problem, config), axes(problem), axes(problem).unit
    step = strip_step(config.columns, axis.width, False)
    shift = at.block[2] * problem.dilation[2] if at.blocks[2] > 1 else 0
    x = _Side(problem, 0, x_strides, x_aligned, math.gcd(step, shift))
    grad = _Side(problem, 2, grad_strides, grad_aligned, config.columns)
    arguments = (
        problem.input_size, problem.output_size, met_taps(problem).pad[0], met_taps(problem).kernel, at.blocks,
        x.strides, grad.strides, problem.out_channels // unit, problem.out_channels // problem.in_channels,
        (at.tile[0] // unit, *at.tile[1:]), at.tiles, at.strips, at.chunk, at.chunks,
        problem.batch * at.chunks * at.tiles[1] * at.tiles[2], at.share,
    )  # fmt: skip
    options = dict(
        X_UNIT=x.unit, G_UNIT=grad.unit, X_PIXEL=x.pixel, G_PIXEL=grad.pixel, X_GROUP=x.group, G_GROUP=grad.group,
        X_EVEN=at.blocks[2] == 1 and _even(problem.input_size[2], at.strips[1], step),
        G_EVEN=_even(problem.output_size[2], at.strips[1], config.columns), G_LAST=grad.last,
        DEPTH=(at.block[0], *axis.depth[1:]), HEIGHT=(at.block[1], *axis.height[1:]),
        WIDTH=(at.block[2], *axis.width[1:]), ROWS=config.rows, CHANNELS=at.tile[0], **_common(problem, config, at),
    )  # fmt: skip
    return (at.tiles[0] * math.prod(at.blocks) * config.splits, 1), arguments, options
