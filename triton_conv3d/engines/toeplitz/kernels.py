"""The kernels of engine "toeplitz", which move and sum; the products are another engine's.

    move_blocks   x, as blocks of pixels that are channels: (n, phase, block, c, pixel of the block), zeros outside; or back
    expand        the weight, as the Toeplitz matrices of blocks
    collect       dw[c, t] = the sums along the diagonals of such matrices

Pixel p of block b lies at (b * P + p) * dilation + phase - front in each dimension. A tile is moved as lines along W on the
side of x, and as whole blocks on the other, so that both are read and written as they lie in memory.
"""

import triton
import triton.language as tl

from ..implicit_gemm.kernels import rounded


@triton.jit
def move_blocks(
    x_ptr,
    blocks_ptr,  # dense
    size,  # (d, h, w) of x, as every triple
    strides,  # (n, c, d, h, w) of x, in UNIT; that of c where it is LAST, else that of w, in elements
    channels,
    front,
    dilation,
    phases,
    blocks,
    tiles_c,
    tiles_w,
    P: tl.constexpr,  # pixels of a block
    BACK: tl.constexpr,  # from blocks to x
    LAST: tl.constexpr,
    UNIT: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCKS: tl.constexpr,  # along W
    INDEX: tl.constexpr,
):
    """A tile is (CHANNELS, lines of a block, pixels along W) on the side of x, (BLOCKS, all of one) on the other."""
    LINES: tl.constexpr = P[0] * P[1]
    PIXELS: tl.constexpr = LINES * P[2]
    program = tl.program_id(0)
    first_c = program % tiles_c * CHANNELS
    first_w = program // tiles_c % tiles_w * BLOCKS
    rest = program // tiles_c // tiles_w
    block_h = rest % blocks[1]
    block_d = rest // blocks[1] % blocks[0]
    batch = rest // blocks[1] // blocks[0]  # of blocks: samples x phases
    phase = batch % (phases[0] * phases[1] * phases[2])
    n = batch // (phases[0] * phases[1] * phases[2])

    c = first_c + tl.arange(0, CHANNELS)
    line = tl.arange(0, LINES)
    d = (block_d * P[0] + line // P[1]) * dilation[0] + phase // (phases[1] * phases[2]) - front[0]
    h = (block_h * P[1] + line % P[1]) * dilation[1] + phase // phases[2] % phases[1] - front[1]
    w = (first_w * P[2] + tl.arange(0, BLOCKS * P[2])) * dilation[2] + phase % phases[2] - front[2]
    in_line = (d >= 0) & (d < size[0]) & (h >= 0) & (h < size[1])
    in_run = (w >= 0) & (w < size[2])  # blocks beyond the last: on the way back outside of x, else not stored
    in_x = (c < channels)[:, None, None] & in_line[None, :, None] & in_run[None, None, :]
    lines = (d.to(INDEX) * strides[2] + h.to(INDEX) * strides[3]) * UNIT
    columns = c.to(INDEX) * (strides[1] if LAST else strides[1] * UNIT)
    pixels = w.to(INDEX) * (strides[4] * UNIT if LAST else strides[4])
    x_tile = n.to(INDEX) * strides[0] * UNIT + columns[:, None, None] + lines[None, :, None] + pixels[None, None, :]

    b = first_w + tl.arange(0, BLOCKS)
    column = first_c * PIXELS + tl.arange(0, CHANNELS * PIXELS)
    row = ((batch.to(INDEX) * blocks[0] + block_d) * blocks[1] + block_h) * blocks[2] + b
    in_blocks = (b < blocks[2])[:, None] & (column < channels * PIXELS)[None, :]
    blocks_tile = row[:, None] * (channels * PIXELS) + column[None, :]

    if BACK:
        value = tl.load(blocks_ptr + blocks_tile, mask=in_blocks, other=0.0)
        value = value.reshape(BLOCKS, CHANNELS, LINES, P[2]).permute(1, 2, 0, 3).reshape(CHANNELS, LINES, BLOCKS * P[2])
        tl.store(x_ptr + x_tile, value, mask=in_x)
    else:
        value = tl.load(x_ptr + x_tile, mask=in_x, other=0.0)
        value = value.reshape(CHANNELS, LINES, BLOCKS, P[2]).permute(2, 0, 1, 3).reshape(BLOCKS, CHANNELS * PIXELS)
        tl.store(blocks_ptr + blocks_tile, value, mask=in_blocks)


@triton.jit
def expand(
    w_ptr,
    matrix_ptr,  # (c, pixel of a block of y, taps, pixel of a block of x), dense
    kernel,  # (d, h, w), as every triple
    strides,  # (c, d, h, w), in elements
    taps,  # blocks of x that a block of y meets
    P: tl.constexpr,
    FLIP: tl.constexpr,  # of dgrad
    INDEX: tl.constexpr,
):
    """matrix[c, p, e, r] = w[c, e * P + r - p], 0 where there is no such tap."""
    PIXELS: tl.constexpr = P[0] * P[1] * P[2]
    all_taps = taps[0] * taps[1] * taps[2]
    c = tl.program_id(0) // all_taps
    e = tl.program_id(0) % all_taps
    p = tl.arange(0, PIXELS)[:, None]
    r = tl.arange(0, PIXELS)[None, :]
    d = e // (taps[1] * taps[2]) * P[0] + r // (P[1] * P[2]) - p // (P[1] * P[2])
    h = e // taps[2] % taps[1] * P[1] + r // P[2] % P[1] - p // P[2] % P[1]
    w = e % taps[2] * P[2] + r % P[2] - p % P[2]
    mask = (d >= 0) & (d < kernel[0]) & (h >= 0) & (h < kernel[1]) & (w >= 0) & (w < kernel[2])
    if FLIP:
        d = kernel[0] - 1 - d
        h = kernel[1] - 1 - h
        w = kernel[2] - 1 - w
    tap = c.to(INDEX) * strides[0] + d * strides[1] + h * strides[2] + w * strides[3]
    value = tl.load(w_ptr + tap, mask=mask, other=0.0)
    row = (c.to(INDEX) * PIXELS + p) * all_taps + e
    tl.store(matrix_ptr + row * PIXELS + r, value)


@triton.jit
def collect(
    matrix_ptr,  # float32 (c, pixel of a block of the gradient, taps, pixel of a block of x), dense
    dw_ptr,
    kernel,  # (d, h, w), as every triple
    strides,  # (c, d, h, w), in elements
    taps,
    P: tl.constexpr,
    TAPS: tl.constexpr,  # of the kernel, that one program sums
    INDEX: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """dw[c, t] = sum over p of  matrix[c, p, e, r] where e * P + r = p + t."""
    PIXELS: tl.constexpr = P[0] * P[1] * P[2]
    count = kernel[0] * kernel[1] * kernel[2]
    parts = tl.cdiv(count, TAPS)
    c = tl.program_id(0) // parts
    t = tl.program_id(0) % parts * TAPS + tl.arange(0, TAPS)
    d = t // (kernel[1] * kernel[2])
    h = t // kernel[2] % kernel[1]
    w = t % kernel[2]
    p = tl.arange(0, PIXELS)[None, :]
    x_d = d[:, None] + p // (P[1] * P[2])
    x_h = h[:, None] + p // P[2] % P[1]
    x_w = w[:, None] + p % P[2]
    e = (x_d // P[0] * taps[1] + x_h // P[1]) * taps[2] + x_w // P[2]
    r = (x_d % P[0] * P[1] + x_h % P[1]) * P[2] + x_w % P[2]
    row = (c.to(INDEX) * PIXELS + p) * (taps[0] * taps[1] * taps[2]) + e
    value = tl.load(matrix_ptr + row * PIXELS + r, mask=(t < count)[:, None], other=0.0)
    total = rounded(tl.sum(value, 1), dw_ptr.dtype.element_ty, UPCAST)
    at = c.to(INDEX) * strides[0] + d * strides[1] + h * strides[2] + w * strides[3]
    tl.store(dw_ptr + at, total, mask=t < count)
