"""Bricks and views: which pixels a program computes, and which views of a tensor its taps read.

A brick reads, for tap t, the positions o * stride + t * dilation - pad of its pixels o, all at once. A descriptor reads
neighbours only, so along a dimension in which a brick has several pixels and the stride is s, the tensor is seen as its
s views of every s-th position, and each view serves the taps that meet it, as a convolution of stride 1.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from ...problem import Problem, Triple, live_depth
from ..base import dgrad_steps

Brick = tuple[int, int, int, int]  # pixels along n, d, h, w: powers of two
MOST_VIEWS = 8  # descriptors that a kernel takes: stride 2 in all dimensions


@dataclass(frozen=True)
class View:
    """Every ``stride``-th position from ``offset`` on, and its taps: ``first + i * tap_step``, read from ``start``."""

    offset: Triple
    size: Triple
    taps: Triple
    first: Triple
    start: Triple


@dataclass(frozen=True)
class Views:
    """What pixel o reads of view v for the view's i-th tap: its position ``o * scale + v.start + i * step``."""

    views: tuple[View, ...]
    stride: Triple
    scale: Triple
    step: Triple
    tap_step: Triple


def _axis(size: int, kernel: int, stride: int, dilation: int, pad: int, pixels: int) -> tuple[tuple, list[tuple]]:
    """One dimension: ((stride, scale, step, tap_step), [(offset, size, taps, first, start) of every view])."""
    if stride == 1 or pixels == 1:
        return (1, stride, dilation, 1), [(0, size, kernel, 0, -pad)]
    common = math.gcd(stride, dilation)
    tap_step = stride // common
    views = []
    for first in range(min(kernel, tap_step)):
        start, offset = divmod(first * dilation - pad, stride)
        if offset < size:  # else its taps meet nothing but padding
            views.append((offset, -(-(size - offset) // stride), -(-(kernel - first) // tap_step), first, start))
    return (stride, 1, dilation // common, tap_step), views


def _axes(problem: Problem, brick: Brick) -> Iterator[tuple[tuple, list[tuple]]]:
    low = problem.padding[::2]
    axes = zip(problem.input_size, problem.kernel_size, problem.stride, problem.dilation, low, brick[1:], strict=True)
    return itertools.starmap(_axis, axes)


def views_along(problem: Problem, brick: Brick) -> Triple:
    """Views along d, h, w."""
    if problem.pass_ == "dgrad" or problem.stride == (1, 1, 1):
        return 1, 1, 1
    return tuple(len(found) for _, found in _axes(problem, brick))


@functools.lru_cache(maxsize=4096)
def views(problem: Problem, brick: Brick) -> Views:
    """What forward and wgrad read of the input, and dgrad of the gradient (there the kernel finds the taps itself)."""
    if problem.pass_ == "dgrad":
        step, tap_step = dgrad_steps(problem.stride, problem.dilation)
        low, ones = problem.padding[::2], (1, 1, 1)
        whole = View((0, 0, 0), problem.output_size, problem.kernel_size, (0, 0, 0), low)
        return Views((whole,), ones, ones, step, tap_step)
    common, found = zip(*_axes(problem, brick), strict=True)
    each = [View(*zip(*axis_views, strict=True)) for axis_views in itertools.product(*found)]
    return Views(tuple(each), *zip(*common, strict=True))


@functools.lru_cache(maxsize=4096)
def pixels(problem: Problem) -> Brick:
    """(n, d, h, w) of what bricks cover: the result, the largest parity class of a dgrad; of wgrad the gradient."""
    if problem.pass_ != "dgrad":
        return (problem.batch, *problem.output_size)
    return (problem.batch, *(-(-size // s) for size, s in zip(problem.input_size, problem.stride, strict=True)))


def counts(problem: Problem, brick: Brick) -> Brick:
    """Bricks along n, d, h, w."""
    return tuple(-(-size // extent) for size, extent in zip(pixels(problem), brick, strict=True))


@functools.lru_cache(maxsize=4096)
def bricks(problem: Problem, size: int) -> tuple[Brick, ...]:
    """The bricks of ``size`` pixels that this problem can take, the best first."""
    powers = [1 << log for log in range(size.bit_length())]

    def below(most: Iterable[float]) -> Iterator[Brick]:
        """Those whose sides are less than this along n, d, h, w."""
        *sides, width = ([extent for extent in powers if extent < limit] for limit in most)
        return ((*b, size // math.prod(b)) for b in itertools.product(*sides) if size // math.prod(b) in width)

    return best_first(problem, below(2 * n for n in pixels(problem))) or best_first(problem, below([math.inf] * 4))


def best_first(problem: Problem, shapes: Iterable[Brick]) -> tuple[Brick, ...]:
    """Of these bricks, those that need no more views than a kernel takes.

    The best have the fewest pixels times taps that they walk (to a sixteenth), those beyond the end too; then they need the
    fewest views, then touch the smallest part of the input.
    """
    sizes, found = pixels(problem), []
    everything = math.prod(sizes)
    needed, scale = (1, *views_along(problem, (2, 2, 2, 2))), (1, *problem.stride)
    halo = (0, *(by * (taps - 1) for by, taps in zip(problem.dilation, problem.kernel_size, strict=True)))

    @functools.cache
    def side(axis: int, extent: int) -> tuple[float, int, int]:
        """(pixels that bricks cover along it, by the share of taps that they walk; views; input positions of one brick)."""
        covers = -(-sizes[axis] // extent) * extent
        if axis == 1 and problem.pass_ != "wgrad":
            covers *= live_depth(problem, extent)
        return covers, needed[axis] if extent > 1 else 1, extent * scale[axis] + halo[axis]

    for brick in shapes:
        n, d, h, w = map(side, range(4), brick)
        covers, number, reach = (n[i] * d[i] * h[i] * w[i] for i in range(3))
        if number <= MOST_VIEWS:
            found.append((round(16 * covers / everything), number, reach, brick))
    return tuple(brick for *_, brick in sorted(found))


def flat(problem: Problem, brick: Brick) -> bool:
    """Whether the pixels of every brick are neighbours in memory, one brick after the other: of a dense gradient, a brick
    is then so many rows of the matrix of pixels and channels."""
    sizes = pixels(problem)
    for axis in (3, 2, 1, 0):
        if brick[axis] != sizes[axis]:
            break
    return math.prod(brick[:axis]) == 1 and (sizes[axis] % brick[axis] == 0 or math.prod(sizes[:axis]) == 1)


def covered(problem: Problem, brick: Brick) -> int:
    """Pixels of all bricks together, those beyond the end too."""
    return math.prod(counts(problem, brick)) * math.prod(brick)
