"""The configurations of the engine that folds taps into the produced channels, and how they cut a problem into tiles."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

from ...problem import Problem, Triple
from ..base import Config
from ..halo.configs import MOST_TENSOR_MEMORY, four_planes_spill, more_stages
from ..implicit_gemm.configs import channels, shared_limit


@dataclass(frozen=True)
class Kn2rowConfig(Config):
    """
    block_w: pixels of a line of x, those around the result's included.
    planes: of the result, one behind the other along D, that a program has.
    lines: of the result, that a program marches down.
    block_k: channels of one step of the reduction.
    num_warps, num_stages: as Triton's launch options.
    """

    block_w: int
    planes: int
    lines: int
    block_k: int
    num_warps: int
    num_stages: int

    def whole(self) -> Kn2rowConfig:
        """The lines are a run-time value, as splits are of other engines."""
        return self.replace(lines=1)


# (block_w, planes, block_k, num_warps, num_stages), the smallest last: it fits every GPU. Four planes are for one or two
# produced channels, whose sums leave registers for them.
_TILES_16 = (
    (128, 4, 32, 8, 2),
    (128, 2, 32, 8, 3),
    (64, 4, 32, 4, 3),
    (64, 2, 32, 4, 3),
    (64, 1, 32, 4, 4),
    (32, 1, 16, 2, 2),
)
_TILES_32 = (
    (128, 2, 16, 8, 3),
    (64, 2, 16, 4, 3),
    (64, 1, 16, 4, 3),
    (32, 1, 16, 4, 2),
)
_PROGRAMS = (128, 256, 512, 1024)  # that lines are shared out for: one to several waves of 108 to 304 units
_LEAST_LINES = 8  # of a program: for 3 taps it reads and multiplies 2 more
_LEAST_COLUMNS = 16  # of a product of tensor cores
_MOST_SUMS = 96  # of a thread: with 192 sm_80 and sm_90 spill, as perf/machine_code.py finds
_MOST_READ_32 = 4  # planes of float32, that stand in registers to be rounded: for 2 of the result 6 spill, in parts 4


def _power(n: int) -> int:
    """The least power of 2 that is not below n."""
    return 1 << (n - 1).bit_length()


@functools.lru_cache(maxsize=1024)
def padded(problem: Problem) -> Triple:
    """Columns of a line's product: (taps of H, taps of W, produced channels), each as a power of 2."""
    taps_h, taps_w, produced = (_power(n) for n in (*problem.kernel_size[1:], channels(problem)[0]))
    return taps_h, taps_w, max(produced, _LEAST_COLUMNS // (taps_h * taps_w))


def halo(problem: Problem) -> int:
    """Pixels of its line that a pixel of the result reads beside the first of them."""
    return (problem.kernel_size[2] - 1) * problem.dilation[2]


def read_size(problem: Problem) -> Triple:
    """(D, H, W) of what is read."""
    return problem.output_size if problem.pass_ == "dgrad" else problem.input_size


def low_padding(problem: Problem) -> Triple:
    """Zeros before each dimension of what is read; below 0: positions there that the result does not begin with."""
    low = problem.padding[::2]
    if problem.pass_ == "forward":
        return low
    return tuple((k - 1) * d - pad for k, d, pad in zip(problem.kernel_size, problem.dilation, low, strict=True))


@dataclass(frozen=True)
class Line:
    """The rows that a line of x is cut into. Zeros around x are rows only where a pixel of the result needs more of them
    than there are others to read: beyond the rows everything is zero.

    first: pixel of x in the first row. rows: at least as many as pixels in a line of the result.
    before: rows from that of a pixel of the result back to the first that it reads.
    """

    first: int
    rows: int
    before: int


@functools.lru_cache(maxsize=1024)
def line(problem: Problem) -> Line:
    low, reach, result = low_padding(problem)[2], halo(problem), problem.result_shape[4]
    before = min(max(low, 0), reach)
    high = result + reach - low - read_size(problem)[2]  # zeros behind x
    behind = min(max(high, 0), reach - before)
    return Line(before - low, result + reach - before - behind, before)


@functools.lru_cache(maxsize=1024)
def classes(problem: Problem) -> tuple[int, int]:
    """Remainders modulo the dilations of D and H: positions of one remainder read each other's planes and lines."""
    return tuple(min(d, size) for d, size in zip(problem.dilation[:2], problem.result_shape[2:4], strict=True))


def _parts(size: int, length: int, step: int, of: int) -> int:
    """Of one dimension, of so many positions each, step apart, in so many classes."""
    return -(-size // (length * step)) * of


def tiles(problem: Problem, config: Kn2rowConfig) -> Triple:
    """(D, H, W): tiles of one sample."""
    (_, _, depth, height, _), (step_d, step_h, _), (of_d, of_h) = problem.result_shape, problem.dilation, classes(problem)
    more = max(0, line(problem).rows - config.block_w)
    return (
        _parts(depth, config.planes, step_d, of_d),
        _parts(height, config.lines, step_h, of_h),
        1 - (-more // (config.block_w - halo(problem))),
    )


def step_bytes(problem: Problem, config: Kn2rowConfig) -> int:
    """Bytes of one stage: a line of every plane that is read, and the weights of its channels."""
    depth = problem.kernel_size[0]
    rows = config.block_w * (config.planes + depth - 1) + math.prod(padded(problem)) * depth
    return problem.itemsize * config.block_k * rows


def sums(problem: Problem, config: Kn2rowConfig) -> int:
    """float32 sums of a program: of one line and all its taps of H and W, and of the lines of the result it has begun."""
    taps_h, taps_w, produced = padded(problem)
    return config.planes * config.block_w * (taps_h + problem.kernel_size[1] - 1) * taps_w * produced


def shared_bytes(problem: Problem, config: Kn2rowConfig) -> int:
    """Of one program, as perf/machine_code.py finds: its stages, and a line's sums as they change their layout.

    On sm_100 and AMD the sums of all taps change their layout, elsewhere those of one tap of H.
    """
    taps_h, taps_w, produced = padded(problem)
    stages = config.num_stages + more_stages(problem)
    together = taps_h if problem.arch == "sm_100" or problem.arch.startswith("gfx") else 1
    columns = max(together * taps_w * produced, _LEAST_COLUMNS)
    return step_bytes(problem, config) * stages + 4 * config.block_w * columns


def _fits(problem: Problem, tile: Kn2rowConfig) -> bool:
    """Not more than twice as large as the problem, and with registers and memory enough."""
    read = tile.planes + problem.kernel_size[0] - 1
    several = problem.dtype != "float32" or (problem.precision == "tf32" and read <= _MOST_READ_32)
    return (
        2 * halo(problem) <= tile.block_w < 2 * line(problem).rows
        and tile.planes < 2 * problem.result_shape[2]
        and (several or tile.planes == 1)
        and not four_planes_spill(problem, tile.planes)
        and sums(problem, tile) <= _MOST_SUMS * 32 * tile.num_warps
        and shared_bytes(problem, tile) <= shared_limit(problem)
        and (problem.arch != "sm_100" or _compiles_for_sm_100(problem, tile))
    )


def _compiles_for_sm_100(problem: Problem, tile: Kn2rowConfig) -> bool:
    """Of 8 warps Triton 3.6 makes an empty kernel there, too."""
    products = tile.planes * problem.kernel_size[0]
    return products * math.prod(padded(problem)) <= MOST_TENSOR_MEMORY and tile.num_warps < 8


def _lines(problem: Problem, tile: Kn2rowConfig) -> list[int]:
    """Lines of a program, for each number of programs that is wanted."""
    height = -(-problem.result_shape[3] // problem.dilation[1])
    columns = math.prod(tiles(problem, tile.replace(lines=height))) * problem.batch
    shares = (max(1, programs // columns) for programs in _PROGRAMS)
    return list(dict.fromkeys(max(-(-height // parts), min(_LEAST_LINES, height)) for parts in shares))


def _tile(problem: Problem, width: int, planes: int, block_k: int, warps: int, stages: int) -> Kn2rowConfig:
    """A row of the table, with steps not longer than the reduction. Its lines are still to be chosen."""
    block_k = min(block_k, _power(channels(problem)[1]))
    if problem.arch.startswith("gfx"):  # two stages are its software pipeline, and its warps have 64 threads
        warps, stages = 1 if width < 64 else warps, 2
    return Kn2rowConfig(width, planes, 1, block_k, warps, stages)


@functools.lru_cache(maxsize=1024)
def configs(problem: Problem) -> tuple[Kn2rowConfig, ...]:
    """The tiles that suit, each with as many lines as share the work out in several ways; and the smallest."""
    rows = _TILES_32 if problem.dtype == "float32" else _TILES_16
    *suiting, smallest = (_tile(problem, *row) for row in rows)
    suiting = [tile for tile in suiting if _fits(problem, tile)]
    offers = [tile.replace(lines=lines) for tile in suiting for lines in _lines(problem, tile)]
    return (*offers, smallest.replace(lines=_lines(problem, smallest)[-1]))
