"""correctness.large: tensors beyond 2^31 elements or bytes, exact integers compared element by element."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch

from triton_conv3d.problem import PASSES, VIEW, Operands, Problem
from triton_conv3d.tuning.faults import is_illegal_access, is_out_of_resources
from triton_conv3d.workload import DTYPES, Layer

from ..checking import SLAB
from ..results import MEMORY, OK, WRONG
from ..tensors import Tensors
from ..workloads import Case, Workload
from . import Outcome, Setting, Step, child, exact

NAME = "correctness.large"
WHAT = "tensors beyond 2^31 elements and bytes, exact"
WORKERS = 1  # each needs most of the memory
_SECONDS = 60.0  # a step, compiling included; an estimate
_COPIES = 6  # of a slab in float64, that the reference makes at most
_CONFIGS = 1  # of an engine, beside its smallest


@dataclass(frozen=True)
class Large:
    """
    layer: its shapes. passes: which to compute.
    gap: elements from one plane of the input to the next, of an input that is a small view of a huge buffer; 0: dense.
    """

    layer: Layer
    passes: tuple[str, ...] = PASSES
    gap: int = 0

    def case(self, pass_: str) -> Case:
        return Case(Workload(self.layer, "large", "large"), pass_, self.layer.dtype)

    @property
    def memory(self) -> int:
        """Bytes that a pass needs on the device: its tensors, and the reference's copies of a slab."""
        layer = self.layer
        sizes = (layer.input_shape, layer.weight_shape, layer.output_shape)
        tensors = sum(map(math.prod, sizes)) + self.gap * layer.input_size[0]
        return tensors * DTYPES[layer.dtype].itemsize + _COPIES * 8 * SLAB


def _large(
    name, batch, in_channels, out_channels, size, kernel, stride=1, padding=0, dtype="bf16", passes=PASSES, gap=0
) -> tuple[str, Large]:
    layer = Layer(
        name, batch, in_channels, out_channels, size, kernel, (stride,) * 3, (padding,) * 3, (1, 1, 1), 1, False, dtype
    )
    return name, Large(layer, passes, gap)


# The project's bar for large tensors. Sizes without a source are chosen just above 2^31 = 2,147,483,648.
CASES = dict((
    _large("input_of_2^31_elements", 1, 32, 1, (512, 512, 256), (1, 1, 1), dtype="fp16"),  # pytorch#43476
    _large("output_above_2^31_elements", 1, 16, 64, (128, 512, 513), (3, 3, 3), padding=1, passes=("forward",)),
    _large("above_2^31_bytes", 1, 16, 16, (124, 1282, 722), (1, 3, 3)),  # pytorch#163539: silently wrong there
    _large("crossed_inside_a_sample", 2, 32, 8, (128, 640, 512), (3, 3, 3), padding=1),
    _large("view_of_a_huge_buffer", 2, 8, 16, (3, 17, 19), (2, 3, 3), passes=("forward", "wgrad"), gap=2**30),
    _large("strided_dgrad", 1, 16, 8, (512, 512, 514), (3, 3, 3), 2, 1, dtype="fp16", passes=("dgrad",)),
    _large("wgrad_over_1.3e8_pixels", 1, 4, 4, (512, 512, 512), (3, 3, 3), padding=1, passes=("wgrad",)),
    _large("batch_65537", 65_537, 8, 8, (2, 3, 3), (1, 2, 2)),
))  # fmt: skip


def steps(setting: Setting) -> list[Step]:
    return [Step(name, _SECONDS, functools.partial(_step, setting.memory, name)) for name in exact.steps(CASES)]


def _step(memory: int, name: str, limit: float) -> Outcome | None:
    needed = CASES[exact.parted(name)[0]].memory
    if needed > memory:
        return Outcome(MEMORY, f"needs {needed / 2**30:.1f} GiB, this GPU has {memory / 2**30:.1f} GiB")
    return child.step(__name__, name, limit)


def compute(name: str) -> Outcome:
    case, trial = exact.parted(name)
    return check(CASES[case], torch.device("cuda"), trial=trial)


def check(large: Large, device: torch.device, elements: int = SLAB, trial: bool = False) -> Outcome:
    """Every pass of a case, by every engine but torch's own, with its best ranked and its smallest config."""
    wrong, checks = [], 0
    for pass_ in large.passes:
        problem, operands = make(large, pass_, device)
        for engine, config in exact.plans(problem, _CONFIGS, trial):
            try:
                count = exact.differing(problem, operands, engine.launch(problem, operands, config), elements)
            except Exception as error:
                if is_out_of_resources(error):
                    continue
                wrong.append(f"{pass_}: {engine.NAME} [{config}] raised {error!r:.200}")
                if is_illegal_access(error):  # which ends all computing in this process
                    return Outcome(WRONG, "; ".join(wrong), checks)
                continue
            checks += 1
            if count:
                wrong.append(f"{pass_}: {count} elements by {engine.NAME} [{config}]")
    return Outcome(WRONG if wrong else OK, "; ".join(wrong), checks)


def make(large: Large, pass_: str, device: torch.device) -> tuple[Problem, Operands]:
    """Integers in channels-last tensors, and the problem that they pose."""
    tensors = Tensors(large.case(pass_), device)
    (problem,) = tensors.problems
    operands = tensors.operands(problem)
    if large.gap:
        operands = operands._replace(input=_apart(operands.input, large.gap))
        problem = problem.replace(layouts=(VIEW, *problem.layouts[1:]), index64=True)
    exact.fill(problem, operands)
    return problem, operands


def _apart(tensor: torch.Tensor, gap: int) -> torch.Tensor:
    """Planes that lie ``gap`` elements apart, channels last; what lies between them is NaN."""
    n, c, d, h, w = tensor.shape
    buffer = torch.full(((d - 1) * gap + n * c * h * w,), math.nan, dtype=tensor.dtype, device=tensor.device)
    return buffer.as_strided(tensor.shape, (h * w * c, 1, gap, w * c, c))
