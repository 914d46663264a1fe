"""The configurations of wgrad from rounded copies, and the order of memory of those."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

from ...problem import VECTOR_BYTES, Problem, Triple
from ..base import CHAIN, MOST_COPIED, WORKSPACE_LIMIT
from ..implicit_gemm.configs import GemmConfig, split_counts

_ARCHITECTURES = ("sm_90", "sm_100", "interpreter")  # elsewhere descriptors become pointers
_COORDINATES = 2**31  # of a descriptor
_VECTOR = VECTOR_BYTES // 4  # positions
_STEP = 32  # positions: 128 bytes, the widest line of shared memory that a descriptor swizzles

# The smallest last. A matrix instruction has 64 rows for each four warps.
_TILES = tuple(
    GemmConfig(*tile)
    for tile in (
        (128, 256, _STEP, 8, 4),
        (256, 128, _STEP, 8, 4),
        (128, 128, _STEP, 8, 4),
        (128, 64, _STEP, 4, 4),
        (64, 64, _STEP, 4, 4),
    )
)
_LARGEST_WITH_TOTAL = 128 * 128  # sums, beside which a program of 8 warps has registers for as many more
_INTERPRETER_TILE = GemmConfig(64, 64, 256, 1, 1)  # whose time goes with the number of steps


@dataclass(frozen=True)
class Volume:
    """How a copy lies in memory: for each channel a row of (tap of w, n, plane, phase of h, line, column).

    copies: taps along w. volumes: n of each. planes: of one n. plane: positions of one, at least those of all its phases.
    lines: (h, w) of a phase. stride: (h, w) of the positions in x. dilation: of w. pad: zeros before the volume.
    """

    copies: int
    volumes: int
    planes: int
    plane: int
    lines: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    dilation: int = 1
    pad: Triple = (0, 0, 0)

    @property
    def positions(self) -> int:
        return self.copies * self.volumes * self.planes * self.plane


@functools.lru_cache(maxsize=4096)
def volumes(problem: Problem, step: int) -> tuple[Volume, Volume]:
    """Of the input and of the gradient. Lines are vectors; planes of the gradient are whole steps."""
    depth, height, _ = (
        size + low + high
        for size, low, high in zip(problem.input_size, problem.padding[::2], problem.padding[1::2], strict=True)
    )
    (_, by_h, by_w), (planes, grad_lines, width) = problem.stride, problem.output_size
    width = -(-width // _VECTOR) * _VECTOR
    lines = -(-height // by_h), width
    x = Volume(
        problem.kernel_size[2], problem.batch, depth, by_h * math.prod(lines), lines,
        (by_h, by_w), problem.dilation[2], problem.padding[::2],
    )  # fmt: skip
    plane = -(-grad_lines * width // step) * step
    return x, Volume(1, problem.batch, planes, plane, (-(-plane // width), width))


def wgrad_refused(problem: Problem) -> str | None:
    if problem.arch not in _ARCHITECTURES:
        return f"{problem.arch} has no copy engine that wgrad was compiled for: sm_90 and sm_100"
    if max(volume.positions for volume in volumes(problem, _STEP)) >= _COORDINATES:
        return f"more than {_COORDINATES} positions, the coordinates of a descriptor"
    if problem.result_elements >= _COORDINATES:
        return f"more than {_COORDINATES} elements of the result, which its kernel counts in 32 bits"
    if (copied := copied_bytes(problem, _STEP)) > MOST_COPIED:
        return f"copies of {copied} bytes: more than {MOST_COPIED}"
    return None


def copied_bytes(problem: Problem, step: int) -> int:
    x, grad = volumes(problem, step)
    return problem.itemsize * (problem.in_channels * x.positions + problem.out_channels * grad.positions)


def chain(config: GemmConfig) -> int:
    """Steps that one accumulator adds up before they join the total; 0: all of its program, whose registers hold no total."""
    return 0 if config.block_m * config.block_n > _LARGEST_WITH_TOTAL else CHAIN // config.block_k


def _least_splits(problem: Problem, tile: GemmConfig) -> int:
    """So that no accumulator adds up more than CHAIN products."""
    return 1 if chain(tile) else -(-volumes(problem, tile.block_k)[1].positions // CHAIN)


def _fits(problem: Problem, tile: GemmConfig) -> bool:
    return tile.block_m < 2 * max(problem.out_channels, 64) and tile.block_n < 2 * max(problem.in_channels, 64)


def wgrad_configs(problem: Problem) -> tuple[GemmConfig, ...]:
    """The smallest last. All splits above 1 share a compiled kernel."""
    tiles = [tile for tile in _TILES if _fits(problem, tile)]
    if problem.arch == "interpreter":
        tiles.insert(0, _INTERPRETER_TILE)
    offers = []
    for tile in tiles:
        across = -(-problem.out_channels // tile.block_m) * -(-problem.in_channels // tile.block_n)
        steps, least = volumes(problem, tile.block_k)[1].positions // tile.block_k, _least_splits(problem, tile)
        counts = {max(least, count) for count in split_counts(problem, across * problem.taps, steps)}
        most = max(1, WORKSPACE_LIMIT // (4 * problem.result_elements))
        offers += [tile.replace(splits=count) for count in sorted(counts) if count <= most]
    smallest = _TILES[-1]
    return (*(config for config in offers if config != smallest), smallest)
