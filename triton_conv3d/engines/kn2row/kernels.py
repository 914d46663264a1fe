"""The kernel of the folded taps. Channels are dense and last in what it reads.

    z[i, (th, tw, q)] = sum over taps td and channels r of  x[i + td * step, r] * w[q, r, td, th, tw]
    y[j, q]           = sum over taps th and tw of  z[j + start + (th, tw) * step, (th, tw, q)]

forward as it stands; dgrad with the gradient as x, FLIPped taps and the channels' roles exchanged. A program marches down
the lines of x: a line's z joins, tap by tap of H, the running sums of the lines of y that it meets, and when a line of y
has met all of its taps, those of W are shifted into place and added up. Strides come in units, as those of
:mod:`..implicit_gemm.kernels`.
"""

import triton
import triton.language as tl

from ..epilogue import finished
from ..halo.kernels import add_planes
from ..implicit_gemm.kernels import rounded


@triton.jit
def _by_tap(sums, LEVELS: tl.constexpr):
    """[rows, 2**LEVELS * width] as a tuple of 2**LEVELS tiles [rows, width]."""
    parts = (sums,)
    for level in tl.static_range(LEVELS):
        halves = ()
        for i in tl.static_range(1 << level):
            pair = tl.reshape(parts[i], (parts[i].shape[0], 2, parts[i].shape[1] // 2))
            halves += tl.split(tl.permute(pair, (0, 2, 1)))
        parts = halves
    return parts


@triton.jit
def _in_line(index, classes, step, length):
    """First of the positions, step apart, of a part of one dimension: parts of one length, class by class of remainders."""
    return index // classes * (length * step) + index % classes


@triton.jit
def kn2row_gemm(
    x_ptr,
    w_ptr,  # (q, td, th, tw, r), dense
    bias_ptr,
    y_ptr,
    x_size,  # (d, h, w), as every triple
    y_size,
    start,  # of x: plane and line that the first of y reads first, and the pixel of the first row of all
    step,
    before,  # rows from that of a pixel of y back to the first that it reads
    tiles,  # that y is cut into
    classes,  # (d, h): positions of one remainder modulo step belong together
    lines,  # of y, that a program computes
    x_strides,  # (n, d, h, w) in X_UNIT
    w_tap,  # from tap to tap in W_UNIT
    y_strides,  # (n, d, h, w, q)
    reduced,  # channels that are summed over, in X_UNIT
    produced,  # channels that are computed
    residual_ptr,  # None, or with the strides of y
    slope,
    X_UNIT: tl.constexpr,
    W_UNIT: tl.constexpr,
    FLIP: tl.constexpr,
    KERNEL_D: tl.constexpr,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    EVEN: tl.constexpr,
    ASYNC: tl.constexpr,  # products go on by themselves
    INDEX: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PLANES: tl.constexpr,
    LEVELS_H: tl.constexpr,  # taps of H, padded to 2**LEVELS_H
    TAPS_W: tl.constexpr,  # taps of W, padded
    BLOCK_Q: tl.constexpr,
):
    READ: tl.constexpr = PLANES + KERNEL_D - 1  # planes of x
    TAPS_H: tl.constexpr = 1 << LEVELS_H
    WIDTH: tl.constexpr = TAPS_W * BLOCK_Q  # columns of one tap of H
    reduced = reduced * X_UNIT
    program = tl.program_id(0)
    tile_d = program % tiles[0]  # neighbours in time read the same planes
    tile_w = program // tiles[0] % tiles[2]
    tile_h = program // (tiles[0] * tiles[2]) % tiles[1]
    n = program // (tiles[0] * tiles[2] * tiles[1])

    # The rows of this tile: pixels of one line of x, and of y where all that they read is among them, or is padding.
    row = tl.arange(0, BLOCK_W)
    halo = (KERNEL_W - 1) * step[2]
    jw = tile_w * (BLOCK_W - halo) + row
    whole = (row >= before) | (tile_w == 0)
    whole &= (row < BLOCK_W - (halo - before)) | (tile_w == tiles[2] - 1)
    xw = jw + start[2]
    jd = _in_line(tile_d, classes[0], step[0], PLANES)
    jh = _in_line(tile_h, classes[1], step[1], lines) - (KERNEL_H - 1) * step[1]  # that the line has met all of
    xd = jd + start[0]
    xh = jh + (KERNEL_H - 1) * step[1] + start[1]
    met = tl.minimum(lines, tl.cdiv(y_size[1] - jh, step[1]) - (KERNEL_H - 1)) + KERNEL_H - 1

    k = tl.arange(0, BLOCK_K)
    in_k = k < reduced
    in_x = ((xw >= 0) & (xw < x_size[2]))[:, None] & in_k[None, :]
    x_rows = (n.to(INDEX) * x_strides[0] + xd.to(INDEX) * x_strides[1] + xw.to(INDEX) * x_strides[3]) * X_UNIT
    x_tile = x_rows[:, None] + k[None, :]
    x_plane = tl.full([], X_UNIT, INDEX) * step[0] * x_strides[1]

    column = tl.arange(0, TAPS_H * WIDTH)
    q = column % BLOCK_Q
    tw = column // BLOCK_Q % TAPS_W
    th = column // WIDTH
    tap = th * KERNEL_W + tw
    in_columns = (q < produced) & (th < KERNEL_H) & (tw < KERNEL_W)
    TAPS: tl.constexpr = KERNEL_D * KERNEL_H * KERNEL_W
    if FLIP:
        tap = KERNEL_H * KERNEL_W - 1 - tap
    w_tile = ((q * TAPS + tap) * w_tap * W_UNIT)[None, :] + k[:, None]
    w_plane = KERNEL_H * KERNEL_W * w_tap * W_UNIT

    # Where the columns of each row come from, when the taps of W are shifted into place.
    column = tl.arange(0, WIDTH)
    of_w = column // BLOCK_Q
    source = row[:, None] + (of_w * step[2] - before)[None, :]
    inside = (source >= 0) & (source < BLOCK_W) & (of_w < KERNEL_W)[None, :]
    source = tl.where(inside, source, 0)

    q = tl.arange(0, BLOCK_Q)
    in_q = q < produced
    in_y = (whole & (jw < y_size[2]))[:, None] & in_q[None, :]
    y_rows = n.to(INDEX) * y_strides[0] + jd.to(INDEX) * y_strides[1] + jw.to(INDEX) * y_strides[3]
    y_tile = y_rows[:, None] + (q.to(INDEX) * y_strides[4])[None, :]
    y_plane = tl.full([], 1, INDEX) * step[0] * y_strides[1]

    sums = ()
    running = ()  # of each plane, of the lines of y that have met 1, 2, ... taps of H
    for _ in tl.static_range(PLANES):
        sums += (tl.zeros([BLOCK_W, TAPS_H * WIDTH], tl.float32),)
    for _ in tl.static_range(PLANES * (KERNEL_H - 1)):
        running += (tl.zeros([BLOCK_W, WIDTH], tl.float32),)
    line = tl.full([], 0, tl.int32)
    r = line
    for _ in range(met * tl.cdiv(reduced, BLOCK_K)):
        in_h = (xh >= 0) & (xh < x_size[1])
        x_line = xh.to(INDEX) * x_strides[2] * X_UNIT + r
        in_r = in_k if EVEN else r + k < reduced
        planes = ()
        for p in tl.static_range(READ):
            at = xd + p * step[0]
            in_plane = tl.where(in_h & (at >= 0) & (at < x_size[0]), in_x, False)
            if not EVEN:
                in_plane &= in_r[None, :]
            planes += (tl.load(x_ptr + (x_line + p * x_plane) + x_tile, mask=in_plane, other=0.0),)
        weights = ()
        for p in tl.static_range(KERNEL_D):
            w_ptr_p = w_ptr + ((KERNEL_D - 1 - p if FLIP else p) * w_plane + r)
            weights += (tl.load(w_ptr_p + w_tile, mask=in_r[:, None] & in_columns[None, :], other=0.0),)
        sums = add_planes(sums, planes, weights, PLANES, KERNEL_D, PRECISION, UPCAST)
        r += BLOCK_K
        ends = r >= reduced
        r = tl.where(ends, 0, r)  # not below: loads that run ahead must not depend on what the sums do
        xh += tl.where(ends, step[1], 0)
        if ends:
            empty = ()
            moved = ()
            for j in tl.static_range(PLANES):
                parts = _by_tap(sums[j], LEVELS_H)
                empty += (tl.zeros([BLOCK_W, TAPS_H * WIDTH], tl.float32),)
                full = parts[KERNEL_H - 1]
                if KERNEL_H > 1:
                    full += running[(j + 1) * (KERNEL_H - 1) - 1]
                    moved += (parts[0],)
                for t in tl.static_range(1, KERNEL_H - 1):
                    moved += (parts[t] + running[j * (KERNEL_H - 1) + t - 1],)
                shifted = tl.where(inside, tl.gather(full, source, 0), 0.0)
                result = tl.sum(tl.reshape(shifted, (BLOCK_W, TAPS_W, BLOCK_Q)), 1)
                if BIAS:
                    result += tl.load(bias_ptr + q, mask=in_q, other=0.0).to(tl.float32)[None, :]
                y_at = y_tile + (jh.to(INDEX) * y_strides[2] + j * y_plane)
                kept = tl.where((line >= KERNEL_H - 1) & (jd + j * step[0] < y_size[0]), in_y, False)
                result = finished(result, residual_ptr, y_at, kept, ACTIVATION, slope)
                tl.store(y_ptr + y_at, rounded(result, y_ptr.dtype.element_ty, UPCAST), mask=kept)
            if not ASYNC:
                sums = empty
            running = moved
            line += 1
            jh += step[1]
        if ASYNC:  # outside of the branch, or compilers do not see that sums are read, and do not wait for their products
            begun = ()
            for j in tl.static_range(PLANES):
                begun += (tl.where(ends, 0.0, sums[j]),)
            sums = begun
