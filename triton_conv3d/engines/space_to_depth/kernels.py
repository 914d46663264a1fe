"""The kernel of engine "space_to_depth", which copies what its windows lie in; the products are another engine's."""

import triton
import triton.language as tl


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
