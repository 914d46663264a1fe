"""The ops in torch's own operators, for exported programs that are to run elsewhere."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from . import ops
from .engines.aten import convolution
from .engines.base import activate
from .problem import Operands


def decompositions() -> dict[torch._ops.OpOverload, Callable[..., Tensor]]:
    """What each op of this package is in operators of ATen, as :meth:`torch.export.ExportedProgram.run_decompositions` takes
    it: the program then needs this package no more.

    A new dictionary at every call, for torch's to be added: ``torch.export.default_decompositions()``.
    """
    return {ops.conv3d: _forward, ops.conv3d_fused: _fused, ops.conv3d_dgrad: _dgrad, ops.conv3d_wgrad: _wgrad}


def _forward(input, weight, bias, stride, padding, dilation, groups):
    operands = Operands(input, weight, None, bias)
    result = convolution("forward", operands, input.shape, weight.shape, stride, padding, dilation, groups)
    return _in_format(result, ops.channels_last_result(input, weight))


def _fused(input, weight, bias, residual, stride, padding, dilation, groups, activation, negative_slope):
    sums = _forward(input, weight, bias, stride, padding, dilation, groups)
    return activate(sums if residual is None else sums + residual, activation, negative_slope)


def _dgrad(grad, weight, input_size, stride, padding, dilation, groups, channels_last):
    """By a transposed convolution, which other runtimes know; ``convolution_backward`` they do not."""
    low, high = padding[::2], padding[1::2]
    symmetric = tuple(low) == tuple(high)
    # Of the padded input, by the taps:
    reached = [(grad.shape[i + 2] - 1) * stride[i] + dilation[i] * (weight.shape[i + 2] - 1) + 1 for i in range(3)]
    left = [input_size[i + 2] + low[i] + high[i] - reached[i] for i in range(3)]  # fewer than a stride
    result = F.conv_transpose3d(grad, weight, None, stride, low if symmetric else (0, 0, 0), left, groups, dilation)
    if not symmetric:
        result = result[(..., *(slice(a, a + s) for a, s in zip(low, input_size[2:], strict=True)))]
    return _in_format(result, channels_last)


def _wgrad(grad, input, weight_size, stride, padding, dilation, groups, channels_last):
    operands = Operands(input, None, grad)
    result = convolution("wgrad", operands, input.shape, weight_size, stride, padding, dilation, groups)
    return _in_format(result, channels_last)


def _in_format(result: Tensor, channels_last: bool) -> Tensor:
    return result.contiguous(memory_format=torch.channels_last_3d if channels_last else torch.contiguous_format)
