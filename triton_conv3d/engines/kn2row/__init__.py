"""kn2row: for layers that produce few channels of many: heads of networks, and the input gradient of first layers.

    z[i, (th, tw, q)] = sum over taps td and channels r of  x[i + td * step, r] * w[q, r, td, th, tw]
    y[j, q]           = sum over taps th and tw of  z[j + start + (th, tw) * step, (th, tw, q)]

forward as it stands; dgrad of stride 1 with the gradient as x, flipped taps and the channels' roles exchanged. An implicit
GEMM reads every pixel once for each tap, into a tile whose columns are almost empty. Here the taps of H and W stand beside
the produced channels as columns of one product (kn2row: Vasudevan, Anderson and Gregg, 2017), and what they have summed is
shifted instead of x. No z is in memory: a program owns some planes of the result, marches down the lines of x, of which it
holds one at a time:

- of a line, the sums of each tap of H join the running sums of that line of the result which it meets, in registers;
- a line of the result that has met all its taps of H is gathered once along W, by the shifts of its taps, and added up;
- planes along D are read once for all planes of the result that they meet, as by the engine halo.

Operands whose channels are not dense and last are copied, and the weight of dgrad, whose filters have to be last; the
result is written in the format that torch returns. One sum for each element, in one order: equal inputs give equal bits.
Beyond the rows of a line everything is zero without a product: there an infinity or NaN of a weight makes no NaN.

Bytes by design. From memory: input, weight and output once each, the minimum, where programs that run at once find each
other's planes in L2; between parts of H two lines again. From L2, with 3x3x3 and P planes, L lines and a tile of B pixels: a
pixel (P + 2) / P * (L + 2) / L * B / (B - 2) times, instead of 27. Products: 64 columns for 3 channels and 9 taps (27 are
used), where an implicit GEMM has 9 * 16.
"""

from __future__ import annotations

import functools
import math

import torch
import triton.language as tl

from ...problem import CHANNELS_LAST, Operands, Problem
from ..base import Memory, Order, Work, aligned, format_strides, refused_by_kernels, residual_and_slope, upcast
from ..halo.configs import INTERPRETED, INTERPRETED_LOAD, INTERPRETED_PRODUCT, LOAD, PRODUCT
from ..implicit_gemm import channels_last, copied_bytes, dense, in_units, pixel_strides, unit
from ..implicit_gemm.configs import channels, refused_by_tensor_cores
from ..launching import launch_kernel
from .configs import (
    Kn2rowConfig,
    classes,
    configs,
    halo,
    line,
    low_padding,
    padded,
    read_size,
    shared_bytes,
    step_bytes,
    sums,
    tiles,
)
from .kernels import kn2row_gemm

__all__ = ["NAME", "Kn2rowConfig", "configs", "launch", "memory", "supports", "work"]

NAME = "kn2row"
MEASURED = ()  # architectures; it has not run on a GPU yet
_MOST_PRODUCED = 8  # channels; with 16 the smallest product of tensor cores is full without taps
_LEAST_REDUCED = 16
_MOST_COLUMNS = 128  # of a line's product: what a thread has registers for; as tf32x3 half of it
_MOST_DEPTH = 5  # of a kernel: each depth is a kernel to compile
_MOST_HALO = 16  # pixels: half of the smallest tile
# For what follows a line of a plane: instructions of a warp (SASS, sm_90), and operations on tiles in the interpreter.
_LINE, _INTERPRETED_LINE = 130.0, 30.0


def supports(problem: Problem) -> str | None:
    if problem.pass_ == "wgrad":
        return "wgrad: its sums belong to taps, which nothing shifts"
    if problem.groups != 1:
        return f"groups={problem.groups}: each would be a product of its own"
    produced, reduced = channels(problem)
    if produced > _MOST_PRODUCED:
        return f"{produced} channels to compute fill products without taps: more than {_MOST_PRODUCED}"
    if reduced < _LEAST_REDUCED:
        return f"{reduced} channels to sum over leave products empty: less than {_LEAST_REDUCED}"
    if problem.stride != (1, 1, 1):
        return f"stride {problem.stride}: taps would be computed where no pixel of the result meets them"
    if reason := refused_by_kernels(problem):
        return reason
    if problem.kernel_size[1:] == (1, 1):
        return f"kernel {problem.kernel_size} has no taps of H and W to fold"
    if problem.kernel_size[0] > _MOST_DEPTH:
        return f"kernel depth {problem.kernel_size[0]}: more than {_MOST_DEPTH} products of every plane"
    if not problem.on_tensor_cores:
        return "float32 as ieee: without tensor cores the columns that only pad cost as much as the others, and it spills"
    most = _MOST_COLUMNS // 2 if problem.precision == "tf32x3" else _MOST_COLUMNS
    if math.prod(padded(problem)) > most:
        return f"kernel {problem.kernel_size} of {produced} channels needs more than {most} columns"
    if halo(problem) > _MOST_HALO:
        return f"taps of W reach {halo(problem)} pixels: more than {_MOST_HALO}"
    return refused_by_tensor_cores(problem)


def memory(problem: Problem, config: Kn2rowConfig) -> Memory:
    return Memory(copies=_copied(problem))


@functools.lru_cache(maxsize=1024)
def _copied(problem: Problem) -> int:
    """Bytes of operands that are copied: for their layout, and the weight of dgrad, once, whatever its own is."""
    if problem.pass_ == "forward":
        return copied_bytes(problem)
    layouts = (problem.layouts[0], CHANNELS_LAST, problem.layouts[2])
    return copied_bytes(problem.replace(layouts=layouts)) + problem.itemsize * math.prod(problem.weight_shape)


def work(problem: Problem, config: Kn2rowConfig) -> Work:
    """The launch as the cost model sees it."""
    item, k, planes = problem.itemsize, config.block_k, config.planes
    (produced, reduced), (depth, taps_h, taps_w) = channels(problem), problem.kernel_size
    tiles_d, tiles_h, tiles_w = tiles(problem, config)
    programs = tiles_d * tiles_h * tiles_w * problem.batch
    columns, blocks, products = math.prod(padded(problem)), math.ceil(reduced / k), planes * depth
    read = planes + depth - 1
    size, vector = read_size(problem), max(math.gcd(problem.alignment, reduced * item), item)
    row_bytes = float(item * k * config.block_w * read)
    column_bytes = float(item * k * taps_h * taps_w * produced * depth)  # columns that only pad are not read
    fresh = min(1.0, size[0] * size[2] / (tiles_d * read * tiles_w * config.block_w))  # to the tiles of all planes
    loads, line_ends = step_bytes(problem, config) / (vector * 32 * config.num_warps), planes / blocks
    operations = INTERPRETED_LOAD * (read + depth) + INTERPRETED_PRODUCT * products + _INTERPRETED_LINE * line_ends
    return Work(
        programs=programs,
        iterations=(config.lines + taps_h - 1) * blocks,
        flops=2.0 * config.block_w * columns * k * products,
        bytes_read=row_bytes + column_bytes,
        bytes_written=float(item * planes * config.lines * config.block_w * produced),
        num_warps=config.num_warps,
        shared_bytes=shared_bytes(problem, config),
        extra_bytes=2.0 * _copied(problem),
        launches=1 + (problem.pass_ == "dgrad"),
        sums=sums(problem, config),
        vector_bytes=vector,
        stages=config.num_stages,
        order=Order(programs, 1, 1, row_bytes * fresh, column_bytes),
        product=(config.block_w, columns),
        tiles=(read, depth),
        instructions=LOAD * loads + PRODUCT * products + _LINE * line_ends,
        operations=INTERPRETED + operations,
    )


def launch(problem: Problem, operands: Operands, config: Kn2rowConfig) -> torch.Tensor:
    if problem.pass_ == "dgrad":  # filters for channels, so that those that are summed over are last
        x, w = channels_last(operands.grad), dense(operands.weight.transpose(0, 1))
    else:
        x, w = channels_last(operands.input), dense(operands.weight)
    y = problem.empty_result(x.device)
    grid, arguments, options = _launch(problem, config, x.stride(), aligned(x), aligned(w))
    launch_kernel(kn2row_gemm, grid, (x, w, operands.bias, y, *arguments, *residual_and_slope(problem, operands)), options)
    return y


@functools.lru_cache(maxsize=4096)
def _launch(
    problem: Problem, config: Kn2rowConfig, strides: tuple[int, ...], x_aligned: bool, w_aligned: bool
) -> tuple[tuple[int, int], tuple, dict]:
    """(grid, arguments behind the tensors, options) for an x of these strides."""
    x_shape, y_shape = problem.input_shape, problem.output_shape
    if problem.pass_ == "dgrad":
        x_shape, y_shape = y_shape, x_shape
    produced, reduced = channels(problem)
    taps_h, taps_w, block_q = padded(problem)
    x_pixels = pixel_strides(x_shape, strides)
    x_unit = unit(problem.itemsize, reduced, *x_pixels) if x_aligned else 1
    w_unit = unit(problem.itemsize, reduced) if w_aligned else 1
    y_strides = format_strides(y_shape, problem.memory_format)
    cut, (low_d, low_h, _) = line(problem), low_padding(problem)
    of_sample = tiles(problem, config)
    arguments = (
        x_shape[2:], y_shape[2:], (-low_d, -low_h, cut.first), problem.dilation, cut.before, of_sample, classes(problem),
        config.lines, in_units(x_pixels, x_unit), reduced // w_unit, (*pixel_strides(y_shape, y_strides), y_strides[1]),
        reduced // x_unit, produced,
    )  # fmt: skip
    # Left alone, NVIDIA's compiler spills some of these tiles to fit one program more.
    large = problem.arch.startswith("sm_") and problem.dtype == "float32" and config.planes > 1
    options = dict(
        X_UNIT=x_unit,
        W_UNIT=w_unit,
        FLIP=problem.pass_ == "dgrad",
        KERNEL_D=problem.kernel_size[0],
        KERNEL_H=problem.kernel_size[1],
        KERNEL_W=problem.kernel_size[2],
        BIAS=problem.bias,
        ACTIVATION=problem.activation,
        EVEN=reduced <= config.block_k or reduced % config.block_k == 0,
        ASYNC=problem.arch in ("sm_90", "interpreter"),
        INDEX=tl.int64 if problem.index64 else tl.int32,
        PRECISION=problem.precision,
        UPCAST=upcast(problem),
        BLOCK_W=config.block_w,
        BLOCK_K=config.block_k,
        PLANES=config.planes,
        LEVELS_H=taps_h.bit_length() - 1,
        TAPS_W=taps_w,
        BLOCK_Q=block_q,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **({"maxnreg": 255} if large else {}),
    )
    return (math.prod(of_sample) * problem.batch, 1), arguments, options
