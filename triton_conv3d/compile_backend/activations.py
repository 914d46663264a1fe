"""Activations in an aten graph, whole or in the parts that Inductor takes them apart into.

The patterns are traced from torch.nn.functional itself, with and without Inductor's decompositions, so that they are
those of the torch at hand.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import fx

from .rewriting import aten

_SLOPE = 0.123456789  # stands for any slope in a pattern
_ACTIVATIONS: dict[str, Callable] = {
    "relu": torch.relu,
    "leaky_relu": lambda x: F.leaky_relu(x, _SLOPE),
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "hardswish": F.hardswish,
}
_COMMUTATIVE = (aten.add.Tensor, aten.mul.Tensor)


@dataclass(frozen=True)
class Match:
    """An activation: its name, the slope of leaky_relu, and the node that holds its result."""

    name: str
    negative_slope: float
    end: fx.Node


def matches(graph: fx.Graph) -> tuple[dict[fx.Node, Match], dict[fx.Node, str]]:
    """Activations by the node that they apply to: (those where nobody else uses that node or what lies in between, the
    names of the others)."""
    found: dict[fx.Node, Match] = {}
    shared: dict[fx.Node, str] = {}
    for node in graph.nodes:
        value = node.meta.get("val")
        if node.op != "call_function" or not isinstance(value, torch.Tensor) or value.dim() != 5:
            continue
        for name, end in _patterns(value.dtype):
            if end.target is not node.target:
                continue
            bound: dict[fx.Node, fx.Node] = {}
            slopes: list[float] = []
            if not _same(node, end, bound, slopes):
                continue
            (source,) = (bound[p] for p in bound if p.op == "placeholder")
            inside = set(bound.values())
            if all(user in inside for n in inside - {node} for user in n.users):
                found[source] = Match(name, slopes[0] if slopes else 0.01, node)
            elif source not in shared or name != "sigmoid":  # sigmoid is a part of other patterns
                shared[source] = name
    return found, shared


@functools.cache
def _patterns(dtype: torch.dtype) -> list[tuple[str, fx.Node]]:
    """(name, the node of the result), for tensors of this type."""
    from torch._inductor.decomposition import select_decomp_table
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.utils._python_dispatch import _disable_current_modes

    if dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return []
    found = []
    with _disable_current_modes(), torch.no_grad(), torch._C._DisableAutocast():
        for name, function in _ACTIVATIONS.items():
            for table in ({}, select_decomp_table()):
                graph = make_fx(lambda x: function(x), decomposition_table=table)(
                    torch.ones(1, 2, 2, 2, 2, dtype=dtype)
                ).graph
                end = graph.output_node().args[0]
                if not any(_same(end, other, {}, []) for _, other in found):
                    found.append((name, end))
    return found


def _same(node, pattern, bound: dict, slopes: list) -> bool:
    """Whether a value computes what the pattern's computes; ``bound`` maps the pattern's nodes to the graph's."""
    if isinstance(pattern, fx.Node):
        if not isinstance(node, fx.Node):
            return False
        if pattern in bound:
            return bound[pattern] is node
        if pattern.op == "placeholder":
            bound[pattern] = node
            return True
        if node.target is not pattern.target or len(node.args) != len(pattern.args) or node.kwargs != pattern.kwargs:
            return False
        orders = [node.args]
        if pattern.target in _COMMUTATIVE and len(node.args) == 2:
            orders.append(node.args[::-1])
        for args in orders:
            trial, seen = dict(bound), list(slopes)
            if all(_same(a, b, trial, seen) for a, b in zip(args, pattern.args, strict=True)):
                bound.update(trial)
                bound[pattern] = node
                slopes[:] = seen
                return True
        return False
    if pattern == _SLOPE and type(node) in (int, float):
        slopes.append(float(node))
        return True
    return not isinstance(node, fx.Node) and node == pattern


