"""The engine for few channels: fuzzed over what is its own, every config, and what it leaves to others."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from cases import Case, run, seeds
from folded_cases import draw

from triton_conv3d import engines
from triton_conv3d.engines.base import CHAIN, format_strides
from triton_conv3d.problem import PASSES, Problem


@pytest.mark.parametrize("seed", seeds(60, 300))
@pytest.mark.parametrize("pass_", PASSES)
def test_fuzz(pass_: str, seed: int) -> None:
    case, config = draw(pass_, seed)
    run(case, "folded", config)


LARGE = Problem("forward", 2, 3, 512, (64, 64, 64), (3, 3, 3), arch="sm_90", device="any")  # takes every tile


@pytest.mark.parametrize("pass_, config", [
    pytest.param(pass_, config, id=f"{pass_}-{config}")
    for pass_ in PASSES
    for config in engines.get("folded").configs(LARGE.replace(pass_="wgrad" if pass_ == "wgrad" else "forward"))
    if getattr(config, "splits", 1) == 1
])  # fmt: skip
def test_every_config_is_exact(pass_: str, config) -> None:
    first, head = dict(in_channels=3, out_channels=37), dict(in_channels=37, out_channels=3)
    channels = head if pass_ == "dgrad" else first
    for shape in (
        dict(batch=2, input_size=(3, 7, 5), kernel_size=(3, 2, 3), padding=(1, 1, 0, 1, 1, 0)),
        dict(input_size=(1, 1, 300), kernel_size=(1, 1, 2)),
        dict(input_size=(5, 5, 5), kernel_size=(5, 1, 2), padding=(4, 4, 0, 0, 0, 0), groups=1, dilation=(2, 1, 3)),
    ):
        run(Case(pass_, dtype="float16", **channels, **shape), "folded", config)
    if pass_ == "wgrad":
        run(Case(pass_, dtype="float16", **channels, **shape), "folded", dataclasses.replace(config, splits=3))
        run(Case(pass_, dtype="float16", channels_last=False, **head, **shape), "folded", config)


@pytest.mark.parametrize("changes, reason", [
    (dict(in_channels=9), "9 channels"),
    (dict(pass_="wgrad", in_channels=9, out_channels=9), "9 channels that taps gather"),
    (dict(pass_="wgrad", in_channels=32, stride=(1, 2, 1), dilation=(1, 2, 1), out_channels=3), "32 channels that taps gather"),
    (dict(pass_="wgrad", in_channels=32, groups=2, out_channels=6), "16 channels that taps gather"),
    (dict(pass_="dgrad", out_channels=3, stride=(64, 64, 64), kernel_size=(1, 1, 1)), "parity classes"),
    (dict(pass_="dgrad", in_channels=6, out_channels=3, groups=3, stride=(64, 64, 8)), "of 32768 parity classes"),
    (dict(groups=3, out_channels=3), "depthwise"),
    (dict(dtype="float64"), "float64"),
    (dict(batch=0), "nothing to multiply"),
    (dict(arch="cpu"), "TRITON_INTERPRET"),
], ids=lambda value: str(value) if isinstance(value, dict) else "")  # fmt: skip
def test_what_it_leaves_to_others(changes: dict, reason: str) -> None:
    problem = LARGE.replace(arch="interpreter")
    assert engines.get("folded").supports(problem) is None
    assert reason in engines.get("folded").supports(problem.replace(**changes))


@pytest.mark.parametrize("pass_", PASSES)
def test_nothing_is_copied_for_a_layout(pass_: str) -> None:
    problem = LARGE.replace(pass_=pass_, in_channels=3, out_channels=8, layouts=("contiguous", "strided", "contiguous"))
    assert engines.get("folded").memory(problem, engines.get("folded").configs(problem)[0]).copies == 0


def test_a_head_reads_its_input_once() -> None:
    """wgrad of 128 channels and 3 filters, whose 27 taps are one tile of 81 rows."""
    folded = engines.get("folded")
    problem = LARGE.replace(pass_="wgrad", in_channels=128, out_channels=3, padding=(1,) * 6)
    wide = next(c for c in folded.configs(problem) if (c.block_m, c.block_n, c.splits) == (128, 64, 1))
    work = folded.work(problem, wide)
    read = work.programs * work.iterations * work.bytes_read / (problem.itemsize * math.prod(problem.input_shape))
    assert read == pytest.approx((128 + 64) / 64)  # and of the gathered gradient as much as its tile holds


def test_long_sums_of_wgrad_join_a_total() -> None:
    case = Case("wgrad", in_channels=1, out_channels=2, input_size=(17, 31, 32), kernel_size=(1, 1, 1), dtype="float16")
    tile = dataclasses.replace(engines.get("folded").configs(LARGE.replace(pass_="wgrad"))[-1], block_k=256)
    assert case.geometry().pixels > CHAIN
    for splits in (1, 3):
        run(case, "folded", dataclasses.replace(tile, splits=splits))


def test_wgrad_counts_filters_in_vectors() -> None:
    """Of an integer Triton knows only whether 16 divides it: 24 filters are vectors of 8 because the kernel says so."""
    folded, problem = engines.get("folded"), LARGE.replace(pass_="wgrad", out_channels=24)
    x, grad = (format_strides(s, torch.channels_last_3d) for s in (problem.input_shape, problem.output_shape))
    _, arguments, options = folded._wgrad_launch(problem, folded.configs(problem)[0], x, grad, True)
    assert (options["G_UNIT"], arguments[-2]) == (8, 3)
