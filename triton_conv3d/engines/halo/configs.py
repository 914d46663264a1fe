"""The configurations of the implicit GEMM with planes reused along D."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ...problem import Problem
from ..base import Config
from ..implicit_gemm.configs import channels, gelu_spills, shared_limit


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

# Stages in shared memory beside num_stages, as perf/machine_code.py finds: where products read registers (sm_80 and all
# others but these) the last one is there; on sm_100 Triton 3.6 keeps what is multiplied once more.
_MORE_STAGES = {"sm_90": 0, "sm_100": 1, "interpreter": 0}
_LEAST_STAGES = 2
_MOST_SUMS = 64  # of a thread, but on sm_90: with 128 sm_80 spills for kernels deeper than 3, and on sm_100 Triton 3.6 fails


def rows(problem: Problem, planes: int) -> int:
    """Rows of all tiles: pixels of the result, so many planes as one."""
    depth, height, width = problem.result_shape[2:]
    return problem.batch * math.ceil(depth / planes) * height * width


def step_bytes(problem: Problem, config: HaloConfig) -> int:
    """Bytes that one step loads: every plane of the input and every weight once."""
    depth, (m, n, k) = problem.kernel_size[0], (config.block_m, config.block_n, config.block_k)
    return problem.itemsize * k * (m * (config.planes + depth - 1) + n * depth)


def shared_bytes(problem: Problem, config: HaloConfig) -> int:
    """Of one program."""
    return step_bytes(problem, config) * (config.num_stages + _more_stages(problem))


def _more_stages(problem: Problem) -> int:
    return _MORE_STAGES.get(problem.arch, -1)


def configs(problem: Problem) -> tuple[HaloConfig, ...]:
    """The tiles that hold all channels and are not more than twice as large as the result, with as many stages as there is
    room for; and the smallest."""
    *tiles, smallest = (HaloConfig(*tile) for tile in (_TILES_32 if problem.dtype == "float32" else _TILES_16))
    produced, depth, more, found = channels(problem)[0], problem.result_shape[2], _more_stages(problem), []
    for tile in tiles:
        fits = produced <= tile.block_n < 2 * max(produced, 16)  # with fewer, the input would be read again for the others
        fits = fits and tile.planes < 2 * depth and tile.block_m < 2 * rows(problem, tile.planes)
        wanted = max(tile.num_stages, _LEAST_STAGES - more)
        stages = min(wanted, shared_limit(problem) // step_bytes(problem, tile) - more)
        sums = tile.planes * tile.block_m * tile.block_n / (32 * tile.num_warps)
        spills = gelu_spills(problem, sums, splits=1) or (sums > _MOST_SUMS and problem.arch not in ("sm_90", "interpreter"))
        if fits and not spills and stages >= _LEAST_STAGES:
            found.append(tile.replace(num_stages=stages))
    return (*found, smallest)
