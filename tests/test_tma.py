"""The tma engine in Triton's interpreter or on the GPU: exact in every pass, and what it refuses.

What is checked of each call stands in :func:`cases.run`; bricks and views alone in test_tma_geometry.py.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from cases import DEVICE, Case, check_footprint, make, run

from triton_conv3d import configure, conv3d, engines
from triton_conv3d.engines import launching
from triton_conv3d.problem import PASSES, Operands, Problem, describe, device_name
from triton_conv3d.tuning.measure import QUICK_CANDIDATES
from triton_conv3d.tuning.search import search
from triton_conv3d.tuning.select import ranking, refusals
from triton_conv3d.tuning.variants import kept

pytest.importorskip("triton")
ENGINE = engines.get("tma")
pytestmark = pytest.mark.skipif(
    device_name(DEVICE)[1] not in ENGINE._ARCHITECTURES, reason="neither sm_90, sm_100 nor the interpreter"
)

RAGGED = dict(
    batch=2, in_channels=24, out_channels=40, input_size=(2, 3, 7), kernel_size=(2, 1, 3), padding=(1, 0, 1, 0, 0, 2),
    dtype="float16",
)  # fmt: skip
GEOMETRIES = {
    "ragged": dict(),
    "7x7": dict(input_size=(1, 7, 7), kernel_size=(1, 3, 3), padding=(0, 0, 1, 1, 1, 1), batch=1),
    "one_pixel": dict(in_channels=8, out_channels=8, input_size=(1, 1, 1), kernel_size=(3, 1, 3), padding=(1,) * 6),
    "pointwise": dict(kernel_size=(1, 1, 1), padding=(0,) * 6, in_channels=72),
    "causal": dict(padding=(2, 0, 1, 1, 1, 1), kernel_size=(3, 2, 2), in_channels=8, out_channels=8),
    "padding_above_kernel": dict(input_size=(2, 1, 3), kernel_size=(1, 2, 1), padding=(2, 3, 3, 2, 0, 1)),
    "dilated": dict(dilation=(1, 2, 3), input_size=(3, 5, 7)),
    "strided": dict(stride=(2, 2, 2), input_size=(5, 4, 7)),
    "strided_in_one": dict(stride=(1, 1, 3), kernel_size=(1, 2, 3)),
    "stride_above_kernel": dict(stride=(3, 4, 2), kernel_size=(1, 2, 1), input_size=(5, 7, 4)),
    "stride_3": dict(stride=(3, 3, 3), kernel_size=(3, 2, 2), input_size=(4, 5, 6), out_channels=8),
    "stride_meets_dilation": dict(stride=(2, 2, 6), dilation=(2, 4, 4), kernel_size=(2, 3, 2), input_size=(4, 8, 7)),
    "views_beyond_the_input": dict(stride=(3, 1, 3), input_size=(1, 3, 2), kernel_size=(3, 1, 3), padding=(1, 1, 0, 0, 2, 2)),
    "no_view": dict(stride=(2, 1, 1), input_size=(1, 3, 7), kernel_size=(1, 2, 2), padding=(1, 1, 0, 0, 0, 0)),
    "lone_view": dict(stride=(2, 1, 1), input_size=(1, 1, 4), kernel_size=(3, 1, 3), padding=(2, 2, 0, 0, 0, 0)),
    "groups": dict(in_channels=32, out_channels=64, groups=2, batch=1),
}  # fmt: skip


@pytest.mark.parametrize("pass_", PASSES)
@pytest.mark.parametrize("name", GEOMETRIES)
def test_geometries(name: str, pass_: str) -> None:
    """Exact, and some random in bfloat16, with bias, in the format that is not channels-last."""
    case = Case(pass_, **{**RAGGED, **GEOMETRIES[name]})
    config = ENGINE.configs(case.geometry())[0]
    run(case, ENGINE, config)
    if name in ("ragged", "strided", "groups"):
        run(case.replace(dtype="bfloat16", channels_last=False, bias=pass_ == "forward", exact=False), ENGINE, config)


def tiles(pass_: str) -> list:
    """One config for every tile that is offered to some large problem."""
    problem = Problem(pass_, 4, 512, 512, (16, 64, 64), (3, 3, 3), dtype="float16", arch="sm_90")
    layers = [problem.replace(in_channels=channels, out_channels=channels) for channels in (512, 96, 32)]
    offers = [dataclasses.replace(c, splits=1) for p in layers for c in ENGINE.configs(p)]
    tile = {(*vars(c).values(),)[4:] + (c.brick.count(1) == 3,): c for c in reversed(offers)}
    return [pytest.param(pass_, c, id=f"{pass_}-" + "x".join(map(str, vars(c).values()))) for c in tile.values()]


@pytest.mark.parametrize("pass_, config", [param for pass_ in PASSES for param in tiles(pass_)])
def test_every_tile_is_exact(pass_: str, config) -> None:
    """Ragged against all of them; bias where there is one."""
    case = Case(pass_, **{**RAGGED, "batch": 1, "kernel_size": (1, 1, 2), "input_size": (1, 3, 7)})
    run(case.replace(bias=pass_ == "forward"), ENGINE, config)


@pytest.mark.parametrize("layout, flat", [("channels_last", True), ("contiguous", True), ("cropped", False)])
def test_wgrad_reads_a_flat_gradient_as_a_matrix(layout: str, flat: bool) -> None:
    """The last brick hangs over; and where the gradient is a view, it is read as one."""
    case = Case("wgrad", **{**RAGGED, "batch": 1, "input_size": (3, 3, 5), "kernel_size": (1, 2, 2), "padding": (0,) * 6})
    case = case.replace(layouts=(layout, layout))
    problem, _ = make(case)
    config = dataclasses.replace(ENGINE.configs(problem)[0], brick_n=1, brick_d=2, brick_h=2, brick_w=4, splits=2)
    assert ENGINE.is_flat(problem, config) == flat
    run(case, ENGINE, config)


@pytest.mark.parametrize("splits", [2, 5])
@pytest.mark.parametrize("pass_", PASSES)
def test_splits(pass_: str, splits: int) -> None:
    """The reduction in parts; 5 are more than there are steps in some view, so that some are empty. Equal bits again."""
    case = Case(pass_, **{**RAGGED, "stride": (1, 1, 2), "bias": pass_ == "forward"})
    case = case.replace(exact=splits == 2, channels_last=splits == 2)
    config = dataclasses.replace(ENGINE.configs(case.geometry())[0], splits=splits, brick_n=1, brick_d=1)
    result = run(case, ENGINE, config)
    if splits == 5:
        assert torch.equal(run(case, ENGINE, config), result)


def test_wgrad_chain_longer_than_one_accumulator() -> None:
    from triton_conv3d.engines.base import CHAIN

    case = Case("wgrad", in_channels=8, out_channels=8, input_size=(17, 31, 32), kernel_size=(1, 1, 1), dtype="float16")
    assert CHAIN < 17 * 31 * 32 < 2 * CHAIN
    config = dataclasses.replace(ENGINE.configs(case.geometry())[-1], brick_n=1, brick_d=2, brick_h=8, brick_w=16)
    run(case, ENGINE, config)


@pytest.mark.parametrize("pass_", PASSES)
@pytest.mark.parametrize("layout", ["contiguous", "aligned_channel_slice", "cropped", "every_second", "permuted",
                                    "expanded_batch", "expanded_channels", "unaligned_contiguous"])  # fmt: skip
def test_layouts(layout: str, pass_: str) -> None:
    """Views are read as they are if their channels are dense; what is copied is counted."""
    case = Case(pass_, **{**RAGGED, "exact": False, "layouts": (layout, layout), "kernel_size": (1, 2, 1)})
    problem, _ = make(case)
    config = ENGINE.configs(problem)[0]
    run(case, ENGINE, config)
    readable = [("channels_last",) if i == 1 else ("channels_last", "view") for i in range(3)]
    read = all(layout in readable[i] for i, layout in enumerate(problem.layouts))
    assert (ENGINE.memory(problem, config).copies == 0) == read


def test_the_public_function_with_this_engine_alone() -> None:
    """Forward and both gradients of torch's own convolution in float64."""
    x, w, bias = torch.randn(1, 8, 3, 7, 7), torch.randn(16, 8, 3, 3, 3), torch.randn(16)
    half = [t.to(DEVICE, torch.float16).requires_grad_() for t in (x, w, bias)]
    exact = [t.detach().double().requires_grad_() for t in half]
    with configure(engine="tma", strict=True):
        y = conv3d(half[0], half[1], half[2], padding=1)
        y.square().sum().backward()
    expected = torch.nn.functional.conv3d(*exact, padding=1)
    (2 * expected.detach() * expected).sum().backward()
    torch.testing.assert_close(y.double(), expected, rtol=2e-3, atol=2e-2)
    for mine, theirs in zip(half, exact, strict=True):
        torch.testing.assert_close(mine.grad.double(), theirs.grad, rtol=2e-2, atol=theirs.grad.abs().max().item() * 2e-3)


@pytest.mark.parametrize("which", [0, 1], ids=["first_operand", "second_operand"])
@pytest.mark.parametrize("pass_", ["forward", "dgrad"])
def test_one_nan_touches_only_its_footprint(pass_: str, which: int) -> None:
    """A weight may also meet the zeros around what is gathered: 0 * NaN, but only in its own channel."""
    problem, operands = make(Case(pass_, **{**RAGGED, "in_channels": 8, "out_channels": 8}))

    def beyond(where: tuple[int, ...]) -> tuple | None:
        if (pass_, which) == ("dgrad", 0):
            return slice(None), where[1]
        return (slice(None), where[0]) if (pass_, which) == ("forward", 1) else None

    check_footprint(ENGINE, problem, operands, which, beyond)


# ---------------------------------------------------------------------------------- what it takes, and what not

BASE = dict(pass_="forward", batch=1, in_channels=32, out_channels=48, input_size=(4, 4, 4), kernel_size=(3, 3, 3),
            padding=(1,) * 6, dtype="bfloat16", arch="sm_90", device="NVIDIA H200")  # fmt: skip


@pytest.mark.parametrize("changes, reason", [
    (dict(arch="sm_80"), "sm_80 has no copy engine"),
    (dict(arch="sm_120"), "sm_120 has no copy engine"),
    (dict(arch="gfx942"), "gfx942 has no copy engine"),
    (dict(dtype="float32"), "only 16-bit types"),
    (dict(dtype="float64"), "float64"),
    (dict(batch=0), "nothing to multiply"),
    (dict(in_channels=30), "channels of a group are 30: descriptors need multiples of 8"),
    (dict(in_channels=4), "channels of a group are 4: descriptors need multiples of 8"),
    (dict(pass_="dgrad", out_channels=3), "channels of a group are 32 and 3"),
    (dict(pass_="wgrad", out_channels=50), "channels of a group are 32 and 50"),
    (dict(groups=4, in_channels=32), "8 channels of a group are summed over"),
    (dict(groups=2, in_channels=24, out_channels=24), "channels of a group are 12"),
    (dict(alignment=2), "pixels aligned to 2 bytes: descriptors need 16"),
    (dict(alignment=8), "pixels aligned to 8 bytes"),
    (dict(input_size=(4, 4, 2**31)), "beyond 2147483648"),
    (dict(stride=(1, 1, 2**31)), "beyond 2147483648"),
    (dict(dilation=(2**31, 1, 1), kernel_size=(1, 3, 3)), "beyond 2147483648"),
    (dict(input_size=(4, 4, 2**31 - 8), padding=(1, 1, 1, 1, 8, 8)), "beyond 2147483648"),
    (dict(pass_="dgrad", stride=(64, 64, 64)), "parity classes"),
], ids=str)  # fmt: skip
def test_refusals_are_named(changes: dict, reason: str) -> None:
    assert reason in ENGINE.supports(Problem(**{**BASE, **changes}))
    assert ENGINE.supports(Problem(**{**BASE, "pass_": changes.get("pass_", "forward")})) is None


@pytest.mark.parametrize("changes", [
    dict(arch="sm_100"), dict(arch="interpreter"), dict(dtype="float16"), dict(out_channels=3), dict(stride=(5, 4, 3)),
    dict(groups=2), dict(in_channels=24), dict(pass_="wgrad", groups=2), dict(input_size=(4, 4, 2**31 - 9)),
], ids=str)  # fmt: skip
def test_what_is_taken(changes: dict) -> None:
    problem = Problem(**{**BASE, **changes})
    assert ENGINE.supports(problem) is None
    offers = ENGINE.configs(problem)
    assert offers and len(set(offers)) == len(offers)
    for config in offers:
        work = ENGINE.work(problem, config)
        assert work.shared_bytes <= 232_448 and work.programs > 0 and work.iterations > 0 and work.launches > 0
        assert ENGINE.memory(problem, config).workspace <= 64 * 2**20


def test_gelu_leaves_out_what_would_keep_its_sums_in_memory() -> None:
    """perf/machine_code.py finds it: 128 sums of a thread leave no registers for erf, unless the splits' reduction has it."""
    problem = Problem(**{**BASE, "in_channels": 256, "out_channels": 256, "input_size": (8, 32, 32), "activation": "gelu"})
    offers = ENGINE.configs(problem)
    sums = [c.splits == 1 and c.brick_d * c.brick_h * c.brick_w * c.block_n / (32 * c.num_warps) for c in offers]
    assert 0 < max(sums) <= 64 and max(c.block_n for c in offers if c.splits > 1) == 128


@pytest.mark.parametrize("pass_", PASSES)
@pytest.mark.parametrize("stride", [1, 2])
def test_tuning_measures_it_beside_the_portable_kernel_and_no_ranking_takes_it(stride: int, pass_: str) -> None:
    problem = Problem(**{**BASE, "pass_": pass_, "input_size": (16, 30, 52), "stride": (stride,) * 3})
    ranked = kept(problem, ranking(problem, measuring=True))
    names = {name for name, _ in search(ranked, lambda candidate, repetitions: 1e-3, QUICK_CANDIDATES)}
    assert names >= {"implicit_gemm", "aten", "tma"}
    assert "tma" not in {engine.NAME for _, engine, _ in ranking(problem)} and "on trial" in refusals(problem)["tma"]


@pytest.mark.parametrize("which", ["input", "weight"])
def test_real_tensors_that_are_not_aligned_are_refused(which: str) -> None:
    layouts = ("unaligned", "channels_last") if which == "input" else ("channels_last", "unaligned")
    problem, _ = make(Case("forward", **{**RAGGED, "layouts": layouts}))
    assert "pixels aligned to 2 bytes" in ENGINE.supports(problem)


@pytest.mark.parametrize("channels, first, bytes_", [(28, 0, 8), (26, 0, 4), (32, 4, 8), (32, 8, 16)])
def test_pixels_of_a_slice_of_channels_are_aligned_or_refused(channels: int, first: int, bytes_: int) -> None:
    """The first two have strides, the third a base, that 16 bytes do not divide."""
    x = torch.empty(1, channels, 2, 3, 4, dtype=torch.float16, device=DEVICE, memory_format=torch.channels_last_3d)
    weight = torch.empty(8, 24, 1, 1, 1, dtype=torch.float16, device=DEVICE)
    operands = Operands(x[:, first : first + 24], weight)
    problem = describe("forward", operands, operands.input.shape, weight.shape, (1,) * 3, (0,) * 6, (1,) * 3, 1, True, "ieee")
    refused = ENGINE.supports(problem)
    assert refused is None if bytes_ == 16 else f"pixels aligned to {bytes_} bytes" in refused


@pytest.mark.parametrize("pass_", ["forward", "wgrad"])
def test_strides_of_descriptors_stay_within_their_limit(pass_: str) -> None:
    """A view of one position has no stride, however large that of the convolution is."""
    case = Case(pass_, **{**RAGGED, "batch": 1, "input_size": (2, 64, 64), "stride": (2**31 - 1, 1, 1)})
    problem, operands = make(case.replace(kernel_size=(1, 1, 1), padding=(0,) * 6))
    config = dataclasses.replace(ENGINE.configs(problem)[0], brick_d=4)
    found = []
    with launching.replaced(lambda kernel, grid, arguments, options: found.extend(arguments)):
        ENGINE.launch(problem, operands, config)
    steps = [step * 2 for descriptor in found for step in getattr(descriptor, "strides", ())]
    assert len(steps) > 5 and max(steps) < 2**40


@pytest.mark.skipif(DEVICE.type == "cuda", reason="the interpreter's ranking")
@pytest.mark.parametrize("pass_", PASSES)
def test_the_interpreter_ranks_the_portable_kernel_first(pass_: str) -> None:
    names = [engine.NAME for _, engine, _ in ranking(Case(pass_, **RAGGED).geometry(), measuring=True)]
    assert names.index("implicit_gemm") < names.index("tma")
