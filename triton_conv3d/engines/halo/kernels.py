"""The kernels of the implicit GEMM with planes reused along D. Channels are dense and last in what they read.

    halo_gemm   y[j, q] = sum over taps t and channels r of  x[j * scale + start + t * step, r] * w[q, r, t]
                forward as it stands; dgrad with the gradient as x and the channels' roles exchanged
    halo_wgrad  dw[k, t, c] = sum over output pixels p of  grad[p, k] * x[p * stride - pad + t * dilation, c]

A row of the tile is PLANES pixels, one behind the other along D, that share the KERNEL_D - 1 planes around them. Sizes
and strides come in units, as those of :mod:`..implicit_gemm.kernels`.
"""

import triton
import triton.language as tl

from ..epilogue import finished
from ..implicit_gemm.kernels import add_digit, dot, rounded
from ..implicit_gemm.taps import tap_bits


@triton.jit
def add_planes(
    sums, planes, weights, PLANES: tl.constexpr, KERNEL_D: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr
):
    """To the sums of each plane of the result, the products of the planes that it meets and their taps along D."""
    added = ()
    for j in tl.static_range(PLANES):
        acc = sums[j]
        for p in tl.static_range(KERNEL_D):
            acc = dot(planes[j + p], weights[p], acc, PRECISION, UPCAST)
        added += (acc,)
    return added


@triton.jit
def halo_gemm(
    x_ptr,
    w_ptr,
    bias_ptr,
    y_ptr,
    batch,
    x_size,  # (d, h, w), as every triple
    y_size,
    kernel,
    scale,  # along D it is 1
    start,  # along D: of the first of all planes that a row reads
    step,  # along D it is 1, from plane to plane
    x_strides,  # (n, d, h, w) in X_UNIT
    w_strides,  # (filter, tap) in W_UNIT
    y_strides,  # (n, d, h, w) in Y_UNIT, q in elements
    reduced,  # channels of one group that are summed over, in X_UNIT
    produced,  # channels of one group that are computed, in Y_UNIT
    tiles_m,
    residual_ptr,  # None, or with the strides of y
    slope,
    X_UNIT: tl.constexpr,
    W_UNIT: tl.constexpr,
    Y_UNIT: tl.constexpr,
    DGRAD: tl.constexpr,
    KERNEL_D: tl.constexpr,
    BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    EVEN: tl.constexpr,
    INDEX: tl.constexpr,
    BITS: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PLANES: tl.constexpr,
):
    READ: tl.constexpr = PLANES + KERNEL_D - 1  # planes of x, of one row
    reduced = reduced * X_UNIT
    produced = produced * Y_UNIT
    tiles_n = tl.cdiv(produced, BLOCK_N)
    program = tl.program_id(0)
    pid_n = program % tiles_n  # neighbours in time read the same pixels
    pid_m = program // tiles_n % tiles_m
    group = program // (tiles_n * tiles_m)

    # The rows of this tile, where each gathers from, and which taps and planes lie outside of x.
    m = pid_m.to(INDEX) * BLOCK_M + tl.arange(0, BLOCK_M)
    rows_d = tl.cdiv(y_size[0], PLANES)
    sample = tl.full([], rows_d, INDEX) * y_size[1] * y_size[2]
    in_rows = m < sample * batch
    jw = m % y_size[2]
    jh = m // y_size[2] % y_size[1]
    jd = m // (y_size[2] * y_size[1]) % rows_d * PLANES
    n = m // sample
    xd = jd + start[0]
    xh = jh * scale[1] + start[1]
    xw = jw * scale[2] + start[2]
    taps_h, taps_w = kernel[1], kernel[2]
    valid = tl.full([BLOCK_M], 0, BITS)
    valid = tap_bits(valid, 0, xd, 1, x_size[0], READ, False)
    valid = tap_bits(valid, READ, xh, step[1], x_size[1], taps_h, False)
    valid = tap_bits(valid, READ + taps_h, xw, step[2], x_size[2], taps_w, False)
    k = tl.arange(0, BLOCK_K)
    in_k = k < reduced
    outside = tl.where(in_rows[:, None] & in_k[None, :], ~valid[:, None], -1)
    x_rows = (n * x_strides[0] + xd * x_strides[1] + xh * x_strides[2] + xw * x_strides[3]) * X_UNIT
    x_tile = (x_rows + group.to(INDEX) * reduced)[:, None] + k[None, :]
    x_plane = tl.full([], X_UNIT, INDEX) * x_strides[1]

    q = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    in_q = q < produced
    w_filter = w_strides[0] * W_UNIT
    if DGRAD:  # w is (r, q, taps): the group picks r
        w_tile = (group.to(INDEX) * reduced + k[:, None]) * w_filter + q[None, :]
    else:
        w_tile = (group.to(INDEX) * produced + q[None, :]) * w_filter + k[:, None]
    w_plane = taps_h * taps_w * w_strides[1] * W_UNIT

    sums = ()
    for _ in tl.static_range(PLANES):
        sums += (tl.zeros([BLOCK_M, BLOCK_N], tl.float32),)
    r = tl.full([], 0, tl.int32)
    th = r
    tw = r
    for _ in range(taps_h * taps_w * tl.cdiv(reduced, BLOCK_K)):
        x_tap = (th.to(INDEX) * step[1] * x_strides[2] + tw.to(INDEX) * step[2] * x_strides[3]) * X_UNIT + r
        w_tap = (th * taps_w + tw) * w_strides[1] * W_UNIT + (r * w_filter if DGRAD else r)
        one = tl.full([], 1, BITS)
        tap = (one << (READ + th)) | (one << (READ + taps_h + tw))
        in_w = in_k[:, None] & in_q[None, :]
        if not EVEN:
            in_w = (r + k < reduced)[:, None] & in_q[None, :]
        planes = ()
        for p in tl.static_range(READ):
            in_x = (outside & (tap | (1 << p))) == 0
            if not EVEN:
                in_x &= (r + k < reduced)[None, :]
            planes += (tl.load(x_ptr + (x_tap + p * x_plane) + x_tile, mask=in_x, other=0.0),)
        weights = ()
        for p in tl.static_range(KERNEL_D):  # of x, p planes behind the one of y
            w_plane_ptr = w_ptr + (w_tap + (KERNEL_D - 1 - p if DGRAD else p) * w_plane)
            weights += (tl.load(w_plane_ptr + w_tile, mask=in_w, other=0.0),)
        sums = add_planes(sums, planes, weights, PLANES, KERNEL_D, PRECISION, UPCAST)
        r += BLOCK_K
        tw += (r >= reduced).to(tl.int32)
        r = tl.where(r >= reduced, 0, r)
        th += (tw == taps_w).to(tl.int32)
        tw = tl.where(tw == taps_w, 0, tw)

    y_rows = (n * y_strides[0] + jd * y_strides[1] + jh * y_strides[2] + jw * y_strides[3]) * Y_UNIT
    y_cols = (group.to(INDEX) * produced + q) * y_strides[4]
    y_plane = tl.full([], Y_UNIT, INDEX) * y_strides[1]
    for j in tl.static_range(PLANES):
        acc = sums[j]
        if BIAS:
            acc += tl.load(bias_ptr + group * produced + q, mask=in_q, other=0.0).to(tl.float32)[None, :]
        y_tile = (y_rows + j * y_plane)[:, None] + y_cols[None, :]
        in_y = (in_rows & (jd + j < y_size[0]))[:, None] & in_q[None, :]
        acc = finished(acc, residual_ptr, y_tile, in_y, ACTIVATION, slope)
        tl.store(y_ptr + y_tile, rounded(acc, y_ptr.dtype.element_ty, UPCAST), mask=in_y)


@triton.jit
def _digits(row, size_w, size_h, rows_d):
    """(n, d, h, w) of a row: pixels of the output, PLANES of them along D as one."""
    plane = size_h * size_w
    n, d, h, w = row // plane // rows_d, row // plane % rows_d, row // size_w % size_h, row % size_w
    return n.to(tl.int32), d.to(tl.int32), h.to(tl.int32), w.to(tl.int32)


@triton.jit
def _add_digits(a, b, size_w, size_h, rows_d):
    """The sum of two numbers (n, d, h, w) in mixed radix: no division."""
    w, carry = add_digit(a[3], b[3], 0, size_w)
    h, carry = add_digit(a[2], b[2], carry, size_h)
    d, carry = add_digit(a[1], b[1], carry, rows_d)
    return a[0] + b[0] + carry, d, h, w


@triton.jit
def halo_wgrad(
    grad_ptr,
    x_ptr,
    partials_ptr,  # (split, filter, tap, channel), float32
    batch,
    x_size,
    y_size,
    taps_h,
    taps_w,
    stride,  # along D it is 1
    pad,
    dilation,  # along D it is 1
    x_strides,  # (n, d, h, w) in X_UNIT
    g_strides,  # (n, d, h, w) in G_UNIT
    elements,  # of dw
    channels,  # of one group, in X_UNIT
    filters,  # of one group, in G_UNIT
    splits,
    done,  # rows of each split, whose sums the partial sums hold already
    X_UNIT: tl.constexpr,
    G_UNIT: tl.constexpr,
    KERNEL_D: tl.constexpr,
    HELD_H: tl.constexpr,  # taps along H of one program, that has all along D: all or one
    INDEX: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    CHAIN: tl.constexpr,  # rows of one launch
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PLANES: tl.constexpr,
):
    READ: tl.constexpr = PLANES + KERNEL_D - 1  # planes of x, of one row
    channels = channels * X_UNIT
    filters = filters * G_UNIT
    tiles_m, tiles_n = tl.cdiv(filters, BLOCK_M), tl.cdiv(channels, BLOCK_N)
    program = tl.program_id(0)  # neighbours in time read the same pixels
    tap_w = program % taps_w
    program = program // taps_w
    tap_h = program % (taps_h // HELD_H)
    program = program // (taps_h // HELD_H)
    pid_n = program % tiles_n
    program = program // tiles_n
    pid_m = program % tiles_m
    program = program // tiles_m
    split = program % splits
    group = program // splits

    k = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    c = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    in_k, in_c = k < filters, c < channels
    g_columns = (group.to(INDEX) * filters + k)[:, None]
    x_columns = (group.to(INDEX) * channels + c)[None, :]

    # This split's rows; the position of each is the block's first, in scalars, plus its digits within the block.
    rows_d, size_h, size_w = tl.cdiv(y_size[0], PLANES), y_size[1], y_size[2]
    rows = tl.full([], size_w, INDEX) * size_h * rows_d * batch
    share = tl.cdiv(tl.cdiv(rows, BLOCK_K), splits) * BLOCK_K
    begin = split * share + done
    end = tl.minimum(tl.minimum(begin + CHAIN, split * share + share), rows)
    row = tl.arange(0, BLOCK_K)
    first = _digits(begin, tl.full([], size_w, INDEX), size_h, rows_d)
    hop = _digits(BLOCK_K, size_w, size_h, rows_d)
    # As tiles like those that are loaded, so that nothing changes layout inside the loop.
    g_rows = tl.where(in_k[:, None], row[None, :], BLOCK_K)
    x_rows = tl.where(in_c[None, :], row[:, None], BLOCK_K)
    g_digits = _digits(tl.broadcast_to(row[None, :], [BLOCK_M, BLOCK_K]), size_w, size_h, rows_d)
    x_digits = _digits(tl.broadcast_to(row[:, None], [BLOCK_K, BLOCK_N]), size_w, size_h, rows_d)
    start_h = tap_h * dilation[1] - pad[1]
    start_w = tap_w * dilation[2] - pad[2]
    g_plane = tl.full([], G_UNIT, INDEX) * g_strides[1]
    x_plane, x_line = tl.full([], X_UNIT, INDEX) * x_strides[1], tl.full([], X_UNIT, INDEX) * x_strides[2] * dilation[1]

    sums = ()
    for _ in tl.static_range(KERNEL_D * HELD_H):
        sums += (tl.zeros([BLOCK_M, BLOCK_N], tl.float32),)
    for p in range(begin, end, BLOCK_K):
        left = tl.minimum(end - p, BLOCK_K).to(tl.int32)
        n, d, h, w = _add_digits(first, g_digits, size_w, size_h, rows_d)
        gd = d * PLANES
        g_tile = n.to(INDEX) * g_strides[0] + gd.to(INDEX) * g_strides[1]
        g_tile = (g_tile + h.to(INDEX) * g_strides[2] + w.to(INDEX) * g_strides[3]) * G_UNIT + g_columns
        grads = ()
        for i in tl.static_range(PLANES):
            in_g = (g_rows < left) & (gd + i < y_size[0])
            grads += (tl.load(grad_ptr + i * g_plane + g_tile, mask=in_g, other=0.0),)

        n, d, h, w = _add_digits(first, x_digits, size_w, size_h, rows_d)
        xd = d * PLANES - pad[0]
        xh = h * stride[1] + start_h
        xw = w * stride[2] + start_w
        x_tile = n.to(INDEX) * x_strides[0] + xd.to(INDEX) * x_strides[1]
        x_tile = (x_tile + xh.to(INDEX) * x_strides[2] + xw.to(INDEX) * x_strides[3]) * X_UNIT + x_columns
        # As unsigned numbers negative positions are large: one comparison checks both ends.
        in_w = (x_rows < left) & (xw.to(tl.uint32, bitcast=True) < x_size[2])
        for i in tl.static_range(READ):
            in_d = in_w & ((xd + i).to(tl.uint32, bitcast=True) < x_size[0])
            for th in tl.static_range(HELD_H):
                in_x = in_d & ((xh + th * dilation[1]).to(tl.uint32, bitcast=True) < x_size[1])
                x = tl.load(x_ptr + (i * x_plane + th * x_line) + x_tile, mask=in_x, other=0.0)
                for td in tl.static_range(KERNEL_D):
                    if i >= td and i - td < PLANES:
                        acc = dot(grads[i - td], x, sums[td * HELD_H + th], PRECISION, UPCAST)
                        sums = sums[: td * HELD_H + th] + (acc,) + sums[td * HELD_H + th + 1 :]
        first = _add_digits(first, hop, size_w, size_h, rows_d)

    filter_size = KERNEL_D * taps_h * taps_w * channels
    tile = (group.to(INDEX) * filters + k)[:, None] * filter_size + c[None, :]
    partials_ptr += split.to(tl.int64) * elements
    summed = tl.where(done > 0, filters, 0)
    for t in tl.static_range(KERNEL_D * HELD_H):
        tap = (t // HELD_H * taps_h + tap_h + t % HELD_H) * taps_w + tap_w
        tap_ptr = partials_ptr + tap * channels
        before = tl.load(tap_ptr + tile, mask=(k < summed)[:, None] & in_c[None, :], other=0.0)
        tl.store(tap_ptr + tile, before + sums[t], mask=in_k[:, None] & in_c[None, :])
