"""From the tensors of a call to the problem that the engines are asked for, and back to the result of the call.

A signature is all that a problem is made of, cheap to build and to look up. What is asked for leaves out the taps at
the ends of a dimension that only ever meet padding (:func:`.problem.trimmed`), so that no engine multiplies by them: the
weight is passed as a view, and a weight's gradient is zero there.
"""

from __future__ import annotations

import functools

import torch

from . import settings, tuning
from .problem import CHANNELS_LAST, Operands, Problem, Taps, describe, trimmed

_posed: dict[tuple, tuple[Problem, Taps | None]] = {}
_MOST_POSED = 65_536  # of volumes that all differ there is no end
settings.on_change(_posed.clear)


def _precision(dtype: torch.dtype, device: torch.device) -> str:
    """float32 follows torch's switch for convolutions on GPUs; in the interpreter it is exact unless asked otherwise."""
    if dtype != torch.float32:
        return "ieee"
    asked = settings.current().fp32
    if asked != "torch":
        return asked
    return "tf32" if device.type == "cuda" and torch.backends.cudnn.conv.fp32_precision == "tf32" else "ieee"


def pose(
    pass_, operands, input_size, weight_size, stride, padding, dilation, groups, channels_last
) -> tuple[Problem, Taps | None]:
    """The problem of one pass, and which taps of the weight it has; None: all of them."""
    first, second = (t for t in operands[:3] if t is not None)
    precision = _precision(first.dtype, first.device)
    signature = (
        pass_, first.shape, first.stride(), second.shape, second.stride(), first.data_ptr() % 16, second.data_ptr() % 16,
        first.dtype, first.device, operands.bias is not None, *stride, *padding, *dilation, groups, channels_last,
        precision, *(input_size if pass_ == "dgrad" else weight_size if pass_ == "wgrad" else ()),
    )  # fmt: skip
    posed = _posed.get(signature)
    if posed is None:
        geometry = (input_size, weight_size, stride, padding, dilation, groups, channels_last)
        problem = describe(pass_, operands, *geometry, precision)
        problem, taps, _ = cut(problem, operands)
        if len(_posed) >= _MOST_POSED:
            _posed.clear()
        posed = _posed[signature] = problem, taps
    return posed


def cut(problem: Problem, operands: Operands) -> tuple[Problem, Taps | None, Operands]:
    """What engines are given instead of a problem on these operands, with all taps or with fewer: see :func:`pose`."""
    smaller = None if problem.empty else trimmed(problem)
    if smaller is None:
        return problem, None, operands
    problem, taps = smaller
    operands = _with_taps(operands, taps)  # whose layout may be another one
    problem = describe(
        problem.pass_, operands, problem.input_shape, problem.weight_shape, problem.stride, problem.padding,
        problem.dilation, problem.groups, problem.result_layout == CHANNELS_LAST, problem.precision, problem.activation,
    )  # fmt: skip
    return problem, taps, operands


@functools.lru_cache(maxsize=65536)
def with_epilogue(problem: Problem, residual: bool, activation: str) -> Problem:
    fused = problem.replace(residual=residual, activation=activation)
    return fused if fused.fused else problem  # the very problem: looked up without comparing all of it


def _with_taps(operands: Operands, taps: Taps) -> Operands:
    return operands if operands.weight is None else operands._replace(weight=taps.of(operands.weight))


def run(problem: Problem, taps: Taps | None, operands: Operands, weight_size=None) -> torch.Tensor:
    """Compute what :func:`pose` returned. weight_size: of the result of wgrad."""
    if taps is None:
        return tuning.run(problem, operands)
    result = tuning.run(problem, _with_taps(operands, taps))
    if problem.pass_ != "wgrad":
        return result
    gradient = torch.empty(
        weight_size, dtype=result.dtype, device=result.device, memory_format=problem.memory_format
    ).zero_()
    taps.of(gradient).copy_(result)
    return gradient
