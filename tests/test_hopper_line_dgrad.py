"""dgrad with a stride by lines of the hopper engine, emulated (gluon_emulator.py), or on a GPU of its own."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch
from cases import DEVICE, Case, make, run
from test_hopper import ENGINE, RUNS, engine, few_programs, needs_gluon  # noqa: F401  a fixture among them

pytest.importorskip("triton")
from every_order import explore
from gluon_emulator import emulating

from triton_conv3d import reference
from triton_conv3d.engines.hopper.class_configs import axes, first_cells
from triton_conv3d.engines.hopper.classes import class_of, shifts, sizes, tap_of, taps_of
from triton_conv3d.problem import Problem

TWOS = (2, 2, 2)
SMALL = dict(batch=2, in_channels=24, out_channels=40, input_size=(3, 5, 9), stride=TWOS, padding=(1,) * 6, dtype="float16")
GEOMETRIES = {
    "ragged": dict(),
    "no_padding": dict(padding=(0,) * 6),
    "blocks": dict(kernel_size=TWOS, padding=(0,) * 6, input_size=(4, 6, 8)),
    "one_tap": dict(kernel_size=(1, 1, 1), padding=(0,) * 6),
    "one_tap_off_the_first": dict(kernel_size=(1, 1, 1), padding=(1, 0, 1, 1, 0, 0)),
    "even_kernel": dict(kernel_size=(2, 4, 2), padding=(0, 1, 3, 0, 2, 1)),
    "padding_above_kernel": dict(kernel_size=(2, 1, 3), padding=(2, 3, 3, 2, 5, 4)),
    "planes_alone": dict(stride=(2, 1, 1), kernel_size=(3, 1, 1), padding=(1, 1, 0, 0, 0, 0)),
    "flat": dict(stride=(1, 2, 2), kernel_size=(1, 3, 3), padding=(0, 0, 1, 0, 1, 2)),
    "taps_along_d_without_a_stride": dict(stride=(1, 2, 2), input_size=(2, 5, 7)),
    "along_h_alone": dict(stride=(1, 2, 1), kernel_size=(1, 4, 2), padding=(0, 0, 2, 1, 0, 1)),
    "stride_above_kernel": dict(stride=(3, 1, 4), kernel_size=(2, 2, 3), padding=(0, 1, 0, 0, 1, 2), batch=1),
    "fours": dict(stride=(1, 4, 4), kernel_size=(1, 4, 4), padding=(0,) * 6, in_channels=16, input_size=(2, 8, 11)),
    "groups": dict(in_channels=32, out_channels=64, groups=2, kernel_size=(2, 2, 3), batch=1),
    "tiles_of_channels": dict(in_channels=72, kernel_size=(2, 3, 2), batch=1),
    "blocks_of_filters": dict(out_channels=136, kernel_size=(3, 2, 2), batch=1),
    "two_lines_of_a_row": dict(input_size=(2, 3, 140), batch=1, kernel_size=(2, 2, 3)),
    "one_pixel": dict(input_size=(1, 1, 1), in_channels=8, out_channels=8),
}
# (taps, stride, padding) of one dimension
ALONG = [(3, 2, 1), (3, 2, 0), (2, 2, 0), (1, 2, 0), (1, 2, 1), (4, 2, 1), (5, 2, 2), (3, 3, 1), (2, 3, 5), (1, 1, 0),
         (3, 1, 1), (3, 4, 2), (7, 2, 3)]  # fmt: skip


def offered(problem: Problem) -> list:
    return [config for config in ENGINE.configs(problem) if isinstance(config, ENGINE.LineDgradConfig)]


@RUNS
@pytest.mark.parametrize("name", GEOMETRIES)
def test_geometries(name: str, few_programs) -> None:  # noqa: F811
    """As offered; every other one also in small blocks by a ring that is gone round often, with lines of other cells."""
    case = Case("dgrad", **{**SMALL, **GEOMETRIES[name]})
    largest = offered(case.geometry())[0]
    run(case, engine(name), largest)
    if list(GEOMETRIES).index(name) % 2:
        return
    line = dict(line_n=2, line_d=2, line_w=16) if len(name) % 2 else dict(line_n=1, line_d=1, line_w=64)
    config = dataclasses.replace(largest, **line, lines=4 if len(name) % 3 else 2, block_n=16, block_k=16, num_stages=2)
    if not config.stays(case.geometry()):
        config = dataclasses.replace(config, w_stages=1 + len(name) % 2)
    run(case.replace(channels_last=False), engine(name), config)


@RUNS
@pytest.mark.parametrize("filters, stays", [(16, True), (32, False)])
@pytest.mark.parametrize("kernel", [TWOS, (2, 3, 3)], ids=str)
def test_taps_that_stay(kernel: tuple, filters: int, stays: bool, few_programs) -> None:  # noqa: F811
    """Equal bits in any order of turns, whether taps are loaded once or for every block of filters."""
    case = Case("dgrad", **{**SMALL, "out_channels": filters, "kernel_size": kernel, "exact": False, "input_size": (3, 9, 20)})
    config = dataclasses.replace(offered(case.geometry())[0], block_k=16, block_n=32, num_stages=3)
    assert config.stays(case.geometry()) == stays
    assert torch.equal(run(case, engine("first"), config), run(case, engine("second"), config))


@pytest.mark.skipif(DEVICE.type == "cuda", reason="in the emulator")
@needs_gluon
@pytest.mark.parametrize("filters, w_stages", [(16, 1), (32, 1), (32, 2)], ids=str)
def test_every_order_of_turns(filters: int, w_stages: int, few_programs) -> None:  # noqa: F811
    """Nobody waits forever, nothing is overwritten or read too early, by none of the two consumers."""
    sizes_ = dict(input_size=(1, 6, 2), stride=(1, 2, 1), kernel_size=(1, 3, 1), padding=(0, 0, 1, 1, 0, 0), batch=2)
    problem, operands = make(Case("dgrad", in_channels=16, out_channels=filters, dtype="float16", **sizes_))
    programs = []
    config = ENGINE.LineDgradConfig(1, 1, 64, 2, 16, 16, 2, w_stages)
    with emulating(programs=programs):
        ENGINE.launch(problem, operands, config)
    for program in programs:
        assert len(program.traces) == 3 and explore(program.traces) > sum(map(len, program.traces))


@RUNS
def test_layouts(few_programs) -> None:  # noqa: F811
    """Views are read as they are if their channels are dense, others are copied."""
    for layout in ("contiguous", "aligned_channel_slice", "expanded_batch"):
        case = Case("dgrad", **{**SMALL, "exact": False, "layouts": (layout, layout), "kernel_size": (1, 2, 2)})
        run(case, engine(), offered(case.geometry())[0])


@RUNS
def test_a_pixel_is_met_through_its_taps_alone(few_programs) -> None:  # noqa: F811
    """Of a single pixel of the gradient, what reaches the input's gradient are the taps that it was read through."""
    problem, operands = make(Case("dgrad", **SMALL))
    for at in ((0, 0, 0, 0), (1, 1, 2, 4), (0, 1, 1, 3)):
        n, d, h, w = at
        alone = operands._replace(grad=torch.zeros_like(operands.grad))
        alone.grad[n, :, d, h, w] = 1
        found, wanted = engine(at).launch(problem, alone, offered(problem)[0]), reference.compute(problem, alone)
        torch.testing.assert_close(found, wanted.to(found.dtype), rtol=0, atol=0)


@pytest.mark.parametrize("taps, stride, pad", ALONG, ids=str)
def test_classes_meet_what_the_definition_says(taps: int, stride: int, pad: int) -> None:
    """By the kernel's own arithmetic: every tap of every pixel of the input once, at the gradient that it was read for."""
    size = 12
    grads = (size + 2 * pad - taps) // stride + 1
    problem = Problem("dgrad", 1, 16, 16, (1, size, 1), (1, taps, 1), stride=(1, stride, 1), padding=(0, 0, pad, pad, 0, 0),
                      dtype="bfloat16", arch="sm_90")  # fmt: skip
    every, start = axes(problem), first_cells(problem)
    _, number = shifts(every[1])
    found = {}
    for cell, index, h in itertools.product(range(-(-size // stride)), range(stride), range(number)):
        tap, pixel = tap_of(index, 0, h, every), stride * cell + index
        if tap is not None and pixel < size and 0 <= cell + start[1] + h < grads:
            assert (pixel, tap) not in found
            found[pixel, tap] = cell + start[1] + h
    wanted = {(o * stride + t - pad, t): o for o in range(grads) for t in range(taps) if 0 <= o * stride + t - pad < size}
    assert found == wanted


@pytest.mark.parametrize("along", [ALONG[:3], ALONG[3:6], ALONG[6:9], ALONG[9:12]], ids=str)
def test_every_tap_belongs_to_one_step(along: list) -> None:
    every = tuple((taps, stride, pad % stride) for taps, stride, pad in along)
    taps, classes, steps = sizes(every)
    assert sorted(itertools.chain(*(taps_of(step, every) for step in range(steps)))) == list(range(taps))
    assert all(taps_of(step, every) for step in range(steps))
    assert {class_of(i, every) for i in range(classes)} == set(itertools.product(*(range(stride) for _, stride, _ in along)))


@needs_gluon
@pytest.mark.parametrize("changes, lines, channels, filters", [
    ({}, 2, 32, 64), (dict(kernel_size=TWOS), 2, 32, 64), (dict(in_channels=16), 4, 16, 32), (dict(in_channels=48), 4, 16, 32),
    (dict(in_channels=128, out_channels=256), 2, 32, 64), (dict(stride=(1, 2, 2), in_channels=64), 2, 64, 32),
    (dict(stride=(2, 1, 1), kernel_size=(3, 1, 1), in_channels=192), 4, 64, 32), (dict(out_channels=24), 2, 32, 32),
    (dict(stride=(2, 1, 1), kernel_size=(3, 1, 1), in_channels=128), 2, 128, 64), (dict(groups=2, in_channels=64), 2, 32, 32),
    (dict(stride=(1, 4, 4)), 2, 16, 64),
], ids=str)  # fmt: skip
def test_tiles(changes: dict, lines: int, channels: int, filters: int) -> None:
    """The sums of all classes fit into registers, lines of some steps and the taps into shared memory."""
    base = dict(pass_="dgrad", batch=2, in_channels=32, out_channels=64, input_size=(32,) * 3, kernel_size=(3,) * 3)
    problem = Problem(**{**base, "stride": TWOS, "padding": (1,) * 6, "dtype": "bfloat16", "arch": "sm_90", **changes})
    (config,) = offered(problem)
    assert (config.lines, config.block_n, config.block_k) == (lines, channels, filters)
    assert math.prod(problem.stride) * config.block_n * config.lines // 2 <= 256 and config.num_stages >= 4
    assert ENGINE.work(problem, config).shared_bytes <= 232_448


@needs_gluon
@pytest.mark.parametrize("changes", [
    dict(pass_="forward"), dict(pass_="wgrad"), dict(stride=(1, 1, 1)), dict(stride=(3, 3, 3)), dict(dilation=(1, 2, 1)),
    dict(kernel_size=(7, 7, 7)),
], ids=str)  # fmt: skip
def test_who_is_not_offered_lines(changes: dict) -> None:
    base = dict(pass_="dgrad", batch=2, in_channels=32, out_channels=64, input_size=(32,) * 3, kernel_size=(3,) * 3)
    problem = Problem(**{**base, "stride": TWOS, "padding": (1,) * 6, "dtype": "bfloat16", "arch": "sm_90", **changes})
    assert ENGINE.supports(problem) is None and not offered(problem)


@needs_gluon
def test_bytes_by_design() -> None:
    """Of nnU-Net's first downsampling: what lines ask for, against bricks, which read the gradient for each tap."""
    problem = Problem("dgrad", 2, 32, 64, (128,) * 3, (3,) * 3, TWOS, (1,) * 6, dtype="bfloat16", arch="sm_90")
    read = {}
    for config in ENGINE.configs(problem):
        work = ENGINE.work(problem, config)
        read[type(config)] = min(read.get(type(config), 1e12), work.programs * work.iterations * work.bytes_read)
    lines = 2 * 16 * 64 * 4  # of 4 planes and 16 cells along W
    assert read[ENGINE.LineDgradConfig] == lines // 2 * 4 * 3 * 64 * 64 * 2  # of 2 lines 4 shifts along D and W, 3 lines each
    assert read[ENGINE.BrickConfig] > 4 * read[ENGINE.LineDgradConfig]
