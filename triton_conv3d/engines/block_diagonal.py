"""block_diagonal: small groups, several of them as one, for the engine that keeps planes of wider ones.

    w'[(q, k), (q', c)] = w[q, k, c] where q = q', 0 elsewhere            for the groups q of one of the fewer, wider groups

Groups of 4 or 8 channels fill no product of tensor cores, and ``halo`` takes none below 16. Where several groups are one, of
32 or 64 channels, their weight has blocks on its diagonal and zeros elsewhere, and nothing else changes: no activation is
copied. ``implicit_gemm`` does the same within its tiles, but reads every pixel once for each tap.

In forward and dgrad an infinity or NaN in a channel makes NaN of what the groups beside its own compute of that pixel.

Bytes by design: those of the other engine; the weight, as many times as there are groups in one, written and read once.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch

from ..problem import CHANNELS_LAST, VECTOR_BYTES, VIEW, Operands, Problem
from . import halo
from .base import READ, Memory, Work, refused_by_kernels
from .through import Moved, ThroughConfig, memory_through, offers_through, work_through

NAME = "block_diagonal"
MEASURED = ()  # architectures; it has not run on a GPU yet
_ENGINES = {halo.NAME: halo}
_MOST_CHANNELS = 16  # of a group, in or out: wider ones gain nothing
_WIDTHS = (64, 32, 16)  # channels of the wider side of groups together: as many as halo takes, and fewer zeros


@dataclass(frozen=True)
class BlockDiagonalConfig(ThroughConfig):
    """
    together: groups that are one.
    """

    together: int

    def whole(self) -> BlockDiagonalConfig:
        return super().whole().replace(together=1)

    def to_dict(self) -> dict:
        return {"together": self.together, **super().to_dict()}


def supports(problem: Problem) -> str | None:
    if reason := refused_by_kernels(problem):
        return reason
    if problem.groups == 1:
        return "one group: it is no part of others"
    wide = max(problem.group_in, problem.group_out)
    if wide > _MOST_CHANNELS:
        return f"{wide} channels in a group: more than {_MOST_CHANNELS} fill tiles by themselves"
    if wide == 1:
        return "engine depthwise takes single channels"
    if not _counts(problem):
        return f"no number of {problem.groups} groups makes one of up to {_WIDTHS[0]} channels"
    return halo.supports(merged(problem, _counts(problem)[0]))


@functools.lru_cache(maxsize=4096)
def _counts(problem: Problem) -> tuple[int, ...]:
    """Groups that may be one, the most first."""
    wide = max(problem.group_in, problem.group_out)
    counts = [count for count in range(2, problem.groups + 1) if problem.groups % count == 0]
    best = {max((count for count in counts if count * wide <= width), default=0) for width in _WIDTHS}
    return tuple(sorted(best - {0}, reverse=True))


@functools.lru_cache(maxsize=4096)
def merged(problem: Problem, together: int) -> Problem:
    """The problem of fewer groups."""
    layouts = (problem.layouts[0], CHANNELS_LAST, problem.layouts[2])
    channels = (problem.in_channels, together * problem.group_in, problem.out_channels)
    pixels = [problem.alignment if layouts[role] == VIEW else channels[role] * problem.itemsize for role in READ[problem.pass_]]
    return problem.replace(groups=problem.groups // together, layouts=layouts, alignment=math.gcd(VECTOR_BYTES, *pixels))


def configs(problem: Problem) -> tuple[BlockDiagonalConfig, ...]:
    return tuple(
        BlockDiagonalConfig(offer.engine, offer.config, together)
        for together in _counts(problem)
        for offer in offers_through(_ENGINES, merged(problem, together))
    )


def _moved(problem: Problem, together: int) -> Moved:
    """The weight's blocks."""
    copied = problem.itemsize * math.prod(merged(problem, together).weight_shape)
    return Moved(copied, 2 * copied, 1 if problem.pass_ == "wgrad" else 2)


def memory(problem: Problem, config: BlockDiagonalConfig) -> Memory:
    return memory_through(_ENGINES, merged(problem, config.together), config, _moved(problem, config.together))


def work(problem: Problem, config: BlockDiagonalConfig) -> Work:
    """The launches as the cost model sees them."""
    return work_through(_ENGINES, merged(problem, config.together), config, _moved(problem, config.together))


def launch(problem: Problem, operands: Operands, config: BlockDiagonalConfig) -> torch.Tensor:
    inner = merged(problem, config.together)
    if problem.pass_ == "wgrad":
        blocks = _blocks(problem, config.together, halo.launch(inner, operands, config.config).permute(0, 2, 3, 4, 1))
        result = problem.empty_result(blocks.device)
        result.unflatten(0, blocks.shape[:3]).copy_(blocks.permute(0, 1, 2, 6, 3, 4, 5))
        return result
    weight = operands.weight
    copy = weight.new_zeros((problem.out_channels, *problem.kernel_size, inner.group_in))
    blocks = _blocks(problem, config.together, copy)
    blocks.copy_(weight.unflatten(0, blocks.shape[:3]).permute(0, 1, 2, 4, 5, 6, 3))
    return halo.launch(inner, operands._replace(weight=copy.permute(0, 4, 1, 2, 3)), config.config)


def _blocks(problem: Problem, together: int, weight: torch.Tensor) -> torch.Tensor:
    """The diagonal of (filters, kd, kh, kw, channels): a view (wider groups, groups of each, filters, kd, kh, kw, channels)."""
    filters, channels, row = problem.group_out, problem.group_in, weight.stride(0)
    return weight.as_strided(
        (problem.groups // together, together, filters, *problem.kernel_size, channels),
        (together * filters * row, filters * row + channels, row, *weight.stride()[1:]),
    )
