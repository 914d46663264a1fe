"""The two kernels of engine "rounded".

    rounded_copy   y[p, c] = x rounded to tf32, or 0 in the padding, as pixels of channels or as channels of pixels
    rounded_wgrad  dw[k, t, c] = sum over positions p of  grad[k, p] * x[c, p + shift of tap t]

A volume of dense pixels is a row for each channel: (tap of w, n, d, phase of h, h, w), zeros for the padding included. Of x
there is one copy for each tap along w, whose lines hold what this tap meets at each position of a line of grad: a copy
engine's blocks begin at multiples of 16 bytes, so that a tap along w cannot be a shift. Lines of x are in phases of the
stride along h. So all taps of a copy are shifts by whole lines and planes.
"""

import triton
import triton.language as tl

from ..implicit_gemm.kernels import round_tf32


@triton.jit
def rounded_copy(
    x_ptr,
    y_ptr,
    positions,  # of y, in all
    channels,
    x_size,  # (d, h, w)
    x_strides,  # (n, d, h, w) in X_UNIT
    x_channel,  # elements from one channel of x to the next
    volumes,  # n of y, for each tap along w
    planes,  # of one n of y
    plane,  # positions of a plane of y
    lines,  # (h, w) of one phase
    stride,  # (h, w)
    dilation,  # of w
    pad,  # (d, h, w)
    y_position,  # elements from one position of y to the next, and from one channel to the next
    y_channel,
    X_UNIT: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    at, d, n = p % plane, p // plane % planes - pad[0], p // plane // planes
    phase, tap = at // (lines[0] * lines[1]), n // volumes
    n = n % volumes
    h = at // lines[1] % lines[0] * stride[0] + phase - pad[1]
    w = at % lines[1] * stride[1] + tap * dilation - pad[2]
    inside = (d >= 0) & (d < x_size[0]) & (h >= 0) & (h < x_size[1]) & (w >= 0) & (w < x_size[2])
    in_y = (c < channels)[:, None] & (p < positions)[None, :]
    x_pixels = n.to(INDEX) * x_strides[0] + d.to(INDEX) * x_strides[1] + h.to(INDEX) * x_strides[2] + w.to(INDEX) * x_strides[3]
    if X_UNIT > 1:
        x_pixels *= X_UNIT
    else:  # unless channels do, positions run along neighbouring threads; Triton 3.6 would choose the first dimension
        x_pixels = tl.multiple_of(tl.max_contiguous(x_pixels, 2), 1)
    x_tile = c.to(INDEX)[:, None] * x_channel + x_pixels[None, :]
    value = tl.load(x_ptr + x_tile, mask=in_y & inside[None, :], other=0.0)
    y_tile = p.to(INDEX)[None, :] * y_position + c.to(INDEX)[:, None] * y_channel
    tl.store(y_ptr + y_tile, round_tf32(value), mask=in_y)


@triton.jit
def _chain(grad, x, k, c, begin, end, walk, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """The sum of these steps, which walk along the planes of grad one after another."""
    steps, planes, stride, x_planes, x_plane, shift = walk
    at = begin % steps * BLOCK_K
    d = begin // steps % planes
    n = begin // steps // planes
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for step in range(begin, end):
        of_grad = grad.load([k, step * BLOCK_K])
        of_x = x.load([c, (n * x_planes + d * stride) * x_plane + shift + at])
        acc = tl.dot(of_grad, of_x.T, acc, input_precision="tf32")
        at += BLOCK_K
        over = at == steps * BLOCK_K
        at = tl.where(over, 0, at)
        d += over.to(tl.int32)
        over = d == planes
        d = tl.where(over, 0, d)
        n += over.to(tl.int32)
    return acc


@triton.jit
def rounded_wgrad(
    dw_ptr,
    grad,  # descriptor of (filter, position)
    x,  # descriptor of (channel, position)
    filters,
    channels,
    steps,  # of a plane of grad
    planes,  # (n, d) of grad
    x_planes,  # of one n of x
    x_plane,  # positions of a plane of x
    lines,  # (h, w) of one phase of x
    kernel,  # (d, h, w), as every triple
    stride,
    dilation,
    dw_strides,  # (k, tap, c) in elements
    split_stride,
    splits,
    CHAIN: tl.constexpr,  # steps of one accumulator before they are added to the total; 0: all
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    tiles_m, tiles_n = tl.cdiv(filters, BLOCK_M), tl.cdiv(channels, BLOCK_N)
    taps = kernel[0] * kernel[1] * kernel[2]
    program = tl.program_id(0)
    k = program % tiles_m * BLOCK_M
    c = program // tiles_m % tiles_n * BLOCK_N
    tap = program // (tiles_m * tiles_n) % taps
    split = program // (tiles_m * tiles_n * taps)
    tap_d = tap // (kernel[2] * kernel[1]) * dilation[0]
    tap_h = tap // kernel[2] % kernel[1] * dilation[1]
    shift = (tap % kernel[2] * planes[0] * x_planes + tap_d) * x_plane
    shift += (tap_h % stride[1] * lines[0] + tap_h // stride[1]) * lines[1]

    all_steps = planes[0] * planes[1] * steps
    share = tl.cdiv(all_steps, splits)
    begin = split * share
    end = tl.minimum(begin + share, all_steps)
    walk = steps, planes[1], stride[0], x_planes, x_plane, shift
    if CHAIN == 0:
        total = _chain(grad, x, k, c, begin, end, walk, BLOCK_M, BLOCK_N, BLOCK_K)
    else:
        total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for first in range(begin, end, CHAIN):
            total += _chain(grad, x, k, c, first, tl.minimum(first + CHAIN, end), walk, BLOCK_M, BLOCK_N, BLOCK_K)

    filter, channel = k + tl.arange(0, BLOCK_M), c + tl.arange(0, BLOCK_N)
    inside = (filter < filters)[:, None] & (channel < channels)[None, :]
    dw_tile = filter[:, None] * dw_strides[0] + tap * dw_strides[1] + channel[None, :] * dw_strides[2]
    tl.store(dw_ptr + split.to(tl.int64) * split_stride + dw_tile, total, mask=inside)
