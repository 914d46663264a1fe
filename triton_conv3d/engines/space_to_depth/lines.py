"""Copies of volumes with longer lines and wider pixels, which have zeros, or what taps along H read, in what is new."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ...problem import INT32_BYTES
from ..launching import launch_kernel, same_options

_COPIED = 2048  # elements of a program


@triton.jit
def gather_lines(
    x_ptr,
    copy_ptr,  # (n, d, line, pixel, channel), dense
    size,  # (h, w) of x
    strides,  # (n, c, d, h, w) of x
    channels,  # of x
    taps,
    first,  # (h, w) of x that the first tap of the first pixel reads
    step,  # from a line of the copy to the next, in lines of x
    dilation,  # from a tap to the next
    depth,
    lines,
    width,
    pixels,  # of the whole copy
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,  # pixels of a program
    COLUMNS: tl.constexpr,  # CHANNELS, or more
    INDEX: tl.constexpr,
):
    """copy[n, d, i, p, (t, c)] = x[n, c, d, i * step + t * dilation + first_h, p + first_w], 0 outside and behind the taps."""
    pixel = tl.program_id(0).to(INDEX) * BLOCK + tl.arange(0, BLOCK)
    column = tl.arange(0, COLUMNS)
    row = pixel // width
    w = (pixel % width).to(tl.int32) + first[1]
    plane = row // lines
    h = (row % lines).to(tl.int32) * step + first[0]
    h = h[:, None] + (column // channels * dilation)[None, :]
    in_copy = (pixel < pixels)[:, None] & (column < CHANNELS)[None, :]
    inside = ((w >= 0) & (w < size[1]))[:, None] & (h >= 0) & (h < size[0]) & (column < taps * channels)[None, :]
    at = (plane // depth).to(INDEX) * strides[0] + (plane % depth).to(INDEX) * strides[2] + w.to(INDEX) * strides[4]
    at = at[:, None] + h.to(INDEX) * strides[3] + (column % channels).to(INDEX)[None, :] * strides[1]
    value = tl.load(x_ptr + at, mask=in_copy & inside, other=0.0)
    tl.store(copy_ptr + pixel[:, None] * CHANNELS + column[None, :], value, mask=in_copy)


class Taps(NamedTuple):
    """Along H: how many, what the first reads for the first line, lines from a line of the copy to the next, and from a tap to
    the next."""

    count: int = 1
    first: int = 0
    step: int = 1
    dilation: int = 1


ONE_TAP = Taps()


def gathered(
    tensor: torch.Tensor, size: tuple[int, int, int], first: int = 0, taps: Taps = ONE_TAP, rows: int = 0, index64: bool = False
) -> torch.Tensor:
    """(N, D, lines, pixels, channels), dense, of a tensor (N, channels, D, H, W) with any strides.

    Args:
        size: lines, pixels and channels of the copy. first: along W, what its first pixel is.
        rows: of the copy; those beyond N are zeros.
        index64: offsets of the tensor need 64 bits.
    """
    batch, channels, depth, *source = tensor.shape
    lines, width, columns = size
    copy = tensor.new_empty((max(rows, batch), depth, *size))
    if rows > batch:
        copy[batch:] = 0
    pixels, rounded = batch * depth * lines * width, triton.next_power_of_2(columns)
    block = max(1, _COPIED // rounded)
    large = index64 or copy.numel() * copy.element_size() > INT32_BYTES
    index = tl.int64 if large else tl.int32
    options = same_options(CHANNELS=columns, BLOCK=block, COLUMNS=rounded, INDEX=index, num_warps=4)
    of_x = (tuple(source), tensor.stride(), channels, taps.count, (taps.first, first), taps.step, taps.dilation)
    launch_kernel(gather_lines, (-(-pixels // block), 1), (tensor, copy, *of_x, depth, lines, width, pixels), options)
    return copy
