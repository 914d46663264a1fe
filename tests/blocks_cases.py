"""Strided input gradients at every edge of their blocks, and every kind of product."""

from __future__ import annotations

from cases import Case

from triton_conv3d.engines.blocks import blocks_of
from triton_conv3d.problem import Problem

TENSOR_CORES = (("float16", "ieee"), ("bfloat16", "ieee"), ("float32", "tf32"), ("float32", "tf32x3"))
KINDS = (*TENSOR_CORES, ("float32", "ieee"))

# Sizes that strides do not divide, fewer taps than the stride, positions that no tap meets, padding beyond the kernel.
GEOMETRIES = {
    "even": dict(input_size=(4, 6, 8), stride=(2, 2, 2), padding=(1,) * 6),
    "odd": dict(input_size=(5, 4, 7), stride=(2, 1, 3), padding=(1, 0, 1, 1, 2, 0)),
    "shifted": dict(input_size=(3, 8, 9), kernel_size=(1, 4, 5), stride=(1, 2, 3), padding=(0, 0, 1, 1, 1, 2)),
    "few_taps": dict(input_size=(4, 7, 9), kernel_size=(2, 1, 3), stride=(2, 3, 2), padding=(0, 1, 2, 1, 0, 0)),
    "beyond": dict(input_size=(2, 3, 4), kernel_size=(3, 2, 2), stride=(3, 2, 1), padding=(4, 4, 3, 5, 2, 3)),
    "unmet": dict(input_size=(6, 8, 7), kernel_size=(1, 2, 2), stride=(3, 3, 2)),
    "dilated": dict(input_size=(7, 6, 5), stride=(1, 2, 1), dilation=(3, 1, 2), padding=(2, 3, 1, 1, 2, 1)),
}


def case(name: str, **more) -> Case:
    usual = dict(pass_="dgrad", batch=2, in_channels=3, out_channels=16, dtype="float16")
    return Case(**{**usual, **GEOMETRIES[name], **more})


def zeros_met(problem: Problem, which: int, where: tuple[int, ...]) -> tuple:
    """Of the result, what a NaN of the weight (``which`` 0) or of the gradient may touch beside its footprint: its own
    channel, or all positions of the blocks that meet its pixel."""
    if which == 0:
        return slice(None), where[1]
    of = blocks_of(problem)
    sides = zip(where[2:], of.low, of.taps, problem.dilation, problem.stride, of.before, strict=True)
    ends = [((o - low) * s - b, (o - low + (taps - 1) * d + 1) * s - b) for o, low, taps, d, s, b in sides]
    return where[0], slice(None), *(slice(max(0, begin), max(0, end)) for begin, end in ends)
