"""Rules of ``torch.func.vmap``: the mapped dimension of a convolution becomes a part of another one, and one call does all.

The three passes read two of input x (N, C, ...), weight w (K, C / groups, ...) and output y (N, K, ...), and give the
third. The tensor that is the same for the whole batch decides where the batch goes:

    w           into N          the same filters on more samples
    x           into K          more filters on the same input
    y           into C          more channels to the same output
    none        into groups     independent convolutions
"""

from __future__ import annotations

import torch
from torch import Tensor

# (axis, whether groups stand before the batch there) by the tensor and by the one that is shared
_PLACES = {
    ("x", "w"): (0, False),
    ("y", "w"): (0, False),
    ("y", "x"): (1, True),
    ("w", "x"): (0, True),
    ("x", "y"): (1, True),
    ("w", "y"): (1, False),
    ("x", None): (1, False),
    ("y", None): (1, False),
    ("w", None): (0, False),
}


def _fold(tensor: Tensor, dim: int, place: tuple[int, bool], groups: int) -> Tensor:
    """The batch at ``dim`` moved into the axis of ``place``, which stands in the shape without the batch."""
    axis, grouped = place
    tensor = tensor.movedim(dim, 0)
    if not grouped:
        return tensor.movedim(0, axis).flatten(axis, axis + 1)
    return _split(tensor, axis + 1, groups).movedim(0, axis + 1).flatten(axis, axis + 2)


def _unfold(tensor: Tensor, batch: int, place: tuple[int, bool], groups: int) -> Tensor:
    """The reverse of :func:`_fold`, with the batch first."""
    axis, grouped = place
    if not grouped:
        return _split(tensor, axis, batch).movedim(axis, 0)
    return _split(_split(tensor, axis, groups), axis + 1, batch).movedim(axis + 1, 0).flatten(axis + 1, axis + 2)


def _split(tensor: Tensor, axis: int, parts: int) -> Tensor:
    return tensor.unflatten(axis, (parts, tensor.shape[axis] // parts))


def _folded(batch: int, roles: str, tensors, dims, groups: int):
    """The two tensors folded, the groups of the call, and the place of the batch in the result.

    Args:
        roles: what the two tensors and the result are, as ``"xwy"``.
        tensors, dims: with the dimension of the batch, None in a tensor that has none.
    """
    shared = next((role for role, dim in zip(roles, dims, strict=False) if dim is None), None)
    folded = [
        tensor if dim is None else _fold(tensor, dim, _PLACES[role, shared], groups)
        for role, tensor, dim in zip(roles, tensors, dims, strict=False)
    ]
    return folded, groups if shared else groups * batch, _PLACES[roles[2], shared]


def conv3d_rule(conv3d):
    """Of ``conv3d(input, weight, bias, stride, padding, dilation, groups)``."""

    def rule(info, dims, input, weight, bias, *geometry):
        batch, (*geometry, groups) = info.batch_size, geometry
        sums_batch = dims[0] is not None or dims[1] is not None
        inside = bias if dims[1] is None and dims[2] is None else None  # one bias for all that the call computes
        if sums_batch:
            (x, w), together, place = _folded(batch, "xwy", (input, weight), dims[:2], groups)
            result = _unfold(conv3d(x, w, inside, *geometry, together), batch, place, groups)
        else:
            result = conv3d(input, weight, inside, *geometry, groups)
        if inside is not bias:
            bias = bias if dims[2] is None else bias.movedim(dims[2], 0)[:, None]
            result = result + bias[..., None, None, None]
        return result, 0

    return rule


def gradient_rule(op, roles: str):
    """Of ``conv3d_dgrad`` (roles ``"ywx"``) or ``conv3d_wgrad`` (``"yxw"``)."""

    def rule(info, dims, first, second, size, *geometry):
        *geometry, groups, channels_last = geometry
        tensors, together, place = _folded(info.batch_size, roles, (first, second), dims[:2], groups)
        size = list(size)
        size[place[0]] *= info.batch_size
        result = op(*tensors, size, *geometry, together, channels_last)
        return _unfold(result, info.batch_size, place, groups), 0

    return rule


def fused_rule(conv3d, conv3d_fused, activate):
    """Of ``conv3d_fused``: one call where input and residual are mapped, else a convolution and what follows it."""
    convolve = conv3d_rule(conv3d)

    def rule(info, dims, input, weight, bias, residual, *rest):
        *geometry, activation, negative_slope = rest
        batch, residual_dim = info.batch_size, dims[3]
        if residual is not None:
            residual = residual.movedim(residual_dim, 0) if residual_dim is not None else residual[None]
        if dims[0] is not None and dims[1] is None and dims[2] is None:
            more = None if residual is None else residual.expand(batch, *residual.shape[1:]).flatten(0, 1)
            samples = _fold(input, dims[0], (0, False), 1)
            result = conv3d_fused(samples, weight, bias, more, *geometry, activation, negative_slope)
            return _split(result, 0, batch), 0
        if all(dim is None for dim in dims[:3]):
            result = conv3d(input, weight, bias, *geometry)[None]
        else:
            result, _ = convolve(info, dims[:3], input, weight, bias, *geometry)
        return activate(result if residual is None else result + residual, activation, negative_slope), 0

    return rule


def register(library: torch.library.Library, rules: dict) -> None:
    """Make these the rules of the ops; nothing of a call outside of vmap changes."""
    for op, rule in rules.items():
        torch.library.register_vmap(op.name().removesuffix(".default"), rule, lib=library)
