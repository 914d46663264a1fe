"""folded: implicit GEMM for few channels, with taps and channels folded together into the reduction.

    y[j, q] = sum over r = (tap, channel) of  x[j * scale + start + tap * step, channel] * w[q, channel, tap]

forward as it stands; dgrad with the gradient as x and the channels' roles exchanged, a stride as parity classes, each of
them a dense gather through its own taps. With 1 to 8 channels a step of the other implicit GEMM, which takes the channels
of one tap, is almost empty; here 27 taps of one channel are one step of 32. Elements are loaded one by one, so every
layout of input and weight is read as it is.

    dw[q, r] = sum over output pixels j of  x[j * stride - pad + tap * dilation, channel] * grad[j, q]

wgrad has the folded side as the wide one. With fewer filters than channels, as of a head, these are folded instead, and the
sum is taken over the pixels of the input (implicit_gemm.configs.exchanged). Which taps of a pixel lie inside is worked out
once for each pixel and each tap, not for each pair. Its pixels are shared out among splits; their partial sums are float32
and added in a fixed order.

By blocks (:mod:`..blocks`) all parity classes of a strided dgrad are one product, with columns (class a, channel q), whose
weight is zero where a class does not meet a tap; and a strided wgrad of few filters folds these, with such columns of x:

    dx[j * stride + a - before, q] = sum over r = (e, k) of  grad[j + low - e, k] * w[k, q, e * stride + a - front]
    dw[k, q, e * stride + a - front] = sum over blocks j of  grad[j + low - e, k] * x[j * stride + a - before, q]

There an infinity or NaN of the gradient also makes NaN of positions whose class does not meet its taps, in blocks that read
it; one of the input may reach taps of its own channel whose products with it are of padding.

Bytes by design: input, weight and output once each from memory (the input's reuse by taps is from L1 and L2), which is
the minimum; between 1 and 2 bytes in L1 for each product of a pixel and a tap. By parity classes a dgrad reads the gradient
once for every tap. wgrad reads the wide side again for every tile of folded taps and channels (of 128: one for up to 4
channels of 27 taps), and 8 bytes an element of dw for each split.
"""

from __future__ import annotations

import functools
import math

import torch
import triton.language as tl

from ...problem import Operands, Problem, Triple
from ..base import (
    CHAIN,
    Memory,
    Work,
    aligned,
    dgrad_steps,
    format_strides,
    refused_by_kernels,
    residual_and_slope,
    upcast,
)
from ..blocks import blocks_of, columns
from ..implicit_gemm import pixel_strides, reduce, unit, wgrad_roles
from ..implicit_gemm.configs import exchanged, refused_by_tensor_cores, sides
from ..launching import GRID_LIMIT, launch_kernel
from .configs import (
    MOST_CHANNELS,
    REGISTERS,
    FoldedConfig,
    FoldedWgradConfig,
    by_blocks,
    class_taps,
    classes,
    configs,
    tap_step,
    wgrad_by_blocks,
    wgrad_extent,
    wgrad_registers,
    wgrad_tiles,
)
from .kernels import folded_gemm, folded_wgrad

__all__ = ["MOST_CHANNELS", "NAME", "FoldedConfig", "FoldedWgradConfig", "configs", "launch", "memory", "supports", "work"]

NAME = "folded"
_WGRAD_STEP, _WGRAD_LOAD = 250.0, 14.0  # instructions of a warp in a step of wgrad, and for each load of x: SASS, sm_90
_BLOCK_STEP, _BLOCK_LOAD = 320.0, 58.0  # the same by blocks, of tiles of 8 warps
_MOST_TAP_BITS = 63  # one bit for every tap of each dimension, in a 64-bit mask


def supports(problem: Problem) -> str | None:
    if reason := refused_by_kernels(problem):
        return reason
    produced, reduced = sides(problem)
    if reduced > MOST_CHANNELS and not wgrad_by_blocks(problem):
        what = "channels that taps gather" if problem.pass_ == "wgrad" else "channels to sum over"
        return f"{reduced} {what} in a group: more than {MOST_CHANNELS}"
    if reduced == produced == 1 and problem.groups > 1:
        return "depthwise: a tile would hold one channel"
    if sum(class_taps(problem)) > _MOST_TAP_BITS:
        return f"kernel sizes {problem.kernel_size} add up to more than {_MOST_TAP_BITS}"
    if problem.groups * classes(problem) > GRID_LIMIT[1]:
        return f"groups={problem.groups}, of {classes(problem)} parity classes: more than {GRID_LIMIT[1]}"
    return refused_by_tensor_cores(problem)


def memory(problem: Problem, config: FoldedConfig) -> Memory:
    splits = getattr(config, "splits", 1)
    return Memory(4 * splits * math.prod(problem.weight_shape) if splits > 1 else 0)


def work(problem: Problem, config: FoldedConfig) -> Work:
    """The launch as the cost model sees it."""
    m, n, k = config.block_m, config.block_n, config.block_k
    if problem.pass_ == "wgrad":
        return _wgrad_work(problem, config)
    (produced, reduced), copies = sides(problem), problem.groups * classes(problem)
    rows = problem.result_elements / (produced * copies)
    if by_blocks(config):
        rows, produced, copies = problem.batch * math.prod(blocks_of(problem).count), columns(problem), problem.groups
    return Work(
        programs=math.ceil(rows / m) * math.ceil(produced / n) * copies,
        iterations=math.ceil(math.prod(class_taps(problem)) * reduced / k),
        flops=2.0 * m * n * k,
        bytes_read=float(problem.itemsize * (m + n) * k),
        bytes_written=float(problem.itemsize * m * n),
        num_warps=config.num_warps,
        shared_bytes=problem.itemsize * (m + n) * k * config.num_stages,
        tensor_cores=problem.on_tensor_cores,
        sums=m * n,
        product=(n, m),
        vector_bytes=problem.itemsize,
        stages=config.num_stages,
    )


def _wgrad_work(problem: Problem, config: FoldedWgradConfig) -> Work:
    m, n, k, item, split = config.block_m, config.block_n, config.block_k, problem.itemsize, config.splits > 1
    step, load = (_BLOCK_STEP, _BLOCK_LOAD) if by_blocks(config) else (_WGRAD_STEP, _WGRAD_LOAD)
    return Work(
        programs=wgrad_tiles(problem, config) * problem.groups * config.splits,
        iterations=math.ceil(math.ceil(wgrad_extent(problem, config)[2] / k) / config.splits),
        flops=2.0 * m * n * k,
        bytes_read=float(item * (m + n) * k),
        bytes_written=float((4 if split else item) * m * n),
        num_warps=config.num_warps,
        shared_bytes=item * n * k * config.num_stages,
        extra_bytes=float(problem.result_elements * (4 * config.splits + item)) if split else 0.0,
        launches=1 + split,
        tensor_cores=problem.on_tensor_cores,
        sums=m * n,
        product=(m, n),
        vector_bytes=item,
        stages=config.num_stages,
        instructions=step + load * m * k / (32 * config.num_warps),
    )


def launch(problem: Problem, operands: Operands, config: FoldedConfig) -> torch.Tensor:
    if problem.pass_ == "wgrad":
        return _wgrad(problem, operands, config)
    x, w = operands.grad if problem.pass_ == "dgrad" else operands.input, operands.weight
    y = problem.empty_result(x.device)
    grid, arguments, options = _launch(problem, config, x.stride(), w.stride())
    launch_kernel(folded_gemm, grid, (x, w, operands.bias, y, *arguments, *residual_and_slope(problem, operands)), options)
    return y


def _wgrad(problem: Problem, operands: Operands, config: FoldedWgradConfig) -> torch.Tensor:
    x, grad = operands.input, operands.grad
    dw = problem.empty_result(x.device)
    split = config.splits > 1
    target = x.new_empty((config.splits, dw.numel()), dtype=torch.float32) if split else dw
    if exchanged(problem) or by_blocks(config):
        x, grad = grad, x
    grid, arguments, options = _wgrad_launch(problem, config, x.stride(), grad.stride(), aligned(grad))
    launch_kernel(folded_wgrad, grid, (grad, x, target, *arguments), options)
    if split:
        reduce(problem, target, None, dw)
    return dw


@functools.lru_cache(maxsize=4096)
def _wgrad_launch(
    problem: Problem, config: FoldedWgradConfig, x_strides: tuple[int, ...], g_strides: tuple[int, ...], g_aligned: bool
) -> tuple[tuple[int, int], tuple, dict]:
    """(grid, arguments behind the tensors, options) for an x that is gathered and a grad that is walked along."""
    split, blocks = config.splits > 1, None
    x_shape, g_shape, geometry, (filters, tap, channel) = wgrad_roles(problem, split)
    wide, reduced = sides(problem)
    kernel, size = problem.kernel_size, g_shape[2:]
    dw_taps = (kernel[1] * kernel[2] * tap, kernel[2] * tap, tap)
    if by_blocks(config):  # block j of the input meets the gradient at j + low - e * step
        of = blocks_of(problem)
        x_shape, g_shape = g_shape, x_shape
        step = tuple(-1 if s > 1 else -d for s, d in zip(problem.stride, problem.dilation, strict=True))
        geometry = ((1, 1, 1), tuple(-by for by in of.low), step)
        filters, channel, wide, reduced = channel, filters, reduced, wide
        kernel, size, blocks = of.taps, of.count, (of.front, of.before, of.last)
    pixels = pixel_strides(g_shape, g_strides)
    g_unit = unit(problem.itemsize, wide, *pixels) if g_aligned and g_strides[1] == 1 else 1
    arguments = (
        wgrad_extent(problem, config)[2], x_shape[2:], size, *geometry,
        x_strides, (*(stride // g_unit for stride in pixels), g_strides[1]), (filters, *dw_taps, channel), blocks,
        math.prod(problem.weight_shape) if split else 0, wide // g_unit, config.splits,
    )  # fmt: skip
    options = dict(
        BLOCK=(*problem.stride, wide) if blocks else None,
        G_UNIT=g_unit,
        CHAIN=CHAIN,
        **_options(problem, config, kernel, reduced),
        **wgrad_registers(problem, config),
    )
    return (wgrad_tiles(problem, config) * config.splits, problem.groups), arguments, options


def _options(problem: Problem, config: FoldedConfig, kernel: Triple, reduced: int) -> dict:
    """What both kernels have in common."""
    return dict(
        KERNEL_D=kernel[0],
        KERNEL_H=kernel[1],
        KERNEL_W=kernel[2],
        REDUCED=reduced,
        INDEX=tl.int64 if problem.index64 else tl.int32,
        BITS=tl.int32 if sum(kernel) < 32 else tl.int64,
        PRECISION=problem.precision,
        UPCAST=upcast(problem),
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )


@functools.lru_cache(maxsize=4096)
def _launch(
    problem: Problem, config: FoldedConfig, x_strides: tuple[int, ...], w_strides: tuple[int, ...]
) -> tuple[tuple[int, int], tuple, dict]:
    """(grid, arguments behind the tensors, options) for operands of these strides."""
    produced, reduced = sides(problem)
    wide = produced
    low, parity, blocks, copies = problem.padding[::2], None, None, problem.groups
    if problem.pass_ == "dgrad":
        x_shape, y_shape = problem.output_shape, problem.input_shape
        rows = tuple(-(-size // s) for size, s in zip(problem.input_size, problem.stride, strict=True))
        step, _ = dgrad_steps(problem.stride, problem.dilation)
        scale, start = (1, 1, 1), low
        w_channels = (w_strides[1], w_strides[0])
        if by_blocks(config):
            of, wide = blocks_of(problem), columns(problem)
            rows, start = of.count, of.low
            blocks = (of.front, of.before, of.last)
        elif problem.stride != (1, 1, 1):
            parity = (problem.kernel_size, problem.stride, problem.dilation, tap_step(problem))
            copies *= classes(problem)
    else:
        x_shape, y_shape = problem.input_shape, problem.output_shape
        rows = y_shape[2:]
        scale, start, step = problem.stride, tuple(-pad for pad in low), problem.dilation
        w_channels = w_strides[:2]
    y_strides = format_strides(y_shape, problem.memory_format)
    pixels = pixel_strides(y_shape, y_strides)
    y_unit = unit(problem.itemsize, produced, *pixels) if y_strides[1] == 1 else 1
    arguments = (
        problem.batch, x_shape[2:], rows if blocks else y_shape[2:], scale, start, step, parity, blocks, x_strides,
        (*w_channels, *w_strides[2:], problem.group_out * w_strides[0]),
        (*(stride // y_unit for stride in pixels), y_strides[1]), produced // y_unit,
    )  # fmt: skip
    options = dict(
        BLOCK=(*problem.stride, produced) if blocks else None,
        Y_UNIT=y_unit,
        BIAS=problem.bias,
        ACTIVATION=problem.activation,
        **_options(problem, config, class_taps(problem), reduced),
        **(REGISTERS.get((config.block_m, config.block_n), {}) if problem.arch.startswith("sm_") else {}),
    )
    tiles = -(-problem.batch * math.prod(rows) // config.block_m) * -(-wide // config.block_n)
    return (tiles, copies), arguments, options
