"""Copies rounded to tf32 once: exact at every edge, rounded and not truncated, and copied no more than said."""

from __future__ import annotations

import json
import math

import pytest
import torch
from cases import LAYOUTS, Case, check_footprint, make, run
from guarded import guards

from triton_conv3d import engines
from triton_conv3d.engines import rounded
from triton_conv3d.engines.rounded import inner
from triton_conv3d.engines.rounded.configs import chain, volumes, wgrad_configs
from triton_conv3d.problem import PASSES, VIEW, Operands, Problem
from triton_conv3d.tuning.plan import offered
from triton_conv3d.tuning.select import ranking

pytest.importorskip("triton")
ENGINE = engines.get("rounded")
# A layer of r3d_18 (torchvision), as it is trained by default.
LAYER = Problem(
    "wgrad", 16, 128, 128, (8, 28, 28), (3, 3, 3), padding=(1,) * 6, dtype="float32", precision="tf32",
    device="NVIDIA H200", arch="sm_90",
)  # fmt: skip

# Lines that are no vectors, phases of strides, padding on one side, beyond the kernel, and taps that meet only padding.
GEOMETRIES = {
    "odd": dict(input_size=(3, 4, 5), kernel_size=(2, 3, 1), padding=(1, 0, 1, 1, 0, 0)),
    "strided": dict(input_size=(4, 6, 8), kernel_size=(2, 2, 3), padding=(1,) * 6, stride=(2, 2, 2)),
    "dilated": dict(
        input_size=(3, 7, 9), kernel_size=(1, 3, 3), padding=(0, 0, 2, 1, 1, 3), dilation=(1, 2, 1), stride=(1, 1, 3),
    ),
    "both": dict(input_size=(2, 9, 9), kernel_size=(1, 3, 2), padding=(0, 0, 3, 2, 1, 0), dilation=(1, 3, 4), stride=(1, 2, 1)),
    "beyond": dict(input_size=(2, 3, 3), kernel_size=(1, 2, 2), padding=(0, 0, 4, 3, 1, 2)),
}  # fmt: skip


@pytest.fixture
def narrow_layers(monkeypatch) -> None:
    """Taken too, though nothing is gained: they are computed faster here."""
    monkeypatch.setattr(rounded, "_LEAST_CHANNELS", 32)
    monkeypatch.setattr(rounded, "_LEAST_REDUCED", 1)


narrow = pytest.mark.usefixtures("narrow_layers")


def case(pass_: str, name: str, **more) -> Case:
    sides = {"in_channels": 33, "out_channels": 36}
    return Case(pass_, **{"batch": 2, "dtype": "float32", "precision": "tf32", **sides, **GEOMETRIES[name], **more})


@narrow
@pytest.mark.parametrize("pass_, name", [
    *(("wgrad", name) for name in GEOMETRIES),
    *((pass_, name) for pass_ in ("forward", "dgrad") for name in ("odd", "strided", "beyond")),  # by another engine
])  # fmt: skip
def test_every_edge(pass_: str, name: str) -> None:
    of = case(pass_, name, bias=pass_ == "forward")
    offers = ENGINE.configs(of.geometry())
    assert len(set(offers)) == len(offers)
    run(of, ENGINE, offers[0])
    if pass_ == "wgrad":
        run(of.replace(channels_last=False, layouts=("contiguous",) * 2), ENGINE, offers[-1])


@narrow
@pytest.mark.parametrize("splits", (2, 5))
def test_splits_of_wgrad(splits: int) -> None:
    """5 do not divide the steps, and one of them has none."""
    of = case("wgrad", "beyond", batch=3)
    smallest = ENGINE.configs(of.geometry())[-1]
    for channels_last in (True, False):
        run(of.replace(channels_last=channels_last), ENGINE, smallest.replace(splits=splits))


@narrow
@pytest.mark.parametrize("pass_", PASSES)
def test_operands_are_rounded_to_nearest(pass_: str) -> None:
    """Each of 1 + 3 x 2^-12, which is nearer to 1 + 2^-10 than to 1: products of truncated ones would be 1."""
    problem, operands = make(case(pass_, "odd"))
    config = ENGINE.configs(problem)[0]

    def computed(value: float) -> torch.Tensor:
        of = (tensor if tensor is None else torch.full_like(tensor, value) for tensor in operands[:3])
        return ENGINE.launch(problem, Operands(*of), config)

    torch.testing.assert_close(computed(1 + 3 * 2.0**-12), computed(1.0) * (1 + 2.0**-10) ** 2, rtol=1e-6, atol=0)


@narrow
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("pass_", ("forward", "wgrad"))
def test_layouts(pass_: str, layout: str) -> None:
    run(case(pass_, "odd", layouts=(layout, layout), channels_last=False, exact=False), ENGINE)


@narrow
@pytest.mark.parametrize("at_end", (False, True), ids=("start", "end"))
def test_between_pages_that_fault(at_end: bool) -> None:
    """In this process: what reads outside kills it."""
    with guards(at_end) as fresh:
        for pass_ in PASSES:
            run(case(pass_, "odd"), ENGINE, fresh=fresh)


@narrow
@pytest.mark.parametrize("which", (0, 1), ids=("first_operand", "second_operand"))
@pytest.mark.parametrize("pass_", ("forward", "dgrad"))
def test_one_nan_touches_only_its_footprint(pass_: str, which: int) -> None:
    """In dgrad, as in forward, a weight meets the zeros of the padding too."""
    problem, operands = make(case(pass_, "odd"))
    padding = (pass_, which) == ("dgrad", 0)
    check_footprint(ENGINE, problem, operands, which, lambda where: (slice(None), where[1]) if padding else None)


@pytest.mark.parametrize("changes, reason", [
    (dict(dtype="float16", precision="ieee"), "float16 as ieee"),
    (dict(precision="tf32x3"), "tf32x3"),
    (dict(arch="gfx942"), "gfx942"),
    (dict(arch="sm_80"), "sm_80 has no copy engine"),
    (dict(groups=2), "groups=2"),
    (dict(out_channels=63), "63 channels"),
    (dict(pass_="forward", kernel_size=(1, 1, 7)), "896 products"),
    (dict(kernel_size=(1, 1, 1), padding=(0,) * 6), "matmul"),
    (dict(batch=2048), "bytes: more than"),
    (dict(batch=1, in_channels=16384, out_channels=8192, input_size=(3, 3, 3)), "elements of the result"),
    (dict(batch=0), "nothing to multiply"),
    (dict(arch="cpu"), "TRITON_INTERPRET"),
    (dict(pass_="forward", kernel_size=(1, 1, 62), input_size=(1, 1, 70)), "63"),
], ids=lambda value: str(value) if isinstance(value, dict) else "")  # fmt: skip
def test_what_it_leaves_to_others(changes: dict, reason: str) -> None:
    assert ENGINE.supports(LAYER) is None
    assert reason in (ENGINE.supports(LAYER.replace(**changes)) or "")


def test_dgrad_is_forward_of_the_weight_turned_round_where_padding_allows_it() -> None:
    dgrad = LAYER.replace(pass_="dgrad", in_channels=64)
    forward = inner(dgrad)
    assert (forward.pass_, forward.in_channels, forward.out_channels) == ("forward", 128, 64)
    assert forward.output_size == dgrad.input_size and forward.padding == (1,) * 6
    assert inner(dgrad.replace(stride=(1, 2, 1))).pass_ == inner(dgrad.replace(padding=(3, *(1,) * 5))).pass_ == "dgrad"


@pytest.mark.parametrize("layout", ("contiguous", VIEW))
def test_memory_is_that_of_the_copies(layout: str) -> None:
    """In wgrad, of the input for each tap along w, of 28 columns; planes of the gradient are 28 x 28, up to whole steps."""
    problem = LAYER.replace(layouts=(layout,) * 3)
    x, grad = 3 * 16 * 10 * 30 * 28, 16 * 8 * 800
    assert [volume.positions for volume in volumes(problem, 32)] == [x, grad]
    for config in ENGINE.configs(problem):
        used = ENGINE.memory(problem, config)
        assert used.copies == 4 * 128 * (x + grad)
        assert used.workspace == (config.splits > 1) * config.splits * 4 * 27 * 128 * 128
    forward = problem.replace(pass_="forward")
    for config in ENGINE.configs(forward):
        assert ENGINE.memory(forward, config).copies == 4 * (math.prod(forward.input_shape) + math.prod(forward.weight_shape))


@narrow
def test_no_accumulator_adds_more_products_than_a_chain(monkeypatch) -> None:
    """The largest tiles have no registers for a total, and leave layers to others whose partial sums would be too many."""
    wide = LAYER.replace(in_channels=256, out_channels=256)
    positions, offers = volumes(wide, 32)[1].positions, wgrad_configs(wide)
    assert all(chain(c) * 32 == 16_384 or positions / c.splits <= 16_384 for c in offers)
    assert [chain(c) for c in wgrad_configs(wide) if c.block_n == 256] and chain(offers[-1])
    assert all(map(chain, wgrad_configs(wide.replace(batch=64, input_size=(8, 56, 56)))))
    monkeypatch.setattr(rounded, "chain", lambda config: 2)
    of = case("wgrad", "beyond", batch=3)
    run(of, ENGINE, ENGINE.configs(of.geometry())[-1])


@pytest.mark.parametrize("pass_", PASSES)
def test_configs_survive_files(pass_: str) -> None:
    problem = LAYER.replace(pass_=pass_)
    for config in ENGINE.configs(problem):
        assert offered(problem, "rounded", json.loads(json.dumps(config.to_dict()))) == config


def test_predicted_to_gain_in_wgrad_and_no_plan_before_it_is_measured() -> None:
    best = {engine.NAME: seconds for seconds, engine, _ in reversed(ranking(LAYER, measuring=True))}
    assert best["rounded"] < 0.7 * best["implicit_gemm"]
    assert all(engine.NAME != "rounded" for _, engine, _ in ranking(LAYER))
