"""torch's own convolution as an engine: the fallback for everything, and a candidate of every tuning."""

from __future__ import annotations

import math
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
    """On a GPU as called and channels-last; on NVIDIA's each with cuDNN's benchmark and without. The plain call is last."""
    if problem.arch in ("cpu", "interpreter"):
        return (AtenConfig(),)
    layouts = (False,) if all(layout == CHANNELS_LAST for layout in problem.layouts) else (True, False)
    tries = (True, False) if problem.arch.startswith("sm_") else (False,)
    return tuple(AtenConfig(channels_last, benchmark) for channels_last in layouts for benchmark in tries)


def memory(problem: Problem, config: AtenConfig) -> Memory:
    """Padding that differs at both ends is a copy of the input; what :func:`convolution` shows of it is workspace. What cuDNN
    allocates is not known beforehand."""
    copies = 0
    if config.channels_last:
        copies = problem.min_bytes
    elif problem.padding[::2] != problem.padding[1::2]:
        copies = problem.batch * problem.in_channels * problem.itemsize
        for size, low, high in zip(problem.input_size, problem.padding[::2], problem.padding[1::2], strict=True):
            copies *= size + low + high
    shown = problem.itemsize * math.prod(problem.input_shape) if _shows_format(problem, config) else 0
    return Memory(shown, copies)


def launch(problem: Problem, operands: Operands, config: AtenConfig) -> torch.Tensor:
    if config.channels_last:
        last = torch.channels_last_3d
        input, weight, grad = (t if t is None else in_format(t, last) for t in operands[:3])
        operands = operands._replace(input=input, weight=weight, grad=grad)
    cudnn, searched = torch.backends.cudnn, _searched.__dict__.setdefault("launches", set())
    # A search measures, which would break the capture of a CUDA graph, unless it is done before.
    search = config.benchmark and ((problem, config) in searched or not torch.cuda.is_current_stream_capturing())
    with (
        switched(cudnn, "benchmark", search or None),
        switched(cudnn.conv, "fp32_precision", _precision(problem)),
    ):
        result = _finished(problem, operands, config)
    if search:
        searched.add((problem, config))
    return result


def _precision(problem: Problem) -> str | None:
    """Of cuDNN's float32 products, whatever torch's own switch says; it has no tf32x3. None: of none."""
    if problem.dtype != "float32" or not problem.arch.startswith("sm_"):
        return None
    return "tf32" if problem.precision == "tf32" else "ieee"


def _finished(problem: Problem, operands: Operands, config: AtenConfig) -> torch.Tensor:
    result = _convolution(problem, operands, config)
    return finish(problem, operands, result) if problem.fused else result


def _convolution(problem: Problem, operands: Operands, config: AtenConfig) -> torch.Tensor:
    input_size = (problem.batch, problem.in_channels, *problem.input_size)
    geometry = (problem.stride, problem.padding, problem.dilation, problem.groups)
    result = convolution(
        problem.pass_, operands, input_size, problem.weight_shape, *geometry, _shows_format(problem, config)
    )
    # The plain call is what is left where kernels fail.
    return in_format(result, problem.memory_format, by_kernels=config.channels_last)


def _shows_format(problem: Problem, config: AtenConfig) -> bool:
    """Whether dgrad on a GPU is to be computed channels-last."""
    last = config.channels_last or problem.memory_format == torch.channels_last_3d
    return last and problem.pass_ == "dgrad" and problem.arch not in ("cpu", "interpreter")


def convolution(
    pass_: str, operands: Operands, input_size, weight_size, stride, padding, dilation, groups, shows_format: bool = False
) -> torch.Tensor:
    """A pass as torch's own operators, in whatever memory format they return; sizes may be symbolic.

    Args:
        shows_format: dgrad is computed channels-last, as by the input that it does not read: of cuDNN's operands torch makes
            the gradient follow the input's format (ATen/native/cudnn/ConvShared.cpp). Memory as large as the input is taken
            for it, and not touched.
    """
    input, low, high = operands.input, padding[::2], padding[1::2]
    size, symmetric = tuple(input_size[2:]), tuple(low) == tuple(high)
    padded = size
    if not symmetric:  # torch pads one side by a copy as well
        padded = tuple(s + a + b for s, a, b in zip(size, low, high, strict=True))
        if input is not None:
            front, back, top, bottom, left, right = padding
            input = F.pad(input, (left, right, top, bottom, front, back))
    padding = low if symmetric else (0, 0, 0)
    if pass_ == "forward":
        return F.conv3d(input, operands.weight, operands.bias, stride, padding, dilation, groups)
    # The absent tensor gives a shape only: one element, expanded.
    grad = operands.grad
    if pass_ == "dgrad":
        weight, shape = operands.weight, (*input_size[:2], *padded)
        if shows_format:
            input = torch.empty(shape, dtype=grad.dtype, device=grad.device, memory_format=torch.channels_last_3d)
        else:
            input = grad.new_empty(1).expand(shape)
        mask = (True, False, False)
    else:
        weight = grad.new_empty(1).expand(weight_size)
        mask = (False, True, False)
    results = torch.ops.aten.convolution_backward(
        grad, input, weight, None, stride, padding, dilation, False, (0, 0, 0), groups, mask
    )
    if pass_ == "wgrad":
        return results[1]
    inner = tuple(slice(a, a + s) for a, s in zip(low, size, strict=True))
    return results[0] if symmetric else results[0][(..., *inner)]
