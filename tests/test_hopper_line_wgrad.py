"""wgrad by lines of the hopper engine, emulated (gluon_emulator.py), or on a GPU of its own."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from cases import DEVICE, Case, make, run
from test_hopper import ENGINE, RUNS, engine, few_programs, needs_gluon  # noqa: F401  a fixture among them

pytest.importorskip("triton")
from every_order import explore
from gluon_emulator import emulating

from triton_conv3d import reference
from triton_conv3d.problem import Problem

SMALL = dict(batch=2, in_channels=32, out_channels=40, input_size=(3, 5, 7), padding=(1,) * 6, dtype="float16")
GEOMETRIES = {
    "ragged": dict(),
    "two_lines_of_a_row": dict(input_size=(2, 3, 70), batch=1, kernel_size=(2, 2, 3)),
    "even_kernel": dict(kernel_size=(2, 4, 2), padding=(0, 1, 3, 0, 2, 1)),
    "padding_above_kernel": dict(kernel_size=(2, 2, 1), padding=(2, 3, 3, 2, 0, 1), input_size=(2, 2, 3)),
    "no_padding": dict(padding=(0,) * 6, kernel_size=(2, 3, 3)),
    "dilated": dict(dilation=(2, 1, 3), padding=(2, 2, 1, 1, 3, 4), input_size=(5, 4, 7), batch=1),
    "dilated_along_h": dict(dilation=(1, 3, 1), kernel_size=(2, 2, 1), input_size=(3, 8, 4), batch=1),
    "dilation_without_taps": dict(dilation=(4, 3, 1), kernel_size=(1, 2, 2), padding=(0, 0, 2, 1, 1, 0)),
    "taps_along_h": dict(kernel_size=(1, 5, 1), padding=(0, 0, 2, 0, 0, 0), input_size=(5, 9, 4)),
    "many_taps_along_h": dict(kernel_size=(1, 9, 1), padding=(0, 0, 4, 4, 0, 0), in_channels=16, out_channels=16),
    "groups": dict(in_channels=32, out_channels=48, groups=2, kernel_size=(2, 2, 1)),
    "groups_of_slices": dict(in_channels=192, out_channels=32, groups=2, kernel_size=(1, 2, 2), batch=1),
    "parts_of_filters": dict(in_channels=16, out_channels=80, batch=1, kernel_size=(1, 3, 2)),
    "tiles_of_filters": dict(in_channels=16, out_channels=184, batch=1, kernel_size=(2, 2, 1), input_size=(2, 3, 5)),
    "slices_of_32": dict(in_channels=96, out_channels=96, batch=1, kernel_size=(3, 2, 1)),
    "slices_of_64": dict(in_channels=64, out_channels=24, batch=1, kernel_size=(2, 3, 3)),
    "many_channels": dict(in_channels=336, out_channels=16, batch=1, kernel_size=(1, 2, 2)),
    "parts_of_a_column": dict(in_channels=16, out_channels=16, input_size=(2, 83, 3), kernel_size=(2, 3, 1)),
    "one_pixel": dict(in_channels=16, out_channels=8, input_size=(1, 1, 1)),
    "strided": dict(stride=(2, 2, 2), input_size=(5, 9, 11)),
    "strided_without_padding": dict(stride=(2, 2, 2), input_size=(5, 8, 11), padding=(0,) * 6),
    "blocks": dict(stride=(2, 2, 2), kernel_size=(2, 2, 2), input_size=(4, 6, 20), padding=(0,) * 6),
    "strided_along_h": dict(stride=(1, 2, 1), kernel_size=(2, 5, 1), padding=(0, 1, 3, 1, 0, 0)),
    "strided_along_d": dict(
        stride=(2, 1, 1), kernel_size=(3, 3, 1), padding=(1, 1, 1, 0, 0, 0), dilation=(3, 2, 1), input_size=(8, 7, 4)
    ),
    "strided_along_w": dict(
        stride=(1, 1, 4), kernel_size=(1, 2, 3), padding=(0, 0, 1, 0, 5, 2), dilation=(1, 1, 3), input_size=(2, 4, 90)
    ),
    "stride_above_kernel": dict(stride=(2, 3, 2), kernel_size=(1, 2, 1), padding=(1, 0, 2, 1, 0, 0), input_size=(5, 11, 9)),
    "strided_padding_above_kernel": dict(
        stride=(2, 2, 2), kernel_size=(2, 2, 3), padding=(2, 3, 3, 4, 5, 1), input_size=(2, 2, 3)
    ),
    "strided_groups": dict(
        stride=(2, 2, 2), in_channels=96, out_channels=64, groups=2, kernel_size=(2, 3, 2), input_size=(4, 7, 9)
    ),
    "strided_parts_of_a_column": dict(
        stride=(1, 2, 2), in_channels=16, out_channels=48, input_size=(2, 167, 4), kernel_size=(1, 3, 2), batch=1
    ),
}


def config_of(problem: Problem, **changes):
    """As offered for a larger volume, in few splits."""
    large = problem.replace(arch="sm_90", input_size=(32, 64, 64), dilation=(1, 1, 1), stride=(1, 1, 1))
    offered = next(config for config in ENGINE.configs(large) if isinstance(config, ENGINE.LineWgradConfig))
    return dataclasses.replace(offered, **{"splits": 2, **changes})


@pytest.fixture
def short_chains(monkeypatch):
    """Of two lines each."""
    from triton_conv3d.engines.hopper import host

    monkeypatch.setattr(host, "CHAIN", 128)
    host._line_wgrad_arguments.cache_clear()
    yield
    host._line_wgrad_arguments.cache_clear()


@RUNS
@pytest.mark.parametrize("name", GEOMETRIES)
def test_geometries(name: str, few_programs) -> None:  # noqa: F811
    """As offered; every other one also by a ring that is gone round often, with lines of other pixels and of other slices."""
    case = Case("wgrad", **{**SMALL, **GEOMETRIES[name]})
    run(case, engine(name), config_of(case.geometry()))
    if list(GEOMETRIES).index(name) % 2:
        return
    line = dict(line_n=2, line_d=2, line_w=16) if len(name) % 2 else dict(line_n=1, line_d=1, line_w=64)
    config = config_of(case.geometry(), **line, rows=(16, 32, 64)[len(name) % 3], num_stages=2, splits=3)
    run(case.replace(channels_last=False), engine(name), config)


@RUNS
@pytest.mark.parametrize("splits", [2, 3, 40])
@pytest.mark.parametrize("kernel", [(1, 2, 1), (2, 3, 2)], ids=str)
def test_chains_and_splits(kernel: tuple, splits: int, few_programs, short_chains) -> None:  # noqa: F811
    """What a chain sums up joins what those before it did; of 40 splits most are empty. Equal bits in any order of turns."""
    case = Case("wgrad", **{**SMALL, "input_size": (3, 35, 4), "kernel_size": kernel, "exact": splits == 3})
    config = config_of(case.geometry(), splits=splits)
    assert torch.equal(run(case, engine("first"), config), run(case, engine("second"), config))


@pytest.mark.skipif(DEVICE.type == "cuda", reason="in the emulator")
@needs_gluon
@pytest.mark.parametrize("kernel, height, stride", [((1, 2, 1), 3, 1), ((2, 3, 1), 2, 1), ((2, 3, 1), 5, 2)], ids=str)
def test_every_order_of_turns(kernel: tuple, height: int, stride: int, few_programs, short_chains) -> None:  # noqa: F811
    """Nobody waits forever, nothing is overwritten or read too early, by none of the two consumers."""
    sizes = dict(input_size=(1, height, 4), padding=(0, 1, 1, 0, 0, 0), kernel_size=kernel, stride=(1, stride, 1))
    problem, operands = make(Case("wgrad", in_channels=16, out_channels=16, dtype="float16", **sizes))
    programs = []
    with emulating(programs=programs):
        ENGINE.launch(problem, operands, config_of(problem, num_stages=2, rows=64))
    for program in programs:
        assert len(program.traces) == 3 and explore(program.traces) > sum(map(len, program.traces))


@RUNS
def test_layouts(few_programs) -> None:  # noqa: F811
    """Views are read as they are if their channels are dense, others are copied."""
    for layout in ("contiguous", "aligned_channel_slice", "expanded_batch"):
        case = Case("wgrad", **{**SMALL, "exact": False, "layouts": (layout, layout), "kernel_size": (1, 2, 2)})
        run(case, engine(), config_of(case.geometry()))


@RUNS
def test_a_pixel_is_met_through_its_taps_alone(few_programs) -> None:  # noqa: F811
    """Of a single pixel of the input, the gradients of its taps are those pixels of the gradient that it meets."""
    case = Case("wgrad", **{**SMALL, "kernel_size": (2, 3, 2)})
    problem, operands = make(case)
    config = config_of(problem)
    for n, d, h, w in ((0, 0, 0, 0), (1, 2, 4, 6), (0, 1, 2, 3)):
        alone = operands._replace(input=torch.zeros_like(operands.input))
        alone.input[n, :, d, h, w] = 1
        found, wanted = engine((n, d, h, w)).launch(problem, alone, config), reference.compute(problem, alone)
        torch.testing.assert_close(found, wanted.to(found.dtype), rtol=0, atol=0)


@needs_gluon
@pytest.mark.parametrize("changes, number", [
    ({}, 2), (dict(groups=2), 2), (dict(kernel_size=(1, 3, 3)), 2), (dict(kernel_size=(3, 1, 3)), 0),
    (dict(kernel_size=(1, 9, 1)), 2), (dict(kernel_size=(1, 11, 1)), 0), (dict(stride=(1, 1, 2)), 2),
    (dict(stride=(2, 2, 2)), 1), (dict(stride=(3, 1, 2)), 0), (dict(stride=(1, 33, 1)), 0), (dict(in_channels=24), 0),
    (dict(stride=(1, 2, 1), dilation=(1, 2, 1)), 0), (dict(stride=(2, 1, 2), input_size=(1, 128, 128)), 0),
    (dict(stride=(1, 3, 1)), 0), (dict(stride=(1, 2, 2), in_channels=16), 0),
    (dict(in_channels=16), 2), (dict(in_channels=512, out_channels=512), 1), (dict(input_size=(2, 2, 2)), 0),
    (dict(dilation=(1, 40, 1), padding=(1, 1, 40, 40, 1, 1)), 0), (dict(dilation=(40, 1, 1), padding=(40, 40, 1, 1, 1, 1)), 2),
    (dict(pass_="forward"), 0),
], ids=str)  # fmt: skip
def test_who_is_offered_lines(changes: dict, number: int) -> None:
    base = dict(pass_="wgrad", batch=2, in_channels=32, out_channels=32, input_size=(32,) * 3, kernel_size=(3,) * 3)
    problem = Problem(**{**base, "padding": (1,) * 6, "dtype": "bfloat16", "arch": "sm_90", **changes})
    offers = [config for config in ENGINE.configs(problem) if isinstance(config, ENGINE.LineWgradConfig)]
    assert ENGINE.supports(problem) is None and len(offers) == number
    for config in offers:
        work, needed = ENGINE.work(problem, config), ENGINE.memory(problem, config)
        assert config.splits > 1 and needed.workspace == 4 * config.splits * problem.result_elements <= 64 * 2**20
        assert work.shared_bytes <= 232_448 and config.num_stages >= 3


@needs_gluon
@pytest.mark.parametrize("channels, kernel, rows, filters", [
    ((16, 16), 3, 16, 16), ((32, 32), 3, 32, 32), ((48, 48), 3, 16, 48), ((64, 64), 3, 64, 64), ((96, 96), 3, 32, 96),
    ((80, 160), 3, 16, 80), ((128, 128), 3, 64, 64), ((192, 192), 3, 64, 96), ((320, 320), 3, 64, 80), ((64, 40), 3, 64, 48),
    ((64, 256), 2, 64, 128), ((64, 64), 4, 64, 64), ((64, 64), 5, 64, 32), ((64, 96), 5, 64, 48), ((64, 64), 7, 64, 32),
], ids=str)  # fmt: skip
def test_tiles(channels: tuple, kernel: int, rows: int, filters: int) -> None:
    """Those that cover hardly more slices and filters than there are."""
    into, out = channels
    sizes = dict(padding=(kernel // 2,) * 6, dtype="bfloat16", arch="sm_90")
    config = config_of(Problem("wgrad", 1, into, out, (32,) * 3, (kernel,) * 3, **sizes))
    assert (config.rows, config.block_n) == (rows, filters)
    assert sum(config.parts) == filters and len(config.parts) <= 2 and max(config.parts) <= 64


@needs_gluon
@pytest.mark.parametrize("size", [(1, 1, 4, 64), (2, 8, 128, 128), (1, 16, 56, 56), (4, 8, 8, 8), (3, 5, 9, 13)], ids=str)
@pytest.mark.parametrize("dilation", [1, 3])
def test_columns_cover_every_line_once(size: tuple, dilation: int) -> None:
    """By the kernel's own arithmetic, as far as there are pixels."""
    from triton_conv3d.engines.hopper.line_wgrad import column_at

    batch, *volume = size
    problem = Problem(
        "wgrad", batch, 16, 16, tuple(volume), (1, 2, 1), padding=(0, 0, dilation, 0, 0, 0), dilation=(1, dilation, 1),
        dtype="bfloat16", arch="sm_90",
    )  # fmt: skip
    config = config_of(problem)
    config = dataclasses.replace(config, line_n=1, line_d=1, line_w=64) if volume[2] > 16 else config
    columns, height = config.columns(problem)
    seen = set()
    for column in range(math.prod(columns)):
        d, w, h, n = column_at.fn(column, columns, config.line, height, (1, dilation, 1))
        for line in range(height):
            place = (n, d, h + line * dilation, w)
            assert place not in seen
            seen.add(place)
    by_n, by_d, by_w = config.line
    wanted = {
        (n, d, h, w) for n in range(0, batch, by_n) for d in range(0, volume[0], by_d) for h in range(volume[1])
        for w in range(0, volume[2], by_w)
    }  # fmt: skip
    assert wanted <= seen and config.steps(problem) == len(seen) <= len(wanted) * 2


@needs_gluon
def test_bytes_by_design() -> None:
    """Of Wan 2.1's last layers: what lines ask for, against bricks, which read both sides for each of the taps."""
    problem = Problem("wgrad", 1, 96, 96, (6, 482, 834), (3, 3, 3), dtype="bfloat16", arch="sm_90")
    read = {}
    for config in ENGINE.configs(problem):
        work = ENGINE.work(problem, config)
        read[type(config)] = min(read.get(type(config), 1e12), work.programs * work.iterations * work.bytes_read)
    lines = 4 * 13 * 482  # planes of the gradient, lines across
    assert read[ENGINE.LineWgradConfig] == pytest.approx(lines * 7 * (128 + 96) * 64 * 2, rel=0.02)
    assert read[ENGINE.BrickConfig] > 3 * read[ENGINE.LineWgradConfig]
