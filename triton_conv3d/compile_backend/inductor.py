"""The passes as Inductor calls them: on its graphs after AOTAutograd, before its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from torch import fx
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

from .. import ops
from .options import Options
from .passes import improve

_SOURCES = (*sorted(map(str, Path(__file__).parent.glob("*.py"))), ops.__file__)


class ConvolutionPass(CustomGraphPass):
    """A value of ``torch._inductor.config.post_grad_custom_pre_pass``.

    Args:
        earlier: passes to run first, such as the user's own.
    """

    def __init__(self, options: Options, earlier: tuple = ()):
        self.options, self.earlier = options, earlier

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
        improve(graph, self.options, kind, set(range(visible)))

    def uuid(self) -> object:
        """Inductor's caches tell graphs by it: the source of the passes and everything that they depend on."""
        earlier = [other.uuid() if isinstance(other, CustomGraphPass) else None for other in self.earlier]
        if None in earlier:  # a plain function: nothing tells two of them apart, so nothing is cached
            return None
        options = self.options.layout, self.options.fuse
        return get_hash_for_files(_SOURCES, repr((options, earlier)))


def compile_with_pass(gm: fx.GraphModule, example_inputs: Sequence, options: Options, mode: str | None) -> Callable:
    from torch._inductor import config, list_mode_options
    from torch._inductor.compile_fx import compile_fx

    earlier = config.post_grad_custom_pre_pass
    if earlier is None or isinstance(earlier, (list, tuple)):
        earlier = tuple(earlier or ())
    else:
        earlier = (earlier,)
    patches = {"post_grad_custom_pre_pass": ConvolutionPass(options, earlier)}
    return compile_fx(gm, example_inputs, config_patches={**(list_mode_options(mode) if mode else {}), **patches})
