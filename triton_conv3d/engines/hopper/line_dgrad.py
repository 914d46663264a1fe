"""dgrad with a stride, by lines (ring.py): all parity classes of a tile at once, so that they share what they read.

    line_dgrad_ring  dx[s * m + c, r] = sum over shifts i and filters q of  grad[m + i, q] * w[q, r, c + p - s * i]

for each dimension, with the stride s, the padding p, and the taps that there are. Cell m has one pixel of every class c. Where
bricks, each of one class, read the gradient for each of its taps, here a line of 64 cells along n, d and w is loaded once for
all taps that reach it by a shift along D and one along W: with stride 2 and 27 taps 8 times, less what lines of a tile share
along H, in place of 27.

A step is a shift along D and one along W, for all shifts along H and so many filters. The ring holds the lines of a step; the
taps of a step have a place of their own, and stay there if there is only one block of filters and one of channels. Each of two
consumers has half of the lines of a tile, and one sum for every class and line.
"""

import triton.language as tl

from .classes import class_of, shifts_of, sizes, strides_of, tap_of, taps_of
from .gather import _write, tile_at
from .gluon import gl, gluon, load, mbarrier
from .ring import CONSUMERS, LINE, UNDER_WAY, barriers, begun, item, next_stage, waited

# Of a thread. With 40, as of the other kernels, the producer of 27 taps spills.
_PRODUCER_REGISTERS = gl.constexpr(56)
_CONSUMER_REGISTERS = gl.constexpr(224)


@gluon.jit
def _produce(
    w,
    grad,
    start,
    tiles_by,
    reduced,
    produced,
    groups,
    tiles,
    w_ring,
    ring,
    full,
    empty,
    w_full,
    w_empty,
    BRICK: gl.constexpr,
    LINES: gl.constexpr,
    AXES: gl.constexpr,
    STAYS: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr,
    W_STAGES: gl.constexpr,
):
    HALO: gl.constexpr = LINES + shifts_of(AXES, 1) - 1
    SHIFTS_W: gl.constexpr = shifts_of(AXES, 2)
    TAPS: gl.constexpr = item(sizes(AXES), 0)
    STEPS: gl.constexpr = item(sizes(AXES), 2)
    tiles_n = tl.cdiv(produced, BLOCK_N)
    stage = 0
    parity = 0
    w_stage = 0
    w_parity = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        tile_n, n, d, h, w_, _, group, _ = tile_at(tile, tiles_n, tiles_by, 1, groups)
        for block in range(tl.cdiv(reduced, BLOCK_K)):
            q = group * reduced + block * BLOCK_K
            for step in gl.static_range(STEPS):
                if not STAYS or tile == gl.program_id(0):
                    mbarrier.wait(w_empty.index(w_stage * STEPS + step), w_parity ^ 1)
                    arrives = w_full.index(w_stage * STEPS + step)
                    mbarrier.expect(arrives, len(taps_of(step, AXES)) * BLOCK_N * BLOCK_K * 2)
                    for i in gl.static_range(len(taps_of(step, AXES))):
                        w_at = [item(taps_of(step, AXES), i), q, tile_n * BLOCK_N]
                        load(w, w_at, arrives, w_ring.index(w_stage * TAPS + item(taps_of(step, AXES), i)))
                mbarrier.wait(empty.index(stage), parity ^ 1)
                mbarrier.expect(full.index(stage), HALO * LINE * BLOCK_K * 2)
                at_d, at_w = d * BRICK[1] + start[0] + step // SHIFTS_W, w_ * BRICK[3] + start[2] + step % SHIFTS_W
                for line in range(HALO):
                    at = [n * BRICK[0], at_d, h * LINES + start[1] + line, at_w, q]
                    load(grad, at, full.index(stage), ring.index(stage * HALO + line))
                stage, parity = next_stage(stage, parity, STAGES)
            w_stage, w_parity = next_stage(w_stage, w_parity, W_STAGES)


@gluon.jit
def _consume(
    dx_ptr,
    bias_ptr,
    residual_ptr,
    slope,
    dx_size,
    tiles_by,
    dx_strides,
    reduced,
    produced,
    groups,
    tiles,
    w_ring,
    ring,
    full,
    empty,
    w_full,
    w_empty,
    w_last,
    WHICH: gl.constexpr,  # of the consumers
    BIAS: gl.constexpr,
    ACTIVATION: gl.constexpr,
    Y_UNIT: gl.constexpr,
    INDEX: gl.constexpr,
    BRICK: gl.constexpr,
    LINES: gl.constexpr,
    AXES: gl.constexpr,
    STAYS: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr,
    SUMS: gl.constexpr,
    PIXELS: gl.constexpr,
    WRITTEN: gl.constexpr,
):
    SHIFTS_H: gl.constexpr = shifts_of(AXES, 1)
    HALO: gl.constexpr = LINES + SHIFTS_H - 1
    MINE: gl.constexpr = LINES // CONSUMERS
    TAPS: gl.constexpr = item(sizes(AXES), 0)
    CLASSES: gl.constexpr = item(sizes(AXES), 1)
    STEPS: gl.constexpr = item(sizes(AXES), 2)
    tiles_n = tl.cdiv(produced, BLOCK_N)
    stage = 0
    parity = 0
    w_stage = 0
    w_parity = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        tile_n, n, d, h, w_, _, group, _ = tile_at(tile, tiles_n, tiles_by, 1, groups)
        sums = ()  # line by line, class by class
        for _ in gl.static_range(MINE * CLASSES):
            sums = sums + (gl.zeros([LINE, BLOCK_N], gl.float32, SUMS),)
        for _block in range(tl.cdiv(reduced, BLOCK_K)):
            for step in gl.static_range(STEPS):
                mbarrier.wait(w_full.index(w_stage * STEPS + step), 0 if STAYS else w_parity)
                mbarrier.wait(full.index(stage), parity)
                read = ()  # by the product under way
                for line in gl.static_range(MINE + SHIFTS_H - 1):
                    pixels = ring.index(stage * HALO + WHICH * MINE + line).load(PIXELS)
                    for i in gl.static_range(MINE * CLASSES):
                        if tap_of(i % CLASSES, step, line - i // CLASSES, AXES) is not None:
                            b = w_ring.index(w_stage * TAPS + tap_of(i % CLASSES, step, line - i // CLASSES, AXES))
                            sums = waited(UNDER_WAY, begun(sums, i, pixels, b), read + (pixels,))
                            read = ()
                    read = (pixels,)
                sums = waited(0, sums, read)
                mbarrier.arrive(empty.index(stage))
                if not STAYS:
                    mbarrier.arrive(w_empty.index(w_stage * STEPS + step))
                stage, parity = next_stage(stage, parity, STAGES)
            last = w_stage == w_last
            w_stage, w_parity = tl.where(last, 0, w_stage + 1), tl.where(last, w_parity ^ 1, w_parity)

        for i in gl.static_range(MINE * CLASSES):
            at = (n * BRICK[0], d * BRICK[1], h * LINES + WHICH * MINE + i // CLASSES, w_ * BRICK[3])
            _write(
                gl.permute(sums[i], (1, 0)), dx_ptr, bias_ptr, residual_ptr, slope, at, class_of(i % CLASSES, AXES),
                strides_of(AXES), dx_size, dx_strides, group * produced, tile_n * BLOCK_N, produced, 0, BIAS, ACTIVATION,
                Y_UNIT, INDEX, BRICK, False, LINE, WRITTEN,
            )  # fmt: skip


@gluon.jit
def line_dgrad_ring(
    dx_ptr,
    bias_ptr,
    w,  # descriptor of (tap, filter, channel)
    grad,  # descriptor of (n, d, h, w, filter)
    start,  # (d, h, w), as every triple: what the first cell reads by the first shift
    dx_size,  # (n, d, h, w)
    tiles_by,  # (n, d, h, w)
    dx_strides,  # as in gather_ring
    reduced,
    produced,
    groups,
    w_last,  # W_STAGES - 1, but not known when compiled: or the addresses of all taps would be worked out once, and spill
    tiles,
    residual_ptr,
    slope,
    BIAS: gl.constexpr,
    ACTIVATION: gl.constexpr,
    Y_UNIT: gl.constexpr,
    INDEX: gl.constexpr,
    BRICK: gl.constexpr,  # a line's cells along n, d, h (one), w
    LINES: gl.constexpr,  # of a tile
    AXES: gl.constexpr,
    STAYS: gl.constexpr,  # the taps of the first tile are those of all
    BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr,  # steps whose lines are there
    W_STAGES: gl.constexpr,  # blocks of filters whose taps are there
    W_RING: gl.constexpr,  # layouts of shared memory
    X_RING: gl.constexpr,
    SUMS: gl.constexpr,  # layouts of registers
    PIXELS: gl.constexpr,
    WRITTEN: gl.constexpr,
):
    gl.static_assert(LINES % CONSUMERS == 0, "the consumers share the lines of a tile")
    gl.static_assert(not STAYS or W_STAGES == 1, "taps that stay have one place")
    produced = produced * Y_UNIT
    HALO: gl.constexpr = LINES + shifts_of(AXES, 1) - 1
    TAPS: gl.constexpr = item(sizes(AXES), 0)
    STEPS: gl.constexpr = item(sizes(AXES), 2)
    w_ring = gl.allocate_shared_memory(w.dtype, [W_STAGES * TAPS, BLOCK_K, BLOCK_N], W_RING)
    ring = gl.allocate_shared_memory(grad.dtype, [STAGES * HALO, LINE, BLOCK_K], X_RING)
    full, empty = barriers(STAGES, CONSUMERS)
    w_full, w_empty = barriers(W_STAGES * STEPS, CONSUMERS)
    gl.warp_specialize(
        [
            (
                _consume,
                (dx_ptr, bias_ptr, residual_ptr, slope, dx_size, tiles_by, dx_strides, reduced, produced, groups, tiles, w_ring,
                 ring, full, empty, w_full, w_empty, w_last, 0, BIAS, ACTIVATION, Y_UNIT, INDEX, BRICK, LINES, AXES, STAYS,
                 BLOCK_N, BLOCK_K, STAGES, SUMS, PIXELS, WRITTEN),
            ),
            (
                _consume,
                (dx_ptr, bias_ptr, residual_ptr, slope, dx_size, tiles_by, dx_strides, reduced, produced, groups, tiles, w_ring,
                 ring, full, empty, w_full, w_empty, w_last, 1, BIAS, ACTIVATION, Y_UNIT, INDEX, BRICK, LINES, AXES, STAYS,
                 BLOCK_N, BLOCK_K, STAGES, SUMS, PIXELS, WRITTEN),
            ),
            (
                _produce,
                (w, grad, start, tiles_by, reduced, produced, groups, tiles, w_ring, ring, full, empty, w_full, w_empty, BRICK,
                 LINES, AXES, STAYS, BLOCK_N, BLOCK_K, STAGES, W_STAGES),
            ),
        ],
        [4, 1],
        [_CONSUMER_REGISTERS, _PRODUCER_REGISTERS],
    )  # fmt: skip
