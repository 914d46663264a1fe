"""How a depthwise problem is laid out on lanes, tiles and programs under a config, and what that costs by design."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ...problem import CONTIGUOUS, VECTOR_BYTES, VIEW, Problem, Triple, met_taps
from . import axes as _axes

if TYPE_CHECKING:
    from .configs import DepthwiseConfig

SLIDE, ROWS = "slide", "rows"  # the kernels of forward and dgrad; wgrad always slides
_ROW_TAPS = 8  # that the kernel "rows" holds at one time
_TAP_REGISTERS = 112  # of a thread, that the sums of wgrad may take
_MOST_PLANES = 8  # of the gradient, that are open at one time in wgrad
_SECTORS = 64  # bytes that memory moves at least: two sectors

# Instructions of a thread, fitted to the SASS of sm_90 (Triton 3.6 and 3.9) within a tenth or so.
_LOAD = 3.0  # a load with its address and its mask,
_ZERO = 0.6  # and for every register that it fills
_STORE = 3.0
_STEP = 40.0  # of the loop over planes itself
_TAP_LOAD, _TAP_STEP = 2.0, 20.0  # the same in the loop over rows of taps
_WEIGHT = 2.5  # a vector of weights there
_ISSUED = 128  # instructions of threads that a multiprocessor starts in a cycle
_CACHE_BYTES = 24  # that a multiprocessor reads from L2 in a cycle: about 5.5 TB/s of an H100


# Triton's compile-time functions look at each argument before they run: too slow for what is asked thousands of times.
positions, ring_size, strip_step = (
    functools.lru_cache(maxsize=65536)(function) for function in (_axes.positions, _axes.ring_size, _axes.strip_step)
)


@dataclass(frozen=True)
class Plan:
    """What a launch needs, and the cost model: lanes, tiles and parts of one problem under one config.

    tile: (channels, strips along H, along W) of one program. tiles: of them. strips: along (H, W).
    chunk: planes of the result (of wgrad: of the gradient) that one program computes at a time. chunks: of them.
    classes: parity classes of a strided dgrad, along (D, H).
    block: taps of one program of wgrad, along (D, H, W). blocks: of them. share: of its chunks that one split adds up.
    """

    lanes: int
    tile: Triple
    tiles: Triple
    strips: tuple[int, int]
    chunk: int
    chunks: int
    classes: tuple[int, int] = (1, 1)
    block: Triple = (1, 1, 1)
    blocks: Triple = (1, 1, 1)
    share: int = 1


@dataclass(frozen=True)
class Axes:
    """The three dimensions as :mod:`.axes` takes them."""

    depth: Triple
    height: tuple[int, int, int, int]
    width: tuple[int, int, int, int]


@functools.lru_cache(maxsize=4096)
def axes(problem: Problem) -> Axes:
    met, stride, dilation = met_taps(problem), problem.stride, problem.dilation
    depth = (met.kernel[0], stride[0], dilation[0])
    height, width = ((met.kernel[i], stride[i], dilation[i], met.pad[i]) for i in (1, 2))
    return Axes(depth, height, width)


def parts_of_row(problem: Problem) -> tuple[int, int, int]:
    """(taps of one part, parts, input columns from part to part) of a row of taps in the kernel "rows".

    In dgrad a part has to lead to whole steps of the gradient.
    """
    taps, stride, dilation = axes(problem).width[:3]
    unit = stride // math.gcd(stride, dilation) if problem.pass_ == "dgrad" else 1
    part = min(taps, max(_ROW_TAPS // unit, 1) * unit)
    columns = part * dilation
    return part, taps // part, -columns // stride if problem.pass_ == "dgrad" else columns


def produced(problem: Problem) -> tuple[int, Triple]:
    """(channels, size) of what lanes run over: the result, in wgrad the gradient."""
    if problem.pass_ == "dgrad":
        return problem.in_channels, problem.input_size
    return problem.out_channels, problem.output_size


def read_layout(problem: Problem) -> str:
    """Layout of the operand in whose order lanes run: the input, in dgrad the gradient."""
    return problem.layouts[2 if problem.pass_ == "dgrad" else 0]


def channels_dense(layout: str, channels: int) -> bool:
    """Whether an operand is read with its channels as the fastest dimension. A single channel is read along W."""
    return layout == VIEW or (layout != CONTIGUOUS and channels > 1)


def lanes_last(problem: Problem) -> bool:
    channels = problem.out_channels if problem.pass_ == "dgrad" else problem.in_channels
    return channels_dense(read_layout(problem), channels)


def channel_unit(problem: Problem) -> int:
    """Channels that lanes take together, as one vector."""
    return math.gcd(VECTOR_BYTES // problem.itemsize, produced(problem)[0]) if lanes_last(problem) else 1


@functools.lru_cache(maxsize=4096)
def block_of_taps(problem: Problem, config: DepthwiseConfig) -> Triple:
    """Taps of one program of wgrad: whole rows of taps before planes of them, as many as registers hold."""
    (depth, height, width), most = met_taps(problem).kernel, max(1, _TAP_REGISTERS // config.vector)
    columns = min(width, most)
    rows = min(height, max(1, most // columns))
    ring = ring_size(axes(problem).depth, False)
    whole = depth * height * width <= most and ring <= _MOST_PLANES
    return depth if whole else 1, -(-height // -(-height // rows)), -(-width // -(-width // columns))


def _powers(most: int) -> list[int]:
    return [1 << i for i in range(most.bit_length())]


@functools.lru_cache(maxsize=4096)
def plan(problem: Problem, config: DepthwiseConfig) -> Plan:
    wgrad, dgrad = problem.pass_ == "wgrad", problem.pass_ == "dgrad"
    lanes = config.vector * config.num_warps * (64 if problem.arch.startswith("gfx") else 32)
    channels, (depth, height, width) = produced(problem)
    classes = (1, 1)
    if dgrad and config.kernel == ROWS:
        classes = problem.stride[:2]
        depth, height = -(-depth // classes[0]), -(-height // classes[1])
    strips = (-(-height // config.rows), -(-width // config.columns))
    tile = _tile(problem, unsplit(config), lanes, strips)
    tiles = tuple(-(-size // part) for size, part in zip((channels, *strips), tile, strict=True))
    if not wgrad:
        chunk = -(-depth // min(config.splits, depth))
        return Plan(lanes, tile, tiles, strips, chunk, -(-depth // chunk), classes)
    block = block_of_taps(problem, config)
    blocks = tuple(-(-taps // part) for taps, part in zip(met_taps(problem).kernel, block, strict=True))
    columns = problem.batch * tiles[1] * tiles[2]  # of units of work, before the depth is shared out
    chunk = -(-depth // min(max(1, -(-config.splits // columns)), depth))
    chunks = -(-depth // chunk)
    share = -(-columns * chunks // config.splits)
    return Plan(lanes, tile, tiles, strips, chunk, chunks, classes, block, blocks, share)


def unsplit(config: DepthwiseConfig) -> DepthwiseConfig:
    """What all splits of a config have in common: looked up by it, they are worked out once."""
    return config if config.splits == 1 else replace(config, splits=1)


@functools.lru_cache(maxsize=4096)
def _tile(problem: Problem, config: DepthwiseConfig, lanes: int, strips: tuple[int, int]) -> Triple:
    """The tile of the fewest cycles per plane: of instructions, idle lanes included, and of reads from L2 with halos."""
    channels, unit = produced(problem)[0], channel_unit(problem)
    read_bytes = _reader(problem, config)
    issue = instructions(problem, config) * config.rows * config.columns * lanes / _ISSUED

    def cycles(tile: Triple) -> tuple[float, int]:
        tiles = -(-channels // tile[0]) * -(-strips[0] // tile[1]) * -(-strips[1] // tile[2])
        return tiles * (issue + read_bytes(tile) / _CACHE_BYTES), -tile[0]

    if problem.pass_ == "wgrad":  # sums over the lanes of a channel: powers of two
        sides = [(h, w) for h in _powers(lanes) for w in _powers(lanes // h)]
        tiles = [(lanes // (h * w), h, w) for h, w in sides if h < 2 * strips[0] and w < 2 * strips[1]]
        tiles = [tile for tile in tiles if tile[0] < 2 * max(channels, unit) and tile[0] % unit == 0]
        tiles = tiles or [(lanes // (h * w), h, w) for h, w in sides if (lanes // (h * w)) % unit == 0]
    else:
        steps = sorted({1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 128, *strips})
        tiles = []
        high, wide = [[step for step in steps if step <= min(most, lanes)] for most in strips]
        for h, w in itertools.product(high, wide):
            most = lanes // (h * w) // unit * unit
            if most:
                share = -(-channels // -(-channels // most))  # no more than needed for that number of tiles
                tiles.append((-(-share // unit) * unit, h, w))
    return min(tiles, key=cycles)


def _spread(problem: Problem, config: DepthwiseConfig) -> tuple[int, int]:
    """Input rows and columns that one strip loads."""
    at, dgrad = axes(problem), problem.pass_ == "dgrad"
    rows = len(positions(config.rows, at.height, dgrad)) if config.kernel == SLIDE else 1
    return rows, len(positions(config.columns, at.width, dgrad))


def _planes(problem: Problem) -> float:
    """Input planes for one plane of the result."""
    return 1 / problem.stride[0] if problem.pass_ == "dgrad" else problem.stride[0]


def _vectors(problem: Problem, config: DepthwiseConfig) -> tuple[float, int]:
    """(loads, registers that one fills) of a lane for one row of a strip's inputs; loads are shared by a thread's lanes."""
    at, dgrad = axes(problem).width, problem.pass_ == "dgrad"
    columns = positions(config.columns, at, dgrad)
    if lanes_last(problem):
        vector = min(config.vector, channel_unit(problem))
        return len(columns) / vector, -(-vector * problem.itemsize // 4)
    size = (problem.output_size if dgrad else problem.input_size)[2]
    group = math.gcd(VECTOR_BYTES // problem.itemsize, size, strip_step(config.columns, at, dgrad))
    return len({column // group for column in columns}), -(-group * problem.itemsize // 4)


@functools.lru_cache(maxsize=4096)
def instructions(problem: Problem, config: DepthwiseConfig) -> float:
    """Instructions of a thread for one output (in wgrad: for one pixel of the gradient) and channel."""
    met, half = met_taps(problem), problem.itemsize == 2
    taps = met.count / (math.prod(problem.stride) if problem.pass_ == "dgrad" else 1)
    outputs = config.rows * config.columns
    rows, columns = _spread(problem, config)
    loads, words = _vectors(problem, config)
    total = taps + half / 2 + _STORE / min(config.vector, channel_unit(problem))
    if config.kernel == ROWS:
        repeats = taps * (problem.stride[2] if problem.pass_ == "dgrad" else 1) / met.kernel[2]  # rows of taps
        row = columns * half + loads * (_TAP_LOAD + _ZERO * words) + met.kernel[2] * _WEIGHT / min(config.vector, 4)
        return total + repeats * (row / outputs + _TAP_STEP / (outputs * config.vector))
    plane = rows * (columns * half + loads * (_LOAD + _ZERO * words)) * _planes(problem) / outputs
    repeats = 1
    if problem.pass_ == "wgrad":
        repeats = math.prod(-(-k // b) for k, b in zip(met.kernel, block_of_taps(problem, config), strict=True))
        plane += half + loads / columns * (_LOAD + _ZERO * words)
    return total + repeats * (plane + _STEP / (outputs * config.vector))


@functools.lru_cache(maxsize=65536)
def read_bytes(problem: Problem, config: DepthwiseConfig, tile: Triple) -> float:
    """Bytes that a program reads beyond its own L1 for one plane of the result: its tile with the halo around it."""
    return _reader(problem, config)(tile)


def _reader(problem: Problem, config: DepthwiseConfig) -> Callable[[Triple], float]:
    """:func:`read_bytes` of this problem and config, for many tiles."""
    at, dgrad, item = axes(problem), problem.pass_ == "dgrad", problem.itemsize
    sides = []
    for outputs, axis in ((config.rows, at.height), (config.columns, at.width)):
        halo = (axis[0] - 1) * axis[2]
        if dgrad:
            sides.append((outputs / axis[1], halo / axis[1]))
        else:
            sides.append((outputs * axis[1], max(halo - axis[1] + 1, 0)))
    (rows, above), (columns, beside) = sides
    last, planes, blocks = lanes_last(problem), _planes(problem), 0
    if config.kernel == ROWS:
        planes *= met_taps(problem).kernel[0] ** 0.5  # they pass through L1 again, where they may no longer be
    if problem.pass_ == "wgrad":
        taps = zip(met_taps(problem).kernel, block_of_taps(problem, config), strict=True)
        blocks = math.prod(-(-k // b) for k, b in taps)

    def read(tile: Triple) -> float:
        height, width = tile[1] * rows + above, tile[2] * columns + beside
        if last:
            pixels = height * width * max(tile[0] * item, _SECTORS) * planes
        else:
            pixels = height * tile[0] * (width * item + _SECTORS) * planes
        if blocks:
            pixels = blocks * (pixels + math.prod(tile) * config.rows * config.columns * item)
        return pixels

    return read


def registers(problem: Problem, config: DepthwiseConfig) -> float:
    """Registers of a thread for weights, accumulators and inputs."""
    at, wgrad, dgrad = axes(problem), problem.pass_ == "wgrad", problem.pass_ == "dgrad"
    outputs = config.rows * config.columns
    rows, columns = _spread(problem, config)
    if config.kernel == ROWS:
        return config.vector * (outputs + parts_of_row(problem)[0] + columns)
    loaded = rows * columns * problem.itemsize / 4 * max(1, _planes(problem))
    if not wgrad:
        return config.vector * (met_taps(problem).count + ring_size(at.depth, dgrad) * outputs + loaded)
    block = block_of_taps(problem, config)
    ring = ring_size((block[0], *at.depth[1:]), False)
    return config.vector * (math.prod(block) + ring * outputs + loaded)
