"""Every engine, every config, every layout, dtype and precision, in Triton's interpreter or on the GPU.

What is checked of each call stands in one place, :func:`cases.run`.
"""

from __future__ import annotations

import dataclasses
import threading
import types
from functools import partial

import pytest
import tolerances
import torch
from cases import DEVICE, LAYOUTS, Case, engines_for, make, pose, run

from triton_conv3d import engines, reference
from triton_conv3d.engines.base import switched
from triton_conv3d.problem import PASSES, Problem, device_name
from triton_conv3d.tuning import cost_model

KINDS = (("float16", "ieee"), ("bfloat16", "ieee"), ("float32", "ieee"), ("float32", "tf32"), ("float32", "tf32x3"))
GATHER, WGRAD = ("forward", "dgrad"), ("wgrad",)

# Eight shapes for every config: ragged in every direction, one after another against tiles of every size.
SHAPES = {
    "one": dict(in_channels=1, out_channels=1, input_size=(1, 1, 1), kernel_size=(1, 1, 1)),
    "aligned": dict(in_channels=16, out_channels=24, input_size=(2, 3, 4), kernel_size=(1, 2, 2)),
    "ragged": dict(
        batch=2, in_channels=7, out_channels=19, input_size=(3, 5, 2), kernel_size=(2, 1, 3), padding=(1, 1, 0, 0, 1, 1)
    ),
    "strided": dict(
        batch=2, in_channels=5, out_channels=9, input_size=(4, 5, 3), kernel_size=(3, 2, 1), stride=(2, 2, 1),
        padding=(1, 0, 0, 1, 0, 0),
    ),
    "wide": dict(in_channels=70, out_channels=33, input_size=(1, 2, 5), kernel_size=(1, 1, 1)),
    "groups": dict(in_channels=15, out_channels=20, groups=5, input_size=(3, 3, 3), kernel_size=(2, 1, 2)),
    "dilated": dict(
        in_channels=3, out_channels=10, input_size=(5, 4, 7), kernel_size=(2, 1, 3), dilation=(3, 1, 2),
        padding=(0, 0, 0, 0, 2, 1),
    ),
    "tall": dict(in_channels=2, out_channels=3, input_size=(5, 7, 9), kernel_size=(1, 1, 2), padding=(0, 0, 0, 0, 1, 0)),
}  # fmt: skip


def large(pass_: str, dtype: str, precision: str, channels: int = 512) -> Problem:
    """A problem that takes every wide tile of an engine's tables, of this GPU or else of the one with the most; with 16
    channels every narrow one."""
    arch = device_name(DEVICE)[1] if DEVICE.type == "cuda" else "sm_90"
    return Problem(
        pass_, 64, channels, channels, (64, 64, 64), (3, 3, 3), dtype=dtype, precision=precision, arch=arch, device="any"
    )  # fmt: skip


def tiles(pass_: str) -> list:
    """(dtype, precision, config) for every tile that implicit_gemm offers to some large problem."""
    gemm = engines.get("implicit_gemm")
    return [
        pytest.param(dtype, precision, config, id=f"{pass_}-{dtype}-{precision}-" + "x".join(map(str, vars(config).values())))
        for dtype, precision in KINDS
        for config in dict.fromkeys(
            dataclasses.replace(config, splits=1)
            for channels in (512, 96, 16)
            for config in gemm.configs(large(pass_, dtype, precision, channels))
        )
    ]  # fmt: skip


@pytest.mark.parametrize("pass_, dtype, precision, config", [
    pytest.param(pass_, *param.values, id=param.id) for pass_ in PASSES for param in tiles(pass_)
])  # fmt: skip
def test_every_config_is_exact(pass_: str, dtype: str, precision: str, config) -> None:
    """On every other shape, the next config on the others."""
    shapes = list(enumerate(SHAPES.values()))
    for i, shape in shapes[sum(map(ord, str(config))) % 2 :: 2]:
        case = Case(pass_, dtype=dtype, precision=precision, channels_last=i % 2 == 0, seed=i, **shape)
        run(case, "implicit_gemm", dataclasses.replace(config, splits=1 + (i % 4 == 2)))


@pytest.mark.parametrize("pass_", PASSES)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_offered_config_is_exact(shape: str, pass_: str) -> None:
    """What the engines themselves offer for a shape, smallest last and no config twice."""
    case = Case(pass_, dtype="float16", **SHAPES[shape])
    problem, _ = make(case)
    for name in engines_for(problem):
        offers = engines.get(name).configs(problem)
        assert offers and len(set(offers)) == len(offers)
        for config in offers:
            run(case, name, config)


@pytest.mark.parametrize("pass_", PASSES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype, precision", KINDS)
def test_layouts(dtype: str, precision: str, layout: str, pass_: str) -> None:
    """Each layout for the first operand and, with the next one beside it, for the second; both result formats."""
    names = list(LAYOUTS)
    following = names[(names.index(layout) + 1) % len(names)]
    case = Case(
        pass_, batch=2, in_channels=8, out_channels=8, input_size=(2, 4, 3), kernel_size=(2, 1, 2),
        stride=(1, 2, 1), padding=(0, 1, 0, 0, 1, 0), dtype=dtype, precision=precision, exact=False,
    )  # fmt: skip
    run(case.replace(layouts=(layout, following)), "implicit_gemm")
    run(case.replace(layouts=(following, layout), channels_last=False, in_channels=3, out_channels=5), "implicit_gemm")


# Geometries at the borders of what a convolution can be.
SPECIAL = {
    "pointwise": dict(kernel_size=(1, 1, 1), in_channels=9, out_channels=17),
    "pointwise_strided": dict(kernel_size=(1, 1, 1), stride=(2, 1, 3), input_size=(4, 2, 7)),
    "patches": dict(kernel_size=(2, 3, 1), stride=(2, 3, 1), input_size=(4, 6, 2), batch=2),
    "patches_with_rest": dict(kernel_size=(2, 2, 2), stride=(2, 2, 2), input_size=(5, 3, 7)),
    "kernel_is_input": dict(kernel_size=(3, 2, 4), input_size=(3, 2, 4), batch=3),
    "one_dimension": dict(kernel_size=(1, 1, 5), input_size=(1, 1, 9), padding=(0, 0, 0, 0, 2, 2)),
    "flat": dict(kernel_size=(1, 3, 3), input_size=(1, 5, 4), padding=(0, 0, 1, 1, 1, 1)),
    "one_pixel": dict(kernel_size=(3, 3, 3), input_size=(1, 1, 1), padding=(1,) * 6, batch=5),
    "kernel_above_input": dict(kernel_size=(5, 4, 3), input_size=(2, 1, 1), padding=(2, 2, 3, 1, 1, 1)),
    "stride_above_kernel": dict(kernel_size=(1, 2, 1), stride=(3, 4, 2), input_size=(5, 7, 4)),
    "stride_above_input": dict(kernel_size=(2, 1, 2), stride=(4, 3, 5), input_size=(3, 2, 4)),
    "padding_above_kernel": dict(kernel_size=(1, 2, 1), padding=(2, 3, 3, 2, 0, 1), input_size=(2, 1, 3)),
    "padding_unequal": dict(kernel_size=(2, 4, 2), padding=(0, 1, 1, 2, 1, 0)),
    "dilation_shares_stride": dict(kernel_size=(2, 3, 2), stride=(2, 2, 6), dilation=(2, 4, 4), input_size=(6, 9, 8)),
    "dilation_is_prime_to_stride": dict(kernel_size=(3, 2, 3), stride=(2, 3, 3), dilation=(3, 2, 1), input_size=(8, 7, 6)),
    "taps_skip_the_input": dict(kernel_size=(2, 2, 2), dilation=(4, 4, 4), padding=(2,) * 6, input_size=(1, 2, 3)),
    "rest_of_stride": dict(kernel_size=(2, 2, 2), stride=(3, 2, 3), input_size=(7, 7, 7)),
    "one_channel": dict(in_channels=1, out_channels=6, padding=(1,) * 6),
    "one_filter": dict(in_channels=6, out_channels=1, padding=(1,) * 6),
    "groups": dict(in_channels=6, out_channels=10, groups=2, batch=2),
    "groups_aligned": dict(in_channels=16, out_channels=32, groups=2, kernel_size=(2, 2, 2)),
    "groups_fill_no_tile": dict(in_channels=21, out_channels=14, groups=7, input_size=(2, 3, 1), kernel_size=(3, 2, 5),
                                dilation=(4, 1, 1), padding=(4, 4, 1, 0, 2, 2)),
    "depthwise": dict(in_channels=11, out_channels=11, groups=11, kernel_size=(2, 1, 2), input_size=(2, 2, 3)),
    "channel_multiplier": dict(in_channels=4, out_channels=12, groups=4, kernel_size=(2, 2, 1), input_size=(3, 3, 2)),
    "one_output_pixel_each_class": dict(kernel_size=(3, 3, 3), stride=(3, 3, 3), input_size=(3, 3, 3), batch=2),
    "many_taps": dict(kernel_size=(1, 2, 36), input_size=(1, 2, 37), in_channels=2, out_channels=2),
}  # fmt: skip


@pytest.mark.parametrize("pass_", PASSES)
@pytest.mark.parametrize("name", SPECIAL)
def test_special_geometries(name: str, pass_: str) -> None:
    """On every engine that takes them, channels-last and exact, and contiguous, random or of 16 bits in turn; on those that
    rewrite them once, by their predicted fastest config."""
    case = Case(pass_, **SPECIAL[name])
    problem = case.geometry()
    for engine in engines_for(problem):
        offers = engines.get(engine).configs(problem)
        if hasattr(offers[-1], "engine"):
            run(case, engine, min(offers, key=partial(cost_model.predict, problem, engines.get(engine))))
            continue
        run(case, engine)
        random = (list(SPECIAL).index(name) + PASSES.index(pass_)) % 2 == 0
        more = dict(layouts=("contiguous", "contiguous"), exact=False) if random else dict(dtype="float16")
        run(case.replace(channels_last=False, **more), engine)


@pytest.mark.parametrize("pass_", PASSES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("name", ["pointwise", "patches", "patches_with_rest", "kernel_is_input"])
def test_matmul(name: str, dtype: str, pass_: str) -> None:
    """matmul takes these, in every layout."""
    case = Case(pass_, dtype=dtype, **SPECIAL[name])
    assert engines.get("matmul").supports(case.geometry()) is None
    for i, layout in enumerate(LAYOUTS):
        case = case.replace(layouts=(layout, layout), channels_last=i % 2 == 0, exact=i % 3 > 0)
        run(case, "matmul")
        if pass_ == "forward":
            run(case.replace(bias=True), "matmul")


@pytest.mark.parametrize("splits", [1, 2, 3, 4, 7, 201])
@pytest.mark.parametrize("pass_", PASSES)
def test_splits(pass_: str, splits: int) -> None:
    """The reduction in parts; 7 and 201 are more than there are steps, so that some parts are empty."""
    config = engines.get("implicit_gemm").configs(large(pass_, "float16", "ieee"))[-1]
    config = dataclasses.replace(config, splits=splits)
    case = Case(
        pass_, in_channels=4, out_channels=5, input_size=(3, 3, 4), kernel_size=(2, 1, 2), dtype="float16",
        padding=(0, 1, 0, 0, 1, 1), bias=pass_ == "forward",
    )  # fmt: skip
    run(case, "implicit_gemm", config)
    if splits < 7:
        run(case.replace(channels_last=False, groups=1, exact=False, dtype="bfloat16"), "implicit_gemm", config)
        run(case.replace(in_channels=4, out_channels=6, groups=2, stride=(1, 1, 2)), "implicit_gemm", config)


def test_partial_sums_are_float32() -> None:
    """Halves of a sum that float16 cannot hold: 40000 + 40000 - 40000."""
    case = Case(
        "forward", in_channels=1, out_channels=1, kernel_size=(1, 1, 48), input_size=(1, 1, 48), dtype="float16"
    )
    config = dataclasses.replace(engines.get("implicit_gemm").configs(case.geometry())[-1], splits=3)
    _, operands = make(case)
    operands.input.fill_(50.0)
    operands.weight.fill_(50.0)
    operands.weight[..., 32:] = -50.0
    problem = pose(case, operands)
    result = engines.get("implicit_gemm").launch(problem, operands, config)
    assert result.item() == 40_000.0


@pytest.mark.parametrize("pass_", PASSES)
@pytest.mark.parametrize("dtype, precision", [("float16", "ieee"), ("float32", "tf32")])
def test_narrow_tiles_are_for_narrow_layers(pass_: str, dtype: str, precision: str) -> None:
    """Wide ones are offered steps of 64 bytes and rows of 32 filters, but for the smallest tile, which takes all."""
    knob, least = ("block_m", 32) if pass_ == "wgrad" else ("block_k", 32 if dtype == "float16" else 16)
    for channels in (16, 24, 64):
        *tiles, smallest = engines.get("implicit_gemm").configs(large(pass_, dtype, precision, channels))
        narrow = [tile for tile in tiles if getattr(tile, knob) < least and tile.replace(splits=1) != smallest]
        assert bool(narrow) == (channels == 16 and least > 16)


@pytest.mark.parametrize("engine", ("implicit_gemm", "tma", "hopper"))
@pytest.mark.parametrize("channels, step", ((64, 64), (96, 32), (160, 32), (192, 64), (288, 64), (1000, 64)))
def test_large_tiles_take_steps_that_walk_few_channels_beyond_the_last(channels: int, step: int, engine: str) -> None:
    """The engines whose copies are of bricks also offer the long step, which copies whole lines of memory."""
    problem = large("forward", "float16", "ieee", 512).replace(in_channels=channels)
    offers = [config for config in engines.get(engine).configs(problem) if config.block_n >= 128]
    steps = {config.block_k for config in offers if config.num_warps == 8 and config.block_k < 128}
    assert steps == ({step} if engine == "implicit_gemm" else {step, 64})


def test_wgrad_chain_longer_than_one_accumulator() -> None:
    """More pixels than CHAIN: the partial accumulators join one total, the last of them short."""
    from triton_conv3d.engines.base import CHAIN

    case = Case("wgrad", in_channels=1, out_channels=2, input_size=(17, 31, 32), kernel_size=(1, 1, 1), dtype="float16")
    assert CHAIN < 17 * 31 * 32 < 2 * CHAIN
    gemm = engines.get("implicit_gemm")
    config = next(c for c in gemm.configs(large("wgrad", "float16", "ieee", 16)) if c.block_k == 64)
    for splits in (1, 2):
        run(case, "implicit_gemm", dataclasses.replace(config, splits=splits))


@pytest.mark.parametrize("engine", ["implicit_gemm", "matmul", "aten"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_bias(dtype: str, engine: str) -> None:
    """Fused, in the result's own type, with ragged filters, groups (where supported), and one value for all pixels."""
    case = Case("forward", batch=2, in_channels=6, out_channels=18, kernel_size=(1, 1, 1), bias=True, dtype=dtype)
    for channels_last in (True, False):
        run(case.replace(channels_last=channels_last), engine)
        run(case.replace(channels_last=channels_last, exact=False), engine)
        if engine != "matmul":
            run(case.replace(channels_last=channels_last, groups=3, kernel_size=(2, 1, 2)), engine)


@pytest.mark.parametrize("pass_", PASSES)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_errors_are_not_above_the_peers(dtype: str, pass_: str) -> None:
    """T3: against torch's own convolution in the same precision, and over the same data."""
    case = Case(
        pass_, batch=2, in_channels=16, out_channels=16, input_size=(4, 5, 4), kernel_size=(3, 1, 2),
        padding=(1, 1, 0, 0, 1, 0), dtype=dtype, exact=False,
    )  # fmt: skip
    problem, operands = make(case)
    measured = []
    for name in ("implicit_gemm", "aten"):
        engine = engines.get(name)
        # The last config is one for GPUs: the interpreter's own tile sums as the CPU's matrix product happens to.
        result = engine.launch(problem, operands, engine.configs(problem)[-1])
        measured.append(
            tolerances.errors(result, reference.compute(problem, operands), reference.magnitude(problem, operands))
        )
    assert measured[0].rms > 0
    tolerances.check_peer(*measured)


def test_wgrad_gathers_the_narrower_side() -> None:
    """Of 96 channels and 24 filters, with the same bytes and products as of 24 and 96; not with a stride or groups, and
    not where the input has many more pixels than the gradient."""
    from triton_conv3d.engines.implicit_gemm.configs import exchanged

    gemm = engines.get("implicit_gemm")
    wide = large("wgrad", "float16", "ieee").replace(in_channels=96, out_channels=24, padding=(1,) * 6)

    def least(problem: Problem, what: str) -> float:
        works = [gemm.work(problem, config) for config in gemm.configs(problem) if config.splits == 1]
        return min(getattr(work, what) * work.programs * work.iterations for work in works)

    for what in ("bytes_read", "flops"):
        assert least(wide, what) == least(wide.replace(in_channels=24, out_channels=96), what)
        assert least(wide.replace(stride=(1, 1, 2)), what) > 0.6 * least(wide, what)  # half of the pixels
    frame = dict(in_channels=128, out_channels=64, input_size=(3, 66, 66))
    assert exchanged(wide.replace(**frame)) and not exchanged(wide.replace(padding=(0,) * 6, **frame))  # of which one is left


def test_equal_bits_in_every_run() -> None:
    case = Case("wgrad", in_channels=5, out_channels=7, padding=(1,) * 6, exact=False, dtype="float16")
    gemm = engines.get("implicit_gemm")
    config = dataclasses.replace(gemm.configs(large("wgrad", "float16", "ieee"))[-1], splits=3)
    problem, operands = make(case)
    first = gemm.launch(problem, operands, config)
    for _ in range(3):
        assert torch.equal(gemm.launch(problem, operands, config), first)


# ---------------------------------------------------------------------------------- what engines take, and what not

COMMON = dict(batch=2, in_channels=4, out_channels=6, input_size=(4, 4, 4), kernel_size=(2, 2, 2))


@pytest.mark.parametrize("engine, changes, reason", [
    ("implicit_gemm", dict(dtype="float64"), "float64"),
    ("implicit_gemm", dict(dtype="complex64"), "complex64"),
    ("implicit_gemm", dict(arch="cpu"), "TRITON_INTERPRET"),
    ("implicit_gemm", dict(batch=0), "nothing to multiply"),
    ("implicit_gemm", dict(in_channels=0), "nothing to multiply"),
    ("implicit_gemm", dict(kernel_size=(1, 1, 62), input_size=(1, 1, 70)), "63"),
    ("implicit_gemm", dict(pass_="dgrad", stride=(64, 64, 64)), "parity classes"),
    ("implicit_gemm", dict(precision="tf32x3", dtype="float32", arch="gfx942"), "tf32x3"),
    ("matmul", dict(groups=2, stride=(2, 2, 2)), "groups=2"),
    ("matmul", dict(padding=(0, 0, 0, 0, 0, 1), stride=(2, 2, 2)), "padding"),
    ("matmul", dict(stride=(2, 1, 2)), "neither the stride"),
    ("matmul", dict(dilation=(2, 2, 2), stride=(2, 2, 2)), "dilation"),
    ("matmul", dict(dtype="complex64", stride=(2, 2, 2)), "complex64"),
    ("matmul", dict(dtype="float32", precision="tf32x3", stride=(2, 2, 2)), "tf32x3"),
    ("matmul", dict(arch="cpu", stride=(2, 2, 2)), "CPU"),
    ("matmul", dict(batch=0, stride=(2, 2, 2)), "nothing to multiply"),
])  # fmt: skip
def test_unsupported_problems_are_named(engine: str, changes: dict, reason: str) -> None:
    problem = Problem(**{"pass_": "forward", "arch": "interpreter", **COMMON, **changes})
    assert reason in engines.get(engine).supports(problem)
    if "arch" not in changes:  # without the change it is supported
        base = {"stride": changes["stride"]} if engine == "matmul" else {}
        base = {"stride": (2, 2, 2)} if base else base
        assert engines.get(engine).supports(Problem("forward", arch="interpreter", **COMMON, **base)) is None


@pytest.mark.parametrize("pass_", PASSES)
def test_aten_takes_everything(pass_: str) -> None:
    aten = engines.get("aten")
    problem, operands = make(Case(pass_, batch=2, padding=(1, 0, 0, 2, 1, 1), stride=(2, 1, 2), exact=False))
    double = operands.map(torch.Tensor.double)
    result = aten.launch(problem.replace(dtype="float64"), double, aten.configs(problem)[0])
    torch.testing.assert_close(result, reference.compute(problem, operands), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("engine, dtype, precision, within", [
    ("aten", "float32", "ieee", ("ieee", True, True)),
    ("aten", "float32", "tf32x3", ("ieee", True, True)),
    ("aten", "float32", "tf32", ("tf32", True, True)),
    ("aten", "float16", "ieee", ("tf32", True, True)),
    ("matmul", "float16", "ieee", ("tf32", False, True)),
    ("matmul", "bfloat16", "ieee", ("tf32", True, False)),
])  # fmt: skip
def test_torchs_switches_are_as_the_problem_wants_them(engine, dtype, precision, within, monkeypatch) -> None:
    """cuDNN's precision is the problem's, cuBLAS rounds no partial sums; and outside everything is as it was."""
    engine, own = engines.get(engine), torch.backends.cuda.matmul
    inside = {"aten": "_convolution", "matmul": "_product"}[engine.NAME]
    compute = getattr(engine, inside)

    def switches() -> tuple:
        sums = (own.allow_fp16_reduced_precision_reduction, own.allow_bf16_reduced_precision_reduction)
        return torch.backends.cudnn.conv.fp32_precision, *sums

    before, seen = switches(), []
    assert before == ("tf32", True, True)
    monkeypatch.setattr(engine, inside, lambda *args: seen.append(switches()) or compute(*args))
    problem, operands = make(Case("forward", kernel_size=(1, 1, 1), dtype=dtype, precision=precision))
    engine.launch(problem.replace(arch="sm_90"), operands, engine.configs(problem)[0])
    assert seen == [within] and switches() == before


def test_threads_take_turns_with_torchs_switches() -> None:
    """A thread that finds a switch as it wants it must not lose it to another, which sets it back."""
    switch, entered, other = types.SimpleNamespace(value="mine"), threading.Event(), threading.Event()

    def first() -> None:
        with switched(switch, "value", "wanted"):
            entered.set()
            other.wait(0.1)

    thread = threading.Thread(target=first)
    thread.start()
    entered.wait()
    with switched(switch, "value", "wanted"):
        other.set()
        thread.join()
        assert switch.value == "wanted"
    assert switch.value == "mine"


def test_engine_names() -> None:
    names = "matmul depthwise folded implicit_gemm halo kn2row tma hopper padded subpixel rounded".split()
    assert list(engines.available()) == [*names, "space_to_depth", "block_diagonal", "toeplitz", "aten"]
    for name, engine in engines.available().items():
        assert engine.NAME == name
    with pytest.raises(ValueError, match=r"no engine named 'cudnn': the engines are .*implicit_gemm"):
        engines.get("cudnn")


@pytest.mark.parametrize("pass_", PASSES)
def test_memory_counts_copies_and_partial_sums(pass_: str) -> None:
    gemm = engines.get("implicit_gemm")
    case = Case(pass_, batch=2, in_channels=4, out_channels=6, dtype="float16")

    def used(case: Case, splits: int = 1):
        problem, _ = make(case)
        return gemm.memory(problem, dataclasses.replace(gemm.configs(problem)[-1], splits=splits))

    problem, operands = make(case)
    assert used(case) == engines.base.Memory()
    assert used(case, splits=3).workspace == 3 * 4 * problem.empty_result(DEVICE).numel()
    both = sum(t.numel() * t.element_size() for t in operands.tensors if t is not None)
    assert used(case.replace(layouts=("contiguous", "contiguous"))).copies == both
    assert used(case.replace(layouts=("channel_step", "channel_step"))).copies == both
    # What is gathered from may be a view; the weight, and the gradient that wgrad walks along, have to be dense.
    dense = operands.grad if pass_ == "wgrad" else operands.weight
    assert used(case.replace(layouts=("cropped", "cropped"))).copies == dense.numel() * dense.element_size()
