"""The configurations of the implicit GEMM with planes reused along D."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

from ...problem import VECTOR_BYTES, Problem
from ..base import CHAIN, Config
from ..implicit_gemm.configs import channels, gelu_spills, shared_limit, split_counts, walks_less


@dataclass(frozen=True)
class HaloConfig(Config):
    """
    block_m, block_n: tile of one plane of the result: pixels x channels.
    planes: of the result, one behind the other along D, that a tile has.
    block_k: channels of one step of the reduction.
    num_warps, num_stages: as Triton's launch options.
    """

    block_m: int
    block_n: int
    block_k: int
    planes: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class HaloWgradConfig(HaloConfig):
    """
    block_m, block_n: tile of the result, for each tap that a program holds: filters x channels.
    block_k: rows of one step. planes: of the gradient, one behind the other along D, that a row has.
    taps_h: along H, that a program holds: all or one, with all along D.
    splits: parts of the rows that run in parallel, each with its float32 partial sums.
    """

    taps_h: int = 1
    splits: int = 1


# (block_m, block_n, block_k, planes, num_warps, num_stages), the smallest last: it fits every GPU. Of 16-bit types with so
# many stages that a multiprocessor of sm_90 has room for two programs, but for the first.
_TILES_16 = (
    (128, 64, 32, 4, 8, 3),
    (128, 64, 32, 2, 8, 2),
    (128, 32, 32, 4, 8, 2),
    (128, 32, 32, 2, 8, 2),
    (128, 16, 32, 4, 4, 2),
    (32, 16, 16, 2, 2, 2),
)
_TILES_32 = (
    (128, 64, 16, 2, 8, 3),
    (128, 32, 16, 4, 8, 3),
    (128, 16, 16, 4, 4, 3),
    (32, 16, 16, 2, 2, 2),
)

# (block_m, block_n, block_k, planes, num_warps, num_stages, whether all taps along H), the smallest last. Where the loop
# has several products, Triton hands out warps along the longer side alone: each gets 16 rows or a part of the columns.
_WGRAD_16 = (
    (64, 64, 16, 8, 4, 3, False),
    (64, 64, 16, 4, 4, 4, False),
    (64, 32, 16, 4, 4, 3, True),
    (32, 64, 16, 8, 4, 3, False),
    (32, 32, 16, 4, 2, 3, True),
    (32, 32, 16, 8, 2, 3, False),
    (32, 16, 16, 4, 2, 3, True),
    (16, 32, 16, 8, 2, 3, False),
    (16, 16, 16, 8, 1, 3, False),
    (32, 32, 16, 2, 2, 3, False),
    (16, 16, 16, 2, 1, 2, False),
)
_WGRAD_32 = (
    (64, 64, 16, 2, 4, 3, False),
    (32, 32, 16, 2, 2, 3, False),
    (16, 16, 16, 2, 1, 3, False),
    (16, 16, 16, 2, 1, 2, False),
)

# Of a step of :func:`.kernels.add_planes`: instructions of a warp for each load and for each product of two tiles (SASS,
# sm_80 and sm_90); operations on tiles in the interpreter, at all and for each.
LOAD, PRODUCT = 12.0, 14.0
INTERPRETED, INTERPRETED_LOAD, INTERPRETED_PRODUCT = 12.0, 4.0, 2.0
_LEAST_STAGES = 2
_LONG_STEP, _SHORT_STEP = 32, 16  # channels of 16-bit types
WIDEST = 64  # columns of a tile, and rows of one of wgrad
MOST_TILES = {False: 5, True: 18}  # that read the same, side by side; True: of wgrad
_MOST_SUMS = 64  # of a thread, but on sm_90: with 128 sm_80 spills for kernels deeper than 3, and on sm_100 Triton 3.6 fails
_MOST_WGRAD_SUMS = (96, 144)  # of a thread: 9 taps of 32 x 32 in two warps spill on sm_100, or where loads are not of 16 bytes
_MOST_ALONG_D = 3 * 64 * 64  # sums of all threads for one tap of H: 4 taps of 64 x 64 spill on sm_80 in 16-bit types
_MOST_TAPS = 9  # that a program of wgrad holds where it holds more than one along H: of 12 and 15 some tiles spill
_TCGEN05 = "sm_10"  # of these architectures Triton 3.6 makes an empty kernel of several products of 64 filters
# Columns of tensor memory, which has 512, that the products of a step have on sm_100, each its own: of all of them, as of 640,
# Triton 3.6 makes an empty kernel.
MOST_TENSOR_MEMORY = 384


def side_by_side(problem: Problem) -> int:
    """Tiles of the widest kind that read the same pixels for other channels."""
    produced, reduced = channels(problem)
    tiles = math.ceil(produced / WIDEST)
    return tiles * math.ceil(reduced / WIDEST) if problem.pass_ == "wgrad" else tiles


def rows(problem: Problem, planes: int) -> int:
    """Rows of all tiles: pixels of the result, or in wgrad of the gradient, so many planes as one."""
    depth, height, width = problem.output_size if problem.pass_ == "wgrad" else problem.result_shape[2:]
    return problem.batch * math.ceil(depth / planes) * height * width


def step_bytes(problem: Problem, config: HaloConfig) -> int:
    """Bytes that one step loads: every plane of the input and every weight once, or in wgrad every plane of both."""
    depth, (m, n, k) = problem.kernel_size[0], (config.block_m, config.block_n, config.block_k)
    read = config.planes + depth - 1
    if problem.pass_ == "wgrad":
        return problem.itemsize * k * (m * config.planes + n * read * config.taps_h)
    return problem.itemsize * k * (m * read + n * depth)


def shared_bytes(problem: Problem, config: HaloConfig) -> int:
    """Of one program."""
    return step_bytes(problem, config) * (config.num_stages + _more_stages(problem, config))


def more_stages(problem: Problem) -> int:
    """Stages in shared memory beside num_stages, as perf/machine_code.py finds: where products read registers (sm_80 and all
    others but these) the last one is there; on sm_100 Triton 3.6 keeps what is multiplied once more."""
    return {"sm_90": 0, "sm_100": 1, "interpreter": 0}.get(problem.arch, -1)


def _more_stages(problem: Problem, config: HaloConfig) -> int:
    if problem.pass_ == "wgrad" and config.block_m < 64:  # of fewer rows products read registers everywhere
        return 0 if problem.arch == "interpreter" else -1
    return more_stages(problem)


def four_planes_spill(problem: Problem, planes: int) -> bool:
    """Of kernels of depth 2 they do on sm_80 and sm_100, of 4 and 5 in tf32 on sm_100, as perf/machine_code.py finds."""
    depth, tensor_memory = problem.kernel_size[0], problem.arch.startswith(_TCGEN05)
    deep = depth > 3 and tensor_memory and problem.dtype == "float32"
    return planes >= 4 and (depth == 2 or deep) and problem.arch.startswith("sm_") and problem.arch != "sm_90"


def register_limit(problem: Problem) -> dict[str, int]:
    """Launch option of NVIDIA's compiler, which left alone spills two registers of forward and dgrad to fit a program more."""
    return {"maxnreg": 128} if problem.arch.startswith(_TCGEN05) else {}


@functools.lru_cache(maxsize=4096)
def configs(problem: Problem) -> tuple[HaloConfig, ...]:
    """The tiles that hold all channels, or the widest, and are not more than twice as large as the result, with as many
    stages as there is room for; and the smallest."""
    if problem.pass_ == "wgrad":
        return _wgrad_configs(problem)
    *tiles, smallest = (HaloConfig(*tile) for tile in (_TILES_32 if problem.dtype == "float32" else _TILES_16))
    (produced, reduced), depth, found = channels(problem), problem.result_shape[2], []
    for tile in tiles:
        if tile.block_k == _LONG_STEP and walks_less(reduced, _SHORT_STEP, _LONG_STEP):
            tile = tile.replace(block_k=_SHORT_STEP, num_stages=2 * tile.num_stages)
        fits = min(produced, WIDEST) <= tile.block_n < 2 * max(produced, 16)  # narrower ones would read the input again
        fits = fits and tile.planes < 2 * depth and tile.block_m < 2 * rows(problem, tile.planes)
        more = _more_stages(problem, tile)
        wanted = max(tile.num_stages, _LEAST_STAGES - more)
        stages = min(wanted, shared_limit(problem) // step_bytes(problem, tile) - more)
        sums = tile.planes * tile.block_m * tile.block_n / (32 * tile.num_warps)
        spills = gelu_spills(problem, sums, splits=1) or (sums > _MOST_SUMS and problem.arch not in ("sm_90", "interpreter"))
        spills |= four_planes_spill(problem, tile.planes)
        spills |= problem.arch.startswith(_TCGEN05) and tile.planes * problem.kernel_size[0] * tile.block_n > MOST_TENSOR_MEMORY
        if fits and not spills and stages >= _LEAST_STAGES:
            found.append(tile.replace(num_stages=stages))
    return (*found, smallest)


def _wgrad_configs(problem: Problem) -> tuple[HaloWgradConfig, ...]:
    """The tiles of which few cover filters and channels, and that are not more than twice as large as either; of wide layers
    the largest alone, and of those that differ in planes the deepest."""
    *tiles, smallest = _WGRAD_32 if problem.dtype == "float32" else _WGRAD_16
    (filters, reduced), (depth, height, _) = channels(problem), problem.kernel_size
    vectors = math.gcd(problem.alignment, filters * problem.itemsize, reduced * problem.itemsize) == VECTOR_BYTES
    wide = max(filters, reduced) > WIDEST
    deepest: dict[tuple[int, int, int], HaloWgradConfig] = {}
    most = _MOST_WGRAD_SUMS[vectors and not problem.arch.startswith(_TCGEN05)]
    for *knobs, whole in tiles:
        tile = HaloWgradConfig(*knobs, taps_h=height if whole and depth * height <= _MOST_TAPS else 1)
        m, n = tile.block_m, tile.block_n
        fits = m < 2 * max(filters, 16) and n < 2 * max(reduced, 16)
        fits = fits and math.ceil(filters / m) * math.ceil(reduced / n) <= (MOST_TILES[True] if wide else 2)
        fits = fits and not (wide and (m < min(filters, WIDEST) or n < min(reduced, WIDEST // 2)))
        fits = fits and tile.planes < 2 * problem.output_size[0] and tile.block_k < 2 * rows(problem, tile.planes)
        fits = fits and shared_bytes(problem, tile) <= shared_limit(problem)
        sums = depth * tile.taps_h * m * n / (32 * tile.num_warps)
        spills = sums > most or (m >= 64 and problem.arch.startswith(_TCGEN05))
        spills |= m * n * depth > _MOST_ALONG_D and problem.itemsize == 2 and problem.arch not in ("sm_90", "interpreter")
        if fits and not spills:
            deepest.setdefault((m, n, tile.taps_h), tile)
    found = (tile.replace(splits=splits) for tile in deepest.values() for splits in _splits(problem, tile))
    return (*found, HaloWgradConfig(*smallest[:-1]))


def wgrad_tiles(problem: Problem, tile: HaloWgradConfig) -> int:
    """Programs of one group and split."""
    taps = problem.kernel_size[1] // tile.taps_h * problem.kernel_size[2]
    return taps * math.ceil(problem.group_out / tile.block_m) * math.ceil(problem.group_in / tile.block_n)


def wgrad_launches(problem: Problem, config: HaloWgradConfig) -> tuple[int, int]:
    """(how many, rows of a split that each adds up): no more than CHAIN products of one accumulator."""
    chain = CHAIN // config.planes
    share = math.ceil(math.ceil(rows(problem, config.planes) / config.block_k) / config.splits) * config.block_k
    return math.ceil(share / chain), chain


def _splits(problem: Problem, tile: HaloWgradConfig) -> tuple[int, ...]:
    steps = math.ceil(rows(problem, tile.planes) / tile.block_k)
    return split_counts(problem, wgrad_tiles(problem, tile) * problem.groups, steps)
