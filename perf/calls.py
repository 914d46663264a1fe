"""A case as torch computes it: the layer as a module, and the function and arguments of each of its passes."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import torch
import torch.nn.functional as F

from triton_conv3d.functional import transposed_shape

from .tensors import Tensors
from .workloads import Case

Results = tuple[torch.Tensor, ...]


def single(function: Callable[..., torch.Tensor], *arguments) -> Callable[[], Results]:
    return lambda: (function(*arguments),)


def training(module: torch.nn.Module, x: torch.Tensor, grad: torch.Tensor) -> Callable[[], Results]:
    """Forward and backward of a module: (output, gradients of input and weight); that of a bias is made and dropped."""
    wanted = (x, *module.parameters())

    def call() -> Results:
        y = module(x)
        return y.detach(), *torch.autograd.grad(y, wanted, grad)[:2]

    return call


def outside(case: Case, tensors: Tensors, layout: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Input of the model's layer, a leaf for autograd, and gradient of its output."""
    x, grad = (tensors.get(name, layout) for name in _names(case))
    return x.detach().requires_grad_(), grad


def _names(case: Case) -> tuple[str, str]:
    """Of the input and the gradient of the model's layer, as the convolution calls them that it is written as."""
    return ("grad", "input") if case.workload.transposed else ("input", "grad")


def arguments(case: Case) -> tuple:
    """What torch.nn.functional.conv3d takes behind its tensors."""
    layer = case.workload.layer
    return layer.stride, layer.padding, layer.dilation, layer.groups


def output_padding(case: Case) -> tuple[int, ...]:
    """What the output of a transposed convolution has beyond the smallest one that its input could come from."""
    layer = case.workload.layer
    geometry = (layer.stride, layer.padding_both, layer.dilation, layer.groups, (0, 0, 0))
    smallest = transposed_shape(layer.output_shape, layer.weight_shape, *geometry)[2:]
    return tuple(size - least for size, least in zip(layer.input_size, smallest, strict=True))


def as_module(case: Case, tensors: Tensors, layout: str, of: ModuleType = torch.nn) -> torch.nn.Module:
    """The layer as a Conv3d or ConvTranspose3d of torch, or of another module, whose parameters are the case's."""
    layer = case.workload.layer
    kind, channels, more = of.Conv3d, (layer.in_channels, layer.out_channels), {}
    if case.workload.transposed:
        kind, channels, more = of.ConvTranspose3d, channels[::-1], {"output_padding": output_padding(case)}
    module = kind(*channels, layer.kernel_size, layer.stride, layer.padding, dilation=layer.dilation,
                  groups=layer.groups, bias=layer.bias, device="meta", **more)  # fmt: skip
    for name in ("weight", "bias"):
        if getattr(module, name) is not None:
            setattr(module, name, torch.nn.Parameter(tensors.get(name, layout)))
    return module


def torch_pass(case: Case, tensors: Tensors, layout: str) -> tuple:
    """The function that computes the pass, and its arguments: tensors, or None for a missing bias."""
    stride, padding, dilation, groups = arguments(case)
    transposed = case.workload.transposed
    extra = output_padding(case) if transposed else (0, 0, 0)
    x_name, grad_name = _names(case)
    x, weight = tensors.get(x_name, layout), tensors.get("weight", layout)
    if case.pass_ == "forward" and transposed:
        return lambda x, w: F.conv_transpose3d(x, w, None, stride, padding, extra, groups, dilation), x, weight
    if case.pass_ == "forward":
        bias = tensors.get("bias", layout)
        return lambda x, w, b: F.conv3d(x, w, b, stride, padding, dilation, groups), x, weight, bias
    wanted = 0 if case.pass_ == "dgrad" else 1
    mask = [wanted == 0, wanted == 1, False]

    def backward(grad: torch.Tensor, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return torch.ops.aten.convolution_backward(
            grad, x, w, None, stride, padding, dilation, transposed, extra, groups, mask
        )[wanted]

    return backward, tensors.get(grad_name, layout), x, weight
