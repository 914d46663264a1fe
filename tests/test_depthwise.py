"""The depthwise engine in Triton's interpreter or on the GPU: fuzzing, every config, every layout, and its promises.

What is checked of each call stands in one place, :func:`cases.run`.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools

import pytest
import torch
from cases import DTYPES, LAYOUTS, check_footprint, make, pose, run, seeds
from depthwise_cases import ENGINE, FIRST, LAST, depthwise, fuzz_case, large
from guarded import run_modes

from triton_conv3d import reference
from triton_conv3d.engines.depthwise.configs import smallest
from triton_conv3d.engines.depthwise.geometry import plan
from triton_conv3d.problem import PASSES, met_taps

IN_CI = 300


# ------------------------------------------------------------------------------------------------- T1 and T2


@pytest.mark.parametrize("seed", seeds(IN_CI, 3_000))
@pytest.mark.parametrize("pass_", PASSES)
def test_fuzz(pass_: str, seed: int) -> None:
    case, config = fuzz_case(pass_, seed)
    run(case, ENGINE, config)


@pytest.mark.parametrize("pass_", PASSES)
def test_fuzzer_reaches_everything(pass_: str) -> None:
    """The drawn cases cover what the fuzzer promises; a fuzzer that shrinks unnoticed tests nothing."""
    seen: collections.Counter = collections.Counter()
    for seed in range(IN_CI):
        case, config = fuzz_case(pass_, seed)
        problem = case.geometry()
        at = plan(problem, config)
        size = problem.input_size if pass_ == "dgrad" else problem.output_size
        seen.update([case.dtype, *case.layouts, f"last={case.channels_last}", f"bias={case.bias}", config.kernel])
        seen.update(["x".join(map(str, case.kernel_size)), f"multiplier={case.out_channels // case.in_channels}"])
        seen["odd channels"] += case.in_channels % 8 > 0
        seen["one channel"] += case.in_channels == 1
        seen["strided"] += case.stride != (1, 1, 1)
        seen["dilated"] += case.dilation != (1, 1, 1)
        seen["asymmetric"] += case.padding[::2] != case.padding[1::2]
        seen["taps skipped"] += met_taps(problem).kernel != case.kernel_size
        seen["kernel above input"] += any(k > i for k, i in zip(case.kernel_size, case.input_size, strict=True))
        seen["dilation above input"] += any(
            d >= i and k > 1 for d, i, k in zip(case.dilation, case.input_size, case.kernel_size, strict=True)
        )
        seen["width below strip"] += size[2] < config.columns
        seen["several tiles"] += max(at.tiles) > 1
        seen["several parts"] += config.splits > 1
    wanted = [*DTYPES, *LAYOUTS, "last=True", "last=False", "slide"]
    wanted += ["3x3x3", "5x5x5", "7x7x7", "1x3x3", "3x1x1", "5x1x1"]
    wanted += ["multiplier=1", "multiplier=2", "multiplier=3", "odd channels", "one channel", "strided", "dilated"]
    wanted += ["asymmetric", "taps skipped", "kernel above input", "dilation above input", "width below strip"]
    wanted += ["several tiles", "several parts"] + ["rows"] * (pass_ != "wgrad") + ["bias=True"] * (pass_ == "forward")
    assert {name: seen[name] for name in wanted if seen[name] < 5} == {}


def test_a_seed_gives_one_case() -> None:
    assert fuzz_case("dgrad", 11) == fuzz_case("dgrad", 11)


# Eight shapes for every config: ragged in every direction, one after another against strips and tiles of every size.
SHAPES = {
    "one": dict(channels=1, input_size=(1, 1, 1), kernel_size=(1, 1, 1)),
    "aligned": dict(channels=16, input_size=(1, 3, 8), kernel_size=(1, 2, 3), padding=(0, 0, 1, 0, 1, 1)),
    "ragged": dict(channels=7, batch=2, input_size=(2, 5, 3), kernel_size=(2, 1, 3), padding=(1, 0, 0, 0, 1, 1)),
    "strided": dict(
        channels=5, input_size=(3, 5, 6), kernel_size=(2, 3, 2), stride=(2, 2, 2), padding=(1, 0, 0, 1, 1, 0)
    ),
    "wide": dict(channels=40, input_size=(1, 1, 19), kernel_size=(1, 1, 2)),
    "multiplier": dict(channels=3, multiplier=2, input_size=(2, 2, 4), kernel_size=(2, 1, 2)),
    "dilated": dict(
        channels=3, input_size=(4, 4, 7), kernel_size=(2, 1, 2), dilation=(3, 1, 2), padding=(0, 0, 0, 0, 2, 1)
    ),
    "tall": dict(channels=2, input_size=(1, 11, 2), kernel_size=(1, 3, 1), padding=(0, 0, 1, 1, 0, 0)),
}
LAYERS = (
    dict(),
    dict(stride=(2, 2, 2)),
    dict(kernel_size=(5, 5, 5), padding=(2,) * 6),
    dict(kernel_size=(1, 3, 3), padding=(0, 0, 1, 1, 1, 1)),
    dict(kernel_size=(5, 1, 1), padding=(2, 2, 0, 0, 0, 0)),
)


def strips(pass_: str) -> list:
    """Every config, but for its splits, that the engine offers to some large layer."""
    problems = [
        large(pass_, *kind, **layer) for kind in itertools.product(DTYPES[1:], LAST[:1] + FIRST[:1]) for layer in LAYERS
    ]
    found = {
        dataclasses.replace(config, splits=1): problem.layouts[0]
        for problem in problems
        for config in ENGINE.configs(problem)
    }
    return [
        pytest.param(pass_, config, layout, id=f"{pass_}-" + "x".join(map(str, vars(config).values())))
        for config, layout in sorted(found.items(), key=str)
    ]


@pytest.mark.parametrize("pass_, config, layout", [param for pass_ in PASSES for param in strips(pass_)])
def test_every_config_is_exact(pass_: str, config, layout: str) -> None:
    """On every other shape, the next config on the others."""
    shapes = list(enumerate(SHAPES.values()))
    for i, shape in shapes[sum(map(ord, str(config))) % 2 :: 2]:
        case = depthwise(
            pass_, dtype=DTYPES[i % 3], layouts=(layout,) * 2, channels_last=layout == LAST[0], seed=i, **shape
        )
        problem, _ = make(case)
        if pass_ == "dgrad":
            if config.kernel == "slide" and case.in_channels != case.out_channels:
                continue  # not offered: it holds one filter of a channel
            _, rows, columns = problem.stride if config.kernel == "slide" else (1, 1, problem.stride[2])
            config = dataclasses.replace(
                config, rows=-(-config.rows // rows) * rows, columns=-(-config.columns // columns) * columns
            )
        run(case, ENGINE, dataclasses.replace(config, splits=1 + i % 3))


@pytest.mark.parametrize("pass_", PASSES)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_offered_config_is_exact(shape: str, pass_: str) -> None:
    """What the engine itself offers for a shape, the smallest last and no config twice."""
    for layouts in (LAST, FIRST):
        case = depthwise(pass_, dtype="float16", layouts=layouts, channels_last=layouts == LAST, **SHAPES[shape])
        problem, _ = make(case)
        offers = ENGINE.configs(problem)
        assert offers[-1] == smallest(problem) and len(set(offers)) == len(offers)
        for config in {offers[0], offers[-1]}:
            run(case, ENGINE, config)


@pytest.mark.parametrize("pass_", PASSES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str, pass_: str) -> None:
    """Random data in each layout beside the next one, and the other way round, in another type for each pass; both result
    formats, the first and the last config."""
    names = list(LAYOUTS)
    following = names[(names.index(layout) + 1) % len(names)]
    i = (names.index(layout) + PASSES.index(pass_)) % 3
    case = depthwise(
        pass_, channels=(8, 3, 16)[i], batch=2, input_size=(2, 4, 5), kernel_size=(2, 1, 3), stride=(1, 2, 1),
        padding=(0, 1, 0, 0, 1, 0), dtype=DTYPES[i], exact=False, layouts=(layout, following), channels_last=i == 1,
    )  # fmt: skip
    run(case, ENGINE, ENGINE.configs(make(case)[0])[0])
    run(case.replace(channels_last=i != 1, layouts=(following, layout)), ENGINE)


# Geometries at the borders of what a convolution can be.
SPECIAL = {
    "pointwise": dict(channels=9, kernel_size=(1, 1, 1)),
    "single_frame": dict(input_size=(1, 6, 5), padding=(1,) * 6),
    "one_pixel": dict(input_size=(1, 1, 1), padding=(1,) * 6, batch=5),
    "kernel_is_input": dict(kernel_size=(3, 2, 4), input_size=(3, 2, 4), batch=3),
    "kernel_above_input": dict(kernel_size=(5, 4, 7), input_size=(2, 1, 2), padding=(2, 2, 3, 1, 3, 3)),
    "dilation_above_input": dict(dilation=(9, 8, 100), padding=(9, 9, 8, 8, 100, 100), input_size=(2, 4, 5)),
    "taps_skip_the_input": dict(kernel_size=(2, 2, 2), dilation=(4, 4, 4), padding=(2,) * 6, input_size=(1, 2, 3)),
    "stride_above_kernel": dict(kernel_size=(1, 2, 1), stride=(3, 4, 2), input_size=(5, 7, 4)),
    "stride_above_input": dict(kernel_size=(2, 1, 2), stride=(4, 3, 5), input_size=(3, 2, 4)),
    "padding_above_kernel": dict(kernel_size=(1, 2, 1), padding=(2, 3, 3, 2, 0, 1), input_size=(2, 1, 3)),
    "padding_unequal": dict(kernel_size=(2, 4, 2), padding=(0, 1, 1, 2, 1, 0)),
    "dilation_shares_stride": dict(kernel_size=(2, 3, 2), stride=(2, 2, 6), dilation=(2, 4, 4), input_size=(6, 9, 8)),
    "dilation_is_prime_to_stride": dict(kernel_size=(3, 2, 3), stride=(2, 3, 3), dilation=(3, 2, 1), input_size=(8, 7, 6)),
    "many_taps": dict(channels=2, kernel_size=(1, 2, 19), input_size=(1, 2, 24), padding=(0, 0, 0, 0, 7, 1)),
    "many_taps_strided": dict(
        channels=2, kernel_size=(1, 1, 19), input_size=(1, 2, 24), stride=(1, 1, 3), dilation=(1, 1, 2),
        padding=(0, 0, 0, 0, 20, 1),
    ),
    "one_channel": dict(channels=1, multiplier=3, input_size=(3, 4, 9), padding=(1,) * 6),
    "multiplier": dict(channels=4, multiplier=3, kernel_size=(2, 2, 1), input_size=(3, 3, 2)),
}  # fmt: skip


@pytest.mark.parametrize("pass_", PASSES)
@pytest.mark.parametrize("name", SPECIAL)
def test_special_geometries(name: str, pass_: str) -> None:
    for layouts in (LAST, FIRST):
        case = depthwise(pass_, **{"layouts": layouts, "channels_last": layouts == LAST, **SPECIAL[name]})
        offers = ENGINE.configs(make(case)[0])
        for config in {offers[0], offers[-1]}:
            run(case, ENGINE, config)
    run(case.replace(dtype="float16", channels_last=True), ENGINE)


@pytest.mark.parametrize("dtype", DTYPES)
def test_bias(dtype: str) -> None:
    """Fused: one value for all pixels, also for those that only meet padding, and for every part of the depth."""
    case = depthwise(
        "forward", 6, 2, input_size=(3, 2, 3), kernel_size=(1, 1, 3), padding=(1, 1, 0, 0, 3, 3), bias=True, dtype=dtype
    )
    for channels_last, exact in itertools.product((True, False), (True, False)):
        case = case.replace(channels_last=channels_last, exact=exact)
        for config in ENGINE.configs(make(case)[0])[-2:]:
            run(case, ENGINE, dataclasses.replace(config, splits=2))


# ---------------------------------------------------------------------------------------------- reductions


@pytest.mark.parametrize("splits", [1, 2, 3, 4, 7, 201])
@pytest.mark.parametrize("pass_", PASSES)
def test_splits(pass_: str, splits: int) -> None:
    """7 and 201 are more parts than there is work: some stay empty."""
    case = depthwise(
        pass_, 5, batch=2, input_size=(3, 3, 4), kernel_size=(2, 1, 2), dtype="float16", padding=(0, 1, 0, 0, 1, 1)
    )
    for config in {ENGINE.configs(make(case)[0])[i] for i in (0, -1)}:
        run(case, ENGINE, dataclasses.replace(config, splits=splits))


def test_partial_sums_are_float32() -> None:
    """Parts of a sum that float16 cannot hold: 90000 - 144000 + 90000."""
    case = depthwise("wgrad", 1, input_size=(3, 1, 36), kernel_size=(1, 1, 1), dtype="float16")
    _, operands = make(case)
    operands.input.fill_(50.0)
    operands.grad.fill_(50.0)
    operands.grad[:, :, 1].fill_(-80.0)
    problem = pose(case, operands)
    result = ENGINE.launch(problem, operands, dataclasses.replace(smallest(problem), splits=3))
    assert result.item() == 36_000.0


def test_equal_bits_in_every_run() -> None:
    case = depthwise("wgrad", 5, batch=2, input_size=(3, 4, 5), padding=(1,) * 6, exact=False, dtype="float16")
    problem, operands = make(case)
    config = dataclasses.replace(ENGINE.configs(problem)[0], splits=3)
    first = ENGINE.launch(problem, operands, config)
    for _ in range(3):
        assert torch.equal(ENGINE.launch(problem, operands, config), first)


@pytest.mark.parametrize("pass_", PASSES)
def test_errors_are_not_above_the_peers(pass_: str) -> None:
    """T3: against torch's own convolution in the same precision, and over the same data."""
    import tolerances

    from triton_conv3d import engines

    case = depthwise(
        pass_, 16, batch=2, input_size=(4, 5, 4), padding=(1, 1, 0, 0, 1, 0), dtype="bfloat16", exact=False
    )
    problem, operands = make(case)
    expected, scale = reference.compute(problem, operands), reference.magnitude(problem, operands)
    aten = engines.get("aten")
    ours = ENGINE.launch(problem, operands, smallest(problem))
    peer = aten.launch(problem, operands, aten.configs(problem)[0])
    tolerances.check_peer(tolerances.errors(ours, expected, scale), tolerances.errors(peer, expected, scale))


# ---------------------------------------------------------------------------------------------- memory safety


def test_in_a_process_of_its_own() -> None:
    """end, start: tensors flush with pages that fault; checked: no 32-bit overflow; large: offsets beyond 2^31."""
    run_modes("depthwise_cases.py", "end", "start", "checked", "large")


@pytest.mark.parametrize("pass_", PASSES)
@pytest.mark.parametrize("which", [0, 1], ids=["first_operand", "second_operand"])
def test_one_nan_touches_only_its_footprint(which: int, pass_: str) -> None:
    """The result is NaN where the definition multiplies that element, and exact everywhere else.

    A weight in dgrad, and a NaN at the border in wgrad, may also meet zeros that stand for padding: 0 * NaN, but only in
    their own channel.
    """
    problem, operands = make(depthwise(pass_, 5, batch=2, input_size=(3, 5, 6), padding=(1, 1, 0, 1, 1, 0)))

    def beyond(where: tuple[int, ...]) -> tuple | None:
        if pass_ == "wgrad":
            return (where[1],)
        return (slice(None), where[0]) if (pass_, which) == ("dgrad", 0) else None

    check_footprint(ENGINE, problem, operands, which, beyond)
