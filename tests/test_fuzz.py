"""Seeded fuzzing of every engine: shape, stride, dilation, padding, groups, dtype, layout, bias, config.

A failure prints its case and the command that runs it again. Its case then joins REGRESSIONS, so that it stays a test
when the fuzzer changes.
"""

from __future__ import annotations

import collections

import pytest
from cases import LAYOUTS, Case, engines_for, fuzz, fuzz_case, make, run, seeds

from triton_conv3d import engines
from triton_conv3d.engines.implicit_gemm.configs import exchanged
from triton_conv3d.problem import PASSES

IN_CI, LONG = 300, 3_000

# bfloat16 results were truncated; the bound for rounded tf32 took no account of expanded operands and of padding.
REGRESSIONS = [
    Case(
        "forward", in_channels=24, out_channels=40, input_size=(3, 5, 4), kernel_size=(1, 1, 1), stride=(5, 1, 2),
        padding=(0, 0, 1, 1, 1, 1), dilation=(1, 2, 3), dtype="bfloat16",
        layouts=("aligned_channel_slice", "channel_step"), channels_last=False, seed=8,
    ),
    Case(
        "dgrad", batch=3, in_channels=9, out_channels=9, input_size=(6, 7, 1), padding=(1, 1, 1, 1, 3, 3),
        dtype="bfloat16", layouts=("unaligned", "expanded_channels"), exact=False, seed=7,
    ),
    Case(
        "wgrad", in_channels=5, out_channels=33, input_size=(7, 2, 5), kernel_size=(3, 1, 1), stride=(1, 2, 2),
        padding=(0, 0, 0, 0, 1, 1), dilation=(2, 2, 2), dtype="bfloat16", layouts=("scalar", "channel_slice"),
        exact=False, seed=7,
    ),
    Case(
        "forward", batch=3, in_channels=16, out_channels=8, input_size=(1, 5, 1), kernel_size=(2, 1, 3),
        stride=(3, 3, 3), padding=(1, 1, 3, 3, 3, 3), dilation=(1, 1, 3), bias=True, precision="tf32",
        layouts=("expanded_channels", "expanded_channels"), channels_last=False, exact=False, seed=258,
    ),
    Case(
        "dgrad", batch=2, in_channels=24, out_channels=8, input_size=(6, 2, 1), kernel_size=(5, 2, 3),
        stride=(1, 1, 2), padding=(0, 1, 0, 1, 2, 0), precision="tf32",
        layouts=("aligned_channel_slice", "expanded_pixels"), exact=False, seed=190,
    ),
]  # fmt: skip


@pytest.mark.parametrize("seed", seeds(IN_CI, LONG))
@pytest.mark.parametrize("pass_", PASSES)
def test_fuzz(pass_: str, seed: int) -> None:
    fuzz(pass_, seed)


@pytest.mark.parametrize("case", REGRESSIONS, ids=lambda case: case.id)
def test_regression(case: Case) -> None:
    problem, _ = make(case)
    for name in engines_for(problem):
        for splits in (1, 3):
            config = engines.get(name).configs(problem)[-1]
            if splits > 1 and "splits" in vars(config):
                config = config.replace(splits=splits)
            run(case, name, config)


@pytest.mark.parametrize("pass_", PASSES)
def test_fuzzer_reaches_everything(pass_: str) -> None:
    """The drawn cases cover what the fuzzer promises; a fuzzer that shrinks unnoticed tests nothing."""
    seen: collections.Counter = collections.Counter()
    for seed in range(IN_CI):
        case, engine, config = fuzz_case(pass_, seed)
        problem = case.geometry()
        aligned = case.in_channels // case.groups % 8 == 0 and case.out_channels // case.groups % 8 == 0
        seen.update([case.dtype, case.precision, *case.layouts, engine])
        seen.update(["exact" if case.exact else "random", f"last={case.channels_last}", f"bias={case.bias}"])
        seen["odd channels"] += not aligned
        seen["strided"] += case.stride != (1, 1, 1)
        seen["dilated"] += case.dilation != (1, 1, 1)
        seen["asymmetric"] += case.padding[::2] != case.padding[1::2]
        seen["stride above kernel"] += any(s > k for s, k in zip(case.stride, case.kernel_size, strict=True))
        seen["kernel above input"] += any(k > i for k, i in zip(case.kernel_size, case.input_size, strict=True))
        seen["groups"] += case.groups > 1
        seen["depthwise"] += case.groups > 1 and problem.group_in == 1
        seen["split"] += getattr(config, "splits", 1) > 1
        seen["exchanged"] += engine == "implicit_gemm" and exchanged(problem)
    assert abs(seen["odd channels"] - IN_CI // 2) <= IN_CI // 20
    wanted = ["float16", "bfloat16", "float32", "ieee", "tf32", "tf32x3", *LAYOUTS, "implicit_gemm", "aten", "exact"]
    wanted += ["random", "last=True", "last=False", "strided", "dilated", "asymmetric", "stride above kernel"]
    wanted += ["kernel above input", "groups", "depthwise", "split"] + ["bias=True"] * (pass_ == "forward")
    wanted += ["exchanged"] * (pass_ == "wgrad")
    assert {name: seen[name] for name in wanted if seen[name] < 8} == {}


def test_a_seed_gives_one_case() -> None:
    assert fuzz_case("dgrad", 11) == fuzz_case("dgrad", 11)
    assert eval(repr(fuzz_case("dgrad", 11)[0])) == fuzz_case("dgrad", 11)[0]
