"""forward and dgrad by a ring (ring.py), on the bricks of engines/tma, or on rows of pixels by im2col copies.

    gather_ring  y[j, q] = sum over views v, taps t and channels r of  x_v[j * scale + start_v + t * step, r] * w[q, r, t]

As in engines/tma/kernels.py, filters are the left operand and the pixels of a tile the right one, and taps along depth are
left out through which a tile only reads padding. What both sides of the ring have to agree about is in :func:`tile_at`,
:func:`first_of`, :func:`taps_of` and :func:`part`.

IM2COL: a tile is so many pixels as follow one another (:func:`pixel_at`), whatever the sizes, so that only the last one has
pixels beyond the end. In this mode the copy engine walks along w, h and one dimension more between the two corners of its
descriptor, in steps of the stride, and then to the next of the outermost; each pixel is read at an offset from there, not
negative. Outermost is depth here, where a tap is a coordinate, not an offset: then tiles are of few depths, and leave out
taps, as bricks do; and views meet a stride along depth, which that dimension has not.
"""

import triton
import triton.language as tl

from ..epilogue import activated
from ..implicit_gemm.taps import class_at, live_taps, parity_class
from ..tma.kernels import _digits
from .gluon import gl, gluon, load, load_im2col, mbarrier
from .ring import PRODUCER_REGISTERS, barriers, multiply, next_digit, next_stage, part


@triton.jit
def tile_at(index, tiles_n, bricks, splits, groups):
    """Tile index -> (tile of channels, (n, d, h, w) of its brick, split, group, parity class), the first fastest.

    Neighbours in time read the same bricks, then their neighbours.
    """
    all_bricks = bricks[0] * bricks[1] * bricks[2] * bricks[3]
    n, d, h, w = _digits(index // tiles_n % all_bricks, bricks)
    rest = index // (tiles_n * all_bricks)
    return index % tiles_n, n, d, h, w, rest % splits, rest // splits % groups, rest // (splits * groups)


@triton.jit
def pixel_at(index, y_size):
    """Place of a pixel in a row of all of them -> (n, d, h, w): w fastest, then h, then the samples of one depth."""
    d, n, h, w = _digits(index, (y_size[1], y_size[0], y_size[2], y_size[3]))
    return n, d, h, w


@triton.jit
def first_of(n, d, h, w, y_size, BRICK: tl.constexpr, IM2COL: tl.constexpr):
    """Tile (n, d, h, w) -> its first pixel (n, d, h, w), and the planes from it to the last."""
    if IM2COL:
        first = w * BRICK[3]
        _, last, _, _ = pixel_at(first + BRICK[3] - 1, y_size)
        n, d, h, w = pixel_at(first, y_size)
        planes = last - d + 1
    else:
        n, d, h, w = n * BRICK[0], d * BRICK[1], h * BRICK[2], w * BRICK[3]
        planes = BRICK[1]
    return n, d, h, w, planes


@triton.jit
def taps_of(
    view,
    index,
    d,  # first plane of the tile
    planes,
    scale,
    step,
    tap_step,
    kernel,
    y_size,
    stride,
    dilation,
    STRIDED: tl.constexpr,
):
    """(taps, first, start) of a view, each (d, h, w); of a strided dgrad those of a parity class.

    Along depth without those that only read padding, for the whole tile.
    """
    taps_d, taps_h, taps_w = view[0]
    first_d, first_h, first_w = view[1]
    start_d, start_h, start_w = view[2]
    rows_d = y_size[1]
    if STRIDED:
        index_d, index_h, index_w = class_at(index, stride)
        taps_d, first_d, start_d, rows_d = parity_class(
            index_d, start_d, y_size[1], kernel[0], stride[0], dilation[0], tap_step[0]
        )
        taps_h, first_h, start_h, _ = parity_class(
            index_h, start_h, y_size[2], kernel[1], stride[1], dilation[1], tap_step[1]
        )
        taps_w, first_w, start_w, _ = parity_class(
            index_w, start_w, y_size[3], kernel[2], stride[2], dilation[2], tap_step[2]
        )
    lo, hi = live_taps(d, tl.minimum(d + planes, rows_d) - 1, scale[0], start_d, step[0], view[3][0], taps_d)
    first_d, start_d = first_d + lo * tap_step[0], start_d + lo * step[0]
    return hi - lo, taps_h, taps_w, first_d, first_h, first_w, start_d, start_h, start_w


@gluon.jit
def _produce(
    w,
    xs,
    views,
    scale,
    step,
    tap_step,
    kernel,
    y_size,
    bricks,
    stride,
    dilation,
    reduced,
    produced,
    splits,
    groups,
    tiles,
    w_ring,
    x_ring,
    full,
    empty,
    VIEWS: gl.constexpr,
    DGRAD: gl.constexpr,
    STRIDED: gl.constexpr,
    BRICK: gl.constexpr,
    IM2COL: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr,
):
    BYTES: gl.constexpr = w.block_type.nbytes + xs[0].block_type.nbytes
    blocks = tl.cdiv(reduced, BLOCK_K)
    tiles_n = tl.cdiv(produced, BLOCK_N)
    stage = 0
    parity = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        tile_n, n, d, h, w_, split, group, index = tile_at(tile, tiles_n, bricks, splits, groups)
        n, d, h, w_, planes = first_of(n, d, h, w_, y_size, BRICK, IM2COL)
        for view in gl.static_range(VIEWS):
            x = xs[view]
            taps_d, taps_h, taps_w, first_d, first_h, first_w, start_d, start_h, start_w = taps_of(
                views[view], index, d, planes, scale, step, tap_step, kernel, y_size, stride, dilation, STRIDED
            )
            x_d = d * scale[0] + start_d
            x_h = h * scale[1] + start_h
            x_w = w_ * scale[2] + start_w
            if IM2COL:  # offsets are counted from the lowest tap
                low_h = tl.minimum((taps_h - 1) * step[1], 0)
                low_w = tl.minimum((taps_w - 1) * step[2], 0)
                x_h += low_h
                x_w += low_w
            # One flat loop over taps and channel blocks, of which this split takes its part.
            begin, end = part(taps_d * taps_h * taps_w * blocks, split, splits)
            block = begin % blocks
            tap = begin // blocks
            tw = tap % tl.maximum(taps_w, 1)
            th = tap // tl.maximum(taps_w, 1) % tl.maximum(taps_h, 1)
            td = tap // tl.maximum(taps_h * taps_w, 1)
            for _ in range(begin, end):
                r = block * BLOCK_K
                w_tap = (first_d + td * tap_step[0]) * kernel[1] + first_h + th * tap_step[1]
                w_tap = w_tap * kernel[2] + first_w + tw * tap_step[2]
                mbarrier.wait(empty.index(stage), parity ^ 1)
                mbarrier.expect(full.index(stage), BYTES)
                if IM2COL:
                    x_at = [x_d + td * step[0], n, x_h, x_w, group * reduced + r]
                    at_h = th * step[1] - low_h
                    at_w = tw * step[2] - low_w
                    load_im2col(x, x_at, at_h, at_w, full.index(stage), x_ring.index(stage))
                else:
                    x_at = [n, x_d + td * step[0], x_h + th * step[1], x_w + tw * step[2], group * reduced + r]
                    load(x, x_at, full.index(stage), x_ring.index(stage))
                if DGRAD:
                    w_at = [w_tap, group * reduced + r, tile_n * BLOCK_N]
                else:
                    w_at = [w_tap, group * produced + tile_n * BLOCK_N, r]
                load(w, w_at, full.index(stage), w_ring.index(stage))
                stage, parity = next_stage(stage, parity, STAGES)
                block, carry = next_digit(block, 1, blocks)
                tw, carry = next_digit(tw, carry, taps_w)
                th, carry = next_digit(th, carry, taps_h)
                td += carry


@gluon.jit
def _write(
    sums,
    y_ptr,  # of the split
    bias_ptr,
    residual_ptr,
    slope,
    at,  # first pixel (n, d, h, w) of the brick, in its parity class; its place in the row of all, (0, 0, 0, place)
    first,  # pixel (d, h, w) of the class, and
    by,  # from one of its pixels to the next
    y_size,
    y_strides,
    group,  # its first channel
    q,  # first channel of the tile in its group
    produced,
    begin: gl.constexpr,  # first pixel of these sums in the tile
    BIAS: gl.constexpr,
    ACTIVATION: gl.constexpr,
    Y_UNIT: gl.constexpr,
    INDEX: gl.constexpr,
    BRICK: gl.constexpr,
    IM2COL: gl.constexpr,
    WIDTH: gl.constexpr,
    WRITTEN: gl.constexpr,
):
    """What follows the sums, and the result: for no more pixels at once than registers are left for."""
    CHANNELS: gl.constexpr = sums.shape[0]
    PIXELS: gl.constexpr = sums.shape[1]
    if PIXELS > WIDTH:
        HALF: gl.constexpr = PIXELS // 2
        left, right = gl.split(gl.permute(gl.reshape(sums, [CHANNELS, 2, HALF]), (0, 2, 1)))
        _write(left, y_ptr, bias_ptr, residual_ptr, slope, at, first, by, y_size, y_strides, group, q, produced, begin,
               BIAS, ACTIVATION, Y_UNIT, INDEX, BRICK, IM2COL, WIDTH, WRITTEN)  # fmt: skip
        _write(right, y_ptr, bias_ptr, residual_ptr, slope, at, first, by, y_size, y_strides, group, q, produced,
               begin + HALF, BIAS, ACTIVATION, Y_UNIT, INDEX, BRICK, IM2COL, WIDTH, WRITTEN)  # fmt: skip
    else:
        channel = q + gl.arange(0, CHANNELS, layout=gl.SliceLayout(1, WRITTEN))
        in_q = channel < produced
        in_n, in_d, in_h, in_w = _digits(begin + gl.arange(0, PIXELS, layout=gl.SliceLayout(0, WRITTEN)), BRICK)
        in_n += at[0]
        in_d = (in_d + at[1]) * by[0] + first[0]
        in_h = (in_h + at[2]) * by[1] + first[1]
        in_w = (in_w + at[3]) * by[2] + first[2]
        if IM2COL:
            in_n, in_d, in_h, in_w = pixel_at(in_w, y_size)
        inside = (in_n < y_size[0]) & (in_d < y_size[1]) & (in_h < y_size[2]) & (in_w < y_size[3])
        y_pixels = in_n.to(INDEX) * y_strides[0] + in_d.to(INDEX) * y_strides[1]
        y_pixels = (y_pixels + in_h.to(INDEX) * y_strides[2] + in_w.to(INDEX) * y_strides[3]) * Y_UNIT
        y_channels = (group + channel).to(INDEX) * y_strides[4]
        y_tile = gl.expand_dims(y_channels, 1) + gl.expand_dims(y_pixels, 0)
        in_y = gl.expand_dims(in_q, 1) & gl.expand_dims(inside, 0)
        value = gl.convert_layout(sums, WRITTEN)
        if BIAS:
            bias = gl.load(bias_ptr + group + channel, mask=in_q, other=0.0)
            value += gl.expand_dims(bias.to(gl.float32), 1)
        if residual_ptr is not None:
            value += gl.load(residual_ptr + y_tile, mask=in_y, other=0.0).to(gl.float32)
        value = activated(value, ACTIVATION, slope)
        gl.store(y_ptr + y_tile, value.to(y_ptr.dtype.element_ty), mask=in_y)


@gluon.jit
def _consume(
    y_ptr,
    bias_ptr,
    residual_ptr,
    slope,
    views,
    scale,
    step,
    tap_step,
    kernel,
    y_size,
    bricks,
    stride,
    dilation,
    y_strides,
    split_stride,
    reduced,
    produced,
    splits,
    groups,
    tiles,
    w_ring,
    x_ring,
    full,
    empty,
    VIEWS: gl.constexpr,
    DGRAD: gl.constexpr,
    STRIDED: gl.constexpr,
    BIAS: gl.constexpr,
    ACTIVATION: gl.constexpr,
    Y_UNIT: gl.constexpr,
    INDEX: gl.constexpr,
    BRICK: gl.constexpr,
    IM2COL: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr,
    SUMS: gl.constexpr,
    WIDTH: gl.constexpr,
    WRITTEN: gl.constexpr,
):
    BLOCK_M: gl.constexpr = BRICK[0] * BRICK[1] * BRICK[2] * BRICK[3]
    blocks = tl.cdiv(reduced, BLOCK_K)
    tiles_n = tl.cdiv(produced, BLOCK_N)
    stage = 0
    parity = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        tile_n, n, d, h, w_, split, group, index = tile_at(tile, tiles_n, bricks, splits, groups)
        _, at_d, _, _, planes = first_of(n, d, h, w_, y_size, BRICK, IM2COL)
        steps = 0
        for view in gl.static_range(VIEWS):
            taps_d, taps_h, taps_w, _, _, _, _, _, _ = taps_of(
                views[view], index, at_d, planes, scale, step, tap_step, kernel, y_size, stride, dilation, STRIDED
            )
            begin, end = part(taps_d * taps_h * taps_w * blocks, split, splits)
            steps += end - begin
        acc = gl.zeros([BLOCK_N, BLOCK_M], gl.float32, SUMS)
        acc, stage, parity = multiply(acc, steps, w_ring, x_ring, full, empty, stage, parity, DGRAD, True, STAGES)

        first_d, first_h, first_w, by = 0, 0, 0, (1, 1, 1)
        if STRIDED:
            first_d, first_h, first_w = class_at(index, stride)
            by = stride
        at = (n * BRICK[0], d * BRICK[1], h * BRICK[2], w_ * BRICK[3])
        y_tile = y_ptr + split.to(INDEX) * split_stride
        _write(
            acc, y_tile, bias_ptr, residual_ptr, slope, at, (first_d, first_h, first_w), by, y_size, y_strides,
            group * produced, tile_n * BLOCK_N, produced, 0, BIAS, ACTIVATION, Y_UNIT, INDEX, BRICK, IM2COL, WIDTH, WRITTEN,
        )  # fmt: skip


@gluon.jit
def gather_ring(
    y_ptr,
    bias_ptr,
    w,  # descriptor of (tap, filter, channel)
    x0,  # descriptors of (n, d, h, w, channel), one for each view; IM2COL: of (d, n, h, w, channel)
    x1,
    x2,
    x3,
    x4,
    x5,
    x6,
    x7,
    views,  # all as in gather_bricks
    scale,
    step,
    tap_step,
    kernel,
    y_size,
    bricks,  # IM2COL: (1, 1, 1, tiles of pixels)
    stride,
    dilation,
    y_strides,
    split_stride,
    reduced,
    produced,
    splits,
    groups,
    tiles,
    residual_ptr,
    slope,
    VIEWS: gl.constexpr,
    DGRAD: gl.constexpr,
    STRIDED: gl.constexpr,
    BIAS: gl.constexpr,
    ACTIVATION: gl.constexpr,
    Y_UNIT: gl.constexpr,
    INDEX: gl.constexpr,
    BRICK: gl.constexpr,
    IM2COL: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr,
    W_RING: gl.constexpr,  # layouts of shared memory
    X_RING: gl.constexpr,
    SUMS: gl.constexpr,  # layouts of registers
    WRITTEN: gl.constexpr,
    WIDTH: gl.constexpr,  # pixels that are written at once
):
    BLOCK_M: gl.constexpr = BRICK[0] * BRICK[1] * BRICK[2] * BRICK[3]
    produced = produced * Y_UNIT
    if DGRAD:
        w_ring = gl.allocate_shared_memory(w.dtype, [STAGES, BLOCK_K, BLOCK_N], W_RING)
    else:
        w_ring = gl.allocate_shared_memory(w.dtype, [STAGES, BLOCK_N, BLOCK_K], W_RING)
    x_ring = gl.allocate_shared_memory(x0.dtype, [STAGES, BLOCK_M, BLOCK_K], X_RING)
    full, empty = barriers(STAGES)
    xs = (x0, x1, x2, x3, x4, x5, x6, x7)
    gl.warp_specialize(
        [
            (
                _consume,
                (y_ptr, bias_ptr, residual_ptr, slope, views, scale, step, tap_step, kernel, y_size, bricks, stride, dilation,
                 y_strides, split_stride, reduced, produced, splits, groups, tiles, w_ring, x_ring, full, empty, VIEWS, DGRAD,
                 STRIDED, BIAS, ACTIVATION, Y_UNIT, INDEX, BRICK, IM2COL, BLOCK_N, BLOCK_K, STAGES, SUMS, WIDTH, WRITTEN),
            ),
            (
                _produce,
                (w, xs, views, scale, step, tap_step, kernel, y_size, bricks, stride, dilation, reduced, produced, splits,
                 groups, tiles, w_ring, x_ring, full, empty, VIEWS, DGRAD, STRIDED, BRICK, IM2COL, BLOCK_N, BLOCK_K, STAGES),
            ),
        ],
        [1],
        [PRODUCER_REGISTERS],
    )  # fmt: skip
