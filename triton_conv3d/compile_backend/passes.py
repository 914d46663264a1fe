"""All passes over one graph, tried on a copy first: a graph that a pass fails on stays as it is."""

from __future__ import annotations

import copy
from collections.abc import Sequence

from torch import fx

from . import convolutions, fusion, layout
from .options import Options
from .report import Report, failed, keep
from .rewriting import Rewriter, is_ours


def improve(
    graph: fx.Graph, options: Options, kind: str, visible: set[int], inputs: Sequence | None = None, free: bool = True
) -> Report | None:
    """Rewrite an aten graph of AOTAutograd in place.

    Args:
        kind: ``inference``, ``forward`` or ``backward``.
        visible: indices of the outputs whose strides are part of the graph's contract.
        inputs: fake values of what the graph will be called with, if they may differ from those it was traced with.
        free: what is kept for backward may have other strides; else the layout stays as it is.

    Returns:
        What was done; None if nothing was, because there is no 3-D convolution or because a pass failed.
    """
    try:
        trial = copy.deepcopy(graph)
        trial.owning_module = graph.owning_module
        report = _run(trial, options, kind, visible, inputs, free)
        if report is not None:
            report = _run(graph, options, kind, visible, inputs, free)
            report.nodes = str(graph)
            keep(report)
        return report
    except Exception as error:  # whatever it is, the graph is still whole
        failed(f"{kind} graph", error)
        return None


def _run(
    graph: fx.Graph, options: Options, kind: str, visible: set[int], inputs: Sequence | None, free: bool
) -> Report | None:
    report = Report(kind)
    report.found = sum(map(is_ours, graph.nodes))
    rewriter = Rewriter(graph)
    convolutions.replace(rewriter, report)
    if not any(is_ours(node) for node in graph.nodes):
        return report if report.left else None
    if options.fuse:
        fusion.fuse(rewriter, report)
    if options.layout and not free:
        report.left.append("layout: what is kept for backward needs fixed strides where sizes are symbolic")
    if free and (options.layout or rewriter.stale):
        layout.channels_last(rewriter, report, visible, inputs, convert=options.layout)
    rewriter.finish()
    return report

