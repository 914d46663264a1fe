"""torch's own convolution as an engine: the fallback for everything, and a candidate of every tuning."""

from __future__ import annotations

import threading
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ..problem import CHANNELS_LAST, Operands, Problem
from .base import Config, Memory, finish, in_format, switched

NAME = "aten"
_searched = threading.local()  # .launches for which cuDNN has searched: it keeps what it found for each thread and layout


@dataclass(frozen=True)
class AtenConfig(Config):
    """
    channels_last: copy operands to channels_last_3d first; else they are passed as they are.
    benchmark: let cuDNN try its algorithms (``torch.backends.cudnn.benchmark``); else the user's own flag holds.
    """

    channels_last: bool = False
    benchmark: bool = False


def supports(problem: Problem) -> str | None:
    return None


def configs(problem: Problem) -> tuple[AtenConfig, ...]:
    """On a GPU: as called and channels-last, each with cuDNN's benchmark; the plain call is last."""
    if problem.arch in ("cpu", "interpreter"):
        return (AtenConfig(),)
    layouts = (False,) if all(layout == CHANNELS_LAST for layout in problem.layouts) else (True, False)
    tries = (True, False) if problem.arch.startswith("sm_") else (False,)
    return tuple(AtenConfig(channels_last, benchmark) for channels_last in layouts for benchmark in tries)


def memory(problem: Problem, config: AtenConfig) -> Memory:
    """Padding that differs at both ends is a copy of the input; what cuDNN allocates is not known beforehand."""
    copies = 0
    if config.channels_last:
        copies = problem.min_bytes
    elif problem.padding[::2] != problem.padding[1::2]:
        copies = problem.batch * problem.in_channels * problem.itemsize
        for size, low, high in zip(problem.input_size, problem.padding[::2], problem.padding[1::2], strict=True):
            copies *= size + low + high
    return Memory(copies=copies)


def launch(problem: Problem, operands: Operands, config: AtenConfig) -> torch.Tensor:
    if config.channels_last:
        last = {"memory_format": torch.channels_last_3d}
        input, weight, grad = (t if t is None else t.contiguous(**last) for t in operands[:3])
        operands = operands._replace(input=input, weight=weight, grad=grad)
    cudnn, searched = torch.backends.cudnn, _searched.__dict__.setdefault("launches", set())
    # A search measures, which would break the capture of a CUDA graph, unless it is done before.
    search = config.benchmark and ((problem, config) in searched or not torch.cuda.is_current_stream_capturing())
    with (
        switched(cudnn, "benchmark", search or None),
        switched(cudnn.conv, "fp32_precision", _precision(problem)),
    ):
        result = _finished(problem, operands)
    if search:
        searched.add((problem, config))
    return result


def _precision(problem: Problem) -> str | None:
    """Of cuDNN's float32 products, whatever torch's own switch says; it has no tf32x3. None: of none."""
    if problem.dtype != "float32" or not problem.arch.startswith("sm_"):
        return None
    return "tf32" if problem.precision == "tf32" else "ieee"


def _finished(problem: Problem, operands: Operands) -> torch.Tensor:
    result = _convolution(problem, operands)
    return finish(problem, operands, result) if problem.fused else result


def _convolution(problem: Problem, operands: Operands) -> torch.Tensor:
    low, high = problem.padding[::2], problem.padding[1::2]
    symmetric = low == high
    input, size = operands.input, problem.input_size
    if not symmetric:  # torch pads one side by a copy as well
        size = tuple(s + a + b for s, a, b in zip(size, low, high, strict=True))
        if input is not None:
            front, back, top, bottom, left, right = problem.padding
            input = F.pad(input, (left, right, top, bottom, front, back))
    padding = low if symmetric else (0, 0, 0)
    if problem.pass_ == "forward":
        result = F.conv3d(
            input, operands.weight, operands.bias, problem.stride, padding, problem.dilation, problem.groups
        )
        return in_format(result, problem.memory_format)
    # The absent tensor gives a shape only: one element, expanded.
    grad = operands.grad
    if problem.pass_ == "dgrad":
        weight, input = operands.weight, grad.new_empty(1).expand(problem.batch, problem.in_channels, *size)
        mask = (True, False, False)
    else:
        weight = grad.new_empty(1).expand(problem.weight_shape)
        mask = (False, True, False)
    results = torch.ops.aten.convolution_backward(
        grad, input, weight, None, problem.stride, padding, problem.dilation, False, (0, 0, 0), problem.groups, mask
    )
    if problem.pass_ == "wgrad":
        return in_format(results[1], problem.memory_format)
    inner = tuple(slice(a, a + s) for a, s in zip(low, problem.input_size, strict=True))
    result = results[0] if symmetric else results[0][(..., *inner)]
    return in_format(result, problem.memory_format)
