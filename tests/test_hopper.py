"""The hopper engine: its kernels' source emulated (gluon_emulator.py), or on a GPU of its own; and what it refuses.

Bricks, views and descriptors are those of engine tma, whose geometry is proven in test_tma_geometry.py; what Gluon makes
of the kernels is looked at in test_hopper_code.py.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import sys
from types import SimpleNamespace

import pytest
import torch
from cases import DEVICE, Case, make, run
from test_tma import BASE, GEOMETRIES, RAGGED

pytest.importorskip("triton")
from every_order import explore
from gluon_emulator import emulating

from triton_conv3d import configure, engines
from triton_conv3d.engines import tma
from triton_conv3d.engines.hopper import gluon
from triton_conv3d.engines.hopper.configs import one_chain
from triton_conv3d.engines.tma.geometry import bricks
from triton_conv3d.problem import PASSES, Problem, device_name, interpreted
from triton_conv3d.tuning.select import ranking, refusals

ENGINE = engines.get("hopper")
needs_gluon = pytest.mark.skipif(gluon.MISSING is not None, reason=str(gluon.MISSING))
RUNS = pytest.mark.skipif(
    gluon.MISSING is not None or not interpreted() and device_name(DEVICE)[1] != "sm_90",
    reason="neither sm_90 nor the interpreter, or no Gluon",
)


def engine(seed: object = 0):
    """The engine, on the CPU with its kernels emulated in the order of turns of this seed."""
    if DEVICE.type == "cuda":
        return ENGINE

    def launch(*arguments):
        with emulating(seed):
            return ENGINE.launch(*arguments)

    return SimpleNamespace(NAME=ENGINE.NAME, supports=tma.supports, configs=ENGINE.configs, launch=launch)


@pytest.fixture
def few_programs(monkeypatch):
    """Three programs, so that each takes several tiles."""
    from triton_conv3d.engines.hopper import host

    monkeypatch.setattr(host, "_multiprocessors", lambda device: 3)


def small(case: Case | Problem, **changes):
    """Tiles of 16 pixels, for many of them in a small volume, and a ring that is gone round often."""
    problem = case if isinstance(case, Problem) else case.geometry()
    sizes = dict(zip(("brick_n", "brick_d", "brick_h", "brick_w"), bricks(problem, 16)[0], strict=True))
    return dataclasses.replace(ENGINE.configs(problem)[-1], **{**sizes, "num_stages": 3, "splits": 1, **changes})


@RUNS
@pytest.mark.parametrize("pass_", PASSES)
@pytest.mark.parametrize("name", GEOMETRIES)
def test_geometries(name: str, pass_: str, few_programs) -> None:
    case = Case(pass_, **{**RAGGED, **GEOMETRIES[name]}, bias=pass_ == "forward")
    run(case, engine(name), small(case))


@RUNS
@pytest.mark.parametrize("stages", [2, 5])
@pytest.mark.parametrize("channels, size, kernel", [(16, 1, 1), (16, 5, 1), (48, 2, 2), (16, 4, 3)], ids=str)
def test_ring(channels: int, size: int, kernel: int, stages: int, few_programs) -> None:
    """One tile of one step, and many of many, in several orders of turns: no deadlock, nothing overwritten or lost.

    All three passes go round the same ring: wgrad by bricks, the others by taps and blocks of channels, dgrad also by
    tiles of which the first have no step at all.
    """
    for pass_, seed in itertools.product(PASSES, range(2)):
        strided = dict(stride=(1, 2, 2), padding=(0, 0, 1, 1, 1, 1)) if pass_ == "dgrad" else {}
        sizes = dict(input_size=(1, 4 * size, 8), kernel_size=(1, kernel, kernel), dtype="float16")
        case = Case(pass_, in_channels=channels, out_channels=16, **sizes, **strided)
        run(case, engine(seed), small(case, num_stages=stages))


@pytest.mark.skipif(DEVICE.type == "cuda", reason="in the emulator")
@needs_gluon
@pytest.mark.parametrize("stages", [2, 3])
@pytest.mark.parametrize("pass_, size, kernel", [
    ("forward", 1, 1), ("forward", 2, 2), ("dgrad", 3, 1), ("wgrad", 1, 1), ("wgrad", 3, 1),
], ids=str)  # fmt: skip
def test_every_order_of_turns(pass_: str, size: int, kernel: int, stages: int, few_programs) -> None:
    """Nobody waits forever, nothing is overwritten or read too early: with one step in all, tiles without a step, many."""
    strided = dict(stride=(1, 2, 2), padding=(0, 0, 1, 1, 1, 1)) if pass_ == "dgrad" else {}
    sizes = dict(input_size=(1, 4 * size, 8), kernel_size=(1, kernel, kernel), dtype="float16")
    problem, operands = make(Case(pass_, in_channels=16, out_channels=16, **sizes, **strided))
    programs = []
    with emulating(programs=programs):
        ENGINE.launch(problem, operands, small(problem, num_stages=stages))
    for program in programs:
        assert explore(program.traces) > len(program.traces[0]) + len(program.traces[1])


@pytest.mark.skipif(DEVICE.type == "cuda", reason="in the emulator")
@needs_gluon
def test_a_ring_of_one_stage_would_stand_still(few_programs) -> None:
    """A stage is freed by the step after it: with Triton such a kernel is not compiled."""
    case = Case(
        "forward", in_channels=16, out_channels=16, input_size=(1, 4, 8), kernel_size=(1, 1, 1), dtype="float16"
    )
    with pytest.raises(AssertionError, match="more than one stage"):
        run(case, engine(), small(case, num_stages=1))


@RUNS
@pytest.mark.parametrize("splits", [2, 5])
@pytest.mark.parametrize("pass_", PASSES)
def test_splits(pass_: str, splits: int, few_programs) -> None:
    """The reduction in parts; 5 are more than there are steps in some view, so that some are empty. Equal bits again."""
    case = Case(pass_, **{**RAGGED, "stride": (1, 1, 2), "bias": pass_ == "forward"})
    case = case.replace(exact=splits == 2, channels_last=splits == 2)
    config = small(case, splits=splits)
    result = run(case, engine("first"), config)
    if splits == 5:
        assert torch.equal(run(case, engine("second"), config), result)


@RUNS
@pytest.mark.parametrize("pass_", PASSES)
def test_every_tile(pass_: str, few_programs) -> None:
    """Each that is offered to some large problem, in a small one: ragged against all of them."""
    large = Problem(pass_, 4, 512, 512, (16, 64, 64), (3, 3, 3), dtype="float16", arch="sm_90")
    problems = [large.replace(in_channels=channels, out_channels=channels) for channels in (512, 96, 64, 32)]
    problems += [problem.replace(kernel_size=(1, 1, 3)) for problem in problems]  # as they are without lines
    offers = [config for problem in problems for config in ENGINE.configs(problem) if isinstance(config, ENGINE.BrickConfig)]
    offers = [dataclasses.replace(config, splits=1) for config in offers]
    tiles = {tuple(vars(config).values())[4:]: config for config in offers}
    assert len(tiles) >= 5
    case = Case(
        pass_, **{**RAGGED, "batch": 1, "kernel_size": (1, 1, 2), "input_size": (1, 3, 7)}, bias=pass_ == "forward"
    )
    for config in tiles.values():
        run(case.replace(channels_last=config.block_n > 64), engine(), config)


@RUNS
def test_wgrad_chain_longer_than_one_accumulator(few_programs) -> None:
    case = Case("wgrad", in_channels=8, out_channels=8, input_size=(17, 31, 32), kernel_size=(1, 1, 1), dtype="float16")
    whole = dataclasses.replace(
        ENGINE.configs(case.geometry())[-1], brick_n=1, brick_d=2, brick_h=8, brick_w=16, num_stages=2
    )
    for splits in (1, 2):
        config = dataclasses.replace(whole, splits=splits)
        assert one_chain(case.geometry(), config) == (splits == 2)
        run(case, engine(), config)


@RUNS
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("activation", ["none", "leaky_relu", "silu"])
@pytest.mark.parametrize("channels_last", [True, False], ids=["ndhwc", "ncdhw"])
def test_epilogue(channels_last: bool, activation: str, splits: int, few_programs) -> None:
    """Bias, residual and activation of wide tiles, which are written in parts, and of split sums."""
    case = Case("forward", **{**RAGGED, "kernel_size": (1, 1, 2)}, bias=True, residual="cropped", activation=activation)
    case = case.replace(channels_last=channels_last)
    run(case, engine(), small(case, block_n=128, brick_d=4, brick_h=4, brick_w=8, splits=splits))


@RUNS
@pytest.mark.parametrize("pass_", PASSES)
def test_layouts(pass_: str, few_programs) -> None:
    """Views are read as they are if their channels are dense, others are copied: as engine tma has it."""
    for layout in ("contiguous", "aligned_channel_slice", "expanded_batch"):
        case = Case(pass_, **{**RAGGED, "exact": False, "layouts": (layout, layout), "kernel_size": (1, 2, 1)})
        run(case, engine(), small(case))


# ---------------------------------------------------------------------------------- what it takes, and what not


@needs_gluon
@pytest.mark.parametrize("changes, reason", [
    (dict(arch="sm_80"), "sm_80 lacks the matrix instructions of sm_90"),
    (dict(arch="sm_100"), "sm_100 lacks the matrix instructions of sm_90"),
    (dict(arch="gfx942"), "gfx942 lacks"),
    (dict(arch="interpreter"), "Gluon has no interpreter"),
    (dict(arch="cpu"), "CPU tensors"),
    (dict(dtype="float32"), "only 16-bit types"),
    (dict(dtype="float64"), "float64"),
    (dict(batch=0), "nothing to multiply"),
    (dict(in_channels=30), "channels of a group are 30: descriptors need multiples of 8"),
    (dict(pass_="dgrad", out_channels=3), "channels of a group are 32 and 3"),
    (dict(groups=4), "8 channels of a group are summed over"),
    (dict(alignment=8), "pixels aligned to 8 bytes: descriptors need 16"),
    (dict(input_size=(4, 4, 2**31)), "beyond 2147483648"),
    (dict(pass_="dgrad", stride=(64, 64, 64)), "parity classes"),
], ids=str)  # fmt: skip
def test_refusals_are_named(changes: dict, reason: str) -> None:
    assert reason in ENGINE.supports(Problem(**{**BASE, **changes}))
    assert ENGINE.supports(Problem(**{**BASE, "pass_": changes.get("pass_", "forward")})) is None


@needs_gluon
@pytest.mark.parametrize("changes", [
    {}, dict(dtype="float16"), dict(stride=(5, 4, 3)), dict(groups=2, out_channels=32), dict(in_channels=8),
    dict(in_channels=512, out_channels=512), dict(in_channels=512, out_channels=512, batch=4, input_size=(32, 64, 64)),
], ids=str)  # fmt: skip
@pytest.mark.parametrize("pass_", PASSES)
def test_what_is_taken(pass_: str, changes: dict) -> None:
    problem = Problem(**{**BASE, **changes, "pass_": pass_})
    assert ENGINE.supports(problem) is None
    offers = ENGINE.configs(problem)
    assert 0 < len(offers) <= 8 and len(set(offers)) == len(offers) and offers[-1].splits == 1
    for config in offers:
        work = ENGINE.work(problem, config)
        assert work.shared_bytes <= 232_448 and work.programs > 0 and work.iterations > 0 and work.launches > 0
        assert ENGINE.memory(problem, config).workspace <= 64 * 2**20
        if pass_ == "wgrad" and isinstance(config, ENGINE.BrickConfig) and config.block_n * config.block_k > 128 * 128:
            assert one_chain(problem, config)


@needs_gluon
@pytest.mark.parametrize("pass_", PASSES)
def test_it_is_on_trial(pass_: str) -> None:
    problem = Problem(**{**BASE, "pass_": pass_})
    for mode in ("full", "quick"):
        with configure(autotune=mode):
            names = {engine.NAME for _, engine, _ in ranking(problem, measuring=True)}
            assert ("hopper" in names) == (mode == "full")
    assert "on trial" in refusals(problem)["hopper"]
    with configure(engine="hopper"):
        assert {engine.NAME for _, engine, _ in ranking(problem)} == {"hopper"}


@pytest.mark.parametrize("lacking", ["triton.experimental.gluon", "warpgroup_mma", "async_load"])
def test_a_triton_without_the_gluon_that_it_needs(lacking: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing raises, and the engine refuses with a reason; a new name is not needed where the old one is there."""
    if lacking == "triton.experimental.gluon":
        monkeypatch.setitem(sys.modules, lacking, None)
    else:
        from triton.experimental.gluon.language.nvidia import hopper

        for place in (hopper, hopper.tma):
            monkeypatch.delattr(place, lacking, raising=False)
    spec = importlib.util.spec_from_file_location(f"{gluon.__name__}_without", gluon.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(gluon, "MISSING", module.MISSING)
    reason = ENGINE.supports(Problem(**BASE))
    if lacking == "async_load":
        assert reason is None
    else:
        assert reason.startswith("the Gluon of this Triton lacks") and lacking in reason
