"""Engines that rewrite a problem for engine hopper: its kernels emulated (gluon_emulator.py), or on a GPU of its own."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from cases import DEVICE, Case, run
from test_hopper import RUNS, few_programs, needs_gluon  # noqa: F401  a fixture among them

pytest.importorskip("triton")
from gluon_emulator import emulating

from triton_conv3d import engines
from triton_conv3d.engines.through import ThroughConfig
from triton_conv3d.problem import PASSES, Problem

# Channels and sizes that tiles and vectors do not fill.
LAYERS = {
    "padded": {
        "a_few_more": dict(in_channels=14, out_channels=14, input_size=(3, 5, 7)),
        "odd": dict(in_channels=29, out_channels=43, input_size=(2, 4, 9), kernel_size=(2, 3, 2), padding=(0, 1, 1, 1, 1, 0)),
        "strided": dict(in_channels=26, out_channels=21, input_size=(4, 6, 9), stride=(2, 2, 2)),
    },
    "space_to_depth": {
        "stem": dict(in_channels=1, out_channels=32, input_size=(3, 5, 33)),
        "tall_stem": dict(in_channels=2, out_channels=16, input_size=(2, 7, 18), kernel_size=(2, 5, 3), stride=(1, 2, 1)),
        "head": dict(in_channels=16, out_channels=3, input_size=(2, 4, 11)),
        "few_on_both": dict(in_channels=8, out_channels=8, input_size=(3, 3, 17)),
    },
}
SPLIT = {"splits": 2}
# Blocks of one channel fill no vectors, and where taps along H are channels there are none that share lines.
NONE = {("stem", "dgrad"), ("stem", "wgrad"), ("tall_stem", "wgrad")}
CASES = [(e, name, pass_) for e, layers in LAYERS.items() for name in layers for pass_ in PASSES if (name, pass_) not in NONE]


def through_hopper(engine: str, problem: Problem) -> list[ThroughConfig]:
    """Its offers on sm_90 for a volume that is worth several splits, each once."""
    offers = engines.get(engine).configs(problem.replace(arch="sm_90", device="sm_90", input_size=(64,) * 3))
    found = [config.replace(config=config.config.replace(**SPLIT)) if config.splits > 1 else config for config in offers]
    return list(dict.fromkeys(config for config in found if config.engine == "hopper"))


def emulated(name: str):
    engine = engines.get(name)
    if DEVICE.type == "cuda":
        return engine

    def launch(*arguments):
        with emulating():
            return engine.launch(*arguments)

    return SimpleNamespace(NAME=name, supports=engine.supports, configs=engine.configs, launch=launch)


@RUNS
@pytest.mark.parametrize("engine, name, pass_", CASES)
def test_every_offer(engine: str, name: str, pass_: str, few_programs) -> None:  # noqa: F811
    case = Case(pass_, **{"padding": (1,) * 6, **LAYERS[engine][name]}, batch=2, dtype="float16", bias=pass_ == "forward")
    found = through_hopper(engine, case.geometry())
    assert found and all(hasattr(config.config, "line") for config in found)  # the bricks are those of engine tma
    for config in found:
        run(case, emulated(engine), config)


@needs_gluon
@pytest.mark.parametrize("engine", LAYERS)
def test_it_is_offered_on_its_architecture_alone(engine: str) -> None:
    for pass_ in PASSES:
        *_, layer = LAYERS[engine].values()
        problem = Case(pass_, **layer, padding=(1,) * 6, dtype="float16").geometry()
        assert through_hopper(engine, problem)
        for arch in ("sm_80", "sm_100", "interpreter"):
            offers = engines.get(engine).configs(problem.replace(arch=arch, device=arch, input_size=(64,) * 3))
            assert offers and "hopper" not in {config.engine for config in offers}
