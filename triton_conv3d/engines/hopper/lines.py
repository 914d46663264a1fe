"""forward and dgrad by lines (ring.py): a line of pixels along W is loaded once for all taps along D and H that read it.

    line_ring  y[d, h, w, q] = sum over r, tw, td and th of  x[d + td, h + th, w + tw, r] * w[q, r, (td, th, tw)]

in steps of the dilation, from a start before the padding. A tile is PLANES x LINES lines of y, those of a stride of the
dilation, so that the taps of one are those of its neighbours. For each tap along W it needs (PLANES + kd - 1) x
(LINES + kh - 1) lines of x, where bricks load kd x kh for every line of y. A line may also be
half as many pixels of each of two SAMPLES. dgrad is a forward whose taps are turned round.

With a STRIDE x is read at the stride times the place in y: of its planes and lines, those between the ones that a step
multiplies are read by other taps; along W a tap reads one of the views that have every stride-th pixel.

The ring holds planes of x, each the lines that one tile needs of it, of BLOCK_K channels. A step is a tap along W and one
along D, and needs PLANES planes; the oldest of them is freed behind it. A second ring holds the taps along H of a step. The
planes of a tile are halved between two consumers of one warpgroup each, which need not wait for each other. A consumer reads
each line into registers, once for all taps along H: a product of 64 pixels and 32 filters that read both sides in shared
memory would take 24 cycles for that, and 16 to multiply.

Channels of a tile that are no power of two come in parts that are, N_PARTS and K_PARTS, the largest first, each with buffers
and products of its own: 96 filters are 64 and 32, in place of 128.
"""

import triton
import triton.language as tl

from ..implicit_gemm.taps import live_taps
from .gather import _write, tile_at
from .gluon import gl, gluon, load, mbarrier, warpgroup_mma
from .ring import (
    CONSUMER_REGISTERS,
    CONSUMERS,
    LINE,
    PRODUCER_REGISTERS,
    ahead_of,
    barriers,
    item,
    next_stage,
    view_at,
    waited,
)


@triton.jit
def _first_line(tile, LINES: tl.constexpr, dilation):
    """The first of every dilation-th position that are the lines of a tile."""
    return tile // dilation * (LINES * dilation) + tile % dilation


@triton.constexpr_function
def span(COUNT, STRIDE):
    """Planes, or lines, from the first that a tap reads for a tile to the last."""
    return (COUNT - 1) * STRIDE + 1


@triton.jit
def _planes_of(tile, y_size, x_depth, start, kernel, dilation, PLANES: tl.constexpr, STRIDE: tl.constexpr):
    """(first plane, lo, hi) of a tile: taps [lo, hi) along depth, without those that only read padding for all its planes."""
    first = _first_line(tile, PLANES, dilation[0])
    last = tl.minimum(first + (PLANES - 1) * dilation[0], y_size[1] - 1)
    lo, hi = live_taps(first, last, STRIDE[0], start[0], dilation[0], x_depth, kernel[0])
    return first, lo, hi


@triton.constexpr_function
def _tap(at, line, LINES, TAPS_H, STRIDE):
    """The tap along H through which a line of y reads this one of x, both counted plane by plane; None: through none."""
    plane, h = divmod(at, span(LINES, STRIDE) + TAPS_H - 1)
    tap = h - line % LINES * STRIDE
    return tap if line // LINES == plane and 0 <= tap < TAPS_H else None


@triton.constexpr_function
def _met(at, LINES, TAPS_H, STRIDE):
    """By how many lines of y a line of x is read."""
    h = at % (span(LINES, STRIDE) + TAPS_H - 1)
    return sum(_tap(h, line, LINES, TAPS_H, STRIDE) is not None for line in range(LINES))


@gluon.jit
def _produce(
    ws,
    xs,
    x_depth,
    start,
    first_w,
    halo,
    kernel,
    y_size,
    tiles_by,
    dilation,
    reduced,
    produced,
    groups,
    tiles,
    w_rings,
    x_rings,
    x_full,
    x_empty,
    w_full,
    w_empty,
    DGRAD: gl.constexpr,
    PLANES: gl.constexpr,
    LINES: gl.constexpr,
    STRIDE: gl.constexpr,
    SAMPLES: gl.constexpr,
    TAPS_H: gl.constexpr,
    N_PARTS: gl.constexpr,
    K_PARTS: gl.constexpr,
    STAGES: gl.constexpr,
    W_STAGES: gl.constexpr,
):
    HALO: gl.constexpr = span(LINES, STRIDE[1]) + TAPS_H - 1
    SPAN: gl.constexpr = span(PLANES, STRIDE[0])
    BLOCK_N: gl.constexpr = ahead_of(N_PARTS, None)
    BLOCK_K: gl.constexpr = ahead_of(K_PARTS, None)
    tiles_n = tl.cdiv(produced, BLOCK_N)
    steps = tl.cdiv(reduced, BLOCK_K) * kernel[2]
    stage = 0
    parity = 0
    w_stage = 0
    w_parity = 0
    taps = kernel[0] * TAPS_H * kernel[2]
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        tile_n, n, d, h, w_, _, group, _ = tile_at(tile, tiles_n, tiles_by, 1, groups)
        first, lo, hi = _planes_of(d, y_size, x_depth, start, kernel, dilation, PLANES, STRIDE)
        x_d = first * STRIDE[0] + start[0] + lo * dilation[0]
        x_h = _first_line(h, LINES, dilation[1]) * STRIDE[1] + start[1]
        for step in range(steps):
            tw = step % kernel[2]
            view, x_w = view_at(tw, dilation[2], start[2], STRIDE[2])
            x_w += w_ * (LINE // SAMPLES) + first_w
            channel = step // kernel[2] * BLOCK_K
            for plane in range(SPAN + hi - lo - 1):
                mbarrier.wait(x_empty.index(stage), parity ^ 1)
                mbarrier.expect(x_full.index(stage), HALO * BLOCK_K * LINE * 2)
                for line in range(halo):
                    at_d, at_h = x_d + plane * dilation[0], x_h + line * dilation[1]
                    for k in gl.static_range(len(K_PARTS)):
                        x_at = [n * SAMPLES, at_d, at_h, x_w, group * reduced + channel + ahead_of(K_PARTS, k)]
                        buffer = x_rings[k].index(stage * HALO + line)
                        for at in gl.static_range(item(STRIDE, 2)):
                            if view == at:
                                load(xs[at * len(K_PARTS) + k], x_at, x_full.index(stage), buffer)
                stage, parity = next_stage(stage, parity, STAGES)
                td = lo + plane - (SPAN - 1)  # of the step that this plane is the last of
                if td >= lo:
                    mbarrier.wait(w_empty.index(w_stage), w_parity ^ 1)
                    mbarrier.expect(w_full.index(w_stage), TAPS_H * BLOCK_N * BLOCK_K * 2)
                    for th in range(TAPS_H):
                        tap = (td * TAPS_H + th) * kernel[2] + tw
                        for i in gl.static_range(len(N_PARTS) * len(K_PARTS)):
                            q = tile_n * BLOCK_N + ahead_of(N_PARTS, i // len(K_PARTS))
                            r = channel + ahead_of(K_PARTS, i % len(K_PARTS))
                            if DGRAD:
                                w_at = [taps - 1 - tap, group * reduced + r, q]
                            else:
                                w_at = [tap, group * produced + q, r]
                            load(ws[i], w_at, w_full.index(w_stage), w_rings[i].index(w_stage * TAPS_H + th))
                    w_stage, w_parity = next_stage(w_stage, w_parity, W_STAGES)


@gluon.jit
def _consume(
    y_ptr,
    bias_ptr,
    residual_ptr,
    slope,
    x_depth,
    start,
    kernel,
    y_size,
    tiles_by,
    dilation,
    y_strides,
    reduced,
    produced,
    groups,
    tiles,
    w_rings,
    x_rings,
    x_full,
    x_empty,
    w_full,
    w_empty,
    WHICH: gl.constexpr,  # of the consumers
    DGRAD: gl.constexpr,
    BIAS: gl.constexpr,
    ACTIVATION: gl.constexpr,
    Y_UNIT: gl.constexpr,
    INDEX: gl.constexpr,
    PLANES: gl.constexpr,
    LINES: gl.constexpr,
    STRIDE: gl.constexpr,
    SAMPLES: gl.constexpr,
    TAPS_H: gl.constexpr,
    N_PARTS: gl.constexpr,
    K_PARTS: gl.constexpr,
    STAGES: gl.constexpr,
    W_STAGES: gl.constexpr,
    SUMS: gl.constexpr,
    PIXELS: gl.constexpr,
    WRITTEN: gl.constexpr,
):
    HALO: gl.constexpr = span(LINES, STRIDE[1]) + TAPS_H - 1
    SPAN: gl.constexpr = span(PLANES, STRIDE[0])
    MINE: gl.constexpr = PLANES // CONSUMERS
    NS: gl.constexpr = len(N_PARTS)
    KS: gl.constexpr = len(K_PARTS)
    BLOCK_N: gl.constexpr = ahead_of(N_PARTS, None)
    tiles_n = tl.cdiv(produced, BLOCK_N)
    steps = tl.cdiv(reduced, ahead_of(K_PARTS, None)) * kernel[2]
    stage = 0  # of the oldest plane that a step needs
    newest = 0
    parity = 0
    w_stage = 0
    w_parity = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        tile_n, n, d, h, w_, _, group, _ = tile_at(tile, tiles_n, tiles_by, 1, groups)
        d, lo, hi = _planes_of(d, y_size, x_depth, start, kernel, dilation, PLANES, STRIDE)
        sums = ()  # line by line, part by part
        for i in gl.static_range(MINE * LINES * NS):
            sums = sums + (gl.zeros([LINE, item(N_PARTS, i % NS)], gl.float32, item(SUMS, i % NS)),)
        for _step in range(steps):
            for _first in gl.static_range(SPAN - 1):
                mbarrier.wait(x_full.index(newest), parity)
                newest, parity = next_stage(newest, parity, STAGES)
            for _td in range(lo, hi):
                mbarrier.wait(x_full.index(newest), parity)
                newest, parity = next_stage(newest, parity, STAGES)
                mbarrier.wait(w_full.index(w_stage), w_parity)
                read = ()  # by the products under way
                for part in gl.static_range(MINE * HALO * KS):
                    plane = stage + (WHICH * MINE + part // HALO % MINE) * STRIDE[0]
                    plane = tl.where(plane >= STAGES, plane - STAGES, plane)
                    pixels = x_rings[part // (MINE * HALO)].index(plane * HALO + part % HALO).load(item(PIXELS, 0))
                    started = ()
                    for i in gl.static_range(MINE * LINES * NS):
                        acc = sums[i]
                        if _tap(part % (MINE * HALO), i // NS, LINES, TAPS_H, STRIDE[1]) is not None:
                            tap = w_stage * TAPS_H + _tap(part % (MINE * HALO), i // NS, LINES, TAPS_H, STRIDE[1])
                            b = w_rings[i % NS * KS + part // (MINE * HALO)].index(tap)
                            if not DGRAD:
                                b = b.permute((1, 0))
                            a = gl.convert_layout(pixels, item(PIXELS, i % NS))
                            acc = warpgroup_mma(a, b, acc, is_async=True)
                        started = started + (acc,)
                    sums = waited(_met(part, LINES, TAPS_H, STRIDE[1]) * NS, started, read)
                    read = (pixels,)
                sums = waited(0, sums, read)
                mbarrier.arrive(x_empty.index(stage))
                mbarrier.arrive(w_empty.index(w_stage))
                stage = next_stage(stage, 0, STAGES)[0]
                w_stage, w_parity = next_stage(w_stage, w_parity, W_STAGES)
            for _last in gl.static_range(SPAN - 1):
                mbarrier.arrive(x_empty.index(stage))
                stage = next_stage(stage, 0, STAGES)[0]

        h = _first_line(h, LINES, dilation[1])
        for i in gl.static_range(MINE * LINES * NS):
            plane = WHICH * MINE + i // (LINES * NS)
            at = (n * SAMPLES, d + plane * dilation[0], h + i // NS % LINES * dilation[1], w_ * (LINE // SAMPLES))
            q = tile_n * BLOCK_N + ahead_of(N_PARTS, i % NS)
            _write(
                gl.permute(sums[i], (1, 0)), y_ptr, bias_ptr, residual_ptr, slope, at, (0, 0, 0), (1, 1, 1), y_size,
                y_strides, group * produced, q, produced, 0, BIAS, ACTIVATION, Y_UNIT, INDEX,
                (SAMPLES, 1, 1, LINE // SAMPLES), False, LINE, item(WRITTEN, i % NS),
            )  # fmt: skip


@gluon.jit
def line_ring(
    y_ptr,
    bias_ptr,
    w0,  # descriptors of (tap, filter, channel), of each part of the filters one for each of the channels
    w1,
    w2,
    w3,
    x0,  # descriptors of (n, d, h, w, channel), of each view along W one for each part of the channels
    x1,
    x2,
    x3,
    x_depth,
    start,  # (d, h, w), as every triple: what the first tap of the first pixel reads; along w less whole strides,
    first_w,  # which are so many pixels of a view
    halo,  # lines of a plane, not known when compiled: or their copies would be unrolled, and spill
    kernel,
    y_size,  # (n, d, h, w)
    tiles_by,  # (n, d, h, w)
    dilation,
    y_strides,  # as in gather_ring
    reduced,
    produced,
    groups,
    tiles,
    residual_ptr,
    slope,
    DGRAD: gl.constexpr,
    BIAS: gl.constexpr,
    ACTIVATION: gl.constexpr,
    Y_UNIT: gl.constexpr,
    INDEX: gl.constexpr,
    PLANES: gl.constexpr,
    LINES: gl.constexpr,
    STRIDE: gl.constexpr,
    SAMPLES: gl.constexpr,
    TAPS_H: gl.constexpr,
    N_PARTS: gl.constexpr,
    K_PARTS: gl.constexpr,
    STAGES: gl.constexpr,  # planes of the ring
    W_STAGES: gl.constexpr,
    W_RINGS: gl.constexpr,  # layouts of shared memory
    X_RINGS: gl.constexpr,
    SUMS: gl.constexpr,  # layouts of registers
    PIXELS: gl.constexpr,
    WRITTEN: gl.constexpr,
):
    gl.static_assert(STAGES >= span(PLANES, STRIDE[0]), "a step needs all its planes at once")
    gl.static_assert(PLANES % CONSUMERS == 0 and PLANES * LINES > CONSUMERS, "every consumer has several lines")
    produced = produced * Y_UNIT
    ws = (w0, w1, w2, w3)
    xs = (x0, x1, x2, x3)
    HALO: gl.constexpr = span(LINES, STRIDE[1]) + TAPS_H - 1
    TAPS: gl.constexpr = W_STAGES * TAPS_H
    KS: gl.constexpr = len(K_PARTS)
    w_rings = ()
    for i in gl.static_range(len(N_PARTS) * KS):
        if DGRAD:
            ring = gl.allocate_shared_memory(w0.dtype, [TAPS, K_PARTS[i % KS], N_PARTS[i // KS]], item(W_RINGS, i))
        else:
            ring = gl.allocate_shared_memory(w0.dtype, [TAPS, N_PARTS[i // KS], K_PARTS[i % KS]], item(W_RINGS, i))
        w_rings = w_rings + (ring,)
    x_rings = ()
    for i in gl.static_range(KS):
        ring = gl.allocate_shared_memory(x0.dtype, [STAGES * HALO, LINE, K_PARTS[i]], item(X_RINGS, i))
        x_rings = x_rings + (ring,)
    x_full, x_empty = barriers(STAGES, CONSUMERS)
    w_full, w_empty = barriers(W_STAGES, CONSUMERS)
    gl.warp_specialize(
        [
            (
                _consume,
                (y_ptr, bias_ptr, residual_ptr, slope, x_depth, start, kernel, y_size, tiles_by, dilation, y_strides, reduced,
                 produced, groups, tiles, w_rings, x_rings, x_full, x_empty, w_full, w_empty, 0, DGRAD, BIAS, ACTIVATION,
                 Y_UNIT, INDEX, PLANES, LINES, STRIDE, SAMPLES, TAPS_H, N_PARTS, K_PARTS, STAGES, W_STAGES, SUMS, PIXELS,
                 WRITTEN),
            ),
            (
                _consume,
                (y_ptr, bias_ptr, residual_ptr, slope, x_depth, start, kernel, y_size, tiles_by, dilation, y_strides, reduced,
                 produced, groups, tiles, w_rings, x_rings, x_full, x_empty, w_full, w_empty, 1, DGRAD, BIAS, ACTIVATION,
                 Y_UNIT, INDEX, PLANES, LINES, STRIDE, SAMPLES, TAPS_H, N_PARTS, K_PARTS, STAGES, W_STAGES, SUMS, PIXELS,
                 WRITTEN),
            ),
            (
                _produce,
                (ws, xs, x_depth, start, first_w, halo, kernel, y_size, tiles_by, dilation, reduced, produced, groups, tiles,
                 w_rings, x_rings, x_full, x_empty, w_full, w_empty, DGRAD, PLANES, LINES, STRIDE, SAMPLES, TAPS_H, N_PARTS,
                 K_PARTS, STAGES, W_STAGES),
            ),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )  # fmt: skip
