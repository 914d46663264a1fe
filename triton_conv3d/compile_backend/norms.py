"""Instance normalisation without its reshape.

torch computes it as a batch normalisation of (1, N * C, D, H, W), which no channels-last tensor can be viewed as. By the
input's own statistics it is a group normalisation of as many groups as channels, by the running ones a batch normalisation
of (N, C, D, H, W), and those need channels and pixels only.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import fx

from .report import failed

_FUNCTIONS = {  # in the order of their arguments
    F.instance_norm: "input running_mean running_var weight bias use_input_stats momentum eps",
    torch.instance_norm: "input weight bias running_mean running_var use_input_stats momentum eps cudnn_enabled",
}


def split_instance_norms(gm: fx.GraphModule) -> None:
    """In Dynamo's graphs, every 3-D instance normalisation is computed by :func:`_normalise`."""
    try:
        for module in gm.modules():
            for node in module.graph.nodes if isinstance(module, fx.GraphModule) else ():
                if node.target in _FUNCTIONS and _is_3d(node):
                    names = _FUNCTIONS[node.target].split()
                    node.kwargs = dict(zip(names, node.args, strict=False)) | node.kwargs
                    node.target, node.args = _normalise, ()
                    module.recompile()
    except Exception as error:  # each node by itself is a whole step
        failed("instance normalisation", error)


def _is_3d(node: fx.Node) -> bool:
    input = node.args[0] if node.args else node.kwargs["input"]
    input, result = (n.meta.get("example_value") for n in (input, node))
    return input is not None and result is not None and input.dim() == 5 and input.dtype == result.dtype


def _normalise(
    input, running_mean=None, running_var=None, weight=None, bias=None, use_input_stats=True, momentum=0.1, eps=1e-5,
    cudnn_enabled=True,
):  # fmt: skip
    if use_input_stats:
        batch, channels, *spatial = input.shape
        groups = batch, channels, math.prod(spatial), channels
        result = torch.native_group_norm(input, weight, bias, *groups, eps)[0]
        if running_mean is not None:
            _track(input.detach(), running_mean, running_var, momentum)
    else:
        result = F.batch_norm(input, running_mean, running_var, weight, bias, eps=eps)
    return result.contiguous()  # as torch's own; the layout pass takes it out again


def _track(input, running_mean, running_var, momentum: float) -> None:
    """The running statistics move towards those of the samples, averaged over the batch."""
    precise = torch.promote_types(input.dtype, torch.float32)
    for running, now in zip((running_var, running_mean), torch.var_mean(input.to(precise), (2, 3, 4)), strict=True):
        running.copy_((1 - momentum) * running + momentum * now.mean(0))
