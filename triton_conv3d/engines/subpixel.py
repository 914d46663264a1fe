"""subpixel: strided input gradients of few channels, and such transposed convolutions, all parity classes in one product.

    z[j, (a, c)]                   = sum over taps e and channels r of  grad[j + low - e, r] * w[r, c, e * stride + a - front]
    dx[j * stride + a - before, c] = z[j, (a, c)]

Positions of a block of stride[0] * stride[1] * stride[2] read the same few pixels of the gradient, each through other taps.
An implicit GEMM computes a parity class at a time, into tiles of 16 columns that 1 to 15 channels leave almost empty, and
reads the gradient once for each tap. Here (class, channel) are the channels of one convolution of stride 1, a sub-pixel
convolution (Shi et al., 2016), that another engine computes: of 3x3x3 with stride 2 and 2 channels, 16 channels through 2x2x2
taps. Its weight has zeros where a class does not meet a tap; the blocks are then spread out by torch's own copy.

An infinity or NaN of the gradient also makes NaN of positions whose class does not meet its taps, in blocks that read it.

Bytes by design: those of the other engine, and its result, which has the elements of this one's, once in each direction;
twice where blocks reach beyond the result's edges.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch

from ..problem import CHANNELS_LAST, INT32_BYTES, VECTOR_BYTES, VIEW, Operands, Problem, Triple
from . import folded, halo, implicit_gemm, kn2row, matmul, tma
from .base import Memory, Work, aligned, refused_by_kernels
from .blocks import blocks_of, columns, unblocked
from .through import Moved, ThroughConfig, memory_through, offers_through, work_through

NAME = "subpixel"
MEASURED = ()  # architectures; it has not run on a GPU yet
_ENGINES = {engine.NAME: engine for engine in (kn2row, halo, tma, implicit_gemm)}  # the one that takes everything last
_MOST_PRODUCED = 15  # channels; 16 fill the smallest product of tensor cores without other classes
_MOST_COLUMNS = 128  # classes x channels: tiles are full before, and the more classes, the more of the weight is zeros


def supports(problem: Problem) -> str | None:
    if problem.pass_ != "dgrad":
        return f"{problem.pass_}: only input gradients have parity classes"
    if reason := unblocked(problem) or refused_by_kernels(problem):
        return reason
    if problem.groups != 1:
        return f"groups={problem.groups}: the channels of each would have to be moved apart"
    if problem.in_channels > _MOST_PRODUCED:
        return f"{problem.in_channels} channels to compute fill products by themselves: more than {_MOST_PRODUCED}"
    if problem.out_channels <= folded.MOST_CHANNELS:
        return f"{problem.out_channels} channels to sum over: engine folded takes up to {folded.MOST_CHANNELS}"
    made = columns(problem)
    if made > _MOST_COLUMNS:
        return f"stride {problem.stride} makes {made} columns of {problem.in_channels} channels: more than {_MOST_COLUMNS}"
    if matmul.supports(problem) is None:
        return "engine matmul computes it without zeros"
    inner = blocked(problem).problem
    if min(inner.input_size) < 1:
        return "no position of the result meets a tap"
    return implicit_gemm.supports(inner)


@dataclass(frozen=True)
class Blocked:
    """The convolution of stride 1, whose pixels are blocks of the result (:mod:`.blocks`).

    covered: positions of the result that its blocks have; those after them meet no tap.
    """

    problem: Problem
    covered: Triple


@functools.lru_cache(maxsize=4096)
def blocked(problem: Problem) -> Blocked:
    of, count, padding, covered = blocks_of(problem), [], [], []
    for size, outputs, stride, dilation, all_, met, low, before in zip(
        problem.input_size, problem.output_size, problem.stride, problem.dilation, of.count, of.taps, of.low, of.before,
        strict=True,
    ):  # fmt: skip
        most = outputs + (met - 1) * dilation - low  # blocks that meet any output
        count.append(min(all_, most))
        padding += [low, most - count[-1]]
        covered.append(min(size, count[-1] * stride - before))
    wide, item = columns(problem), problem.itemsize
    vectors = problem.alignment if problem.layouts[2] == VIEW else math.gcd(VECTOR_BYTES, problem.out_channels * item)
    inner = problem.replace(
        in_channels=wide,
        input_size=tuple(count),
        kernel_size=of.taps,
        stride=(1, 1, 1),
        padding=tuple(padding),
        dilation=tuple(1 if s > 1 else d for s, d in zip(problem.stride, problem.dilation, strict=True)),
        layouts=(CHANNELS_LAST, CHANNELS_LAST, problem.layouts[2]),
        alignment=math.gcd(vectors, wide * item),
    )
    large = math.prod(inner.input_shape) * item > INT32_BYTES
    return Blocked(inner.replace(index64=problem.index64 or large), tuple(covered))


def configs(problem: Problem) -> tuple[ThroughConfig, ...]:
    return offers_through(_ENGINES, blocked(problem).problem)


@functools.lru_cache(maxsize=4096)
def _moved(problem: Problem) -> Moved:
    of, item = blocked(problem), problem.itemsize
    weight, blocks, result = (
        item * math.prod(shape) for shape in (of.problem.weight_shape, of.problem.input_shape, problem.result_shape)
    )
    cut, filled = not _fits(problem), any(blocks_of(problem).front)
    copies = weight * (1 + filled) + blocks * (1 + cut)
    moved = weight * (2 + 2 * filled) + blocks + (blocks + 2 * result if cut else result)
    return Moved(copies, moved, 2 + 2 * filled + cut + (of.covered != problem.input_size))


def _fits(problem: Problem) -> bool:
    """Whether blocks have all positions of the result and no others."""
    blocks = zip(blocked(problem).problem.input_size, problem.stride, problem.input_size, strict=True)
    return not any(blocks_of(problem).before) and all(count * stride == size for count, stride, size in blocks)


def memory(problem: Problem, config: ThroughConfig) -> Memory:
    """A gradient whose channels fill vectors is copied too where its address is no multiple of 16: not counted."""
    return memory_through(_ENGINES, blocked(problem).problem, config, _moved(problem))


def work(problem: Problem, config: ThroughConfig) -> Work:
    """The launches as the cost model sees them."""
    return work_through(_ENGINES, blocked(problem).problem, config, _moved(problem))


def launch(problem: Problem, operands: Operands, config: ThroughConfig) -> torch.Tensor:
    of, grad = blocked(problem), operands.grad
    if of.problem.layouts[2] == CHANNELS_LAST and not aligned(grad):
        grad = grad.clone()
    inner = operands._replace(grad=grad, weight=_by_class(problem, operands.weight))
    return _spread(problem, _ENGINES[config.engine].launch(of.problem, inner, config.config))


def _by_class(problem: Problem, weight: torch.Tensor) -> torch.Tensor:
    """(K, classes x C, taps / stride), channels last, of a weight (K, C, taps)."""
    of, front, (k, c, *kernel) = blocked(problem), blocks_of(problem).front, weight.shape
    if any(front):
        filled = weight.new_zeros(k, c, *(ahead + taps for ahead, taps in zip(front, kernel, strict=True)))
        filled[(..., *(slice(ahead, None) for ahead in front))] = weight
        weight = filled
    taps = _split(weight, of.problem.kernel_size, problem.stride).permute(0, 2, 4, 6, 3, 5, 7, 1)
    copy = torch.empty(taps.shape, dtype=weight.dtype, device=weight.device).copy_(taps)
    return copy.view(k, *of.problem.kernel_size, -1).permute(0, 4, 1, 2, 3)


def _spread(problem: Problem, blocks: torch.Tensor) -> torch.Tensor:
    """(N, C, D, H, W) of (N, classes x C, blocks), by one copy, and another where blocks reach beyond the result."""
    of, result, (n, _, *count) = blocked(problem), problem.empty_result(blocks.device), blocks.shape
    whole = result
    if not _fits(problem):
        size = (count * stride for count, stride in zip(count, problem.stride, strict=True))
        whole = torch.empty(
            (n, problem.in_channels, *size), dtype=blocks.dtype, device=blocks.device, memory_format=problem.memory_format
        )
    by_class = blocks.permute(0, 2, 3, 4, 1).unflatten(4, (*problem.stride, problem.in_channels))
    _split(whole, count, problem.stride).copy_(by_class.permute(0, 7, 1, 4, 2, 5, 3, 6))
    if whole is not result:
        if of.covered != problem.input_size:
            result.zero_()
        ends = zip(blocks_of(problem).before, of.covered, strict=True)
        result[(..., *map(slice, of.covered))] = whole[(..., *(slice(first, first + length) for first, length in ends))]
    return result


def _split(tensor: torch.Tensor, count: Triple, stride: Triple) -> torch.Tensor:
    """Each dimension of (D, H, W) as so many blocks of its stride: a view (N, C, D, d, H, h, W, w)."""
    for dim in (4, 3, 2):
        tensor = tensor.unflatten(dim, (count[dim - 2], stride[dim - 2]))
    return tensor
