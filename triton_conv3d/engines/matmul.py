"""matmul: the convolutions that are one matrix product, by torch's own GEMM on views.

    pointwise   1x1x1 without stride or padding: (pixels, C) x (C, K)
    patches     kernel == stride without padding or dilation, or kernel == input: (patches, C * taps) x (C * taps, K)

Rows and columns of the product are views of the operands wherever their strides allow it; a patch embedding whose
input is one patch costs what the same Linear costs.

Bytes by design: input, weight and output once each, the minimum; besides, twice what is copied (:func:`memory`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from ..problem import CHANNELS_LAST, Operands, Problem
from .base import Config, Memory, finish, in_format, switched

NAME = "matmul"


@dataclass(frozen=True)
class MatmulConfig(Config):
    """No knobs: torch's GEMM library chooses for itself."""


def supports(problem: Problem) -> str | None:
    if not torch.empty(0, dtype=problem.torch_dtype).is_floating_point():
        return f"no matrix product for {problem.dtype}"
    if problem.precision == "tf32x3":
        return "torch's GEMM has no tf32x3"
    if problem.arch == "cpu":
        return "CPU tensors are left to torch's own convolution"
    if problem.groups != 1:
        return f"groups={problem.groups}: a matrix product for each"
    if problem.empty:
        return "nothing to multiply"
    if any(problem.padding):
        return f"padding {problem.padding}: patches must not leave the input"
    for kernel, stride, dilation, size in zip(
        problem.kernel_size, problem.stride, problem.dilation, problem.input_size, strict=True
    ):
        if dilation != 1 and kernel != 1:
            return f"dilation {problem.dilation}: a patch must be dense"
        if kernel != stride and kernel != size:
            return f"kernel {problem.kernel_size} is neither the stride {problem.stride} nor the whole input"
    return None


def configs(problem: Problem) -> tuple[MatmulConfig, ...]:
    return (MatmulConfig(),)


def memory(problem: Problem, config: MatmulConfig) -> Memory:
    """Patches cut from a larger volume are gathered by one copy; a single patch and 1x1x1 are views."""
    if problem.taps == 1 or problem.output_size == (1, 1, 1):
        return Memory()
    rows = problem.pixels * problem.in_channels * problem.taps
    return Memory(copies=problem.itemsize * rows)


def launch(problem: Problem, operands: Operands, config: MatmulConfig) -> torch.Tensor:
    with switched(torch.backends.cuda.matmul, *_switch(problem)):
        result = _product(problem, operands)
    return finish(problem, operands, result) if problem.fused else result


def _switch(problem: Problem) -> tuple[str, str | bool | None]:
    """Of torch's GEMM, and its value: the convolution's precision, and no partial sums that are rounded to 16 bits."""
    short = {"float16": "fp16", "bfloat16": "bf16"}.get(problem.dtype)
    if short and problem.arch.startswith("sm_"):
        return f"allow_{short}_reduced_precision_reduction", False
    own = problem.dtype == "float32" and problem.arch.startswith("sm_")
    return "fp32_precision", problem.precision if own else None


def _product(problem: Problem, operands: Operands) -> torch.Tensor:
    k = problem.out_channels
    # With channels last, rows are (taps, C) and cost no copy; else they are (C, taps), as the weight is stored.
    last = problem.result_layout == CHANNELS_LAST
    if problem.pass_ == "forward":
        rows = _to_patches(operands.input, problem, last)
        flat = _flat_weight(operands.weight, last)
        if operands.bias is None:
            y = rows @ flat.t()
        else:
            y = torch.addmm(operands.bias, rows, flat.t())
        return in_format(_to_volume(y, problem, k), problem.memory_format)
    grad = operands.grad.permute(0, 2, 3, 4, 1).reshape(-1, k)
    if problem.pass_ == "dgrad":
        rows = grad @ _flat_weight(operands.weight, last)
        return in_format(_from_patches(rows, problem, last), problem.memory_format)
    dw = grad.t() @ _to_patches(operands.input, problem, last)
    shape = (k, *problem.kernel_size, problem.in_channels) if last else problem.weight_shape
    dw = dw.view(shape)
    return in_format(dw.permute(0, 4, 1, 2, 3) if last else dw, problem.memory_format)


def _flat_weight(weight: torch.Tensor, last: bool) -> torch.Tensor:
    """(K, taps * C) if channels are last, else (K, C * taps)."""
    return (weight.permute(0, 2, 3, 4, 1) if last else weight).reshape(weight.shape[0], -1)


def _to_volume(rows: torch.Tensor, problem: Problem, channels: int) -> torch.Tensor:
    return rows.view(problem.batch, *problem.output_size, channels).permute(0, 4, 1, 2, 3)


def _to_patches(input: torch.Tensor, problem: Problem, last: bool) -> torch.Tensor:
    """(pixels, C * taps): each row one patch, its elements in the order of :func:`_flat_weight`."""
    kernel, size = problem.kernel_size, problem.output_size
    used = input[(..., *(slice(o * k) for o, k in zip(size, kernel, strict=True)))]
    n, c = problem.batch, problem.in_channels
    split = (
        used.unflatten(4, (size[2], kernel[2])).unflatten(3, (size[1], kernel[1])).unflatten(2, (size[0], kernel[0]))
    )
    # split is (n, c, od, kd, oh, kh, ow, kw)
    order = (0, 2, 4, 6, 3, 5, 7, 1) if last else (0, 2, 4, 6, 1, 3, 5, 7)
    return split.permute(order).reshape(n * math.prod(size), c * problem.taps)


def _from_patches(rows: torch.Tensor, problem: Problem, last: bool) -> torch.Tensor:
    """The way back of :func:`_to_patches`; pixels that no patch covers are zero."""
    n, c, kernel, size = problem.batch, problem.in_channels, problem.kernel_size, problem.output_size
    if last:
        split = rows.view(n, *size, *kernel, c).permute(0, 7, 1, 4, 2, 5, 3, 6)
    else:
        split = rows.view(n, *size, c, *kernel).permute(0, 4, 1, 5, 2, 6, 3, 7)
    covered = tuple(o * k for o, k in zip(size, kernel, strict=True))
    if covered == problem.input_size:
        return split.reshape(problem.input_shape)
    result = problem.empty_result(rows.device).zero_()
    result[(..., *(slice(extent) for extent in covered))] = split.reshape(n, c, *covered)
    return result
