"""forward and dgrad of a depthwise convolution: every lane owns one channel and a strip of ROWS x COLUMNS pixels.

    slide   small kernels: all taps of a channel stay in registers, and every plane of the input is read once
    rows    any kernel: one row of taps at a time

Tensors are one-dimensional: lanes run over channels and strips, channels fastest where memory has them dense, so that
neighbours in a warp read neighbours in memory. Every pixel of a strip is a tensor of its own: an input is loaded and
converted once for all outputs and taps that it meets. What meets what along one dimension is known when a kernel is
compiled: AXIS = (kernel, stride, dilation, padding before), positions counted from the strip's own start. Sizes and
strides are run-time values, in units that prove the alignment of vectors; the step from pixel to pixel along W is not,
so that loads carry it as an immediate.
"""

import triton
import triton.language as tl

from ..implicit_gemm.taps import parity_class
from .axes import count, position, ring_size, row_of_taps, stride, strip_step, taps
from .lanes import add_row, in_elements, lanes, load_line, store_line, tile_of


@triton.jit
def slide(
    x_ptr,
    w_ptr,
    bias_ptr,
    y_ptr,
    x_size,  # (d, h, w)
    y_size,
    pad_d,
    x_strides,  # (n, c, d, h) in X_UNIT
    w_strides,  # (filter, d, h, w) in elements
    y_strides,  # (n, c, d, h) in Y_UNIT
    channels,  # of the result, in C_UNIT
    tile,  # lanes along (channels in C_UNIT, H, W)
    tiles,
    strips,  # along (H, W)
    chunk,  # planes of the result that one program computes
    chunks,
    residual_ptr,  # None, or with the strides of y
    slope,
    X_UNIT: tl.constexpr,
    Y_UNIT: tl.constexpr,
    C_UNIT: tl.constexpr,
    X_PIXEL: tl.constexpr,
    Y_PIXEL: tl.constexpr,
    X_GROUP: tl.constexpr,
    Y_GROUP: tl.constexpr,
    X_EVEN: tl.constexpr,
    Y_EVEN: tl.constexpr,
    LAST: tl.constexpr,  # the channels of x are dense
    Y_LAST: tl.constexpr,
    MULTIPLIER: tl.constexpr,
    DGRAD: tl.constexpr,
    DEPTH: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    INDEX: tl.constexpr,
    UPCAST: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Planes of the input pass by; an accumulator is open for every plane of the result that still awaits some."""
    n, tile_c, tile_h, tile_w, part = tile_of(tl.program_id(0), tiles, chunks, LAST)
    c, h, w, inside = lanes(tile, C_UNIT, LAST, BLOCK)
    c += tile_c * tile[0] * C_UNIT
    inside &= c < channels * C_UNIT
    inside &= (tile_h * tile[1] + h < strips[0]) & (tile_w * tile[2] + w < strips[1])
    h = tl.minimum(tile_h * tile[1] + h, strips[0] - 1)
    w = tl.minimum(tile_w * tile[2] + w, strips[1] - 1)

    x_n, x_c, x_d, x_h = in_elements(x_strides, X_UNIT, INDEX)
    y_n, y_c, y_d, y_h = in_elements(y_strides, Y_UNIT, INDEX)
    xh = h * strip_step(ROWS, HEIGHT, DGRAD)
    xw = w * strip_step(COLUMNS, WIDTH, DGRAD)
    yh = h * ROWS
    yw = w * COLUMNS
    x_lane = (c // MULTIPLIER).to(INDEX) * (1 if LAST else x_c) + xh * x_h + xw.to(INDEX) * X_PIXEL
    y_lane = c.to(INDEX) * (1 if Y_LAST else y_c) + yh * y_h + yw.to(INDEX) * Y_PIXEL
    x_ptr += n * x_n
    y_ptr += n * y_n

    w_k, w_d, w_h, w_w = in_elements(w_strides, 1, INDEX)
    weights = ()
    for kd in tl.static_range(taps(DEPTH)):
        for kh in tl.static_range(taps(HEIGHT)):
            row_of_weights = ()
            for kw in tl.static_range(taps(WIDTH)):
                tap_ptr = w_ptr + (kd * w_d + kh * w_h + kw * w_w) + c * w_k
                row_of_weights += (tl.load(tap_ptr, mask=inside, other=0.0).to(tl.float32),)
            weights += (row_of_weights,)
    initial = tl.zeros([BLOCK], tl.float32)
    if BIAS:
        initial += tl.load(bias_ptr + c, mask=inside, other=0.0).to(tl.float32)

    RING: tl.constexpr = ring_size(DEPTH, DGRAD)
    PLANES: tl.constexpr = 1 if DGRAD else stride(DEPTH)  # of the input, that one step reads
    DONE: tl.constexpr = stride(DEPTH) if DGRAD else 1  # planes of the result that one step completes
    STRIDE: tl.constexpr = stride(DEPTH)
    first = part * chunk
    end = tl.minimum(first + chunk, y_size[0])
    if DGRAD:
        step_0 = (tl.maximum(first + pad_d - (RING - 1), 0) + STRIDE - 1) // STRIDE
        steps = (end - 1 + pad_d) // STRIDE + 1
    else:
        step_0 = first
        steps = end + RING - 1
    empty_row = ()
    for _ in tl.static_range(COLUMNS):
        empty_row += (initial,)
    acc = ()
    for _ in tl.static_range(RING * ROWS):
        acc += (empty_row,)
    for step in range(step_0, steps):
        for p in tl.static_range(PLANES):
            z = step if DGRAD else step * STRIDE + p - pad_d
            height = tl.where((z >= 0) & (z < x_size[0]), x_size[1], 0)
            plane_ptr = x_ptr + tl.minimum(tl.maximum(z, 0), x_size[0] - 1) * x_d
            for r in tl.static_range(count(ROWS, HEIGHT, DGRAD)):
                in_row = inside & ((xh + position(r, ROWS, HEIGHT, DGRAD)).to(tl.uint32, bitcast=True) < height)
                row_ptr = plane_ptr + position(r, ROWS, HEIGHT, DGRAD) * x_h
                line = load_line(
                    row_ptr, x_lane, xw, x_size[2], in_row, X_PIXEL, X_GROUP, X_EVEN, COLUMNS, WIDTH, DGRAD, BLOCK
                )
                for b in tl.static_range(RING):
                    for i in tl.static_range(ROWS):
                        if row_of_taps(p, b, i, r, ROWS, DEPTH, HEIGHT, DGRAD) >= 0:
                            row_of_weights = weights[row_of_taps(p, b, i, r, ROWS, DEPTH, HEIGHT, DGRAD)]
                            added = add_row(acc[b * ROWS + i], line, row_of_weights, COLUMNS, WIDTH, DGRAD)
                            acc = acc[: b * ROWS + i] + (added,) + acc[b * ROWS + i + 1 :]
        for b in tl.static_range(DONE):
            o = step * STRIDE - pad_d + b if DGRAD else step - (RING - 1)
            if (o >= first) & (o < end):
                for i in tl.static_range(ROWS):
                    store_line(
                        y_ptr + o * y_d + i * y_h, residual_ptr, n * y_n + o * y_d + i * y_h, y_lane, yw, y_size[2],
                        inside & (yh + i < y_size[1]), acc[b * ROWS + i], slope,
                        Y_PIXEL, Y_GROUP, Y_EVEN, COLUMNS, ACTIVATION, UPCAST, BLOCK,
                    )  # fmt: skip
        acc = acc[DONE * ROWS :]
        for _ in tl.static_range(DONE * ROWS):
            acc += (empty_row,)


@triton.jit
def _add_taps(
    acc,
    row_ptr,
    lane,
    at,
    size,
    in_row,
    w_ptr,
    w_step,
    inside,
    PIXEL: tl.constexpr,
    GROUP: tl.constexpr,
    EVEN: tl.constexpr,
    COLUMNS: tl.constexpr,
    AXIS: tl.constexpr,
    DGRAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row of taps, or a part of it: its weights and its inputs are loaded and joined to the accumulators."""
    weights = ()
    for t in tl.static_range(taps(AXIS)):
        weights += (tl.load(w_ptr + t * w_step, mask=inside, other=0.0),)
    line = load_line(row_ptr, lane, at, size, in_row, PIXEL, GROUP, EVEN, COLUMNS, AXIS, DGRAD, BLOCK)
    return add_row(acc, line, weights, COLUMNS, AXIS, DGRAD)


@triton.jit
def rows(
    x_ptr,
    w_ptr,  # float32 (d, h, w, channel), dense
    bias_ptr,
    y_ptr,
    x_size,  # (d, h, w)
    y_size,
    kernel,
    scale,  # (d, h), as every pair: input positions from one output to the next
    start,  # input position of the first output's first tap; of a strided dgrad: the padding
    step,  # input positions from tap to tap
    stride,  # of a strided dgrad: the parity classes
    dilation,
    tap_step,
    x_strides,  # (n, c, d, h) in X_UNIT
    y_strides,  # (n, c, d, h) in Y_UNIT
    channels,  # of the result, in C_UNIT
    filters,  # channels of the weight, in C_UNIT
    multiplier,  # filters of one channel
    parts,  # of a row of taps
    tile,  # lanes along (channels in C_UNIT, H, W)
    tiles,
    strips,  # along W
    chunk,  # planes of the result, or of a parity class of it, that one program computes
    chunks,
    residual_ptr,  # None, or with the strides of y
    slope,
    X_UNIT: tl.constexpr,
    Y_UNIT: tl.constexpr,
    C_UNIT: tl.constexpr,
    X_PIXEL: tl.constexpr,
    Y_PIXEL: tl.constexpr,
    X_GROUP: tl.constexpr,
    Y_GROUP: tl.constexpr,
    X_EVEN: tl.constexpr,
    Y_EVEN: tl.constexpr,
    LAST: tl.constexpr,
    Y_LAST: tl.constexpr,
    MULTIPLIED: tl.constexpr,
    DGRAD: tl.constexpr,
    STRIDED: tl.constexpr,
    WIDTH: tl.constexpr,  # of one part
    REST: tl.constexpr,  # of the taps that are left over
    SHIFT: tl.constexpr,  # input columns from part to part
    BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    INDEX: tl.constexpr,
    UPCAST: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Strips of one row. Of a strided dgrad program_id(1) is the parity class of (D, H): its taps all divide."""
    taps_d, taps_h = kernel[0], kernel[1]
    first_d, first_h = 0, 0
    start_d, start_h = start[0], start[1]
    planes, lines = y_size[0], y_size[1]
    index_d, index_h = 0, 0
    if STRIDED:
        index_d = tl.program_id(1) // stride[1]
        index_h = tl.program_id(1) % stride[1]
        taps_d, first_d, start_d, planes = parity_class(
            index_d, start[0], y_size[0], kernel[0], stride[0], dilation[0], tap_step[0]
        )
        taps_h, first_h, start_h, lines = parity_class(
            index_h, start[1], y_size[1], kernel[1], stride[1], dilation[1], tap_step[1]
        )
    n, tile_c, tile_h, tile_w, part = tile_of(tl.program_id(0), tiles, chunks, LAST)
    c, h, w, inside = lanes(tile, C_UNIT, LAST, BLOCK)
    c += tile_c * tile[0] * C_UNIT
    h += tile_h * tile[1]
    w += tile_w * tile[2]
    inside &= (c < channels * C_UNIT) & (h < lines) & (w < strips)
    h = tl.minimum(h, tl.maximum(lines - 1, 0))
    w = tl.minimum(w, strips - 1)

    x_n, x_c, x_d, x_h = in_elements(x_strides, X_UNIT, INDEX)
    y_n, y_c, y_d, y_h = in_elements(y_strides, Y_UNIT, INDEX)
    x_step = 1 if LAST else x_c
    x_channel = c
    if MULTIPLIED:
        x_channel = c * multiplier if DGRAD else c // multiplier
    xh = h * scale[1] + start_h
    xw = w * strip_step(COLUMNS, WIDTH, DGRAD)
    yh = h * stride[1] + index_h
    yw = w * COLUMNS
    x_lane = x_channel.to(INDEX) * x_step + xh * x_h + xw.to(INDEX) * X_PIXEL
    y_lane = c.to(INDEX) * (1 if Y_LAST else y_c) + yh * y_h + yw.to(INDEX) * Y_PIXEL
    x_ptr += n * x_n
    y_ptr += n * y_n
    w_ptr += x_channel if DGRAD else c
    w_step = filters * C_UNIT
    initial = tl.zeros([BLOCK], tl.float32)
    if BIAS:
        initial += tl.load(bias_ptr + c, mask=inside, other=0.0).to(tl.float32)

    for j in range(part * chunk, tl.minimum((part + 1) * chunk, planes)):
        acc = ()
        for _ in tl.static_range(COLUMNS):
            acc += (initial,)
        for m in range(multiplier if DGRAD else 1):
            for td in range(taps_d):
                z = j * scale[0] + start_d + td * step[0]
                height = tl.where((z >= 0) & (z < x_size[0]), x_size[1], 0)
                plane_ptr = x_ptr + tl.minimum(tl.maximum(z, 0), x_size[0] - 1) * x_d
                for th in range(taps_h):
                    in_row = inside & ((xh + th * step[1]).to(tl.uint32, bitcast=True) < height)
                    row_ptr = plane_ptr + th * step[1] * x_h + m * x_step
                    tap = (first_d + td * tap_step[0]) * kernel[1] + first_h + th * tap_step[1]
                    tap_ptr = w_ptr + tap * kernel[2] * w_step + m
                    for q in range(parts):
                        acc = _add_taps(
                            acc, row_ptr + q * (SHIFT * X_PIXEL), x_lane, xw + q * SHIFT, x_size[2], in_row,
                            tap_ptr + q * taps(WIDTH) * w_step, w_step, inside,
                            X_PIXEL, X_GROUP, X_EVEN, COLUMNS, WIDTH, DGRAD, BLOCK,
                        )  # fmt: skip
                    if taps(REST) > 0:
                        acc = _add_taps(
                            acc, row_ptr + parts * (SHIFT * X_PIXEL), x_lane, xw + parts * SHIFT, x_size[2], in_row,
                            tap_ptr + parts * taps(WIDTH) * w_step, w_step, inside,
                            X_PIXEL, X_GROUP, X_EVEN, COLUMNS, REST, DGRAD, BLOCK,
                        )  # fmt: skip
        plane = (j * stride[0] + index_d) * y_d
        store_line(
            y_ptr + plane, residual_ptr, n * y_n + plane, y_lane, yw, y_size[2], inside, acc, slope,
            Y_PIXEL, Y_GROUP, Y_EVEN, COLUMNS, ACTIVATION, UPCAST, BLOCK,
        )  # fmt: skip
