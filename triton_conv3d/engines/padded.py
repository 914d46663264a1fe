"""padded: channels that fill no vectors, in copies that do, for the engines that load vectors.

With 45 or 230 channels of a 16-bit type (R(2+1)D) a pixel begins anywhere: no load of it is wider than 2 or 4 bytes, and no
copy engine takes it. Here another engine computes the same convolution with more channels, from copies in which the new
ones are zeros:

    forward   x and w, with more channels to sum over; the result is written as it is
    dgrad     grad and w, likewise; of x's gradient the new channels are left out, by one more copy
    wgrad     x and grad, and of the weight's gradient the new channels and filters are left out

Bytes by design: those of the other engine, and the copies once in each direction. An operand that the other engine would
copy for its layout is copied here instead, so that there its padding costs nothing.
"""

from __future__ import annotations

import functools
import math

import torch

from ..problem import CHANNELS_LAST, INT32_BYTES, VECTOR_BYTES, VIEW, Operands, Problem
from . import folded, halo, hopper, implicit_gemm, tma
from .base import READ, Memory, Work, aligned, in_format, refused_by_kernels
from .space_to_depth.lines import gathered
from .through import Moved, ThroughConfig, memory_through, offers_through, work_through

NAME = "padded"
_ENGINES = {engine.NAME: engine for engine in (tma, hopper, halo, implicit_gemm)}  # the one that takes everything last


def supports(problem: Problem) -> str | None:
    if reason := refused_by_kernels(problem):
        return reason
    if problem.groups > 1:
        return f"groups={problem.groups}: the channels of each would have to be moved apart"
    if not problem.on_tensor_cores:
        return "float32 as ieee: its products take longer than loads of any width"
    read = (problem.in_channels,) if problem.pass_ == "forward" else (problem.in_channels, problem.out_channels)
    odd = [channels for channels in read if channels != _rounded(problem, channels)]
    if not odd:
        return f"channels fill vectors of {VECTOR_BYTES} bytes as they are"
    if min(odd) <= folded.MOST_CHANNELS:
        return f"{min(odd)} channels: engine folded takes up to {folded.MOST_CHANNELS} as they are"
    return implicit_gemm.supports(widened(problem))


def _rounded(problem: Problem, channels: int) -> int:
    vector = VECTOR_BYTES // problem.itemsize
    return -(-channels // vector) * vector


@functools.lru_cache(maxsize=4096)
def widened(problem: Problem) -> Problem:
    """The problem that the other engine computes: its operands are dense and aligned."""
    forward = problem.pass_ == "forward"
    wide = problem.replace(
        in_channels=_rounded(problem, problem.in_channels),
        out_channels=problem.out_channels if forward else _rounded(problem, problem.out_channels),
        alignment=VECTOR_BYTES,
    )
    changed = (*_copied(problem, wide), *_cut(problem, wide))
    layouts = tuple(CHANNELS_LAST if role in changed else layout for role, layout in enumerate(problem.layouts))
    largest = max(map(math.prod, wide.shapes)) * wide.itemsize
    return wide.replace(layouts=layouts, index64=problem.index64 or largest > INT32_BYTES)


def _copied(problem: Problem, wide: Problem) -> tuple[int, ...]:
    """Roles of the operands that are copied: those with new channels, and views, whose alignment is not known."""
    return tuple(
        role
        for role in READ[problem.pass_]
        if problem.shapes[role] != wide.shapes[role] or problem.layouts[role] == VIEW
    )


def _cut(problem: Problem, wide: Problem) -> tuple[int, ...]:
    """The role of the result, if it has new channels."""
    role = problem.result_role
    return (role,) if problem.shapes[role] != wide.shapes[role] else ()


def configs(problem: Problem) -> tuple[ThroughConfig, ...]:
    return offers_through(_ENGINES, widened(problem))


@functools.lru_cache(maxsize=4096)
def _moved(problem: Problem) -> Moved:
    wide, item = widened(problem), problem.itemsize
    small, large = (tuple(map(math.prod, p.shapes)) for p in (problem, wide))
    copied, cut = _copied(problem, wide), _cut(problem, wide)
    copies = item * sum(large[role] for role in (*copied, *cut))
    moved = item * (sum(small[role] + large[role] for role in copied) + sum(2 * small[role] for role in cut))
    filled = sum(problem.shapes[role][0] != wide.shapes[role][0] for role in copied)  # filters, by themselves
    return Moved(copies, moved, len(copied) + filled + len(cut))


def memory(problem: Problem, config: ThroughConfig) -> Memory:
    """A dense operand that needs no new channels is copied too where its address is no multiple of 16: not counted."""
    return memory_through(_ENGINES, widened(problem), config, _moved(problem))


def work(problem: Problem, config: ThroughConfig) -> Work:
    """The launches as the cost model sees them."""
    return work_through(_ENGINES, widened(problem), config, _moved(problem))


def launch(problem: Problem, operands: Operands, config: ThroughConfig) -> torch.Tensor:
    wide = widened(problem)
    input, weight, grad = (
        None if tensor is None else _filled(tensor, shape, layout, problem.index64)
        for tensor, shape, layout in zip(operands[:3], wide.shapes, wide.layouts, strict=True)
    )
    result = _ENGINES[config.engine].launch(wide, operands._replace(input=input, weight=weight, grad=grad), config.config)
    if result.shape == problem.result_shape:
        return result
    return in_format(result[: problem.result_shape[0], : problem.result_shape[1]], problem.memory_format)


def _filled(tensor: torch.Tensor, shape: tuple[int, ...], layout: str, index64: bool) -> torch.Tensor:
    """The tensor in this larger shape, zeros after it; itself where the other engine can read it as it is, or copies it."""
    rows, channels = tensor.shape[:2]
    if (rows, channels) == shape[:2] and (layout != CHANNELS_LAST or _readable(tensor)):
        return tensor
    return gathered(tensor, (*shape[3:], shape[1]), rows=shape[0], index64=index64).permute(0, 4, 1, 2, 3)


def _readable(tensor: torch.Tensor) -> bool:
    return aligned(tensor) and tensor.is_contiguous(memory_format=torch.channels_last_3d)
