"""Channels that fill no vectors: exact through every engine that computes from the copies, and copied no more than said."""

from __future__ import annotations

import json
import math

import pytest
from cases import LAYOUTS, Case, check_base_between_vectors, check_footprint, make, run

from triton_conv3d import engines
from triton_conv3d.engines.padded import widened
from triton_conv3d.engines.through import ThroughConfig
from triton_conv3d.problem import CHANNELS_LAST, CONTIGUOUS, PASSES, VIEW, Problem
from triton_conv3d.tuning.plan import offered
from triton_conv3d.tuning.select import ranking
from triton_conv3d.tuning.variants import spelled

pytest.importorskip("triton")
ENGINE = engines.get("padded")
KINDS = (("float16", "ieee"), ("bfloat16", "ieee"), ("float32", "tf32"))
LARGE = Problem(
    "forward", 8, 230, 128, (16, 28, 28), (3, 3, 3), padding=(1,) * 6, alignment=4, device="NVIDIA H200", arch="sm_90"
)  # fmt: skip

# In which sides the channels are odd.
SIDES = {
    "both": dict(in_channels=13, out_channels=21),
    "input": dict(in_channels=13, out_channels=16),
    "output": dict(in_channels=16, out_channels=21),
}
GEOMETRY = dict(batch=2, input_size=(3, 4, 5), kernel_size=(2, 3, 1), padding=(1, 0, 1, 1, 0, 0))


@pytest.mark.parametrize("dtype, precision, pass_, sides", [
    (*kind, pass_, sides)
    for kind in KINDS for pass_ in PASSES for sides in SIDES
    if (pass_, sides) != ("forward", "output") and (kind == KINDS[0] or sides == "both")  # the former reads nothing odd
])  # fmt: skip
def test_every_config_is_exact(dtype: str, precision: str, pass_: str, sides: str) -> None:
    case = Case(pass_, dtype=dtype, precision=precision, bias=pass_ == "forward", **SIDES[sides], **GEOMETRY)
    offers = ENGINE.configs(case.geometry())
    assert len(set(offers)) == len(offers) and offers[-1].engine == "implicit_gemm"
    assert dtype == "float32" or {config.engine for config in offers} >= {"tma", "implicit_gemm"}
    for i, config in enumerate(offers):
        run(case.replace(channels_last=i % 2 == 0, seed=i, exact=dtype != "bfloat16"), ENGINE, config)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("pass_", PASSES)
def test_layouts(pass_: str, layout: str) -> None:
    """Of the operand that is copied for its channels, and of the one that is read as it is, where it can be."""
    case = Case(pass_, dtype="float16", layouts=(layout, layout), stride=(1, 2, 1), **SIDES["input"], **GEOMETRY)
    run(case.replace(channels_last=False), ENGINE, ENGINE.configs(case.geometry())[0])


def test_a_base_between_vectors_is_copied() -> None:
    """The gradient is dense and fills vectors, but begins 2 bytes after one."""
    check_base_between_vectors(ENGINE, Case("dgrad", dtype="float16", **SIDES["input"], **GEOMETRY))


@pytest.mark.parametrize("which", (0, 1), ids=("first_operand", "second_operand"))
@pytest.mark.parametrize("pass_", ("forward", "dgrad"))
def test_one_nan_touches_only_its_footprint(pass_: str, which: int) -> None:
    """The zeros beside it make NaN of it in new channels alone, which are left out. Of a weight, see test_tma.py."""
    problem, operands = make(Case(pass_, batch=2, in_channels=9, out_channels=10, dtype="float16"))
    check_footprint(
        ENGINE, problem, operands, which,
        lambda where: (slice(None), where[1]) if (pass_, which) == ("dgrad", 0) else None,
    )  # fmt: skip


@pytest.mark.parametrize("residual", (None, "cropped", "channels_last"))
def test_what_follows_the_sums(residual: str | None) -> None:
    case = Case("forward", dtype="float16", bias=True, residual=residual, activation="leaky_relu", **SIDES["both"], **GEOMETRY)
    for config in ENGINE.configs(case.geometry()):
        run(case, ENGINE, config)


@pytest.mark.parametrize("layout", (CHANNELS_LAST, CONTIGUOUS, VIEW))
def test_memory_is_that_of_the_copies(layout: str) -> None:
    """Of forward, input and weight with 232 channels, whatever their layout; nothing else is copied."""
    problem = LARGE.replace(layouts=(layout,) * 3)
    wide = widened(problem)
    assert (wide.in_channels, wide.out_channels, wide.alignment) == (232, 128, 16)
    copied = 2 * (math.prod(wide.input_shape) + math.prod(wide.weight_shape))
    for config in ENGINE.configs(problem):
        assert ENGINE.memory(problem, config).copies == copied


def test_memory_of_what_is_read_as_it_is_and_of_a_result_that_is_cut() -> None:
    dgrad = LARGE.replace(pass_="dgrad")
    wide = widened(dgrad)
    least = 2 * (math.prod(wide.weight_shape) + math.prod(wide.input_shape))
    view = 2 * math.prod(wide.output_shape)
    for config, other in zip(ENGINE.configs(dgrad), ENGINE.configs(dgrad.replace(layouts=(VIEW,) * 3)), strict=True):
        assert ENGINE.memory(dgrad, config).copies == least and config == other
        assert ENGINE.memory(dgrad.replace(layouts=(VIEW,) * 3), other).copies == least + view


def test_offsets_are_those_of_the_copies() -> None:
    """2 GiB are passed by the copy alone."""
    problem = LARGE.replace(batch=1, in_channels=9, out_channels=8, input_size=(80, 1200, 1200))
    assert 2 * math.prod(problem.input_shape) < 2**31 < 2 * math.prod(widened(problem).input_shape)
    assert widened(problem).index64 and not widened(problem.replace(input_size=(80, 800, 800))).index64


@pytest.mark.parametrize("changes, reason", [
    (dict(in_channels=232), "as they are"),
    (dict(in_channels=232, out_channels=125), "as they are"),
    (dict(in_channels=7), "7 channels: engine folded"),
    (dict(pass_="wgrad", out_channels=3), "3 channels: engine folded"),
    (dict(groups=2), "groups=2"),
    (dict(dtype="float32"), "float32 as ieee"),
    (dict(dtype="float64"), "float64"),
    (dict(batch=0), "nothing to multiply"),
    (dict(arch="cpu"), "TRITON_INTERPRET"),
    (dict(kernel_size=(1, 1, 62), input_size=(1, 1, 70)), "63"),
], ids=lambda value: str(value) if isinstance(value, dict) else "")  # fmt: skip
def test_what_it_leaves_to_others(changes: dict, reason: str) -> None:
    assert ENGINE.supports(LARGE) is None
    assert reason in (ENGINE.supports(LARGE.replace(**changes)) or "")


def test_configs_survive_files_and_know_their_kind() -> None:
    gemm, tma = (next(c for c in ENGINE.configs(LARGE) if c.engine == name) for name in ("implicit_gemm", "tma"))
    for config in (gemm, tma):
        assert offered(LARGE, "padded", json.loads(json.dumps(config.to_dict()))) == config
        assert spelled(config).startswith(f"engine={config.engine} ") and "splits" not in spelled(config)
    split = ThroughConfig(gemm.engine, next(c.config for c in ENGINE.configs(LARGE) if c.engine == gemm.engine))
    assert split.whole() == gemm.whole() and split.splits == gemm.splits


def test_an_engine_on_trial_stays_on_trial_behind_it() -> None:
    """``tma`` and ``halo`` are measured, and a prediction makes none of them a plan."""
    narrow = LARGE.replace(in_channels=45, out_channels=64)

    def behind(**how) -> set[str]:
        return {config.engine for _, engine, config in ranking(narrow, **how) if engine.NAME == "padded"}

    assert behind() == {"implicit_gemm"} and behind(measuring=True) == {"implicit_gemm", "tma", "halo"}


@pytest.mark.parametrize("pass_, layout, factor", [("forward", CONTIGUOUS, 1), ("wgrad", CHANNELS_LAST, 2)])
def test_predicted_to_gain(pass_: str, layout: str, factor: float) -> None:
    """R(2+1)D's 45 channels: where the input is copied anyway, and where both operands are loaded as single elements."""
    layer = LARGE.replace(pass_=pass_, in_channels=45, out_channels=64, input_size=(16, 56, 56), kernel_size=(3, 1, 1),
                          padding=(1, 1, 0, 0, 0, 0), alignment=2, layouts=(layout,) * 3)  # fmt: skip
    best = {engine.NAME: seconds for seconds, engine, _ in reversed(ranking(layer))}
    assert best["padded"] < best["implicit_gemm"] / factor
