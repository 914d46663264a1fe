"""What surrounds a convolution becomes part of it: zero padding, frozen arithmetic, bias, residual, activation."""

from __future__ import annotations

import math
import operator

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from .. import ops
from .activations import Match, matches
from .report import Report
from .rewriting import DGRAD, FUSED, WGRAD, Rewriter, aten, only_user, prims

_LOW = (torch.float16, torch.bfloat16)
_FLOATS = (*_LOW, torch.float32, torch.float64)


def fuse(rewriter: Rewriter, report: Report) -> None:
    _fold_padding(rewriter, report)
    for node in list(rewriter.graph.nodes):
        if node.target is ops.conv3d:
            _fold_arithmetic(rewriter, node, report)
    _fuse_epilogues(rewriter, report)


# Zero padding: the ops pad each end by itself.


def _fold_padding(rewriter: Rewriter, report: Report) -> None:
    for node in list(rewriter.graph.nodes):
        if node.target in (ops.conv3d, WGRAD):
            at = 0 if node.target is ops.conv3d else 1
            while (found := _padded(node.args[at]) or _joined_to_zeros(node.args[at])) is not None:
                inner, ends = found
                node.update_arg(at, inner)
                node.update_arg(4, _added(rewriter, node, node.args[4], ends))
                report.fused.append("padding")
        elif node.target is DGRAD and (crop := only_user(node)) is not None:
            found = _padded(crop, -1)
            if found is not None:
                grad, weight, size, stride, padding, *rest = node.args
                ends = found[1]
                size = [*size[:2], *_added(rewriter, crop, _added(rewriter, crop, size[2:], ends[::2]), ends[1::2])]
                ends = [rewriter.call(crop, operator.neg, end) if isinstance(end, fx.Node) else -end for end in ends]
                padding = _added(rewriter, crop, padding, ends)
                rewriter.take_over(crop, rewriter.call(crop, DGRAD, grad, weight, size, stride, padding, *rest))
                report.fused.append("padding")
    rewriter.graph.eliminate_dead_code()


def _padded(node: fx.Node, sign: int = 1) -> tuple[fx.Node, list] | None:
    """(what the node pads, (front, back, top, bottom, left, right)), with ``sign=-1`` where it crops; else None.

    The amounts are numbers and nodes, none of which may turn out to be of the other sign.
    """
    if node.target is not aten.constant_pad_nd.default or node.meta["val"].dim() != 5:
        return None
    ends, value = list(node.args[1]), node.args[2] if len(node.args) > 2 else node.kwargs.get("value", 0)
    numbers = [end.meta["val"] if isinstance(end, fx.Node) else end for end in ends]
    if value != 0 or not all(statically_known_true(number * sign >= 0) for number in numbers) or any(ends[6:]):
        return None
    width, height, depth = ((ends + [0] * 6)[i : i + 2] for i in (0, 2, 4))
    return node.args[0], depth + height + width


def _joined_to_zeros(node: fx.Node) -> tuple[fx.Node, list[int]] | None:
    """As :func:`_padded`, where one tensor is concatenated with zeros in depth, height or width."""
    if node.target is not aten.cat.default or node.meta["val"].dim() != 5:
        return None
    parts, dim = node.args[0], node.args[1] % 5 if len(node.args) > 1 else 0
    inner = [part for part in parts if not _is_zeros(part)]
    if dim < 2 or len(inner) != 1 or any(part.meta["val"].dim() != 5 for part in parts):  # torch.cat leaves out (0,)
        return None
    if inner[0].meta["val"].dtype != node.meta["val"].dtype:  # zeros of a wider type decide for both
        return None
    at = parts.index(inner[0])
    before, after = ([part.meta["val"].shape[dim] for part in zeros] for zeros in (parts[:at], parts[at + 1 :]))
    if not all(isinstance(size, int) for size in before + after):
        return None
    ends = [0] * 6
    ends[2 * (dim - 2)], ends[2 * (dim - 2) + 1] = sum(before), sum(after)
    return inner[0], ends


def _is_zeros(node: fx.Node) -> bool:
    if node.target in (aten.zeros.default, aten.new_zeros.default, aten.zeros_like.default):
        return True
    return node.target in (aten.full.default, aten.new_full.default, aten.full_like.default) and node.args[-1] == 0


def _added(rewriter: Rewriter, before: fx.Node, numbers, more) -> list:
    """Sums of each two, numbers and nodes."""
    return [rewriter.plus(before, a, b) for a, b in zip(numbers, more, strict=True)]


# Arithmetic with one number a channel: evaluation-mode BatchNorm, scales, shifts. It moves into weight and bias, which
# are small, and is computed there at every call in at least float32.


def _fold_arithmetic(rewriter: Rewriter, conv: fx.Node, report: Report) -> None:
    dtype, steps, node, last = conv.meta["val"].dtype, [], conv, None
    while (user := only_user(node)) is not None:
        step = _read(user, node)
        if step is None:
            break
        steps.append(step)
        node = only_user(user) if step[0] == "batch norm" else user
        if node is None:
            break
        if node.meta["val"].dtype == dtype:
            last = node, len(steps)
    if last is None or all(kind == "cast" for kind, *_ in steps[: last[1]]):
        return
    end, count = last
    input, weight, bias, *geometry = conv.args
    channels = _Channels(rewriter, end, weight.meta["val"].shape[0], dtype)
    scale, shift = channels.folded(steps[:count], bias)
    if scale is not None:
        weight = channels.scaled(weight, scale)
    folded = rewriter.call(end, ops.conv3d, input, weight, shift, *geometry)
    rewriter.take_over(end, folded)
    report.fused.append("scale" if scale is not None else "shift")


def _read(user: fx.Node, node: fx.Node) -> tuple | None:
    """What a node does to its operand: ("cast",), (name, operand) or ("batch norm", ...); None for anything else."""
    target, args = user.target, user.args
    if target is prims.convert_element_type.default or (target is aten._to_copy.default and set(user.kwargs) <= {"dtype"}):
        return ("cast",) if user.meta["val"].dtype in _FLOATS else None  # others drop more than roundoff
    if target is aten._native_batch_norm_legit_no_training.default and args[0] is node:
        first = only_user(user)
        return ("batch norm", *args[1:5], args[6]) if first is not None and first.args[1] == 0 else None
    if target not in _ARITHMETIC or user.kwargs or len(args) != 2:
        return None
    name = _ARITHMETIC[target]
    other = args[1] if args[0] is node else args[0]
    if other is node or (args[0] is not node and name in ("sub", "div")) or not _is_per_channel(other, node):
        return None
    if not isinstance(other, fx.Node) and (name == "div" and other == 0 or name == "mul" and not math.isfinite(other)):
        return None  # of a sum they make infinity, of its terms NaN
    return name, other


_ARITHMETIC = {aten.mul.Tensor: "mul", aten.add.Tensor: "add", aten.sub.Tensor: "sub", aten.div.Tensor: "div"}


def _is_per_channel(operand, node: fx.Node) -> bool:
    if isinstance(operand, (int, float)):
        return True
    value = operand.meta.get("val") if isinstance(operand, fx.Node) else None
    if not isinstance(value, torch.Tensor) or not value.is_floating_point():
        return False
    shape = (1,) * (5 - value.dim()) + tuple(value.shape)
    channels = node.meta["val"].shape[1]
    return value.device == node.meta["val"].device and shape[1] in (1, channels) and shape[:1] + shape[2:] == (1,) * 4


class _Channels:
    """Arithmetic on vectors of one number a channel, as nodes in front of ``before``."""

    def __init__(self, rewriter: Rewriter, before: fx.Node, count: int, dtype: torch.dtype):
        self.rewriter, self.before, self.count, self.dtype = rewriter, before, count, dtype

    def call(self, target, *args) -> fx.Node:
        return self.rewriter.call(self.before, target, *args)

    def vector(self, operand):
        """In float32 where the convolution is in less."""
        if not isinstance(operand, fx.Node):
            return operand
        operand = self.call(aten.reshape.default, operand, [-1])
        return self.cast(operand, torch.float32) if operand.meta["val"].dtype in _LOW else operand

    def cast(self, operand: fx.Node, dtype: torch.dtype) -> fx.Node:
        same = operand.meta["val"].dtype == dtype
        return operand if same else self.call(prims.convert_element_type.default, operand, dtype)

    def folded(self, steps: list[tuple], bias: fx.Node | None) -> tuple[fx.Node | float | None, fx.Node | None]:
        """(scale, shift), each None where there is nothing of it."""
        scale, shift = None, None if bias is None else self.vector(bias)
        for kind, *operands in steps:
            if kind == "cast":
                continue
            if kind == "batch norm":
                factor, offset = self.batch_norm(*operands)
                shift = offset if shift is None else self.plus(self.times(shift, factor), offset)
                scale = factor if scale is None else self.times(scale, factor)
                continue
            operand = self.vector(operands[0])
            if kind == "div":
                operand = self.call(aten.reciprocal.default, operand) if isinstance(operand, fx.Node) else 1 / operand
            if kind in ("mul", "div"):
                scale = operand if scale is None else self.times(scale, operand)
                shift = None if shift is None else self.times(shift, operand)
            else:
                if kind == "sub":
                    operand = self.call(aten.neg.default, operand) if isinstance(operand, fx.Node) else -operand
                shift = operand if shift is None else self.plus(shift, operand)
        return scale, None if shift is None else self.bias(shift)

    def batch_norm(self, weight, bias, mean, variance, epsilon) -> tuple:
        weight, bias, mean, variance = map(self.vector, (weight, bias, mean, variance))
        factor = self.call(aten.rsqrt.default, self.call(aten.add.Tensor, variance, epsilon))
        factor = factor if weight is None else self.times(factor, weight)
        offset = self.call(aten.neg.default, self.times(mean, factor))
        return factor, offset if bias is None else self.plus(offset, bias)

    def times(self, a, b):
        return self.both(aten.mul.Tensor, operator.mul, a, b)

    def plus(self, a, b):
        return self.both(aten.add.Tensor, operator.add, a, b)

    def both(self, target, plain, a, b):
        if isinstance(a, fx.Node) or isinstance(b, fx.Node):
            return self.call(target, a, b) if isinstance(a, fx.Node) else self.call(target, b, a)
        return plain(a, b)

    def bias(self, shift) -> fx.Node:
        device = self.before.meta["val"].device
        if not isinstance(shift, fx.Node):
            return self.rewriter.call(
                self.before, aten.full.default, [self.count], float(shift), dtype=self.dtype, device=device
            )
        if shift.meta["val"].shape[0] != self.count:
            shift = self.call(aten.expand.default, shift, [self.count])
        return self.cast(shift, self.dtype)

    def scaled(self, weight: fx.Node, scale) -> fx.Node:
        if isinstance(scale, fx.Node):
            scale = self.call(aten.reshape.default, scale, [-1, 1, 1, 1, 1])
        if self.dtype in _LOW:
            weight = self.cast(weight, torch.float32)
        return self.cast(self.call(aten.mul.Tensor, weight, scale), self.dtype)


# The epilogue: residual, then activation.


def _fuse_epilogues(rewriter: Rewriter, report: Report) -> None:
    found, shared = matches(rewriter.graph)
    for node in list(rewriter.graph.nodes):
        if node.target is not ops.conv3d:
            continue
        add = only_user(node)
        residual = None if add is None else _residual(add, node)
        end = node if residual is None else add
        match = found.get(end)
        if end in shared and match is None:
            report.left.append(f"{node.name}: {shared[end]} not fused, for what it is applied to is used elsewhere too")
        if match is None and residual is None:
            continue
        match = match or Match("none", 0.0, end)
        result = rewriter.call(
            match.end, FUSED, *node.args[:3], residual, *node.args[3:], match.name, match.negative_slope
        )
        if result.meta["val"].dtype != match.end.meta["val"].dtype:
            raise NotImplementedError(f"{match.name} changes the type of {node.name}")
        parts = ["bias"] * (node.args[2] is not None) + ["residual"] * (residual is not None)
        report.fused.append(" + ".join(parts + [match.name] * (match.name != "none")))
        rewriter.take_over(match.end, result)


def _residual(add: fx.Node, conv: fx.Node) -> fx.Node | None:
    """The other operand of an addition, if it has the convolution's shape, dtype and device."""
    if add.target is not aten.add.Tensor or add.kwargs or len(add.args) != 2:
        return None
    other = add.args[1] if add.args[0] is conv else add.args[0]
    if not isinstance(other, fx.Node) or other is conv or not isinstance(other.meta.get("val"), torch.Tensor):
        return None
    a, b = other.meta["val"], conv.meta["val"]
    return other if a.shape == b.shape and a.dtype == b.dtype and a.device == b.device else None
