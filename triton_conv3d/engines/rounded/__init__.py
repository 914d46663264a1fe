"""rounded: tf32 from copies that are rounded once, so that products read shared memory as it is.

A tensor core truncates float32 operands to tf32; rounding them instead, between shared memory and the product, takes the
operands through registers in every step and, of what lies in rows of filters or pixels, back to shared memory in another
order: of 64 x 128 x 32 some 420 instructions in wgrad. Here a copy of each operand is rounded beforehand, in the order
that matrix instructions of sm_90 read 32-bit operands in, which is with the reduction as the dense dimension:

    forward   pixels x channels and filters x channels, for the implicit GEMM, whose loop then rounds nothing
    dgrad     likewise: with stride 1 it is forward of the gradient and of the weight with taps turned round
    wgrad     channels x pixels and filters x pixels, padded, so that a tap is a shift: a kernel of its own (kernels.py)

Bytes by design: those of the copies once in each direction, and input, weight and output once each beside it.

In wgrad lines of the gradient are filled up with zeros to those of the padded input: an infinity or NaN in the input then
reaches taps of its channel that it would not meet by the definition.
"""

from __future__ import annotations

import functools
import math

import torch
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from ...problem import CHANNELS_LAST, INT32_BYTES, VECTOR_BYTES, Operands, Problem
from .. import implicit_gemm, matmul
from ..base import Memory, Order, Work, aligned, refused_by_kernels
from ..implicit_gemm import in_units, pixel_strides, unit
from ..launching import launch_kernel, same_options
from ..through import ThroughConfig, offers_through
from .configs import GemmConfig, Volume, chain, copied_bytes, volumes, wgrad_configs, wgrad_refused
from .kernels import rounded_copy, rounded_wgrad

__all__ = ["NAME", "configs", "launch", "memory", "supports", "work"]

NAME = "rounded"
MEASURED = ()  # architectures; it has not run on a GPU yet
_ENGINES = {engine.NAME: engine for engine in (implicit_gemm,)}
_PRECISION = "rounded"  # of a problem whose operands hold tf32 already
_LEAST_CHANNELS = 64  # on either side: with fewer, a copy takes as long as the products
_LEAST_REDUCED = 1024  # taps and channels, for the same reason, of forward and dgrad
_COPIED, _MOST_CHANNELS = 4096, 128  # elements and channels of one program of a copy; its positions cost the most to find
_STEP, _LOAD = 56.0, 10.7  # instructions of a warp in a step without rounding, and for each load: as in 16-bit types
_WGRAD_STEP = 105.0  # likewise of wgrad, whatever its tile: SASS, sm_90


def supports(problem: Problem) -> str | None:
    if reason := refused_by_kernels(problem):
        return reason
    if (problem.dtype, problem.precision) != ("float32", "tf32"):
        return f"{problem.dtype} as {problem.precision}: only tf32 rounds its operands"
    if not problem.arch.startswith("sm_") and problem.arch != "interpreter":
        return f"{problem.arch}: only NVIDIA's tensor cores were compiled for"
    if problem.groups != 1:
        return f"groups={problem.groups}: the channels of one are too few for what a copy takes"
    if min(problem.in_channels, problem.out_channels) < _LEAST_CHANNELS:
        least = min(problem.in_channels, problem.out_channels)
        return f"{least} channels: fewer than {_LEAST_CHANNELS}, so that a copy takes as long as the products"
    if matmul.supports(problem) is None:
        return "engine matmul computes it"
    reduced = problem.taps * (problem.in_channels if problem.pass_ == "forward" else problem.out_channels)
    if problem.pass_ != "wgrad" and reduced < _LEAST_REDUCED:
        return f"{reduced} products for each result: fewer than {_LEAST_REDUCED}, so that the copies take as long"
    return wgrad_refused(problem) if problem.pass_ == "wgrad" else implicit_gemm.supports(inner(problem))


@functools.lru_cache(maxsize=4096)
def inner(problem: Problem) -> Problem:
    """What the other engine computes of forward and dgrad: its operands are dense, aligned and rounded."""
    last = (CHANNELS_LAST,) * 3
    turned = problem.pass_ == "dgrad" and problem.stride == (1, 1, 1)
    sides = zip(problem.kernel_size, problem.dilation, problem.padding[::2], problem.padding[1::2], strict=True)
    ends = [(d * (k - 1) - low, d * (k - 1) - high) for k, d, low, high in sides]
    of = problem
    if turned and min(map(min, ends)) >= 0:
        of = problem.replace(
            pass_="forward",
            in_channels=problem.out_channels,
            out_channels=problem.in_channels,
            input_size=problem.output_size,
            padding=tuple(pad for end in ends for pad in end),
        )
        layouts = (*last[:2], problem.layouts[0])
    elif problem.pass_ == "dgrad":
        layouts = (problem.layouts[0], *last[:2])
    else:
        layouts = (*last[:2], problem.layouts[2])
    large = max(map(math.prod, of.shapes)) * of.itemsize
    return of.replace(
        precision=_PRECISION,
        layouts=layouts,
        alignment=math.gcd(VECTOR_BYTES, of.itemsize * of.in_channels, of.itemsize * of.out_channels),
        index64=large > INT32_BYTES,
    )


def configs(problem: Problem) -> tuple[ThroughConfig | GemmConfig, ...]:
    return wgrad_configs(problem) if problem.pass_ == "wgrad" else offers_through(_ENGINES, inner(problem))


def memory(problem: Problem, config: ThroughConfig | GemmConfig) -> Memory:
    workspace = 4 * config.splits * problem.result_elements if config.splits > 1 else 0
    return Memory(workspace, _copied_bytes(problem, config))


def _copied_bytes(problem: Problem, config: ThroughConfig | GemmConfig) -> int:
    if problem.pass_ == "wgrad":
        return copied_bytes(problem, config.block_k)
    pixels = math.prod(problem.input_shape if problem.pass_ == "forward" else problem.output_shape)
    return problem.itemsize * (pixels + math.prod(problem.weight_shape))


def work(problem: Problem, config: ThroughConfig | GemmConfig) -> Work:
    """The launches as the cost model sees them."""
    copies = 2.0 * _copied_bytes(problem, config)  # what padding adds is written, not read
    if problem.pass_ == "wgrad":
        return _wgrad_work(problem, config, copies)
    work = _ENGINES[config.engine].work(inner(problem), config.config)
    loads = work.bytes_read / (work.vector_bytes * 32 * work.num_warps)
    work.instructions = work.instructions or _STEP + _LOAD * loads
    work.extra_bytes += copies
    work.launches += 2 + (inner(problem).pass_ != problem.pass_)
    return work


def _wgrad_work(problem: Problem, config: GemmConfig, copies: float) -> Work:
    m, n, k, splits = config.block_m, config.block_n, config.block_k, config.splits
    rows, columns = -(-problem.out_channels // m), -(-problem.in_channels // n) * problem.taps
    partials = 4.0 * problem.result_elements * (splits + 1) if splits > 1 else 0.0
    return Work(
        programs=rows * columns * splits,
        iterations=math.ceil(volumes(problem, k)[1].positions / k / splits),
        flops=2.0 * m * n * k,
        bytes_read=4.0 * (m + n) * k,
        bytes_written=4.0 * m * n,
        num_warps=config.num_warps,
        shared_bytes=4 * (m + n) * k * config.num_stages,
        extra_bytes=copies + partials,
        launches=3 + (splits > 1),
        sums=m * n,
        product=(m, n),
        stages=config.num_stages,
        order=Order(rows, columns, rows, 4.0 * m * k, 4.0 * n * k / max(1.0, problem.taps / math.prod(problem.stride))),
        instructions=_WGRAD_STEP,
        operations=40.0,  # as of two descriptors in engine tma
    )


def launch(problem: Problem, operands: Operands, config: ThroughConfig | GemmConfig) -> torch.Tensor:
    if problem.pass_ == "wgrad":
        return _wgrad(problem, operands, config)
    of, weight = inner(problem), operands.weight
    if of.pass_ != problem.pass_:
        weight = weight.flip(2, 3, 4).transpose(0, 1)
    pixels = _last(operands.input if problem.pass_ == "forward" else operands.grad)
    read = {"grad": pixels} if of.pass_ == "dgrad" else {"input": pixels, "grad": None}
    return _ENGINES[config.engine].launch(of, operands._replace(weight=_last(weight), **read), config.config)


def _last(tensor: torch.Tensor) -> torch.Tensor:
    """Rounded, with dense channels as the last dimension in memory."""
    n, c, d, h, w = tensor.shape
    copy = tensor.new_empty(n, d, h, w, c)
    _copy(tensor, copy, Volume(1, n, d, h * w, (h, w)), (c, 1))
    return copy.permute(0, 4, 1, 2, 3)


def _copy(tensor: torch.Tensor, copy: torch.Tensor, of: Volume, y_strides: tuple[int, int]) -> None:
    channels, size = tensor.shape[1], tuple(tensor.shape[2:])
    block_c = min(_MOST_CHANNELS, 1 << (channels - 1).bit_length())
    block_p = _COPIED // block_c
    grid = -(-of.positions // block_p), -(-channels // block_c)
    pixels, by_channel = pixel_strides(tuple(tensor.shape), tensor.stride()), tensor.stride(1)
    x_unit = unit(tensor.itemsize, *pixels) if by_channel == 1 and aligned(tensor) else 1
    arguments = (
        of.positions, channels, size, in_units(pixels, x_unit), by_channel, of.volumes, of.planes, of.plane, of.lines,
        of.stride, of.dilation, of.pad, *y_strides,
    )  # fmt: skip
    span = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    index = tl.int64 if max(span, copy.numel()) >= 2**31 - _COPIED else tl.int32
    options = same_options(X_UNIT=x_unit, INDEX=index, BLOCK_P=block_p, BLOCK_C=block_c, num_warps=4)
    launch_kernel(rounded_copy, grid, (tensor, copy, *arguments), options)


def _wgrad(problem: Problem, operands: Operands, config: GemmConfig) -> torch.Tensor:
    """For each tap, filters x pixels times pixels x channels; the pixels are shared out among the splits."""
    dw, split = problem.empty_result(operands.grad.device), config.splits > 1
    target = dw.new_empty((config.splits, dw.numel())) if split else dw
    x, grad = volumes(problem, config.block_k)
    copies = []
    for tensor, of, rows in ((operands.grad, grad, config.block_m), (operands.input, x, config.block_n)):
        copy = tensor.new_empty(tensor.shape[1], of.positions)
        _copy(tensor, copy, of, (1, of.positions))
        copies.append(TensorDescriptor.from_tensor(copy, [rows, config.block_k]))
    arguments = (
        problem.out_channels, problem.in_channels, grad.plane // config.block_k,
        (problem.batch, grad.planes), x.planes, x.plane, x.lines,
        problem.kernel_size, problem.stride, problem.dilation,
        implicit_gemm.weight_strides(problem, split), dw.numel() if split else 0, config.splits,
    )  # fmt: skip
    tiles = -(-problem.out_channels // config.block_m) * -(-problem.in_channels // config.block_n)
    options = same_options(
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=config.block_k, CHAIN=chain(config),
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    launch_kernel(rounded_wgrad, (tiles * problem.taps * config.splits, 1), (target, *copies, *arguments), options)
    if split:
        implicit_gemm.reduce(problem, target, None, dw)
    return dw
