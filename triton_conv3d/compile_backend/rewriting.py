"""Editing aten graphs: new nodes with their fake values, and questions about strides of any mixture of sizes."""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch
from torch import fx
from torch._guards import detect_fake_mode
from torch.fx.experimental.symbolic_shapes import statically_known_true

from .. import ops

aten, prims = torch.ops.aten, torch.ops.prims
FUSED, DGRAD, WGRAD = ops.conv3d_fused, ops.conv3d_dgrad, ops.conv3d_wgrad


def is_ours(node: fx.Node) -> bool:
    return node.op == "call_function" and node.target in (ops.conv3d, FUSED, DGRAD, WGRAD)


class Rewriter:
    """One graph under change. Every node that it makes or updates has the fake value torch gives it, strides included.

    Attributes:
        stale: nodes whose strides are others than those of the node they stand for, with its value: what follows them in
            the graph was traced with that one. torch's fake convolution on CPUs forgets that weights are channels-last.
    """

    def __init__(self, graph: fx.Graph):
        self.graph = graph
        values = [node.meta["val"] for node in graph.nodes if isinstance(node.meta.get("val"), torch.Tensor)]
        self.mode = detect_fake_mode(values)
        self.stale: dict[fx.Node, torch.Tensor] = {}

    def call(self, before: fx.Node, target, *args, **kwargs) -> fx.Node:
        """A new node in front of ``before``, whose place in the source it takes over."""
        with self.graph.inserting_before(before):
            node = self.graph.call_function(target, args, kwargs)
        for name in ("stack_trace", "partitioner_tag"):
            if name in before.meta:
                node.meta[name] = before.meta[name]
        self.update(node)
        return node

    def update(self, node: fx.Node) -> None:
        node.meta["val"] = self.value(node)

    def value(self, node: fx.Node):
        args, kwargs = _values(node)
        with torch.no_grad(), torch._C._DisableAutocast(), self.mode:
            return node.target(*args, **kwargs)

    def viewed(self, value: torch.Tensor, shape) -> torch.Tensor | None:
        """The tensor reshaped, if that takes no copy. ``shape``: numbers and nodes."""
        shape = fx.map_arg(shape, lambda n: n.meta["val"])
        with torch.no_grad(), self.mode:
            result = aten.reshape.default(value, shape)
        return result if torch._C._is_alias_of(result, value) else None

    def sizes(self, node: fx.Node, before: fx.Node) -> list:
        """The shape, as integers and nodes."""
        return [
            size if isinstance(size, int) else self.call(before, aten.sym_size.int, node, dim)
            for dim, size in enumerate(node.meta["val"].shape)
        ]

    def plus(self, before: fx.Node, a, b):
        """The sum of two integers, each a number or a node."""
        if a == 0 or b == 0:
            return b if a == 0 else a
        return self.call(before, operator.add, a, b) if isinstance(a, fx.Node) or isinstance(b, fx.Node) else a + b

    def take_over(self, node: fx.Node, result: fx.Node) -> None:
        """``result`` stands for ``node`` everywhere; what was there for ``node`` alone goes."""
        assumed, value = self.stale.pop(node, node.meta.get("val")), result.meta.get("val")
        if isinstance(assumed, torch.Tensor) and not same_strides(value, assumed.stride()):
            self.stale[result] = assumed
        node.replace_all_uses_with(result)
        unused = [node]
        while unused:
            node = unused.pop()
            if node.op == "call_function" and not node.users and not node.is_impure() and not node._erased:
                unused += node.all_input_nodes
                self.graph.erase_node(node)

    def finish(self) -> None:
        """Tell Inductor which strides the ops are to get, and check the graph."""
        for node in self.graph.nodes:
            if is_ours(node):
                node.meta["eager_input_vals"] = _values(node)
        self.graph.lint()


def _values(node: fx.Node) -> tuple:
    return fx.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])


def only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def is_view(node: fx.Node) -> bool:
    """Whether its result may be a view of its operand."""
    return getattr(node.target, "is_view", False) or node.target in (aten.reshape.default, operator.getitem)


def is_changed(node: fx.Node) -> bool:
    """Whether it is a graph input, or a view of one, that the graph changes in place."""
    while is_view(node):
        node = node.args[0]
    return any(user.target is aten.copy_.default and user.args[0] is node for user in node.users)


def same_strides(value: torch.Tensor, strides) -> bool:
    return all(
        statically_known_true(size == 1) or statically_known_true(a == b)
        for size, a, b in zip(value.shape, value.stride(), strides, strict=True)
    )


def is_channels_last(value: torch.Tensor) -> bool:
    """Dense in channels_last_3d, or channels_last; of one channel or one pixel, a contiguous tensor is that too."""
    return value.dim() in (4, 5) and is_dense(value, [0, *range(2, value.dim()), 1])


def is_contiguous(value: torch.Tensor) -> bool:
    return is_dense(value, range(value.dim()))


def is_last(value: torch.Tensor) -> bool:
    """A volume that is channels-last and nothing else."""
    return value.dim() == 5 and is_channels_last(value) and not is_contiguous(value)


def is_dense(value: torch.Tensor, order: Sequence[int]) -> bool:
    """Dense with its dimensions in that order, from the outermost in."""
    expected = 1
    for dim in reversed(order):
        size = value.shape[dim]
        if not (statically_known_true(size == 1) or statically_known_true(value.stride(dim) == expected)):
            return False
        expected = expected * size
    return True


def dense_order(value: torch.Tensor) -> list[int]:
    """Dimensions from the outermost in."""
    strides = [int(stride) if isinstance(stride, int) else stride.node.hint for stride in value.stride()]
    if None in strides:  # depends on data: of a dense tensor any sizes above 1 tell
        exprs = [stride if isinstance(stride, int) else stride.node.expr for stride in value.stride()]
        strides = [int(expr if isinstance(expr, int) else expr.subs(dict.fromkeys(expr.free_symbols, 2))) for expr in exprs]
    return sorted(range(value.dim()), key=lambda dim: (-strides[dim], dim))


def is_symbolic(graph: fx.Graph) -> bool:
    """Some size is not known before the call."""
    return any(
        isinstance(value, torch.SymInt)
        or (isinstance(value, torch.Tensor) and any(isinstance(size, torch.SymInt) for size in value.shape))
        for value in (node.meta.get("val") for node in graph.nodes if node.op == "placeholder")
    )
