"""Small groups, several of them as one: exact, through blocks on the diagonal of a wider weight."""

from __future__ import annotations

import json
import math

import pytest
from cases import LAYOUTS, Case, check_footprint, make, run
from guarded import guards

from triton_conv3d import engines
from triton_conv3d.engines.block_diagonal import merged
from triton_conv3d.problem import PASSES, VIEW, Problem
from triton_conv3d.tuning import cost_model
from triton_conv3d.tuning.plan import offered
from triton_conv3d.tuning.select import ranking

pytest.importorskip("triton")
ENGINE = engines.get("block_diagonal")
# A layer of ResNeXt-101 (32 groups of 4 channels) of 3D-ResNets-PyTorch.
LAYER = Problem(
    "forward", 8, 128, 128, (8, 28, 28), (3, 3, 3), padding=(1,) * 6, groups=32, dtype="bfloat16", device="NVIDIA H200",
    arch="sm_90",
)  # fmt: skip
GEOMETRIES = {
    "fours": dict(in_channels=32, out_channels=32, groups=8),
    "uneven": dict(in_channels=24, out_channels=36, groups=6, kernel_size=(2, 3, 1), padding=(1, 0, 1, 1, 0, 0)),
    "odd": dict(in_channels=21, out_channels=21, groups=7, dilation=(1, 2, 1), padding=(1, 1, 2, 2, 1, 1)),
    "sixteens": dict(in_channels=32, out_channels=32, groups=2),
}


def case(pass_: str, name: str, **more) -> Case:
    usual = dict(batch=2, input_size=(3, 4, 5), padding=(1,) * 6, dtype="float16")
    return Case(pass_, **{**usual, **GEOMETRIES[name], **more})


def run_largest(of: Case, **how) -> None:
    """By the tiles with which the interpreter takes the fewest steps."""
    run(of, ENGINE, ENGINE.configs(make(of)[0])[0], **how)


@pytest.mark.parametrize("name", GEOMETRIES)
@pytest.mark.parametrize("pass_", PASSES)
def test_every_number_of_groups(pass_: str, name: str) -> None:
    """Each in the type and format that its name draws."""
    draw = sum(map(ord, name + pass_))
    dtype, precision = (("float16", "ieee"), ("float32", "tf32"), ("bfloat16", "ieee"))[draw % 3]
    of = case(pass_, name, batch=1, dtype=dtype, precision=precision, channels_last=draw % 2 > 0, bias=pass_ == "forward")
    for config in {offer.together: offer for offer in reversed(ENGINE.configs(of.geometry()))}.values():
        run(of, ENGINE, config)


def test_what_follows_the_sums() -> None:
    run_largest(case("forward", "fours", bias=True, residual="contiguous", activation="silu", exact=False))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str) -> None:
    pass_ = PASSES[sum(map(ord, layout)) % 3]
    run_largest(case(pass_, "fours", layouts=(layout, layout), channels_last=False, exact=False))


@pytest.mark.parametrize("at_end", (False, True), ids=("start", "end"))
def test_between_pages_that_fault(at_end: bool) -> None:
    """In this process: what reads outside kills it."""
    with guards(at_end) as fresh:
        for pass_ in PASSES:
            run_largest(case(pass_, "uneven"), fresh=fresh)


@pytest.mark.parametrize("which", (0, 1))
@pytest.mark.parametrize("pass_", PASSES)
def test_one_nan_touches_only_its_footprint(pass_: str, which: int) -> None:
    """Beside it what a pixel, or in dgrad a weight, may touch of the groups that are one with its own: here all of them."""
    problem, operands = make(case(pass_, "sixteens", batch=1, input_size=(2, 3, 4)))

    def beyond(where: tuple[int, ...]) -> tuple:
        if pass_ == "wgrad":
            return (slice(None), where[1] % 16) if which == 0 else (where[1],)
        if which == (pass_ == "forward"):  # of the weight
            return (slice(None), where[0]) if pass_ == "forward" else (slice(None), [where[1], where[1] + 16])
        return (where[0],)

    check_footprint(ENGINE, problem, operands, which, beyond)


@pytest.mark.parametrize("changes, reason", [
    (dict(groups=1), "one group"),
    (dict(groups=4), "32 channels in a group"),
    (dict(groups=128), "depthwise"),
    (dict(in_channels=68, out_channels=68, groups=17), "no number of 17 groups"),
    (dict(stride=(2, 1, 1)), "planes are shared"),
    (dict(pass_="dgrad", stride=(1, 2, 2)), "parity classes"),
    (dict(kernel_size=(1, 3, 3)), "kernel depth 1"),
    (dict(dtype="float32", precision="ieee"), "ieee"),
    (dict(dtype="float64"), "float64"),
    (dict(arch="gfx942"), "gfx942"),
], ids=lambda value: str(value) if isinstance(value, dict) else "")  # fmt: skip
def test_what_it_leaves_to_others(changes: dict, reason: str) -> None:
    assert ENGINE.supports(LAYER) is None
    assert reason in (ENGINE.supports(LAYER.replace(**changes)) or "")


def test_memory_is_that_of_the_weight() -> None:
    config = ENGINE.configs(LAYER)[0]
    assert config.together == 16 and ENGINE.memory(LAYER, config).copies == 2 * 128 * 27 * 64
    assert {config.together for config in ENGINE.configs(LAYER)} == {16, 8, 4}


def test_the_other_problem_claims_no_more_than_it_has() -> None:
    assert LAYER.alignment == 16 and merged(LAYER.replace(alignment=8), 8).alignment == 16  # that of 4 channels of the weight
    assert merged(LAYER.replace(alignment=2, layouts=(VIEW,) * 3), 8).alignment == 2
    narrow = LAYER.replace(in_channels=120, out_channels=60, groups=30)
    aligned = {pass_: merged(narrow.replace(pass_=pass_), 10).alignment for pass_ in PASSES}
    assert aligned == {"forward": 16, "dgrad": 8, "wgrad": 8}
    assert math.gcd(16, 2 * 60) == 8


def test_configs_survive_files() -> None:
    for config in ENGINE.configs(LAYER):
        assert offered(LAYER, "block_diagonal", json.loads(json.dumps(config.to_dict()))) == config


def test_it_is_a_plan_only_where_it_was_measured() -> None:
    assert "block_diagonal" in {engine.NAME for _, engine, _ in ranking(LAYER, measuring=True)}
    assert "block_diagonal" not in {engine.NAME for _, engine, _ in ranking(LAYER)}


@pytest.mark.parametrize("pass_, factor", [("forward", 1.15), ("dgrad", 1.15), ("wgrad", 1.6)])
@pytest.mark.parametrize("dtype", ("bfloat16", "float32"))
def test_predicted_to_gain(pass_: str, factor: float, dtype: str) -> None:
    layer = LAYER.replace(pass_=pass_, dtype=dtype, precision="tf32" if dtype == "float32" else "ieee")
    ours, theirs = (
        min(cost_model.predict(layer, engine, config) for config in engine.configs(layer))
        for engine in (ENGINE, engines.get("implicit_gemm"))
    )
    assert ours < theirs / factor
