"""The configurations of the depthwise engine, and which of them a problem can take."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

from ...problem import VECTOR_BYTES, Problem, met_taps
from ..base import CHAIN, WORKSPACE_LIMIT, Config
from .geometry import Plan, whole_plan
from .strips import ROWS, SLIDE, Strip, axes

# Registers of a thread's 255 that values may take, seen in SASS: the rest are addresses and masks.
_REGISTERS = {"forward": 232, "dgrad": 232, "wgrad": 208}
_THIRD = {False: 120, True: 140}  # up to which three programs share a multiprocessor; True: Hopper and later
_SPLIT_PROGRAMS = (256, 1024)  # programs that splits aim at: one wave and several, of 108 to 304 units
_CACHED = 32 * 2**20  # bytes that stay in L2 from one part of the depth to another
_KEPT = 3  # strips that are offered for one kernel
_MOST_TAPS = 64  # that "slide" holds: more gain little for what they take to compile


@dataclass(frozen=True)
class DepthwiseConfig(Config):
    """
    kernel: "slide" holds every tap in registers and reads each plane of the input once; "rows" loads one row of taps
        at a time, for kernels of any size. wgrad always slides.
    rows, columns: outputs (of wgrad: pixels of the gradient) along H and W that one lane computes.
    vector: lanes of one thread: neighbouring channels where channels are dense.
    num_warps: as Triton's launch option.
    splits: parts of the depth (of wgrad: of the pixels, each with its float32 partial sums) that run in parallel.
    """

    kernel: str
    rows: int
    columns: int
    vector: int
    num_warps: int = 4
    splits: int = 1


_ONE = DepthwiseConfig(SLIDE, 1, 1, 1)


def register_limit(problem: Problem, config: DepthwiseConfig) -> dict[str, int]:
    """Launch option of NVIDIA's compiler, which left alone spills to fit one program more, if it only just does not."""
    if not problem.arch.startswith("sm_"):
        return {}
    hopper = int(problem.arch[3:]) >= 90
    taken = Strip(problem, config.kernel, config.rows, config.columns).registers(config.vector)
    return {"maxnreg": 168 if taken <= _THIRD[hopper] else 255}


# (rows, columns) of a strip, by kernel; the second with dense rows of pixels, which are read and written in vectors.
_STRIPS = {
    SLIDE: ((4, 4), (2, 7), (2, 4), (2, 2), (1, 4), (1, 2), (1, 1)),
    ROWS: ((1, 8), (1, 7), (1, 4), (1, 2)),
}
_DENSE_STRIPS = {
    SLIDE: ((4, 8), (2, 14), (2, 8), (2, 7), (2, 4), (1, 8), (1, 4), (1, 1)),
    ROWS: ((1, 32), (1, 28), (1, 16), (1, 14), (1, 8), (1, 7), (1, 4)),
}


def _candidates(problem: Problem, kernel: str) -> list[DepthwiseConfig]:
    """Every strip that registers hold, the least instructions for one output that is wanted first."""
    at, (_, height, width) = axes(problem), axes(problem).size
    along_h, along_w = problem.stride[1:] if at.dgrad else (1, 1)
    most = min(VECTOR_BYTES // problem.itemsize, max(at.unit, 2)) if at.last else 1
    vectors = [vector for vector in (1, 2, 4, 8) if vector <= most]
    found = {}
    for rows, columns in (_STRIPS if at.last else _DENSE_STRIPS)[kernel]:
        rows, columns = 1 if kernel == ROWS else -(-rows // along_h) * along_h, -(-columns // along_w) * along_w
        filled = height / (-(-height // rows) * rows), width / (-(-width // columns) * columns)
        if min(filled) < 0.5:
            continue
        strip = Strip(problem, kernel, rows, columns)
        for vector in vectors:
            if strip.registers(vector) <= _REGISTERS[problem.pass_]:
                config = DepthwiseConfig(kernel, rows, columns, vector)
                found[config] = strip.instructions(vector) / (filled[0] * filled[1])
    return sorted(found, key=found.get)


@functools.lru_cache(maxsize=4096)
def smallest(problem: Problem) -> DepthwiseConfig:
    """Any problem can take it."""
    if problem.pass_ == "wgrad":
        return _ONE.replace(splits=_short_splits(whole_plan(problem, _ONE), _ONE, 1))
    return _ONE.replace(kernel=ROWS, columns=problem.stride[2] if problem.pass_ == "dgrad" else 1)


def partial_bytes(problem: Problem, config: DepthwiseConfig) -> int:
    return config.splits * _split_bytes(problem)


def _split_bytes(problem: Problem) -> int:
    """Partial sums of one split of wgrad."""
    return 4 * problem.out_channels * met_taps(problem).count


def _short_splits(whole: Plan, config: DepthwiseConfig, splits: int) -> int:
    """Splits of wgrad, the fewest from so many on, that keep an accumulator within CHAIN products."""
    parts = -(-splits // whole.share)  # of the depth
    while True:
        chunk, chunks, _ = whole.parts(parts * whole.share)
        held = CHAIN // (chunk * config.rows * config.columns)
        if held:
            splits = max(splits, -(-whole.share * chunks // held))
            if splits <= parts * whole.share:
                return splits
        splits, parts = parts * whole.share + 1, parts + 1


def _splits(problem: Problem, config: DepthwiseConfig) -> list[int]:
    at, whole = axes(problem), whole_plan(problem, config)
    depth = at.size[0]
    if at.wgrad:
        programs = whole.tiles[0] * math.prod(whole.blocks)
        most = min(WORKSPACE_LIMIT // _split_bytes(problem), whole.share * depth)
        wanted = {_short_splits(whole, config, max(1, min(target // programs, most))) for target in _SPLIT_PROGRAMS}
        return sorted(splits for splits in wanted if splits <= most)
    programs = math.prod(whole.tiles) * problem.batch * math.prod(whole.classes)
    halo = at.ring - 1 if config.kernel == SLIDE else 0
    if problem.min_bytes > _CACHED:  # planes that two parts read come from memory twice: at most 1.25 times in all
        halo *= 4
    most = max(1, depth // max(1, halo))
    return sorted({max(1, min(target // programs, most)) for target in _SPLIT_PROGRAMS})


@functools.lru_cache(maxsize=4096)
def configs(problem: Problem) -> tuple[DepthwiseConfig, ...]:
    """Every configuration that this problem can take, the smallest last. All splits above 1 share a compiled kernel."""
    multiplied = problem.pass_ == "dgrad" and problem.out_channels != problem.in_channels
    whole = problem.pass_ == "wgrad" or (not multiplied and met_taps(problem).count <= _MOST_TAPS)
    kept = _candidates(problem, SLIDE) if whole else []
    kept = [*kept[:_KEPT], *[c for c in kept[_KEPT:] if c.rows == 1][:1]]  # small strips for small problems
    if problem.pass_ != "wgrad":
        kept += _candidates(problem, ROWS)[:2]
    offers = [config.replace(splits=splits) for config in kept for splits in _splits(problem, config)]
    last = smallest(problem)
    return (*(offer for offer in offers if offer != last), last)
