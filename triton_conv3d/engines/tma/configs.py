"""The configurations of the brick kernels, and which of them a problem can take."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

from ...problem import VIEW, Problem
from ..base import Config
from ..implicit_gemm.configs import gelu_spills, split_counts, walks_less
from .geometry import Brick, best_first, bricks, counts, covered, flat, pixels

_ROWS = 64  # of one matrix instruction, of the left operand
_WASTE = 1.25  # times the pixels of the best brick, that a row may cover


@dataclass(frozen=True)
class BrickConfig(Config):
    """
    brick_n, brick_d, brick_h, brick_w: pixels of a tile; of wgrad those of one step of the reduction.
    block_n: channels of a tile that are computed; of wgrad those of the input.
    block_k: channels of one step of the reduction; of wgrad the filters of a tile.
    num_warps, num_stages: as Triton's launch options.
    splits: parts of the reduction that run in parallel, each with its float32 partial sums.
    """

    brick_n: int
    brick_d: int
    brick_h: int
    brick_w: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    splits: int = 1

    @property
    def brick(self) -> Brick:
        return self.brick_n, self.brick_d, self.brick_h, self.brick_w


# (pixels, block_n, block_k, num_warps, num_stages), the smallest last. Filters or channels of the left operand fill the
# 64 rows of a matrix instruction for each four warps; pixels, or channels of the input, are its columns. A step waits,
# copies and walks on in some 80 instructions, whatever it multiplies: perf/machine_code.py counts them.
_GATHER = (
    (256, 128, 128, 8, 2),
    (256, 128, 64, 8, 4),
    (256, 128, 32, 8, 8),
    (128, 128, 64, 4, 3),
    (128, 128, 32, 4, 6),
    (256, 64, 64, 4, 4),
    (256, 64, 32, 4, 4),
    (64, 64, 64, 4, 5),
    (64, 64, 16, 4, 4),
)
_WGRAD = (
    (128, 128, 128, 8, 3),
    (128, 64, 64, 4, 3),
)
# (block_n, block_k, num_warps, num_stages) that with partial sums needs more registers than a thread has, from Triton 3.9.0
# on; and whose products wait for one another, with Triton 3.6.0 (C7515 of ptxas).
_POOR_SPLIT = {"sm_100": ((128, 64, 4, 3), (128, 32, 4, 6)), "sm_90": ((128, 64, 8, 4), (128, 32, 8, 8))}

# Which brick a tile has is no choice of the tuner's, for every shape is a kernel to compile. These few cover all layers of
# perf/workloads and what is drawn at random by some 10 % more pixels than the best of all shapes would.
_BRICKS = {
    64: ((1, 1, 8, 8), (1, 4, 4, 4), (4, 2, 2, 4)),
    128: ((1, 2, 8, 8), (2, 4, 4, 4)),
    256: ((1, 1, 16, 16), (1, 4, 8, 8)),
}
# Of wgrad; most are flat where the gradient's width is a power of two.
WGRAD_BRICKS = {128: ((1, 1, 1, 128), (1, 1, 2, 64), (1, 1, 4, 32), (1, 1, 8, 16), (1, 2, 8, 8), (2, 4, 4, 4))}


def reduced(problem: Problem) -> int:
    """Channels of one group that forward and dgrad sum over."""
    return problem.group_in if problem.pass_ == "forward" else problem.group_out


def produced(problem: Problem) -> int:
    """Channels of one group that forward and dgrad compute, and of the input in wgrad."""
    return problem.group_out if problem.pass_ == "forward" else problem.group_in


def _fits(problem: Problem, tile: tuple[int, ...]) -> bool:
    """No side is more than twice what the problem needs, but for the 64 rows of a matrix instruction."""
    size, block_n, block_k, _, _ = tile
    wgrad = problem.pass_ == "wgrad"
    if size >= 2 * max(math.prod(pixels(problem)), 128 if wgrad else 64):
        return False
    if wgrad:
        return block_n < 2 * max(problem.group_in, 16) and block_k < 2 * max(problem.group_out, _ROWS)
    divides = reduced(problem) % block_k == 0
    whole = divides or (problem.groups == 1 and block_k <= 64)  # of another group, a step would read its channels
    return whole and block_n < 2 * max(produced(problem), 64) and block_k < 2 * max(reduced(problem), 16)


def _tiles(problem: Problem) -> list[tuple[int, ...]]:
    """Those that fit, or the smallest.

    Of those that differ in the length of a step, a shorter one only where it walks clearly fewer channels, and of the
    smallest tile only the longest, for its steps take more time than its products.
    """
    if problem.pass_ == "wgrad":
        return [tile for tile in _WGRAD if _fits(problem, tile)] or [_WGRAD[-1]]
    return best_steps(problem, [tile for tile in _GATHER if _fits(problem, tile)], _GATHER[-1][0])


def best_steps(problem: Problem, tiles: list[tuple[int, ...]], smallest: int = 0) -> list[tuple[int, ...]]:
    """Of tiles that differ in nothing but steps and stages, a shorter step only where it walks clearly fewer channels.

    Args:
        smallest: of tiles of so many pixels, only the longest step.
    """
    found, before = [], {}
    for tile in tiles:
        size, block_n, block_k, warps, _ = tile
        longer = before.get((size, block_n, warps))
        if longer is None or size != smallest and walks_less(reduced(problem), block_k, longer):
            found.append(tile)
            before[size, block_n, warps] = block_k
    return found


def _interpreter_tile(problem: Problem) -> tuple[int, ...]:
    """As large as the problem takes: the interpreter's time goes with the number of steps, hardly with their size."""

    def power(size: int, most: int) -> int:
        return 1 << max(4, (min(size, most) - 1).bit_length())

    volume = math.prod(1 << (size - 1).bit_length() for size in pixels(problem))
    if problem.pass_ == "wgrad":
        return power(volume, 128), power(problem.group_in, 64), power(problem.group_out, 64), 1, 1
    channels = power(reduced(problem), 32)
    channels = channels if problem.groups == 1 else math.gcd(channels, reduced(problem))
    return power(volume, 1024), power(produced(problem), 64), channels, 1, 1


@functools.lru_cache(maxsize=4096)
def brick_of(problem: Problem, size: int) -> Brick:
    """The brick of so many pixels: of those above, or where strides leave none of them, the best of all.

    In wgrad on sm_90 one whose gradient reaches the left side of products from shared memory, a row or what is flat,
    unless it covers much more.
    """
    found = best_first(problem, (WGRAD_BRICKS if problem.pass_ == "wgrad" else _BRICKS).get(size, ()))
    found = found or bricks(problem, size)
    if problem.pass_ == "wgrad" and problem.arch == "sm_90":
        most = _WASTE * covered(problem, found[0])
        shared = (b for b in found if left_is_shared(problem, b))
        return next((brick for brick in shared if covered(problem, brick) <= most), found[0])
    return found[0]


def spills(problem: Problem, config: BrickConfig) -> bool:
    """Whether the config is known to keep registers in memory, or products waiting, and so is not offered."""
    if gelu_spills(problem, math.prod(config.brick) * config.block_n / (32 * config.num_warps), config.splits):
        return True
    tile = (config.block_n, config.block_k, config.num_warps, config.num_stages)
    return config.splits > 1 and problem.pass_ != "wgrad" and tile in _POOR_SPLIT.get(problem.arch, ())


def left_is_shared(problem: Problem, brick: Brick) -> bool:
    """Whether on sm_90 the gradient is on the left side of wgrad's products in shared memory, and not in registers."""
    return brick[:3] == (1, 1, 1) or _is_matrix(problem, brick)


def _is_matrix(problem: Problem, brick: Brick) -> bool:
    return problem.layouts[2] != VIEW and flat(problem, brick)


def is_flat(problem: Problem, config: BrickConfig) -> bool:
    """Whether wgrad reads the gradient as a matrix: on sm_90 only that, or a row, reaches a product's left side from
    shared memory."""
    return _is_matrix(problem, config.brick)


def extent(problem: Problem, config: BrickConfig) -> tuple[int, int]:
    """(tiles, steps of one of them): programs and their loops before anything is split."""
    found = math.prod(counts(problem, config.brick))
    tiles_n = math.ceil(produced(problem) / config.block_n)
    if problem.pass_ == "wgrad":
        return math.ceil(problem.group_out / config.block_k) * tiles_n * problem.taps * problem.groups, found
    classes = math.prod(problem.stride) if problem.pass_ == "dgrad" else 1  # they share the taps evenly
    blocks = math.ceil(reduced(problem) / config.block_k)
    return found * tiles_n * problem.groups * classes, math.ceil(problem.taps * blocks / classes)


def configs(problem: Problem) -> tuple[BrickConfig, ...]:
    """Every configuration that this problem can take, the smallest last. All splits above 1 share a compiled kernel."""
    tiles = _tiles(problem)
    size, *tile = tiles[-1]
    smallest = BrickConfig(*brick_of(problem, size), *tile)
    if problem.arch == "interpreter":
        tiles.insert(0, _interpreter_tile(problem))
    offers = []
    for size, *tile in tiles:
        whole = BrickConfig(*brick_of(problem, size), *tile)
        split = [whole.replace(splits=n) for n in split_counts(problem, *extent(problem, whole)) if n > 1]
        offers += [config for config in (whole, *split) if not spills(problem, config)]
    return (*(offer for offer in offers if offer != smallest), smallest)
