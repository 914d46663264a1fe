"""The configurations of the kernels by lines, lines.py and line_wgrad.py, and which of them a problem can take."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ...problem import Problem, live_depth
from .. import tma
from ..base import Config, Order, Work
from ..implicit_gemm.configs import shared_limit, split_counts
from ..tma.configs import BrickConfig, produced, reduced
from ..tma.geometry import Brick, covered, pixels

__all__ = ["LINE", "LineConfig", "LineWgradConfig", "line_configs", "line_wgrad_configs", "line_wgrad_work", "line_work"]

WARPS = 8  # that multiply: two warpgroups. One more produces.
LINE = 64  # pixels of a line
# Along n, d, h, w, those that most layers share first: of forward and dgrad, and of wgrad and dgrad with a stride.
_LINES_OF = ((2, 1, 1, 32), (1, 1, 1, 64))
FLAT_LINES = ((1, 4, 1, 16), (1, 1, 1, 64), (1, 2, 1, 32))
_WASTE = 1.1  # times the pixels of the best of them, that the first may cover
MOST_STRIDED, MOST_VIEWS_ALONG_W = 4, 2  # views of the input that the kernels of wgrad, and of forward take
MOST_PARTS = 2  # powers of two that channels of a tile are the sum of
W_STAGES = 2  # steps whose taps are there
_NARROW = 64  # channels up to which a tile by lines computes all of a group
_CHANNELS, _CHUNK = 48, 32  # of a line: all of them up to so many, else so many at a time
_LINES = ((4, 4), (2, 4))  # (planes, lines) of a tile, the fewest loads a line first
_FEW_LINES = ((2, 2),)  # where none of these fits
_TILES_N = (128, 96, 80, 64)  # channels of a tile, where there are more
_SUMS = 512  # channels of all lines of a tile: each warpgroup has half of their sums, in 128 registers of a thread
_LONG = ("gelu", "tanh")  # activations that have half the registers for sums, or Triton 3.9.0 spills
_MOST_PLANES = 8  # of the ring
BARRIERS = 1024  # bytes, and what the alignment of buffers takes

# Of wgrad:
_MOST_WASTE = 1.5  # times the pixels that there are
_HEIGHTS = (24, 40)  # lines of a column: few, so that what the next one, a plane further, reads again is still in L2
_ROWS = 128  # of a tile: each consumer has those of one matrix instruction
_SLICES, _STRIDED_SLICES = (64, 32, 16), (64, 32)  # channels of a slice
_FILTERS = (128, 96, 80, 64, 48, 32, 16)  # of a tile
_WGRAD_SUMS = 288  # filters and taps along H of a tile, in 144 registers of a thread: 320 and more spill
_MOST_TAPS = 9  # along H
_MOST_STAGES = 8  # lines of the input
_SPLITS = 2  # numbers of them that are offered: the fewest that fill a GPU


@dataclass(frozen=True)
class LineConfig(Config):
    """Of lines.py.

    planes, lines: of a tile, lines of :data:`LINE` pixels.
    block_n, block_k: channels that are computed, and of a line: sums of at most :data:`MOST_PARTS` powers of two.
    num_stages: planes of the ring, each with the lines above and below that the taps along H reach.
    samples: that a line has pixels of.
    """

    planes: int
    lines: int
    block_n: int
    block_k: int
    num_stages: int
    samples: int = 1

    @property
    def parts(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Of ``block_n`` and of ``block_k``, powers of two, the largest first."""
        return _parts(self.block_n), _parts(self.block_k)

    @property
    def line(self) -> Brick:
        """Along n, d, h, w."""
        return self.samples, 1, 1, LINE // self.samples

    @property
    def brick(self) -> BrickConfig:
        """What brick this tile would be."""
        n, _, _, w = self.line
        return BrickConfig(n, self.planes, self.lines, w, self.block_n, self.block_k, WARPS, self.num_stages)

    def halo(self, problem: Problem) -> tuple[int, int]:
        """(planes, lines of a plane) that a tile reads for a tap along W."""
        depth, height, _ = problem.kernel_size
        return self.span(problem) + depth - 1, (self.lines - 1) * problem.stride[1] + height

    def span(self, problem: Problem) -> int:
        """Planes from the first that a step multiplies to the last."""
        return (self.planes - 1) * problem.stride[0] + 1

    def tiles(self, problem: Problem) -> Brick:
        """Along n, d, h, w. The lines of a tile are those of a step of the dilation, as often as there are lines."""
        n, _, _, w = (-(-size // by) for size, by in zip(pixels(problem), self.line, strict=True))
        (_, d, h, _), (by_d, by_h, _) = pixels(problem), spacing(problem)
        d, h = by_d * -(-d // (by_d * self.planes)), by_h * -(-h // (by_h * self.lines))
        return n, d, h, w

    def tiles_n(self, problem: Problem) -> int:
        """Along the channels that are computed."""
        return -(-produced(problem) // self.block_n)


@dataclass(frozen=True)
class LineWgradConfig(Config):
    """Of line_wgrad.py.

    line_n, line_d, line_w: pixels of a line, :data:`LINE` in all.
    rows: channels of a slice.
    block_n: filters of a tile, a sum of at most :data:`MOST_PARTS` powers of two.
    num_stages: lines of the input in the ring. splits: as of bricks, of all lines of all columns.
    """

    line_n: int
    line_d: int
    line_w: int
    rows: int
    block_n: int
    num_stages: int
    splits: int = 1

    @property
    def parts(self) -> tuple[int, ...]:
        """Of ``block_n``, none above a line."""
        return (LINE,) * (self.block_n // LINE) + _parts(self.block_n % LINE)

    @property
    def line(self) -> tuple[int, int, int]:
        """Along n, d, w."""
        return self.line_n, self.line_d, self.line_w

    @property
    def brick(self) -> BrickConfig:
        """What brick a line would be."""
        n, d, w = self.line
        return BrickConfig(n, d, 1, w, self.rows, self.block_n, WARPS, self.num_stages, self.splits)

    def columns(self, problem: Problem) -> tuple[Brick, int]:
        """(columns along n, d, h, w, steps in one): along h they are those of a step of the dilation, in parts."""
        n, d, _, w = (-(-size // by) for size, by in zip(pixels(problem), self.brick.brick, strict=True))
        by, stride = spacing(problem)[1], problem.stride[1]
        lines = -(-(problem.input_size[1] + problem.padding[2] % stride) // (by * stride))
        shortest, longest = _HEIGHTS
        parts = min(range(-(-lines // longest), -(-lines // shortest) + 1), key=lambda parts: parts * -(-lines // parts))
        return (n, d, parts * by, w), -(-lines // parts)

    def steps(self, problem: Problem) -> int:
        """Of all columns."""
        columns, height = self.columns(problem)
        return math.prod(columns) * height

    def tiles(self, problem: Problem) -> tuple[int, int]:
        """(of slices, of filters), of a group."""
        depth, _, width = problem.kernel_size
        slices = depth * width * -(-problem.group_in // self.rows)
        return -(-slices * self.rows // _ROWS), -(-problem.group_out // self.block_n)


def _parts(channels: int) -> tuple[int, ...]:
    """The powers of two that they are the sum of, the largest first."""
    return tuple(1 << bit for bit in reversed(range(channels.bit_length())) if channels >> bit & 1)


def spacing(problem: Problem) -> Brick:
    """From a line of a tile to the next, and from a tap to the next: the dilation, where there is more than one tap."""
    return tuple(by if taps > 1 else 1 for by, taps in zip(problem.dilation, problem.kernel_size, strict=True))


def _line_channels(problem: Problem) -> tuple[int, int] | None:
    """(computed by a tile, of a line); None where lines are not offered.

    That is without taps along D or H that share them, with a stride in dgrad, or one that leaves out planes or lines, and where
    tiles of 128 channels are filled as well: then bricks are bound by products too.
    """
    if problem.pass_ == "wgrad" or problem.stride != (1, 1, 1) and problem.pass_ == "dgrad":
        return None
    if problem.kernel_size[:2] == (1, 1) or problem.stride[2] > min(MOST_VIEWS_ALONG_W, problem.input_size[2]):
        return None
    if any(by > taps for by, taps in zip(problem.stride[:2], problem.kernel_size[:2], strict=True)):
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


def line_of(problem: Problem, lines: Sequence[Brick]) -> Brick:
    """The first of them that covers hardly more than the best."""
    covers = [covered(problem, line) for line in lines]
    return next(line for line, pixels in zip(lines, covers, strict=True) if pixels <= _WASTE * min(covers))


def line_configs(problem: Problem) -> list[LineConfig]:
    """Of forward and dgrad, the most promising first."""
    channels = _line_channels(problem)
    if channels is None:
        return []
    return _lines_that_fit(problem, _LINES, *channels) or _lines_that_fit(problem, _FEW_LINES, *channels)


def _lines_that_fit(problem: Problem, tiles: tuple[tuple[int, int], ...], n: int, k: int) -> list[LineConfig]:
    """Tiles whose sums fit into registers, and a plane more than a step needs into shared memory."""
    found = []
    samples, *_ = line_of(problem, _LINES_OF)
    for planes, lines in tiles:
        config = LineConfig(planes, lines, n, k, 0, samples)
        plane, taps, turned = _line_bytes(problem, config)
        stages = min((shared_limit(problem) - BARRIERS - taps - turned) // plane, _MOST_PLANES)
        sums = planes * lines * config.block_n
        most = _SUMS // 2 if problem.activation in _LONG else _SUMS
        if sums <= most and stages > config.span(problem):
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
        num_warps=WARPS,
        shared_bytes=sum(b * n for b, n in zip(_line_bytes(problem, config), (config.num_stages, 1, 1), strict=True)),
        extra_bytes=2.0 * tma.memory(problem, config.brick).copies,
        stages=1 + config.num_stages - config.span(problem),
        # Every pixel comes from memory once, and from L2 for each tap along W, and with the halo of each tile.
        order=Order(tiles, columns, 1, read, float(filters), halo * taps[2] / rows / math.prod(problem.stride)),
        product=(rows * LINE, config.block_n),
        tiles=(lines / config.lines, taps[1]),
        in_registers=True,
    )


def line_wgrad_configs(problem: Problem) -> list[LineWgradConfig]:
    """Of wgrad, where taps along H share lines that fit, and there are enough of them for several splits."""
    taps, channels, filters = problem.kernel_size[1], problem.group_in, problem.group_out
    by_d, by_h, by_w = problem.stride
    if problem.pass_ != "wgrad" or not by_h < taps <= _MOST_TAPS or by_d * by_w > MOST_STRIDED:
        return []
    if any(by > size for by, size in zip(problem.stride, problem.input_size, strict=True)):  # a view of nothing
        return []
    strided = problem.stride != (1, 1, 1)
    slices = [rows for rows in (_STRIDED_SLICES if strided else _SLICES) if rows <= channels]
    if channels % _SLICES[-1] or not slices:  # written in vectors
        return []
    if spacing(problem)[1] > problem.input_size[1] or by_h > 1 and spacing(problem)[1] > 1:  # lines that none meets
        return []
    n, d, _, w = line = line_of(problem, FLAT_LINES)
    if covered(problem, line) > _MOST_WASTE * math.prod(pixels(problem)):
        return []
    fits = (f for f in _FILTERS if taps * f <= _WGRAD_SUMS)
    block_n = min(fits, key=lambda f: (-(-filters // f) * f, -f))
    sliced = (LineWgradConfig(n, d, w, rows, block_n, 0) for rows in slices)
    whole = min(sliced, key=lambda config: config.tiles(problem)[0])
    step, ahead, turned = _wgrad_bytes(problem, whole)
    whole = whole.replace(num_stages=min((shared_limit(problem) - BARRIERS - turned - ahead) // step, _MOST_STAGES))
    counts = split_counts(problem, math.prod(whole.tiles(problem)) * problem.groups, whole.steps(problem))
    return [whole.replace(splits=number) for number in counts if number > 1][:_SPLITS]


def _wgrad_bytes(problem: Problem, config: LineWgradConfig) -> tuple[int, int, int]:
    """Shared memory of a line of both, of those of the gradient for all taps, and of what turns the sums round."""
    line = 2 * LINE * config.block_n
    return 2 * LINE * _ROWS + line, problem.kernel_size[1] * line, 4 * LINE * config.parts[0]


def line_wgrad_work(problem: Problem, config: LineWgradConfig) -> Work:
    """The launch as the cost model sees it: a step is a line of the gradient, and of the input a stride of them along H."""
    line, n, taps = problem.itemsize * LINE, config.block_n, problem.kernel_size[1]
    (rows, columns), used, result = config.tiles(problem), tma.memory(problem, config.brick), problem.result_elements
    step, ahead, turned = _wgrad_bytes(problem, config)
    strides, read = math.prod(problem.stride), problem.stride[1]
    return Work(
        programs=rows * columns * problem.groups * config.splits,
        iterations=math.ceil(config.steps(problem) / config.splits),
        flops=2.0 * _ROWS * n * taps * LINE,
        bytes_read=float(line * (_ROWS * read + n)),
        bytes_written=4.0 * _ROWS * n * taps,
        num_warps=WARPS,
        shared_bytes=config.num_stages * step + ahead + turned,
        extra_bytes=2.0 * used.copies + 2.0 * used.workspace + result * problem.itemsize,
        launches=2,
        stages=max(1, config.num_stages // read),
        # Every line comes from memory once for all tiles of a split, whose taps read neighbours of the same ones.
        order=Order(rows, columns, rows, line * strides * problem.group_in / rows, float(line * n)),
        product=(_ROWS, n),
        tiles=(float(read), 1.0),
        in_registers=True,
    )
