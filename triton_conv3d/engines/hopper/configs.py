"""The configurations of the ring kernels, by bricks, by im2col copies or by lines, and which of them a problem can take."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass

from ...problem import Problem, live_depth
from .. import tma
from ..base import Config, Order, Work
from ..implicit_gemm.configs import CHAIN, split_counts
from ..tma.configs import SHARED_BYTES, BrickConfig, _fits, best_steps, extent, produced, reduced
from ..tma.geometry import MOST_VIEWS, Brick, best_first, bricks, counts, covered, pixels, views_along

__all__ = ["BrickConfig", "Im2colConfig", "LineConfig", "configs", "corners", "im2col_tiles", "one_chain", "spacing"]

_WARPS = 8  # that multiply: two warpgroups. One more produces.
_MOST_TILES = 3  # of those that fit, the largest, are offered
_MOST_SPLITS = 2  # of each of them: the whole, and the fewest parts that fill a GPU

# (pixels, block_n, block_k, num_warps, num_stages), the smallest last. As in engines/tma/configs.py, with num_stages the
# stages of the ring: up to 8, as many as fit into shared memory beside what turns the results round.
_GATHER = (
    (256, 128, 64, _WARPS, 4),
    (256, 128, 32, _WARPS, 8),
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
# Every shape is a kernel to compile. So the best of these, which layers share, takes the place of the brick that covers least
# where it covers hardly more: of the 16-bit layers of perf/workloads in 304 of 330 tiles of 128 and 256 pixels, and 78 of 81 of
# 64, which together cover less than 0.5 % more.
_SHARED = {
    64: ((1, 4, 4, 4), (1, 1, 8, 8), (4, 2, 2, 4)),
    128: ((1, 4, 4, 8), (1, 1, 8, 16), (2, 4, 4, 4)),
    256: ((1, 4, 8, 8), (1, 1, 16, 16), (4, 4, 4, 4)),
}
_FLAT, _SHORT_STEP = _SHARED[256][1], 32
_WASTE = 1.1  # times the pixels of the best brick
_WASTE_SHORT = 1.4  # the same with the shortest steps, of which sixteen variants have room for few
_WALKED = 0.95  # times the pixels and taps that bricks walk, at most, where im2col copies are offered
# Of a descriptor of five dimensions in im2col mode (cuTensorMapEncodeIm2col; PTX ISA, "im2col mode"):
_CORNERS = range(-16, 16)
_MOST_OFFSET = 31
_MOST_STEP = 8  # from one element to the next
_PIXELS = 2**31  # that a kernel counts
LINE = 64  # pixels of a line
_NARROW = 64  # channels up to which a tile by lines computes all of a group
_CHANNELS, _CHUNK = 48, 32  # of a line: all of them up to so many, else so many at a time
_LINES = ((4, 4), (2, 4))  # (planes, lines) of a tile, the fewest loads a line first
_FEW_LINES = ((2, 2),)  # where none of these fits
_TILES_N = (128, 96, 80, 64)  # channels of a tile, where there are more
MOST_PARTS = 2  # powers of two that channels of a tile are the sum of
_SUMS = 512  # channels of all lines of a tile: each warpgroup has half of their sums, in 128 registers of a thread
_LONG = ("gelu", "tanh")  # activations that have half the registers for sums, or Triton 3.9.0 spills
W_STAGES = 2  # steps whose taps are there
_MOST_PLANES = 8  # of the ring
_BARRIERS = 1024  # bytes, and what the alignment of buffers takes
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
        return BrickConfig(1, self.pixels, 1, 1, self.block_n, self.block_k, _WARPS, self.num_stages, self.splits)


@dataclass(frozen=True)
class LineConfig(Config):
    """Of lines.py.

    planes, lines: of a tile, lines of :data:`LINE` pixels.
    block_n, block_k: channels that are computed, and of a line: sums of at most :data:`MOST_PARTS` powers of two.
    num_stages: planes of the ring, each with the lines above and below that the taps along H reach.
    """

    planes: int
    lines: int
    block_n: int
    block_k: int
    num_stages: int

    @property
    def parts(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Of ``block_n`` and of ``block_k``, powers of two, the largest first."""
        return _parts(self.block_n), _parts(self.block_k)

    @property
    def brick(self) -> BrickConfig:
        """What brick this tile would be."""
        return BrickConfig(1, self.planes, self.lines, LINE, self.block_n, self.block_k, _WARPS, self.num_stages)

    def halo(self, problem: Problem) -> tuple[int, int]:
        """(planes, lines of a plane) that a tile reads for a tap along W."""
        return self.planes + problem.kernel_size[0] - 1, self.lines + problem.kernel_size[1] - 1

    def tiles(self, problem: Problem) -> Brick:
        """Along n, d, h, w. The lines of a tile are those of a step of the dilation, as often as there are lines."""
        n, d, h, w = pixels(problem)
        by_d, by_h, _ = spacing(problem)
        d, h = by_d * -(-d // (by_d * self.planes)), by_h * -(-h // (by_h * self.lines))
        return n, d, h, -(-w // LINE)

    def tiles_n(self, problem: Problem) -> int:
        """Along the channels that are computed."""
        return -(-produced(problem) // self.block_n)


def _parts(channels: int) -> tuple[int, ...]:
    """The powers of two that they are the sum of, the largest first."""
    return tuple(1 << bit for bit in reversed(range(channels.bit_length())) if channels >> bit & 1)


def spacing(problem: Problem) -> Brick:
    """From a line of a tile to the next, and from a tap to the next: the dilation, where there is more than one tap."""
    return tuple(by if taps > 1 else 1 for by, taps in zip(problem.dilation, problem.kernel_size, strict=True))


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


def _line_channels(problem: Problem) -> tuple[int, int] | None:
    """(computed by a tile, of a line); None where lines are not offered.

    That is without taps along D or H that share them, with a stride, and where tiles of 128 channels are filled as well: then
    bricks are bound by products too.
    """
    if problem.pass_ == "wgrad" or problem.stride != (1, 1, 1) or problem.kernel_size[:2] == (1, 1):
        return None
    if any(by > size for by, size in zip(spacing(problem), pixels(problem)[1:], strict=True)):
        return None  # no two lines would meet the same
    n, k = _sixteens(produced(problem)), _sixteens(reduced(problem))
    if n > _NARROW:
        n = min(_TILES_N, key=lambda tile: -(-n // tile) * tile)
    if k > _CHANNELS:
        k = _CHUNK
    whole = problem.groups == 1 or reduced(problem) % k == 0  # else it would read another group
    return (n, k) if whole and n != _TILES_N[0] else None


def _sixteens(channels: int) -> int:
    """As many, or up to 15 more, so that they are a multiple of 16."""
    return -(-channels // 16) * 16


def _line_bytes(problem: Problem, config: LineConfig) -> tuple[int, int, int]:
    """Shared memory of a plane of the ring, of the taps of a step, and of what turns the sums of two lines round."""
    plane = config.halo(problem)[1] * LINE * config.block_k
    taps = problem.kernel_size[1] * config.block_n * config.block_k
    return 2 * plane, 2 * W_STAGES * taps, 4 * 2 * LINE * config.parts[0][0]


def _line_configs(problem: Problem) -> list[LineConfig]:
    channels = _line_channels(problem)
    if channels is None:
        return []
    return _lines_that_fit(problem, _LINES, *channels) or _lines_that_fit(problem, _FEW_LINES, *channels)


def _lines_that_fit(problem: Problem, tiles: tuple[tuple[int, int], ...], n: int, k: int) -> list[LineConfig]:
    """Tiles whose sums fit into registers, and a plane more than a step needs into shared memory."""
    found = []
    for planes, lines in tiles:
        config = LineConfig(planes, lines, n, k, 0)
        plane, taps, turned = _line_bytes(problem, config)
        stages = min((SHARED_BYTES - _BARRIERS - taps - turned) // plane, _MOST_PLANES)
        sums = planes * lines * config.block_n
        most = _SUMS // 2 if problem.activation in _LONG else _SUMS
        if sums <= most and stages > planes:
            found.append(config.replace(num_stages=stages))
    return found


def line_work(problem: Problem, config: LineConfig) -> Work:
    """The launch as the cost model sees it: a step is a tap along W and one along D."""
    item, taps = problem.itemsize, problem.kernel_size
    planes, lines = config.halo(problem)
    rows, halo = config.planes * config.lines, planes * lines
    read = item * halo * LINE * config.block_k / taps[0]
    filters = item * taps[1] * config.block_n * config.block_k
    tiles, columns = math.prod(config.tiles(problem)) * problem.groups, config.tiles_n(problem)
    live = live_depth(problem, config.planes) if problem.dilation[0] == 1 else 1.0
    return Work(
        programs=tiles * columns,
        iterations=math.ceil(-(-reduced(problem) // config.block_k) * taps[0] * taps[2] * live),
        flops=2.0 * rows * LINE * taps[1] * config.block_n * config.block_k,
        bytes_read=read + filters,
        bytes_written=float(item * rows * LINE * config.block_n),
        num_warps=_WARPS,
        shared_bytes=sum(b * n for b, n in zip(_line_bytes(problem, config), (config.num_stages, 1, 1), strict=True)),
        extra_bytes=2.0 * tma.memory(problem, config.brick).copies,
        stages=1 + config.num_stages - config.planes,
        # Every pixel comes from memory once, and from L2 for each tap along W, and with the halo of each tile.
        order=Order(tiles, columns, 1, read, float(filters), halo * taps[2] / rows),
        product=(rows * LINE, config.block_n),
        tiles=(lines / config.lines, taps[1]),
        in_registers=True,
    )


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


def configs(problem: Problem) -> tuple[BrickConfig | Im2colConfig | LineConfig, ...]:
    """Every configuration that this problem can take, lines first, the smallest last."""
    base = _WGRAD if problem.pass_ == "wgrad" else _GATHER
    tiles = [tile for tile in base if _fits(problem, tile)]
    tiles = (tiles if problem.pass_ == "wgrad" else best_steps(problem, tiles))[:_MOST_TILES]
    offers = []
    for size, *tile in tiles:
        whole = BrickConfig(*_brick(problem, size, tile[1]), *tile)
        split = (whole.replace(splits=splits) for splits in split_counts(problem, *extent(problem, whole)))
        offers += [config for config in split if _holds(problem, config)][:_MOST_SPLITS]
    offers += _im2col_configs(problem, tiles)
    size, *tile = base[-1]
    few = min(_SHARED[size], key=functools.partial(_views, problem))
    smallest = BrickConfig(*(few if _views(problem, few) <= MOST_VIEWS else bricks(problem, size)[0]), *tile)
    return (*_line_configs(problem), *(offer for offer in offers if offer != smallest), smallest)
