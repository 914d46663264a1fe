"""Ops that return contiguous tensors whatever they read, computed with channels as the last dimension.

Their results are channels-last then, without a second copy. Channels are dimension 1 of tensors of four dimensions (of
frames) and more.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from .rewriting import Rewriter, aten, dense_order, is_changed, is_channels_last, is_contiguous, is_ours, only_user

VIEWS = (aten.view.default, aten._unsafe_view.default, aten.reshape.default)
_GATHERS = (aten.index.Tensor, aten._unsafe_index.Tensor)
_SCATTERS = (aten.index_put.default, aten._unsafe_index_put.default)
_PARTS = (aten.slice_backward.default, aten.select_backward.default)
_JOINED = (aten.cat.default, aten.stack.default)
_COPIES = (aten.clone.default, aten.alias.default)
_FILLED = {aten.new_zeros.default: 1, aten.full.default: 0, aten.zeros.default: 0}  # where their sizes stand


def moved(rewriter: Rewriter, node: fx.Node) -> fx.Node | None:
    """What stands for the node; None where nothing is gained."""
    for targets, rule in (
        (_GATHERS, _gather), (_SCATTERS, _scatter), (_PARTS, _part), (VIEWS, _reshape), (_JOINED, _join),
        ((aten.repeat.default,), _repeat),
    ):  # fmt: skip
        if node.target in targets:
            return rule(rewriter, node)
    return None


def filled(rewriter: Rewriter, source: fx.Node, before: fx.Node) -> fx.Node | None:
    """What a node makes that fills a new tensor with a number, in channels-last."""
    if source.target not in _FILLED:
        return None
    order = channels_behind(source.meta["val"].dim())
    at, arguments = _FILLED[source.target], list(source.args)
    arguments[at] = [arguments[at][dim] for dim in order]
    result = rewriter.call(before, source.target, *arguments, **source.kwargs)
    return moved_back(rewriter, before, result, order)


def _gather(rewriter: Rewriter, node: fx.Node) -> fx.Node | None:
    """Interpolation, and padding by what is at the border."""
    tensor, indices = node.args[:2]
    dims = tensor.meta["val"].dim()
    if not _are_pixels(indices) or node.meta["val"].dim() != dims or not _is_inside(tensor):
        return None
    result = rewriter.call(
        node, node.target, _permuted(rewriter, node, tensor, channels_behind(dims)), [None, *indices[2:]]
    )
    return moved_back(rewriter, node, result, channels_behind(dims))


def _scatter(rewriter: Rewriter, node: fx.Node) -> fx.Node | None:
    """The gradient of a gather, which goes into zeros made for it."""
    zeros, indices, values, *accumulate = node.args
    dims = values.meta["val"].dim()
    if not _are_pixels(indices) or zeros.meta["val"].dim() != dims or not _is_inside(values):
        return None
    into = filled(rewriter, zeros, node)
    if into is None:
        return None
    operands = (_permuted(rewriter, node, each, channels_behind(dims)) for each in (into, values))
    into, values = operands
    result = rewriter.call(node, node.target, into, [None, *indices[2:]], values, *accumulate)
    return moved_back(rewriter, node, result, channels_behind(dims))


def _part(rewriter: Rewriter, node: fx.Node) -> fx.Node | None:
    """The gradient of a slice, or of one plane, which goes into zeros, too."""
    grad, sizes, dim, *ends = node.args
    if len(sizes) != 5:
        return None
    order = channels_behind(5)
    kept = [each for each in order if node.target is aten.slice_backward.default or each != dim % 5]
    inner, value = [sorted(kept).index(each) for each in kept], grad.meta["val"]
    if kept[-1] != 1 or not statically_known_true(value.stride(inner[-1]) == 1) or is_contiguous(value):
        return None
    grad, sizes = _permuted(rewriter, node, grad, inner), [sizes[each] for each in order]
    return moved_back(rewriter, node, rewriter.call(node, node.target, grad, sizes, order.index(dim % 5), *ends), order)


def _repeat(rewriter: Rewriter, node: fx.Node) -> fx.Node | None:
    tensor, repeats = node.args
    dims = len(repeats)
    if tensor.meta["val"].dim() != dims or not _is_inside(tensor) or not _leads_to_convolution(node):
        return None
    order = channels_behind(dims)
    result = rewriter.call(node, node.target, _permuted(rewriter, node, tensor, order), [repeats[dim] for dim in order])
    return moved_back(rewriter, node, result, order)


def _join(rewriter: Rewriter, node: fx.Node) -> fx.Node | None:
    """Concatenation of tensors that torch knows no memory format of."""
    tensors, dim = node.args[0], node.args[1] if len(node.args) > 1 else 0
    dims = node.meta["val"].dim()
    if dims < 6 or not all(_is_inside(tensor) for tensor in tensors) or not _leads_to_convolution(node):
        return None
    if node.target is aten.stack.default:
        tensors = [rewriter.call(node, aten.unsqueeze.default, tensor, dim) for tensor in tensors]
    order = dense_order(tensors[0].meta["val"])
    tensors = [_permuted(rewriter, node, tensor, order) for tensor in tensors]
    return moved_back(rewriter, node, rewriter.call(node, aten.cat.default, tensors, order.index(dim % dims)), order)


def _reshape(rewriter: Rewriter, node: fx.Node) -> fx.Node | None:
    """One that has to copy, such as that of a pixel shuffle; or a view of which torch and its fake kernels disagree."""
    source, sizes, shape = *node.args, node.meta["val"].shape
    if len(shape) not in (4, 5):
        return None
    while only_user(source) is not None and source.target in (*VIEWS, *_COPIES):  # one copy does for all of them
        source = source.args[0]
    groups, view = _groups(source.meta["val"].shape, shape), rewriter.viewed(source.meta["val"], sizes)
    if groups is None or is_changed(source):
        return None
    if view is None:
        gain = len(shape) == 5 and _leads_to_convolution(node)
    else:  # of strides of dimensions of size 1, by which torch tells memory formats
        gain = is_channels_last(view) and not is_contiguous(view) and any(statically_known_true(n == 1) for n in shape)
    if not gain:
        return None
    order = channels_behind(len(shape))
    source = _permuted(rewriter, node, source, [dim for each in order for dim in groups[each]])
    result = rewriter.call(node, aten.reshape.default, source, [sizes[dim] for dim in order])
    return moved_back(rewriter, node, result, order)


def _groups(before: Sequence, after: Sequence) -> list[list[int]] | None:
    """For each dimension of a reshaped tensor those that it is made of, if it is made of whole ones."""
    groups, at = [], 0
    for size in after:
        group: list[int] = []
        while at < len(before) and not statically_known_true(math.prod(before[dim] for dim in group) == size):
            group.append(at)
            at += 1
        if not statically_known_true(math.prod(before[dim] for dim in group) == size):
            return None
        groups.append(group)
    groups[-1] += range(at, len(before))
    return groups if all(statically_known_true(size == 1) for size in before[at:]) else None


def _leads_to_convolution(node: fx.Node) -> bool:
    """Whether a convolution reads its dimension 1 as channels, behind ops that keep dimensions apart."""
    seen, stack = set(), [(node, 1)]
    while stack:
        source, dim = stack.pop()
        for user in source.users:
            if is_ours(user):
                if dim == 1:
                    return True
                continue
            value = user.meta.get("val")
            if not isinstance(value, torch.Tensor):
                continue
            if user.target is aten.permute.default:
                at = [each % value.dim() for each in user.args[1]].index(dim)
            elif user.target is aten.transpose.int:
                pair = [each % value.dim() for each in user.args[1:]]
                at = pair[1 - pair.index(dim)] if dim in pair else dim
            elif user.target in VIEWS or user.target is aten.unsqueeze.default:
                at = _where(source.meta["val"].shape, dim, value.shape)
            else:
                at = dim if value.dim() == source.meta["val"].dim() else None
            if at is not None and (user, at) not in seen:
                seen.add((user, at))
                stack.append((user, at))
    return False


def _where(before: Sequence, dim: int, after: Sequence) -> int | None:
    """The dimension of a view that is this dimension of what it views."""
    outside = math.prod(before[:dim])
    for at, size in enumerate(after):
        if statically_known_true(size == before[dim]) and statically_known_true(math.prod(after[:at]) == outside):
            return at
    return None


def _are_pixels(indices: Sequence) -> bool:
    """Of neighbouring dimensions behind the channels; of others the result has dimensions of its own in front."""
    given = [dim for dim, index in enumerate(indices) if index is not None]
    return given[0] > 1 and given == list(range(given[0], given[-1] + 1))


def _is_inside(node: fx.Node) -> bool:
    """Whether channels are the innermost dimension."""
    value = node.meta["val"]
    return value.dim() > 3 and statically_known_true(value.stride(1) == 1) and not is_contiguous(value)


def channels_behind(dims: int) -> list[int]:
    """The dimensions, channels moved behind the others."""
    return [0, *range(2, dims), 1]


def _permuted(rewriter: Rewriter, before: fx.Node, node: fx.Node, order: list[int]) -> fx.Node:
    return rewriter.call(before, aten.permute.default, node, order)


def moved_back(rewriter: Rewriter, before: fx.Node, result: fx.Node, order: list[int]) -> fx.Node:
    """Its dimensions where they were."""
    return _permuted(rewriter, before, result, [order.index(dim) for dim in range(len(order))])
