"""aten's 3-D convolutions, transposed ones too, and their gradients as ops of this package."""

from __future__ import annotations

import operator

import torch
from torch import fx

from .. import ops
from .report import Report
from .rewriting import DGRAD, WGRAD, Rewriter, aten, is_last

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def replace(rewriter: Rewriter, report: Report) -> None:
    for node in list(rewriter.graph.nodes):
        if node.target is aten.convolution.default:
            rule, (tensor, *_), transposed, output_padding = _forward, node.args, node.args[6], node.args[7]
            stride = node.args[3]
        elif node.target is aten.convolution_backward.default:
            rule, (tensor, *_), transposed, output_padding = _backward, node.args, node.args[7], node.args[8]
            stride = node.args[4]
        else:
            if _is_packed(node):
                report.left.append(f"{node.name}: packed for oneDNN by Inductor, which freezes weights on CPUs")
            continue
        value = tensor.meta["val"]
        if value.dim() != 5:
            continue
        reason = _why_not(value, transposed, _three(output_padding), _three(stride))
        if reason is None:
            rule(rewriter, node, report)
        else:
            report.left.append(f"{node.name}: {reason}")


def _is_packed(node: fx.Node) -> bool:
    """Whether it is a 3-D convolution in oneDNN's own format, which Inductor makes before it calls passes."""
    if getattr(node.target, "namespace", "") != "mkldnn" or "convolution" not in node.target._opname:
        return False
    return node.meta["val"].dim() == 5


def _why_not(value: torch.Tensor, transposed: bool, output_padding: list, stride: list) -> str | None:
    if value.dtype not in _DTYPES:
        return f"{str(value.dtype).removeprefix('torch.')} is torch's own"
    if transposed and any(extra >= step for extra, step in zip(output_padding, stride, strict=True)):
        return f"output_padding={output_padding} is not below stride={stride}"
    return None


def _three(numbers) -> list:
    return list(numbers) * 3 if len(numbers) == 1 else list(numbers)


def _geometry(stride, padding, dilation, groups) -> tuple:
    ends = [end for p in _three(padding) for end in (p, p)]
    return _three(stride), ends, _three(dilation), groups


def _forward(rewriter: Rewriter, node: fx.Node, report: Report) -> None:
    input, weight, bias, stride, padding, dilation, transposed, output_padding, groups = node.args
    geometry = _geometry(stride, padding, dilation, groups)
    if not transposed:
        result = rewriter.call(node, ops.conv3d, input, weight, bias, *geometry)
        report.count("replaced", "conv3d")
    else:  # the input gradient of the convolution that has this weight
        size = _transposed_size(rewriter, node, geometry, _three(output_padding))
        last = is_last(node.meta["val"])
        result = rewriter.call(node, DGRAD, input, weight, size, *geometry, last)
        if bias is not None:
            column = rewriter.call(node, aten.reshape.default, bias, [-1, 1, 1, 1])
            result = rewriter.call(node, aten.add.Tensor, result, column)
        report.count("replaced", "transposed conv3d")
    rewriter.take_over(node, result)


def _transposed_size(rewriter: Rewriter, node: fx.Node, geometry: tuple, output_padding: list) -> list:
    input, weight = node.args[:2]
    stride, padding, dilation, groups = geometry
    batch, _, *spatial = rewriter.sizes(input, node)
    _, channels, *kernel = weight.meta["val"].shape
    size = [batch, channels * groups]
    for i, pixels in enumerate(spatial):
        rest = dilation[i] * (kernel[i] - 1) + 1 - padding[2 * i] - padding[2 * i + 1] + output_padding[i] - stride[i]
        steps = rewriter.call(node, operator.mul, pixels, stride[i]) if isinstance(pixels, fx.Node) else pixels * stride[i]
        size.append(rewriter.plus(node, steps, rest))
    return size


def _backward(rewriter: Rewriter, node: fx.Node, report: Report) -> None:
    grad, input, weight, _, stride, padding, dilation, transposed, _, groups, mask = node.args
    geometry = _geometry(stride, padding, dilation, groups)
    for user in list(node.users):
        index = user.args[1]
        if not mask[index]:
            continue
        last = is_last(user.meta["val"])
        if index == 2:
            result, name = rewriter.call(node, aten.sum.dim_IntList, grad, [0, 2, 3, 4]), "bias gradient"
        elif index == 1:
            operands = (input, grad) if transposed else (grad, input)
            size = rewriter.sizes(weight, node)
            result, name = rewriter.call(node, WGRAD, *operands, size, *geometry, last), "conv3d_wgrad"
        elif transposed:
            result, name = rewriter.call(node, ops.conv3d, grad, weight, None, *geometry), "conv3d"
        else:
            size = rewriter.sizes(input, node)
            result, name = rewriter.call(node, DGRAD, grad, weight, size, *geometry, last), "conv3d_dgrad"
        report.count("replaced", name)
        rewriter.take_over(user, result)

