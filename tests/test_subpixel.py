"""All parity classes in one product: exact at every edge and through every engine, and copied no more than said."""

from __future__ import annotations

import json
import math
from functools import partial

import pytest
from blocks_cases import GEOMETRIES, KINDS, case, zeros_met
from cases import LAYOUTS, check_base_between_vectors, check_footprint, make, run
from guarded import guards

from triton_conv3d import engines
from triton_conv3d.engines.subpixel import blocked
from triton_conv3d.problem import CONTIGUOUS, VIEW, Problem
from triton_conv3d.tuning import cost_model
from triton_conv3d.tuning.plan import offered
from triton_conv3d.tuning.select import ranking, refusals

pytest.importorskip("triton")
ENGINE = engines.get("subpixel")
ARCHS = ("sm_80", "sm_90", "sm_100")
# The last transposed convolution of MONAI's UNet, 32 -> 2 channels with output padding 1.
LAST = Problem(
    "dgrad", 2, 2, 32, (128,) * 3, (3, 3, 3), (2, 2, 2), (1,) * 6, dtype="bfloat16", device="NVIDIA H200", arch="sm_90"
)  # fmt: skip

@pytest.mark.parametrize("name", GEOMETRIES)
@pytest.mark.parametrize("dtype, precision", KINDS)
def test_every_edge(name: str, dtype: str, precision: str) -> None:
    problem = case(name, dtype=dtype, precision=precision)
    for channels_last in (True, False):
        run(problem.replace(channels_last=channels_last), ENGINE)


@pytest.mark.parametrize("channels", (1, 2), ids="{}_channels".format)
def test_every_config_is_exact(channels: int) -> None:
    """1 channel is for ``kn2row``, 2 fill vectors of ``tma``."""
    of = case("even", in_channels=channels, out_channels=24)
    offers = ENGINE.configs(of.geometry())
    assert len(set(offers)) == len(offers) and offers[-1].engine == "implicit_gemm"
    wanted = {"tma", "implicit_gemm", "kn2row" if channels == 1 else "halo"}
    assert {config.engine for config in offers} >= wanted
    for i, config in enumerate(offers):
        run(of.replace(seed=i), ENGINE, config)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str) -> None:
    run(case("odd", layouts=(layout, layout), channels_last=False, exact=False), ENGINE)


def test_a_base_between_vectors_is_copied() -> None:
    check_base_between_vectors(ENGINE, case("even", in_channels=2, out_channels=16))


@pytest.mark.parametrize("at_end", (False, True), ids=("start", "end"))
def test_between_pages_that_fault(at_end: bool) -> None:
    """In this process: what reads outside kills it."""
    with guards(at_end) as fresh:
        for name in ("odd", "beyond"):
            run(case(name), ENGINE, fresh=fresh)


@pytest.mark.parametrize("which", (0, 1), ids=("weight", "gradient"))
def test_one_nan_touches_only_its_footprint(which: int) -> None:
    """Beside it a weight may touch its own channel, and a pixel of the gradient all of its blocks."""
    problem, operands = make(case("odd"))
    check_footprint(ENGINE, problem, operands, which, partial(zeros_met, problem, which))


@pytest.mark.parametrize("changes, reason", [
    (dict(pass_="forward"), "forward"),
    (dict(stride=(1, 1, 1)), "stride 1"),
    (dict(groups=2), "groups=2"),
    (dict(in_channels=16), "16 channels to compute"),
    (dict(out_channels=8), "8 channels to sum over"),
    (dict(stride=(4, 4, 5)), "160 columns"),
    (dict(dilation=(1, 1, 2)), "dilation (1, 1, 2)"),
    (dict(kernel_size=(2, 2, 2), padding=(0,) * 6), "matmul"),
    (dict(input_size=(1, 4, 4), kernel_size=(2, 2, 2), stride=(5, 2, 2), padding=(2, 0, 0, 0, 0, 0)), "no position"),
    (dict(dtype="float32", precision="tf32x3", arch="gfx942"), "tf32x3"),
    (dict(dtype="float64"), "float64"),
    (dict(batch=0), "nothing to multiply"),
    (dict(arch="cpu"), "TRITON_INTERPRET"),
    (dict(kernel_size=(1, 1, 125), input_size=(8, 8, 130)), "63"),
], ids=lambda value: str(value) if isinstance(value, dict) else "")  # fmt: skip
def test_what_it_leaves_to_others(changes: dict, reason: str) -> None:
    assert ENGINE.supports(LAST) is None
    assert reason in (ENGINE.supports(LAST.replace(**changes)) or "")


def test_memory_is_that_of_the_copies() -> None:
    """The blocks have as many elements as the result, the weight 64 taps instead of 27, before and after it is sorted."""
    result, weight = 2 * math.prod(LAST.input_shape), 2 * 64 * 64
    for config in ENGINE.configs(LAST):
        assert ENGINE.memory(LAST, config).copies == result + 2 * weight
    odd = LAST.replace(input_size=(127,) * 3)
    assert ENGINE.memory(odd, ENGINE.configs(odd)[-1]).copies == 2 * (result + weight)
    contiguous = LAST.replace(layouts=(CONTIGUOUS,) * 3)
    grad = 2 * math.prod(LAST.output_shape)
    assert ENGINE.memory(contiguous, ENGINE.configs(contiguous)[-1]).copies == result + 2 * weight + grad


def test_the_other_problem_claims_no_more_than_it_has() -> None:
    assert blocked(LAST.replace(alignment=4)).problem.alignment == 16  # that of the weight's two channels, which is copied
    assert blocked(LAST.replace(alignment=4, layouts=(VIEW,) * 3)).problem.alignment == 4
    large = LAST.replace(batch=1, in_channels=1, out_channels=16, input_size=(1019, 1019, 1033), kernel_size=(1, 1, 1))
    assert 2 * math.prod(large.input_shape) < 2**31 < 2 * math.prod(blocked(large).problem.input_shape)
    assert blocked(large).problem.index64 and not blocked(LAST).problem.index64
    assert all(min(blocked(case(name).geometry()).problem.padding) >= 0 for name in GEOMETRIES)


def test_configs_survive_files() -> None:
    for config in ENGINE.configs(LAST):
        assert offered(LAST, "subpixel", json.loads(json.dumps(config.to_dict()))) == config


def test_tiles_that_spill_are_not_offered() -> None:
    planes = {arch: {getattr(c.config, "planes", 1) for c in ENGINE.configs(LAST.replace(arch=arch))} for arch in ARCHS}
    assert 4 in planes["sm_90"] and 4 not in planes["sm_80"] | planes["sm_100"]


def test_it_is_a_plan_only_where_it_was_measured() -> None:
    assert "subpixel" in {engine.NAME for _, engine, _ in ranking(LAST, measuring=True)}
    assert "subpixel" not in {engine.NAME for _, engine, _ in ranking(LAST)} and "on trial" in refusals(LAST)["subpixel"]


@pytest.mark.parametrize("changes, factor", [
    (dict(), 5),
    (dict(in_channels=3, stride=(1, 2, 2)), 4),
    (dict(in_channels=1, out_channels=64, kernel_size=(4, 4, 4)), 8),
], ids=("2_channels", "stride_1_2_2", "4x4x4"))  # fmt: skip
def test_predicted_to_gain(changes: dict, factor: float) -> None:
    layer, gemm = LAST.replace(**changes), engines.get("implicit_gemm")
    times = [min(cost_model.predict(layer, engine, c) for c in engine.configs(layer)) for engine in (ENGINE, gemm)]
    assert times[0] < times[1] / factor
