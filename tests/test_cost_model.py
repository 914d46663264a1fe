"""The cost model: each thing that costs time makes a prediction longer, and what is free does not."""

from __future__ import annotations

import dataclasses
import math
import types

import pytest

from triton_conv3d.engines import aten
from triton_conv3d.engines.base import Config, Memory, Work
from triton_conv3d.problem import Problem
from triton_conv3d.tuning import cost_model

PROBLEM = Problem("forward", 1, 64, 64, (8, 8, 8), (3, 3, 3), padding=(1,) * 6, device="NVIDIA H200", arch="sm_90")
WORK = Work(132, 27, 2.0 * 128 * 128 * 64, 32_768.0, 32_768.0, 8, 131_072)  # one program on each multiprocessor


def seconds(problem=PROBLEM, **changes):
    engine = types.SimpleNamespace(NAME="ours", work=lambda *_: dataclasses.replace(WORK, **changes))
    return cost_model.predict(problem, engine, Config())


@pytest.mark.parametrize(
    "changes",
    [
        {"programs": 133},
        {"iterations": 28},
        {"flops": WORK.flops * 2},
        {"bytes_read": WORK.bytes_read * 4},
        {"bytes_written": WORK.bytes_written * 2},
        {"extra_bytes": 1e6},
        {"launches": 2},
        {"tensor_cores": False},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_more_work_takes_longer(changes):
    assert seconds(**changes) > seconds()


def test_a_second_wave_costs_as_much_as_the_first():
    fixed = WORK.programs * WORK.bytes_written / cost_model.rates(PROBLEM).bandwidth
    one, two = seconds(), seconds(programs=2 * WORK.programs)
    launch = seconds(iterations=0) - fixed - cost_model._PROLOGUE
    assert two - 2 * fixed - launch == pytest.approx(2 * (one - fixed - launch))


def test_idle_multiprocessors_help_nobody():
    products_only = {"bytes_read": 0.0, "bytes_written": 0.0, "flops": 1e8}
    assert seconds(programs=1, **products_only) == seconds(programs=132, **products_only) < seconds(
        programs=133, **products_only
    )


def test_small_programs_share_a_multiprocessor():
    short = {"flops": 1e3, "bytes_read": 1e2, "programs": 2 * WORK.programs}  # bound by latency
    assert seconds(**short, shared_bytes=16_384, num_warps=4) < 0.7 * seconds(**short)


@pytest.mark.parametrize(
    "device, known",
    [
        ("NVIDIA H200", "H200"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("AMD Instinct MI300X", "MI300X"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
    ],
)
def test_rates_by_name(device, known):
    assert cost_model.rates(PROBLEM.replace(device=device)) is cost_model.RATES[known]
    assert cost_model.rates(PROBLEM.replace(device="something new")).units > 0


@pytest.mark.parametrize("slower, faster", [("ieee", "tf32x3"), ("tf32x3", "tf32")])
def test_precisions(slower, faster):
    big = PROBLEM.replace(dtype="float32", input_size=(64, 64, 64))
    times = [cost_model.predict(big.replace(precision=p), aten, aten.AtenConfig()) for p in (slower, faster)]
    assert times[0] > times[1]


def test_copies_and_other_layouts_are_paid_by_torchs_own():
    big = PROBLEM.replace(input_size=(64, 64, 64))
    contiguous = big.replace(layouts=("contiguous",) * 3)
    plain, copied = aten.AtenConfig(), aten.AtenConfig(channels_last=True)
    assert cost_model.predict(big, aten, plain) < cost_model.predict(contiguous, aten, copied)
    assert cost_model.predict(contiguous, aten, copied) < cost_model.predict(contiguous, aten, plain)


def test_the_interpreter_wants_few_programs():
    here = PROBLEM.replace(arch="interpreter", device="cpu")
    assert seconds(here, programs=2) < seconds(here, programs=3)
    assert seconds(here, flops=1e12) == seconds(here)


def test_ties_keep_their_order():
    engines_ = [types.SimpleNamespace(NAME=n, work=lambda *_: WORK, memory=lambda *_: Memory()) for n in "ab"]
    ranked = cost_model.rank(PROBLEM, [(engine, Config()) for engine in engines_])
    assert [engine.NAME for _, engine, _ in ranked] == ["a", "b"] and math.isfinite(ranked[0][0])
