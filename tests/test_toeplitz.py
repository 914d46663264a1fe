"""Blocks of pixels as channels of a depthwise convolution: exact at every edge, copied no more than said."""

from __future__ import annotations

import json
import math
from functools import partial
from types import SimpleNamespace

import pytest
from cases import LAYOUTS, Case, check_footprint, make, run
from guarded import guards, run_large

from triton_conv3d import engines
from triton_conv3d.engines.toeplitz import ToeplitzConfig, blocked
from triton_conv3d.problem import CONTIGUOUS, PASSES, Problem
from triton_conv3d.tuning import cost_model
from triton_conv3d.tuning.plan import offered
from triton_conv3d.tuning.select import ranking

pytest.importorskip("triton")
ENGINE = engines.get("toeplitz")
KINDS = (("float16", "ieee"), ("bfloat16", "ieee"), ("float32", "tf32"), ("float32", "tf32x3"))
# The second level of MedNeXt with kernel 5.
LAYER = Problem(
    "forward", 2, 64, 64, (64,) * 3, (5, 5, 5), padding=(2,) * 6, groups=64, dtype="bfloat16", device="NVIDIA H200",
    arch="sm_90",
)  # fmt: skip
# Volumes that blocks do not divide, smaller than one, taps that only meet padding, phases that differ in length, fewer
# pixels than the dilation, padding beyond the kernel, kernels of one plane or line.
GEOMETRIES = {
    "fives": dict(input_size=(4, 6, 9)),
    "sevens": dict(input_size=(5, 4, 8), kernel_size=(7, 7, 7), padding=(3,) * 6, in_channels=2),
    "small": dict(input_size=(1, 2, 3), kernel_size=(5, 5, 7), padding=(2, 2, 2, 2, 3, 3)),
    "even": dict(input_size=(5, 7, 6), kernel_size=(4, 6, 4), padding=(2, 1, 3, 2, 0, 3), in_channels=5),
    "dilated": dict(input_size=(5, 9, 8), dilation=(2, 3, 1), padding=(4, 4, 6, 6, 2, 2)),
    "far": dict(batch=1, in_channels=2, input_size=(2, 9, 13), dilation=(7, 1, 3), padding=(14, 14, 0, 0, 6, 5)),
    "beyond": dict(input_size=(3, 3, 4), padding=(6, 5, 2, 2, 7, 0)),
    "plane": dict(input_size=(3, 9, 11), kernel_size=(1, 9, 9), padding=(0, 0, 4, 4, 4, 4), in_channels=2),
    "line": dict(input_size=(2, 3, 90), kernel_size=(1, 1, 65), padding=(0, 0, 0, 0, 32, 32), in_channels=1, batch=1),
    "many": dict(input_size=(2, 3, 5), in_channels=20, batch=1),
}


def case(pass_: str, name: str, **more) -> Case:
    usual = dict(batch=2, in_channels=3, kernel_size=(5, 5, 5), padding=(2,) * 6, dtype="float16")
    sizes = {**usual, **GEOMETRIES[name], **more}
    return Case(pass_, **{**sizes, "out_channels": sizes["in_channels"], "groups": sizes["in_channels"]})


def by_block(of: Case) -> dict[tuple[int, int, int], ToeplitzConfig]:
    """For every block the portable engine's largest tile, with which the interpreter takes the fewest steps."""
    offers = [config for config in ENGINE.configs(make(of)[0]) if config.engine == "implicit_gemm"]
    return {config.block: config for config in reversed(offers)}


def run_widest(of: Case, **how) -> None:
    run(of, ENGINE, max(by_block(of).items(), key=lambda item: math.prod(item[0]))[1], **how)


@pytest.mark.parametrize("name", GEOMETRIES)
@pytest.mark.parametrize("pass_", PASSES)
def test_every_edge(pass_: str, name: str) -> None:
    """Each in the type and format and by the block that its name draws."""
    draw = sum(map(ord, name + pass_))
    dtype, precision = KINDS[draw % len(KINDS)]
    last = draw // 4 % 2 > 0
    layouts = ("channels_last" if last else "contiguous",) * 2
    of = case(pass_, name, dtype=dtype, precision=precision, channels_last=last, layouts=layouts, bias=pass_ == "forward")
    configs = list(by_block(of).values())
    assert len(configs) == 3
    run(of, ENGINE, configs[draw // 8 % 3])


@pytest.mark.parametrize("pass_", PASSES)
def test_through_every_engine(pass_: str) -> None:
    """Their own configs, and all of these of smaller layers, are tested where they are."""
    of = case(pass_, "fives", in_channels=2, batch=1, input_size=(9, 4, 5))
    first = {(config.block, config.engine): config for config in reversed(ENGINE.configs(of.geometry()))}
    assert {name for _, name in first} == {"halo", "tma", "implicit_gemm"}
    for i, config in enumerate(first.values()):
        run(of.replace(seed=i), ENGINE, config)


@pytest.mark.parametrize("activation, residual", [("silu", "contiguous"), ("gelu", None), ("none", "channels_last")])
def test_what_follows_the_sums(activation: str, residual: str | None) -> None:
    """It is rounded once, behind all of them."""
    run_widest(case("forward", "fives", bias=True, residual=residual, activation=activation, exact=False))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str) -> None:
    draw = sum(map(ord, layout))
    run_widest(case(PASSES[draw % 3], "even", layouts=(layout, layout), channels_last=draw % 2 > 0, exact=False))


@pytest.mark.parametrize("at_end", (False, True), ids=("start", "end"))
def test_between_pages_that_fault(at_end: bool) -> None:
    """In this process: what reads outside kills it."""
    with guards(at_end) as fresh:
        for pass_ in PASSES:
            run_widest(case(pass_, "even"), fresh=fresh)


@pytest.mark.parametrize("crossing, contiguous", [("batch", True), ("depth", False), ("height", True), ("width", False)])
@pytest.mark.parametrize("pass_", PASSES)
def test_offsets_of_64_bits(pass_: str, crossing: str, contiguous: bool) -> None:
    run_large(ENGINE, pass_, crossing, contiguous)


@pytest.mark.parametrize("which", (0, 1))
@pytest.mark.parametrize("pass_", PASSES)
def test_one_nan_touches_only_its_footprint(pass_: str, which: int) -> None:
    """Of its channel the results of blocks that meet its own; of a weight, or of wgrad, all. By ``implicit_gemm`` the other
    channels of a tile too."""
    problem, operands = make(case(pass_, "fives", input_size=(2, 3, 48), in_channels=2))
    reach = 2 * max(config.block_w for config in ENGINE.configs(problem))

    def beyond(packed: bool, where: tuple[int, ...]) -> tuple:
        if pass_ == "wgrad":
            return (where[1],)
        if which == (pass_ == "forward"):
            return (slice(None), where[0])
        near = slice(max(0, where[4] - reach), where[4] + reach)
        assert near.stop - near.start < problem.result_shape[4]
        return (where[0], slice(None) if packed else where[1], slice(None), slice(None), near)

    for packed in (True, False):
        offers = [config for config in ENGINE.configs(problem) if (config.engine == "implicit_gemm") == packed]
        some = SimpleNamespace(configs=lambda problem: offers, launch=ENGINE.launch)
        check_footprint(some, problem, operands, which, partial(beyond, packed))


@pytest.mark.parametrize("changes, reason", [
    (dict(groups=1), "1 groups: it takes one to one"),
    (dict(out_channels=128), "64 -> 128 channels in 64 groups"),
    (dict(kernel_size=(3, 3, 3)), "27 taps: fewer than 65"),
    (dict(kernel_size=(4, 4, 4)), "64 taps"),
    (dict(stride=(1, 2, 1)), "stride (1, 2, 1)"),
    (dict(dtype="float32", precision="ieee"), "ieee"),
    (dict(dtype="float64"), "float64"),
    (dict(input_size=(256,) * 3), "copies of"),
    (dict(arch="cpu"), "interpreter"),
], ids=lambda value: str(value) if isinstance(value, dict) else "")  # fmt: skip
def test_what_it_leaves_to_others(changes: dict, reason: str) -> None:
    assert ENGINE.supports(LAYER) is None
    assert reason in (ENGINE.supports(LAYER.replace(**changes)) or "")


def test_blocks_waste_the_least() -> None:
    assert ENGINE.configs(LAYER)[0].block == (4, 4, 4)
    for pass_ in PASSES:
        layer = LAYER.replace(pass_=pass_)
        blocks = {config.block for config in ENGINE.configs(layer)}
        assert {math.prod(block) for block in blocks} == {64, 32, 16}
        assert blocked(layer, (4, 4, 4)).taps == (2, 2, 2)


@pytest.mark.parametrize("pass_", PASSES)
def test_memory_is_that_of_the_copies(pass_: str) -> None:
    """Of the volumes with the zeros around what is read, and of the matrices."""
    layer = LAYER.replace(pass_=pass_)
    config = next(config for config in ENGINE.configs(layer) if config.block == (4, 4, 4))
    volumes = 2 * 2 * 64 * (68**3 + 64**3)
    assert ENGINE.memory(layer, config).copies == volumes + 64 * 64 * 8 * 64 * (4 if pass_ == "wgrad" else 2)
    assert ENGINE.memory(layer.replace(layouts=(CONTIGUOUS,) * 3), config) == ENGINE.memory(layer, config)


def test_configs_survive_files() -> None:
    for config in ENGINE.configs(LAYER):
        assert offered(LAYER, "toeplitz", json.loads(json.dumps(config.to_dict()))) == config


def test_it_is_a_plan_only_where_it_was_measured() -> None:
    assert "toeplitz" in {engine.NAME for _, engine, _ in ranking(LAYER, measuring=True)}
    assert "toeplitz" not in {engine.NAME for _, engine, _ in ranking(LAYER)}


@pytest.mark.parametrize("kernel, dilation, factor", [(5, 1, 1.5), (7, 1, 2.0), (7, 3, 1.9), (21, 1, 6.0)])
@pytest.mark.parametrize("pass_", PASSES)
def test_predicted_to_gain(pass_: str, kernel: int, dilation: int, factor: float) -> None:
    layer = LAYER.replace(
        pass_=pass_, kernel_size=(kernel,) * 3, padding=(dilation * (kernel - 1) // 2,) * 6, dilation=(dilation,) * 3
    )
    ours, theirs = (
        min(cost_model.predict(layer, engine, config) for config in engine.configs(layer))
        for engine in (ENGINE, engines.get("depthwise"))
    )
    assert ours < theirs / factor
