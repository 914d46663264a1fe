"""The hopper engine's kernel for narrow layers, emulated (gluon_emulator.py), or on a GPU of its own."""

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
from triton_conv3d.engines.base import Config
from triton_conv3d.problem import Problem

NARROW = dict(batch=2, in_channels=24, out_channels=40, input_size=(3, 5, 7), padding=(1,) * 6, dtype="float16")
GEOMETRIES = {
    "ragged": dict(),
    "two_segments": dict(input_size=(2, 3, 67), batch=1, kernel_size=(2, 2, 3)),
    "even_kernel": dict(kernel_size=(2, 4, 2), padding=(0, 1, 3, 0, 2, 1)),
    "padding_above_kernel": dict(kernel_size=(2, 1, 1), padding=(2, 3, 3, 2, 0, 1), input_size=(2, 1, 3)),
    "dilated": dict(dilation=(2, 1, 3), padding=(2, 2, 1, 1, 3, 4), input_size=(5, 4, 7), batch=1),
    "dilated_along_h": dict(dilation=(1, 3, 1), kernel_size=(2, 2, 1), input_size=(3, 8, 4), batch=1),
    "taps_along_d": dict(kernel_size=(5, 1, 1), padding=(2, 2, 0, 0, 0, 0), input_size=(9, 3, 4)),
    "taps_along_h": dict(kernel_size=(1, 3, 2), padding=(0, 0, 2, 0, 1, 0), input_size=(5, 9, 4)),
    "groups": dict(in_channels=32, out_channels=64, groups=2, batch=1, kernel_size=(2, 2, 2)),
    "half_a_line_of_two_samples": dict(batch=3, input_size=(2, 3, 29), kernel_size=(2, 2, 2)),
    "widest": dict(in_channels=64, out_channels=64, batch=1, kernel_size=(2, 2, 2)),
    "parts_of_channels": dict(in_channels=48, out_channels=48, batch=1, kernel_size=(2, 2, 1)),
    "parts_of_filters": dict(in_channels=16, out_channels=80, batch=1, kernel_size=(1, 3, 2)),
    "many_channels": dict(in_channels=88, out_channels=16, batch=1, kernel_size=(2, 1, 2)),
    "many_filters": dict(in_channels=16, out_channels=184, batch=1, kernel_size=(2, 2, 1), input_size=(2, 3, 5)),
    "groups_in_parts": dict(in_channels=96, out_channels=192, groups=2, batch=1, kernel_size=(1, 2, 1), input_size=(2, 3, 5)),
    "deep_padding": dict(input_size=(2, 3, 5), padding=(3, 2, 1, 1, 0, 1), kernel_size=(4, 2, 2), batch=1),
    "padding_alone": dict(input_size=(3, 2, 5), padding=(9, 7, 0, 1, 0, 0), kernel_size=(2, 2, 1), dilation=(3, 1, 1), batch=1),
    "dilation_without_taps": dict(dilation=(4, 3, 1), kernel_size=(1, 2, 2), padding=(0, 0, 2, 1, 1, 0)),
    "one_pixel": dict(in_channels=8, out_channels=8, input_size=(1, 1, 1)),
}
STRIDED = {
    "twos": dict(stride=(2, 2, 2)),
    "twos_without_padding": dict(stride=(2, 2, 2), padding=(0,) * 6, input_size=(4, 5, 7)),
    "blocks": dict(stride=(2, 2, 2), kernel_size=(2, 2, 2), padding=(0,) * 6, input_size=(6, 4, 70)),
    "twos_and_an_even_kernel": dict(stride=(2, 2, 2), kernel_size=(2, 4, 2), padding=(0, 1, 3, 0, 2, 1), input_size=(4, 8, 9)),
    "along_d": dict(stride=(2, 1, 1), kernel_size=(3, 2, 1), padding=(1, 1, 0, 0, 0, 0), input_size=(8, 5, 7)),
    "along_h": dict(stride=(1, 3, 1), kernel_size=(2, 4, 1), padding=(0, 0, 2, 0, 0, 0), input_size=(3, 16, 7)),
    "along_w": dict(stride=(1, 1, 2), kernel_size=(2, 1, 5), padding=(0, 0, 0, 0, 3, 1), batch=1, input_size=(3, 4, 135)),
    "dilated": dict(stride=(2, 2, 2), dilation=(2, 1, 3), padding=(2, 2, 1, 1, 3, 4), input_size=(7, 6, 9), batch=1),
    "dilated_along_h": dict(stride=(1, 2, 1), dilation=(1, 3, 1), kernel_size=(2, 2, 1), input_size=(3, 14, 4), batch=1),
    "padding_above_kernel": dict(stride=(2, 1, 2), kernel_size=(2, 1, 1), padding=(3, 3, 3, 2, 0, 1), input_size=(2, 1, 6)),
    "groups": dict(stride=(2, 2, 2), in_channels=32, out_channels=64, groups=2, batch=1, kernel_size=(2, 2, 2)),
    "parts_of_channels": dict(stride=(1, 2, 2), in_channels=48, out_channels=48, batch=1, kernel_size=(2, 2, 3)),
}


def offered(problem: Problem) -> list[Config]:
    return [config for config in ENGINE.configs(problem) if isinstance(config, ENGINE.LineConfig)]


@RUNS
@pytest.mark.parametrize("pass_", ["forward", "dgrad"])
@pytest.mark.parametrize("name", GEOMETRIES)
def test_geometries(name: str, pass_: str, few_programs) -> None:  # noqa: F811
    """In one pass as offered, in the other in small tiles by a ring that is gone round often."""
    case = Case(pass_, **{**NARROW, **GEOMETRIES[name]}, bias=pass_ == "forward")
    config = offered(case.geometry())[0]
    if list(GEOMETRIES).index(name) % 2 == (pass_ == "dgrad"):
        case, config = case.replace(channels_last=False), dataclasses.replace(config, planes=2, lines=2, num_stages=3)
    run(case, engine(name), config)


@RUNS
@pytest.mark.parametrize("name", STRIDED)
def test_strides(name: str, few_programs) -> None:  # noqa: F811
    """The same of forward with a stride."""
    case = Case("forward", **{**NARROW, **STRIDED[name]}, bias=True)
    largest = offered(case.geometry())[0]
    run(case, engine(name), largest)
    small = dataclasses.replace(largest, planes=2, lines=2, num_stages=largest.replace(planes=2).span(case.geometry()) + 1)
    run(case.replace(channels_last=False), engine(name), small)


@RUNS
@pytest.mark.parametrize("channels_last", [True, False], ids=["ndhwc", "ncdhw"])
def test_epilogue(channels_last: bool, few_programs) -> None:  # noqa: F811
    """Bias, residual and activation; equal bits in another order of turns."""
    case = Case("forward", **NARROW, bias=True, residual="cropped", activation="silu", channels_last=channels_last)
    case = case.replace(layouts=("aligned_channel_slice", "contiguous"), exact=False)
    config = offered(case.geometry())[-1]
    assert torch.equal(run(case, engine("first"), config), run(case, engine("second"), config))


@pytest.mark.skipif(DEVICE.type == "cuda", reason="in the emulator")
@needs_gluon
@pytest.mark.parametrize("kernel", [(1, 2, 1), (2, 1, 1), (2, 1, 2)], ids=str)
def test_every_order_of_turns(kernel: tuple, few_programs) -> None:  # noqa: F811
    """Nobody waits forever, nothing is overwritten or read too early, by none of the two consumers."""
    case = Case("forward", in_channels=16, out_channels=16, input_size=(5, 2, 4), kernel_size=kernel, dtype="float16")
    problem, operands = make(case)
    programs = []
    config = dataclasses.replace(offered(problem)[-1], planes=2, lines=2, num_stages=3)
    with emulating(programs=programs):
        ENGINE.launch(problem, operands, config)
    for program in programs:
        assert len(program.traces) == 3 and explore(program.traces) > sum(map(len, program.traces))


@needs_gluon
@pytest.mark.parametrize("changes, number", [
    ({}, 2), (dict(pass_="dgrad"), 2), (dict(groups=2), 2), (dict(in_channels=64, out_channels=64), 1),
    (dict(dilation=(1, 2, 3)), 2), (dict(kernel_size=(1, 7, 7)), 1), (dict(kernel_size=(1, 1, 3)), 0),
    (dict(in_channels=72), 2), (dict(out_channels=128), 0), (dict(stride=(1, 1, 2)), 2), (dict(pass_="wgrad"), 0),
    (dict(stride=(2, 2, 2)), 1), (dict(stride=(2, 2, 2), pass_="dgrad"), 0), (dict(stride=(1, 1, 3)), 0),
    (dict(stride=(4, 1, 1)), 0),
    (dict(stride=(1, 2, 2), kernel_size=(3, 1, 1)), 0), (dict(stride=(1, 1, 2), input_size=(32, 32, 1)), 0),
    (dict(groups=2, in_channels=96), 2), (dict(groups=2, in_channels=160), 0), (dict(activation="gelu"), 1),
    (dict(activation="tanh", in_channels=64, out_channels=64), 1), (dict(dilation=(40, 1, 1), padding=(40, 40, 1, 1, 1, 1)), 0),
    (dict(dilation=(18, 1, 1), kernel_size=(1, 3, 3)), 2), (dict(activation="gelu", out_channels=96), 0),
], ids=str)  # fmt: skip
def test_who_is_offered_lines(changes: dict, number: int) -> None:
    base = dict(pass_="forward", batch=2, in_channels=32, out_channels=32, input_size=(32,) * 3, kernel_size=(3,) * 3)
    problem = Problem(**{**base, "padding": (1,) * 6, "dtype": "bfloat16", "arch": "sm_90", **changes})
    assert ENGINE.supports(problem) is None and len(offered(problem)) == number
    for config in offered(problem):
        if problem.kernel_size[0] == 1:  # its lines need no taps between them
            assert config.tiles(problem)[1] == -(-problem.result_shape[2] // config.planes)
        assert config.num_stages > config.span(problem) and ENGINE.work(problem, config).shared_bytes <= 232_448


@needs_gluon
@pytest.mark.parametrize("channels, computed, line", [
    ((8, 8), 16, 16), ((24, 40), 48, 32), ((48, 48), 48, 48), ((64, 64), 64, 32), ((72, 72), 80, 32), ((96, 96), 96, 32),
    ((128, 64), 64, 32), ((64, 160), 80, 32), ((192, 192), 96, 32), ((320, 320), 80, 32), ((32, 448), 64, 32),
], ids=str)  # fmt: skip
def test_channels_of_a_tile(channels: tuple, computed: int, line: int) -> None:
    """Hardly more than there are, in at most two powers of two."""
    into, out = channels
    problem = Problem("forward", 1, into, out, (16,) * 3, (3,) * 3, padding=(1,) * 6, dtype="bfloat16", arch="sm_90")
    assert offered(problem)
    for config in offered(problem):
        assert (config.block_n, config.block_k) == (computed, line)
        assert all(sum(parts) == of and len(parts) <= 2 for parts, of in zip(config.parts, (computed, line), strict=True))


@needs_gluon
@pytest.mark.parametrize("batch, width, samples", [(1, 96, 1), (2, 96, 2), (2, 128, 2), (3, 128, 1), (3, 32, 2)], ids=str)
def test_samples_of_a_line(batch: int, width: int, samples: int) -> None:
    """Two, where half a line of each covers hardly more than whole ones."""
    size = (16, 16, width)
    problem = Problem("forward", batch, 32, 32, size, (3,) * 3, padding=(1,) * 6, dtype="bfloat16", arch="sm_90")
    assert {config.samples for config in offered(problem)} == {samples}
    for config in offered(problem):
        n, *_, w = config.tiles(problem)
        assert n * samples >= batch and w * 64 // samples >= width and n * w * 64 <= 1.34 * batch * width


@RUNS
@pytest.mark.parametrize("pass_", ["forward", "dgrad"])
@pytest.mark.parametrize("size, padding", [(3, (2, 2)), (2, (3, 0)), (5, (0, 2))], ids=str)
def test_a_tap_is_read_by_the_tiles_that_meet_it_alone(size: int, padding: tuple, pass_: str, few_programs) -> None:  # noqa: F811
    """With NaN for the weights of one tap along depth all pixels of those tiles are NaN, and none of the others."""
    case = Case(pass_, **{**NARROW, "input_size": (size, 3, 4), "padding": (*padding, 0, 1, 0, 0), "kernel_size": (3, 2, 1)})
    problem, operands = make(case)
    config = dataclasses.replace(offered(problem)[-1], planes=2, lines=2, num_stages=3)
    read = "grad" if pass_ == "dgrad" else "input"
    operands = operands._replace(**{read: torch.ones_like(getattr(operands, read))})
    for tap in range(3):
        weight = torch.zeros_like(operands.weight)
        weight[:, :, tap] = 1
        meets = reference.compute(problem, operands._replace(weight=weight)).amax((0, 1, 3, 4)) > 0
        tiles = [bool(tile.any()) for tile in meets.split(2)]
        weight[:, :, tap] = math.nan
        found = engine("first").launch(problem, operands._replace(weight=weight), config).isnan()
        assert [[bool(tile.any()), bool(tile.all())] for tile in found.split(2, 2)] == [[met, met] for met in tiles]


@needs_gluon
def test_bytes_by_design() -> None:
    """Of nnU-Net's top layer: lines and taps that the copies ask for, against those of a brick for every tap."""
    size = (128, 128, 128)
    problem = Problem("forward", 2, 32, 32, size, (3, 3, 3), padding=(1,) * 6, dtype="bfloat16", arch="sm_90")
    read = {}
    for config in ENGINE.configs(problem):
        work = ENGINE.work(problem, config)
        read[type(config)] = min(read.get(type(config), 1e12), work.programs * work.iterations * work.bytes_read)
    lines, bricks = read[ENGINE.LineConfig], read[ENGINE.BrickConfig]
    tiles, line, taps = 2 * 32 * 32 * 2, 64 * 32 * 2, 27 * 32 * 32 * 2
    assert lines == tiles * (6 * 6 * 3 * line + taps)
    assert bricks > 3.5 * lines


@needs_gluon
def test_bytes_of_a_stride() -> None:
    """Of nnU-Net's first downsampling: 5 x 9 lines for each tap along W and 2 x 4 lines of the result, and the weight once."""
    size = (128, 128, 128)
    problem = Problem("forward", 2, 32, 64, size, (3,) * 3, (2,) * 3, (1,) * 6, dtype="bfloat16", arch="sm_90")
    (config,) = offered(problem)
    work = ENGINE.work(problem, config)
    assert (config.planes, config.lines) == (2, 4)
    tiles, line, taps = 32 * 16 * 2, 64 * 32 * 2, 27 * 32 * 64 * 2
    assert work.programs * work.iterations * work.bytes_read == tiles * (5 * 9 * 3 * line + taps)


@needs_gluon
@pytest.mark.parametrize("pass_", ["forward", "dgrad"])
def test_memory_is_for_copies_alone(pass_: str) -> None:
    problem = Problem(
        pass_, 1, 32, 32, (8, 8, 8), (3, 3, 3), dtype="float16", arch="sm_90", layouts=("contiguous",) * 3
    )
    assert offered(problem)
    side = 8 if pass_ == "forward" else 6  # of the volume that is read, in 32 channels of 2 bytes; besides, the weight
    for config in offered(problem):
        needed = ENGINE.memory(problem, config)
        assert (needed.workspace, needed.copies) == (0, 64 * (side**3 + 32 * 27))
