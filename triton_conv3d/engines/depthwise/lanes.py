"""What the kernels share: which pixels a lane owns, and rows of pixels in and out of registers."""

import triton
import triton.language as tl

from ..epilogue import finished
from ..implicit_gemm.kernels import rounded
from .axes import count, group_count, group_start, place_in_groups, position, slot_of, strip_step, taps


@triton.jit
def _float32(x):
    if x.dtype == tl.bfloat16:  # one instruction instead of two
        return (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        return x.to(tl.float32)


@triton.jit
def _split(x, BLOCK: tl.constexpr, GROUP: tl.constexpr):
    """(BLOCK, GROUP) as GROUP tensors, in registers."""
    if GROUP == 1:
        return (tl.reshape(x, [BLOCK]),)
    else:
        even, odd = tl.split(tl.reshape(x, [BLOCK, GROUP // 2, 2]))
        even = _split(even, BLOCK, GROUP // 2)
        odd = _split(odd, BLOCK, GROUP // 2)
        parts = ()
        for i in tl.static_range(GROUP // 2):
            parts += (even[i], odd[i])
        return parts


@triton.jit
def _join(parts, BLOCK: tl.constexpr, GROUP: tl.constexpr):
    """The inverse of :func:`_split`."""
    if GROUP == 1:
        return tl.reshape(parts[0], [BLOCK, 1])
    else:
        even = ()
        odd = ()
        for i in tl.static_range(GROUP // 2):
            even += (parts[2 * i],)
            odd += (parts[2 * i + 1],)
        both = tl.join(_join(even, BLOCK, GROUP // 2), _join(odd, BLOCK, GROUP // 2))
        return tl.reshape(both, [BLOCK, GROUP])


@triton.jit
def lanes(tile, UNIT: tl.constexpr, LAST: tl.constexpr, BLOCK: tl.constexpr):
    """(channel, strip along H, strip along W, in the tile) of every lane; tile = (channels in UNIT, H, W)."""
    lane = tl.arange(0, BLOCK)
    channels = tile[0] * UNIT
    if LAST:
        c = lane % channels
        strip = lane // channels
    else:
        c = lane // (tile[1] * tile[2])
        strip = lane % (tile[1] * tile[2])
    h = strip // tile[2]
    return c, h, strip % tile[2], (h < tile[1]) & (c < channels)


@triton.jit
def in_elements(strides, UNIT: tl.constexpr, INDEX: tl.constexpr):
    """Four strides in elements, in the type of offsets."""
    a = tl.full([], strides[0], INDEX) * UNIT
    b = tl.full([], strides[1], INDEX) * UNIT
    c = tl.full([], strides[2], INDEX) * UNIT
    return a, b, c, tl.full([], strides[3], INDEX) * UNIT


@triton.jit
def tile_of(program, tiles, chunks, LAST: tl.constexpr):
    """Program -> (sample, tile of channels, of H, of W, part of the depth), neighbours in memory close in time."""
    inner = tiles[0] if LAST else 1
    channel = program % inner
    program = program // inner
    w = program % tiles[2]
    h = program // tiles[2] % tiles[1]
    program = program // (tiles[2] * tiles[1])
    chunk = program % chunks
    n = program // chunks
    if not LAST:
        channel = n % tiles[0]
        n = n // tiles[0]
    return n, channel, h, w, chunk


@triton.jit
def _in_width(in_row, at, size, FIRST: tl.constexpr, STEP: tl.constexpr, EVEN: tl.constexpr):
    """Whether positions at + FIRST are inside; EVEN: every strip's own STEP positions are."""
    if EVEN and FIRST >= 0 and FIRST < STEP:
        return in_row
    else:  # as unsigned numbers negative positions are large: one comparison checks both ends
        return in_row & ((at + FIRST).to(tl.uint32, bitcast=True) < size)


@triton.jit
def load_line(
    row_ptr,
    lane,
    at,
    size,
    in_row,
    PIXEL: tl.constexpr,
    GROUP: tl.constexpr,
    EVEN: tl.constexpr,
    OUTPUTS: tl.constexpr,
    AXIS: tl.constexpr,
    DGRAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row of the strips' inputs in float32, a tensor for each of :func:`positions`; zeros outside.

    PIXEL: elements from pixel to pixel. GROUP: so many pixels, dense and aligned, are loaded as one vector.
    """
    STEP: tl.constexpr = strip_step(OUTPUTS, AXIS, DGRAD)
    line = ()
    if GROUP == 1:
        for slot in tl.static_range(count(OUTPUTS, AXIS, DGRAD)):
            inside = _in_width(in_row, at, size, position(slot, OUTPUTS, AXIS, DGRAD), STEP, EVEN)
            x = tl.load(row_ptr + position(slot, OUTPUTS, AXIS, DGRAD) * PIXEL + lane, mask=inside, other=0.0)
            line += (_float32(x),)
    else:
        loaded = ()
        for group in tl.static_range(group_count(OUTPUTS, AXIS, DGRAD, GROUP)):
            inside = _in_width(in_row, at, size, group_start(group, OUTPUTS, AXIS, DGRAD, GROUP), STEP, EVEN)
            group_ptr = row_ptr + group_start(group, OUTPUTS, AXIS, DGRAD, GROUP)
            x = tl.load(group_ptr + lane[:, None] + tl.arange(0, GROUP)[None, :], mask=inside[:, None], other=0.0)
            loaded += _split(_float32(x), BLOCK, GROUP)
        for slot in tl.static_range(count(OUTPUTS, AXIS, DGRAD)):
            line += (loaded[place_in_groups(slot, OUTPUTS, AXIS, DGRAD, GROUP)],)
    return line


@triton.jit
def store_line(
    row_ptr,
    residual_ptr,  # of the whole tensor, or None
    row,  # where the row begins in it
    lane,
    at,
    size,
    in_row,
    values,
    slope,
    PIXEL: tl.constexpr,
    GROUP: tl.constexpr,
    EVEN: tl.constexpr,
    COLUMNS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The strips' outputs of one row, in vectors of GROUP pixels."""
    for first in tl.static_range(0, COLUMNS, GROUP):
        inside = _in_width(in_row, at, size, first, COLUMNS, EVEN)
        if GROUP == 1:
            value = finished(values[first], residual_ptr, row + first * PIXEL + lane, inside, ACTIVATION, slope)
            value = rounded(value, row_ptr.dtype.element_ty, UPCAST)
            tl.store(row_ptr + first * PIXEL + lane, value, mask=inside)
        else:
            value = _join(values[first : first + GROUP], BLOCK, GROUP)
            group = lane[:, None] + tl.arange(0, GROUP)[None, :]
            value = finished(value, residual_ptr, row + first + group, inside[:, None], ACTIVATION, slope)
            value = rounded(value, row_ptr.dtype.element_ty, UPCAST)
            tl.store(row_ptr + first + lane[:, None] + tl.arange(0, GROUP)[None, :], value, mask=inside[:, None])


@triton.jit
def add_row(values, line, weights, COLUMNS: tl.constexpr, AXIS: tl.constexpr, DGRAD: tl.constexpr):
    """values[j] += sum over taps t of one row of weights[t] * the input that output j meets through t."""
    added = ()
    for j in tl.static_range(COLUMNS):
        value = values[j]
        for t in tl.static_range(taps(AXIS)):
            if slot_of(j, t, COLUMNS, AXIS, DGRAD) >= 0:
                value = tl.fma(line[slot_of(j, t, COLUMNS, AXIS, DGRAD)], weights[t], value)
        added += (value,)
    return added
