"""wgrad by a ring (ring.py), on the bricks of engines/tma.

    wgrad_ring  dw[k, t, c] = sum over output pixels p of  grad[p, k] * x_v[p * scale + start_v + t * step, c]

Both operands are turned as the matrix instructions read them from shared memory, bricks of several rows too.
"""

import triton
import triton.language as tl

from ..tma.kernels import _digits
from .gluon import gl, gluon, load, mbarrier
from .ring import PRODUCER_REGISTERS, barriers, multiply, next_digit, next_stage, part


@triton.jit
def tile_at(index, tiles_m, tiles_n, taps, splits):
    """Tile index -> (tile of filters, tile of channels, tap (d, h, w) of the view, split, group)."""
    tap = index // (tiles_m * tiles_n)
    rest = tap // (taps[2] * taps[1] * taps[0])
    td, th, tw = tap // (taps[2] * taps[1]) % taps[0], tap // taps[2] % taps[1], tap % taps[2]
    return index % tiles_m, index // tiles_m % tiles_n, td, th, tw, rest % splits, rest // splits


@gluon.jit
def _produce(
    grad,
    x,
    taps,
    start,
    scale,
    step,
    bricks,
    group_in,
    group_out,
    splits,
    tiles,
    grad_ring,
    x_ring,
    full,
    empty,
    BRICK: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
):
    BYTES: gl.constexpr = grad.block_type.nbytes + x.block_type.nbytes
    tiles_m = tl.cdiv(group_out, BLOCK_M)
    tiles_n = tl.cdiv(group_in, BLOCK_N)
    stage = 0
    parity = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        tile_m, tile_n, td, th, tw, split, group = tile_at(tile, tiles_m, tiles_n, taps, splits)
        filters = group * group_out + tile_m * BLOCK_M
        channels = group * group_in + tile_n * BLOCK_N
        x_d = start[0] + td * step[0]
        x_h = start[1] + th * step[1]
        x_w = start[2] + tw * step[2]
        begin, end = part(bricks[0] * bricks[1] * bricks[2] * bricks[3], split, splits)
        n, d, h, w = _digits(begin, bricks)
        for _ in range(begin, end):
            at_n, at_d, at_h, at_w = n * BRICK[0], d * BRICK[1], h * BRICK[2], w * BRICK[3]
            mbarrier.wait(empty.index(stage), parity ^ 1)
            mbarrier.expect(full.index(stage), BYTES)
            load(grad, [at_n, at_d, at_h, at_w, filters], full.index(stage), grad_ring.index(stage))
            x_at = [at_n, at_d * scale[0] + x_d, at_h * scale[1] + x_h, at_w * scale[2] + x_w, channels]
            load(x, x_at, full.index(stage), x_ring.index(stage))
            stage, parity = next_stage(stage, parity, STAGES)
            w, carry = next_digit(w, 1, bricks[3])
            h, carry = next_digit(h, carry, bricks[2])
            d, carry = next_digit(d, carry, bricks[1])
            n += carry


@gluon.jit
def _consume(
    dw_ptr,
    taps,
    first,
    tap_step,
    kernel,
    bricks,
    dw_strides,
    split_stride,
    group_in,
    group_out,
    splits,
    tiles,
    grad_ring,
    x_ring,
    full,
    empty,
    INDEX: gl.constexpr,
    CHAIN: gl.constexpr,
    BRICK: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
    SUMS: gl.constexpr,
):
    STEPS: gl.constexpr = CHAIN // (BRICK[0] * BRICK[1] * BRICK[2] * BRICK[3])
    tiles_m = tl.cdiv(group_out, BLOCK_M)
    tiles_n = tl.cdiv(group_in, BLOCK_N)
    stage = 0
    parity = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        tile_m, tile_n, td, th, tw, split, group = tile_at(tile, tiles_m, tiles_n, taps, splits)
        begin, end = part(bricks[0] * bricks[1] * bricks[2] * bricks[3], split, splits)
        total = gl.zeros([BLOCK_M, BLOCK_N], gl.float32, SUMS)
        if STEPS == 0:  # every split is one chain
            total, stage, parity = multiply(
                total, end - begin, grad_ring, x_ring, full, empty, stage, parity, True, False, STAGES
            )
        else:
            for chain in range(begin, end, STEPS):
                acc = gl.zeros([BLOCK_M, BLOCK_N], gl.float32, SUMS)
                steps = tl.minimum(end - chain, STEPS)
                acc, stage, parity = multiply(
                    acc, steps, grad_ring, x_ring, full, empty, stage, parity, True, False, STAGES
                )
                total += acc

        filter = tile_m * BLOCK_M + gl.arange(0, BLOCK_M, layout=gl.SliceLayout(1, SUMS))
        channel = tile_n * BLOCK_N + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, SUMS))
        w_tap = (first[0] + td * tap_step[0]) * kernel[1] + first[1] + th * tap_step[1]
        w_tap = w_tap * kernel[2] + first[2] + tw * tap_step[2]
        rows = (group * group_out + filter).to(INDEX) * dw_strides[0] + w_tap * dw_strides[1]
        columns = channel.to(INDEX) * dw_strides[2]
        dw_tile = dw_ptr + split.to(INDEX) * split_stride + (gl.expand_dims(rows, 1) + gl.expand_dims(columns, 0))
        inside = gl.expand_dims(filter < group_out, 1) & gl.expand_dims(channel < group_in, 0)
        gl.store(dw_tile, total.to(dw_ptr.dtype.element_ty), mask=inside)


@gluon.jit
def wgrad_ring(
    dw_ptr,
    grad,  # descriptor of (n, d, h, w, filter)
    x,  # descriptor of (n, d, h, w, channel) of one view
    taps,  # all as in wgrad_bricks
    first,
    start,
    scale,
    step,
    tap_step,
    kernel,
    bricks,
    dw_strides,
    split_stride,
    group_in,
    group_out,
    splits,
    tiles,
    INDEX: gl.constexpr,
    CHAIN: gl.constexpr,  # products of one accumulator before they join a total; 0: a split has no more
    BRICK: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
    GRAD_RING: gl.constexpr,  # layouts of shared memory
    X_RING: gl.constexpr,
    SUMS: gl.constexpr,  # of registers
):
    BLOCK_K: gl.constexpr = BRICK[0] * BRICK[1] * BRICK[2] * BRICK[3]
    grad_ring = gl.allocate_shared_memory(grad.dtype, [STAGES, BLOCK_K, BLOCK_M], GRAD_RING)
    x_ring = gl.allocate_shared_memory(x.dtype, [STAGES, BLOCK_K, BLOCK_N], X_RING)
    full, empty = barriers(STAGES)
    gl.warp_specialize(
        [
            (
                _consume,
                (dw_ptr, taps, first, tap_step, kernel, bricks, dw_strides, split_stride, group_in, group_out, splits, tiles,
                 grad_ring, x_ring, full, empty, INDEX, CHAIN, BRICK, BLOCK_M, BLOCK_N, STAGES, SUMS),
            ),
            (
                _produce,
                (grad, x, taps, start, scale, step, bricks, group_in, group_out, splits, tiles, grad_ring, x_ring, full,
                 empty, BRICK, BLOCK_M, BLOCK_N, STAGES),
            ),
        ],
        [1],
        [PRODUCER_REGISTERS],
    )  # fmt: skip
