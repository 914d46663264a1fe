"""The configurations of the ring kernels, and which of them a problem can take."""

from __future__ import annotations

import math
from dataclasses import replace

from ...problem import Problem
from ..implicit_gemm.configs import CHAIN, split_counts
from ..tma.configs import BrickConfig, _fits, extent
from ..tma.geometry import bricks, counts

__all__ = ["BrickConfig", "configs", "one_chain"]

_WARPS = 8  # that multiply: two warpgroups. One more produces.
_MOST_TILES = 3  # of those that fit, the largest, are offered
_MOST_SPLITS = 2  # of each of them: the whole, and the fewest parts that fill a GPU

# (pixels, block_n, block_k, num_warps, num_stages), the smallest last. As in engines/tma/configs.py, with num_stages the
# stages of the ring: up to 8, as many as fit into shared memory beside what turns the results round.
_GATHER = (
    (256, 128, 64, _WARPS, 4),
    (128, 256, 64, _WARPS, 4),
    (128, 128, 64, _WARPS, 6),
    (256, 64, 64, _WARPS, 4),
    (128, 64, 64, _WARPS, 8),
    (256, 64, 32, _WARPS, 8),
    (128, 64, 16, _WARPS, 8),
)
_WGRAD = (
    (64, 256, 128, _WARPS, 4),
    (64, 128, 128, _WARPS, 6),
    (64, 64, 128, _WARPS, 8),
    (64, 128, 64, _WARPS, 8),
    (64, 64, 64, _WARPS, 8),
    (64, 32, 64, _WARPS, 8),
    (64, 16, 64, _WARPS, 8),
)
_TOTALS = 128 * 128  # sums of a tile that leave registers for a second set of them, the total of several chains


def one_chain(problem: Problem, config: BrickConfig) -> bool:
    """Whether every split of a wgrad is short enough for one accumulator."""
    steps = -(-math.prod(counts(problem, config.brick)) // config.splits)
    return steps * math.prod(config.brick) <= CHAIN


def _holds(problem: Problem, config: BrickConfig) -> bool:
    """Whether its sums fit into registers."""
    wide = problem.pass_ == "wgrad" and config.block_n * config.block_k > _TOTALS
    return not wide or one_chain(problem, config)


def configs(problem: Problem) -> tuple[BrickConfig, ...]:
    """Every configuration that this problem can take, the smallest last."""
    base = _WGRAD if problem.pass_ == "wgrad" else _GATHER
    tiles = [tile for tile in base if _fits(problem, tile)][:_MOST_TILES]
    offers = []
    for size, *tile in tiles:
        whole = BrickConfig(*bricks(problem, size)[0], *tile)
        split = (replace(whole, splits=splits) for splits in split_counts(problem, *extent(problem, whole)))
        offers += [config for config in split if _holds(problem, config)][:_MOST_SPLITS]
    size, *tile = base[-1]
    smallest = BrickConfig(*bricks(problem, size)[0], *tile)
    return (*(offer for offer in offers if offer != smallest), smallest)
