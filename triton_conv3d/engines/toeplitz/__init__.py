"""toeplitz: large depthwise kernels as products of tensor cores, through blocks of pixels that are channels.

    y[n, c, b * P + p] = sum over blocks e and pixels r of  x[n, c, (b + e) * P + r - pad] * v[c, p, e, r]
                         v[c, p, e, r] = w[c, e * P + r - p], 0 where there is no such tap

A depthwise convolution of many taps is bound by its products, which no tensor core can make: one channel in, one out. With
blocks of P = Pd x Ph x Pw neighbouring pixels as one pixel, those of the input are channels to sum over and those of the
output are channels to compute: a convolution of as many groups as there are channels, with few taps, whose weights are block
Toeplitz matrices (Golub and Van Loan, Matrix Computations, 4.7). Another engine computes it. Of its weight, one part of
ceil((P + k - 1) / P) * P / k is no zeros in each dimension: a quarter for 5x5x5 and P = 4x4x4; tensor cores make sixteen
times the products that float32 arithmetic makes.

    forward   as above
    dgrad     the same of the gradient, with the taps turned round
    wgrad     of the other convolution's gradient, kept in float32, the sums along its diagonals

Pixels that a dilation keeps apart never meet: they are samples of their own (phases), and the kernel that they meet is dense.
An infinity or NaN also makes NaN of what its block meets through zeros: results up to a block away, in its own channel and, by
``implicit_gemm``, in those of its tile.

Bytes by design: those of the other engine, and a copy of what is read and of what is computed, once in each direction.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from ...problem import CHANNELS_LAST, VECTOR_BYTES, Operands, Problem, Triple
from .. import halo, implicit_gemm, tma
from ..base import MOST_COPIED, Memory, Work, aligned, format_strides, refused_by_kernels, upcast
from ..launching import launch_kernel, same_options
from ..through import Float32Sums, Moved, ThroughConfig, memory_through, offers_through, work_through
from .kernels import collect, expand, move_blocks

NAME = "toeplitz"
MEASURED = ()  # architectures; it has not run on a GPU yet
_ENGINES = {engine.NAME: engine for engine in (halo, tma, implicit_gemm)}  # the one that takes everything last
_LEAST_TAPS = 65  # up to 64, engine depthwise is bound by what it loads, not by its products
_WIDTHS = (64, 32, 16)  # pixels of a block: the channels that others' tiles have room for
_MOVED, _MOST_CHANNELS, _MOST_RUN = 4096, 32, 128  # elements of one program of a copy; of these, channels and pixels along W
_COLLECTED = 1024  # elements that one program sums at once
_NO_FRONT = (0, 0, 0)


@dataclass(frozen=True)
class ToeplitzConfig(ThroughConfig):
    """
    block_d, block_h, block_w: pixels of a block.
    """

    block_d: int
    block_h: int
    block_w: int

    @property
    def block(self) -> Triple:
        return (self.block_d, self.block_h, self.block_w)

    def to_dict(self) -> dict:
        return {"block_d": self.block_d, "block_h": self.block_h, "block_w": self.block_w, **super().to_dict()}


@dataclass(frozen=True)
class Blocked:
    """The convolution of blocks, and how they lie in volumes.

    problem: the other engine's.
    pixels: of a block. dilation: from one to the next.
    phases: of the pixels that a dilation keeps apart, which are samples.
    read, made: blocks of what is summed over, of what is computed; wgrad reads both.
    taps: blocks of the former that one of the latter meets.
    front: pixels before those that are read where their blocks begin.
    """

    problem: Problem
    pixels: Triple
    dilation: Triple
    phases: Triple
    read: Triple
    made: Triple
    taps: Triple
    front: Triple


def supports(problem: Problem) -> str | None:
    if reason := refused_by_kernels(problem):
        return reason
    if problem.groups != problem.in_channels or problem.groups != problem.out_channels:
        return f"{problem.in_channels} -> {problem.out_channels} channels in {problem.groups} groups: it takes one to one"
    if not problem.on_tensor_cores:
        return "float32 as ieee: no product of tensor cores"
    if problem.taps < _LEAST_TAPS:
        return f"{problem.taps} taps: fewer than {_LEAST_TAPS}, which engine depthwise computes while it loads"
    if problem.stride != (1, 1, 1):
        return f"stride {problem.stride}: blocks would meet more pixels than they have taps for"
    if (copied := _moved(problem, _sizes(problem)[-1]).copies) > MOST_COPIED:
        return f"copies of {copied} bytes: more than {MOST_COPIED}"
    return implicit_gemm.supports(blocked(problem, _sizes(problem)[-1]).problem)


def _geometry(problem: Problem) -> tuple[Triple, Triple]:
    """(pixels that are computed, or of wgrad those of the gradient; zeros before what is read)."""
    before = problem.padding[::2]
    if problem.pass_ != "dgrad":
        return problem.output_size, before
    reach = ((taps - 1) * dilation for taps, dilation in zip(problem.kernel_size, problem.dilation, strict=True))
    return problem.input_size, tuple(far - pad for far, pad in zip(reach, before, strict=True))


def _parts(problem: Problem, pixels: Triple) -> tuple[Triple, Triple, Triple]:
    """(phases, blocks of what is computed, blocks that one of them meets) in each dimension."""
    made, _ = _geometry(problem)
    phases = tuple(map(min, problem.dilation, made))
    apart = (-(-size // dilation) for size, dilation in zip(made, problem.dilation, strict=True))
    blocks = tuple(-(-size // count) for size, count in zip(apart, pixels, strict=True))
    taps = tuple(-(-(count + taps - 1) // count) for count, taps in zip(pixels, problem.kernel_size, strict=True))
    return phases, blocks, taps


@functools.lru_cache(maxsize=4096)
def _sizes(problem: Problem) -> tuple[Triple, ...]:
    """Of each width the block with which the fewest products are made, zeros included; the widest first."""

    def products(pixels: Triple) -> tuple[int, int]:
        phases, blocks, taps = _parts(problem, pixels)
        return math.prod(phases) * math.prod(blocks) * math.prod(taps) * math.prod(pixels) ** 2, -pixels[2]

    def splits(width: int) -> list[Triple]:
        powers = [2**i for i in range(width.bit_length())]
        return [(d, h, width // (d * h)) for d in powers for h in powers if d * h <= width]

    return tuple(min(splits(width), key=products) for width in _WIDTHS)


@functools.lru_cache(maxsize=4096)
def blocked(problem: Problem, pixels: Triple) -> Blocked:
    phases, made, taps = _parts(problem, pixels)
    read = tuple(blocks + met - 1 for blocks, met in zip(made, taps, strict=True))
    wide, wgrad = problem.groups * math.prod(pixels), problem.pass_ == "wgrad"
    inner = problem.replace(
        pass_="wgrad" if wgrad else "forward",
        batch=problem.batch * math.prod(phases),
        in_channels=wide,
        out_channels=wide,
        input_size=read,
        kernel_size=taps,
        padding=(0,) * 6,
        dilation=(1, 1, 1),
        layouts=(CHANNELS_LAST,) * 3,
        alignment=VECTOR_BYTES,
    )
    return Blocked(
        problem=Float32Sums(*inner._values()) if wgrad else inner,
        pixels=pixels,
        dilation=problem.dilation,
        phases=phases,
        read=read,
        made=made,
        taps=taps,
        front=_geometry(problem)[1],
    )


@functools.lru_cache(maxsize=4096)
def configs(problem: Problem) -> tuple[ToeplitzConfig, ...]:
    return tuple(
        ToeplitzConfig(offer.engine, offer.config, *pixels)
        for pixels in _sizes(problem)
        if _moved(problem, pixels).copies <= MOST_COPIED
        for offer in offers_through(_ENGINES, blocked(problem, pixels).problem)
    )


@functools.lru_cache(maxsize=4096)
def _moved(problem: Problem, pixels: Triple) -> Moved:
    inner, item, wgrad = blocked(problem, pixels).problem, problem.itemsize, problem.pass_ == "wgrad"
    volumes = item * (math.prod(inner.input_shape) + math.prod(inner.output_shape))
    given = item * (math.prod(problem.input_shape) + math.prod(problem.output_shape))
    if problem.residual:
        volumes += item * math.prod(inner.output_shape)
        given += item * math.prod(problem.output_shape)
    weight = math.prod(inner.weight_shape) * (4 if wgrad else item)
    return Moved(volumes + weight, volumes + given + weight, 3 + inner.bias + inner.residual)


def memory(problem: Problem, config: ToeplitzConfig) -> Memory:
    return memory_through(_ENGINES, blocked(problem, config.block).problem, config, _moved(problem, config.block))


def work(problem: Problem, config: ToeplitzConfig) -> Work:
    """The launches as the cost model sees them."""
    return work_through(_ENGINES, blocked(problem, config.block).problem, config, _moved(problem, config.block))


def launch(problem: Problem, operands: Operands, config: ToeplitzConfig) -> torch.Tensor:
    of, other = blocked(problem, config.block), _ENGINES[config.engine]
    if problem.pass_ == "wgrad":
        inner = Operands(
            input=_to_blocks(of, operands.input, of.read, of.front), grad=_to_blocks(of, operands.grad, of.made, _NO_FRONT)
        )
        return _collect(problem, of, other.launch(of.problem, inner, config.config))
    bias, residual = operands.bias, operands.residual
    inner = Operands(
        input=_to_blocks(of, operands.grad if problem.pass_ == "dgrad" else operands.input, of.read, of.front),
        weight=_expand(of, operands.weight, flip=problem.pass_ == "dgrad"),
        bias=None if bias is None else bias.repeat_interleave(math.prod(of.pixels)),
        residual=None if residual is None else _to_blocks(of, residual, of.made, _NO_FRONT),
        negative_slope=operands.negative_slope,
    )
    return _from_blocks(problem, of, other.launch(of.problem, inner, config.config))


def _to_blocks(of: Blocked, tensor: torch.Tensor, blocks: Triple, front: Triple) -> torch.Tensor:
    """(samples, channels x pixels of a block, D, H, W), channels last."""
    shape = (of.problem.batch, *blocks, of.problem.in_channels)
    copy = torch.empty(shape, dtype=tensor.dtype, device=tensor.device)
    programs, before, behind, options = _moving(of, blocks, tuple(tensor.shape), tensor.stride(), aligned(tensor))
    launch_kernel(move_blocks, (programs, 1), (tensor, copy, *before, front, *behind), options)
    return copy.permute(0, 4, 1, 2, 3)


def _from_blocks(problem: Problem, of: Blocked, blocks: torch.Tensor) -> torch.Tensor:
    y = problem.empty_result(blocks.device)
    strides = format_strides(problem.result_shape, problem.memory_format)
    programs, before, behind, options = _moving(of, of.made, problem.result_shape, strides, True, back=True)
    launch_kernel(move_blocks, (programs, 1), (y, blocks, *before, _NO_FRONT, *behind), options)
    return y


@functools.lru_cache(maxsize=4096)
def _moving(
    of: Blocked, blocks: Triple, shape: tuple[int, ...], strides: tuple[int, ...], even: bool, back: bool = False
) -> tuple[int, tuple, tuple, dict]:
    """(programs, arguments before ``front`` and behind it, options) for a volume of this shape and these strides.

    ``even``: its address allows vectors. ``back``: it is written, not read. A tile is wide where the volume is dense: in
    channels, or else along W.
    """
    channels, steps = shape[1], [0 if size == 1 else stride for size, stride in zip(shape, strides, strict=True)]
    last = steps[1] == 1
    dense = 1 if last else 4
    unit = math.gcd(VECTOR_BYTES // of.problem.itemsize, *steps[:dense], *steps[dense + 1 :]) if even else 1
    steps = tuple(step if dim == dense else step // unit for dim, step in enumerate(steps))
    room, most, length = _MOVED // math.prod(of.pixels), *map(triton.next_power_of_2, (channels, blocks[2]))
    if last:
        across = min(most, _MOST_CHANNELS, room)
        run = min(length, room // across)
    else:
        run = min(length, _MOST_RUN // of.pixels[2], room)
        across = min(most, room // run)
    tiles_c, tiles_w = -(-channels // across), -(-blocks[2] // run)
    programs = of.problem.batch * blocks[0] * blocks[1] * tiles_c * tiles_w
    options = dict(
        P=of.pixels, LAST=last, UNIT=unit, CHANNELS=across, BLOCKS=run, INDEX=_index(of), BACK=back, num_warps=4
    )  # fmt: skip
    return programs, (shape[2:], steps, channels), (of.dilation, of.phases, blocks, tiles_c, tiles_w), options


def _index(of: Blocked) -> tl.dtype:
    return tl.int64 if of.problem.index64 else tl.int32


def _expand(of: Blocked, weight: torch.Tensor, flip: bool) -> torch.Tensor:
    """The other convolution's weight, channels last."""
    channels, _, *kernel = weight.shape
    pixels = math.prod(of.pixels)
    matrix = torch.empty((channels * pixels, *of.taps, pixels), dtype=weight.dtype, device=weight.device)
    arguments = (tuple(kernel), (weight.stride(0), *weight.stride()[2:]), of.taps)
    options = same_options(P=of.pixels, FLIP=flip, INDEX=_index(of), num_warps=4)
    launch_kernel(expand, (channels * math.prod(of.taps), 1), (weight, matrix, *arguments), options)
    return matrix.permute(0, 4, 1, 2, 3)


def _collect(problem: Problem, of: Blocked, matrix: torch.Tensor) -> torch.Tensor:
    """The gradient of the weight, of that of the other convolution's."""
    dw, taps = problem.empty_result(matrix.device), _COLLECTED // math.prod(of.pixels)
    strides = (dw.stride(0), *dw.stride()[2:])
    options = same_options(P=of.pixels, TAPS=taps, INDEX=_index(of), UPCAST=upcast(problem), num_warps=4)
    grid = (problem.groups * -(-problem.taps // taps), 1)
    launch_kernel(collect, grid, (matrix, dw, problem.kernel_size, strides, of.taps), options)
    return dw
