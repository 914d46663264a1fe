"""The two kernels of bricks. The copy engine (TMA) fetches every operand, and fills with zeros what lies outside.

    gather_bricks  y[j, q] = sum over views v, taps t and channels r of  x_v[j * scale + start_v + t * step, r] * w[q, r, t]
                   forward as it stands; dgrad with the gradient as x and the channels' roles exchanged; along depth
                   over those taps alone through which some pixel of the brick meets x_v
    wgrad_bricks   dw[k, t, c] = sum over output pixels p of  grad[p, k] * x_v[p * scale + start_v + t * step, c]

A brick is a block of (n, d, h, w) pixels, all sizes powers of two. A descriptor has no steps between elements, so what a
stride meets is split into views, one for each position modulo the stride (geometry.py). The pixels are the right operand
of every product, filters the left one: so both are read from shared memory, where the copies put them. wgrad has pixels on
both sides; a row, or a gradient that is read as a matrix, can be on the left in shared memory, any other brick goes through
registers there.
"""

import triton
import triton.language as tl

from ..epilogue import finished
from ..implicit_gemm.kernels import dot, rounded
from ..implicit_gemm.taps import class_at, live_taps, parity_class


@triton.jit
def _digits(index, sizes):
    """Index -> (n, d, h, w), w fastest."""
    w = index % sizes[3]
    h = index // sizes[3] % sizes[2]
    d = index // (sizes[3] * sizes[2]) % sizes[1]
    return index // (sizes[3] * sizes[2] * sizes[1]), d, h, w


@triton.jit
def _next(at, first, last, carry, by):
    """One coordinate of a walk through a box: a step further if the one before it is through, from ``last`` to ``first``."""
    at += tl.where(carry, by, 0)
    through = at == last
    return tl.where(through, first, at), through


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
    views,  # of each: taps, the first of them, start, size; each (d, h, w), as every triple
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
    SKIPS: tl.constexpr,  # views, or parity classes, leave out taps: tap_step is not 1 everywhere
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
        index_d, index_h, index_w = class_at(tl.program_id(1), stride)

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
        # Taps along depth that only read padding, for the whole brick, are left out.
        last_d = tl.minimum(d + BRICK[1], rows_d) - 1
        lo, hi = live_taps(d, last_d, scale[0], start_d, step[0], views[view][3][0], taps_d)
        taps_d = hi - lo
        first_d += lo * tap_step[0]
        x_d = d * scale[0] + start_d + lo * step[0]
        x_h = h * scale[1] + start_h
        x_w = w_ * scale[2] + start_w

        # One flat loop over taps and channel blocks; this split takes the part [begin, end) of it.
        steps = taps_d * taps_h * taps_w * blocks
        share = tl.cdiv(steps, splits)
        begin = split * share
        end = tl.minimum(begin + share, steps)
        tap = begin // blocks
        tw = tap % tl.maximum(taps_w, 1)
        th = tap // tl.maximum(taps_w, 1) % tl.maximum(taps_h, 1)
        td = tap // tl.maximum(taps_h * taps_w, 1)
        w_tap = (first_d + td * tap_step[0]) * kernel[1] + first_h + th * tap_step[1]
        w_tap = w_tap * kernel[2] + first_w + tw * tap_step[2]
        # The coordinates are carried from step to step, each by an addition: r, then those of the tap along w, h and d.
        r = begin % blocks * BLOCK_K
        at_d, at_h, at_w = x_d + td * step[0], x_h + th * step[1], x_w + tw * step[2]
        end_h, end_w = x_h + taps_h * step[1], x_w + taps_w * step[2]
        back_w = tap_step[2] * (taps_w - 1)  # of the weight's taps, from the last of a line to the first of the next,
        next_line = tap_step[1] * kernel[2] - back_w  # and of a plane
        next_plane = (tap_step[0] * kernel[1] - tap_step[1] * (taps_h - 1)) * kernel[2] - back_w
        for _ in range(begin, end):
            brick = x.load([n, at_d, at_h, at_w, group * reduced + r])
            if DGRAD:
                filters = w.load([w_tap, group * reduced + r, q]).reshape(BLOCK_K, BLOCK_N).T
            else:
                filters = w.load([w_tap, group * produced + q, r]).reshape(BLOCK_N, BLOCK_K)
            acc = dot(filters, brick.reshape(BLOCK_M, BLOCK_K).T, acc, "ieee", UPCAST)
            r += BLOCK_K
            over = r >= reduced
            r = tl.where(over, 0, r)
            w_by = tl.where(over, tap_step[2], 0)
            at_w, over = _next(at_w, x_w, end_w, over, step[2])
            if SKIPS:
                w_by = tl.where(over, next_line, w_by)
            at_h, over = _next(at_h, x_h, end_h, over, step[1])
            if SKIPS:
                w_by = tl.where(over, next_plane, w_by)
            w_tap += w_by
            at_d += tl.where(over, step[0], 0)

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
    grad,  # descriptor of (n, d, h, w, filter), or of (pixel, filter)
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
    FLAT: tl.constexpr,  # the gradient is a matrix of pixels and filters
    WAITS: tl.constexpr,  # on sm_90 products read it in registers, which the next step must not fill before they are done
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
    end_d, end_h, end_w = bricks[1] * BRICK[1], bricks[2] * BRICK[2], bricks[3] * BRICK[3]
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for chain in range(begin, end, CHAIN // BLOCK_K):
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        # Decoded for each chain anew: what the pipelined loop hands on costs a selection in each of its steps.
        n, d, h, w = _digits(chain, bricks)
        n, d, h, w = n * BRICK[0], d * BRICK[1], h * BRICK[2], w * BRICK[3]
        pixel = chain * BLOCK_K
        for at in range(chain, tl.minimum(chain + CHAIN // BLOCK_K, end)):
            if FLAT:
                of_grad = grad.load([pixel, filters])
                pixel += BLOCK_K
            else:
                of_grad = grad.load([n, d, h, w, filters]).reshape(BLOCK_K, BLOCK_M)
            of_x = x.load([n, d * scale[0] + x_d, h * scale[1] + x_h, w * scale[2] + x_w, channels])
            of_x = of_x.reshape(BLOCK_K, BLOCK_N)
            acc = dot(of_grad.T, of_x, acc, "ieee", UPCAST)
            if WAITS:  # always true: what is read here is waited for, as Triton 3.6.0 does for nothing less
                acc = tl.where(at < end, acc, 0.0)
            w, over = _next(w, 0, end_w, True, BRICK[3])
            h, over = _next(h, 0, end_h, over, BRICK[2])
            d, over = _next(d, 0, end_d, over, BRICK[1])
            n += tl.where(over, BRICK[0], 0)
        total += acc

    filter = k + tl.arange(0, BLOCK_M)
    channel = c + tl.arange(0, BLOCK_N)
    w_tap = (first[0] + td * tap_step[0]) * kernel[1] + first[1] + th * tap_step[1]
    w_tap = w_tap * kernel[2] + first[2] + tw * tap_step[2]
    rows = (filters + tl.arange(0, BLOCK_M)).to(INDEX) * dw_strides[0]
    columns = w_tap.to(INDEX) * dw_strides[1] + channel.to(INDEX) * dw_strides[2]
    in_k, in_c = filter < group_out, channel < group_in
    dw_tile = dw_ptr + split.to(INDEX) * split_stride + (rows[:, None] + columns[None, :])
    inside = in_k[:, None] & in_c[None, :]
    tl.store(dw_tile, rounded(total, dw_ptr.dtype.element_ty, UPCAST), mask=inside)
