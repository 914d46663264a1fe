"""wgrad of a depthwise convolution, in two stages: partial sums of each program's share of the pixels, then their sum.

Lanes and strips as in kernels.py. A lane keeps one float32 accumulator for every tap of its channel (or of a block of
them, where the kernel has too many); the planes of the input pass by, each read once, and meet the planes of the
gradient that are still open. Both stages add in a fixed order: equal inputs give equal bits.
"""

import triton
import triton.language as tl

from ..implicit_gemm.kernels import rounded
from .axes import count, dilation, position, ring_size, row_of_taps, slot_of, stride, strip_step, taps
from .lanes import in_elements, lanes, load_line


@triton.jit
def _add_products(sums, line, grads, COLUMNS: tl.constexpr, AXIS: tl.constexpr):
    """sums[t] += sum over outputs j of one row of grads[j] * the input that output j meets through tap t."""
    added = ()
    for t in tl.static_range(taps(AXIS)):
        value = sums[t]
        for j in tl.static_range(COLUMNS):
            value = tl.fma(line[slot_of(j, t, COLUMNS, AXIS, False)], grads[j], value)
        added += (value,)
    return added


@triton.jit
def wgrad(
    grad_ptr,
    x_ptr,
    partials_ptr,  # (split, d, h, w, filter), float32
    x_size,  # (d, h, w)
    y_size,
    pad_d,
    kernel,
    blocks,  # of taps, along (d, h, w)
    x_strides,  # (n, c, d, h) in X_UNIT
    g_strides,  # (n, c, d, h) in G_UNIT
    filters,  # in C_UNIT
    multiplier,
    tile,  # lanes along (channels in C_UNIT, H, W)
    tiles,
    strips,  # along (H, W)
    chunk,  # planes of the gradient in one unit of work
    chunks,
    units,  # of work: (n, part of the depth, tile of H, of W)
    share,  # units of one split
    X_UNIT: tl.constexpr,
    G_UNIT: tl.constexpr,
    C_UNIT: tl.constexpr,
    X_PIXEL: tl.constexpr,
    G_PIXEL: tl.constexpr,
    X_GROUP: tl.constexpr,
    G_GROUP: tl.constexpr,
    X_EVEN: tl.constexpr,
    G_EVEN: tl.constexpr,
    LAST: tl.constexpr,
    G_LAST: tl.constexpr,
    DEPTH: tl.constexpr,  # of one block of taps, as HEIGHT and WIDTH
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    INDEX: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHANNELS: tl.constexpr,  # of one tile
    BLOCK: tl.constexpr,
):
    ITSELF: tl.constexpr = (1, 1, 1, 0)  # output j meets the gradient at j
    RING: tl.constexpr = ring_size(DEPTH, False)
    STRIDE: tl.constexpr = stride(DEPTH)
    program = tl.program_id(0)
    tile_c = program % tiles[0]
    block = program // tiles[0] % (blocks[0] * blocks[1] * blocks[2])
    split = program // (tiles[0] * blocks[0] * blocks[1] * blocks[2])
    tap_w = block % blocks[2] * taps(WIDTH)
    tap_h = block // blocks[2] % blocks[1] * taps(HEIGHT)
    tap_d = block // (blocks[2] * blocks[1]) * taps(DEPTH)

    c, lane_h, lane_w, in_tile = lanes(tile, C_UNIT, LAST, BLOCK)
    c += tile_c * CHANNELS
    in_tile &= c < filters * C_UNIT
    x_n, x_c, x_d, x_h = in_elements(x_strides, X_UNIT, INDEX)
    g_n, g_c, g_d, g_h = in_elements(g_strides, G_UNIT, INDEX)
    x_channel = (c // multiplier).to(INDEX) * (1 if LAST else x_c)
    g_channel = c.to(INDEX) * (1 if G_LAST else g_c)

    zero = tl.zeros([BLOCK], tl.float32)
    row_of_sums = ()
    for _ in tl.static_range(taps(WIDTH)):
        row_of_sums += (zero,)
    sums = ()
    for _ in tl.static_range(taps(DEPTH) * taps(HEIGHT)):
        sums += (row_of_sums,)
    row_of_grads = ()
    for _ in tl.static_range(COLUMNS):
        row_of_grads += (zero,)
    plane_of_grads = ()
    for _ in tl.static_range(ROWS):
        plane_of_grads += (row_of_grads,)

    for unit in range(split * share, tl.minimum((split + 1) * share, units)):
        h = unit // tiles[2] % tiles[1] * tile[1] + lane_h
        w = unit % tiles[2] * tile[2] + lane_w
        part = unit // (tiles[2] * tiles[1]) % chunks
        n = unit // (tiles[2] * tiles[1]) // chunks
        inside = in_tile & (h < strips[0]) & (w < strips[1])
        gh = tl.minimum(h, strips[0] - 1) * ROWS
        gw = tl.minimum(w, strips[1] - 1) * COLUMNS
        xh = tl.minimum(h, strips[0] - 1) * strip_step(ROWS, HEIGHT, False) + tap_h * dilation(HEIGHT)
        xw = tl.minimum(w, strips[1] - 1) * strip_step(COLUMNS, WIDTH, False) + tap_w * dilation(WIDTH)
        g_lane = g_channel + gh * g_h + gw.to(INDEX) * G_PIXEL
        x_lane = x_channel + xh * x_h + xw.to(INDEX) * X_PIXEL
        ring = ()
        for _ in tl.static_range(RING):
            ring += (plane_of_grads,)
        end = tl.minimum((part + 1) * chunk, y_size[0])
        for step in range(part * chunk, end + RING - 1):
            height = tl.where(step < end, y_size[1], 0)
            plane_ptr = grad_ptr + n * g_n + tl.minimum(step, y_size[0] - 1) * g_d
            grads = ()
            for i in tl.static_range(ROWS):
                grads += (
                    load_line(
                        plane_ptr + i * g_h, g_lane, gw, y_size[2], inside & (gh + i < height),
                        G_PIXEL, G_GROUP, G_EVEN, COLUMNS, ITSELF, False, BLOCK,
                    ),
                )  # fmt: skip
            ring = ring[1:] + (grads,)
            for p in tl.static_range(STRIDE):
                z = step * STRIDE + p - pad_d + tap_d * dilation(DEPTH)
                height = tl.where((z >= 0) & (z < x_size[0]), x_size[1], 0)
                plane_ptr = x_ptr + n * x_n + tl.minimum(tl.maximum(z, 0), x_size[0] - 1) * x_d
                for r in tl.static_range(count(ROWS, HEIGHT, False)):
                    row = xh + position(r, ROWS, HEIGHT, False)
                    in_row = inside & (row.to(tl.uint32, bitcast=True) < height)
                    line = load_line(
                        plane_ptr + position(r, ROWS, HEIGHT, False) * x_h, x_lane, xw, x_size[2], in_row,
                        X_PIXEL, X_GROUP, X_EVEN, COLUMNS, WIDTH, False, BLOCK,
                    )  # fmt: skip
                    for b in tl.static_range(RING):
                        for i in tl.static_range(ROWS):
                            if row_of_taps(p, b, i, r, ROWS, DEPTH, HEIGHT, False) >= 0:
                                added = _add_products(
                                    sums[row_of_taps(p, b, i, r, ROWS, DEPTH, HEIGHT, False)],
                                    line, ring[b][i], COLUMNS, WIDTH,
                                )  # fmt: skip
                                sums = (
                                    sums[: row_of_taps(p, b, i, r, ROWS, DEPTH, HEIGHT, False)]
                                    + (added,)
                                    + sums[row_of_taps(p, b, i, r, ROWS, DEPTH, HEIGHT, False) + 1 :]
                                )

    k = tile_c * CHANNELS + tl.arange(0, CHANNELS)
    for kd in tl.static_range(taps(DEPTH)):
        for kh in tl.static_range(taps(HEIGHT)):
            for kw in tl.static_range(taps(WIDTH)):
                value = sums[kd * taps(HEIGHT) + kh][kw]
                if LAST:
                    total = tl.sum(tl.reshape(value, [BLOCK // CHANNELS, CHANNELS]), 0)
                else:
                    total = tl.sum(tl.reshape(value, [CHANNELS, BLOCK // CHANNELS]), 1)
                tap = ((split * kernel[0] + tap_d + kd) * kernel[1] + tap_h + kh) * kernel[2] + tap_w + kw
                exists = (tap_d + kd < kernel[0]) & (tap_h + kh < kernel[1]) & (tap_w + kw < kernel[2])
                wanted = tl.where(exists, filters * C_UNIT, 0)
                tl.store(partials_ptr + tap * (filters * C_UNIT) + k, total, mask=k < wanted)


@triton.jit
def reduce_partials(
    partials_ptr,  # (split, d, h, w, filter), float32
    dw_ptr,
    kernel,
    filters,
    dw_strides,  # (filter, d, h, w)
    splits,
    UPCAST: tl.constexpr,
    SPLITS: tl.constexpr,  # at once
    ELEMENTS: tl.constexpr,  # of dw, of one program
):
    elements = kernel[0] * kernel[1] * kernel[2] * filters
    at = tl.program_id(0) * ELEMENTS + tl.arange(0, ELEMENTS)
    split = tl.arange(0, SPLITS)[:, None]
    total = tl.zeros([SPLITS, ELEMENTS], tl.float32)
    for first in range(0, splits, SPLITS):
        mask = (first + split < splits) & (at < elements)[None, :]
        total += tl.load(partials_ptr + (first + split) * elements + at[None, :], mask=mask, other=0.0)
    k = at % filters
    tap = at // filters
    offset = k * dw_strides[0] + tap // (kernel[2] * kernel[1]) * dw_strides[1]
    offset += tap // kernel[2] % kernel[1] * dw_strides[2] + tap % kernel[2] * dw_strides[3]
    value = rounded(tl.sum(total, 0), dw_ptr.dtype.element_ty, UPCAST)
    tl.store(dw_ptr + offset, value, mask=at < elements)
