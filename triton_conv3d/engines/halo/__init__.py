"""halo: implicit GEMM that reads a plane of the input once for all planes of the output it meets.

    y[j, q] = sum over taps t and channels r of  x[j * scale + start + t * step, r] * w[q, r, t]

forward as it stands; dgrad with the gradient as x, flipped taps and the channels' roles exchanged. An implicit GEMM that
computes few channels is bound by its stream through L2: it reads every pixel once for each tap. Here a program owns P
planes of the result, one behind the other along D, and a step, of one tap of H and W, loads the P + kd - 1 planes that they
meet and the kd weights, each once, and multiplies all P * kd pairs. Its tiles are at most 64 channels wide: for layers that
compute so many, whatever they sum over, and for those of which wider tiles would compute half of the last one for nothing
(160, 192, 320). Operands whose channels are not dense and last are copied; the result is written in the format that torch
returns. One sum for each element, in one order: equal inputs give equal bits.

    dw[q, r, t] = sum over output pixels j of  x[j * stride - pad + t * dilation, r] * grad[j, q]

wgrad likewise: a program holds the sums of all taps along D, and of all along H where they fit into registers, loads P
planes of the gradient and the P + kd - 1 of the input that they meet, and multiplies each pair; of wide layers, of 64
filters and 32 or 64 channels, where others fill 128 x 128 or leave a part of it empty. Pixels are shared out
among splits, and among launches, so that an accumulator never adds up more than CHAIN products; float32 partial sums are
added in a fixed order. Where P does not divide the depth, planes of zeros are multiplied with what lies there: an infinity
or NaN of the input then also is NaN in other taps of its channel.

Bytes by design: input, weight (or gradient) and output once each from memory, the minimum, where a wave of programs keeps
what it reads in L2; besides, twice what is copied for its layout, and in wgrad 8 bytes an element of dw for each split.
From L2: a pixel kh * kw * (P + kd - 1) / P times for every tile of the produced channels, instead of kd * kh * kw times:
with 3x3x3 and P = 4 half as often. All weights once for every P planes of a tile, instead of once for each. In wgrad the
gradient once for each tap that no program holds together with another: 3 times, or 9, instead of 7 with 32 channels.
"""

from __future__ import annotations

import functools
import math

import torch
import triton.language as tl

from ...problem import Operands, Problem
from ..base import Memory, Order, Work, aligned, format_strides, refused_by_kernels, residual_and_slope, upcast
from ..implicit_gemm import channels_last, copied_bytes, dense, in_units, pixel_strides, reduce, unit
from ..implicit_gemm.configs import channels
from ..launching import launch_kernel
from .configs import (
    INTERPRETED,
    INTERPRETED_LOAD,
    INTERPRETED_PRODUCT,
    LOAD,
    MOST_TILES,
    PRODUCT,
    WIDEST,
    HaloConfig,
    HaloWgradConfig,
    configs,
    register_limit,
    rows,
    shared_bytes,
    side_by_side,
    step_bytes,
    wgrad_launches,
    wgrad_tiles,
)
from .kernels import halo_gemm, halo_wgrad

__all__ = ["NAME", "HaloConfig", "HaloWgradConfig", "configs", "launch", "memory", "supports", "work"]

NAME = "halo"
MEASURED = ()  # architectures; it has not run on a GPU yet
_DEPTHS = range(2, 6)  # of a kernel: with one plane nothing is shared, and each depth is a kernel to compile
_LEAST_CHANNELS, _LEAST_OF_GROUP = 9, 16  # below, half of the smallest product of tensor cores is empty; of groups any part
# Of wgrad, by bytes of an element: of a step, of a load, of a product of tensor cores (16 x 8 x 32 bytes). Least squares.
_WGRAD_CODE = {2: (85.0, 10.0, 1.2), 4: (0.0, 24.0, 2.3)}
_WITHOUT = ("sm_70", "sm_72", "sm_75")  # asynchronous copies: Triton 3.6 and 3.9 make no tensor core's code, and spill
_MOST_BITS = 63  # one for every plane that a row reads and for every tap of H and W, in a 64-bit mask


def supports(problem: Problem) -> str | None:
    if reason := refused_by_kernels(problem):
        return reason
    if problem.arch.startswith("gfx") or problem.arch in _WITHOUT:
        return f"{problem.arch}: its kernels are for the tensor cores of NVIDIA GPUs from sm_80 on"
    if problem.dtype == "float32" and problem.precision != "tf32":
        return f"float32 as {problem.precision}: its products take longer than the loads that planes save, and spill"
    produced, reduced = channels(problem)
    if (tiles := side_by_side(problem)) > MOST_TILES[problem.pass_ == "wgrad"]:
        return f"{reduced} and {produced} channels in a group: {tiles} tiles of {WIDEST} of them would read the same"
    if problem.pass_ != "wgrad" and tiles % 2 == 0:
        return f"{produced} channels to compute fill tiles of {2 * WIDEST}, which multiply long enough to hide their loads"
    least = _LEAST_CHANNELS if problem.groups == 1 else _LEAST_OF_GROUP
    if min(produced, reduced) < least:
        return f"{min(produced, reduced)} channels in a group leave products empty: less than {least}"
    if problem.kernel_size[0] not in _DEPTHS:
        return f"kernel depth {problem.kernel_size[0]}: planes are shared from {_DEPTHS[0]} to {_DEPTHS[-1]}"
    if problem.stride[0] != 1 or problem.dilation[0] != 1:
        return f"stride {problem.stride[0]} and dilation {problem.dilation[0]} along D: planes are shared where both are 1"
    if problem.pass_ == "dgrad" and problem.stride != (1, 1, 1):
        return f"dgrad of stride {problem.stride}: it would need parity classes"
    if (problem.input_size if problem.pass_ == "dgrad" else problem.output_size)[0] < 2:
        return "one plane of the result shares its input with no other"
    if problem.pass_ == "wgrad" and tiles > 1 and len(configs(problem)) == 1:
        return f"{produced} filters and {reduced} channels in a group, {problem.pixels} pixels: no large tile on {problem.arch}"
    if problem.pass_ != "wgrad" and _bits(problem, max(config.planes for config in configs(problem))) > _MOST_BITS:
        return f"kernel {problem.kernel_size} needs more than {_MOST_BITS} bits for what lies outside"
    return None


def _bits(problem: Problem, planes: int) -> int:
    return planes - 1 + sum(problem.kernel_size)


def memory(problem: Problem, config: HaloConfig) -> Memory:
    return Memory(_workspace_bytes(problem, config), copied_bytes(problem, walks_views=True))


def _workspace_bytes(problem: Problem, config: HaloConfig) -> int:
    return 4 * config.splits * problem.result_elements if problem.pass_ == "wgrad" else 0


def work(problem: Problem, config: HaloConfig) -> Work:
    """The launch as the cost model sees it."""
    if problem.pass_ == "wgrad":
        return _wgrad_work(problem, config)
    m, n, k, planes, item = config.block_m, config.block_n, config.block_k, config.planes, problem.itemsize
    (produced, reduced), depth = channels(problem), problem.kernel_size[0]
    down, across = math.ceil(rows(problem, planes) / m), math.ceil(produced / n)
    read = planes + depth - 1
    vector = max(math.gcd(problem.alignment, reduced * item), item)
    loads, products = step_bytes(problem, config) / (vector * 32 * config.num_warps), planes * depth
    met = max(1.0, problem.taps / depth / math.prod(problem.stride)) * read / planes  # times that a pixel is read
    return Work(
        programs=down * across * problem.groups,
        iterations=problem.taps // depth * math.ceil(reduced / k),
        flops=2.0 * m * n * k * products,
        bytes_read=float(step_bytes(problem, config)),
        bytes_written=float(item * planes * m * n),
        num_warps=config.num_warps,
        shared_bytes=shared_bytes(problem, config),
        extra_bytes=2.0 * copied_bytes(problem),
        sums=planes * m * n,
        vector_bytes=vector,
        stages=config.num_stages,
        order=Order(down, across, 1, float(item * k * m * read), float(item * k * n * depth), met),
        product=(m, n),
        tiles=(read, depth),
        instructions=LOAD * loads + PRODUCT * products,
        operations=INTERPRETED + INTERPRETED_LOAD * (read + depth) + INTERPRETED_PRODUCT * products,
    )


def _wgrad_work(problem: Problem, config: HaloWgradConfig) -> Work:
    m, n, k, planes, item = config.block_m, config.block_n, config.block_k, config.planes, problem.itemsize
    (filters, reduced), depth = channels(problem), problem.kernel_size[0]
    tiles, down, read = wgrad_tiles(problem, config), math.ceil(filters / m), planes + depth - 1
    held, lines = depth * config.taps_h, read * config.taps_h
    vector = max(math.gcd(problem.alignment, filters * item, reduced * item), item)
    fixed, each_load, each_product = _WGRAD_CODE[item]
    loads, products = step_bytes(problem, config) / (vector * 32 * config.num_warps), planes * held
    met = max(1.0, problem.taps / depth / math.prod(problem.stride) * read / planes)  # times that a pixel is read
    launches, _ = wgrad_launches(problem, config)
    return Work(
        programs=tiles * problem.groups * config.splits * launches,
        iterations=math.ceil(math.ceil(rows(problem, planes) / k) / (config.splits * launches)),
        flops=2.0 * m * n * k * products,
        bytes_read=float(step_bytes(problem, config)),
        bytes_written=float(4 * m * n * held),
        num_warps=config.num_warps,
        shared_bytes=shared_bytes(problem, config),
        extra_bytes=2.0 * memory(problem, config).copies + _workspace_bytes(problem, config) + item * problem.result_elements,
        launches=launches + 1,
        sums=m * n * held,
        vector_bytes=vector,
        stages=config.num_stages,
        order=Order(down, tiles // down, 1, float(item * k * m * planes), item * k * n * lines / met),
        product=(m, n),
        tiles=(planes, lines),
        instructions=fixed + each_load * loads + each_product * products * m * n * k * item / (4096 * config.num_warps),
        operations=INTERPRETED + INTERPRETED_LOAD * (planes + lines) + INTERPRETED_PRODUCT * products,
    )


def launch(problem: Problem, operands: Operands, config: HaloConfig) -> torch.Tensor:
    if problem.pass_ == "wgrad":
        return _wgrad(problem, operands, config)
    x = channels_last(operands.grad if problem.pass_ == "dgrad" else operands.input)
    w = dense(operands.weight)
    y = problem.empty_result(x.device)
    grid, arguments, options = _launch(problem, config, x.stride(), aligned(x), aligned(w))
    launch_kernel(halo_gemm, grid, (x, w, operands.bias, y, *arguments, *residual_and_slope(problem, operands)), options)
    return y


def _wgrad(problem: Problem, operands: Operands, config: HaloWgradConfig) -> torch.Tensor:
    x, grad = channels_last(operands.input), channels_last(operands.grad)
    dw = problem.empty_result(x.device)
    partials = x.new_empty((config.splits, dw.numel()), dtype=torch.float32)
    grid, arguments, options = _wgrad_launch(problem, config, x.stride(), grad.stride(), aligned(x), aligned(grad))
    launches, chain = wgrad_launches(problem, config)
    for i in range(launches):
        launch_kernel(halo_wgrad, grid, (grad, x, partials, *arguments, i * chain), options)
    reduce(problem, partials, None, dw)
    return dw


@functools.lru_cache(maxsize=4096)
def _wgrad_launch(
    problem: Problem,
    config: HaloWgradConfig,
    x_strides: tuple[int, ...],
    g_strides: tuple[int, ...],
    x_aligned: bool,
    g_aligned: bool,
) -> tuple[tuple[int, int], tuple, dict]:
    """(grid, arguments behind the tensors, options) for operands of these strides."""
    x_pixels, g_pixels = pixel_strides(problem.input_shape, x_strides), pixel_strides(problem.output_shape, g_strides)
    x_unit = unit(problem.itemsize, problem.group_in, *x_pixels) if x_aligned else 1
    g_unit = unit(problem.itemsize, problem.group_out, *g_pixels) if g_aligned else 1
    arguments = (
        problem.batch, problem.input_size, problem.output_size, *problem.kernel_size[1:],
        problem.stride, problem.padding[::2], problem.dilation, in_units(x_pixels, x_unit), in_units(g_pixels, g_unit),
        problem.result_elements, problem.group_in // x_unit, problem.group_out // g_unit, config.splits,
    )  # fmt: skip
    options = dict(
        X_UNIT=x_unit,
        G_UNIT=g_unit,
        HELD_H=config.taps_h,
        CHAIN=wgrad_launches(problem, config)[1],
        **_options(problem, config),
    )
    return (wgrad_tiles(problem, config) * problem.groups * config.splits, 1), arguments, options


def _options(problem: Problem, config: HaloConfig) -> dict:
    """What both kernels have in common."""
    return dict(
        KERNEL_D=problem.kernel_size[0],
        INDEX=tl.int64 if problem.index64 else tl.int32,
        PRECISION=problem.precision,
        UPCAST=upcast(problem),
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        PLANES=config.planes,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )


@functools.lru_cache(maxsize=4096)
def _launch(
    problem: Problem, config: HaloConfig, strides: tuple[int, ...], x_aligned: bool, w_aligned: bool
) -> tuple[tuple[int, int], tuple, dict]:
    """(grid, arguments behind the tensors, options) for an x of these strides."""
    dgrad = problem.pass_ == "dgrad"
    x_shape, y_shape = problem.input_shape, problem.output_shape
    start, step = tuple(-pad for pad in problem.padding[::2]), problem.dilation
    if dgrad:  # position i reads grad at i + pad - t * dilation; of its planes the last tap's is the first
        x_shape, y_shape = y_shape, x_shape
        start = (problem.padding[0] - (problem.kernel_size[0] - 1), *problem.padding[2::2])
        step = tuple(-d for d in problem.dilation)
    produced, reduced = channels(problem)
    y_strides = format_strides(y_shape, problem.memory_format)
    y_pixels, x_pixels = pixel_strides(y_shape, y_strides), pixel_strides(x_shape, strides)
    y_unit = unit(problem.itemsize, produced, y_shape[1], *y_pixels) if y_strides[1] == 1 else 1
    x_unit = unit(problem.itemsize, reduced, x_shape[1], *x_pixels) if x_aligned else 1
    w_unit = unit(problem.itemsize, problem.group_in) if w_aligned else 1
    w_strides = (problem.taps * problem.group_in, problem.group_in)
    tiles_m = -(-rows(problem, config.planes) // config.block_m)
    arguments = (
        problem.batch, x_shape[2:], y_shape[2:], problem.kernel_size, problem.stride, start, step,
        in_units(x_pixels, x_unit), in_units(w_strides, w_unit), (*in_units(y_pixels, y_unit), y_strides[1]),
        reduced // x_unit, produced // y_unit, tiles_m,
    )  # fmt: skip
    options = dict(
        X_UNIT=x_unit,
        W_UNIT=w_unit,
        Y_UNIT=y_unit,
        DGRAD=dgrad,
        BIAS=problem.bias,
        ACTIVATION=problem.activation,
        EVEN=reduced <= config.block_k or reduced % config.block_k == 0,
        BITS=tl.int32 if _bits(problem, config.planes) < 32 else tl.int64,
        **register_limit(problem),
        **_options(problem, config),
    )
    return (tiles_m * -(-produced // config.block_n) * problem.groups, 1), arguments, options
