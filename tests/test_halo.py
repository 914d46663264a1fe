"""The engine that reuses planes along D: exact at every edge, in every tile, and what it leaves to others."""

from __future__ import annotations

import dataclasses
import itertools
import sys

import pytest
from cases import Case, check_footprint, make, run
from guarded import guards, run_large

from triton_conv3d import engines
from triton_conv3d.engines.halo.configs import shared_bytes
from triton_conv3d.engines.implicit_gemm.configs import shared_limit
from triton_conv3d.problem import CHANNELS_LAST, CONTIGUOUS, PASSES, VIEW, Problem
from triton_conv3d.tuning import cost_model
from triton_conv3d.tuning.select import ranking, refusals

pytest.importorskip("triton")
ENGINE, GEMM = engines.get("halo"), engines.get("implicit_gemm")
GATHER = ("forward", "dgrad")
LARGE = Problem("forward", 1, 64, 64, (64, 64, 64), (3, 3, 3), padding=(1,) * 6, device="NVIDIA H200", arch="sm_90")
KINDS = (("float16", "ieee"), ("float32", "tf32"))

# Odd channels, volumes narrower than a tile and not as deep as its planes, padding at one end.
GEOMETRIES = {
    "depth_2": dict(
        batch=2, in_channels=9, out_channels=19, input_size=(5, 4, 3), kernel_size=(2, 2, 3), padding=(1, 0, 0, 1, 2, 1)
    ),
    "depth_3": dict(in_channels=33, out_channels=11, input_size=(2, 3, 9), kernel_size=(3, 1, 2), padding=(2, 0, 0, 0, 1, 0)),
    "depth_5": dict(
        batch=2, in_channels=24, out_channels=40, input_size=(7, 2, 3), kernel_size=(5, 2, 1), padding=(0, 3, 1, 1, 0, 0)
    ),
    "dilated": dict(in_channels=16, out_channels=9, input_size=(3, 7, 8), kernel_size=(2, 3, 2), dilation=(1, 2, 3)),
    "groups": dict(in_channels=32, out_channels=48, groups=2, input_size=(4, 3, 3), kernel_size=(3, 1, 2), padding=(1,) * 6),
}  # fmt: skip


def tiles() -> list:
    """(dtype, precision, config) of every tile; forward and dgrad share them."""
    found = {}
    for (dtype, precision), out, into in itertools.product(KINDS, (64, 32, 16), (64, 48)):  # the last with short steps
        for config in ENGINE.configs(LARGE.replace(dtype=dtype, precision=precision, in_channels=into, out_channels=out)):
            found[dtype, precision, config] = None
    return [pytest.param(*key, id="-".join((*key[:2], "x".join(map(str, vars(key[2]).values()))))) for key in found]


@pytest.mark.parametrize("pass_", GATHER)
@pytest.mark.parametrize("dtype, precision, config", tiles())
def test_every_config_is_exact(dtype: str, precision: str, config, pass_: str) -> None:
    """With as many stages as a GPU has room for."""
    for i, geometry in enumerate(GEOMETRIES.values() if dtype == "float16" else [GEOMETRIES["depth_3"]]):
        case = Case(pass_, dtype=dtype, precision=precision, channels_last=i % 2 == 0, seed=i, **geometry)
        problem, offers = case.geometry(), (config.replace(num_stages=n) for n in range(config.num_stages, 0, -1))
        run(case, ENGINE, next(offer for offer in offers if shared_bytes(problem, offer) <= shared_limit(problem)))


def wgrad_tiles() -> list:
    """(dtype, precision, config) of every tile of wgrad."""
    found = {}
    sizes = ((64, 64), (64, 32), (32, 32), (16, 32), (16, 16))
    for (dtype, precision), (filters, channels), depth in itertools.product(KINDS, sizes, (64, 3)):
        layer = LARGE.replace(pass_="wgrad", dtype=dtype, precision=precision, in_channels=channels, out_channels=filters)
        for config in ENGINE.configs(layer.replace(arch="interpreter", input_size=(depth, 64, 64))):
            found[dtype, precision, dataclasses.replace(config, splits=2)] = None
    return [pytest.param(*key, id="-".join((*key[:2], "x".join(map(str, vars(key[2]).values()))))) for key in found]


@pytest.mark.parametrize("dtype, precision, config", wgrad_tiles())
def test_every_config_of_wgrad_is_exact(dtype: str, precision: str, config) -> None:
    geometry = dict(input_size=(5, 2, 4), kernel_size=(3, 3, 1), padding=(1, 0, 0, 1, 1, 0), channels_last=False)
    channels = dict(in_channels=config.block_n - 7, out_channels=config.block_m - 1)
    run(Case("wgrad", dtype=dtype, precision=precision, **channels, **geometry), ENGINE, config)


def test_partial_sums_of_wgrad_go_from_launch_to_launch(monkeypatch) -> None:
    monkeypatch.setattr(sys.modules[f"{ENGINE.__name__}.configs"], "CHAIN", 32)  # products of one accumulator
    case = Case("wgrad", in_channels=9, out_channels=16, input_size=(5, 4, 11), kernel_size=(2, 1, 1), dtype="float16")
    problem, smallest = case.geometry(), ENGINE.configs(case.geometry())[-1]
    for splits, launches in ((1, 6), (2, 3), (7, 1), (9, 1)):  # 88 rows are 6 blocks: the last splits have nothing to add
        config = dataclasses.replace(smallest, splits=splits)
        assert ENGINE.work(problem, config).launches == launches + 1
        run(case, ENGINE, config)


@pytest.mark.parametrize("pass_", ("forward", "wgrad"))
@pytest.mark.parametrize("name", GEOMETRIES)
def test_strides_of_h_and_w(name: str, pass_: str) -> None:
    case = Case(pass_, dtype="bfloat16", stride=(1, 2, 3), bias=pass_ == "forward", **GEOMETRIES[name])
    config = ENGINE.configs(case.geometry())[0 if pass_ == "wgrad" else -1]
    run(case, ENGINE, config)
    run(case.replace(exact=False, layouts=("cropped", "contiguous")), ENGINE, config)


@pytest.mark.parametrize("pass_, inner, outer", (("forward", 67, 130), ("dgrad", 130, 80), ("wgrad", 131, 70)))
def test_several_tiles_side_by_side(pass_: str, inner: int, outer: int) -> None:
    """Of layers wider than a tile, and steps that walk 80 channels in fives."""
    narrow = dict(input_size=(3, 3, 4), kernel_size=(3, 1, 2), padding=(1, 1, 0, 0, 1, 0), dtype="float16")
    case = Case(pass_, in_channels=inner, out_channels=outer, bias=pass_ == "forward", **narrow)
    large = case.geometry().replace(device="NVIDIA H200", arch="sm_90", input_size=(64, 64, 64))
    for config in dict.fromkeys(config.whole() for config in ENGINE.configs(large)):
        run(case, ENGINE, config)


@pytest.mark.parametrize("filters, tiles", ((64, 1), (96, None), (160, 3), (192, 3), (256, None), (320, 5), (384, None)))
def test_it_computes_what_would_leave_wider_tiles_half_empty(filters: int, tiles: int | None) -> None:
    layer = LARGE.replace(in_channels=512, out_channels=filters)
    assert (ENGINE.supports(layer) is None) == (tiles is not None)
    columns = {-(-filters // config.block_n) for config in ENGINE.configs(layer)[:-1]}
    assert tiles is None or columns == {tiles}


@pytest.mark.parametrize("depth, planes", ((3, 4), (4, 4), (5, 8), (32, 8)))
def test_wgrad_has_as_many_planes_as_the_depth_fills(depth: int, planes: int) -> None:
    layer = LARGE.replace(pass_="wgrad", input_size=(depth, 64, 64), in_channels=192, out_channels=192)
    found = {(c.block_m, c.block_n): c.planes for c in ENGINE.configs(layer)[:-1]}
    assert found == {(64, 64): planes, (64, 32): 4}
    assert len({(*vars(c).values(),)[:-1] for c in ENGINE.configs(layer)}) == 3


@pytest.mark.parametrize("channels, step", ((16, 16), (24, 32), (48, 16), (64, 32), (80, 16), (96, 32), (200, 32)))
def test_steps_walk_few_channels_beyond_the_last(channels: int, step: int) -> None:
    layer = LARGE.replace(in_channels=channels)
    assert {config.block_k for config in ENGINE.configs(layer)[:-1]} == {step}


@pytest.mark.parametrize("pass_", GATHER)
def test_more_taps_than_32_bits_hold(pass_: str) -> None:
    run(Case(pass_, in_channels=9, out_channels=10, input_size=(3, 1, 31), kernel_size=(2, 1, 30), dtype="float16"), ENGINE)


@pytest.mark.parametrize("activation", ("leaky_relu", "gelu"))
@pytest.mark.parametrize("residual", (None, "cropped", "channels_last"))
def test_what_follows_the_sums(residual: str | None, activation: str) -> None:
    fused = dict(bias=True, residual=residual, activation=activation, exact=activation == "leaky_relu")
    for name in ("depth_2", "groups"):
        run(Case("forward", dtype="float16", **fused, **GEOMETRIES[name]), ENGINE)


@pytest.mark.parametrize("at_end", (False, True), ids=("start", "end"))
@pytest.mark.parametrize("pass_", PASSES)
def test_between_pages_that_fault(pass_: str, at_end: bool) -> None:
    """In this process: what reads outside kills it."""
    geometries = list(GEOMETRIES.values())
    with guards(at_end) as fresh:
        for i, geometry in enumerate(geometries[1::2] if pass_ == "wgrad" else geometries):
            fused = dict(bias=True, residual="channels_last", activation="relu") if pass_ == "forward" else {}
            case = Case(pass_, dtype="float16", seed=i, **fused, **geometry)
            run(case, ENGINE, ENGINE.configs(case.geometry())[0], fresh)


@pytest.mark.parametrize("crossing", ("depth", "height"))
@pytest.mark.parametrize("pass_", PASSES)
def test_offsets_of_64_bits(pass_: str, crossing: str) -> None:
    run_large(ENGINE, pass_, crossing)


@pytest.mark.parametrize("which", (0, 1), ids=("first_operand", "second_operand"))
@pytest.mark.parametrize("pass_", PASSES)
def test_one_nan_touches_only_its_footprint(pass_: str, which: int) -> None:
    """In its own channel, a weight of dgrad also meets the zeros around the gradient, an input of wgrad those behind it."""
    size = dict(input_size=(3, 2, 4), kernel_size=(3, 1, 2)) if pass_ == "wgrad" else {}
    padded = dict(batch=2, in_channels=9, out_channels=10, padding=(1, 1, 0, 1, 2, 0), **size)
    problem, operands = make(Case(pass_, dtype="float16", **padded))
    check_footprint(
        ENGINE, problem, operands, which,
        lambda where: (slice(None), where[1]) if (pass_, which) in (("dgrad", 0), ("wgrad", 0)) else None,
    )  # fmt: skip


@pytest.mark.parametrize("changes, reason", [
    (dict(arch="sm_75"), "sm_75"),
    (dict(out_channels=96), "96 channels to compute fill tiles of 128"),
    (dict(out_channels=448), "64 and 448 channels in a group: 7 tiles of 64"),
    (dict(pass_="dgrad", in_channels=65), "65 channels to compute"),
    (dict(pass_="wgrad", in_channels=320, out_channels=256), "20 tiles of 64"),
    (dict(pass_="wgrad", in_channels=128, arch="sm_100"), "no large tile on sm_100"),
    (dict(in_channels=8), "8 channels in a group leave products empty: less than 9"),
    (dict(groups=8), "8 channels in a group leave products empty: less than 16"),
    (dict(kernel_size=(1, 3, 3)), "kernel depth 1"),
    (dict(kernel_size=(6, 1, 1)), "kernel depth 6"),
    (dict(stride=(2, 1, 1)), "stride 2 and dilation 1 along D"),
    (dict(dilation=(2, 1, 1)), "stride 1 and dilation 2 along D"),
    (dict(pass_="dgrad", stride=(1, 2, 1)), "parity classes"),
    (dict(input_size=(1, 64, 64)), "one plane"),
    (dict(kernel_size=(3, 1, 62)), "63 bits"),
    (dict(arch="gfx942"), "gfx942"),
    (dict(dtype="float32"), "float32 as ieee"),
    (dict(dtype="float32", precision="tf32x3"), "float32 as tf32x3"),
    (dict(dtype="float64"), "float64"),
    (dict(batch=0), "nothing to multiply"),
    (dict(arch="cpu"), "TRITON_INTERPRET"),
], ids=lambda value: str(value) if isinstance(value, dict) else "")  # fmt: skip
def test_what_it_leaves_to_others(changes: dict, reason: str) -> None:
    assert ENGINE.supports(LARGE) is None
    assert reason in (ENGINE.supports(LARGE.replace(**changes)) or "")


@pytest.mark.parametrize("pass_", GATHER)
def test_it_reads_half_of_what_the_implicit_gemm_reads(pass_: str) -> None:
    """From L2, of tiles alike; and is a candidate where candidates are measured, and never a plan by prediction."""
    layer = LARGE.replace(pass_=pass_)

    def read(engine) -> float:
        works = [engine.work(layer, c) for c in engine.configs(layer) if (c.block_m, c.block_n) == (128, 64)]
        return min(work.programs * work.iterations * work.bytes_read for work in works)

    pixels, weights = 6 / (3 * 4), 1 / 4  # of 128 pixels and of 64 filters: 2 to 1
    assert read(ENGINE) / read(GEMM) == pytest.approx((2 * pixels + weights) / 3)
    assert "halo" in {engine.NAME for _, engine, _ in ranking(layer, measuring=True)}
    assert "halo" not in {engine.NAME for _, engine, _ in ranking(layer)} and "on trial" in refusals(layer)["halo"]


@pytest.mark.parametrize("channels, part", ((16, 0.6), (32, 0.5), (64, 0.5)))
def test_wgrad_reads_a_part_of_what_the_implicit_gemm_reads(channels: int, part: float) -> None:
    """From L2, as the fastest config of each is predicted to; for 16 filters that has tiles of its own."""
    layer = LARGE.replace(pass_="wgrad", in_channels=channels, out_channels=channels, input_size=(128,) * 3)
    (gemm, at), (halo, here) = (
        (engine, min(engine.configs(layer), key=lambda c: cost_model.predict(layer, engine, c))) for engine in (GEMM, ENGINE)
    )
    read, ours = gemm.work(layer, at), halo.work(layer, here)
    assert ours.programs * ours.iterations * ours.bytes_read < part * read.programs * read.iterations * read.bytes_read
    assert {here.planes * here.taps_h} <= {8, 12} and here.splits > 1
    view = layer.replace(layouts=(CHANNELS_LAST, CONTIGUOUS, VIEW))
    assert halo.memory(view, here).copies == 0 < gemm.memory(view, at).copies
    assert halo.memory(view, here).workspace == 4 * here.splits * 27 * channels**2


@pytest.mark.parametrize("depth", (2, 3, 4, 5))
def test_no_tile_takes_all_of_tensor_memory(depth: int) -> None:
    """Of which Triton 3.6.0 makes an empty kernel: 512 columns, and each product of 64 or more rows takes its own."""
    for channels in (16, 32, 64):
        for dtype, precision in KINDS:
            layer = LARGE.replace(in_channels=channels, out_channels=channels, kernel_size=(depth, 3, 3), arch="sm_100")
            for offer in ENGINE.configs(layer.replace(dtype=dtype, precision=precision)):
                assert offer.block_m < 64 or offer.planes * depth * offer.block_n < 512


@pytest.mark.parametrize("arch", ("sm_80", "sm_86", "sm_90", "sm_100"))
@pytest.mark.parametrize("depth", (2, 3, 5))
def test_more_than_the_smallest_tile_has_room(depth: int, arch: str) -> None:
    for dtype, precision in KINDS:
        offers = ENGINE.configs(LARGE.replace(kernel_size=(depth, 3, 3), arch=arch, dtype=dtype, precision=precision))
        no_columns = arch == "sm_100" and depth == 5  # of tensor memory, for ten products of 64
        assert (len(offers) > 1) != no_columns and len(set(offers)) == len(offers) <= 6
        narrow = LARGE.replace(pass_="wgrad", kernel_size=(depth, 3, 3), arch=arch, dtype=dtype, precision=precision)
        offers = ENGINE.configs(narrow.replace(in_channels=32, out_channels=32))
        assert 1 < len(offers) <= 30 and len(set(offers)) == len(offers)
        wide = narrow.replace(in_channels=192, out_channels=192)
        has_room = arch != "sm_100" and (depth < 5 or dtype == "float16")
        assert (ENGINE.supports(wide) is None) == (len(ENGINE.configs(wide)) > 1) == has_room
