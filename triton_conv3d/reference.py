"""The three passes in plain torch float64, written from the definition, and the error measures.

    y[n,g,k,o] = sum over c, t of  x[n,g,c, o*stride + t*dilation - padding] * w[g,k,c,t]   (+ bias[g,k])

with g a group, o an output position and t a tap of the kernel; a fused forward pass is activation(y + residual). One
loop over the taps, one matrix product each: slow, and simple enough to be believed. Works on every device that has
float64.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F

from .problem import NO_ACTIVATION, Operands, Problem


def compute(problem: Problem, operands: Operands) -> torch.Tensor:
    """The exact result of a pass, up to the rounding of float64.

    Args:
        problem: what to compute; only its geometry counts, not its dtype, precision or layouts.
        operands: the tensors as a kernel would get them: already in float16, bfloat16, ...

    Returns:
        float64 tensor of ``problem.result_shape``, contiguous.
    """
    double = operands.map(lambda t: t.detach().to(torch.float64))
    result = {"forward": _forward, "dgrad": _dgrad, "wgrad": _wgrad}[problem.pass_](problem, double)
    return _ACTIVATIONS[problem.activation](result, operands.negative_slope)


def magnitude(problem: Problem, operands: Operands) -> torch.Tensor:
    """The same pass over the absolute values of its operands: the scale of each element's rounding error.

    Of an activation only the slope counts, by which it may enlarge an error.
    """
    sums = compute(problem.replace(activation=NO_ACTIVATION), operands.map(lambda t: t.detach().to(torch.float64).abs()))
    return steepest(problem.activation, operands.negative_slope) * sums


def reduction(problem: Problem) -> int:
    """Products summed into one element of the result, at most."""
    if problem.pass_ == "forward":
        return problem.group_in * problem.taps
    return problem.group_out * problem.taps if problem.pass_ == "dgrad" else problem.pixels


_ACTIVATIONS: dict[str, Callable[[torch.Tensor, float], torch.Tensor]] = {
    NO_ACTIVATION: lambda z, slope: z,
    "relu": lambda z, slope: z.clamp(min=0),
    "leaky_relu": lambda z, slope: torch.where(z > 0, z, z * slope),
    "silu": lambda z, slope: z * torch.special.expit(z),
    "gelu": lambda z, slope: z * torch.special.ndtr(z),
    "gelu_tanh": lambda z, slope: z * torch.special.expit(2 * math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)),
    "sigmoid": lambda z, slope: torch.special.expit(z),
    "tanh": lambda z, slope: torch.tanh(z),
    "hardswish": lambda z, slope: z * (z + 3).clamp(0, 6) / 6,
}
_STEEPEST = {"silu": 1.1, "gelu": 1.13, "gelu_tanh": 1.13, "sigmoid": 0.25, "hardswish": 1.5}  # rounded up; others 1


def steepest(activation: str, negative_slope: float) -> float:
    """The largest slope of an activation, in absolute value."""
    return max(1.0, abs(negative_slope)) if activation == "leaky_relu" else _STEEPEST.get(activation, 1.0)


def _by_group(tensor: torch.Tensor, groups: int) -> torch.Tensor:
    """(N, C, D, H, W) as (N, groups, C / groups, D, H, W)."""
    return tensor.unflatten(1, (groups, tensor.size(1) // groups))


def _weight_by_group(problem: Problem, weight: torch.Tensor) -> torch.Tensor:
    """(K, C / groups, kd, kh, kw) as (groups, K / groups, C / groups, kd, kh, kw)."""
    return weight.unflatten(0, (problem.groups, problem.group_out))


def _pad(problem: Problem, input: torch.Tensor) -> torch.Tensor:
    front, back, top, bottom, left, right = problem.padding
    return F.pad(input, (left, right, top, bottom, front, back))


def _windows(problem: Problem, padded: torch.Tensor) -> Iterator[tuple[tuple[int, int, int], torch.Tensor]]:
    """For each tap, the padded pixels that it meets: a view of the size of the output."""
    for tap in itertools.product(*map(range, problem.kernel_size)):
        region = tuple(
            slice(t * dilation, t * dilation + (size - 1) * stride + 1, stride)
            for t, dilation, stride, size in zip(
                tap, problem.dilation, problem.stride, problem.output_size, strict=True
            )
        )
        yield tap, padded[(..., *region)]


def _forward(problem: Problem, operands: Operands) -> torch.Tensor:
    input = _by_group(_pad(problem, operands.input), problem.groups)
    weight = _weight_by_group(problem, operands.weight)
    output = input.new_zeros(problem.batch, problem.groups, problem.group_out, *problem.output_size)
    for tap, window in _windows(problem, input):
        output += torch.einsum("ngcdhw,gkc->ngkdhw", window, weight[(..., *tap)])
    output = output.flatten(1, 2)
    if operands.bias is not None:
        output = output + operands.bias.view(-1, 1, 1, 1)
    return output if operands.residual is None else output + operands.residual


def _dgrad(problem: Problem, operands: Operands) -> torch.Tensor:
    grad = _by_group(operands.grad, problem.groups)
    weight = _weight_by_group(problem, operands.weight)
    low, high = problem.padding[::2], problem.padding[1::2]
    size = tuple(a + s + b for a, s, b in zip(low, problem.input_size, high, strict=True))
    padded = grad.new_zeros(problem.batch, problem.groups, problem.group_in, *size)
    for tap, window in _windows(problem, padded):
        window += torch.einsum("ngkdhw,gkc->ngcdhw", grad, weight[(..., *tap)])
    inner = tuple(slice(a, a + s) for a, s in zip(low, problem.input_size, strict=True))
    return padded.flatten(1, 2)[(..., *inner)].contiguous()


def _wgrad(problem: Problem, operands: Operands) -> torch.Tensor:
    input = _by_group(_pad(problem, operands.input), problem.groups)
    grad = _by_group(operands.grad, problem.groups)
    weight = _weight_by_group(problem, grad.new_zeros(problem.weight_shape))
    for tap, window in _windows(problem, input):
        weight[(..., *tap)] = torch.einsum("ngkdhw,ngcdhw->gkc", grad, window)
    return weight.flatten(0, 1)
