"""The configurations of the folded GEMM, and what its launch and its cost share: channels, parity classes and taps."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ...problem import Problem, Triple
from ..base import Config, dgrad_steps
from ..blocks import blocks_of, columns, unblocked
from ..implicit_gemm.configs import sides, split_counts, walked


@dataclass(frozen=True)
class FoldedConfig(Config):
    """
    block_m, block_n: tile of the result: pixels x channels. block_k: folded taps and channels of one step.
    num_warps, num_stages: as Triton's launch options.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int = 1


@dataclass(frozen=True)
class FoldedBlocksConfig(FoldedConfig):
    """Of a strided dgrad all parity classes in one product, and not each in its own: block_m blocks of the result
    (:mod:`..blocks`) x block_n columns of (class, channel)."""

    blocks: bool = True


@dataclass(frozen=True)
class FoldedWgradConfig(FoldedConfig):
    """
    block_m, block_n: tile of the result: folded taps and channels x filters, or folded taps and filters x channels.
    block_k: pixels of one step.
    splits: parts of the pixels that run in parallel, each with its float32 partial sums.
    """

    splits: int = 1


@dataclass(frozen=True)
class FoldedBlocksWgradConfig(FoldedWgradConfig):
    """Of a strided wgrad of few filters, these as the folded side: block_m folded taps and filters of a block of the input
    (:mod:`..blocks`) x block_n columns of (class, channel). block_k: blocks of one step."""

    blocks: bool = True


MOST_CHANNELS = 8  # of one group; from 16 on the steps of one tap's channels are full

# Of a thread, by tile: left alone, NVIDIA's compiler spills to fit one program more.
REGISTERS = {(128, 128): {"maxnreg": 255}, (128, 64): {"maxnreg": 128}}
# sm_90 has room for two programs without spills.
WGRAD_REGISTERS = {
    ("sm_80", 128, 64): {"maxnreg": 255},
    ("sm_100", 64, 64): {"maxnreg": 128},
    ("sm_100", 128, 16): {"maxnreg": 128},
}
BLOCK_WGRAD_REGISTERS = {
    (64, 128): {"maxnreg": 255},
    (32, 128): {"maxnreg": 255},
    (64, 64): {"maxnreg": 128},
    (32, 64): {"maxnreg": 128},
}


# The smallest last: it fits every GPU.
_TILES = (
    FoldedConfig(128, 128, 32, 8),
    FoldedConfig(128, 64, 32, 8),
    FoldedConfig(128, 32, 32, 4),
    FoldedConfig(128, 16, 32, 4),
    FoldedConfig(64, 64, 32, 4),
    FoldedConfig(32, 16, 16, 2),
)
_BLOCK_TILES = (
    FoldedBlocksConfig(128, 128, 32, 8),
    FoldedBlocksConfig(128, 64, 32, 8),
    FoldedBlocksConfig(128, 32, 32, 8),
    FoldedBlocksConfig(128, 16, 32, 4),
    FoldedBlocksConfig(64, 64, 32, 4),
    FoldedBlocksConfig(32, 16, 16, 2),
)
_WGRAD_TILES = (
    FoldedWgradConfig(128, 64, 32, 8),
    FoldedWgradConfig(128, 32, 32, 4),
    FoldedWgradConfig(128, 16, 32, 4),
    FoldedWgradConfig(64, 64, 32, 4),
    FoldedWgradConfig(32, 64, 64, 4),
    FoldedWgradConfig(32, 32, 64, 4),
    FoldedWgradConfig(16, 16, 32, 2),
)
_BLOCK_WGRAD_TILES = (
    FoldedBlocksWgradConfig(64, 128, 32, 8),
    FoldedBlocksWgradConfig(32, 128, 32, 8),
    FoldedBlocksWgradConfig(64, 64, 32, 8),
    FoldedBlocksWgradConfig(32, 64, 32, 8),
    FoldedBlocksWgradConfig(16, 16, 32, 2),
)


def by_blocks(config: FoldedConfig) -> bool:
    return getattr(config, "blocks", False)


def _has_blocks(problem: Problem) -> bool:
    """float32 as ``ieee`` spills by blocks, and multiplies by their zeros at the rate of FMA."""
    return unblocked(problem) is None and problem.on_tensor_cores


def wgrad_by_blocks(problem: Problem) -> bool:
    """Whether a wgrad can fold its filters, and read its input in blocks."""
    few = problem.groups == 1 and problem.out_channels <= MOST_CHANNELS
    return problem.pass_ == "wgrad" and few and _has_blocks(problem)


def classes(problem: Problem) -> int:
    """Parity classes of a dgrad: input positions of equal remainder, which meet the same taps."""
    return math.prod(problem.stride) if problem.pass_ == "dgrad" else 1


def tap_step(problem: Problem) -> Triple:
    """Taps from one that a parity class meets to the next."""
    if problem.pass_ != "dgrad":
        return (1, 1, 1)
    return dgrad_steps(problem.stride, problem.dilation)[1]


def class_taps(problem: Problem) -> Triple:
    """Taps that a class meets at most."""
    return tuple(-(-taps // step) for taps, step in zip(problem.kernel_size, tap_step(problem), strict=True))


def configs(problem: Problem) -> tuple[FoldedConfig, ...]:
    """The tiles that are not more than twice as wide as there are channels, the smallest last.

    Before them, those of blocks that are not more than twice as wide as all classes. Of a dgrad they hold two of them: with
    fewer, as much is read as class by class.
    """
    if problem.pass_ == "wgrad":
        return _wgrad_configs(problem)
    produced, _ = sides(problem)
    found = [tile for tile in _TILES if tile.block_n < 2 * max(16, produced)]
    if problem.pass_ == "dgrad" and _has_blocks(problem):
        wide = 2 * max(16, columns(problem))
        found = [tile for tile in _BLOCK_TILES if 2 * produced <= tile.block_n < wide] + found
    return tuple(found)


def _wgrad_configs(problem: Problem) -> tuple[FoldedWgradConfig, ...]:
    tiles = _BLOCK_WGRAD_TILES if wgrad_by_blocks(problem) else ()
    tiles += _WGRAD_TILES if sides(problem)[1] <= MOST_CHANNELS else ()
    *_, smallest = tiles
    offers = []
    for tile in tiles:
        rows, wide, pixels = wgrad_extent(problem, tile)
        if tile.block_n < 2 * max(16, wide) and tile.block_m < 2 * max(16, rows):
            _, *more = split_counts(problem, wgrad_tiles(problem, tile) * problem.groups, math.ceil(pixels / tile.block_k))
            offers += [tile] if tile is not smallest else []
            offers += [tile.replace(splits=splits) for splits in more]
    return (*offers, smallest)


def wgrad_extent(problem: Problem, tile: FoldedConfig) -> tuple[int, int, int]:
    """(rows, columns, reduction) of the product of one group."""
    if by_blocks(tile):
        of = blocks_of(problem)
        return math.prod(of.taps) * problem.out_channels, columns(problem), problem.batch * math.prod(of.count)
    produced, reduced = sides(problem)
    return problem.taps * reduced, produced, walked(problem)


def wgrad_tiles(problem: Problem, tile: FoldedConfig) -> int:
    """Programs of one group and split."""
    rows, wide, _ = wgrad_extent(problem, tile)
    return math.ceil(rows / tile.block_m) * math.ceil(wide / tile.block_n)


def wgrad_registers(problem: Problem, tile: FoldedConfig) -> dict:
    """What is said of registers to NVIDIA's compiler."""
    if not by_blocks(tile):
        return WGRAD_REGISTERS.get((problem.arch, tile.block_m, tile.block_n), {})
    return BLOCK_WGRAD_REGISTERS.get((tile.block_m, tile.block_n), {}) if problem.arch.startswith("sm_") else {}
