"""wgrad by lines (ring.py): a line of the input is multiplied with all lines of the gradient that taps along H join it to.

    line_wgrad_ring  dw[q, (td, th, tw), r] = sum over n, d, h, w of  grad[n, d, h - th, w, q] * x[n, d + td, h, w + tw, r]

in steps of the dilation, from a start before the padding. A line is a brick of 64 pixels along n, d and w. A program walks
through such columns of lines along h, one line of x a step, with those of the gradient that it meets in a ring: the next step
needs one more, and frees the oldest. So the gradient is read once for all taps along H, where bricks read it for each of them.

With a stride a line is 64 pixels of the gradient and, of x, what they read through a tap: a line of one of the views that have
every stride-th position along D and W (engines/tma/geometry.py). A step is then a stride along H of such lines, each of which
meets every stride-th tap.

The rows of a program's sums are slices of x: a tap along D, one along W, and ROWS channels, each copied from where its taps
read. Two consumers have 64 rows each, of one slice or of several side by side, and read them into registers once for all
products of a step. The columns are filters, as powers of two side by side, N_PARTS, once for each tap along H.
"""

import triton
import triton.language as tl

from .gluon import beside, gl, gluon, load, mbarrier
from .ring import (
    CONSUMER_REGISTERS,
    CONSUMERS,
    LINE,
    PRODUCER_REGISTERS,
    UNDER_WAY,
    ahead_of,
    barriers,
    begun,
    item,
    next_digit,
    next_stage,
    part,
    view_at,
    waited,
)


@triton.constexpr_function
def met(TAPS, STRIDE):
    """Lines of the gradient that those of a step meet."""
    return -(-TAPS[1] // STRIDE[1])


@triton.jit
def turns_of(program, programs, tiles, chains):
    """Turns of a program: every so many tiles, each chain after chain."""
    return (tiles - program + programs - 1) // programs * chains


@triton.jit
def tile_at(turn, program, programs, tiles_m, tiles_n, splits, chains):
    """Turn -> (tile of slices, tile of filters, split, group, chain)."""
    tile = program + turn // chains * programs
    rest = tile // (tiles_m * tiles_n)
    return tile % tiles_m, tile // tiles_m % tiles_n, rest % splits, rest // splits, turn % chains


@triton.jit
def chain_of(lines, split, splits, chain, CHAIN: tl.constexpr):
    """(begin, end) of the lines of a chain, none in some of the last."""
    begin, end = part(lines, split, splits)
    begin = tl.minimum(begin + chain * CHAIN, end)
    return begin, tl.minimum(begin + CHAIN, end)


@triton.jit
def slice_at(index, TAPS: tl.constexpr):
    """Slice index -> (tap along d, tap along w, block of channels)."""
    return index // TAPS[2] % TAPS[0], index % TAPS[2], index // (TAPS[2] * TAPS[0])


@triton.jit
def column_at(column, columns, BRICK: tl.constexpr, height, dilation):
    """The first position (d, w, h, n) of a column: the next one reads most of the same lines, a plane further."""
    d = column % columns[1]
    w = column // columns[1] % columns[3]
    h = column // (columns[1] * columns[3]) % columns[2]
    n = column // (columns[1] * columns[3] * columns[2])
    return d * BRICK[1], w * BRICK[2], h // dilation[1] * (height * dilation[1]) + h % dilation[1], n * BRICK[0]


@triton.jit
def lines_of(column, begin, end, height):
    """(first, end) of the lines of a column that are within a range of all lines, column by column."""
    return tl.maximum(begin - column * height, 0), tl.minimum(end - column * height, height)


@gluon.jit
def _produce(
    xs,
    grads,
    start,
    first,
    ahead,
    phases,
    slices,
    dilation,
    columns,
    height,
    lines,
    group_in,
    group_out,
    splits,
    tiles,
    x_ring,
    g_rings,
    x_full,
    x_empty,
    g_full,
    g_empty,
    CHAIN: gl.constexpr,
    BRICK: gl.constexpr,
    TAPS: gl.constexpr,
    STRIDE: gl.constexpr,
    ROWS: gl.constexpr,
    N_PARTS: gl.constexpr,
    STAGES: gl.constexpr,
    G_STAGES: gl.constexpr,
):
    MET: gl.constexpr = met(TAPS, STRIDE)
    BLOCK_N: gl.constexpr = ahead_of(N_PARTS, None)
    SLICES: gl.constexpr = CONSUMERS * LINE // ROWS
    tiles_m = tl.cdiv(TAPS[0] * TAPS[2] * tl.cdiv(group_in, ROWS), SLICES)
    tiles_n = tl.cdiv(group_out, BLOCK_N)
    stage = 0
    parity = 0
    g_stage = 0
    g_parity = 0
    program, programs, chains = gl.program_id(0), gl.num_programs(0), tl.cdiv(tl.cdiv(lines, splits), CHAIN)
    for turn in range(turns_of(program, programs, tiles, chains)):
        tile_m, tile_n, split, group, chain = tile_at(turn, program, programs, tiles_m, tiles_n, splits, chains)
        filters = group * group_out + tile_n * BLOCK_N
        begin, end = chain_of(lines, split, splits, chain, CHAIN)
        for column in range(begin // height, tl.cdiv(end, height)):
            low, high = lines_of(column, begin, end, height)
            d, w, h, n = column_at(column, columns, BRICK, height, dilation)
            for line in range(low - (MET - 1), high):
                mbarrier.wait(g_empty.index(g_stage), g_parity ^ 1)
                mbarrier.expect(g_full.index(g_stage), LINE * BLOCK_N * 2)
                for i in gl.static_range(len(N_PARTS)):
                    g_at = [n, d, h + line * dilation[1] + ahead, w, filters + ahead_of(N_PARTS, i)]
                    load(grads[i], g_at, g_full.index(g_stage), g_rings[i].index(g_stage))
                g_stage, g_parity = next_stage(g_stage, g_parity, G_STAGES)
                if line >= low:
                    for phase in range(phases):
                        mbarrier.wait(x_empty.index(stage), parity ^ 1)
                        mbarrier.expect(x_full.index(stage), SLICES * LINE * ROWS * 2)
                        x_h = (h + line * dilation[1]) * STRIDE[1] + start[1] + phase
                        td, tw, block = slice_at(tile_m * SLICES, TAPS)
                        for place in range(slices):
                            view_d, x_d = view_at(td, dilation[0], start[0], STRIDE[0])
                            view_w, x_w = view_at(tw, dilation[2], start[2], STRIDE[2])
                            x_at = [n, d + first[0] + x_d, x_h, w + first[1] + x_w, group * group_in + block * ROWS]
                            for view in gl.static_range(STRIDE[0] * STRIDE[2]):
                                if view_d * STRIDE[2] + view_w == view:
                                    load(xs[view], x_at, x_full.index(stage), x_ring.index(stage * SLICES + place))
                            tw, carry = next_digit(tw, 1, TAPS[2])
                            td, carry = next_digit(td, carry, TAPS[0])
                            block += carry
                        stage, parity = next_stage(stage, parity, STAGES)


@gluon.jit
def _consume(
    dw_ptr,
    height,
    lines,
    split_stride,
    group_in,
    group_out,
    splits,
    tiles,
    x_rows,
    g_rings,
    x_full,
    x_empty,
    g_full,
    g_empty,
    WHICH: gl.constexpr,  # of the consumers
    INDEX: gl.constexpr,
    CHAIN: gl.constexpr,
    TAPS: gl.constexpr,
    STRIDE: gl.constexpr,
    ROWS: gl.constexpr,
    N_PARTS: gl.constexpr,
    STAGES: gl.constexpr,
    G_STAGES: gl.constexpr,
    SUMS: gl.constexpr,
    PIXELS: gl.constexpr,
    WRITTEN: gl.constexpr,
):
    NS: gl.constexpr = len(N_PARTS)
    TAPS_H: gl.constexpr = TAPS[1]
    MET: gl.constexpr = met(TAPS, STRIDE)
    BLOCK_N: gl.constexpr = ahead_of(N_PARTS, None)
    SLICES: gl.constexpr = CONSUMERS * LINE // ROWS
    tiles_m = tl.cdiv(TAPS[0] * TAPS[2] * tl.cdiv(group_in, ROWS), SLICES)
    tiles_n = tl.cdiv(group_out, BLOCK_N)
    stage = 0
    parity = 0
    oldest = 0  # of the lines of the gradient that a step needs
    newest = 0
    g_parity = 0
    program, programs, chains = gl.program_id(0), gl.num_programs(0), tl.cdiv(tl.cdiv(lines, splits), CHAIN)
    for turn in range(turns_of(program, programs, tiles, chains)):
        tile_m, tile_n, split, group, chain = tile_at(turn, program, programs, tiles_m, tiles_n, splits, chains)
        begin, end = chain_of(lines, split, splits, chain, CHAIN)
        sums = ()  # part by part, tap by tap
        for i in gl.static_range(NS * TAPS_H):
            sums = sums + (gl.zeros([LINE, item(N_PARTS, i // TAPS_H)], gl.float32, item(SUMS, i // TAPS_H)),)
        for column in range(begin // height, tl.cdiv(end, height)):
            low, high = lines_of(column, begin, end, height)
            for _first in gl.static_range(MET - 1):
                mbarrier.wait(g_full.index(newest), g_parity)
                newest, g_parity = next_stage(newest, g_parity, G_STAGES)
            for _line in range(low, high):
                mbarrier.wait(g_full.index(newest), g_parity)
                newest, g_parity = next_stage(newest, g_parity, G_STAGES)
                for phase in gl.static_range(item(STRIDE, 1)):
                    mbarrier.wait(x_full.index(stage), parity)
                    pixels = x_rows.index(stage * CONSUMERS + WHICH).permute((1, 0)).load(item(PIXELS, 0))
                    for i in gl.static_range(NS * TAPS_H):
                        if i % TAPS_H % STRIDE[1] == phase:
                            line = oldest + (MET - 1 - i % TAPS_H // STRIDE[1])
                            line = tl.where(line >= G_STAGES, line - G_STAGES, line)
                            a = gl.convert_layout(pixels, item(PIXELS, i // TAPS_H))
                            sums = begun(sums, i, a, g_rings[i // TAPS_H].index(line))
                            sums = waited(UNDER_WAY, sums, (pixels,))
                    sums = waited(0, sums, (pixels,))
                    mbarrier.arrive(x_empty.index(stage))
                    stage, parity = next_stage(stage, parity, STAGES)
                mbarrier.arrive(g_empty.index(oldest))
                oldest = next_stage(oldest, 0, G_STAGES)[0]
            for _last in gl.static_range(MET - 1):
                mbarrier.arrive(g_empty.index(oldest))
                oldest = next_stage(oldest, 0, G_STAGES)[0]

        for i in gl.static_range(NS * TAPS_H - 1, -1, -1):  # the small parts first: they leave registers for the others
            row = gl.arange(0, LINE, layout=gl.SliceLayout(1, WRITTEN))
            td, tw, block = slice_at(tile_m * SLICES + WHICH * (LINE // ROWS) + row // ROWS, TAPS)
            channel = block * ROWS + row % ROWS
            tap = (td * TAPS_H + i % TAPS_H) * TAPS[2] + tw
            filter = gl.arange(0, item(N_PARTS, i // TAPS_H), layout=gl.SliceLayout(0, WRITTEN))
            filter += tile_n * BLOCK_N + ahead_of(N_PARTS, i // TAPS_H)
            rows = tap * group_in + channel
            across = (group * group_out + filter).to(INDEX) * (TAPS[0] * TAPS_H * TAPS[2] * group_in)
            dw_tile = dw_ptr + split.to(INDEX) * split_stride + (gl.expand_dims(rows, 1) + gl.expand_dims(across, 0))
            inside = gl.expand_dims(channel < group_in, 1) & gl.expand_dims(filter < group_out, 0)
            total = gl.convert_layout(sums[i], WRITTEN)
            total += gl.load(dw_tile, mask=inside & (chain > 0), other=0.0)
            gl.store(dw_tile, total, mask=inside)


@gluon.jit
def line_wgrad_ring(
    dw_ptr,  # float32, for each split one after the other
    x0,  # descriptors of (n, d, h, w, channel), one for each view, those along W first
    x1,
    x2,
    x3,
    g0,  # descriptors of (n, d, h, w, filter), one for each part of the filters
    g1,
    start,  # (d, h, w), as every triple: what the first tap of the first pixel reads, less whole strides; along d and w
    first,  # these are so many pixels of a view
    ahead,  # the line of the gradient that the first step meets through the first tap
    phases,  # lines of x in a step: the stride along H, and
    slices,  # of a tile; what is known when compiled is unrolled, and copies spill
    dilation,
    columns,  # of lines, along n, d, h, w; those along h are of a step of the dilation, one part of its lines after the other
    height,  # lines of a column
    lines,  # of all columns
    split_stride,
    group_in,
    group_out,
    splits,
    tiles,
    INDEX: gl.constexpr,
    CHAIN: gl.constexpr,  # lines of one accumulator before it joins a total
    BRICK: gl.constexpr,  # a line's pixels along n, d, w
    TAPS: gl.constexpr,
    STRIDE: gl.constexpr,
    ROWS: gl.constexpr,
    N_PARTS: gl.constexpr,
    STAGES: gl.constexpr,  # lines of x in the ring
    G_STAGES: gl.constexpr,
    X_RING: gl.constexpr,  # layouts of shared memory
    G_RINGS: gl.constexpr,
    SUMS: gl.constexpr,  # of registers
    PIXELS: gl.constexpr,
    WRITTEN: gl.constexpr,
):
    gl.static_assert(G_STAGES > met(TAPS, STRIDE), "a step needs the lines of all taps at once")
    xs = (x0, x1, x2, x3)
    grads = (g0, g1)
    SLICES: gl.constexpr = CONSUMERS * LINE // ROWS
    x_ring = gl.allocate_shared_memory(x0.dtype, [STAGES * SLICES, LINE, ROWS], X_RING)
    x_rows = beside(x_ring, STAGES * CONSUMERS, LINE, LINE, X_RING)
    g_rings = ()
    for i in gl.static_range(len(N_PARTS)):
        g_rings = g_rings + (gl.allocate_shared_memory(g0.dtype, [G_STAGES, LINE, N_PARTS[i]], item(G_RINGS, i)),)
    x_full, x_empty = barriers(STAGES, CONSUMERS)
    g_full, g_empty = barriers(G_STAGES, CONSUMERS)
    gl.warp_specialize(
        [
            (
                _consume,
                (dw_ptr, height, lines, split_stride, group_in, group_out, splits, tiles, x_rows, g_rings, x_full,
                 x_empty, g_full, g_empty, 0, INDEX, CHAIN, TAPS, STRIDE, ROWS, N_PARTS, STAGES, G_STAGES, SUMS, PIXELS,
                 WRITTEN),
            ),
            (
                _consume,
                (dw_ptr, height, lines, split_stride, group_in, group_out, splits, tiles, x_rows, g_rings, x_full,
                 x_empty, g_full, g_empty, 1, INDEX, CHAIN, TAPS, STRIDE, ROWS, N_PARTS, STAGES, G_STAGES, SUMS, PIXELS,
                 WRITTEN),
            ),
            (
                _produce,
                (xs, grads, start, first, ahead, phases, slices, dilation, columns, height, lines, group_in, group_out, splits,
                 tiles, x_ring, g_rings, x_full, x_empty, g_full, g_empty, CHAIN, BRICK, TAPS, STRIDE, ROWS, N_PARTS, STAGES,
                 G_STAGES),
            ),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )  # fmt: skip
