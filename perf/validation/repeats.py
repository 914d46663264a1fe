"""correctness.repeats: layers, exact once and then the same bits in every run: what a race would change."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from types import ModuleType

import torch

from triton_conv3d.engines.base import Config
from triton_conv3d.problem import PASSES, Operands, Problem
from triton_conv3d.tuning.faults import is_illegal_access, is_out_of_resources

from ..results import OK, WRONG
from ..tensors import Tensors
from ..workloads import Case, Workload, cases, real, suite
from . import Outcome, Setting, Step, child, exact

NAME = "correctness.repeats"
WHAT = "12 layers a pass: exact, then 100 runs of equal bits"
WORKERS = 4  # most of the time goes into compiling
LAYERS = (
    "nnunet3d.c128_k128_3x3x3_32x32x32",
    "nnunet3d.c320_k320_3x3x3_4x4x4",  # few tiles: the reduction is split
    "monai_unet.c16_k32_3x3x3_s222_48x48x48",
    "monai_unet.c32_k32_3x3x3_24x24x24",  # narrow: planes and lines that taps share
    "nnunet3d.c1_k32_3x3x3_128x128x128",  # taps folded into channels
    "r3d18.c256_k256_3x3x3_4x14x14",
    "x3d_m.c216_k96_1x1x1_16x14x14",
    "x3d_m.c216_k216_3x3x3_16x14x14_g216",
)
# For the engines that none of them reaches.
BESIDE = (
    "monai_unet.Tc32_k2_3x3x3_s222_48x48x48", "sweep.odd_channels.45", "sweep.groups.16", "sweep.depthwise_kernel.5"
)  # fmt: skip
RUNS = 100
_DTYPES = ("fp16", "bf16", "fp32")
_CONFIGS = 6  # of an engine, beside its smallest
_SECONDS = 60.0  # a step, compiling included; an estimate


def steps(setting: Setting) -> list[Step]:
    names = exact.steps(f"{layer}/{pass_}" for layer in (*LAYERS, *BESIDE) for pass_ in PASSES)
    return [Step(name, _SECONDS, functools.partial(child.step, __name__, name)) for name in names]


def compute(name: str) -> Outcome:
    case, trial = exact.parted(name)
    layer, pass_ = case.split("/")
    return check(cases(workloads(layer), (pass_,), _DTYPES), torch.device("cuda"), RUNS, trial)


def workloads(*layers: str) -> list[Workload]:
    """The layers of these names."""
    sweeps = dict.fromkeys(name.rpartition(".")[0] for name in BESIDE if name.startswith("sweep."))
    return [workload for workload in (*real(), *suite(",".join(sweeps))) if workload.id in layers]


def check(asked: Sequence[Case], device: torch.device, runs: int, trial: bool = False) -> Outcome:
    """T1 and equal bits, for the most promising configs of every engine but torch's own."""
    faults, checks = [], 0
    for case in asked:
        (problem,) = Tensors(case, device).problems
        integers, noise = (Tensors(case, device).operands(problem) for _ in range(2))
        exact.fill(problem, integers)
        for engine, config in exact.plans(problem, _CONFIGS, trial):
            try:
                fault = _fault(problem, integers, noise, engine, config, runs)
            except Exception as error:
                if is_out_of_resources(error):
                    continue
                faults.append(f"{case.dtype} {engine.NAME} [{config}] raised {error!r:.200}")
                if is_illegal_access(error):  # which ends all computing in this process
                    return Outcome(WRONG, "; ".join(faults), checks)
                continue
            checks += 1
            if fault:
                faults.append(f"{case.dtype} {engine.NAME} [{config}]: {fault}")
    return Outcome(WRONG if faults else OK, "; ".join(faults), checks)


def _fault(
    problem: Problem, integers: Operands, noise: Operands, engine: ModuleType, config: Config, runs: int
) -> str:
    wrong = exact.differing(problem, integers, engine.launch(problem, integers, config))
    if wrong:
        return f"{wrong} elements are not exact"
    first = engine.launch(problem, noise, config)
    different = sum(not torch.equal(engine.launch(problem, noise, config), first) for _ in range(runs))
    return f"{different} of {runs} runs gave other bits" if different else ""
