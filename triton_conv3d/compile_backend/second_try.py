"""What the inner backend cannot compile with our passes it compiles without them."""

from __future__ import annotations

import copy
from collections.abc import Callable

from torch import fx
from torch._dynamo.exc import RestartAnalysis, SkipFrame

from .report import collected, failed, remember


def compile_or_leave(gm: fx.GraphModule, what: str, improved: Callable, untouched: Callable) -> object:
    """What ``improved()`` compiles ``gm`` to; if that fails, what ``untouched()`` makes of ``gm`` as it was, and a warning.

    Args:
        what: the graph, for the warning.

    Raises:
        Exception: what ``untouched`` raises: the inner backend's own error, which is then no matter for a warning.
    """
    graphs = {module: _copy(module.graph) for module in gm.modules() if isinstance(module, fx.GraphModule)}
    try:
        with collected() as reports:
            code = improved()
        remember(reports)
        return code
    except (RestartAnalysis, SkipFrame):  # no failures: they tell Dynamo how to go on
        raise
    except Exception as error:
        first = error
    for module, graph in graphs.items():
        module.graph = graph
    code = untouched()
    failed(what, first)
    return code


def _copy(graph: fx.Graph) -> fx.Graph:
    """With what AOTAutograd wants to know of the inputs of Dynamo's graphs."""
    double = copy.deepcopy(graph)
    for node, same in zip(graph.find_nodes(op="placeholder"), double.find_nodes(op="placeholder"), strict=True):
        if hasattr(node, "_dynamo_source"):
            same._dynamo_source = node._dynamo_source
    return double
