"""tma: bricks of pixels that the copy engine of sm_90 and sm_100 fetches whole, zeros for padding included.

The implicit GEMM (engines/implicit_gemm) computes the address of every pixel of every tap; here a program names a brick of
up to 256 pixels by its corner, and one instruction copies it. All passes, strides, dilations and paddings, in 16-bit types
with channels in eights. Operands whose channels are not dense and last are copied; the result is written in the format
that torch returns. Partial sums of split reductions are float32 and added in a fixed order, so equal inputs give equal bits.

In forward and dgrad a brick leaves out the taps along depth through which it only reads padding, and is of few depths where
that saves taps (geometry.best_first).

Bytes by design: input, weight and output once each from memory, which is the minimum; from L2 each brick once for every
tap that is left and every tile of the produced channels, each block of the weight once for every brick.

Programs that run at once share what they read: all tiles of the channels of one brick come before the next brick, which is its
neighbour along W; in wgrad all tiles of the filters and channels of one tap before the next tap, on the same bricks. There is
no persistent grid. Counted in tiles of 256 x 128 x 128, Triton 3.6.0 and 3.9.0: a loop over tiles around the main loop takes
167 registers instead of 155, and the pipeline ends with every tile all the same; flattened into one (``tl.range``), with one
view, it copies for the next tile before it writes this one, but takes 189 registers and some 147 instructions a step
instead of 120, and with it goes the loop of each view. Engine hopper does it with warps of its own.

float32 is refused: products read shared memory as it is, which truncates to tf32; that copies round it, not all supported
versions of Triton can say (those before the field ``round_f32_to_tf32`` of descriptors), and only with channels as the
reduction could it come from shared memory.

What a brick covers beyond the end of the gradient in wgrad is multiplied by zeros: an infinity or NaN in the input there
reaches taps that it would not meet by the definition.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
import triton.language as tl

from ...problem import NO_ACTIVATION, VECTOR_BYTES, Operands, Problem, live_depth
from ..base import (
    CHAIN,
    NO_EPILOGUE,
    Memory,
    Order,
    Work,
    format_strides,
    refused_by_kernels,
    residual_and_slope,
    upcast,
)
from ..implicit_gemm import channels_last, copied_bytes, dense, pixel_strides, reduce, unit, weight_strides
from ..implicit_gemm.configs import workspace_bytes
from ..launching import launch_kernel
from .configs import BrickConfig, configs, extent, is_flat, left_is_shared, produced, reduced
from .descriptors import Described, of_matrix, of_view, of_weight, of_whole
from .geometry import MOST_VIEWS, View, Views, counts, views, views_along
from .kernels import gather_bricks, wgrad_bricks

__all__ = ["NAME", "BrickConfig", "configs", "launch", "memory", "supports", "work"]

NAME = "tma"
MEASURED = ()  # architectures; it has not run on a GPU yet
_ARCHITECTURES = ("sm_90", "sm_100", "interpreter")  # elsewhere descriptors become pointers, and spill
_CHANNELS = 8  # of a 16-bit type are the 16 bytes that divide every stride of a descriptor
_COORDINATES = 2**31  # of a descriptor
_INTERPRETED_OPERATIONS = 40.0  # a step with two descriptors, in operations on tiles of the interpreter
_KNOWN_LAUNCHES = 4096  # whose arguments are kept: working them out takes longer than all else of an eager call


def supports(problem: Problem) -> str | None:
    if reason := refused_by_kernels(problem):
        return reason
    if problem.arch not in _ARCHITECTURES:
        return f"{problem.arch} has no copy engine that this engine was compiled for: sm_90 and sm_100"
    if problem.dtype == "float32":
        return "float32: only 16-bit types, for products would read it truncated to tf32, not rounded, or without tensor cores"
    read = (problem.group_in,) if problem.pass_ == "forward" else (problem.group_in, problem.group_out)
    if any(channels % _CHANNELS for channels in read):
        return f"channels of a group are {' and '.join(map(str, read))}: descriptors need multiples of {_CHANNELS}"
    if problem.groups > 1 and problem.pass_ != "wgrad" and reduced(problem) % 16:
        return f"{reduced(problem)} channels of a group are summed over: not a multiple of the 16 of one product"
    if problem.alignment % VECTOR_BYTES:
        return f"pixels aligned to {problem.alignment} bytes: descriptors need {VECTOR_BYTES}"
    sides = zip(problem.input_size, problem.padding[::2], problem.padding[1::2], strict=True)
    sizes = (problem.batch, *map(sum, sides), *problem.output_size, *problem.weight_shape)
    if max(*sizes, *problem.stride, *problem.dilation) >= _COORDINATES:
        return f"a dimension, stride or dilation is beyond {_COORDINATES}, the coordinates of a descriptor"
    return None


def memory(problem: Problem, config: BrickConfig) -> Memory:
    return Memory(workspace_bytes(problem, config), copied_bytes(problem, walks_views=True))


def work(problem: Problem, config: BrickConfig) -> Work:
    """The launch as the cost model sees it."""
    item, split = problem.itemsize, config.splits > 1
    tiles, steps = extent(problem, config)
    used, result = memory(problem, config), problem.result_elements
    met = max(1.0, problem.taps / math.prod(problem.stride))  # taps through which a pixel is read
    m, n, k = (math.prod(config.brick), config.block_n, config.block_k)
    columns = math.ceil(produced(problem) / n)
    if problem.pass_ == "wgrad":  # filters in rows, taps and channels in columns, which run one after another
        m, k = k, m
        rows, columns = math.ceil(problem.group_out / m), columns * problem.taps
        order = Order(rows, columns, rows, float(item * m * k), item * n * k / met)
    else:  # bricks in rows, which run one after another, channels in columns
        steps = math.ceil(steps * live_depth(problem, config.brick_d))
        order = Order(max(1, tiles // columns), columns, 1, float(item * m * k), float(item * n * k), met)
    return Work(
        programs=tiles * config.splits,
        iterations=math.ceil(steps / config.splits),
        flops=2.0 * m * n * k,
        bytes_read=float(item * (m + n) * k),
        bytes_written=float((4 if split else item) * m * n),
        num_warps=config.num_warps,
        shared_bytes=item * (m + n) * k * config.num_stages,
        extra_bytes=2.0 * used.copies + (2.0 * used.workspace + result * item if split else 0.0),
        launches=split + (math.prod(views_along(problem, config.brick)) if problem.pass_ == "wgrad" else 1),
        stages=config.num_stages,
        order=order,
        product=(m, n) if problem.pass_ == "wgrad" else (n, m),
        operations=_INTERPRETED_OPERATIONS,
    )


def launch(problem: Problem, operands: Operands, config: BrickConfig) -> torch.Tensor:
    return launched(problem, operands, config, _gather, _wgrad)


def launched(
    problem: Problem, operands: Operands, config: BrickConfig, gather: Callable, wgrad: Callable
) -> torch.Tensor:
    """The result by these two launches, of whole or of partial sums."""
    y = problem.empty_result(next(t for t in operands.tensors if t is not None).device)
    end = residual_and_slope(problem, operands)
    split = config.splits > 1
    target = y.new_empty((config.splits, y.numel()), dtype=torch.float32) if split else y
    if problem.pass_ == "wgrad":
        wgrad(problem, operands, config, target)
    else:
        gather(problem, operands, config, target, NO_EPILOGUE if split else end)
    if split:
        reduce(problem, target, operands.bias, y, end)
    return y


def _readable(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor with dense channels last; a copy too of what is expanded: a descriptor's strides are not 0."""
    strides = tensor.stride()
    if 0 in strides and any(size > 1 and by == 0 for size, by in zip(tensor.shape, strides, strict=True)):
        return dense(tensor)
    return channels_last(tensor)


def _gather(problem: Problem, operands: Operands, config: BrickConfig, target: torch.Tensor, end: tuple) -> None:
    """forward and dgrad: every brick of the result gathers from its taps."""
    dgrad = problem.pass_ == "dgrad"
    x = _readable(operands.grad if dgrad else operands.input)
    w = dense(operands.weight)
    of_xs, of_w = _gathered(problem, config, x.stride())
    xs = [described and described.of(x) for described in of_xs]
    grid, arguments, options = _gather_launch(problem, config)
    launch_kernel(gather_bricks, grid, (target, operands.bias, of_w.of(w), *xs, *arguments, *end), options)


@functools.lru_cache(maxsize=_KNOWN_LAUNCHES)
def _gathered(
    problem: Problem, config: BrickConfig, strides: tuple[int, ...]
) -> tuple[list[Described | None], Described]:
    """Descriptors of the views of an x of these strides, as many as the kernel takes, and of the weight."""
    read, block = views(problem, config.brick), (*config.brick, config.block_k)
    role = 2 if problem.pass_ == "dgrad" else 0
    xs = [of_view(problem, role, strides, view, read.stride, block) for view in read.views]
    return xs + [None] * (MOST_VIEWS - len(xs)), of_weight(problem, config.block_n, config.block_k)


@functools.lru_cache(maxsize=_KNOWN_LAUNCHES)
def _gather_launch(problem: Problem, config: BrickConfig) -> tuple[tuple[int, int], tuple, dict]:
    """(grid, arguments behind the descriptors, options)."""
    dgrad, split = problem.pass_ == "dgrad", config.splits > 1
    strided = dgrad and problem.stride != (1, 1, 1)
    y_shape = problem.result_shape
    y_strides = format_strides(y_shape, torch.channels_last_3d if split else problem.memory_format)
    y_pixels = pixel_strides(y_shape, y_strides)
    y_unit = unit(4 if split else problem.itemsize, produced(problem), *y_pixels) if y_strides[1] == 1 else 1
    read, number = views(problem, config.brick), counts(problem, config.brick)
    tiles = math.prod(number) * -(-produced(problem) // config.block_n)
    arguments = (
        tuple((view.taps, view.first, view.start, view.size) for view in read.views),
        read.scale, read.step, read.tap_step, problem.kernel_size,
        (y_shape[0], *y_shape[2:]), number, problem.stride, problem.dilation,
        (*(stride // y_unit for stride in y_pixels), y_strides[1]), math.prod(y_shape) if split else 0,
        reduced(problem), produced(problem) // y_unit, config.splits,
    )  # fmt: skip
    options = dict(
        VIEWS=len(read.views), DGRAD=dgrad, STRIDED=strided, SKIPS=read.tap_step != (1, 1, 1), Y_UNIT=y_unit,
        BLOCK_K=config.block_k,
        BIAS=problem.bias and not split,  # of splits, the reduction adds it, and what follows it
        ACTIVATION=NO_ACTIVATION if split else problem.activation,
        **_constants(problem, config),
    )  # fmt: skip
    return (tiles * problem.groups * config.splits, math.prod(problem.stride) if strided else 1), arguments, options


def _constants(problem: Problem, config: BrickConfig) -> dict:
    return {
        "INDEX": tl.int64 if problem.index64 else tl.int32,
        "UPCAST": upcast(problem),
        "BRICK": config.brick,
        "BLOCK_N": config.block_n,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }


def _wgrad(problem: Problem, operands: Operands, config: BrickConfig, target: torch.Tensor) -> None:
    """wgrad: for each tap, filters x pixels times pixels x channels; the bricks are shared out among the splits."""
    x, grad = _readable(operands.input), _readable(operands.grad)
    read = views(problem, config.brick)
    if sum(math.prod(view.taps) for view in read.views) < problem.taps:  # what meets only padding has no gradient
        target.zero_()
    if is_flat(problem, config):
        grad = dense(grad)
    of_grad, of_xs = _walked(problem, config, grad.stride(), x.stride())
    grad = of_grad.of(grad)
    for view, of_x in zip(read.views, of_xs, strict=True):
        grid, arguments, options = _wgrad_launch(problem, config, view, read)
        launch_kernel(wgrad_bricks, grid, (target, grad, of_x.of(x), *arguments), options)


@functools.lru_cache(maxsize=_KNOWN_LAUNCHES)
def _walked(
    problem: Problem, config: BrickConfig, grad_strides: tuple[int, ...], x_strides: tuple[int, ...]
) -> tuple[Described, list[Described]]:
    """Descriptors of gradients and of the views of inputs of these strides."""
    if is_flat(problem, config):
        pixels, filters = problem.batch * math.prod(problem.output_size), problem.out_channels
        block = (math.prod(config.brick), config.block_k)
        grad = of_matrix(problem.torch_dtype, (pixels, filters), (filters, 1), block)
    else:
        grad = of_whole(problem, 2, grad_strides, (*config.brick, config.block_k))
    read, block = views(problem, config.brick), (*config.brick, config.block_n)
    return grad, [of_view(problem, 0, x_strides, view, read.stride, block) for view in read.views]


@functools.lru_cache(maxsize=_KNOWN_LAUNCHES)
def _wgrad_launch(
    problem: Problem, config: BrickConfig, view: View, read: Views
) -> tuple[tuple[int, int], tuple, dict]:
    """(grid, arguments behind the descriptors, options) of the taps of one view."""
    split = config.splits > 1
    arguments = (
        view.taps, view.first, view.start, read.scale, read.step, read.tap_step, problem.kernel_size,
        counts(problem, config.brick), weight_strides(problem, split),
        math.prod(problem.weight_shape) if split else 0, problem.group_in, problem.group_out, config.splits,
    )  # fmt: skip
    options = dict(
        CHAIN=CHAIN, FLAT=is_flat(problem, config), BLOCK_M=config.block_k,
        WAITS=problem.arch == "sm_90" and not left_is_shared(problem, config.brick),
        **_constants(problem, config),
    )  # fmt: skip
    tiles = -(-problem.group_out // config.block_k) * -(-problem.group_in // config.block_n)
    return (tiles * math.prod(view.taps) * problem.groups * config.splits, 1), arguments, options
