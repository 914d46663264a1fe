"""The blocks of a strided dgrad: stride[0] * stride[1] * stride[2] positions of the result, which meet the same few pixels.

Position j * stride + a - before of dx, of parity class a, meets pixel j + low - e of the gradient through tap
e * stride + a - front of the weight, for every e of ``taps`` for which there is one; where the stride is 1, pixel
j + low - e * dilation.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

from ..problem import Problem, Triple


@dataclass(frozen=True)
class Blocks:
    """
    taps: pixels that a block meets, in each dimension.
    count: blocks that have every position of the result. low: pixels before the first block that it reaches back from.
    front: zeros before the weight, so that the stride divides its taps.
    before: positions of the first blocks before the result. last: of the last blocks, before its end.
    """

    taps: Triple
    count: Triple
    low: Triple
    front: Triple
    before: Triple
    last: Triple


def unblocked(problem: Problem) -> str | None:
    """Why the input of a problem has no such blocks; None if it has."""
    if problem.stride == (1, 1, 1):
        return "stride 1: there is one parity class"
    sides = zip(problem.kernel_size, problem.stride, problem.dilation, strict=True)
    if any(min(side) > 1 for side in sides):
        return f"dilation {problem.dilation} beside stride {problem.stride}: a block would meet more pixels than taps"
    return None


@functools.lru_cache(maxsize=4096)
def blocks_of(problem: Problem) -> Blocks:
    """Position i meets output o through tap t where i + pad - t * dilation = o * stride.

    Blocks begin where a block meets the fewest outputs, ceil(taps / stride): where pad + i - taps is a multiple of stride.
    """
    taps, count, low, front, before, last = [], [], [], [], [], []
    for size, kernel, stride, pad in zip(
        problem.input_size, problem.kernel_size, problem.stride, problem.padding[::2], strict=True
    ):
        shift, met = (pad - kernel) % stride, -(-kernel // stride)
        taps.append(met)
        count.append(-(-(size + shift) // stride))
        low.append((pad - shift + stride - 1) // stride)
        front.append(met * stride - kernel)
        before.append(shift)
        last.append(size + shift - (count[-1] - 1) * stride)
    return Blocks(*map(tuple, (taps, count, low, front, before, last)))


def columns(problem: Problem) -> int:
    """Parity classes x channels of one group that are computed."""
    return math.prod(problem.stride) * problem.group_in
