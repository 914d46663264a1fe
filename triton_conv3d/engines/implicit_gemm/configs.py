"""The configurations of the implicit GEMM, and which of them a problem can take."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

from ...problem import VECTOR_BYTES, Problem, live_depth
from ..base import WORKSPACE_LIMIT, Config

GROUP_M = 8  # rows of tiles that run together, sharing operands in L2 (Triton's matmul tutorial)
_SPLIT_PROGRAMS = (128, 256, 512, 1024)  # programs that a split aims at: one to several waves of 108 to 304 units

# Shared memory of one block in bytes, from the vendors' documentation; others get the least of them.
SHARED_BYTES = {
    "sm_80": 166_912,
    "sm_86": 101_376,
    "sm_89": 101_376,
    "sm_90": 232_448,
    "sm_100": 232_448,
    "sm_120": 101_376,
    "gfx942": 65_536,
    "interpreter": 232_448,
}
_LEAST_SHARED_BYTES = min(SHARED_BYTES.values())


@dataclass(frozen=True)
class GemmConfig(Config):
    """
    block_m, block_n: tile of the result: pixels x channels; for wgrad filters x (taps, channels), or channels x (taps,
        filters), see :func:`exchanged`.
    block_k: length of one step of the reduction.
    num_warps, num_stages: as Triton's launch options.
    splits: parts of the reduction that run in parallel, each with its float32 partial sums.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    splits: int = 1


def _tiles(*rows: tuple[int, ...]) -> tuple[GemmConfig, ...]:
    return tuple(GemmConfig(*row) for row in rows)


# (block_m, block_n, block_k, num_warps, num_stages), the smallest last: it fits every GPU.
_GATHER_16 = _tiles(
    (128, 256, 64, 8, 3),
    (256, 128, 64, 8, 3),
    (128, 128, 64, 8, 4),
    (128, 128, 64, 4, 3),
    (128, 256, 32, 8, 6),
    (256, 128, 32, 8, 6),
    (128, 128, 32, 8, 5),
    (128, 128, 32, 4, 5),
    (256, 64, 64, 8, 4),
    (128, 64, 64, 4, 4),
    (64, 128, 64, 4, 4),
    (64, 64, 64, 4, 5),
    (256, 32, 32, 4, 4),
    (128, 32, 64, 4, 4),
    (128, 64, 32, 4, 5),
    (128, 16, 64, 4, 4),
    (64, 32, 32, 4, 4),
    (256, 32, 16, 4, 4),
    (256, 16, 16, 4, 4),
    (32, 16, 16, 2, 2),
)
_GATHER_32 = _tiles(
    (128, 128, 32, 8, 3),
    (128, 64, 32, 4, 3),
    (64, 64, 32, 4, 3),
    (128, 32, 32, 4, 3),
    (64, 32, 16, 4, 3),
    (128, 16, 16, 4, 3),
    (32, 16, 16, 2, 2),
)
_GATHER_ROUNDED = _tiles(  # of operands that hold tf32: products read them in shared memory
    (128, 256, 32, 8, 4),
    (256, 128, 32, 8, 4),
    (128, 128, 32, 8, 4),
    (128, 64, 32, 8, 4),
    (64, 64, 32, 4, 4),
)
_GATHER_FMA = _tiles((128, 64, 16, 8, 3), (64, 64, 16, 8, 3), (64, 32, 16, 4, 2), (32, 16, 16, 2, 2))
_WGRAD_16 = _tiles(
    (128, 128, 64, 8, 3),
    (128, 64, 64, 8, 4),
    (64, 128, 64, 8, 4),
    (64, 64, 64, 4, 4),
    (32, 128, 64, 4, 4),
    (32, 64, 64, 4, 4),
    (16, 128, 64, 4, 4),
    (16, 64, 64, 4, 4),
    (32, 32, 32, 2, 3),
    (16, 16, 32, 2, 2),
)
_WGRAD_32 = _tiles((64, 128, 32, 8, 3), (64, 64, 32, 4, 3), (32, 64, 32, 4, 3), (16, 64, 16, 4, 3), (16, 16, 16, 2, 2))
_WGRAD_FMA = _tiles((64, 64, 16, 8, 2), (32, 64, 16, 4, 2), (16, 16, 16, 2, 2))

# Of these, (block_m, block_n, num_warps) that need more registers than a thread has, as perf/machine_code.py finds: whole,
# and only as parts of a split reduction. Beside them, tiles above 128 x 128 spill everywhere but on sm_90, whose
# accumulators leave room. "rounded": with Triton 3.9.0.
_SPILLING = {
    ("sm_80", "forward"): ((128, 128, 4),),
    ("sm_80", "strided dgrad"): ((256, 64, 8),),
    ("sm_90", "strided dgrad"): ((256, 128, 8),),
    ("sm_100", "forward"): ((128, 128, 4),),
    ("sm_100", "dgrad"): ((128, 128, 4),),
    ("sm_100", "wgrad"): ((64, 128, 8),),
    ("sm_80", "packed dgrad"): ((256, 32, 4),),
    ("sm_100", "grouped forward"): ((64, 64, 4),),
    ("sm_100", "packed forward"): ((128, 64, 4),),
    ("sm_80", "rounded strided dgrad"): ((128, 128, 8),),
    ("sm_90", "rounded strided dgrad"): ((128, 256, 8), (128, 128, 8)),
    ("sm_100", "rounded strided dgrad"): ((128, 128, 8),),
}
_SPILLING_SPLIT = {
    ("sm_80", "forward"): ((128, 32, 4), (128, 16, 4)),
    ("sm_80", "dgrad"): ((128, 128, 4), (128, 32, 4), (64, 32, 4)),
    ("sm_80", "strided dgrad"): ((128, 128, 4), (128, 32, 4), (64, 64, 4), (256, 32, 4), (64, 32, 4), (256, 16, 4)),
    ("sm_90", "forward"): ((256, 128, 8),),
    ("sm_90", "dgrad"): ((256, 128, 8),),
    ("sm_90", "strided dgrad"): ((128, 128, 4),),
    ("sm_90", "wgrad"): ((16, 128, 4),),
    ("sm_100", "forward"): ((128, 32, 4), (128, 16, 4)),
    ("sm_100", "strided dgrad"): ((128, 128, 4), (256, 16, 4), (128, 16, 4)),
    ("sm_100", "wgrad"): ((16, 16, 2),),
    ("sm_80", "packed forward"): ((128, 64, 4),),
    ("sm_80", "packed dgrad"): ((64, 64, 4),),
    ("sm_100", "packed dgrad"): ((128, 32, 4), (256, 16, 4)),
    ("sm_100", "packed wgrad"): ((64, 64, 4),),
    ("sm_100", "grouped wgrad"): ((16, 64, 4),),
    ("sm_100", "rounded forward"): ((64, 64, 4),),
}
_LARGE = 128 * 128
_LONG_STEP = 128  # bytes of a row: large tiles take steps of half as many where these walk clearly less
_CLEARLY = 0.88
_FEW_TILES = 4  # of a plane: where it has fewer, many tiles end in the next one
_ERF_SUMS = 64  # of a thread, that leave registers for gelu: with 128 it spills on sm_80 and sm_90, others do not


def gelu_spills(problem: Problem, sums: float, splits: int) -> bool:
    """Whether a thread with so many sums has no registers left for gelu; of splits, the reduction computes it."""
    return problem.activation == "gelu" and splits == 1 and problem.arch.startswith("sm_") and sums > _ERF_SUMS


def spills(problem: Problem, config: GemmConfig) -> bool:
    """Whether the config is known to keep registers in memory, and so is not offered."""
    sums = config.block_m * config.block_n
    if sums > _LARGE and problem.arch not in ("sm_90", "interpreter"):
        return True
    if gelu_spills(problem, sums / (32 * config.num_warps), config.splits):
        return True
    strided = problem.pass_ == "dgrad" and problem.stride != (1, 1, 1)
    kind = "strided dgrad" if strided else problem.pass_
    spilling = _spilling(problem.arch, kind, config.splits > 1)
    if problem.groups > 1:
        spilling += _spilling(problem.arch, f"grouped {kind}", config.splits > 1)
    if packed_groups(problem, config) > 1:
        spilling += _spilling(problem.arch, f"packed {kind}", config.splits > 1)
    if problem.precision == "rounded":
        spilling += _spilling(problem.arch, f"rounded {kind}", config.splits > 1)
    return (config.block_m, config.block_n, config.num_warps) in spilling


def _spilling(arch: str, kind: str, split: bool) -> tuple[tuple[int, int, int], ...]:
    return _SPILLING.get((arch, kind), ()) + (_SPILLING_SPLIT.get((arch, kind), ()) if split else ())


@functools.cache
def _base(amd: bool, wgrad: bool, dtype: str, precision: str) -> tuple[GemmConfig, ...]:
    """The tiles of a kind of problem, the smallest last."""
    if dtype != "float32":
        tiles = _WGRAD_16 if wgrad else _GATHER_16
    elif precision == "ieee":
        tiles = _WGRAD_FMA if wgrad else _GATHER_FMA
    elif precision == "rounded":
        tiles = _GATHER_ROUNDED
    else:
        tiles = _WGRAD_32 if wgrad else _GATHER_32
    if amd:  # two stages are its software pipeline, and its warps have 64 threads
        tiles = (t.replace(num_warps=1 if t.num_warps == 2 else t.num_warps, num_stages=2) for t in tiles)
    return tuple(dict.fromkeys(tiles))


@functools.lru_cache(maxsize=4096)
def exchanged(problem: Problem) -> bool:
    """Whether a wgrad walks along the input and gathers the gradient through the taps, and not the other way round.

    Each tap gathers its own pixels: of the narrower side, that is less, and the wider one fills the rows of a tile. Through
    tap t position i of the input meets the gradient at i + pad - t * dilation, where the stride is 1.
    """
    if problem.pass_ != "wgrad" or problem.groups > 1 or problem.stride != (1, 1, 1):
        return False
    inner, outer, positions = problem.in_channels, problem.out_channels, problem.batch * math.prod(problem.input_size)
    return _wgrad_reads(problem, inner, outer, positions) < _wgrad_reads(problem, outer, inner, problem.pixels)


def _wgrad_reads(problem: Problem, along: int, gathered: int, pixels: int) -> int:
    """What the largest tile reads in all, up to a factor: of so many channels along its rows, and gathered by each tap."""
    tile = _base(problem.arch.startswith("gfx"), True, problem.dtype, problem.precision)[0]
    rows = min(max(along, 16), tile.block_m)
    return pixels * gathered * -(-along // tile.block_m) * (rows + tile.block_n)


def channels(problem: Problem) -> tuple[int, int]:
    """(produced, reduced) channels of one group; of wgrad its filters and its input channels."""
    inner = (problem.group_out, problem.group_in)
    return inner[::-1] if problem.pass_ == "dgrad" else inner


def sides(problem: Problem) -> tuple[int, int]:
    """The same, but of wgrad those of the side that is walked along, and of the gathered one."""
    produced, reduced = channels(problem)
    return (reduced, produced) if exchanged(problem) else (produced, reduced)


def walked(problem: Problem) -> int:
    """Pixels that a wgrad sums over."""
    return problem.batch * math.prod(problem.input_size) if exchanged(problem) else problem.pixels


def packed_groups(problem: Problem, tile: GemmConfig) -> int:
    """Groups that a program computes together: as many as its tile holds whole, in numbers that fill vectors.

    Channels meet filters of their own group on the diagonal of the tile; the rest of it is zeros, in wgrad left out.
    """
    if problem.groups == 1:
        return 1
    produced, reduced = sides(problem)
    held = tile.block_m // produced if problem.pass_ == "wgrad" else min(tile.block_k // reduced, tile.block_n // produced)
    if held >= problem.groups:
        return problem.groups
    vector = VECTOR_BYTES // problem.itemsize
    step = vector // math.gcd(vector, produced, reduced)
    return max(1, held - held % step if held > step else held)


def walks_less(channels: int, step: int, longer: int) -> bool:
    """Whether steps of so many channels walk clearly fewer than longer ones, the last of each filled up with zeros."""
    return math.ceil(channels / step) * step <= _CLEARLY * math.ceil(channels / longer) * longer


def _extent(problem: Problem, together: int) -> tuple[int, int, int]:
    """(rows, columns, reduction) of the matrix product of so many groups, of the largest parity class."""
    (produced, reduced), (pixels, taps) = sides(problem), _largest_class(problem)
    if problem.pass_ == "wgrad":
        return together * produced, taps * together * reduced, pixels
    return pixels, together * produced, taps * together * reduced


@functools.lru_cache(maxsize=4096)
def _largest_class(problem: Problem) -> tuple[int, int]:
    """(pixels, taps) of the largest parity class."""
    if problem.pass_ != "dgrad":
        return walked(problem), problem.taps
    pixels = [-(-size // s) for size, s in zip(problem.input_size, problem.stride, strict=True)]
    taps = [-(-k // s) for k, s in zip(problem.kernel_size, problem.stride, strict=True)]
    return problem.batch * math.prod(pixels), math.prod(taps)


@functools.lru_cache(maxsize=4096)
def depths(problem: Problem, block_m: int) -> tuple[bool, float]:
    """(by_depth, live): the order of planes in forward and dgrad, and the share of taps along depth that a tile walks.

    A tile leaves out the taps that only read padding for all its pixels. Small planes follow one another by depth, those of
    all samples, where there are such taps: sample by sample a tile would have pixels of many depths.
    """
    stride = problem.stride if problem.pass_ == "dgrad" else (1, 1, 1)
    plane = math.prod(-(-size // s) for size, s in zip(problem.result_shape[3:], stride[1:], strict=True))
    by_depth = problem.batch > 1 and plane < _FEW_TILES * block_m and live_depth(problem) < 1
    return by_depth, live_depth(problem, -(-block_m // (plane * problem.batch if by_depth else plane)))


def _interpreter_tile(problem: Problem) -> GemmConfig:
    """As large as the problem takes: the interpreter's time goes with the number of steps, hardly with their size."""
    rows, columns, reduction = _extent(problem, problem.groups)
    if problem.pass_ == "wgrad":
        sizes = (min(rows, 64), min(columns, 256), min(reduction, 128))
    else:
        sizes = (min(rows, 4096), min(columns, 64), min(sides(problem)[1] * problem.groups, 32))
    return GemmConfig(*(1 << max(4, (size - 1).bit_length()) for size in sizes), num_warps=1, num_stages=1)


def refused_by_tensor_cores(problem: Problem) -> str | None:
    if problem.arch == "gfx942" and problem.precision == "tf32x3":
        return "tf32x3 needs NVIDIA's tensor cores"
    return None


def shared_limit(problem: Problem) -> int:
    """Bytes of shared memory that one block of the problem's GPU can have."""
    return SHARED_BYTES.get(problem.arch, _LEAST_SHARED_BYTES)


def _fits(problem: Problem, tile: GemmConfig) -> bool:
    """The tile's stages fit into shared memory, it is not more than twice what a side of the product needs, and where the
    layer is wide enough, it takes at least 64 bytes a step, or of wgrad has 32 rows; a large tile 128 unless it walks less."""
    together = packed_groups(problem, tile)
    rows, columns, _ = _extent(problem, together)
    reduced, long = together * sides(problem)[1], _LONG_STEP // problem.itemsize
    narrow = tile.block_m < min(rows, 32) if problem.pass_ == "wgrad" else tile.block_k < min(reduced, long // 2)
    large = problem.itemsize == 2 and problem.pass_ != "wgrad" and tile.block_m * tile.block_n >= _LARGE
    other_step = large and (tile.block_k < long) != walks_less(reduced, long // 2, long)
    stages = problem.itemsize * (tile.block_m + tile.block_n) * tile.block_k * tile.num_stages
    return (
        stages <= shared_limit(problem)
        and tile.block_m < 2 * max(rows, 16)
        and tile.block_n < 2 * max(columns, 16)
        and not narrow
        and not other_step
    )


def workspace_bytes(problem: Problem, config: GemmConfig) -> int:
    return 4 * config.splits * problem.result_elements if config.splits > 1 else 0


def _splits(problem: Problem, tile: GemmConfig) -> tuple[int, ...]:
    together = packed_groups(problem, tile)
    rows, columns, reduction = _extent(problem, together)
    classes = math.prod(problem.stride) if problem.pass_ == "dgrad" else 1
    tiles = math.ceil(rows / tile.block_m) * math.ceil(columns / tile.block_n) * classes
    tiles *= math.ceil(problem.groups / together)
    return split_counts(problem, tiles, steps=math.ceil(reduction / tile.block_k))


def split_counts(problem: Problem, tiles: int, steps: int) -> tuple[int, ...]:
    """1, and the numbers of splits that fill a GPU whose tiles alone would not, within the workspace's limit.

    Args:
        tiles: programs of one split. steps: of a program that is not split.
    """
    most = min(steps // 4, WORKSPACE_LIMIT // (4 * problem.result_elements))
    wanted = {min(programs // tiles, most) for programs in _SPLIT_PROGRAMS}
    return (1, *sorted(count for count in wanted if count > 1))


def configs(problem: Problem) -> tuple[GemmConfig, ...]:
    """Every configuration that this problem can take, the smallest last. All splits above 1 share a compiled kernel."""
    base = _base(problem.arch.startswith("gfx"), problem.pass_ == "wgrad", problem.dtype, problem.precision)
    base = [tile for tile in base if not spills(problem, tile)]
    smallest, offers = base[-1], []
    tiles = [tile for tile in base if _fits(problem, tile)] or [smallest]
    if problem.arch == "interpreter":
        tiles.insert(0, _interpreter_tile(problem))
    for tile in tiles:
        _, *more = _splits(problem, tile)
        split = [tile.replace(splits=splits) for splits in more]
        offers += [tile] if tile is not smallest else []
        offers += split if split and not spills(problem, split[0]) else []
    return (*offers, smallest)
