"""Bricks and views of the tma engine against the definition, exhaustively on small grids, in plain Python."""

from __future__ import annotations

import itertools
import math

import pytest

pytest.importorskip("triton")
import torch
import triton
import triton.language as tl

from triton_conv3d.engines.implicit_gemm.taps import parity_class
from triton_conv3d.engines.tma.geometry import MOST_VIEWS, bricks, counts, flat, pixels, views
from triton_conv3d.engines.tma.kernels import _digits
from triton_conv3d.problem import Problem, interpreted, live_depth

AXES = [
    axis
    for axis in itertools.product(range(1, 7), range(1, 5), range(1, 5), range(1, 5), range(4), range(3))
    if axis[0] + axis[4] + axis[5] > axis[3] * (axis[1] - 1)
]  # (size, kernel, stride, dilation, padding before, padding after) with an output


def axis_problem(pass_: str, dim: int, size: int, kernel: int, stride: int, dilation: int, low: int, high: int):
    def triple(value: int, other: int = 1) -> tuple:
        return tuple(value if i == dim else other for i in range(3))

    padding = tuple(itertools.chain.from_iterable(zip(triple(low, 0), triple(high, 0), strict=True)))
    return Problem(pass_, 1, 8, 8, triple(size), triple(kernel), triple(stride), padding, triple(dilation))


@pytest.mark.parametrize("dim", range(3))
@pytest.mark.parametrize("extent", [1, 2])
def test_every_tap_is_read_once_and_where_the_definition_says(extent: int, dim: int) -> None:
    """Positions of the tensor for every output and tap; what no view reads lies outside for every output."""
    brick = tuple(extent if i == dim else 1 for i in range(-1, 3))
    for axis in AXES[dim::3]:
        size, kernel, stride, dilation, low, _ = axis
        problem = axis_problem("forward", dim, *axis)
        read = views(problem, brick)
        scale, step, tap_step, by = (t[dim] for t in (read.scale, read.step, read.tap_step, read.stride))
        assert scale == 1 or extent == 1, "pixels of a brick must be neighbours in the view"
        met = {}
        for view in read.views:
            for i in range(view.taps[dim]):
                tap = view.first[dim] + i * tap_step
                assert tap not in met and tap < kernel, axis
                met[tap] = (view, i)
        for tap, out in itertools.product(range(kernel), range(problem.output_size[dim])):
            expected = out * stride + tap * dilation - low
            if tap not in met:
                assert not 0 <= expected < size, axis
                continue
            view, i = met[tap]
            at = out * scale + view.start[dim] + i * step
            assert view.offset[dim] + at * by == expected, axis
            assert (0 <= at < view.size[dim]) == (0 <= expected < size), axis


def test_views_of_three_dimensions_are_all_combinations() -> None:
    problem = Problem("wgrad", 1, 8, 8, (5, 6, 7), (3, 2, 3), (2, 1, 3), (1, 1, 0, 0, 2, 1), (1, 2, 1))
    read = views(problem, (1, 2, 2, 2))
    taps = [
        tuple(f + i * s for f, i, s in zip(view.first, index, read.tap_step, strict=True))
        for view in read.views
        for index in itertools.product(*map(range, view.taps))
    ]
    assert len(read.views) == 6 and sorted(taps) == list(itertools.product(range(3), range(2), range(3)))
    assert len(views(problem, (4, 1, 1, 1)).views) == 1


def test_bricks_cover_every_pixel_once() -> None:
    """As the kernels decode programs and pixels; powers of two, and of bearable waste where sizes are ragged."""
    digits = getattr(_digits, "fn", _digits)
    for size, batch in (((1, 1, 1), 1), ((2, 5, 3), 2), ((1, 7, 7), 3), ((3, 1, 9), 1)):
        problem = Problem("forward", batch, 8, 8, size, (1, 1, 1))
        for brick in bricks(problem, 16)[:6]:
            grid = counts(problem, brick)
            covered = [
                tuple(c * b + i for c, b, i in zip(digits(tile, grid), brick, digits(m, brick), strict=True))
                for tile in range(math.prod(grid))
                for m in range(math.prod(brick))
            ]
            inside = [p for p in covered if all(a < b for a, b in zip(p, pixels(problem), strict=True))]
            assert sorted(inside) == list(itertools.product(*map(range, pixels(problem))))


def test_flat_bricks_are_runs_of_memory() -> None:
    """Brick i is the pixels from i times its size on, and what of it lies outside is beyond the last pixel."""
    digits, found = getattr(_digits, "fn", _digits), 0
    for batch, size in itertools.product((1, 3), itertools.product((1, 2), (1, 2, 4, 6), (1, 4, 8, 12, 24))):
        problem = Problem("wgrad", batch, 8, 8, size, (1, 1, 1))
        sizes, all_pixels = pixels(problem), batch * math.prod(size)
        for brick in ((1, 1, 1, 8), (1, 1, 2, 4), (1, 2, 4, 1), (2, 4, 1, 1), (1, 2, 1, 4), (1, 2, 2, 4), (8, 1, 1, 1)):
            grid, run = counts(problem, brick), True
            for tile, m in itertools.product(range(math.prod(grid)), range(math.prod(brick))):
                n, d, h, w = (c * b + i for c, b, i in zip(digits(tile, grid), brick, digits(m, brick), strict=True))
                at = ((n * sizes[1] + d) * sizes[2] + h) * sizes[3] + w
                inside = n < sizes[0] and d < sizes[1] and h < sizes[2] and w < sizes[3]
                index = tile * math.prod(brick) + m
                run &= at == index if inside else index >= all_pixels
            assert flat(problem, brick) <= run, (sizes, brick)
            found += flat(problem, brick)
    assert found > 50


@pytest.mark.parametrize("size, batch, most", [
    ((4, 7, 7), 8, 1.15), ((1, 7, 7), 32, 1.15), ((21, 30, 52), 1, 1.15), ((21, 60, 104), 1, 1.1), ((16, 56, 56), 2, 1),
], ids=str)  # fmt: skip
@pytest.mark.parametrize("tile", [64, 128, 256])
def test_ragged_volumes_are_covered_tightly(tile: int, size: tuple, batch: int, most: float) -> None:
    problem = Problem("forward", batch, 128, 128, size, (3, 3, 3), padding=(1,) * 6)
    best = bricks(problem, tile)[0]
    assert math.prod(best) == tile and all(extent & (extent - 1) == 0 for extent in best)
    covered = math.prod(counts(problem, best)) * tile
    assert covered * live_depth(problem, best[1]) <= most * batch * math.prod(size), "but for taps that are left out"


@pytest.mark.parametrize("stride", [(2, 2, 2), (3, 3, 3), (1, 5, 4), (9, 9, 9)], ids=str)
def test_no_brick_needs_more_views_than_a_kernel_takes(stride: tuple) -> None:
    problem = Problem("forward", 1, 8, 8, (20, 20, 20), (9, 9, 9), stride)
    found = bricks(problem, 64)
    assert found and all(0 < len(views(problem, brick).views) <= MOST_VIEWS for brick in found)


@triton.jit
def _classes(axis_ptr, found_ptr, MOST: tl.constexpr):
    """parity_class of every (index, low, size, kernel, stride, dilation, tap_step) of a table, one after another."""
    for row in range(MOST):
        at = axis_ptr + row * 7
        taps, first, start, rows = parity_class(
            tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3), tl.load(at + 4), tl.load(at + 5), tl.load(at + 6)
        )  # fmt: skip
        tl.store(found_ptr + row * 4, taps)
        tl.store(found_ptr + row * 4 + 1, first)
        tl.store(found_ptr + row * 4 + 2, start)
        tl.store(found_ptr + row * 4 + 3, rows)


@pytest.mark.skipif(not interpreted(), reason="on the CPU, in the interpreter")
def test_parity_classes_of_a_strided_dgrad() -> None:
    """Position i = j * stride + index reads grad where the definition says, for exactly the taps that divide."""
    chosen = [axis for axis in AXES if axis[4] == axis[5]][::11]
    table = [
        (index, low, size, kernel, stride, dilation, stride // math.gcd(stride, dilation))
        for size, kernel, stride, dilation, low, _ in chosen
        for index in range(stride)
    ]
    found = torch.zeros(len(table), 4, dtype=torch.int32)
    _classes[(1,)](torch.tensor(table, dtype=torch.int32), found, len(table))
    for (index, low, size, kernel, stride, dilation, tap_step), (taps, first, start, rows) in zip(
        table, found.tolist(), strict=True
    ):
        problem = axis_problem("dgrad", 2, size, kernel, stride, dilation, low, low)
        step = views(problem, (1, 1, 1, 1)).step[2]
        positions = range(index, size, stride)
        assert rows == len(positions)
        for j, position in enumerate(positions):
            read = {first + i * tap_step: j + start + i * step for i in range(taps)}
            expected = {
                tap: (position + low - tap * dilation) // stride
                for tap in range(kernel)
                if (position + low - tap * dilation) % stride == 0
            }
            assert read == expected
