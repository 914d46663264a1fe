"""Blocks of pixels along W as channels: exact at every edge and through every engine, and copied no more than said."""

from __future__ import annotations

import json
import math
from functools import partial
from itertools import product

import pytest
import torch
from cases import LAYOUTS, Case, check_footprint, make, run
from guarded import guards, overflow_checked, run_large

from triton_conv3d import engines
from triton_conv3d.engines.space_to_depth import SpaceToDepthConfig, blocked
from triton_conv3d.problem import CONTIGUOUS, PASSES, VIEW, Problem
from triton_conv3d.tuning import cost_model
from triton_conv3d.tuning.plan import offered
from triton_conv3d.tuning.select import ranking

pytest.importorskip("triton")
ENGINE = engines.get("space_to_depth")
KINDS = (("float16", "ieee"), ("bfloat16", "ieee"), ("float32", "tf32"), ("float32", "tf32x3"), ("float32", "ieee"))
# The first level of MONAI's SegResNet, as it is by default.
LAYER = Problem(
    "forward", 2, 8, 8, (128,) * 3, (3, 3, 3), padding=(1,) * 6, dtype="bfloat16", device="NVIDIA H200", arch="sm_90"
)

# Lines that blocks do not divide, pixels that are no vectors, fewer taps than the stride, padding beyond the kernel and the
# line, one tap, lines that are read as they are.
GEOMETRIES = {
    "even": dict(input_size=(3, 4, 16)),
    "odd": dict(input_size=(2, 3, 11), in_channels=3, out_channels=5, padding=(1, 1, 1, 1, 2, 0)),
    "strided": dict(input_size=(4, 4, 13), out_channels=16, stride=(2, 1, 2)),
    "few_taps": dict(input_size=(3, 5, 14), kernel_size=(3, 2, 3), in_channels=3, out_channels=16, stride=(2, 3, 4)),
    "dilated": dict(input_size=(3, 3, 21), in_channels=2, out_channels=3, dilation=(1, 1, 3), padding=(1, 1, 1, 1, 0, 5)),
    "beyond": dict(input_size=(2, 2, 5), kernel_size=(1, 1, 4), in_channels=3, padding=(0, 0, 0, 0, 9, 8)),
    "outside": dict(input_size=(2, 2, 9), out_channels=64, kernel_size=(1, 1, 2), stride=(1, 1, 64), padding=(0,) * 4 + (7, 0)),
    "one_tap": dict(input_size=(3, 3, 16), in_channels=8, out_channels=8, kernel_size=(3, 1, 1), padding=(1, 1, 0, 0, 0, 0)),
    "one_tap_strided": dict(input_size=(3, 3, 15), out_channels=16, kernel_size=(1, 2, 1), stride=(1, 1, 2)),
    "head": dict(input_size=(3, 4, 10), in_channels=16, out_channels=3),
    "tall": dict(
        input_size=(3, 9, 8), in_channels=1, out_channels=20, kernel_size=(2, 5, 3), stride=(1, 2, 1),
        padding=(0, 0, 3, 1, 1, 1),
    ),
    "tall_dilated": dict(
        input_size=(2, 7, 9), in_channels=2, out_channels=16, kernel_size=(1, 3, 2), stride=(1, 1, 2), dilation=(1, 3, 1),
        padding=(0, 0, 4, 2, 0, 1),
    ),
    "stem": dict(input_size=(2, 4, 8), in_channels=1, out_channels=64, kernel_size=(1, 3, 7), padding=(0, 0, 1, 1, 3, 3)),
}


def case(pass_: str, name: str, **more) -> Case:
    usual = dict(batch=2, in_channels=4, out_channels=6, padding=(1,) * 6, dtype="float16")
    return Case(pass_, **{**usual, **GEOMETRIES[name], **more})


def by_pixels(of: Case) -> dict[int, SpaceToDepthConfig]:
    """For blocks of each size the portable engine's largest tile, with which the interpreter takes the fewest steps."""
    offers = [config for config in ENGINE.configs(make(of)[0]) if config.engine == "implicit_gemm"]
    return {config.pixels: config for config in reversed(offers)}


def run_smallest(of: Case, **how) -> None:
    run(of, ENGINE, min(by_pixels(of).items())[1], **how)


@pytest.mark.parametrize("pass_, name", [case for case in product(PASSES, GEOMETRIES) if case != ("dgrad", "outside")])
def test_every_edge(pass_: str, name: str) -> None:
    """Each in the type that its name draws, and by every size of blocks."""
    draw = sum(map(ord, name + pass_))
    dtype, precision = KINDS[draw % len(KINDS)]
    of = case(pass_, name, batch=1, dtype=dtype, precision=precision, channels_last=draw % 2 == 0, bias=pass_ == "forward")
    for config in by_pixels(of).values():
        run(of, ENGINE, config)


@pytest.mark.parametrize("pass_", PASSES)
def test_through_every_engine(pass_: str) -> None:
    """Their own configs, and all of these of smaller layers, are tested where they are."""
    of = case(pass_, "even", batch=1, in_channels=8, out_channels=8)
    offers = ENGINE.configs(of.geometry())
    first = {(config.pixels, config.engine): config for config in reversed(offers)}
    assert {pixels for pixels, _ in first} == {4, 8, 16} and {name for _, name in first} == {"halo", "tma", "implicit_gemm"}
    for i, config in enumerate(first.values()):
        run(of.replace(seed=i), ENGINE, config)


@pytest.mark.parametrize("layout", ("channels_last", "contiguous", "cropped"))
def test_what_follows_the_sums(layout: str) -> None:
    """A residual is read by blocks, which have to divide its lines."""
    last = layout == "channels_last"
    epilogue = dict(bias=True, activation="leaky_relu", negative_slope=0.3, residual=layout)
    run_smallest(case("forward", "even", channels_last=last, exact=False, **epilogue))
    odd, _ = make(case("forward", "odd", residual="channels_last"))
    assert "11 pixels as a residual needs" in ENGINE.supports(odd)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str) -> None:
    pass_ = PASSES[sum(map(ord, layout)) % 3]
    run_smallest(case(pass_, "odd", layouts=(layout, layout), channels_last=False, exact=False))
    run_smallest(case("forward", "tall_dilated", layouts=(layout, layout), channels_last=False, exact=False))


@pytest.mark.parametrize("crossing", ("batch", "depth", "width"))
@pytest.mark.parametrize("pass_", PASSES)
def test_offsets_of_64_bits(pass_: str, crossing: str) -> None:
    with overflow_checked():
        run_large(ENGINE, pass_, crossing)


@pytest.mark.parametrize("pass_", PASSES)
def test_what_is_read_as_it_is_is_copied_in_other_layouts(pass_: str) -> None:
    of = case(pass_, "one_tap")
    config = next(config for config in ENGINE.configs(of.geometry()) if config.engine == "tma")
    for layouts in (("unaligned", "contiguous"), ("contiguous", "unaligned")):
        run(of.replace(layouts=layouts), ENGINE, config)
        run_smallest(case(pass_, "even", in_channels=8, out_channels=8, layouts=layouts))


@pytest.mark.parametrize("at_end", (False, True), ids=("start", "end"))
def test_between_pages_that_fault(at_end: bool) -> None:
    """In this process: what reads outside kills it."""
    with guards(at_end) as fresh:
        for pass_ in PASSES:
            for name in ("odd", "one_tap"):
                run_smallest(case(pass_, name), fresh=fresh)


@pytest.mark.parametrize("which", (0, 1))
@pytest.mark.parametrize("pass_, name", [*product(PASSES, ["odd"]), ("forward", "tall"), ("wgrad", "tall")])
def test_one_nan_touches_only_its_footprint(pass_: str, name: str, which: int) -> None:
    """Beside it a weight may touch its own channel, a pixel all of the blocks that meet it, and in wgrad its own channel."""
    problem, operands = make(case(pass_, name))
    check_footprint(ENGINE, problem, operands, which, partial(zeros_met, problem, which))


def zeros_met(problem: Problem, which: int, where: tuple[int, ...]) -> tuple:
    if problem.pass_ == "wgrad":
        return (slice(None), where[1]) if which == 0 else (where[1],)
    if which == (problem.pass_ == "forward"):  # of the weight
        return slice(None), where[problem.pass_ == "dgrad"]
    met = torch.zeros(problem.result_shape[4], dtype=torch.bool)
    for pixels in {config.pixels for config in ENGINE.configs(problem)}:
        of = blocked(problem, pixels)
        wide = (of.problem.in_channels if of.forward else of.problem.out_channels) // of.channels
        for block in range(of.problem.input_size[2]):
            if block * of.step <= where[4] + of.front < block * of.step + wide:
                met[block * pixels : (block + 1) * pixels] = True
    return where[0], slice(None), slice(None), slice(None), met


@pytest.mark.parametrize("changes, reason", [
    (dict(groups=2), "groups=2"),
    (dict(in_channels=17, out_channels=17), "17 and 17 channels"),
    (dict(out_channels=129), "8 and 129 channels"),
    (dict(pass_="dgrad", stride=(1, 1, 2), dilation=(1, 1, 2)), "windows would have gaps"),
    (dict(pass_="dgrad", stride=(1, 1, 3)), "stride 3 of a dgrad"),
    (dict(kernel_size=(3, 1, 1), out_channels=128), "1 taps along W"),
    (dict(kernel_size=(1, 1, 1), padding=(0,) * 6), "matmul"),
    (dict(dtype="float32", precision="tf32x3", arch="gfx942"), "tf32x3"),
    (dict(dtype="float64"), "float64"),
    (dict(batch=0), "nothing to multiply"),
    (dict(arch="cpu"), "TRITON_INTERPRET"),
    (dict(kernel_size=(63, 1, 1)), "63"),
    (dict(batch=32), "copies of 1090850816 bytes"),
], ids=lambda value: str(value) if isinstance(value, dict) else "")  # fmt: skip
def test_what_it_leaves_to_others(changes: dict, reason: str) -> None:
    assert ENGINE.supports(LAYER) is None
    assert reason in (ENGINE.supports(LAYER.replace(**changes)) or "")


def test_memory_is_that_of_the_copies() -> None:
    """One side with 2 pixels more in a line; the weight of 4 pixels has 6 along W, with zeros; contiguous results twice."""
    config = ENGINE.configs(LAYER)[-1]
    pixels, line = config.pixels, 2 * 128 * 128 * 8 * 2
    assert pixels == 4
    copies = line * (128 + 2) + 2 * (4 * 8) * 9 * (6 * 8)
    assert ENGINE.memory(LAYER, config).copies == copies
    assert ENGINE.memory(LAYER.replace(layouts=(CONTIGUOUS,) * 3), config).copies == copies + line * 128
    wgrad = LAYER.replace(pass_="wgrad")
    other = ENGINE.configs(wgrad)[-1]
    inner = blocked(wgrad, 4).problem
    walked = engines.get("implicit_gemm").memory(inner, other.config)  # which copies the windows
    assert other.pixels == 4 and ENGINE.memory(wgrad, other).copies == line * 130 + 4 * (4 * 8) * 9 * (6 * 8) + walked.copies


def test_lines_without_padding_are_not_copied() -> None:
    plain = LAYER.replace(kernel_size=(3, 1, 1), padding=(1, 1, 0, 0, 0, 0))
    config = ENGINE.configs(plain)[-1]
    assert ENGINE.memory(plain, config).copies == 2 * (4 * 8) * 3 * (4 * 8)
    assert not blocked(plain, 4).copied and blocked(LAYER, 4).copied


def test_taps_along_h_are_channels_where_fewer_are_summed() -> None:
    """Of 7x7x7 taps of one channel: a window of 8 pixels with 7 taps and a zero each, in place of 4 channels."""
    stem = LAYER.replace(in_channels=1, out_channels=64, input_size=(96,) * 3, kernel_size=(7,) * 3, padding=(3,) * 6)
    config = next(config for config in ENGINE.configs(stem) if config.pixels == 2)
    large = stem.replace(batch=80)  # would copy more than it may
    together, apart = blocked(stem, 2).problem, blocked(large, 2).problem
    assert (together.in_channels, together.kernel_size) == (8 * 8, (7, 1, 1))
    assert (apart.in_channels, apart.kernel_size) == (8 * 4, (7, 7, 1))
    copy, weight = 2 * 8 * 96 * 96 * (96 + 6), (2 * 64) * 7 * (8 * 8)
    assert ENGINE.memory(stem, config).copies == 2 * (copy + weight)
    assert blocked(stem.replace(pass_="wgrad"), 2).taps_h == 7
    for other in (LAYER, stem.replace(pass_="dgrad"), stem.replace(pass_="wgrad", in_channels=64, out_channels=1)):
        assert {blocked(other, config.pixels).taps_h for config in ENGINE.configs(other)} == {1}


def test_the_other_problem_claims_no_more_than_it_has() -> None:
    dgrad = LAYER.replace(pass_="dgrad", in_channels=1, out_channels=16)
    assert blocked(dgrad, 4).problem.alignment == 8 and blocked(dgrad, 8).problem.alignment == 16
    assert blocked(LAYER.replace(alignment=2, layouts=(VIEW,) * 3), 4).problem.alignment == 16  # of the copy
    large = LAYER.replace(batch=1, in_channels=4, input_size=(640, 640, 640), out_channels=4)
    assert 2 * math.prod(large.input_shape) < 2**31 < 2 * math.prod(blocked(large, 4).problem.input_shape)
    assert blocked(large, 4).problem.index64 and not blocked(LAYER, 4).problem.index64
    assert blocked(LAYER.replace(pass_="wgrad"), 4).problem.empty_result(torch.device("cpu")).dtype == torch.float32


def test_configs_survive_files() -> None:
    offers = ENGINE.configs(LAYER)
    assert len({config.whole() for config in offers}) < len(offers)  # blocks of every size share kernels
    for config in offers:
        assert offered(LAYER, "space_to_depth", json.loads(json.dumps(config.to_dict()))) == config


def test_it_is_a_plan_only_where_it_was_measured() -> None:
    assert "space_to_depth" in {engine.NAME for _, engine, _ in ranking(LAYER, measuring=True)}
    assert "space_to_depth" not in {engine.NAME for _, engine, _ in ranking(LAYER)}


@pytest.mark.parametrize("pass_", PASSES)
@pytest.mark.parametrize("changes, factor", [
    (dict(), 2), (dict(in_channels=3, out_channels=3), 4), (dict(dtype="float32", precision="tf32"), 2.5),
], ids=("8_to_8", "3_to_3", "tf32"))  # fmt: skip
def test_predicted_to_gain(pass_: str, changes: dict, factor: float) -> None:
    layer = LAYER.replace(pass_=pass_, **changes)
    others = [engines.get(name) for name in ("implicit_gemm", "folded")]
    ours, theirs = (
        min(cost_model.predict(layer, engine, config) for engine in group for config in engine.configs(layer))
        for group in ((ENGINE,), others)
    )
    assert ours < theirs / factor
