"""The hopper engine by im2col copies, emulated (gluon_emulator.py), or on a GPU of its own; and who is offered them."""

from __future__ import annotations

import dataclasses
import importlib.util
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from cases import Case, run
from test_hopper import ENGINE, RUNS, engine, few_programs, needs_gluon  # noqa: F401  a fixture among them
from test_tma import BASE, GEOMETRIES, RAGGED

pytest.importorskip("triton")
from gluon_emulator import Im2colDescriptor

from triton_conv3d.engines import tma
from triton_conv3d.engines.hopper import gluon
from triton_conv3d.engines.hopper.configs import _im2col_fits as im2col_fits
from triton_conv3d.engines.tma.geometry import pixels
from triton_conv3d.problem import Problem, live_depth

needs_im2col = pytest.mark.skipif(not gluon.IM2COL, reason="this Triton has no im2col copies")
BEYOND = {  # kernels larger than planes, and the farthest that a descriptor reaches
    "kernel_above_the_plane": dict(input_size=(2, 2, 3), kernel_size=(2, 5, 4), padding=(1, 0, 2, 2, 3, 2)),
    "farthest_corners": dict(input_size=(1, 2, 3), kernel_size=(1, 2, 2), dilation=(1, 31, 17), padding=(0, 0, 16, 15, 16, 1)),
    "padding_alone": dict(input_size=(2, 3, 5), kernel_size=(2, 1, 3), stride=(8, 1, 2), padding=(2, 0, 0, 0, 1, 1)),
    "longest_steps": dict(input_size=(5, 11, 18), kernel_size=(2, 3, 2), stride=(3, 8, 7), padding=(1, 0, 0, 6, 5, 1), batch=5),
}  # fmt: skip


def rows(**changes):
    """Tiles of 16 pixels, for many of them in a small volume, and a ring that is gone round often."""
    return dataclasses.replace(ENGINE.Im2colConfig(16, 64, 16, 3), **changes)


def offered(problem: Problem) -> list:
    return [config for config in ENGINE.configs(problem) if isinstance(config, ENGINE.Im2colConfig)]


@RUNS
@needs_im2col
@pytest.mark.parametrize("pass_, name", [
    (pass_, name) for name, changes in (GEOMETRIES | BEYOND).items() for pass_ in ("forward", "dgrad")
    if pass_ == "forward" or "stride" not in changes
])  # fmt: skip
def test_geometries(pass_: str, name: str, few_programs) -> None:  # noqa: F811
    case = Case(pass_, **{**RAGGED, **(GEOMETRIES | BEYOND)[name]}, bias=pass_ == "forward")
    run(case, engine(name), rows())


@RUNS
@needs_im2col
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("channels_last", [True, False], ids=["ndhwc", "ncdhw"])
def test_epilogue(channels_last: bool, splits: int, few_programs) -> None:  # noqa: F811
    """Bias, residual and activation of a tile that is written in parts, and of split sums; operands that are views."""
    case = Case("forward", **{**RAGGED, "kernel_size": (1, 2, 2), "layouts": ("every_second", "contiguous")}, bias=True)
    case = case.replace(residual="cropped", activation="silu", channels_last=channels_last, exact=False)
    run(case, engine(), rows(pixels=128, block_n=128, splits=splits))


@RUNS
@needs_im2col
@pytest.mark.long
@pytest.mark.parametrize("pass_", ["forward", "dgrad"])
def test_random_geometries(pass_: str, few_programs) -> None:  # noqa: F811
    """Whatever a descriptor reaches, in every size of a tile, whole and split."""
    rng, found = random.Random(pass_), 0
    while found < 300:
        sizes = {
            "batch": rng.randint(1, 4), "input_size": _each(rng, *range(1, 10)),
            "kernel_size": _each(rng, 1, 1, 2, 3, 5), "dilation": _each(rng, 1, 1, 2, 4),
            "stride": (1, 1, 1) if pass_ == "dgrad" else _each(rng, 1, 2, 3, 8),
            "padding": tuple(rng.choice((0, 0, 1, 2, 4, 16)) for _ in range(6)), "channels_last": rng.random() < 0.5,
        }  # fmt: skip
        case = Case(pass_, **{**RAGGED, **sizes, "in_channels": 24, "out_channels": 16}, seed=found)
        if min(case.geometry().output_size) > 0 and im2col_fits(case.geometry()):
            run(case, engine(found), rows(pixels=rng.choice((16, 32, 64)), splits=rng.choice((1, 1, 2, 7))))
            found += 1


def _each(rng: random.Random, *choices: int) -> tuple[int, int, int]:
    return tuple(rng.choice(choices) for _ in range(3))


PLANE = dict(shape=[2, 1, 4, 4, 8], lower=[0, 0, 0], upper=[0, 0, 0], at=(0, 0, 0, 0, 0), offsets=(0, 0, 0))
PADDED = dict(lower=[0, -1, -1], upper=[0, -1, -1])


@pytest.mark.parametrize("changes, expected", [
    (dict(), [*range(1, 17)]),
    (dict(at=(0, 0, -1, -1, 0), **PADDED), [0, 0, 0, 0, 0, 1, 2, 3, 0, 5, 6, 7, 0, 9, 10, 11]),
    (dict(at=(0, 0, -1, -1, 0), offsets=(0, 1, 1), **PADDED), [*range(1, 17)]),
    (dict(at=(0, 0, 1, 3, 0)), [*range(8, 24)]),
    (dict(at=(0, 0, 1, 2, 0), **PADDED), [7, 0, 9, 10, 11, 0, 0, 0, 0, 0, 17, 18, 19, 0, 21, 22]),
    (dict(at=(1, 0, 1, 2, 0)), [*range(23, 33), 0, 0, 0, 0, 0, 0]),
    (dict(at=(-1, 0, 3, 3, 0)), [0, *range(1, 16)]),
    (dict(steps=[1, 2, 3], at=(0, 0, -1, 2, 0), offsets=(0, 1, 1), **PADDED), [4, 9, 12, 17, 20, 25, 28, *[0] * 9]),
], ids=["whole", "padded", "offset", "samples", "padded_samples", "beyond_the_end", "before_the_start", "steps"])  # fmt: skip
def test_the_emulated_copy(changes: dict, expected: list[int]) -> None:
    """The first five are those that Triton's tutorial of im2col mode checks on a GPU, with a depth of 1."""
    asked = SimpleNamespace(**{**PLANE, "steps": [1, 1, 1], **changes})
    count = np.prod(asked.shape[:-1])
    tensor = torch.arange(1.0, count + 1).repeat_interleave(8).half().view(asked.shape)
    described = SimpleNamespace(
        base=tensor, shape=asked.shape, strides=tensor.stride(), block_shape=[16, 16], layout=SimpleNamespace(rank=2),
        element_strides=[1, *asked.steps, 1], pixel_box_lower_corner=asked.lower, pixel_box_upper_corner=asked.upper,
    )  # fmt: skip
    found = Im2colDescriptor(described).read(asked.at, asked.offsets)
    assert found[:, 0].tolist() == found[:, 7].tolist() == expected and not found[:, 8:].any()


RAGGED_PLANES = {**BASE, "batch": 8, "in_channels": 256, "out_channels": 256, "input_size": (6, 13, 13)}


@needs_gluon
@pytest.mark.parametrize("changes, number", [
    ({}, 6), (dict(pass_="dgrad"), 6), (dict(stride=(2, 8, 8)), 6), (dict(dilation=(2, 3, 3), padding=(4, 0, 3, 3, 2, 4)), 6),
    (dict(groups=2), 6), (dict(input_size=(6, 16, 16)), 0), (dict(pass_="wgrad"), 0), (dict(stride=(1, 9, 1)), 0),
    (dict(pass_="dgrad", stride=(1, 1, 2)), 0), (dict(padding=(1, 1, 17, 1, 1, 1)), 0),
    (dict(kernel_size=(1, 1, 19), padding=(0,) * 5 + (1,), input_size=(6, 13, 31)), 0),
    (dict(kernel_size=(1, 1, 33), padding=(0,) * 4 + (16, 16), input_size=(6, 13, 13)), 0),
], ids=str)  # fmt: skip
def test_who_is_offered_them(changes: dict, number: int) -> None:
    """Where they save pixels, and within the limits of a descriptor."""
    problem = Problem(**{**RAGGED_PLANES, **changes})
    assert ENGINE.supports(problem) is None
    assert len(offered(problem)) == number * gluon.IM2COL
    for config in offered(problem):
        work, by_bricks = ENGINE.work(problem, config), tma.work(problem, ENGINE.configs(problem)[0])
        if config == offered(problem)[0]:
            assert work.programs * work.iterations < by_bricks.programs * by_bricks.iterations
        assert ENGINE.memory(problem, config).workspace <= 64 * 2**20


@needs_gluon
@pytest.mark.parametrize("size", [16, 48, 64])
def test_taps_that_tiles_walk(size: int) -> None:
    """As counted tile by tile, of tiles that begin within planes."""
    problem = Problem(
        **{**BASE, "batch": 3, "input_size": (4, 5, 3), "stride": (2, 1, 1), "padding": (3, 1, 1, 1, 1, 1)}
    )
    samples, depth, height, width = pixels(problem)
    walked = tiles = 0
    for first in range(0, samples * depth * height * width, size):
        planes = range(
            first // (samples * height * width), min((first + size - 1) // (samples * height * width) + 1, depth)
        )
        walked += sum(any(0 <= d * 2 + tap - 3 < 4 for d in planes) for tap in range(3))
        tiles += 1
    assert live_depth(problem, size, samples * height * width) == walked / (3 * tiles) < 1


@pytest.mark.parametrize("lacking", ["async_load_im2col", "TensorDescriptorIm2Col"])
@needs_gluon
def test_a_triton_without_them(lacking: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything else is offered as ever."""
    from triton.experimental.gluon.language.nvidia.hopper import tma as copies
    from triton.experimental.gluon.nvidia import hopper as described

    problem = Problem(**RAGGED_PLANES)
    others = [config for config in ENGINE.configs(problem) if config not in offered(problem)]
    for place in (copies, described):
        monkeypatch.delattr(place, lacking, raising=False)
    spec = importlib.util.spec_from_file_location(f"{gluon.__name__}_without_im2col", gluon.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert not module.IM2COL and module.MISSING is None
    monkeypatch.setattr(gluon, "IM2COL", module.IM2COL)
    assert list(ENGINE.configs(problem)) == others
