"""Taps along depth that only read padding, which tiles of implicit_gemm, tma and hopper leave out in forward and dgrad."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch
from cases import DEVICE, Case, make, run

pytest.importorskip("triton")
import triton
import triton.language as tl
from test_hopper import RUNS, engine, few_programs, small  # noqa: F401
from test_hopper_im2col import needs_im2col, rows
from test_tma_geometry import AXES, axis_problem

from triton_conv3d import engines, reference
from triton_conv3d.engines import implicit_gemm, tma
from triton_conv3d.engines.implicit_gemm.configs import GemmConfig, depths
from triton_conv3d.engines.implicit_gemm.taps import live_taps
from triton_conv3d.problem import Problem, live_depth

BASE = dict(in_channels=8, out_channels=8, kernel_size=(3, 1, 1), dtype="float16", batch=2)
# Where planes are small, tiles go through all samples of one depth before the next; those of "large_planes" go through all
# depths of one sample.
LAYERS = {
    "3_to_1": dict(input_size=(3, 4, 4), batch=1),
    "4_to_2": dict(input_size=(4, 4, 4), kernel_size=(3, 1, 2), padding=(0, 0, 0, 0, 0, 1)),
    "padded": dict(
        input_size=(2, 4, 4), padding=(1, 1, 0, 1, 0, 0), kernel_size=(3, 2, 1), in_channels=24, out_channels=24
    ),
    "large_planes": dict(input_size=(2, 8, 9), padding=(1, 1, 0, 0, 0, 0)),
    "one_side": dict(input_size=(2, 4, 4), padding=(2, 0, 0, 0, 1, 0), kernel_size=(3, 1, 2), batch=1),
    "strided": dict(input_size=(5, 4, 4), padding=(2, 1, 0, 1, 0, 0), kernel_size=(3, 2, 1), stride=(2, 1, 1)),
    "dilated": dict(input_size=(3, 4, 4), padding=(2, 2, 0, 0, 0, 0), dilation=(2, 1, 1), batch=3),
    "dilated_strided": dict(input_size=(5, 4, 4), padding=(4, 4, 0, 0, 0, 0), dilation=(3, 1, 1), stride=(2, 1, 1)),
    "beyond_the_kernel": dict(input_size=(1, 4, 4), padding=(3, 2, 0, 0, 0, 0), kernel_size=(2, 1, 1)),
    "no_tap": dict(input_size=(1, 4, 4), padding=(2, 2, 0, 0, 0, 0), dilation=(4, 1, 1), kernel_size=(2, 1, 1)),
}
SMALLEST = GemmConfig(16, 16, 16, 2, 2)


def sound(name: str, case: Case, deep: bool):
    """(engine, config) with tiles of 16 pixels, of one depth where planes divide into them; bricks of two, if ``deep``."""
    if name == "implicit_gemm":
        return engines.get(name), SMALLEST
    sides = dict(zip(("brick_n", "brick_d", "brick_h", "brick_w"), (2, 2, 1, 4) if deep else (1, 1, 4, 4), strict=True))
    if name == "hopper":
        return engine(), small(case, **sides)
    if name == "hopper_im2col":
        return engine(), rows()
    return engines.get(name), engines.get(name).configs(case.geometry())[-1].replace(**sides)


def case_of(pass_: str, layer: str, **changes) -> Case:
    return Case(pass_, **{**BASE, **LAYERS[layer], "bias": pass_ == "forward", **changes})


both_passes = pytest.mark.parametrize("pass_", ["forward", "dgrad"])


@pytest.mark.parametrize(
    "name, layer",
    [("implicit_gemm", layer) for layer in LAYERS]
    + [("tma", layer) for layer in ("4_to_2", "dilated_strided", "no_tap")]
    + [pytest.param("hopper", "dilated_strided", marks=RUNS)],
)
@both_passes
def test_exact(name: str, pass_: str, layer: str, few_programs) -> None:  # noqa: F811
    """Planes that do not divide into tiles, whole and split; also of 15 pixels, one less than a tile."""
    depth, height, width = LAYERS[layer]["input_size"]
    for deep in (False, True):
        case = case_of(pass_, layer, input_size=(depth, height + 1, width - deep), seed=int(deep))
        of, config = sound(name, case, deep)
        run(case, of, config.replace(splits=1 + 2 * deep))


@pytest.mark.parametrize(
    "name, layer",
    [("implicit_gemm", layer) for layer in ("3_to_1", "padded", "strided")]
    + [("tma", "strided"), pytest.param("hopper", "strided", marks=RUNS)]
    + [pytest.param("hopper_im2col", "padded", marks=(RUNS, needs_im2col))],
)
@both_passes
def test_a_tap_is_read_by_the_planes_that_meet_it_alone(name: str, pass_: str, layer: str, few_programs) -> None:  # noqa: F811
    """With NaN for the weights of one tap along depth all pixels of those planes are NaN, and none of the others."""
    case = case_of(pass_, layer, bias=False)
    problem, operands = make(case)
    of, config = sound(name, case, deep=False)
    read = "grad" if pass_ == "dgrad" else "input"
    ones = operands._replace(**{read: torch.ones_like(getattr(operands, read))})
    for tap in range(problem.kernel_size[0]):
        weight = torch.zeros_like(operands.weight)
        weight[:, :, tap] = 1
        meets = reference.compute(problem, ones._replace(weight=weight)).amax((1, 3, 4)) > 0
        weight = operands.weight.clone()
        weight[:, :, tap] = math.nan
        found = of.launch(problem, operands._replace(weight=weight), config.replace(splits=1 + tap % 2)).isnan()
        assert torch.equal(found.any(4).any(3).any(1), meets) and torch.equal(found.all(4).all(3).all(1), meets)


@triton.jit
def _live(axis_ptr, found_ptr, COUNT: tl.constexpr, SIZE: tl.constexpr):
    """live_taps of every column (first, last, scale, start, step, size, taps) of a table."""
    at = axis_ptr + tl.arange(0, SIZE)
    inside = tl.arange(0, SIZE) < COUNT
    first, last = tl.load(at, inside, 0), tl.load(at + COUNT, inside, 0)
    scale, start = tl.load(at + 2 * COUNT, inside, 1), tl.load(at + 3 * COUNT, inside, 0)
    step, size = tl.load(at + 4 * COUNT, inside, 1), tl.load(at + 5 * COUNT, inside, 1)
    lo, hi = live_taps(first, last, scale, start, step, size, tl.load(at + 6 * COUNT, inside, 0))
    tl.store(found_ptr + tl.arange(0, SIZE), lo, inside)
    tl.store(found_ptr + COUNT + tl.arange(0, SIZE), hi, inside)


def test_live_taps_of_small_grids() -> None:
    """The tightest range where the scale is 1, else no smaller one; empty where there is none."""
    table = [
        (first, first + more, *rest)
        for first, more, *rest in itertools.product(
            range(3), range(3), (1, 2, 3), range(-7, 8), (-3, -2, -1, 1, 2, 3), (1, 2, 4), range(5)
        )
    ]
    found = torch.zeros(2, len(table), dtype=torch.int32, device=DEVICE)
    columns = torch.tensor(table, dtype=torch.int32, device=DEVICE).T.contiguous()
    _live[(1,)](columns, found, len(table), triton.next_power_of_2(len(table)), num_warps=32)
    for (first, last, scale, start, step, size, taps), (lo, hi) in zip(table, found.T.tolist(), strict=True):
        positions = range(first, last + 1)
        live = [t for t in range(taps) if any(0 <= p * scale + start + t * step < size for p in positions)]
        assert 0 <= lo <= hi <= taps and set(live) <= set(range(lo, hi))
        assert scale > 1 or live == list(range(lo, hi))


@both_passes
@pytest.mark.parametrize("planes", [1, 2, 3])
def test_live_depth_is_the_share_of_taps_that_tiles_meet(planes: int, pass_: str) -> None:
    """A tile of planes that are neighbours in their parity class, and each of its taps that any of its pixels meets."""
    for axis in AXES[::7]:
        size, taps, stride, dilation, low, _ = axis
        problem = axis_problem(pass_, 0, *axis)
        outputs = problem.output_size[0]
        if pass_ == "forward":
            walked = {(o // planes, t) for o in range(outputs) for t in range(taps)}
            live = {
                (o // planes, t)
                for o in range(outputs)
                for t in range(taps)
                if 0 <= o * stride + t * dilation - low < size
            }
        else:
            pairs = [(i, t, i + low - t * dilation) for i in range(size) for t in range(taps)]
            pairs = [(i % stride, i // stride // planes, t, far // stride) for i, t, far in pairs if far % stride == 0]
            walked = {(*tile, t) for *tile, t, _ in pairs}
            live = {(*tile, t) for *tile, t, o in pairs if 0 <= o < outputs}
        assert live_depth(problem, planes) == (len(live) / len(walked) if walked else 1), axis


WAN = Problem("dgrad", 1, 384, 384, (3, 62, 106), (3, 3, 3), dtype="bfloat16", arch="sm_90")
R3D = Problem("forward", 16, 512, 512, (2, 7, 7), (3, 3, 3), padding=(1,) * 6, arch="sm_90")


def test_iterations_are_those_of_live_taps() -> None:
    """9 of 27 taps, each of 384 channels in steps of 64; in all of them, where a tile has all three planes."""
    assert implicit_gemm.work(WAN, GemmConfig(128, 128, 64, 8, 4)).iterations == 9 * 6
    assert implicit_gemm.work(WAN.replace(input_size=(3, 6, 6)), GemmConfig(128, 128, 64, 8, 4)).iterations == 27 * 6
    brick = dataclasses.replace(tma.configs(WAN)[0], brick_n=1, brick_d=1, brick_h=16, brick_w=16, block_k=64)
    assert tma.work(WAN, brick).iterations == 9 * 6
    assert tma.work(WAN, brick.replace(brick_d=4, brick_h=4)).iterations == 27 * 6
    assert implicit_gemm.work(R3D, GemmConfig(128, 128, 64, 8, 4)).iterations == 18 * 8


def test_bricks_are_of_one_depth_where_that_saves_taps() -> None:
    large = [c for c in tma.configs(WAN.replace(input_size=(4, 128, 128))) if math.prod(c.brick) > 128]
    assert large and {config.brick_d for config in large} == {1}


@pytest.mark.parametrize("changes, by_depth", [
    (dict(), True), (dict(batch=1), False), (dict(padding=(0, 0, 1, 1, 1, 1), input_size=(4, 7, 7)), False),
    (dict(input_size=(2, 32, 32)), False),
], ids=["small_planes", "one_sample", "all_taps_live", "large_planes"])  # fmt: skip
def test_order_of_planes(changes: dict, by_depth: bool) -> None:
    assert depths(R3D.replace(**changes), 128)[0] is by_depth
