"""The kernel of the implicit GEMM with planes reused along D. Channels are dense and last in what it reads.

    halo_gemm   y[j, q] = sum over taps t and channels r of  x[j * scale + start + t * step, r] * w[q, r, t]

forward as it stands; dgrad with the gradient as x and the channels' roles exchanged. A row of the tile is PLANES pixels,
one behind the other along D, that share the KERNEL_D - 1 planes around them. Sizes and strides come in units, as those
of :mod:`..implicit_gemm.kernels`.
"""

import triton
import triton.language as tl

from ..epilogue import finished
from ..implicit_gemm.kernels import dot, rounded, tap_bits


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
        added = ()
        for j in tl.static_range(PLANES):
            acc = sums[j]
            for p in tl.static_range(KERNEL_D):
                acc = dot(planes[j + p], weights[p], acc, PRECISION, UPCAST)
            added += (acc,)
        sums = added
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
