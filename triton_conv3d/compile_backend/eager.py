"""AOTAutograd's graphs, rewritten and run op by op."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import fx
from torch._guards import TracingContext

from .options import Options
from .passes import improve
from .rewriting import aten

# torch's kernels for GPUs want a contiguous tensor, or return one; in parts, as Inductor sees them too, they follow any
# strides.
_DECOMPOSED = (aten.native_group_norm, aten.native_group_norm_backward, aten.masked_fill, aten.replication_pad3d)


def compile_op_by_op(gm: fx.GraphModule, example_inputs: Sequence, options: Options) -> Callable:
    from torch._decomp import get_decompositions
    from torch._dynamo.backends.common import aot_autograd
    from torch._dynamo.backends.debugging import boxed_nop
    from torch._functorch.partitioners import default_partition, min_cut_rematerialization_partition

    def compiler(kind: str) -> Callable:
        def compile(graph_module: fx.GraphModule, inputs: Sequence) -> Callable:
            _rewrite(graph_module, inputs, options, kind)
            return boxed_nop(graph_module, inputs)

        return compile

    return aot_autograd(
        fw_compiler=compiler("forward"),
        bw_compiler=compiler("backward"),
        inference_compiler=compiler("inference"),
        decompositions=get_decompositions(_DECOMPOSED),
        partition_fn=default_partition if options.inner == "eager" else min_cut_rematerialization_partition,
        keep_inference_input_mutations=True,
    )(gm, example_inputs)


def _rewrite(gm: fx.GraphModule, inputs: Sequence, options: Options, kind: str) -> None:
    for node in gm.graph.nodes:  # what is kept for backward may not be viewed as it could when the graph was traced
        if node.target is aten.view.default:
            node.target = aten.reshape.default
    context = TracingContext.try_get()
    outputs = len(gm.graph.output_node().args[0])
    visible = context.fw_metadata.num_forward if kind == "forward" else outputs
    report = improve(gm.graph, options, kind, set(range(visible)), inputs)
    gm.recompile()
    if report is not None and kind == "forward" and context.output_strides is not None:
        context.output_strides.extend(map(_strides, gm.graph.output_node().args[0]))


def _strides(output: object) -> tuple | None:
    """Symbolic ones too: AOTAutograd lays the inputs of the backward graph out by them."""
    value = output.meta.get("val") if isinstance(output, fx.Node) else None
    return tuple(value.stride()) if isinstance(value, torch.Tensor) else None
