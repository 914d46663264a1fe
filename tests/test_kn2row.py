"""The engine that folds taps into few produced channels: exact at every edge, in every tile, and what it leaves to others."""

from __future__ import annotations

import dataclasses

import pytest
from cases import Case, check_footprint, make, run
from guarded import CROSSINGS, guards, run_large

from triton_conv3d import engines
from triton_conv3d.engines.launching import launch_kernel
from triton_conv3d.problem import Problem
from triton_conv3d.tuning import cost_model
from triton_conv3d.tuning.select import ranking, refusals

pytest.importorskip("triton")
ENGINE, GEMM = engines.get("kn2row"), engines.get("implicit_gemm")
GATHER = ("forward", "dgrad")
# The head of Wan 2.1's video decoder.
HEAD = Problem("forward", 1, 96, 3, (6, 482, 834), (3, 3, 3), bias=True, dtype="bfloat16", device="NVIDIA H200", arch="sm_90")
KINDS = (("float16", "ieee"), ("float32", "tf32"), ("float32", "tf32x3"))

# (many, few): channels that are summed over, and computed. Volumes that no tile divides, lines and planes fewer than those
# of a program and more, padding at one end, and beyond the reach of the kernel.
GEOMETRIES = {
    "3_of_17": dict(many=17, few=3, batch=2, input_size=(2, 3, 9), padding=(1, 1, 0, 1, 1, 1)),
    "1_of_16": dict(many=16, few=1, input_size=(1, 5, 37), kernel_size=(1, 2, 4), padding=(0, 0, 3, 1, 0, 2)),
    "8_of_33": dict(many=33, few=8, input_size=(1, 2, 40), kernel_size=(2, 1, 3), padding=(2, 0, 0, 0, 5, 4)),
    "2_of_24": dict(many=24, few=2, input_size=(3, 6, 3), kernel_size=(2, 5, 1), padding=(0, 1, 0, 0, 0, 0)),
    "dilated": dict(
        many=16, few=5, input_size=(3, 4, 43), kernel_size=(2, 3, 2), padding=(0, 1, 4, 1, 2, 0), dilation=(2, 3, 16)
    ),
    "beyond": dict(many=16, few=2, input_size=(1, 2, 4), padding=(4, 4, 6, 5, 2, 7), dilation=(4, 5, 2)),
}  # fmt: skip


def geometry(name: str, pass_: str, **more) -> dict:
    kept = {"kernel_size": (3, 3, 3), **GEOMETRIES[name], **more}
    inner, outer = kept.pop("many"), kept.pop("few")
    if pass_ == "dgrad":
        inner, outer = outer, inner
    return dict(in_channels=inner, out_channels=outer, **kept)


def tiles() -> list:
    """(dtype, precision, config) of every tile, of tf32x3 the smallest; forward and dgrad share them."""
    found = {}
    for dtype, precision in KINDS:
        for channels in (1, 3):
            offers = ENGINE.configs(HEAD.replace(dtype=dtype, precision=precision, out_channels=channels))
            for config in offers[-1:] if precision == "tf32x3" else offers:
                found[dtype, precision, dataclasses.replace(config, lines=1)] = None
    return [pytest.param(*key, id="-".join((*key[:2], "x".join(map(str, vars(key[2]).values()))))) for key in found]


def test_where_products_do_not_go_on_by_themselves(monkeypatch) -> None:
    """The kernel of all GPUs but sm_90, whose other form the interpreter runs."""
    asked = []

    def launch(kernel, grid, args, options) -> None:
        asked.append(options["ASYNC"])
        launch_kernel(kernel, grid, args, options | {"ASYNC": False})

    monkeypatch.setattr(ENGINE, "launch_kernel", launch)
    for i, name in enumerate(GEOMETRIES):
        run(Case(GATHER[i % 2], dtype="float16", **geometry(name, GATHER[i % 2])), ENGINE)
    assert len(asked) == len(GEOMETRIES)


@pytest.mark.parametrize("dtype, precision, config", tiles())
def test_every_config_is_exact(dtype: str, precision: str, config) -> None:
    """Over two tiles along W."""
    pass_ = GATHER[config.planes % 2]
    sizes = geometry("3_of_17", pass_, batch=1, input_size=(2, 2, config.block_w + 5))
    run(Case(pass_, dtype=dtype, precision=precision, channels_last=config.planes > 1, **sizes), ENGINE, config)


@pytest.mark.parametrize("pass_, planes, lines", (("forward", 1, 2), ("dgrad", 4, 5)), ids=GATHER)
@pytest.mark.parametrize("name", GEOMETRIES)
def test_every_edge(name: str, pass_: str, planes: int, lines: int) -> None:
    """Forward by programs of fewer planes and lines than there are, dgrad by programs of more."""
    case = Case(pass_, dtype="bfloat16", bias=pass_ == "forward", seed=planes, **geometry(name, pass_))
    run(case, ENGINE, dataclasses.replace(ENGINE.configs(case.geometry())[-1], planes=planes, lines=lines))


@pytest.mark.parametrize("layouts", [
    ("cropped", "contiguous"), ("contiguous", "cropped"), ("unaligned", "channel_slice"), ("expanded_pixels", "permuted"),
], ids="-".join)  # fmt: skip
@pytest.mark.parametrize("pass_", GATHER)
def test_layouts(pass_: str, layouts: tuple[str, str]) -> None:
    if pass_ == "dgrad":
        layouts = layouts[::-1]  # of weight and gradient
    run(Case(pass_, dtype="float16", exact=False, layouts=layouts, channels_last=False, **geometry("8_of_33", pass_)), ENGINE)


@pytest.mark.parametrize("activation", ("leaky_relu", "gelu"))
@pytest.mark.parametrize("residual", (None, "cropped", "channels_last"))
def test_what_follows_the_sums(residual: str | None, activation: str) -> None:
    fused = dict(bias=True, residual=residual, activation=activation, exact=activation == "leaky_relu")
    run(Case("forward", dtype="float16", **fused, **geometry("8_of_33", "forward")), ENGINE)


@pytest.mark.parametrize("at_end", (False, True), ids=("start", "end"))
@pytest.mark.parametrize("pass_", GATHER)
def test_between_pages_that_fault(pass_: str, at_end: bool) -> None:
    """In this process: what reads outside kills it."""
    with guards(at_end) as fresh:
        for name in ("8_of_33", "beyond"):
            fused = dict(bias=True, residual="channels_last", activation="relu") if pass_ == "forward" else {}
            case = Case(pass_, dtype="float16", **fused, **geometry(name, pass_))
            run(case, ENGINE, dataclasses.replace(ENGINE.configs(case.geometry())[-1], planes=4), fresh)


@pytest.mark.parametrize("crossing", CROSSINGS)
@pytest.mark.parametrize("pass_", GATHER)
def test_offsets_of_64_bits(pass_: str, crossing: str) -> None:
    run_large(ENGINE, pass_, crossing)


@pytest.mark.parametrize("which", ("pixel", "weight"))
@pytest.mark.parametrize("pass_", GATHER)
def test_one_nan_touches_only_its_footprint(pass_: str, which: str) -> None:
    """A weight may also meet the zeros around what is read, but only in its own channel. Of W it does not meet them."""
    around = 0 if which == "pixel" or pass_ == "forward" else 2
    sizes = geometry("3_of_17", pass_, batch=1, input_size=(1, 2, 6), padding=(1, 1, 0, 1, around, around))
    problem, operands = make(Case(pass_, dtype="float16", **sizes))
    beyond = {"pixel": lambda where: None, "weight": lambda where: (slice(None), where[pass_ == "dgrad"])}[which]
    check_footprint(ENGINE, problem, operands, int((pass_ == "forward") == (which == "weight")), beyond)


@pytest.mark.parametrize("changes, reason", [
    (dict(pass_="wgrad"), "wgrad"),
    (dict(groups=3), "groups=3"),
    (dict(out_channels=9), "9 channels to compute"),
    (dict(in_channels=15), "15 channels to sum over"),
    (dict(pass_="dgrad"), "96 channels to compute"),
    (dict(stride=(1, 1, 2)), "stride (1, 1, 2)"),
    (dict(kernel_size=(3, 1, 1)), "no taps of H and W"),
    (dict(kernel_size=(6, 3, 3)), "kernel depth 6"),
    (dict(kernel_size=(1, 5, 5)), "more than 128 columns"),
    (dict(dilation=(1, 1, 9)), "18 pixels"),
    (dict(out_channels=8, dtype="float32", precision="tf32x3"), "more than 64 columns"),
    (dict(dtype="float32"), "float32 as ieee"),
    (dict(arch="gfx942", dtype="float32", precision="tf32x3"), "tf32x3"),
    (dict(dtype="float64"), "float64"),
    (dict(batch=0), "nothing to multiply"),
    (dict(arch="cpu"), "TRITON_INTERPRET"),
], ids=lambda value: str(value) if isinstance(value, dict) else "")  # fmt: skip
def test_what_it_leaves_to_others(changes: dict, reason: str) -> None:
    assert ENGINE.supports(HEAD) is None
    assert reason in (ENGINE.supports(HEAD.replace(**changes)) or "")


def test_what_it_reads_from_l2() -> None:
    """The head once and a half, not 27 times; predicted to take less than a fifth of the time."""
    work = ENGINE.work(HEAD, next(c for c in ENGINE.configs(HEAD) if (c.block_w, c.lines) == (128, 54)))
    pixels = work.programs * work.iterations * work.order.row_bytes
    assert work.programs == 2 * 9 * 7 and work.iterations == (54 + 2) * 3
    assert 1.0 < pixels / (2 * 96 * 6 * 482 * 834) < 1.1  # new ones, for lines at the ends of a march twice
    read = work.programs * work.iterations * work.bytes_read / (2 * 96 * 6 * 482 * 834)
    assert read < 1.8
    best = [min(cost_model.predict(HEAD, engine, c) for c in engine.configs(HEAD)) for engine in (ENGINE, GEMM)]
    assert best[0] < best[1] / 5


def test_it_is_a_plan_only_where_it_was_measured() -> None:
    assert "kn2row" in {engine.NAME for _, engine, _ in ranking(HEAD, measuring=True)}
    assert "kn2row" not in {engine.NAME for _, engine, _ in ranking(HEAD)} and "on trial" in refusals(HEAD)["kn2row"]


@pytest.mark.parametrize("arch", ("sm_80", "sm_86", "sm_90", "sm_100", "gfx942"))
def test_more_than_the_smallest_tile_has_room(arch: str) -> None:
    for dtype, precision in KINDS:
        for channels in (1, 3):
            problem = HEAD.replace(out_channels=channels, arch=arch, dtype=dtype, precision=precision)
            offers = ENGINE.configs(problem)
            assert 1 < len(offers) <= 25 and len(set(offers)) == len(offers), offers
