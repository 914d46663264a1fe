"""The two kernels of bricks. The copy engine (TMA) fetches every operand, and fills with zeros what lies outside.

    gather_bricks  y[j, q] = sum over views v, taps t and channels r of  x_v[j * scale + start_v + t * step, r] * w[q, r, t]
                   forward as it stands; dgrad with the gradient as x and the channels' roles exchanged
    wgrad_bricks   dw[k, t, c] = sum over output pixels p of  grad[p, k] * x_v[p * scale + start_v + t * step, c]

A brick is a block of (n, d, h, w) pixels, all sizes powers of two. A descriptor has no steps between elements, so what a
stride meets is split into views, one for each position modulo the stride (geometry.py). The pixels are the right operand
of every product, filters the left one: so both are read from shared memory, where the copies put them.
"""

import triton
import triton.language as tl

from ..epilogue import finished
from ..implicit_gemm.kernels import dot, parity_class, rounded


@triton.jit
def _digits(index, sizes):
    """Index -> (n, d, h, w), w fastest."""
    w = index % sizes[3]
    h = index // sizes[3] % sizes[2]
    d = index // (sizes[3] * sizes[2]) % sizes[1]
    return index // (sizes[3] * sizes[2] * sizes[1]), d, h, w


@triton.jit
def _next_digit(digit, carry, size):
    """One digit of a number that is counted up, and the carry to the next."""
    over = (digit + carry == size).to(tl.int32)
    return tl.where(digit + carry == size, 0, digit + carry), over


@triton.jit
def gather_bricks(
    y_ptr,
    bias_ptr,
    w,  # descriptor of (tap, filter, channel)
    x0,  # descriptors of (n, d, h, w, channel), one for each view
    x1,
    x2,
    x3,
    x4,
    x5,
    x6,
    x7,
    views,  # of each: taps, the first of them, start; each (d, h, w), as every triple
    scale,
    step,
    tap_step,  # from one tap of a view to the next
    kernel,
    y_size,  # (n, d, h, w)
    bricks,  # (n, d, h, w), of the largest parity class
    stride,  # of a strided dgrad, and
    dilation,
    y_strides,  # (n, d, h, w) in Y_UNIT, q in elements
    split_stride,  # elements from one split's partial sums to the next
    reduced,  # channels of one group that are summed over
    produced,  # channels of one group that are computed, in Y_UNIT
    splits,
    residual_ptr,  # None, or with the strides of y
    slope,
    VIEWS: tl.constexpr,
    DGRAD: tl.constexpr,
    STRIDED: tl.constexpr,
    BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    Y_UNIT: tl.constexpr,
    INDEX: tl.constexpr,
    UPCAST: tl.constexpr,
    BRICK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    BLOCK_M: tl.constexpr = BRICK[0] * BRICK[1] * BRICK[2] * BRICK[3]
    produced = produced * Y_UNIT
    tiles_n = tl.cdiv(produced, BLOCK_N)
    program = tl.program_id(0)
    tile_n = program % tiles_n  # neighbours in time read the same bricks, then their neighbours
    program //= tiles_n
    all_bricks = bricks[0] * bricks[1] * bricks[2] * bricks[3]
    brick_n, brick_d, brick_h, brick_w = _digits(program % all_bricks, bricks)
    split = program // all_bricks % splits
    group = program // (all_bricks * splits)
    n = brick_n * BRICK[0]
    d = brick_d * BRICK[1]
    h = brick_h * BRICK[2]
    w_ = brick_w * BRICK[3]
    q = tile_n * BLOCK_N
    rows_d, rows_h, rows_w = y_size[1], y_size[2], y_size[3]
    if STRIDED:
        index_w = tl.program_id(1) % stride[2]
        index_h = tl.program_id(1) // stride[2] % stride[1]
        index_d = tl.program_id(1) // (stride[2] * stride[1])

    blocks = tl.cdiv(reduced, BLOCK_K)
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for view in tl.static_range(VIEWS):
        x = (x0, x1, x2, x3, x4, x5, x6, x7)[view]
        taps_d, taps_h, taps_w = views[view][0]
        first_d, first_h, first_w = views[view][1]
        start_d, start_h, start_w = views[view][2]
        if STRIDED:
            taps_d, first_d, start_d, rows_d = parity_class(
                index_d, start_d, y_size[1], kernel[0], stride[0], dilation[0], tap_step[0]
            )
            taps_h, first_h, start_h, rows_h = parity_class(
                index_h, start_h, y_size[2], kernel[1], stride[1], dilation[1], tap_step[1]
            )
            taps_w, first_w, start_w, rows_w = parity_class(
                index_w, start_w, y_size[3], kernel[2], stride[2], dilation[2], tap_step[2]
            )
        x_d = d * scale[0] + start_d
        x_h = h * scale[1] + start_h
        x_w = w_ * scale[2] + start_w

        # One flat loop over taps and channel blocks; this split takes the part [begin, end) of it.
        steps = taps_d * taps_h * taps_w * blocks
        share = tl.cdiv(steps, splits)
        begin = split * share
        end = tl.minimum(begin + share, steps)
        block = begin % blocks
        tap = begin // blocks
        tw = tap % tl.maximum(taps_w, 1)
        th = tap // tl.maximum(taps_w, 1) % tl.maximum(taps_h, 1)
        td = tap // tl.maximum(taps_h * taps_w, 1)
        for _ in range(begin, end):
            r = block * BLOCK_K
            w_tap = (first_d + td * tap_step[0]) * kernel[1] + first_h + th * tap_step[1]
            w_tap = w_tap * kernel[2] + first_w + tw * tap_step[2]
            brick = x.load([n, x_d + td * step[0], x_h + th * step[1], x_w + tw * step[2], group * reduced + r])
            if DGRAD:
                filters = w.load([w_tap, group * reduced + r, q]).reshape(BLOCK_K, BLOCK_N).T
            else:
                filters = w.load([w_tap, group * produced + q, r]).reshape(BLOCK_N, BLOCK_K)
            acc = dot(filters, brick.reshape(BLOCK_M, BLOCK_K).T, acc, "ieee", UPCAST)
            block, carry = _next_digit(block, 1, blocks)
            tw, carry = _next_digit(tw, carry, taps_w)
            th, carry = _next_digit(th, carry, taps_h)
            td += carry

    channel = q + tl.arange(0, BLOCK_N)
    in_q = channel < produced
    if BIAS:
        acc += tl.load(bias_ptr + group * produced + channel, mask=in_q, other=0.0).to(tl.float32)[:, None]
    in_n, in_d, in_h, in_w = _digits(tl.arange(0, BLOCK_M), BRICK)
    in_n += n
    in_d += d
    in_h += h
    in_w += w_
    inside = (in_n < y_size[0]) & (in_d < rows_d) & (in_h < rows_h) & (in_w < rows_w)
    if STRIDED:
        in_d = in_d * stride[0] + index_d
        in_h = in_h * stride[1] + index_h
        in_w = in_w * stride[2] + index_w
    y_pixels = in_n.to(INDEX) * y_strides[0] + in_d.to(INDEX) * y_strides[1]
    y_pixels = (y_pixels + in_h.to(INDEX) * y_strides[2] + in_w.to(INDEX) * y_strides[3]) * Y_UNIT
    y_channels = (group * produced + channel).to(INDEX) * y_strides[4]
    y_tile = y_channels[:, None] + y_pixels[None, :]
    in_y = in_q[:, None] & inside[None, :]
    acc = finished(acc, residual_ptr, y_tile, in_y, ACTIVATION, slope)
    y_tile = y_ptr + split.to(INDEX) * split_stride + y_tile
    tl.store(y_tile, rounded(acc, y_ptr.dtype.element_ty, UPCAST), mask=in_y)


@triton.jit
def wgrad_bricks(
    dw_ptr,
    grad,  # descriptor of (n, d, h, w, filter)
    x,  # descriptor of (n, d, h, w, channel) of one view
    taps,  # of the view, (d, h, w), as every triple
    first,
    start,
    scale,
    step,
    tap_step,
    kernel,
    bricks,  # (n, d, h, w)
    dw_strides,  # (k, tap, c) in elements
    split_stride,
    group_in,  # channels of one group
    group_out,
    splits,
    INDEX: tl.constexpr,
    UPCAST: tl.constexpr,
    CHAIN: tl.constexpr,  # products of one accumulator before they are added to the total
    BRICK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    BLOCK_K: tl.constexpr = BRICK[0] * BRICK[1] * BRICK[2] * BRICK[3]
    tiles_m = tl.cdiv(group_out, BLOCK_M)
    tiles_n = tl.cdiv(group_in, BLOCK_N)
    program = tl.program_id(0)
    k = program % tiles_m * BLOCK_M
    c = program // tiles_m % tiles_n * BLOCK_N
    tap = program // (tiles_m * tiles_n)
    tw = tap % taps[2]
    th = tap // taps[2] % taps[1]
    td = tap // (taps[2] * taps[1]) % taps[0]
    split = tap // (taps[2] * taps[1] * taps[0]) % splits
    group = tap // (taps[2] * taps[1] * taps[0] * splits)
    x_d = start[0] + td * step[0]
    x_h = start[1] + th * step[1]
    x_w = start[2] + tw * step[2]

    filters = group * group_out + k
    channels = group * group_in + c
    all_bricks = bricks[0] * bricks[1] * bricks[2] * bricks[3]
    share = tl.cdiv(all_bricks, splits)
    begin = split * share
    end = tl.minimum(begin + share, all_bricks)
    n, d, h, w = _digits(begin, bricks)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for chain in range(begin, end, CHAIN // BLOCK_K):
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for _ in range(chain, tl.minimum(chain + CHAIN // BLOCK_K, end)):
            at_n, at_d, at_h, at_w = n * BRICK[0], d * BRICK[1], h * BRICK[2], w * BRICK[3]
            left = grad.load([at_n, at_d, at_h, at_w, filters])
            right = x.load([at_n, at_d * scale[0] + x_d, at_h * scale[1] + x_h, at_w * scale[2] + x_w, channels])
            acc = dot(left.reshape(BLOCK_K, BLOCK_M).T, right.reshape(BLOCK_K, BLOCK_N), acc, "ieee", UPCAST)
            w, carry = _next_digit(w, 1, bricks[3])
            h, carry = _next_digit(h, carry, bricks[2])
            d, carry = _next_digit(d, carry, bricks[1])
            n += carry
        total += acc

    filter = k + tl.arange(0, BLOCK_M)
    channel = c + tl.arange(0, BLOCK_N)
    w_tap = (first[0] + td * tap_step[0]) * kernel[1] + first[1] + th * tap_step[1]
    w_tap = w_tap * kernel[2] + first[2] + tw * tap_step[2]
    rows = (group * group_out + filter).to(INDEX) * dw_strides[0]
    columns = w_tap.to(INDEX) * dw_strides[1] + channel.to(INDEX) * dw_strides[2]
    dw_tile = dw_ptr + split.to(INDEX) * split_stride + (rows[:, None] + columns[None, :])
    inside = (filter < group_out)[:, None] & (channel < group_in)[None, :]
    tl.store(dw_tile, rounded(total, dw_ptr.dtype.element_ty, UPCAST), mask=inside)
