"""Implicit GEMM: the portable engine. Any stride, dilation, padding and groups, forward, dgrad and wgrad.

The convolution as a matrix product whose left operand is never built: pixels x (taps, channels) times
(taps, channels) x filters (Chetlur et al., 2014, cuDNN; CUTLASS calls it fprop / dgrad / wgrad). Operands whose
channels are not dense and last are copied; the result is written in the format that torch returns. Partial sums of
split reductions are float32 and added in a fixed order, so equal inputs give equal bits.

Taps along depth that only read padding, for all pixels of a tile, are left out of forward and dgrad: two of three where one
frame comes from three, as in the chunks that video autoencoders decode. So that the tiles of small planes have few depths,
they go through all samples of one depth before the next (configs.depths).

wgrad gathers the narrower of input and gradient where it can (configs.exchanged). With fewer filters than channels an
infinity or NaN in the input then reaches taps of its channel that it would not meet by the definition.

Small groups share a tile: their weights are blocks on its diagonal, zeros elsewhere (configs.packed_groups). Of g groups
a tile multiplies g times what it must, instead of leaving as much of it empty, and loads the channels of all as vectors.
In forward and dgrad an infinity or NaN in a channel therefore is NaN in what the groups of its tile compute of that pixel.

Bytes by design. From memory: input, weight and output once, the minimum, where the wave of programs that runs at once
keeps what it reads in L2 (cost_model._shared_reads counts it); besides, twice what is copied for its layout, and 8 bytes
an element of the result for each split. From L2: every tile of the input once for each of its taps and column of tiles. Layers
of few channels are therefore bound by L2, not by memory: "depthwise", "folded", "halo" and "kn2row" are for those that
they take.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable

import torch
import triton.language as tl

from ...problem import CHANNELS_LAST, CONTIGUOUS, NO_ACTIVATION, STRIDED, VECTOR_BYTES, VIEW, Operands, Problem
from ..base import (
    CHAIN,
    NO_EPILOGUE,
    READ,
    Memory,
    Order,
    Work,
    aligned,
    dgrad_steps,
    format_strides,
    in_format,
    refused_by_kernels,
    residual_and_slope,
    upcast,
)
from ..launching import launch_kernel, same_options
from .configs import (
    GROUP_M,
    GemmConfig,
    configs,
    depths,
    exchanged,
    packed_groups,
    refused_by_tensor_cores,
    sides,
    walked,
    workspace_bytes,
)
from .kernels import gather_gemm, reduce_splits, wgrad_gemm

__all__ = ["NAME", "GemmConfig", "configs", "launch", "memory", "supports", "work"]

NAME = "implicit_gemm"
_MOST_TAP_BITS = 63  # one bit for every tap of each dimension, in a 64-bit mask
_REDUCE_BLOCK = 1024  # elements of one program of the split reduction
_KNOWN_LAUNCHES = 4096  # whose arguments are kept: working them out takes longer than all else of an eager call


def supports(problem: Problem) -> str | None:
    if reason := refused_by_kernels(problem):
        return reason
    if problem.pass_ != "wgrad" and sum(problem.kernel_size) > _MOST_TAP_BITS:
        return f"kernel sizes {problem.kernel_size} add up to more than {_MOST_TAP_BITS}"
    return refused_by_tensor_cores(problem)


def memory(problem: Problem, config: GemmConfig) -> Memory:
    return Memory(workspace_bytes(problem, config), copied_bytes(problem))


@functools.lru_cache(maxsize=4096)
def copied_bytes(problem: Problem, walks_views: bool = False) -> int:
    """Of the operands that are copied for their layout. ``walks_views``: what wgrad walks along may be a view, too."""
    copied = [problem.shapes[i] for i in READ[problem.pass_] if problem.layouts[i] in _copied_layouts(problem, i, walks_views)]
    return problem.itemsize * sum(map(math.prod, copied))


def _copied_layouts(problem: Problem, role: int, walks_views: bool) -> tuple[str, ...]:
    """What is gathered from may be a view; the weight, and what wgrad walks along, are dense."""
    walked_along = problem.pass_ == "wgrad" and not walks_views and role == (0 if exchanged(problem) else 2)
    dense = role == 1 or walked_along
    return (CONTIGUOUS, STRIDED, VIEW) if dense else (CONTIGUOUS, STRIDED)


def launch(problem: Problem, operands: Operands, config: GemmConfig) -> torch.Tensor:
    if problem.pass_ == "wgrad":
        return _wgrad(problem, operands, config)
    return _gather(problem, operands, config)


@functools.lru_cache(maxsize=1024)
def _extents(problem: Problem) -> tuple[float, int, float, int, float, int, int]:
    """(rows, columns, reduction in pixels or in taps, parity classes, taps through which a pixel is read, reduced channels,
    bytes copied) of one group's matrix product: what :func:`work` needs of a problem, whatever the config."""
    met = max(1.0, problem.taps / math.prod(problem.stride))
    (produced, reduced), copies = sides(problem), copied_bytes(problem)
    if problem.pass_ == "wgrad":
        return produced, problem.taps * reduced, walked(problem), 1, met, reduced, copies
    classes = math.prod(problem.stride) if problem.pass_ == "dgrad" else 1  # which share pixels and taps evenly
    pixels = problem.result_elements // (produced * problem.groups) / classes
    return pixels, produced, problem.taps / classes, classes, met, reduced, copies


def work(problem: Problem, config: GemmConfig) -> Work:
    """The launch as the cost model sees it."""
    item, wgrad, together = problem.itemsize, problem.pass_ == "wgrad", packed_groups(problem, config)
    m, n, k, splits = config.block_m, config.block_n, config.block_k, config.splits
    extent_m, extent_n, reduction, classes, met, reduced, copies = _extents(problem)
    rows, columns = math.ceil(extent_m * (together if wgrad else 1) / m), math.ceil(extent_n * together / n)
    row_bytes, column_bytes = float(item * m * k), float(item * n * k)
    if wgrad:
        iterations = math.ceil(math.ceil(reduction / k) / splits)
        order = Order(rows, columns, GROUP_M, row_bytes, column_bytes / met)
    else:
        _, live = depths(problem, m)
        iterations = math.ceil(math.ceil(reduction * live * math.ceil(together * reduced / k)) / splits)
        order = Order(rows, columns, GROUP_M, row_bytes, column_bytes, met)
    return Work(
        programs=rows * columns * classes * math.ceil(problem.groups / together) * splits,
        iterations=iterations,
        flops=2.0 * m * n * k,
        bytes_read=row_bytes + column_bytes,
        bytes_written=float((4 if splits > 1 else item) * m * n),
        num_warps=config.num_warps,
        shared_bytes=item * (m + n) * k * config.num_stages,
        extra_bytes=2.0 * copies + (workspace_bytes(problem, config) + problem.result_elements * item if splits > 1 else 0.0),
        launches=1 + (splits > 1),
        tensor_cores=problem.on_tensor_cores,
        sums=m * n,
        vector_bytes=max(math.gcd(problem.alignment, together * reduced * item), item),
        stages=config.num_stages,
        order=order,
        product=(m, n),
    )


def unit(itemsize: int, *elements: int) -> int:
    """Elements of the widest vector that divides all of these counts."""
    return math.gcd(VECTOR_BYTES // itemsize, *elements)


def channels_last(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor with dense channels as the fastest dimension: itself where it is so, else a copy."""
    return tensor if tensor.stride(1) == 1 else dense(tensor)


def dense(tensor: torch.Tensor) -> torch.Tensor:
    """Dense in channels-last order: itself where it is so, else a copy."""
    return in_format(tensor, torch.channels_last_3d)


def pixel_strides(shape: tuple[int, ...], strides: tuple[int, ...]) -> tuple[int, int, int, int]:
    """(n, d, h, w) strides in elements; of a dimension of size 1 the stride is never used, and 0."""
    return tuple(0 if shape[dim] == 1 else strides[dim] for dim in (0, 2, 3, 4))


def in_units(values: Iterable[int], unit: int) -> tuple[int, ...]:
    return tuple(value // unit for value in values)


def _constants(problem: Problem, config: GemmConfig) -> dict:
    return {
        "INDEX": tl.int64 if problem.index64 else tl.int32,
        "PRECISION": problem.precision,
        "UPCAST": upcast(problem),
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "GROUP_M": GROUP_M,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }


def _gather(problem: Problem, operands: Operands, config: GemmConfig) -> torch.Tensor:
    """forward and dgrad: every pixel of the result gathers from its taps."""
    x = channels_last(operands.grad if problem.pass_ == "dgrad" else operands.input)
    w = dense(operands.weight)
    y = problem.empty_result(x.device)
    split = config.splits > 1
    target = x.new_empty((config.splits, y.numel()), dtype=torch.float32) if split else y
    grid, arguments, options = _gather_launch(problem, config, x.stride(), aligned(x), aligned(w))
    end = residual_and_slope(problem, operands)
    launch_kernel(gather_gemm, grid, (x, w, operands.bias, target, *arguments, *(NO_EPILOGUE if split else end)), options)
    if split:
        reduce(problem, target, operands.bias, y, end)
    return y


@functools.lru_cache(maxsize=_KNOWN_LAUNCHES)
def _gather_launch(
    problem: Problem, config: GemmConfig, strides: tuple[int, ...], x_aligned: bool, w_aligned: bool
) -> tuple[tuple[int, int], tuple, dict]:
    """(grid, arguments behind the tensors, options) for an x of these strides."""
    dgrad = problem.pass_ == "dgrad"
    x_shape, y_shape = problem.input_shape, problem.output_shape
    if dgrad:
        x_shape, y_shape = y_shape, x_shape
    together = packed_groups(problem, config)
    produced, reduced = (together * count for count in sides(problem))
    low, stride, dilation = problem.padding[::2], problem.stride, problem.dilation
    strided = dgrad and stride != (1, 1, 1)
    step, tap_step = dgrad_steps(stride, dilation)
    if dgrad:
        scale, start = (1, 1, 1), low
    else:
        scale, start, step = stride, tuple(-pad for pad in low), dilation
    classes = math.prod(stride) if strided else 1
    largest = tuple(-(-size // s) for size, s in zip(y_shape[2:], stride, strict=True)) if strided else y_shape[2:]
    tiles_m = -(-problem.batch * math.prod(largest) // config.block_m)
    tiles_n = -(-produced // config.block_n)

    split = config.splits > 1  # float32 partial sums, in channels-last order
    itemsize = 4 if split else problem.itemsize
    y_strides = format_strides(y_shape, torch.channels_last_3d if split else problem.memory_format)
    y_pixels = pixel_strides(y_shape, y_strides)
    y_unit = unit(itemsize, produced, y_shape[1], *y_pixels) if y_strides[1] == 1 else 1
    x_pixels = pixel_strides(x_shape, strides)
    x_unit = unit(problem.itemsize, reduced, x_shape[1], *x_pixels) if x_aligned else 1
    w_unit = unit(problem.itemsize, problem.group_in) if w_aligned else 1
    w_strides = (problem.taps * problem.group_in, problem.group_in)
    arguments = (
        problem.batch, x_shape[2:], y_shape[2:], problem.kernel_size,
        scale, start, step, stride, dilation, tap_step,
        in_units(x_pixels, x_unit), in_units(w_strides, w_unit), (*in_units(y_pixels, y_unit), y_strides[1]),
        math.prod(y_shape) if split else 0, reduced // x_unit, produced // y_unit,
        (x_shape[1] // x_unit, y_shape[1] // y_unit, problem.group_out) if together > 1 else None, config.splits, tiles_m,
        int(depths(problem, config.block_m)[0]),
    )  # fmt: skip
    options = dict(
        X_UNIT=x_unit,
        W_UNIT=w_unit,
        Y_UNIT=y_unit,
        DGRAD=dgrad,
        STRIDED=strided,
        BIAS=problem.bias and not split,  # of splits, the reduction adds it, and what follows it
        ACTIVATION=NO_ACTIVATION if split else problem.activation,
        EVEN=reduced % config.block_k == 0 or together > 1,  # several groups are one step
        FLAT=problem.taps < 32,
        BITS=tl.int32 if min(problem.taps, sum(problem.kernel_size)) < 32 else tl.int64,
        **_constants(problem, config),
    )
    return (tiles_m * tiles_n * -(-problem.groups // together) * config.splits, classes), arguments, options


def _wgrad(problem: Problem, operands: Operands, config: GemmConfig) -> torch.Tensor:
    """wgrad: filters x pixels times pixels x (taps, channels); the pixels are shared out among the splits.

    Or channels x pixels times pixels x (taps, filters), with the roles of the two exchanged.
    """
    x, grad = (operands.grad, operands.input) if exchanged(problem) else (operands.input, operands.grad)
    x, grad = channels_last(x), dense(grad)
    dw = problem.empty_result(x.device)
    split = config.splits > 1
    target = x.new_empty((config.splits, dw.numel()), dtype=torch.float32) if split else dw
    grid, arguments, options = _wgrad_launch(problem, config, x.stride(), aligned(x), aligned(grad))
    launch_kernel(wgrad_gemm, grid, (grad, x, target, *arguments), options)
    if split:
        reduce(problem, target, None, dw)
    return dw


@functools.lru_cache(maxsize=_KNOWN_LAUNCHES)
def _wgrad_launch(
    problem: Problem, config: GemmConfig, strides: tuple[int, ...], x_aligned: bool, grad_aligned: bool
) -> tuple[tuple[int, int], tuple, dict]:
    """(grid, arguments behind the tensors, options) for an x of these strides that is gathered."""
    produced, reduced = sides(problem)
    together = packed_groups(problem, config)
    tiles_m = -(-together * produced // config.block_m)
    tiles_n = -(-together * problem.taps * reduced // config.block_n)
    split = config.splits > 1
    x_shape, g_shape, geometry, dw_strides = wgrad_roles(problem, split)
    x_pixels = pixel_strides(x_shape, strides)
    x_unit = unit(problem.itemsize, together * reduced, x_shape[1], *x_pixels) if x_aligned else 1
    g_unit = unit(problem.itemsize, together * produced, g_shape[1]) if grad_aligned else 1
    arguments = (
        walked(problem), x_shape[2:], g_shape[2:], problem.kernel_size, *geometry,
        in_units(x_pixels, x_unit), dw_strides, math.prod(problem.weight_shape) if split else 0,
        together * reduced // x_unit, together * produced // g_unit, g_shape[1] // g_unit,
        (x_shape[1] // x_unit, reduced, produced) if together > 1 else None, config.splits, tiles_m,
    )  # fmt: skip
    options = dict(X_UNIT=x_unit, G_UNIT=g_unit, CHAIN=CHAIN, **_constants(problem, config))
    return (tiles_m * tiles_n * -(-problem.groups // together) * config.splits, 1), arguments, options


def weight_strides(problem: Problem, split: bool) -> tuple[int, int, int]:
    """Of wgrad's result, by (filter, tap, channel); partial sums have channels last."""
    columns = problem.taps * problem.group_in
    last = split or problem.result_layout == CHANNELS_LAST
    return (columns, problem.group_in, 1) if last else (columns, 1, problem.taps)


def wgrad_roles(problem: Problem, split: bool) -> tuple[tuple, tuple, tuple, tuple]:
    """What a wgrad kernel gathers as x, and walks along as grad: (shape of x, shape of grad, (stride, pad, dilation),
    strides of the weight's gradient by (channel of grad, tap, channel of x))."""
    filters, tap, channel = weight_strides(problem, split)
    pad, dilation = problem.padding[::2], problem.dilation
    if not exchanged(problem):
        return problem.input_shape, problem.output_shape, (problem.stride, pad, dilation), (filters, tap, channel)
    away = (problem.stride, tuple(-by for by in pad), tuple(-by for by in dilation))
    return problem.output_shape, problem.input_shape, away, (channel, tap, filters)


def reduce(
    problem: Problem, partials: torch.Tensor, bias: torch.Tensor | None, result: torch.Tensor, end: tuple = NO_EPILOGUE
) -> None:
    """Add float32 partials up to the result, in one order.

    Args:
        partials: (splits, elements of the result), in the result's order of memory.
        bias, end: what follows the sums; ``end`` is of :func:`..base.residual_and_slope`.
    """
    channels = result.shape[1]
    launch_kernel(
        reduce_splits,
        (-(-result.numel() // _REDUCE_BLOCK), 1),
        (partials, bias, result, result.numel(), math.prod(result.shape[2:]), channels, partials.shape[0], *end),
        same_options(
            BIAS=bias is not None,
            ACTIVATION=problem.activation,
            UPCAST=upcast(problem),
            TRANSPOSED=problem.result_layout != CHANNELS_LAST,
            INDEX=tl.int64 if result.numel() >= 2**31 - _REDUCE_BLOCK else tl.int32,
            BLOCK=_REDUCE_BLOCK,
            num_warps=4,
        ),
    )
