"""The backend of ``torch.compile(model, backend="triton_conv3d")``, and its passes for those who keep Inductor's own.

Dynamo's graph goes through AOTAutograd; its forward and backward graphs are rewritten by :mod:`.passes`, and an inner
backend runs the result. A graph that is not improved runs as with the inner backend alone, and so does one that the inner
backend cannot compile once it is improved, see :mod:`.second_try`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import fx

from .. import settings
from .norms import split_instance_norms
from .options import Options
from .report import Report, notice, reports
from .second_try import compile_or_leave

__all__ = ["Report", "backend", "inductor_pass", "reports"]

_CONVOLUTIONS = ("conv3d", "conv_transpose3d", "convolution", "_convolution")


def backend(
    gm: fx.GraphModule, example_inputs: Sequence, *, options: dict | None = None, mode: str | None = None
) -> Callable:
    """Compile one graph of Dynamo's.

    Args:
        options: see :class:`.options.Options`. mode: as torch.compile's, for Inductor.

    Raises:
        ValueError: an unknown option, a value it does not take, or a mode without Inductor.
    """
    chosen = Options.parse(options)
    if mode is not None and chosen.inner != "inductor":
        raise ValueError(f"mode={mode!r} is Inductor's, and the inner backend is {chosen.inner!r}")
    if chosen.autotune is not None:
        settings.configure(autotune=chosen.autotune)
    if not _has_convolution(gm):
        notice(  # not of each graph: a language model behind a patch embedding has one for every layer
            ("no convolution", chosen.inner),
            "no 3-D convolution in a graph of %d nodes: compiled by %s, unchanged, as others will be", len(gm.graph.nodes),
            chosen.inner,
        )  # fmt: skip
        return _unchanged(gm, example_inputs, chosen, mode)
    return compile_or_leave(
        gm,
        f"graph (its improved form fails in {chosen.inner})",
        improved=lambda: _improved(gm, example_inputs, chosen, mode),
        untouched=lambda: _unchanged(gm, example_inputs, chosen, mode),
    )


def inductor_pass(layout: bool = True, fuse: bool = True):
    """The graph passes, for ``torch.compile(model, options={"post_grad_custom_pre_pass": inductor_pass()})``.

    A pass ends before Inductor compiles what it made: if that fails, Inductor's error stands, where the backend would
    have the graph compiled as it was.

    Args:
        layout, fuse: see :class:`.options.Options`.
    """
    from .inductor import ConvolutionPass

    return ConvolutionPass(Options.parse({"layout": layout, "fuse": fuse}))


def _has_convolution(gm: fx.GraphModule) -> bool:
    """Whether some graph of the module may compute a 3-D convolution; a 2-D one counts where it cannot be told apart."""
    for module in gm.modules():
        for node in module.graph.nodes if isinstance(module, fx.GraphModule) else ():
            if node.op == "call_module" and isinstance(
                gm.get_submodule(node.target), (torch.nn.Conv3d, torch.nn.ConvTranspose3d)
            ):
                return True
            name = getattr(node.target, "_opname", None) or getattr(node.target, "__name__", "")
            if node.op == "call_function" and (
                name in _CONVOLUTIONS or getattr(node.target, "namespace", "") == "triton_conv3d"
            ):
                return True
    return False


def _improved(gm: fx.GraphModule, example_inputs: Sequence, options: Options, mode: str | None) -> Callable:
    if options.layout:
        split_instance_norms(gm)
    if options.inner == "inductor":
        from .inductor import compile_with_pass

        return compile_with_pass(gm, example_inputs, options, mode)
    from .eager import compile_op_by_op

    return compile_op_by_op(gm, example_inputs, options)


def _unchanged(gm: fx.GraphModule, example_inputs: Sequence, options: Options, mode: str | None) -> Callable:
    if options.inner == "inductor":
        from torch._inductor import list_mode_options
        from torch._inductor.compile_fx import compile_fx

        return compile_fx(gm, example_inputs, config_patches=list_mode_options(mode) if mode else None)
    return torch._dynamo.lookup_backend(options.inner)(gm, example_inputs)
