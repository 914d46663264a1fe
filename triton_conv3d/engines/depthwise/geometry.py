"""How strips of a depthwise problem are laid out on lanes, tiles and programs under a config."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ...problem import Problem, Triple
from .strips import ROWS, Strip, axes, block_of_taps

if TYPE_CHECKING:
    from .configs import DepthwiseConfig

_SECTORS = 64  # bytes that memory moves at least: two sectors
_ISSUED = 128  # instructions of threads that a multiprocessor starts in a cycle
_CACHE_BYTES = 24  # that a multiprocessor reads from L2 in a cycle: about 5.5 TB/s of an H100
_STEPS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 128)  # strips along a side of a tile, of forward and dgrad


@dataclass(frozen=True)
class Plan:
    """What a launch needs, and the cost model: lanes, tiles and parts of one problem under one config.

    tile: (channels, strips along H, along W) of one program. tiles: of them. strips: along (H, W).
    instructions: of a thread for one output (in wgrad: for one pixel of the gradient) and channel.
    read_bytes: that a program reads beyond its own L1 for one plane of the result: its tile with the halo around it.
    chunk: planes of the result (of wgrad: of the gradient) that one program computes at a time. chunks: of them.
    classes: parity classes of a strided dgrad, along (D, H).
    block: taps of one program of wgrad, along (D, H, W). blocks: of them. share: of its chunks that one split adds up.
    """

    lanes: int
    tile: Triple
    tiles: Triple
    strips: tuple[int, int]
    instructions: float
    read_bytes: float
    chunk: int
    chunks: int = 1
    classes: tuple[int, int] = (1, 1)
    block: Triple = (1, 1, 1)
    blocks: Triple = (1, 1, 1)
    share: int = 1

    def parts(self, splits: int) -> tuple[int, int, int]:
        """(chunk, chunks, share) of this plan, of a config without splits, with so many."""
        chunk = -(-self.chunk // min(-(-splits // self.share), self.chunk))
        chunks = -(-self.chunk // chunk)
        return chunk, chunks, -(-self.share * chunks // splits)


def unsplit(config: DepthwiseConfig) -> DepthwiseConfig:
    """What all splits of a config have in common: looked up by it, they are worked out once."""
    return config if config.splits == 1 else config.replace(splits=1)


def plan(problem: Problem, config: DepthwiseConfig) -> Plan:
    whole = whole_plan(problem, unsplit(config))
    chunk, chunks, share = whole.parts(config.splits)
    return replace(whole, chunk=chunk, chunks=chunks, share=share)


@functools.lru_cache(maxsize=4096)
def whole_plan(problem: Problem, config: DepthwiseConfig) -> Plan:
    """Of a config without splits."""
    at, classes = axes(problem), (1, 1)
    lanes = config.vector * config.num_warps * (64 if problem.arch.startswith("gfx") else 32)
    depth, height, width = at.size
    if at.dgrad and config.kernel == ROWS:
        classes = problem.stride[:2]
        depth, height = -(-depth // classes[0]), -(-height // classes[1])
    strips = (-(-height // config.rows), -(-width // config.columns))
    issued = Strip(problem, config.kernel, config.rows, config.columns).instructions(config.vector)
    tile, read = _tile(problem, config, lanes, strips, issued)
    tiles = tuple(-(-size // part) for size, part in zip((at.channels, *strips), tile, strict=True))
    if not at.wgrad:
        return Plan(lanes, tile, tiles, strips, issued, read, depth, classes=classes)
    block, blocks = block_of_taps(problem, config.vector)
    share = problem.batch * tiles[1] * tiles[2]
    return Plan(lanes, tile, tiles, strips, issued, read, depth, block=block, blocks=blocks, share=share)


def _tile(
    problem: Problem, config: DepthwiseConfig, lanes: int, strips: tuple[int, int], issued: float
) -> tuple[Triple, float]:
    """The tile of the fewest cycles per plane, and :attr:`Plan.read_bytes` of it."""
    at = axes(problem)
    if at.wgrad:  # sums over the lanes of a channel: powers of two
        powers = [1 << i for i in range(lanes.bit_length())]
        fitting = [[size for size in powers if size < 2 * most] for most in strips]
        most = 2 * max(at.channels, at.unit)
        search = functools.partial(_fewest_cycles, problem, config, lanes, strips, issued)
        return search(*fitting, lambda lanes: lanes if lanes < most else 0) or search(powers, powers, lambda lanes: lanes)

    def channels(lanes: int) -> int:
        """No more than the number of tiles needs."""
        share = -(-at.channels // -(-at.channels // (lanes // at.unit * at.unit)))
        return -(-share // at.unit) * at.unit

    steps = sorted({*_STEPS, *strips})
    sides = ([size for size in steps if size <= most] for most in strips)
    return _fewest_cycles(problem, config, lanes, strips, issued, *sides, channels)


def _fewest_cycles(
    problem: Problem,
    config: DepthwiseConfig,
    lanes: int,
    strips: tuple[int, int],
    issued: float,
    highs: Sequence[int],
    wides: Sequence[int],
    channels_of: Callable[[int], int],
) -> tuple[Triple, float] | None:
    """:func:`_tile` among these sizes along H and W, and the channels that so many lanes beside each other take.

    Cycles are those of instructions, idle lanes included, and of reads from L2 with halos.
    """
    at, item = axes(problem), problem.itemsize
    unit, last, planes = at.unit, at.last, at.planes
    issue = issued * config.rows * config.columns * lanes / _ISSUED
    rows, above = _reach(config.rows, at.height, at.dgrad)
    columns, beside = _reach(config.columns, at.width, at.dgrad)
    if config.kernel == ROWS:
        planes *= at.taps[0] ** 0.5  # they pass through L1 again, where they may no longer be
    blocks, grads = 0, lanes * config.rows * config.columns * item  # of wgrad, which reads both again for each of them
    if at.wgrad:
        blocks = math.prod(block_of_taps(problem, config.vector)[1])
    across = [(wide, -(-strips[1] // wide), wide * columns + beside) for wide in wides]
    held: dict[int, tuple[int, int, int]] = {}  # by lanes along channels: these, the tiles along them, bytes of a pixel
    least, best = math.inf, None
    for high in highs:
        down, height = -(-strips[0] // high), high * rows + above
        for wide, tiles, width in across:
            along = lanes // (high * wide)
            if along < unit:
                break
            if along not in held:
                channels = channels_of(along)
                held[along] = channels, channels and -(-at.channels // channels), max(channels * item, _SECTORS)
            channels, layers, pixel = held[along]
            if not channels:
                continue
            if last:
                read = height * width * pixel * planes
            else:
                read = height * channels * (width * item + _SECTORS) * planes
            if blocks:
                read = blocks * (read + grads)
            cycles = layers * down * tiles * (issue + read / _CACHE_BYTES)
            if cycles < least or (cycles == least and channels > best[0][0]):
                least, best = cycles, ((channels, high, wide), read)
    return best


def _reach(outputs: int, axis: tuple[int, int, int, int], dgrad: bool) -> tuple[float, float]:
    """(input positions from a strip of so many outputs to the next, those that a row of strips reads beyond)."""
    kernel, stride, dilation, _ = axis
    halo = (kernel - 1) * dilation
    return (outputs / stride, halo / stride) if dgrad else (outputs * stride, max(halo - stride + 1, 0))
