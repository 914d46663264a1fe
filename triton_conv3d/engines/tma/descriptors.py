"""Descriptors for the copy engine: worked out and checked once for all tensors of the same strides, and filled in at each call.

Triton checks a descriptor whenever one is made, and layers with strides need eight at a call.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from triton.tools.tensor_descriptor import TensorDescriptor

from ...problem import Problem
from ..base import format_strides
from .geometry import View


class _Nowhere:
    """What a descriptor has for a base until there is a tensor."""

    def __init__(self, dtype: torch.dtype):
        self.dtype = dtype

    def data_ptr(self) -> int:
        return 0


@dataclass(frozen=True)
class Described:
    """Triton's descriptor, or Gluon's, of tensors that it is given later; ``offset`` is where in their volume it begins."""

    descriptor: object
    offset: tuple[int, int, int] = (0, 0, 0)

    def with_(self, descriptor: object) -> Described:
        return Described(descriptor, self.offset)

    def of(self, tensor: torch.Tensor):
        """The descriptor of a tensor that has the type and the strides that it was made for, at a multiple of 16 bytes."""
        made = object.__new__(type(self.descriptor))
        d, h, w = self.offset
        made.__dict__.update(self.descriptor.__dict__, base=tensor[:, :, d:, h:, w:] if any(self.offset) else tensor)
        return made


def of_matrix(dtype: torch.dtype, shape: Sequence[int], strides: Sequence[int], block: Sequence[int]) -> Described:
    """Blocks of a tensor of this shape, whatever a tensor's own may be."""
    return Described(TensorDescriptor(_Nowhere(dtype), list(shape), list(strides), list(block)))


def of_view(
    problem: Problem, role: int, strides: tuple[int, ...], view: View, step: tuple[int, ...], block: tuple[int, ...]
) -> Described:
    """Blocks of (n, d, h, w, channel) of a view, every so many positions, of channels-last tensors of these strides.

    ``role``: 0 for the problem's input, 2 for the gradient of its output.
    """
    shape = problem.shapes[role]
    canonical = format_strides(shape, torch.channels_last_3d)
    n, d, h, w = (canonical[dim] if shape[dim] == 1 else strides[dim] for dim in (0, 2, 3, 4))
    step = [by if size > 1 else 1 for by, size in zip(step, view.size, strict=True)]  # or it may pass a stride's limit
    steps = (n, d * step[0], h * step[1], w * step[2], 1)
    whole = of_matrix(problem.torch_dtype, (shape[0], *view.size, shape[1]), steps, block)
    return Described(whole.descriptor, view.offset)


def of_whole(problem: Problem, role: int, strides: tuple[int, ...], block: tuple[int, ...]) -> Described:
    whole = View((0, 0, 0), problem.shapes[role][2:], (), (), ())
    return of_view(problem, role, strides, whole, (1, 1, 1), block)


def of_weight(problem: Problem, produced: int, reduced: int) -> Described:
    """Blocks of (tap, filter, channel) of dense weights, of so many that are produced, and reduced."""
    taps, filters, channels = problem.taps, problem.out_channels, problem.group_in
    block = (1, reduced, produced) if problem.pass_ == "dgrad" else (1, produced, reduced)
    return of_matrix(problem.torch_dtype, (taps, filters, channels), (channels, taps * channels, 1), block)
