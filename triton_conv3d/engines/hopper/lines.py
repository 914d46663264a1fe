"""forward and dgrad of narrow layers by lines (ring.py): a line of pixels along W is loaded once for every tap along it.

    line_ring  y[d, h, w, q] = sum over tw, td, th and r of  x[d + td, h + th, w + tw, r] * w[q, r, (td, th, tw)]

in steps of the dilation, from a start before the padding. A tile is PLANES x LINES lines of y, those of a stride of the
dilation, so that the taps of one are those of its neighbours. For each tap along W it needs (PLANES + kd - 1) x
(LINES + kh - 1) lines of x, where bricks load kd x kh for every line of y. dgrad is a forward whose taps are turned round.

The ring holds planes of x, each the lines that one tile needs of it. A step is a tap along W and one along D, and needs
PLANES planes; the oldest of them is freed behind it. A second ring holds the taps along H of a step. The planes of a tile
are halved between two consumers of one warpgroup each, which need not wait for each other.
"""

import triton
import triton.language as tl

from .gather import _write, tile_at
from .gluon import gl, gluon, load, mbarrier, warpgroup_mma, warpgroup_mma_wait
from .ring import PRODUCER_REGISTERS, barriers, next_stage

LINE = gl.constexpr(64)  # pixels: the rows of one matrix instruction
_CONSUMERS = gl.constexpr(2)
_CONSUMER_REGISTERS = gl.constexpr(232)
_PENDING = gl.constexpr(7)  # products that are not waited for, at most


@triton.jit
def _first_line(tile, LINES: tl.constexpr, dilation):
    """The first of every dilation-th position that are the lines of a tile."""
    return tile // dilation * (LINES * dilation) + tile % dilation


@gluon.jit
def _produce(
    w,
    x,
    start,
    kernel,
    tiles_by,
    dilation,
    reduced,
    produced,
    groups,
    tiles,
    w_ring,
    x_ring,
    x_full,
    x_empty,
    w_full,
    w_empty,
    DGRAD: gl.constexpr,
    PLANES: gl.constexpr,
    LINES: gl.constexpr,
    TAPS_H: gl.constexpr,
    STAGES: gl.constexpr,
    W_STAGES: gl.constexpr,
):
    HALO: gl.constexpr = LINES + TAPS_H - 1
    stage = 0
    parity = 0
    w_stage = 0
    w_parity = 0
    taps = kernel[0] * TAPS_H * kernel[2]
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        _, n, d, h, w_, _, group, _ = tile_at(tile, 1, tiles_by, 1, groups)
        x_d = _first_line(d, PLANES, dilation[0]) + start[0]
        x_h = _first_line(h, LINES, dilation[1]) + start[1]
        x_w = w_ * LINE + start[2]
        for tw in range(kernel[2]):
            for plane in range(PLANES + kernel[0] - 1):
                mbarrier.wait(x_empty.index(stage), parity ^ 1)
                mbarrier.expect(x_full.index(stage), HALO * x.block_type.nbytes)
                for line in range(HALO):
                    at_d = x_d + plane * dilation[0]
                    x_at = [n, at_d, x_h + line * dilation[1], x_w + tw * dilation[2], group * reduced]
                    load(x, x_at, x_full.index(stage), x_ring.index(stage * HALO + line))
                stage, parity = next_stage(stage, parity, STAGES)
                td = plane - (PLANES - 1)  # of the step that this plane is the last of
                if td >= 0:
                    mbarrier.wait(w_empty.index(w_stage), w_parity ^ 1)
                    mbarrier.expect(w_full.index(w_stage), TAPS_H * w.block_type.nbytes)
                    for th in range(TAPS_H):
                        tap = (td * TAPS_H + th) * kernel[2] + tw
                        if DGRAD:
                            w_at = [taps - 1 - tap, group * reduced, 0]
                        else:
                            w_at = [tap, group * produced, 0]
                        load(w, w_at, w_full.index(w_stage), w_ring.index(w_stage * TAPS_H + th))
                    w_stage, w_parity = next_stage(w_stage, w_parity, W_STAGES)


@gluon.jit
def _consume(
    y_ptr,
    bias_ptr,
    residual_ptr,
    slope,
    kernel,
    y_size,
    tiles_by,
    dilation,
    y_strides,
    produced,
    groups,
    tiles,
    w_ring,
    x_ring,
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
    TAPS_H: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
    W_STAGES: gl.constexpr,
    SUMS: gl.constexpr,
    WRITTEN: gl.constexpr,
):
    HALO: gl.constexpr = LINES + TAPS_H - 1
    MINE: gl.constexpr = PLANES // _CONSUMERS
    stage = 0  # of the oldest plane that a step needs
    newest = 0
    parity = 0
    w_stage = 0
    w_parity = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        _, n, d, h, w_, _, group, _ = tile_at(tile, 1, tiles_by, 1, groups)
        sums = ()
        for _line in gl.static_range(MINE * LINES):
            sums = sums + (gl.zeros([LINE, BLOCK_N], gl.float32, SUMS),)
        for _tw in range(kernel[2]):
            for _first in gl.static_range(PLANES - 1):
                mbarrier.wait(x_full.index(newest), parity)
                newest, parity = next_stage(newest, parity, STAGES)
            for _td in range(kernel[0]):
                mbarrier.wait(x_full.index(newest), parity)
                newest, parity = next_stage(newest, parity, STAGES)
                mbarrier.wait(w_full.index(w_stage), w_parity)
                for th in range(TAPS_H):
                    b = w_ring.index(w_stage * TAPS_H + th)
                    if not DGRAD:
                        b = b.permute((1, 0))
                    started = ()
                    for plane in gl.static_range(MINE):
                        at = stage + (WHICH * MINE + plane)
                        at = tl.where(at >= STAGES, at - STAGES, at) * HALO + th
                        for line in gl.static_range(LINES):
                            acc = sums[plane * LINES + line]
                            started = started + (warpgroup_mma(x_ring.index(at + line), b, acc, is_async=True),)
                    sums = warpgroup_mma_wait(_PENDING, deps=started)
                sums = warpgroup_mma_wait(0, deps=sums)
                mbarrier.arrive(x_empty.index(stage))
                mbarrier.arrive(w_empty.index(w_stage))
                stage = next_stage(stage, 0, STAGES)[0]
                w_stage, w_parity = next_stage(w_stage, w_parity, W_STAGES)
            for _last in gl.static_range(PLANES - 1):
                mbarrier.arrive(x_empty.index(stage))
                stage = next_stage(stage, 0, STAGES)[0]

        d = _first_line(d, PLANES, dilation[0])
        h = _first_line(h, LINES, dilation[1])
        for plane in gl.static_range(MINE):
            for line in gl.static_range(LINES):
                at = (n, d + (WHICH * MINE + plane) * dilation[0], h + line * dilation[1], w_ * LINE)
                _write(
                    gl.permute(sums[plane * LINES + line], (1, 0)), y_ptr, bias_ptr, residual_ptr, slope, at, (0, 0, 0),
                    (1, 1, 1), y_size, y_strides, group * produced, 0, produced, 0, BIAS, ACTIVATION, Y_UNIT, INDEX,
                    (1, 1, 1, LINE), False, LINE, WRITTEN,
                )  # fmt: skip


@gluon.jit
def line_ring(
    y_ptr,
    bias_ptr,
    w,  # descriptor of (tap, filter, channel)
    x,  # descriptor of (n, d, h, w, channel)
    start,  # (d, h, w), as every triple: what the first tap of the first pixel reads
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
    TAPS_H: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr,  # planes of the ring
    W_STAGES: gl.constexpr,
    W_RING: gl.constexpr,  # layouts of shared memory
    X_RING: gl.constexpr,
    SUMS: gl.constexpr,  # layouts of registers
    WRITTEN: gl.constexpr,
):
    gl.static_assert(STAGES >= PLANES, "a step needs all its planes at once")
    gl.static_assert(PLANES % _CONSUMERS == 0 and PLANES * LINES > _CONSUMERS, "every consumer has several lines")
    produced = produced * Y_UNIT
    if DGRAD:
        w_ring = gl.allocate_shared_memory(w.dtype, [W_STAGES * TAPS_H, BLOCK_K, BLOCK_N], W_RING)
    else:
        w_ring = gl.allocate_shared_memory(w.dtype, [W_STAGES * TAPS_H, BLOCK_N, BLOCK_K], W_RING)
    x_ring = gl.allocate_shared_memory(x.dtype, [STAGES * (LINES + TAPS_H - 1), LINE, BLOCK_K], X_RING)
    x_full, x_empty = barriers(STAGES, _CONSUMERS)
    w_full, w_empty = barriers(W_STAGES, _CONSUMERS)
    gl.warp_specialize(
        [
            (
                _consume,
                (y_ptr, bias_ptr, residual_ptr, slope, kernel, y_size, tiles_by, dilation, y_strides, produced, groups, tiles,
                 w_ring, x_ring, x_full, x_empty, w_full, w_empty, 0, DGRAD, BIAS, ACTIVATION, Y_UNIT, INDEX, PLANES, LINES,
                 TAPS_H, BLOCK_N, STAGES, W_STAGES, SUMS, WRITTEN),
            ),
            (
                _consume,
                (y_ptr, bias_ptr, residual_ptr, slope, kernel, y_size, tiles_by, dilation, y_strides, produced, groups, tiles,
                 w_ring, x_ring, x_full, x_empty, w_full, w_empty, 1, DGRAD, BIAS, ACTIVATION, Y_UNIT, INDEX, PLANES, LINES,
                 TAPS_H, BLOCK_N, STAGES, W_STAGES, SUMS, WRITTEN),
            ),
            (
                _produce,
                (w, x, start, kernel, tiles_by, dilation, reduced, produced, groups, tiles, w_ring, x_ring, x_full, x_empty,
                 w_full, w_empty, DGRAD, PLANES, LINES, TAPS_H, STAGES, W_STAGES),
            ),
        ],
        [4, 1],
        [_CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )  # fmt: skip
