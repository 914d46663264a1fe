"""Instance normalisation without its reshape.

torch computes it as a batch normalisation of (1, N * C, D, H, W), which no channels-last tensor can be viewed as. It is
a group normalisation of as many groups as channels, and that needs channels and pixels only.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import fx

from .report import failed


def split_instance_norms(gm: fx.GraphModule) -> None:
    """In Dynamo's graphs, every 3-D instance normalisation by the input's own statistics becomes a group normalisation."""
    try:
        for module in gm.modules():
            for node in module.graph.nodes if isinstance(module, fx.GraphModule) else ():
                if node.target in (F.instance_norm, torch.instance_norm) and _is_plain(node):
                    node.target = _normalise
                    module.recompile()
    except Exception as error:  # each node by itself is a whole step
        failed("instance normalisation", error)


_NAMES = ("input", "running_mean", "running_var", "weight", "bias", "use_input_stats", "momentum", "eps", "cudnn_enabled")


def _is_plain(node: fx.Node) -> bool:
    input, result = (n.meta.get("example_value") for n in (node.args[0], node)) if node.args else (None, None)
    if input is None or result is None or input.dim() != 5 or input.dtype != result.dtype:
        return False
    by_name = dict(zip(_NAMES, node.args, strict=False)) | dict(node.kwargs)
    return by_name.get("running_mean") is None and by_name.get("use_input_stats", True) is True


def _normalise(
    input, running_mean=None, running_var=None, weight=None, bias=None, use_input_stats=True, momentum=0.1, eps=1e-5,
    cudnn_enabled=True,
):  # fmt: skip
    batch, channels, *spatial = input.shape
    result = torch.native_group_norm(input, weight, bias, batch, channels, math.prod(spatial), channels, eps)[0]
    return result.contiguous()  # as torch's own; the layout pass takes it out again
