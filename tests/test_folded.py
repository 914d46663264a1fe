"""The engine for few channels: fuzzed over what is its own, every config, and what it leaves to others."""

from __future__ import annotations

import dataclasses
import random
import sys
from pathlib import Path
from types import ModuleType

import planting
import pytest
from cases import DTYPES, LAYOUTS, PRECISIONS, Case, run
from guarded import guards, overflow_checked, run_large

from triton_conv3d import engines
from triton_conv3d.engines.implicit_gemm.configs import CHAIN
from triton_conv3d.problem import PASSES, Problem

SEEDS = 60


def draw(pass_: str, seed: int) -> tuple[Case, object]:
    """A case with 1 to 8 channels to sum over, and a config of few programs."""
    rng = random.Random(f"folded-{pass_}-{seed}")
    folded = engines.get("folded")

    def triple(*choices: int) -> tuple[int, int, int]:
        return tuple(rng.choice(choices) for _ in range(3))

    while True:
        groups = rng.choice((1, 1, 1, 2, 3))
        gather = pass_ == "dgrad"
        few, many = groups * rng.choice((1, 1, 2, 3, 4, 5, 8)), groups * rng.choice((2, 3, 8, 16, 17, 40))
        dtype = rng.choice(DTYPES)
        case = Case(
            pass_, batch=rng.choice((1, 2)), in_channels=many if gather else few,
            out_channels=few if gather else many, input_size=triple(1, 2, 3, 4, 5, 6),
            kernel_size=triple(1, 2, 3, 3, 5), stride=triple(1, 1, 2, 3),
            padding=tuple(rng.choice((0, 1, 1, 2)) for _ in range(6)), dilation=triple(1, 1, 2), groups=groups,
            bias=pass_ == "forward" and rng.random() < 0.5, dtype=dtype,
            precision=rng.choice(PRECISIONS) if dtype == "float32" else "ieee",
            layouts=(rng.choice(tuple(LAYOUTS)), rng.choice(tuple(LAYOUTS))), channels_last=rng.random() < 0.5,
            exact=seed % 2 == 0, seed=seed,
        )  # fmt: skip
        problem = case.geometry()
        if min(problem.output_size) >= 1 and folded.supports(problem) is None:
            splits = rng.choice((1, 2, 5))
            offers = [dataclasses.replace(c, splits=splits) if pass_ == "wgrad" else c for c in folded.configs(problem)]
            works = [folded.work(problem, c) for c in offers]
            cheap = [c for c, w in zip(offers, works, strict=True) if w.programs <= 12 and w.programs * w.iterations <= 60]
            if cheap:
                return case, rng.choice(cheap)


@pytest.mark.parametrize("seed", range(SEEDS))
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
    channels = dict(in_channels=37, out_channels=3) if pass_ == "dgrad" else dict(in_channels=3, out_channels=37)
    for shape in (
        dict(batch=2, input_size=(3, 7, 5), kernel_size=(3, 2, 3), padding=(1, 1, 0, 1, 1, 0)),
        dict(input_size=(1, 1, 300), kernel_size=(1, 1, 2)),
        dict(input_size=(5, 5, 5), kernel_size=(5, 1, 2), padding=(4, 4, 0, 0, 0, 0), groups=1, dilation=(2, 1, 3)),
    ):
        run(Case(pass_, dtype="float16", **channels, **shape), "folded", config)
    if pass_ == "wgrad":
        run(Case(pass_, dtype="float16", **channels, **shape), "folded", dataclasses.replace(config, splits=3))


@pytest.mark.parametrize("changes, reason", [
    (dict(in_channels=9), "9 channels"),
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


def test_long_sums_of_wgrad_join_a_total() -> None:
    case = Case("wgrad", in_channels=1, out_channels=2, input_size=(17, 31, 32), kernel_size=(1, 1, 1), dtype="float16")
    tile = dataclasses.replace(engines.get("folded").configs(LARGE.replace(pass_="wgrad"))[-1], block_k=256)
    assert case.geometry().pixels > CHAIN
    for splits in (1, 3):
        run(case, "folded", dataclasses.replace(tile, splits=splits))


KERNELS, HOST = "kernels.py", "__init__.py"
FAULTS = {
    "rows_off": (KERNELS, "in_rows = m < sample * batch", "in_rows = m >= 0"),
    "filters_off": (KERNELS, "in_q = q < produced", "in_q = q >= 0"),
    "reduction_off": (KERNELS, "needed = tl.where(in_r, needed, -1)", "needed = tl.where(in_r, needed, 0)"),
    "one_dimension_checked": (KERNELS, "(one << tw) | (one << (KERNEL_W + th)) |", "(one << tw) |"),
    "tap_order": (KERNELS, "th = r // (REDUCED * KERNEL_W) % KERNEL_H", "th = r // (REDUCED * KERNEL_H) % KERNEL_H"),
    "channel_first": (KERNELS, "channel = r % REDUCED", "channel = r // (KERNEL_D * KERNEL_H * KERNEL_W)"),
    "group_of_input": (KERNELS, "x_pixels += group.to(INDEX) * REDUCED * x_strides[1]", "x_pixels += group * 0"),
    "group_of_weight": (KERNELS, "+ group.to(INDEX) * w_strides[5]", ""),
    "group_of_bias": (KERNELS, "bias_ptr + group * produced + q", "bias_ptr + q"),
    "padding_at_the_end": (HOST, "rows = problem.padding[::2]", "rows = problem.padding[1::2]"),
    "dgrad_forward": (HOST, "tuple(-d // math.gcd(s, d) for", "tuple(d // math.gcd(s, d) for"),
    "dgrad_class_order": (KERNELS, "index_h = group // stride[2] % stride[1]", "index_h = group // stride[1] % stride[1]"),
    "dgrad_taps_of_a_class": (KERNELS, "in_r = in_r & (td < taps_d) & (th < taps_h) & (tw < taps_w)", "in_r = in_r"),
    "dgrad_first_tap": (KERNELS, "tw = tap_w + tw * tap_step[2]", "tw = tw * tap_step[2]"),
    "dgrad_next_tap": (KERNELS, "th = tap_h + th * tap_step[1]", "th = tap_h + th"),
    "dgrad_group_of_class": (KERNELS, "group // (stride[2] * stride[1] * stride[0])", "group // (stride[2] * stride[1])"),
    "dgrad_positions": (KERNELS, "jw = jw * stride[2] + index_w", "jw = jw * stride[2]"),
    "roles_of_channels": (HOST, "channels = (w_strides[1], w_strides[0])", "channels = w_strides[:2]"),
    "wgrad_rows_off": (KERNELS, "mask=(r < COLUMNS)[:, None] & in_q[None, :]", "mask=(r >= 0)[:, None] & in_q[None, :]"),
    "wgrad_filters_off": (KERNELS, "in_g = in_p[:, None] & in_q[None, :]", "in_g = in_p[:, None] & (q >= 0)[None, :]"),
    "wgrad_pixels_off": (KERNELS, "in_p = p < end", "in_p = p >= 0"),
    "wgrad_x_beyond_the_pixels": (KERNELS, "outside = tl.where(in_p, ~valid, -1)", "outside = ~valid"),
    "wgrad_lines": (KERNELS, "planes = lines // y_size[1]", "planes = lines // y_size[0]"),
    "wgrad_group_of_input": (KERNELS, "x_taps = (group * REDUCED + channel)", "x_taps = channel"),
    "wgrad_group_of_gradient": (KERNELS, "g_filters = (group * produced + q)", "g_filters = q"),
    "wgrad_split_short": (KERNELS, "tl.minimum(begin + share, pixels)", "tl.minimum(begin + share, pixels - 1)"),
    "wgrad_order_of_result": (HOST, "(columns, problem.group_in, 1) if last", "(columns, problem.group_in, 1) if split"),
    "wgrad_dilation": (KERNELS, "tw.to(INDEX) * dilation[2] * x_strides[4]", "tw.to(INDEX) * dilation[1] * x_strides[4]"),
    "last_step_only": (KERNELS, "acc = dot(w, x, acc, PRECISION, UPCAST)", "acc = dot(w, x, acc * 0, PRECISION, UPCAST)"),
    "offsets_in_32_bits": (HOST, "tl.int64 if problem.index64 else tl.int32,", "tl.int32,"),
}  # fmt: skip


def battery(engine: ModuleType, fault: str) -> None:
    """Raises, or kills the process, if the engine is wrong."""
    for pass_ in sorted(PASSES, key=lambda pass_: not fault.startswith(pass_)):
        for seed in range(12):
            case, config = draw(pass_, seed)
            with guards(at_end=seed % 3 > 0) as fresh:
                run(case, engine, engine.configs(case.geometry())[-1] if seed % 2 and pass_ != "wgrad" else config, fresh)
        with overflow_checked():
            run_large(engine, pass_, "batch")


@pytest.fixture(scope="module")
def outcomes() -> dict[str, str]:
    return planting.outcomes(Path(__file__).name)


def test_between_pages_that_fault(outcomes: dict[str, str]) -> None:
    assert outcomes[planting.SOUND] == "survived"


@pytest.mark.parametrize("name", FAULTS)
def test_planted_fault_is_caught(name: str, outcomes: dict[str, str]) -> None:
    planting.check(outcomes[name])


if __name__ == "__main__":
    planting.try_all("folded", FAULTS, battery, sys.argv[1:])
