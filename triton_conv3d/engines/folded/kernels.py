"""The two kernels of the folded GEMM. Elements are loaded one by one, so that operands may have any strides.

    folded_gemm   y[j, q] = sum over r = (tap, channel) of  x[j * scale + start + tap * step, channel] * w[q, channel, tap]
    folded_wgrad  dw[q, r] = sum over output pixels j of  x[j * stride - pad + tap * dilation, channel] * grad[j, q]
                  or, for few filters, with the roles of x and grad exchanged, and -pad and -dilation

By blocks q is (class, channel), j a block and tap e stands for tap e * stride + class - front of the weight.
"""

import triton
import triton.language as tl

from ..epilogue import finished
from ..implicit_gemm.kernels import dot, rounded
from ..implicit_gemm.taps import class_at, parity_class, tap_bits


@triton.jit
def _bits(d, h, w):
    """What holds of each dimension, as one number."""
    return d.to(tl.int32) | (h.to(tl.int32) << 1) | (w.to(tl.int32) << 2)


@triton.jit
def folded_gemm(
    x_ptr,
    w_ptr,
    bias_ptr,
    y_ptr,
    batch,
    x_size,  # (d, h, w), as every triple
    y_size,
    scale,
    start,  # of parity classes: the padding
    step,
    parity,  # None, or of a strided dgrad by class: kernel, stride, dilation, taps from one of a class to its next
    blocks,  # None, or of one by blocks, which y_size counts: front, before, last
    x_strides,  # (n, channel, d, h, w), in elements
    w_strides,  # (produced channel, reduced channel, d, h, w, group)
    y_strides,  # (n, d, h, w) in Y_UNIT, channel in elements
    produced,  # channels of one group that are computed, in Y_UNIT
    residual_ptr,  # None, or with the strides of y
    slope,
    KERNEL_D: tl.constexpr,  # of a strided dgrad: taps of the largest class
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    REDUCED: tl.constexpr,  # channels of one group that are summed over
    BLOCK: tl.constexpr,  # None, or of blocks: positions in each dimension, channels of one group that are computed
    Y_UNIT: tl.constexpr,
    BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    INDEX: tl.constexpr,
    BITS: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    produced = produced * Y_UNIT
    columns = produced
    if BLOCK is not None:
        front, before, last = blocks
        columns = BLOCK[0] * BLOCK[1] * BLOCK[2] * BLOCK[3]
    REDUCTION: tl.constexpr = KERNEL_D * KERNEL_H * KERNEL_W * REDUCED
    STEPS: tl.constexpr = (REDUCTION + BLOCK_K - 1) // BLOCK_K
    tiles_n = tl.cdiv(columns, BLOCK_N)
    group = tl.program_id(1)
    taps_d, taps_h, taps_w = KERNEL_D, KERNEL_H, KERNEL_W
    rows_d, rows_h, rows_w = y_size[0], y_size[1], y_size[2]
    start_d, start_h, start_w = start[0], start[1], start[2]
    if parity is not None:
        kernel, stride, dilation, tap_step = parity
        index_d, index_h, index_w = class_at(group, stride)
        group = group // (stride[2] * stride[1] * stride[0])
        taps_d, tap_d, start_d, rows_d = parity_class(
            index_d, start[0], y_size[0], kernel[0], stride[0], dilation[0], tap_step[0]
        )
        taps_h, tap_h, start_h, rows_h = parity_class(
            index_h, start[1], y_size[1], kernel[1], stride[1], dilation[1], tap_step[1]
        )
        taps_w, tap_w, start_w, rows_w = parity_class(
            index_w, start[2], y_size[2], kernel[2], stride[2], dilation[2], tap_step[2]
        )
    pid_n = tl.program_id(0) % tiles_n  # neighbours in time gather from the same pixels
    pid_m = tl.program_id(0) // tiles_n

    m = pid_m.to(INDEX) * BLOCK_M + tl.arange(0, BLOCK_M)
    sample = tl.full([], rows_w, INDEX) * rows_h * rows_d
    in_rows = m < sample * batch
    jw = m % rows_w
    jh = m // rows_w % rows_h
    jd = m // (rows_w * rows_h) % rows_d
    n = m // sample
    xd = jd * scale[0] + start_d
    xh = jh * scale[1] + start_h
    xw = jw * scale[2] + start_w
    valid = tl.full([BLOCK_M], 0, BITS)
    valid = tap_bits(valid, 0, xw, step[2], x_size[2], taps_w, False)
    valid = tap_bits(valid, KERNEL_W, xh, step[1], x_size[1], taps_h, False)
    valid = tap_bits(valid, KERNEL_W + KERNEL_H, xd, step[0], x_size[0], taps_d, False)
    outside = tl.where(in_rows, ~valid, -1)
    x_pixels = n * x_strides[0] + xd * x_strides[2] + xh * x_strides[3] + xw * x_strides[4]
    x_pixels += group.to(INDEX) * REDUCED * x_strides[1]
    if STEPS == 1:  # tell threads apart by pixels, which cost more to find than taps
        x_pixels = tl.multiple_of(tl.max_contiguous(x_pixels, 2), 1)

    q = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    in_q = q < columns
    w_filters = group.to(INDEX) * w_strides[5]
    if BLOCK is not None:  # q is (class, channel)
        ad, ah, aw = class_at(q // BLOCK[3], BLOCK)
        q = q % BLOCK[3]
        w_filters += (ad - front[0]) * w_strides[2] + (ah - front[1]) * w_strides[3] + (aw - front[2]) * w_strides[4]
        ahead = _bits(ad < front[0], ah < front[1], aw < front[2])  # through the first tap a class meets zeros
    w_filters += q.to(INDEX) * w_strides[0]

    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for first in range(0, REDUCTION, BLOCK_K):
        r = first + tl.arange(0, BLOCK_K)
        in_r = r < REDUCTION
        channel = r % REDUCED
        tw = r // REDUCED % KERNEL_W
        th = r // (REDUCED * KERNEL_W) % KERNEL_H
        td = r // (REDUCED * KERNEL_W * KERNEL_H)
        one = tl.full([BLOCK_K], 1, BITS)
        needed = (one << tw) | (one << (KERNEL_W + th)) | (one << (KERNEL_W + KERNEL_H + td))
        needed = tl.where(in_r, needed, -1)  # no pixel has every bit
        x_taps = channel.to(INDEX) * x_strides[1] + td.to(INDEX) * step[0] * x_strides[2]
        x_taps += th.to(INDEX) * step[1] * x_strides[3] + tw.to(INDEX) * step[2] * x_strides[4]
        if parity is not None:  # this class's taps among all of them
            in_r = in_r & (td < taps_d) & (th < taps_h) & (tw < taps_w)
            td = tap_d + td * tap_step[0]
            th = tap_h + th * tap_step[1]
            tw = tap_w + tw * tap_step[2]
        in_w = in_q[:, None] & in_r[None, :]
        if BLOCK is not None:
            in_w &= (ahead[:, None] & _bits(td == 0, th == 0, tw == 0)[None, :]) == 0
            td = td * BLOCK[0]
            th = th * BLOCK[1]
            tw = tw * BLOCK[2]
        w_taps = channel.to(INDEX) * w_strides[1] + td * w_strides[2] + th * w_strides[3] + tw * w_strides[4]
        in_x = (needed[:, None] & outside[None, :]) == 0
        x = tl.load(x_ptr + (x_taps[:, None] + x_pixels[None, :]), mask=in_x, other=0.0)
        w = tl.load(w_ptr + (w_filters[:, None] + w_taps[None, :]), mask=in_w, other=0.0)
        acc = dot(w, x, acc, PRECISION, UPCAST)

    if BIAS:
        acc += tl.load(bias_ptr + group * produced + q, mask=in_q, other=0.0).to(tl.float32)[:, None]
    if parity is not None:
        jd = jd * stride[0] + index_d
        jh = jh * stride[1] + index_h
        jw = jw * stride[2] + index_w
    in_y = in_q[:, None] & in_rows[None, :]
    y_channels = (group.to(INDEX) * produced + q) * y_strides[4]
    if BLOCK is not None:  # the first and the last blocks may reach beyond y
        begins = _bits(jd == 0, jh == 0, jw == 0) | (_bits(jd == rows_d - 1, jh == rows_h - 1, jw == rows_w - 1) << 3)
        outside = _bits(ad < before[0], ah < before[1], aw < before[2])
        outside |= _bits(ad >= last[0], ah >= last[1], aw >= last[2]) << 3
        in_y &= (outside[:, None] & begins[None, :]) == 0
        y_class = (ad - before[0]).to(INDEX) * y_strides[1] + (ah - before[1]).to(INDEX) * y_strides[2]
        y_channels += (y_class + (aw - before[2]).to(INDEX) * y_strides[3]) * Y_UNIT
        jd = jd * BLOCK[0]
        jh = jh * BLOCK[1]
        jw = jw * BLOCK[2]
    y_pixels = n * y_strides[0] + jd * y_strides[1] + jh * y_strides[2] + jw * y_strides[3]
    if Y_UNIT > 1:
        y_pixels *= Y_UNIT
    else:  # unless channels do, pixels run along neighbouring threads, one by one; Triton 3.6 would choose the first dimension
        y_pixels = tl.multiple_of(tl.max_contiguous(y_pixels, 2), 1)
    y_tile = y_channels[:, None] + y_pixels[None, :]
    acc = finished(acc, residual_ptr, y_tile, in_y, ACTIVATION, slope)
    tl.store(y_ptr + y_tile, rounded(acc, y_ptr.dtype.element_ty, UPCAST), mask=in_y)


@triton.jit
def folded_wgrad(
    grad_ptr,
    x_ptr,
    dw_ptr,
    pixels,  # N * Do * Ho * Wo
    x_size,  # (d, h, w), as every triple
    y_size,
    stride,
    pad,
    dilation,
    x_strides,  # (n, channel, d, h, w), in elements
    g_strides,  # (n, d, h, w) in G_UNIT, channel in elements
    dw_strides,  # (filter, tap of d, h, w, channel), in elements: of a head (channel, ..., filter), as are all roles of the two
    blocks,  # None, or of a head with y as blocks of pixels that it counts: front, before, last
    split_stride,  # elements from one split's partial sums to the next
    produced,  # filters of one group, in G_UNIT
    splits,
    KERNEL_D: tl.constexpr,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    REDUCED: tl.constexpr,  # input channels of one group
    BLOCK: tl.constexpr,  # None, or of blocks: pixels in each dimension, channels
    G_UNIT: tl.constexpr,
    INDEX: tl.constexpr,
    BITS: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    CHAIN: tl.constexpr,  # products of one accumulator before they are added to the total
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    REDUCTION: tl.constexpr = KERNEL_D * KERNEL_H * KERNEL_W * REDUCED
    produced = produced * G_UNIT
    columns = produced
    if BLOCK is not None:
        front, before, last = blocks
        columns = BLOCK[0] * BLOCK[1] * BLOCK[2] * BLOCK[3]
    tiles_n = tl.cdiv(columns, BLOCK_N)
    tiles = tiles_n * tl.cdiv(REDUCTION, BLOCK_M)
    group = tl.program_id(1)
    split = tl.program_id(0) // tiles
    pid_n = tl.program_id(0) % tiles_n
    pid_m = tl.program_id(0) % tiles // tiles_n

    r = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    channel = r % REDUCED
    tw = r // REDUCED % KERNEL_W
    th = r // (REDUCED * KERNEL_W) % KERNEL_H
    td = r // (REDUCED * KERNEL_W * KERNEL_H)
    one = tl.full([BLOCK_M], 1, BITS)
    needed = (one << tw) | (one << (KERNEL_W + th)) | (one << (KERNEL_W + KERNEL_H + td))
    needed = tl.where(r < REDUCTION, needed, -1)  # no pixel has every bit
    x_taps = (group * REDUCED + channel).to(INDEX) * x_strides[1] + td.to(INDEX) * dilation[0] * x_strides[2]
    x_taps += th.to(INDEX) * dilation[1] * x_strides[3] + tw.to(INDEX) * dilation[2] * x_strides[4]
    q = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    in_q = q < columns
    in_dw = (r < REDUCTION)[:, None] & in_q[None, :]
    g_filters = tl.zeros([BLOCK_N], INDEX)
    dw_columns = tl.zeros([BLOCK_N], INDEX)
    if BLOCK is not None:  # q is (class, channel)
        ad, ah, aw = class_at(q // BLOCK[3], BLOCK)
        q = q % BLOCK[3]
        outside = _bits(ad < before[0], ah < before[1], aw < before[2])
        outside |= _bits(ad >= last[0], ah >= last[1], aw >= last[2]) << 3
        g_filters += (ad - before[0]).to(INDEX) * g_strides[1] + (ah - before[1]).to(INDEX) * g_strides[2]
        g_filters = (g_filters + (aw - before[2]).to(INDEX) * g_strides[3]) * G_UNIT
        dw_columns += (ad - front[0]) * dw_strides[1] + (ah - front[1]) * dw_strides[2] + (aw - front[2]) * dw_strides[3]
        ahead = _bits(ad < front[0], ah < front[1], aw < front[2])
        in_dw &= (_bits(td == 0, th == 0, tw == 0)[:, None] & ahead[None, :]) == 0
        td = td * BLOCK[0]
        th = th * BLOCK[1]
        tw = tw * BLOCK[2]
    g_filters += (group * produced + q).to(INDEX) * g_strides[4]
    dw_columns += (group * produced + q).to(INDEX) * dw_strides[0]

    share = tl.cdiv(tl.cdiv(pixels, BLOCK_K), splits).to(INDEX) * BLOCK_K
    begin = split * share
    end = tl.minimum(begin + share, pixels)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for chain in range(begin, end, CHAIN):
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for first in range(chain, tl.minimum(chain + CHAIN, end), BLOCK_K):
            p = first + tl.arange(0, BLOCK_K)
            in_p = p < end
            lines = p // y_size[2]
            planes = lines // y_size[1]
            n = planes // y_size[0]
            jw = (p - lines * y_size[2]).to(tl.int32)
            jh = (lines - planes * y_size[1]).to(tl.int32)
            jd = (planes - n * y_size[0]).to(tl.int32)
            n = n.to(INDEX)
            xd = jd * stride[0] - pad[0]
            xh = jh * stride[1] - pad[1]
            xw = jw * stride[2] - pad[2]
            valid = tl.full([BLOCK_K], 0, BITS)
            valid = tap_bits(valid, 0, xw, dilation[2], x_size[2], KERNEL_W, False)
            valid = tap_bits(valid, KERNEL_W, xh, dilation[1], x_size[1], KERNEL_H, False)
            valid = tap_bits(valid, KERNEL_W + KERNEL_H, xd, dilation[0], x_size[0], KERNEL_D, False)
            unmet = tl.where(in_p, ~valid, -1)
            x_pixels = n * x_strides[0] + xd.to(INDEX) * x_strides[2]
            x_pixels += xh.to(INDEX) * x_strides[3] + xw.to(INDEX) * x_strides[4]
            in_g = in_p[:, None] & in_q[None, :]
            if BLOCK is not None:  # the first and the last blocks may reach beyond y
                ends = _bits(jd == y_size[0] - 1, jh == y_size[1] - 1, jw == y_size[2] - 1)
                ends = _bits(jd == 0, jh == 0, jw == 0) | (ends << 3)
                in_g &= (ends[:, None] & outside[None, :]) == 0
                jd = jd * BLOCK[0]
                jh = jh * BLOCK[1]
                jw = jw * BLOCK[2]
            g_pixels = n * g_strides[0] + jd.to(INDEX) * g_strides[1]
            g_pixels = (g_pixels + jh.to(INDEX) * g_strides[2] + jw.to(INDEX) * g_strides[3]) * G_UNIT
            in_x = (needed[:, None] & unmet[None, :]) == 0
            x = tl.load(x_ptr + (x_taps[:, None] + x_pixels[None, :]), mask=in_x, other=0.0)
            grad = tl.load(grad_ptr + (g_pixels[:, None] + g_filters[None, :]), mask=in_g, other=0.0)
            acc = dot(x, grad, acc, PRECISION, UPCAST)
        total += acc

    dw_rows = td * dw_strides[1] + th * dw_strides[2] + tw * dw_strides[3] + channel * dw_strides[4]
    dw_tile = dw_ptr + split.to(INDEX) * split_stride + (dw_rows[:, None] + dw_columns[None, :])
    tl.store(dw_tile, rounded(total, dw_ptr.dtype.element_ty, UPCAST), mask=in_dw)
