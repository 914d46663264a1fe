"""The configurations of the ring kernels, by bricks, by im2col copies or by lines, and which of them a problem can take."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass

from ...problem import Problem, live_depth
from .. import tma
from ..base import CHAIN, Config, Work
from ..implicit_gemm.configs import split_counts
from ..tma.configs import BrickConfig, _fits, best_steps, extent
from ..tma.geometry import MOST_VIEWS, Brick, best_first, bricks, counts, covered, pixels, views_along
from .class_configs import LineDgradConfig, class_configs
from .line_configs import WARPS, LineConfig, LineWgradConfig, line_configs, line_wgrad_configs

__all__ = ["BrickConfig", "Im2colConfig", "by_lines", "configs", "corners", "im2col_tiles", "im2col_work", "one_chain"]

_MOST_TILES = 3  # of those that fit, the largest, are offered
_MOST_SPLITS = 2  # of each of them: the whole, and the fewest parts that fill a GPU

# (pixels, block_n, block_k, num_warps, num_stages), the smallest last. As in engines/tma/configs.py, with num_stages the
# stages of the ring: up to 8, as many as fit into shared memory beside what turns the results round.
_GATHER = (
    (256, 128, 64, WARPS, 4),
    (256, 128, 32, WARPS, 8),
    (128, 256, 64, WARPS, 4),
    (128, 128, 64, WARPS, 6),
    (256, 64, 64, WARPS, 4),
    (128, 64, 64, WARPS, 8),
    (256, 64, 32, WARPS, 8),
    (128, 64, 16, WARPS, 8),
)
_WGRAD = (
    (64, 256, 128, WARPS, 4),
    (64, 128, 128, WARPS, 6),
    (64, 64, 128, WARPS, 8),
    (64, 128, 64, WARPS, 8),
    (64, 64, 64, WARPS, 8),
    (64, 32, 64, WARPS, 8),
    (64, 16, 64, WARPS, 8),
)
_WIDE_WGRAD, _NARROWEST = _WGRAD[:2], 64
# Every shape is a kernel to compile. So the best of these, which layers share, takes the place of the brick that covers least
# where it covers hardly more: of the 16-bit layers of perf/workloads in 304 of 330 tiles of 128 and 256 pixels, and 78 of 81 of
# 64, which together cover less than 0.5 % more.
_SHARED = {
    64: ((1, 1, 8, 8), (1, 4, 4, 4), (4, 2, 2, 4)),
    128: ((1, 1, 8, 16), (1, 4, 4, 8), (2, 4, 4, 4)),
    256: ((1, 1, 16, 16), (1, 4, 8, 8), (4, 4, 4, 4)),
}
_FLAT, _SHORT_STEP = _SHARED[256][0], 32
_WASTE = 1.1  # times the pixels of the best brick
_WASTE_SHORT = 1.4  # the same with the shortest steps, of which sixteen variants have room for few
_WALKED = 0.95  # times the pixels and taps that bricks walk, at most, where im2col copies are offered
# Of a descriptor of five dimensions in im2col mode (cuTensorMapEncodeIm2col; PTX ISA, "im2col mode"):
_CORNERS = range(-16, 16)
_MOST_OFFSET = 31
_MOST_STEP = 8  # from one element to the next
_PIXELS = 2**31  # that a kernel counts
_TOTALS = 128 * 128  # sums of a tile that leave registers for a second set of them, the total of several chains


@dataclass(frozen=True)
class Im2colConfig(Config):
    """Of gather.py, with a row of pixels for a tile.

    pixels: of a tile, a power of two.
    block_n, block_k, num_stages, splits: as of bricks.
    """

    pixels: int
    block_n: int
    block_k: int
    num_stages: int
    splits: int = 1

    @property
    def brick(self) -> BrickConfig:
        """A brick of as many pixels, and of the same views: those of a stride along depth."""
        return BrickConfig(1, self.pixels, 1, 1, self.block_n, self.block_k, WARPS, self.num_stages, self.splits)


def one_chain(problem: Problem, config: BrickConfig) -> bool:
    """Whether every split of a wgrad is short enough for one accumulator."""
    steps = -(-math.prod(counts(problem, config.brick)) // config.splits)
    return steps * math.prod(config.brick) <= CHAIN


def _holds(problem: Problem, config: BrickConfig) -> bool:
    """Whether its sums fit into registers."""
    wide = problem.pass_ == "wgrad" and config.block_n * config.block_k > _TOTALS
    return not wide or one_chain(problem, config)


def corners(problem: Problem) -> tuple[tuple[int, int], tuple[int, int]]:
    """(lower, upper), each along h and w: what the lowest tap of the first pixel reads, from the first element of the
    tensor on, and of the last pixel, from the last element on. For forward, and dgrad of stride 1."""
    lower, upper = [], []
    dgrad = problem.pass_ == "dgrad"
    for axis in (1, 2):
        pad, reach = problem.padding[2 * axis], (problem.kernel_size[axis] - 1) * problem.dilation[axis]
        size = (problem.output_size if dgrad else problem.input_size)[axis]
        lower.append(pad - reach if dgrad else -pad)
        upper.append(lower[-1] + (problem.result_shape[2 + axis] - 1) * problem.stride[axis] - (size - 1))
    return tuple(lower), tuple(upper)


def im2col_tiles(problem: Problem, size: int) -> int:
    """Tiles of so many pixels of the result, the last of which may have fewer."""
    return -(-math.prod(pixels(problem)) // size)


def _im2col_fits(problem: Problem) -> bool:
    """Whether this Triton has the copies, and their descriptors reach what every tap reads."""
    from .gluon import IM2COL  # takes long to import

    if not IM2COL or problem.pass_ == "wgrad" or problem.pass_ == "dgrad" and problem.stride != (1, 1, 1):
        return False
    offsets = ((k - 1) * by for k, by in zip(problem.kernel_size[1:], problem.dilation[1:], strict=True))
    return (
        all(corner in _CORNERS for side in corners(problem) for corner in side)
        and max(offsets) <= _MOST_OFFSET
        and max(problem.stride[1:]) <= _MOST_STEP
        and views_along(problem, (1, 2, 1, 1))[0] <= MOST_VIEWS
        and math.prod(pixels(problem)) < _PIXELS - _GATHER[0][0]
    )


def _im2col_live(problem: Problem, size: int) -> float:
    """Share of the taps along depth that a tile walks, on average."""
    samples, _, height, width = pixels(problem)
    return live_depth(problem, size, samples * height * width)


def _im2col_configs(problem: Problem, tiles: list[tuple[int, ...]]) -> Iterator[Im2colConfig]:
    """Of these tiles, those that walk clearly fewer pixels and taps than the best brick of any."""
    if not tiles or not _im2col_fits(problem):
        return

    def by_bricks(size: int) -> float:
        brick = bricks(problem, size)[0]
        return covered(problem, brick) * live_depth(problem, brick[1])

    most = _WALKED * min(by_bricks(size) for size, *_ in tiles)
    for size, block_n, block_k, _, stages in tiles:
        if im2col_tiles(problem, size) * size * _im2col_live(problem, size) <= most:
            whole = Im2colConfig(size, block_n, block_k, stages)
            splits = split_counts(problem, *_im2col_extent(problem, whole))
            yield from (whole.replace(splits=number) for number in splits[:_MOST_SPLITS])


def _im2col_extent(problem: Problem, config: Im2colConfig) -> tuple[int, int]:
    """(tiles, steps of one of them), as of bricks."""
    tiles, steps = extent(problem, config.brick)
    by_bricks = math.prod(counts(problem, config.brick.brick))
    return tiles // by_bricks * im2col_tiles(problem, config.pixels), steps


def im2col_work(problem: Problem, config: Im2colConfig) -> Work:
    """The launch as the cost model sees it: as of bricks, but for the number of tiles and of taps along depth."""
    work = tma.work(problem, config.brick)
    tiles, steps = _im2col_extent(problem, config)
    work.programs = tiles * config.splits
    work.iterations = math.ceil(math.ceil(steps * _im2col_live(problem, config.pixels)) / config.splits)
    work.order.rows = max(1, tiles // work.order.columns)
    return work


def _brick(problem: Problem, size: int, block_k: int) -> Brick:
    """The best brick of so many pixels, or of those that layers share if it covers hardly more.

    The large tile with short steps, which few layers take, is flat wherever that covers hardly more.

    In forward it may not need more views either: what finds the places of eight of them spills, with Triton 3.6.0, in some
    bricks of 128 pixels.
    """
    best = bricks(problem, size)[0]
    waste, views = _WASTE_SHORT if block_k == 16 else _WASTE, MOST_VIEWS if problem.pass_ == "wgrad" else _views(problem, best)
    most = waste * covered(problem, best)
    flat_first = [_FLAT] if (size, block_k) == (math.prod(_FLAT), _SHORT_STEP) else []
    shared = (*best_first(problem, flat_first), *best_first(problem, _SHARED[size]))
    return next((b for b in shared if covered(problem, b) <= most and _views(problem, b) <= views), best)


def _views(problem: Problem, brick: Brick) -> int:
    return math.prod(views_along(problem, brick))


def by_lines(problem: Problem) -> list[LineConfig | LineDgradConfig | LineWgradConfig]:
    """Those of :func:`configs` that go by lines, the most promising first."""
    return line_configs(problem) + class_configs(problem) + line_wgrad_configs(problem)


def configs(problem: Problem) -> tuple[BrickConfig | Im2colConfig | LineConfig | LineDgradConfig | LineWgradConfig, ...]:
    """Every configuration that this problem can take, lines first, the smallest last."""
    base = _WGRAD if problem.pass_ == "wgrad" else _GATHER
    lines = by_lines(problem)
    tiles = [tile for tile in base if _fits(problem, tile)]
    tiles = (tiles if problem.pass_ == "wgrad" else best_steps(problem, tiles))[:_MOST_TILES]
    if problem.pass_ == "wgrad" and lines:  # which read less than bricks of narrow tiles
        tiles = [tile for tile in tiles if tile in _WIDE_WGRAD]
    size, *tile = base[-1]
    few = min(_SHARED[size], key=functools.partial(_views, problem))
    few = few if _views(problem, few) <= MOST_VIEWS else bricks(problem, size)[0]
    smallest = BrickConfig(*few, *tile)
    offers = []
    for size, *tile in tiles:
        narrow = tile[0] < _NARROWEST  # slow whatever its brick, so it shares one
        whole = BrickConfig(*(few if narrow else _brick(problem, size, tile[1])), *tile)
        split = (whole.replace(splits=splits) for splits in split_counts(problem, *extent(problem, whole)))
        offers += [config for config in split if _holds(problem, config)][:_MOST_SPLITS]
    offers += _im2col_configs(problem, tiles)
    return (*lines, *(offer for offer in offers if offer != smallest), smallest)
