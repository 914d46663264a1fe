"""The passes as Inductor calls them: on its graphs after AOTAutograd, before its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import fx
from torch._guards import TracingContext
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

from .. import ops
from .options import Options
from .passes import improve
from .rewriting import is_symbolic
from .second_try import compile_or_leave

_SOURCES = (*sorted(map(str, Path(__file__).parent.glob("*.py"))), ops.__file__)


class ConvolutionPass(CustomGraphPass):
    """A value of ``torch._inductor.config.post_grad_custom_pre_pass``.

    Args:
        earlier: passes to run first, such as the user's own.
        symbolic: the backward graph gets to know strides of symbolic sizes, see :func:`compile_with_pass`.
    """

    def __init__(self, options: Options, earlier: tuple = (), symbolic: bool = False):
        self.options, self.earlier, self.symbolic = options, earlier, symbolic

    def __call__(self, graph: fx.Graph) -> None:
        for other in self.earlier:
            other(graph)
        outputs = graph.output_node()
        count = len(outputs.args[0])
        visible = 1 + max(outputs.meta.get("user_visible_output_idxs", range(count)), default=count - 1)
        if any(node.op == "placeholder" and node.name.startswith("tangents") for node in graph.nodes):
            kind, visible = "backward", count
        else:
            kind = "forward" if visible < count else "inference"
        free = kind != "forward" or self.symbolic or not is_symbolic(graph)
        improve(graph, self.options, kind, set(range(visible)), free=free)

    def uuid(self) -> object:
        """Inductor's caches tell graphs by it: the source of the passes and everything that they depend on."""
        earlier = [other.uuid() if isinstance(other, CustomGraphPass) else None for other in self.earlier]
        if None in earlier:  # a plain function: nothing tells two of them apart, so nothing is cached
            return None
        options = self.options.layout, self.options.fuse, self.symbolic
        return get_hash_for_files(_SOURCES, repr((options, earlier)))


def compile_with_pass(gm: fx.GraphModule, example_inputs: Sequence, options: Options, mode: str | None) -> Callable:
    from torch._inductor import config, list_mode_options
    from torch._inductor.compile_fx import compile_fx, compile_fx_inner

    theirs = config.post_grad_custom_pre_pass
    earlier = tuple(theirs or ()) if theirs is None or isinstance(theirs, (list, tuple)) else (theirs,)

    def improved(graph_module: fx.GraphModule, inputs: Sequence, **further) -> object:
        code = compile_fx_inner(graph_module, inputs, **further)
        _tell_symbolic_strides(code, inputs)
        return code

    def inner_compile(graph_module: fx.GraphModule, inputs: Sequence, **further) -> object:
        if not further.get("is_backward"):  # the second try is the whole graph's, by whom this one is called
            return improved(graph_module, inputs, **further)

        # Compiled at the first backward pass, when the forward graph is in use already. Nothing is to find the result in
        # a cache in place of an improved graph.
        @config.patch(post_grad_custom_pre_pass=theirs, fx_graph_cache=False, fx_graph_remote_cache=False)
        def untouched() -> object:
            return compile_fx_inner(graph_module, inputs, **further)

        what = "backward graph (its improved form fails in inductor)"
        return compile_or_leave(graph_module, what, lambda: improved(graph_module, inputs, **further), untouched)

    patches = {"post_grad_custom_pre_pass": ConvolutionPass(options, earlier, symbolic=True)}
    patches = {**(list_mode_options(mode) if mode else {}), **patches}
    return compile_fx(gm, example_inputs, inner_compile=inner_compile, config_patches=patches)


def _tell_symbolic_strides(code: object, inputs: Sequence) -> None:
    """Inductor evaluates the strides of a forward graph's outputs for the sizes at hand before it tells AOTAutograd, which
    would make both graphs for these sizes only."""
    context = TracingContext.try_get()
    shape_env = next((size.node.shape_env for size in inputs if isinstance(size, torch.SymInt)), None)
    strides = getattr(code, "output_strides", None)
    if shape_env is None or strides is None or context is None or not context.output_strides:
        return
    context.output_strides[:] = [
        None if each is None else tuple(shape_env.deserialize_symexpr(stride) for stride in each) for each in strides
    ]
