"""folded: implicit GEMM for few channels, with taps and channels folded together into the reduction.

    y[j, q] = sum over r = (tap, channel) of  x[j * scale + start + tap * step, channel] * w[q, channel, tap]

forward as it stands; dgrad with the gradient as x and the channels' roles exchanged, a stride as parity classes, each of
them a dense gather through its own taps. With 1 to 8 channels a step of the other implicit GEMM, which takes the channels
of one tap, is almost empty; here 27 taps of one channel are one step of 32. Elements are loaded one by one, so every
layout of input and weight is read as it is. wgrad is implicit_gemm's: it folds taps and channels into the wide side of
its tile, and few filters take the narrow one, of 16.

Bytes by design: input, weight and output once each from memory (the input's reuse by taps is from L1 and L2), which is
the minimum; between 1 and 2 bytes in L1 for each product of a pixel and a tap.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from ..problem import VECTOR_BYTES, Operands, Problem, Triple
from .base import Config, Memory, Work, format_strides, refused_by_kernels, residual_and_slope, upcast
from .epilogue import finished
from .implicit_gemm.kernels import dot, parity_class, rounded, tap_bits
from .launching import GRID_LIMIT, launch_kernel

NAME = "folded"
_MOST_CHANNELS = 8  # of one group; from 16 on the steps of one tap's channels are full
_MOST_TAP_BITS = 63  # one bit for every tap of each dimension, in a 64-bit mask


@triton.jit
def folded_gemm(
    x_ptr,
    w_ptr,
    bias_ptr,
    y_ptr,
    batch,
    x_size,  # (d, h, w), as every triple
    y_size,
    scale,
    start,  # of a strided dgrad: the padding
    step,
    parity,  # None, or of a strided dgrad: kernel, stride, dilation, taps from one of a class to its next
    x_strides,  # (n, channel, d, h, w), in elements
    w_strides,  # (produced channel, reduced channel, d, h, w, group)
    y_strides,  # (n, d, h, w) in Y_UNIT, channel in elements
    produced,  # channels of one group that are computed, in Y_UNIT
    residual_ptr,  # None, or with the strides of y
    slope,
    KERNEL_D: tl.constexpr,  # of a strided dgrad: taps of the largest class
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    REDUCED: tl.constexpr,  # channels of one group that are summed over
    Y_UNIT: tl.constexpr,
    BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    INDEX: tl.constexpr,
    BITS: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    produced = produced * Y_UNIT
    tiles_n = tl.cdiv(produced, BLOCK_N)
    group = tl.program_id(1)
    taps_d, taps_h, taps_w = KERNEL_D, KERNEL_H, KERNEL_W
    rows_d, rows_h, rows_w = y_size[0], y_size[1], y_size[2]
    start_d, start_h, start_w = start[0], start[1], start[2]
    if parity is not None:
        kernel, stride, dilation, tap_step = parity
        index_w = group % stride[2]
        index_h = group // stride[2] % stride[1]
        index_d = group // (stride[2] * stride[1]) % stride[0]
        group = group // (stride[2] * stride[1] * stride[0])
        taps_d, tap_d, start_d, rows_d = parity_class(
            index_d, start[0], y_size[0], kernel[0], stride[0], dilation[0], tap_step[0]
        )
        taps_h, tap_h, start_h, rows_h = parity_class(
            index_h, start[1], y_size[1], kernel[1], stride[1], dilation[1], tap_step[1]
        )
        taps_w, tap_w, start_w, rows_w = parity_class(
            index_w, start[2], y_size[2], kernel[2], stride[2], dilation[2], tap_step[2]
        )
    pid_n = tl.program_id(0) % tiles_n  # neighbours in time gather from the same pixels
    pid_m = tl.program_id(0) // tiles_n

    m = pid_m.to(INDEX) * BLOCK_M + tl.arange(0, BLOCK_M)
    sample = tl.full([], rows_w, INDEX) * rows_h * rows_d
    in_rows = m < sample * batch
    jw = m % rows_w
    jh = m // rows_w % rows_h
    jd = m // (rows_w * rows_h) % rows_d
    n = m // sample
    xd = jd * scale[0] + start_d
    xh = jh * scale[1] + start_h
    xw = jw * scale[2] + start_w
    valid = tl.full([BLOCK_M], 0, BITS)
    valid = tap_bits(valid, 0, xw, step[2], x_size[2], taps_w, False)
    valid = tap_bits(valid, KERNEL_W, xh, step[1], x_size[1], taps_h, False)
    valid = tap_bits(valid, KERNEL_W + KERNEL_H, xd, step[0], x_size[0], taps_d, False)
    outside = tl.where(in_rows, ~valid, -1)
    x_pixels = n * x_strides[0] + xd * x_strides[2] + xh * x_strides[3] + xw * x_strides[4]
    x_pixels += group.to(INDEX) * REDUCED * x_strides[1]

    q = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    in_q = q < produced
    w_filters = q.to(INDEX) * w_strides[0] + group.to(INDEX) * w_strides[5]

    # The pixels run along the tile's last dimension, so that neighbouring threads read neighbouring pixels.
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for first in range(0, KERNEL_D * KERNEL_H * KERNEL_W * REDUCED, BLOCK_K):
        r = first + tl.arange(0, BLOCK_K)
        in_r = r < KERNEL_D * KERNEL_H * KERNEL_W * REDUCED
        channel = r % REDUCED
        tw = r // REDUCED % KERNEL_W
        th = r // (REDUCED * KERNEL_W) % KERNEL_H
        td = r // (REDUCED * KERNEL_W * KERNEL_H)
        one = tl.full([BLOCK_K], 1, BITS)
        needed = (one << tw) | (one << (KERNEL_W + th)) | (one << (KERNEL_W + KERNEL_H + td))
        needed = tl.where(in_r, needed, -1)  # no pixel has every bit
        x_taps = channel.to(INDEX) * x_strides[1] + td.to(INDEX) * step[0] * x_strides[2]
        x_taps += th.to(INDEX) * step[1] * x_strides[3] + tw.to(INDEX) * step[2] * x_strides[4]
        if parity is not None:  # this class's taps among all of them
            in_r = in_r & (td < taps_d) & (th < taps_h) & (tw < taps_w)
            td = tap_d + td * tap_step[0]
            th = tap_h + th * tap_step[1]
            tw = tap_w + tw * tap_step[2]
        w_taps = channel.to(INDEX) * w_strides[1] + td * w_strides[2] + th * w_strides[3] + tw * w_strides[4]
        in_x = (needed[:, None] & outside[None, :]) == 0
        x = tl.load(x_ptr + (x_taps[:, None] + x_pixels[None, :]), mask=in_x, other=0.0)
        w = tl.load(w_ptr + (w_filters[:, None] + w_taps[None, :]), mask=in_q[:, None] & in_r[None, :], other=0.0)
        acc = dot(w, x, acc, PRECISION, UPCAST)

    if BIAS:
        acc += tl.load(bias_ptr + group * produced + q, mask=in_q, other=0.0).to(tl.float32)[:, None]
    if parity is not None:
        jd = jd * stride[0] + index_d
        jh = jh * stride[1] + index_h
        jw = jw * stride[2] + index_w
    y_pixels = (n * y_strides[0] + jd * y_strides[1] + jh * y_strides[2] + jw * y_strides[3]) * Y_UNIT
    y_channels = (group.to(INDEX) * produced + q) * y_strides[4]
    y_tile = y_channels[:, None] + y_pixels[None, :]
    in_y = in_q[:, None] & in_rows[None, :]
    acc = finished(acc, residual_ptr, y_tile, in_y, ACTIVATION, slope)
    tl.store(y_ptr + y_tile, rounded(acc, y_ptr.dtype.element_ty, UPCAST), mask=in_y)


@dataclass(frozen=True)
class FoldedConfig(Config):
    """
    block_m, block_n: tile of the result: pixels x channels. block_k: folded taps and channels of one step.
    num_warps, num_stages: as Triton's launch options.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int = 1


# Of a thread, by tile: left alone, NVIDIA's compiler spills to fit one program more.
_REGISTERS = {(128, 128): {"maxnreg": 255}, (128, 64): {"maxnreg": 128}}

# The smallest last: it fits every GPU.
_TILES = (
    FoldedConfig(128, 128, 32, 8),
    FoldedConfig(128, 64, 32, 8),
    FoldedConfig(128, 32, 32, 4),
    FoldedConfig(128, 16, 32, 4),
    FoldedConfig(64, 64, 32, 4),
    FoldedConfig(32, 16, 16, 2),
)


def supports(problem: Problem) -> str | None:
    if reason := refused_by_kernels(problem):
        return reason
    if problem.pass_ == "wgrad":
        return "wgrad of implicit_gemm folds taps and channels already"
    if _reduced(problem) > _MOST_CHANNELS:
        return f"{_reduced(problem)} channels to sum over in a group: more than {_MOST_CHANNELS}"
    if _reduced(problem) == _produced(problem) == 1 and problem.groups > 1:
        return "depthwise: a tile would hold one channel"
    if sum(_class_taps(problem)) > _MOST_TAP_BITS:
        return f"kernel sizes {problem.kernel_size} add up to more than {_MOST_TAP_BITS}"
    if problem.groups * _classes(problem) > GRID_LIMIT[1]:
        return f"groups={problem.groups}, of {_classes(problem)} parity classes: more than {GRID_LIMIT[1]}"
    if problem.arch == "gfx942" and problem.precision == "tf32x3":
        return "tf32x3 needs NVIDIA's tensor cores"
    return None


def configs(problem: Problem) -> tuple[FoldedConfig, ...]:
    """The tiles that are not more than twice as wide as there are channels, the smallest last."""
    wide = 2 * max(16, _produced(problem))
    return tuple(tile for tile in _TILES if tile.block_n < wide)


def memory(problem: Problem, config: FoldedConfig) -> Memory:
    return Memory()


def work(problem: Problem, config: FoldedConfig) -> Work:
    """The launch as the cost model sees it."""
    m, n, k = config.block_m, config.block_n, config.block_k
    classes = _classes(problem)
    pixels = math.prod(problem.result_shape) / (_produced(problem) * problem.groups * classes)
    return Work(
        programs=math.ceil(pixels / m) * math.ceil(_produced(problem) / n) * problem.groups * classes,
        iterations=math.ceil(math.prod(_class_taps(problem)) * _reduced(problem) / k),
        flops=2.0 * m * n * k,
        bytes_read=float(problem.itemsize * (m + n) * k),
        bytes_written=float(problem.itemsize * m * n),
        num_warps=config.num_warps,
        shared_bytes=problem.itemsize * (m + n) * k * config.num_stages,
        tensor_cores=problem.dtype != "float32" or problem.precision != "ieee",
        sums=m * n,
        vector_bytes=problem.itemsize,
        stages=config.num_stages,
    )


def launch(problem: Problem, operands: Operands, config: FoldedConfig) -> torch.Tensor:
    x, w = operands.grad if problem.pass_ == "dgrad" else operands.input, operands.weight
    y = problem.empty_result(x.device)
    grid, arguments, options = _launch(problem, config, x.stride(), w.stride())
    launch_kernel(folded_gemm, grid, (x, w, operands.bias, y, *arguments, *residual_and_slope(problem, operands)), options)
    return y


def _reduced(problem: Problem) -> int:
    """Channels of one group that are summed over."""
    return problem.group_out if problem.pass_ == "dgrad" else problem.group_in


def _produced(problem: Problem) -> int:
    """Channels of one group that are computed."""
    return problem.group_in if problem.pass_ == "dgrad" else problem.group_out


def _classes(problem: Problem) -> int:
    """Parity classes of a dgrad: input positions of equal remainder, which meet the same taps."""
    return math.prod(problem.stride) if problem.pass_ == "dgrad" else 1


def _tap_step(problem: Problem) -> Triple:
    """Taps from one that a parity class meets to the next."""
    if problem.pass_ != "dgrad":
        return (1, 1, 1)
    return tuple(s // math.gcd(s, d) for s, d in zip(problem.stride, problem.dilation, strict=True))


def _class_taps(problem: Problem) -> Triple:
    """Taps that a class meets at most."""
    return tuple(-(-taps // step) for taps, step in zip(problem.kernel_size, _tap_step(problem), strict=True))


@functools.lru_cache(maxsize=4096)
def _launch(
    problem: Problem, config: FoldedConfig, x_strides: tuple[int, ...], w_strides: tuple[int, ...]
) -> tuple[tuple[int, int], tuple, dict]:
    """(grid, arguments behind the tensors, options) for operands of these strides."""
    produced = _produced(problem)
    low, parity, rows = problem.padding[::2], None, problem.output_size
    if problem.pass_ == "dgrad":  # position i reads grad at (i + pad - t * dilation) / stride, where that divides
        x_shape, y_shape = problem.output_shape, problem.input_shape
        rows = tuple(-(-size // s) for size, s in zip(problem.input_size, problem.stride, strict=True))
        step = tuple(-d // math.gcd(s, d) for s, d in zip(problem.stride, problem.dilation, strict=True))
        scale, start = (1, 1, 1), low
        channels = (w_strides[1], w_strides[0])
        if problem.stride != (1, 1, 1):
            parity = (problem.kernel_size, problem.stride, problem.dilation, _tap_step(problem))
    else:
        x_shape, y_shape = problem.input_shape, problem.output_shape
        scale, start, step = problem.stride, tuple(-pad for pad in low), problem.dilation
        channels = w_strides[:2]
    y_strides = format_strides(y_shape, problem.memory_format)
    pixels = [0 if y_shape[dim] == 1 else y_strides[dim] for dim in (0, 2, 3, 4)]
    unit = math.gcd(VECTOR_BYTES // problem.itemsize, produced, *pixels) if y_strides[1] == 1 else 1
    arguments = (
        problem.batch, x_shape[2:], y_shape[2:], scale, start, step, parity, x_strides,
        (*channels, *w_strides[2:], problem.group_out * w_strides[0]),
        (*(stride // unit for stride in pixels), y_strides[1]), produced // unit,
    )  # fmt: skip
    kernel = _class_taps(problem)
    options = dict(
        KERNEL_D=kernel[0],
        KERNEL_H=kernel[1],
        KERNEL_W=kernel[2],
        REDUCED=_reduced(problem),
        Y_UNIT=unit,
        BIAS=problem.bias,
        ACTIVATION=problem.activation,
        INDEX=tl.int64 if problem.index64 else tl.int32,
        BITS=tl.int32 if sum(kernel) < 32 else tl.int64,
        PRECISION=problem.precision,
        UPCAST=upcast(problem),
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **(_REGISTERS.get((config.block_m, config.block_n), {}) if problem.arch.startswith("sm_") else {}),
    )
    tiles = -(-problem.batch * math.prod(rows) // config.block_m) * -(-produced // config.block_n)
    return (tiles, problem.groups * _classes(problem)), arguments, options
