"""The three kernels of the implicit GEMM. Channels are dense and last in what they read; other strides are free.

    gather_gemm    y[j, q] = sum over taps t and channels r of  x[j * scale + start + t * step, r] * w[q, r, t]
                   forward as it stands; dgrad with the gradient as x and the channels' roles exchanged; along depth
                   over those taps alone through which some pixel of a tile meets x: the others read padding
    wgrad_gemm     dw[k, t, c] = sum over output pixels p of  grad[p, k] * x[p * stride - pad + t * dilation, c]
    reduce_splits  result = sum over splits of the float32 partials, + bias, in the result's own layout

gather_gemm of an unsplit forward pass, else reduce_splits, also adds the residual and applies the activation.

Sizes and strides are run-time values: one compiled kernel serves every shape. Triton knows of an integer only
whether 16 divides it, so strides and channel counts come in units (UNIT elements, up to 16 bytes) and are multiplied
by the constexpr unit inside, which proves the alignment of every vector load.
"""

import triton
import triton.language as tl

from ..epilogue import finished
from .taps import class_at, live_taps, parity_class, plane_at, tap_bits


@triton.jit
def round_tf32(value):
    """float32 rounded to the nearest tf32: the tensor core itself truncates the last 13 bits.

    NVIDIA's arithmetic writes NaN as 0x7FFFFFFF, of which rounding would make -0, but for the minimum.
    """
    bits = tl.minimum(value.to(tl.int32, bitcast=True), 0x7FFFEFFF)
    return ((bits + 0x1000) & ~0x1FFF).to(tl.float32, bitcast=True)


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    if UPCAST:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    if PRECISION == "tf32":
        a = round_tf32(a)
        b = round_tf32(b)
    return tl.dot(a, b, acc, input_precision="tf32" if PRECISION == "rounded" else PRECISION)


@triton.jit
def rounded(value, dtype: tl.constexpr, UPCAST: tl.constexpr):
    """float32 in the type of the result, rounded to nearest even."""
    if UPCAST and dtype == tl.bfloat16:  # the interpreter truncates
        bits = value.to(tl.uint32, bitcast=True)
        value = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).to(tl.float32, bitcast=True)
    return value.to(dtype)


@triton.jit
def _swizzle(tile, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """Tile index -> (m, n), in bands of GROUP_M rows so that neighbours in time share operands in L2."""
    band = tile // (GROUP_M * tiles_n)
    first = band * GROUP_M
    height = tl.minimum(tiles_m - first, GROUP_M)
    inside = tile % (GROUP_M * tiles_n)
    return first + inside % height, inside // height


@triton.jit(do_not_specialize=["by_depth"])  # one kernel for both orders
def gather_gemm(
    x_ptr,
    w_ptr,
    bias_ptr,
    y_ptr,
    batch,
    x_size,  # (d, h, w), as every triple
    y_size,
    kernel,
    scale,
    start,  # of a strided dgrad: the padding
    step,
    stride,  # of a strided dgrad: pixels from one position of a parity class to the next
    dilation,
    tap_step,
    x_strides,  # (n, d, h, w) in X_UNIT
    w_strides,  # (filter, tap) in W_UNIT
    y_strides,  # (n, d, h, w) in Y_UNIT, q in elements
    split_stride,  # elements from one split's partial sums to the next
    reduced,  # channels of one program that are summed over, in X_UNIT
    produced,  # channels of one program that are computed, in Y_UNIT
    packed,  # None, or of programs with several groups: all such channels in the same units, filters of one group
    splits,
    tiles_m,
    by_depth,  # order of planes, 1 or 0: see plane_at
    residual_ptr,  # None, or with the strides of y
    slope,
    X_UNIT: tl.constexpr,
    W_UNIT: tl.constexpr,
    Y_UNIT: tl.constexpr,
    DGRAD: tl.constexpr,
    STRIDED: tl.constexpr,
    BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    EVEN: tl.constexpr,
    FLAT: tl.constexpr,
    INDEX: tl.constexpr,
    BITS: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    reduced = reduced * X_UNIT
    produced = produced * Y_UNIT
    tiles_n = tl.cdiv(produced, BLOCK_N)
    program = tl.program_id(0)
    tile = program % (tiles_m * tiles_n)
    split = program // (tiles_m * tiles_n) % splits
    group = program // (tiles_m * tiles_n * splits)
    pid_m, pid_n = _swizzle(tile, tiles_m, tiles_n, GROUP_M)

    taps_d, taps_h, taps_w = kernel[0], kernel[1], kernel[2]
    rows_d, rows_h, rows_w = y_size[0], y_size[1], y_size[2]
    start_d, start_h, start_w = start[0], start[1], start[2]
    if STRIDED:
        index_d, index_h, index_w = class_at(tl.program_id(1), stride)
        taps_d, tap_d, start_d, rows_d = parity_class(
            index_d, start[0], y_size[0], kernel[0], stride[0], dilation[0], tap_step[0]
        )
        taps_h, tap_h, start_h, rows_h = parity_class(
            index_h, start[1], y_size[1], kernel[1], stride[1], dilation[1], tap_step[1]
        )
        taps_w, tap_w, start_w, rows_w = parity_class(
            index_w, start[2], y_size[2], kernel[2], stride[2], dilation[2], tap_step[2]
        )

    # The pixels of this tile.
    m = pid_m.to(INDEX) * BLOCK_M + tl.arange(0, BLOCK_M)
    by_depth = by_depth != 0
    plane = rows_w * rows_h
    pixels = tl.full([], plane, INDEX) * rows_d * batch
    in_rows = m < pixels
    jw = m % rows_w
    jh = m // rows_w % rows_h
    n, jd = plane_at(m // plane, batch, rows_d, by_depth)

    # Taps along depth that only read padding, for all of these pixels, are left out. Found in 32 bits: a division in 64 is a
    # call, behind which compilers take nothing that depends on it for the same in all threads, and the loop is longer.
    counted = pixels < 2**30
    if STRIDED:
        counted &= pixels > 0  # a parity class may be empty
    first = tl.where(counted, pid_m, 0) * BLOCK_M
    last = tl.minimum(first + (BLOCK_M - 1), (pixels - 1).to(tl.int32))
    first_n, first_d = plane_at(first // plane, batch, rows_d, by_depth)
    last_n, last_d = plane_at(last // plane, batch, rows_d, by_depth)
    rising = (by_depth | (first_n == last_n)) & counted  # else all depths: the tile ends in another sample
    first_d = tl.where(rising, first_d, 0)
    last_d = tl.where(rising, last_d, rows_d - 1)
    lo, hi = live_taps(first_d, last_d, scale[0], start_d, step[0], x_size[0], taps_d)
    taps_d = hi - lo
    start_d += lo * step[0]
    if STRIDED:
        tap_d += lo * tap_step[0]

    # Where each gathers from, and which of these taps meet the input there.
    xd = jd * scale[0] + start_d
    xh = jh * scale[1] + start_h
    xw = jw * scale[2] + start_w
    taps_hw = taps_h * taps_w
    valid = tl.full([BLOCK_M], 1 if FLAT else 0, BITS)
    valid = tap_bits(valid, 1 if FLAT else 0, xw, step[2], x_size[2], taps_w, FLAT)
    valid = tap_bits(valid, taps_w, xh, step[1], x_size[1], taps_h, FLAT)
    valid = tap_bits(valid, taps_hw if FLAT else taps_h + taps_w, xd, step[0], x_size[0], taps_d, FLAT)
    x_rows = (n * x_strides[0] + xd * x_strides[1] + xh * x_strides[2] + xw * x_strides[3]) * X_UNIT
    x_tile = (x_rows + group.to(INDEX) * reduced)[:, None] + tl.arange(0, BLOCK_K)[None, :]

    q = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    in_k = k < reduced
    in_q = q < produced
    in_filters = in_q[None, :]
    dense = q if DGRAD else k  # channel of w
    if packed is not None:  # groups are blocks on the diagonal of w, zeros elsewhere
        in_k &= k < packed[0] * X_UNIT - group * reduced
        in_q &= q < packed[1] * Y_UNIT - group * produced
        group_in = w_strides[1] * W_UNIT
        of_k = k // (packed[2] if DGRAD else group_in)
        of_q = q // (group_in if DGRAD else packed[2])
        in_filters = in_q[None, :] & (of_k[:, None] == of_q[None, :])
        dense = dense % group_in
    if DGRAD:  # w is (r, q, taps): the group picks r, the dense channel is q
        w_tile = (group.to(INDEX) * reduced + k[:, None]) * (w_strides[0] * W_UNIT) + dense[None, :]
    else:
        w_tile = (group.to(INDEX) * produced + q[None, :]) * (w_strides[0] * W_UNIT) + dense[:, None]

    if not STRIDED:
        w_tile += lo * taps_hw * w_strides[1] * W_UNIT

    # As a tile, so that the test of each step needs no change of layout inside the loop.
    valid = tl.where(in_rows[:, None] & in_k[None, :], valid[:, None], 0)

    # One flat loop over taps and channel blocks; this split takes the part [begin, end) of it.
    blocks = tl.cdiv(reduced, BLOCK_K)
    steps = taps_d * taps_hw * blocks
    share = tl.cdiv(steps, splits)
    begin = split * share
    end = tl.minimum(begin + share, steps)
    r = begin % blocks * BLOCK_K
    tap = begin // blocks
    tw = tap % tl.maximum(taps_w, 1)
    th = tap // tl.maximum(taps_w, 1) % tl.maximum(taps_h, 1)
    td = tap // tl.maximum(taps_hw, 1)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for _ in range(begin, end):
        x_tap = (
            td.to(INDEX) * step[0] * x_strides[1]
            + th.to(INDEX) * step[1] * x_strides[2]
            + tw.to(INDEX) * step[2] * x_strides[3]
        ) * X_UNIT + r
        if STRIDED:  # this class's taps among all of them
            w_tap = (tap_d + td * tap_step[0]) * kernel[1] + tap_h + th * tap_step[1]
            w_tap = w_tap * kernel[2] + tap_w + tw * tap_step[2]
        else:
            w_tap = tap
        w_tap = w_tap * w_strides[1] * W_UNIT
        if DGRAD:
            w_tap += r.to(INDEX) * (w_strides[0] * W_UNIT)
        else:
            w_tap += r
        one = tl.full([], 1, BITS)
        if FLAT:
            in_x = (valid & (one << tap)) != 0
        else:
            bits = (one << tw) | (one << (taps_w + th)) | (one << (taps_w + taps_h + td))
            in_x = (valid & bits) == bits
        in_w = in_filters
        if not EVEN:
            in_x &= (r + k < reduced)[None, :]
            in_w &= (r + k < reduced)[:, None]
        a = tl.load(x_ptr + x_tap + x_tile, mask=in_x, other=0.0)
        b = tl.load(w_ptr + w_tap + w_tile, mask=in_w, other=0.0)
        acc = dot(a, b, acc, PRECISION, UPCAST)
        r += BLOCK_K
        carry = (r >= reduced).to(tl.int32)
        r = tl.where(r >= reduced, 0, r)
        tap += carry
        tw += carry
        th += (tw == taps_w).to(tl.int32)
        tw = tl.where(tw == taps_w, 0, tw)
        td += (th == taps_h).to(tl.int32)
        th = tl.where(th == taps_h, 0, th)

    if BIAS:
        acc += tl.load(bias_ptr + group * produced + q, mask=in_q, other=0.0).to(tl.float32)[None, :]
    if STRIDED:
        jd = jd * stride[0] + index_d
        jh = jh * stride[1] + index_h
        jw = jw * stride[2] + index_w
    y_rows = (n * y_strides[0] + jd * y_strides[1] + jh * y_strides[2] + jw * y_strides[3]) * Y_UNIT
    y_cols = (group.to(INDEX) * produced + q) * y_strides[4]
    y_tile = y_rows[:, None] + y_cols[None, :]
    in_y = in_rows[:, None] & in_q[None, :]
    acc = finished(acc, residual_ptr, y_tile, in_y, ACTIVATION, slope)
    y_tile = y_ptr + split.to(INDEX) * split_stride + y_tile
    tl.store(y_tile, rounded(acc, y_ptr.dtype.element_ty, UPCAST), mask=in_y)


@triton.jit
def add_digit(a, b, carry, radix):
    """One digit of a sum in mixed radix, and the carry to the next."""
    digit = a + b + carry
    over = (digit >= radix).to(tl.int32)
    return digit - over * radix, over


@triton.jit
def wgrad_gemm(
    grad_ptr,  # dense: (pixel, channel)
    x_ptr,
    dw_ptr,
    pixels,  # N * Do * Ho * Wo
    x_size,
    y_size,
    kernel,
    stride,
    pad,
    dilation,
    x_strides,  # (n, d, h, w) in X_UNIT
    dw_strides,  # (k, tap, c) in elements; where x and grad are exchanged, k is a channel and c a filter
    split_stride,
    group_in,  # input channels of one program in X_UNIT
    group_out,  # filters of one program in G_UNIT
    all_out,  # K in G_UNIT
    packed,  # None, or of programs with several groups: C in X_UNIT, channels and filters of one group
    splits,
    tiles_m,
    X_UNIT: tl.constexpr,
    G_UNIT: tl.constexpr,
    INDEX: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    CHAIN: tl.constexpr,  # products of one accumulator before they are added to the total
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    group_in = group_in * X_UNIT
    group_out = group_out * G_UNIT
    columns = kernel[0] * kernel[1] * kernel[2] * group_in  # taps and channels of one group, folded together
    tiles_n = tl.cdiv(columns, BLOCK_N)
    program = tl.program_id(0)
    tile = program % (tiles_m * tiles_n)
    split = program // (tiles_m * tiles_n) % splits
    group = program // (tiles_m * tiles_n * splits)
    pid_m, pid_n = _swizzle(tile, tiles_m, tiles_n, GROUP_M)

    k = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    in_k = k < group_out
    column = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    in_columns = column < columns
    c = column % group_in
    tap = column // group_in
    tap_w = tap % kernel[2] * dilation[2]
    tap_h = tap // kernel[2] % kernel[1] * dilation[1]
    tap_d = tap // (kernel[2] * kernel[1]) * dilation[0]
    if packed is not None:
        in_k &= k < all_out * G_UNIT - group * group_out
        in_columns &= c < packed[0] * X_UNIT - group * group_in
    x_columns = tap_d.to(INDEX) * x_strides[1] + tap_h.to(INDEX) * x_strides[2] + tap_w.to(INDEX) * x_strides[3]
    x_columns *= X_UNIT
    x_columns += group.to(INDEX) * group_in + c

    # This split's pixels. A pixel's position (n, d, h, w) is the block's first, in scalars, plus the digits of its row
    # within the block, in mixed radix with carry: no division in the loop. The digits are tiles, as wide as the load,
    # so that nothing changes layout inside the loop.
    share = tl.cdiv(tl.cdiv(pixels, BLOCK_K), splits).to(INDEX) * BLOCK_K
    begin = split * share
    end = tl.minimum(begin + share, pixels)
    size_d, size_h, size_w = y_size[0], y_size[1], y_size[2]
    row = tl.arange(0, BLOCK_K)
    row_w = tl.where(in_columns[None, :], (row % size_w)[:, None], 0)
    row_h = tl.where(in_columns[None, :], (row // size_w % size_h)[:, None], 0)
    row_d = tl.where(in_columns[None, :], (row // (size_w * size_h) % size_d)[:, None], 0)
    row_n = tl.where(in_columns[None, :], (row // (size_w * size_h) // size_d)[:, None], 0)
    row_p = tl.where(in_columns[None, :], row[:, None], BLOCK_K)
    first_w = (begin % size_w).to(tl.int32)
    first_h = (begin // size_w % size_h).to(tl.int32)
    first_d = (begin // (size_w * size_h) % size_d).to(tl.int32)
    first_n = (begin // (size_w * size_h) // size_d).to(tl.int32)
    hop_w = BLOCK_K % size_w
    hop_h = BLOCK_K // size_w % size_h
    hop_d = BLOCK_K // (size_w * size_h) % size_d
    hop_n = BLOCK_K // (size_w * size_h) // size_d
    grad_tile = row[:, None] * (all_out * G_UNIT) + (group * group_out + k)[None, :]
    grad_rows = tl.where(in_k[None, :], row[:, None], BLOCK_K)

    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for chain in range(begin, end, CHAIN):
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for p in range(chain, tl.minimum(chain + CHAIN, end), BLOCK_K):
            yw, carry = add_digit(first_w, row_w, 0, size_w)
            yh, carry = add_digit(first_h, row_h, carry, size_h)
            yd, carry = add_digit(first_d, row_d, carry, size_d)
            n = first_n + row_n + carry
            xd = yd * stride[0] - pad[0]
            xh = yh * stride[1] - pad[1]
            xw = yw * stride[2] - pad[2]
            x_tile = n.to(INDEX) * x_strides[0] + xd.to(INDEX) * x_strides[1]
            x_tile = (x_tile + xh.to(INDEX) * x_strides[2] + xw.to(INDEX) * x_strides[3]) * X_UNIT
            # As unsigned numbers negative positions are large: one comparison checks both ends.
            in_x = (xd + tap_d[None, :]).to(tl.uint32, bitcast=True) < x_size[0]
            in_x &= (xh + tap_h[None, :]).to(tl.uint32, bitcast=True) < x_size[1]
            in_x &= (xw + tap_w[None, :]).to(tl.uint32, bitcast=True) < x_size[2]
            left = tl.minimum(end - p, BLOCK_K).to(tl.int32)
            grad = tl.load(
                grad_ptr + tl.full([], p, INDEX) * (all_out * G_UNIT) + grad_tile, mask=grad_rows < left, other=0.0
            )
            x = tl.load(x_ptr + (x_tile + x_columns[None, :]), mask=in_x & (row_p < left), other=0.0)
            acc = dot(tl.trans(grad), x, acc, PRECISION, UPCAST)
            first_w, carry = add_digit(first_w, hop_w, 0, size_w)
            first_h, carry = add_digit(first_h, hop_h, carry, size_h)
            first_d, carry = add_digit(first_d, hop_d, carry, size_d)
            first_n += hop_n + carry
        total += acc

    dw_rows = (group.to(INDEX) * group_out + k) * dw_strides[0]
    in_dw = in_k[:, None] & in_columns[None, :]
    if packed is not None:  # the other products are of channels with filters of another group
        in_dw &= (k // packed[2])[:, None] == (c // packed[1])[None, :]
        c = c % packed[1]
    dw_columns = tap * dw_strides[1] + c.to(INDEX) * dw_strides[2]
    dw_tile = dw_ptr + split.to(INDEX) * split_stride + (dw_rows[:, None] + dw_columns[None, :])
    tl.store(dw_tile, rounded(total, dw_ptr.dtype.element_ty, UPCAST), mask=in_dw)


@triton.jit
def reduce_splits(
    partials_ptr,  # (splits, outer, inner, channels), float32
    bias_ptr,
    result_ptr,  # (outer, inner, channels), or (outer, channels, inner) if TRANSPOSED
    elements,  # of the result
    inner,
    channels,
    splits,
    residual_ptr,  # None, or in the layout of the result
    slope,
    BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    UPCAST: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(INDEX) * BLOCK + tl.arange(0, BLOCK)
    inside = at < elements
    total = tl.zeros([BLOCK], tl.float32)
    for split in range(splits):
        total += tl.load(partials_ptr + tl.full([], split, tl.int64) * elements + at, mask=inside, other=0.0)
    channel = at % channels
    if BIAS:
        total += tl.load(bias_ptr + channel, mask=inside, other=0.0).to(tl.float32)
    if TRANSPOSED:
        at = at // (channels * inner) * (channels * inner) + channel * inner + at // channels % inner
    total = finished(total, residual_ptr, at, inside, ACTIVATION, slope)
    tl.store(result_ptr + at, rounded(total, result_ptr.dtype.element_ty, UPCAST), mask=inside)
