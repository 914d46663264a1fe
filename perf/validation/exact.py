"""Rule T1: operands of small integers, whose sums no order of additions changes, must give exactly the right result."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from types import ModuleType

import torch

from triton_conv3d import engines, reference
from triton_conv3d.engines.base import Config
from triton_conv3d.problem import Operands, Problem
from triton_conv3d.tuning import cost_model

from .. import checking

_SUMS = 2.0**22  # products that differ from 0, of one sum: float32 holds every integer up to 2^24
_ATEN = "aten"  # torch's own, which is not ours to judge
_TRIAL = ", on trial"


def fill(problem: Problem, operands: Operands) -> None:
    """Overwrite the operands with -1, 0 and 1, in place and without temporaries: at most every second one is not 0."""
    density = min(0.5, (_SUMS / max(1, reference.reduction(problem))) ** 0.5)
    for tensor in operands.tensors:
        if tensor is not None:
            generator = torch.Generator(tensor.device).manual_seed(tensor.numel())
            tensor.uniform_(-1, 1, generator=generator).div_(1 - density).trunc_().clamp_(-1, 1)


def differing(problem: Problem, operands: Operands, result: torch.Tensor, elements: int = checking.SLAB) -> int:
    """How many elements are not the exact ones, rounded once to the result's type.

    Args:
        elements: of the slabs that are computed at once in float64.
    """
    slabs = checking.slabs(problem, operands, reference.compute, elements)
    return sum(int((result[index] != expected.to(result.dtype)).sum()) for index, expected in slabs)


def steps(names: Iterable[str]) -> list[str]:
    """Each twice, without and with the engines on trial: what those do to the device, or keep it from, costs only them."""
    names = list(names)
    return names + [name + _TRIAL for name in names]


def parted(step: str) -> tuple[str, bool]:
    """(the name, whether it is for the engines on trial) of one of :func:`steps`."""
    return step.removesuffix(_TRIAL), step.endswith(_TRIAL)


def plans(problem: Problem, most: int, trial: bool = False) -> Iterator[tuple[ModuleType, Config]]:
    """Of every engine but torch's own, or of those on trial: the most promising configs and the smallest, which fits every
    GPU."""
    for engine in engines.available().values():
        if engine.NAME != _ATEN and getattr(engine, "TRIAL", False) == trial and engine.supports(problem) is None:
            offers = engine.configs(problem)
            ranked = [config for _, _, config in cost_model.rank(problem, [(engine, config) for config in offers])]
            yield from ((engine, config) for config in dict.fromkeys((*ranked[:most], offers[-1])))
