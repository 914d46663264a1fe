"""The configurations of the kernel by parity classes, line_dgrad.py, and which of them a problem can take."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

from ...problem import Problem
from .. import tma
from ..base import Config, Order, Work
from ..implicit_gemm.configs import shared_limit
from ..tma.configs import BrickConfig
from ..tma.geometry import Brick, pixels
from .classes import shifts, shifts_of, sizes
from .line_configs import BARRIERS, FLAT_LINES, LINE, WARPS, line_of, spacing

__all__ = ["LineDgradConfig", "axes", "class_configs", "class_work", "first_cells"]

_CHANNELS = (128, 64, 32, 16)  # of a tile
_SUMS = 256  # channels and classes, and lines, of one consumer, in 128 registers of a thread
_LINES = 2  # of one consumer, at most
_MOST_TILES = 4  # of channels, each of which reads the gradient
_FILTERS = (64, 32, 16)  # of a step
_PIXELS = 128  # filters and lines of a tile: two lines of 64 filters a consumer spill 18, with Triton 3.6.0
_STEPS = 4  # whose lines there is room for
_FEW_STEPS = 2  # of a block of filters: the taps of the next one are to arrive meanwhile


@dataclass(frozen=True)
class LineDgradConfig(Config):
    """Of line_dgrad.py.

    line_n, line_d, line_w: cells of a line, :data:`LINE` in all.
    lines: of a tile, along H.
    block_n, block_k: channels of a tile, and filters of a step.
    num_stages: steps whose lines are there. w_stages: blocks of filters whose taps are.
    """

    line_n: int
    line_d: int
    line_w: int
    lines: int
    block_n: int
    block_k: int
    num_stages: int
    w_stages: int = 1

    @property
    def line(self) -> Brick:
        """Along n, d, h, w."""
        return self.line_n, self.line_d, 1, self.line_w

    @property
    def brick(self) -> BrickConfig:
        """What brick a line would be."""
        return BrickConfig(*self.line, self.block_n, self.block_k, WARPS, self.num_stages)

    def halo(self, problem: Problem) -> int:
        """Lines that a step reads."""
        _, _, shifts_h = _classes(axes(problem))
        return self.lines + shifts_h - 1

    def tiles(self, problem: Problem) -> Brick:
        """Along n, d, h, w."""
        n, d, h, w = (-(-size // by) for size, by in zip(pixels(problem), self.line, strict=True))
        return n, d, -(-h // self.lines), w

    def tiles_n(self, problem: Problem) -> int:
        """Along the channels."""
        return -(-problem.group_in // self.block_n)

    def stays(self, problem: Problem) -> bool:
        """Whether all tiles have the same taps."""
        return problem.groups == 1 and self.tiles_n(problem) == 1 and problem.group_out <= self.block_k


def axes(problem: Problem) -> tuple[tuple[int, int, int], ...]:
    """AXES of classes.py."""
    sides = zip(problem.kernel_size, problem.stride, problem.padding[::2], strict=True)
    return tuple((taps, stride, pad % stride) for taps, stride, pad in sides)


@functools.lru_cache(maxsize=4096)
def _classes(every: tuple[tuple[int, int, int], ...]) -> tuple[int, int, int]:
    """(parity classes, steps of a block of filters, shifts along H)."""
    _, classes, steps = sizes(every)
    return classes, steps, shifts_of(every, 1)


def first_cells(problem: Problem) -> tuple[int, ...]:
    """(d, h, w): what the first cell reads at the first shift."""
    sides = zip(axes(problem), problem.stride, problem.padding[::2], strict=True)
    return tuple(shifts(axis)[0] + pad // stride for axis, stride, pad in sides)


def class_configs(problem: Problem) -> list[LineDgradConfig]:
    """Of dgrad with a stride, where the sums of all classes fit into registers, and the taps into shared memory."""
    if problem.pass_ != "dgrad" or problem.stride == (1, 1, 1) or spacing(problem) != (1, 1, 1):
        return []
    classes, steps, _ = _classes(axes(problem))
    channels = range(-(-problem.group_in // _MOST_TILES), _SUMS // classes + 1)
    fits = [n for n in _CHANNELS if n in channels]
    if not fits:
        return []
    block_n = min(fits, key=lambda n: (-(-problem.group_in // n) * n, -n))
    lines = WARPS // 4 * min(_SUMS // (block_n * classes), _LINES)
    n, d, _, w = line_of(problem, FLAT_LINES)
    for block_k in _FILTERS:
        config = LineDgradConfig(n, d, w, lines, block_n, block_k, _STEPS)
        step, taps, turned = _bytes(problem, config)
        free = shared_limit(problem) - BARRIERS - turned - taps
        if free < _STEPS * step or lines * block_k > _PIXELS or problem.groups > 1 and problem.group_out % block_k:
            continue
        if block_k > _FILTERS[-1] and block_k >= 2 * problem.group_out:  # most of it would be nothing
            continue
        if steps <= _FEW_STEPS and not config.stays(problem) and free - taps >= _STEPS * step:
            config = config.replace(w_stages=2)
        return [config]
    return []


def _bytes(problem: Problem, config: LineDgradConfig) -> tuple[int, int, int]:
    """Shared memory of the lines of a step, of the taps of a block of filters, and of what turns the sums round."""
    taps = problem.taps * config.block_n * config.block_k
    return 2 * config.halo(problem) * LINE * config.block_k, 2 * taps, 4 * 2 * LINE * config.block_n


def class_work(problem: Problem, config: LineDgradConfig) -> Work:
    """The launch as the cost model sees it: a step is a shift along D and one along W."""
    item, n, k = problem.itemsize, config.block_n, config.block_k
    classes, steps, _ = _classes(axes(problem))
    lines, taps = config.halo(problem) / config.lines, problem.taps / steps
    rows, again = config.lines * LINE, 0.0 if config.stays(problem) else taps  # times that taps are read
    tiles, columns = math.prod(config.tiles(problem)) * problem.groups, config.tiles_n(problem)
    read, filters = item * lines * rows * k, item * again * n * k
    step, held, turned = _bytes(problem, config)
    return Work(
        programs=tiles * columns,
        iterations=-(-problem.group_out // k) * steps,
        flops=2.0 * rows * taps * n * k,
        bytes_read=read + filters,
        bytes_written=float(item * rows * classes * n),
        num_warps=WARPS,
        shared_bytes=config.num_stages * step + config.w_stages * held + turned,
        extra_bytes=2.0 * tma.memory(problem, config.brick).copies,
        stages=config.num_stages,
        # Every pixel comes from memory once, and from L2 for each step, and with the halo of each tile.
        order=Order(tiles, columns, 1, read, filters, lines * steps),
        product=(rows, n),
        tiles=(lines, again),
        in_registers=True,
    )
