"""Blocks of a strided input gradient: their geometry, and engine ``folded`` by blocks, exact at every edge."""

from __future__ import annotations

import itertools
import json
from functools import partial

import pytest
from blocks_cases import GEOMETRIES, TENSOR_CORES, case, zeros_met
from cases import LAYOUTS, Case, check_footprint, make, run
from guarded import guards

from triton_conv3d import engines
from triton_conv3d.engines.blocks import blocks_of
from triton_conv3d.problem import Problem
from triton_conv3d.tuning.plan import offered
from triton_conv3d.tuning.select import ranking

pytest.importorskip("triton")
FOLDED = engines.get("folded")
# KernelBench's transposed convolutions of 3 to 16 channels.
THREE = Problem(
    "dgrad", 128, 16, 3, (31, 63, 63), (3, 3, 3), (2, 2, 2), (1,) * 6, dtype="float32", precision="tf32",
    device="NVIDIA H200", arch="sm_90",
)  # fmt: skip


def few(name: str, **more) -> Case:
    return case(name, **{"out_channels": 3, **more})


def by_blocks(problem: Problem) -> list:
    return [config for config in FOLDED.configs(problem) if getattr(config, "blocks", False)]


def line(size: int, kernel: int, stride: int, before: int, after: int, dilation: int) -> Problem:
    """A problem that is one only along W."""
    return Problem(
        "dgrad", 1, 1, 1, (1, 1, size), (1, 1, kernel), (1, 1, stride), (0, 0, 0, 0, before, after), (1, 1, dilation)
    )


def test_every_block_meets_what_the_definition_says() -> None:
    """(position, output, tap) of all blocks, where there is such a position, output and tap, are those of the convolution."""
    sides = itertools.product(range(1, 8), range(1, 6), range(1, 5), range(4), range(3), (1, 2))
    for size, kernel, stride, before, after, dilation in sides:
        problem = line(size, kernel, stride, before, after, dilation)
        outputs = problem.output_size[2]
        if outputs < 1 or min(kernel, stride, dilation) > 1:
            continue
        of = blocks_of(problem)
        met, count, low, front, shift, last = (value[2] for value in vars(of).values())
        step = dilation if stride == 1 else 1
        found, positions = set(), []
        for j, a in itertools.product(range(count), range(stride)):
            position = j * stride + a - shift
            inside = (j > 0 or a >= shift) and (j < count - 1 or a < last)  # as the kernel asks
            assert inside == (0 <= position < size)
            positions += [position] * inside
            taps = [(j + low - e * step, e * stride + a - front) for e in range(met)] if inside else []
            found |= {(position, o, t) for o, t in taps if 0 <= o < outputs and 0 <= t < kernel}
            assert all((t >= 0) == (e > 0 or a >= front) and t < kernel for e, (_, t) in enumerate(taps))
        everything = itertools.product(range(size), range(outputs), range(kernel))
        assert sorted(positions) == list(range(size)), problem
        assert found == {(i, o, t) for i, o, t in everything if i + before - t * dilation == o * stride}, problem


@pytest.mark.parametrize("channels, groups, channels_last", [(3, 1, True), (2, 2, False)])
@pytest.mark.parametrize("name", GEOMETRIES)
def test_every_edge(name: str, channels: int, groups: int, channels_last: bool) -> None:
    """Of odd channels and with groups, in both layouts; each in its turn in another type."""
    dtype, precision = TENSOR_CORES[(list(GEOMETRIES).index(name) + channels) % len(TENSOR_CORES)]
    problem = few(
        name, in_channels=channels * groups, out_channels=3 * groups, groups=groups, dtype=dtype, precision=precision,
        channels_last=channels_last,
    )  # fmt: skip
    run(problem, FOLDED, by_blocks(problem.geometry())[0])


@pytest.mark.parametrize("channels, channels_last", [(3, True), (8, False)])
@pytest.mark.parametrize("name", GEOMETRIES)
def test_every_edge_of_the_weight(name: str, channels: int, channels_last: bool) -> None:
    dtype, precision = TENSOR_CORES[(list(GEOMETRIES).index(name) + channels) % len(TENSOR_CORES)]
    of = few(
        name, pass_="wgrad", in_channels=channels, dtype=dtype, precision=precision, channels_last=channels_last,
        layouts=("channels_last" if channels_last else "contiguous",) * 2,
    )  # fmt: skip
    wide, *_ = by_blocks(of.geometry())
    run(of, FOLDED, wide)
    run(of, FOLDED, wide.replace(splits=3))


@pytest.mark.parametrize("channels", (1, 5, 16), ids="{}_channels".format)
def test_every_config_is_exact(channels: int) -> None:
    of = few("even", in_channels=channels)
    for i, config in enumerate(by_blocks(of.geometry())):
        run(few("odd", in_channels=channels, seed=i), FOLDED, config)
        run(of.replace(seed=i), FOLDED, config)
    for config in by_blocks(of.replace(pass_="wgrad").geometry()):
        run(of.replace(pass_="wgrad"), FOLDED, config.replace(splits=1))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str) -> None:
    of = few("odd", layouts=(layout, layout), channels_last=False, exact=False)
    run(of, FOLDED, by_blocks(of.geometry())[-1])


@pytest.mark.parametrize("at_end", (False, True), ids=("start", "end"))
def test_between_pages_that_fault(at_end: bool) -> None:
    """In this process: what reads outside kills it."""
    with guards(at_end) as fresh:
        for name in ("odd", "beyond", "dilated"):
            run(few(name), FOLDED, by_blocks(few(name).geometry())[0], fresh)


@pytest.mark.parametrize("which", (0, 1), ids=("weight", "gradient"))
@pytest.mark.parametrize("name", ("odd", "dilated"))
def test_one_nan_touches_only_its_footprint(name: str, which: int) -> None:
    problem, operands = make(few(name))
    assert getattr(FOLDED.configs(problem)[0], "blocks", False)
    check_footprint(FOLDED, problem, operands, which, partial(zeros_met, problem, which))


@pytest.mark.parametrize("changes, takes", [
    (dict(), True),
    (dict(in_channels=100), True),
    (dict(out_channels=9), False),
    (dict(groups=2, in_channels=32, out_channels=6), False),
    (dict(dilation=(1, 1, 2)), False),
    (dict(precision="ieee"), False),
], ids=lambda value: str(value) if isinstance(value, dict) else "")  # fmt: skip
def test_what_wgrad_takes_by_blocks(changes: dict, takes: bool) -> None:
    problem = THREE.replace(pass_="wgrad", **changes)
    assert (FOLDED.supports(problem) is None) == takes
    assert not takes or by_blocks(problem) == list(FOLDED.configs(problem))  # by pixels there are too many channels
    narrow = problem.replace(in_channels=8 * problem.groups)
    assert FOLDED.supports(narrow) is None and bool(by_blocks(narrow)) == takes


@pytest.mark.parametrize("changes, columns", [
    (dict(), {128, 64, 32}),
    (dict(in_channels=3), {32, 16}),
    (dict(in_channels=64), {128}),
    (dict(in_channels=65), set()),
    (dict(stride=(1, 2, 2)), {64, 32}),
    (dict(in_channels=32, groups=2, out_channels=6), {128, 64, 32}),
    (dict(stride=(1, 1, 1)), set()),
    (dict(precision="ieee"), set()),
    (dict(dilation=(2, 1, 1)), set()),
    (dict(stride=(1, 2, 2), dilation=(2, 1, 1)), {64, 32}),
    (dict(pass_="forward", in_channels=3, out_channels=16), set()),
], ids=lambda value: str(value) if isinstance(value, dict) else "")  # fmt: skip
def test_tiles_hold_two_classes_and_are_half_full(changes: dict, columns: set) -> None:
    offers = by_blocks(THREE.replace(**changes))
    assert {config.block_n for config in offers} == columns
    for config in offers:
        assert offered(THREE.replace(**changes), "folded", json.loads(json.dumps(config.to_dict()))) == config


def test_the_gradient_is_read_once_for_all_classes() -> None:
    """24 blocked taps and channels are one step of 32; a tile has the columns of all 8 classes."""
    config = by_blocks(THREE)[0]
    work = FOLDED.work(THREE, config)
    assert work.iterations == 1 and work.programs == 128 * 16 * 32 * 32 / config.block_m
    first = next((engine.NAME, best) for _, engine, best in ranking(THREE, measuring=True) if engine.NAME != "aten")
    assert first == ("folded", config)


def test_wgrad_reads_its_input_once() -> None:
    problem = THREE.replace(pass_="wgrad")
    work = FOLDED.work(problem, FOLDED.configs(problem)[0])
    blocks = 128 * 16 * 32 * 32
    assert work.programs * work.iterations * 32 == blocks and work.bytes_read == 4 * 32 * (32 + 128)
    first = next((e.NAME, getattr(c, "blocks", False)) for _, e, c in ranking(problem, measuring=True) if e.NAME != "aten")
    assert first == ("folded", True)
