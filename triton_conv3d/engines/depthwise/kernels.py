"""forward and dgrad of a depthwise convolution: every lane owns one channel and a strip of ROWS x COLUMNS pixels.

    slide   small kernels: all taps of a channel stay in registers, and every plane of the input is read once
    rows    any kernel: one row of taps at a time

Tensors are one-dimensional: lanes run over channels and strips, channels fastest where memory has them dense, so that
neighbours in a warp read neighbours in memory. Every pixel of a strip is a tensor of its own: an input is loaded and
converted once for all outputs and taps that it meets. What meets what along one dimension is known when a kernel is
compiled: AXIS = (kernel, stride, dilation, padding before), positions counted from the strip's own start. Sizes and
strides are run-time values, in units that prove the alignment of vectors; the step from pixel to pixel along W is not,
so that loads carry it as an immediate.
"""

import triton
import triton.language as tl

from ..implicit_gemm.kernels import _parity_class, _rounded


@triton.constexpr_function
def positions(OUTPUTS, AXIS, DGRAD):
    """Input positions that a strip of so many outputs meets, in increasing order."""
    kernel, stride, dilation, pad = AXIS
    pairs = [(o, t) for o in range(OUTPUTS) for t in range(kernel)]
    if DGRAD:  # output o meets the gradient at (o + pad - t * dilation) / stride, where stride divides
        ahead = [o + pad - t * dilation for o, t in pairs]
        return sorted({a // stride for a in ahead if a % stride == 0})
    return sorted({o * stride + t * dilation - pad for o, t in pairs})


@triton.constexpr_function
def count(OUTPUTS, AXIS, DGRAD):
    return len(positions(OUTPUTS, AXIS, DGRAD))


@triton.constexpr_function
def position(slot, OUTPUTS, AXIS, DGRAD):
    return positions(OUTPUTS, AXIS, DGRAD)[slot]


@triton.constexpr_function
def slot_of(output, tap, OUTPUTS, AXIS, DGRAD):
    """Place in :func:`positions` of the input that an output meets through a tap; -1 if there is none."""
    _, stride, dilation, pad = AXIS
    at = output + pad - tap * dilation if DGRAD else output * stride + tap * dilation - pad
    if DGRAD and at % stride:
        return -1
    return positions(OUTPUTS, AXIS, DGRAD).index(at // stride if DGRAD else at)


@triton.constexpr_function
def tap_of(output, slot, OUTPUTS, AXIS, DGRAD):
    """The tap through which an output meets this input; -1 if there is none."""
    taps = [t for t in range(AXIS[0]) if slot_of(output, t, OUTPUTS, AXIS, DGRAD) == slot]
    return taps[0] if taps else -1


@triton.constexpr_function
def strip_step(OUTPUTS, AXIS, DGRAD):
    """Input positions from one strip to the next."""
    return OUTPUTS // AXIS[1] if DGRAD else OUTPUTS * AXIS[1]


@triton.constexpr_function
def group_count(OUTPUTS, AXIS, DGRAD, GROUP):
    return len({at // GROUP for at in positions(OUTPUTS, AXIS, DGRAD)})


@triton.constexpr_function
def group_start(group, OUTPUTS, AXIS, DGRAD, GROUP):
    return sorted({at // GROUP for at in positions(OUTPUTS, AXIS, DGRAD)})[group] * GROUP


@triton.constexpr_function
def place_in_groups(slot, OUTPUTS, AXIS, DGRAD, GROUP):
    at = positions(OUTPUTS, AXIS, DGRAD)
    groups = sorted({a // GROUP for a in at})
    return groups.index(at[slot] // GROUP) * GROUP + at[slot] % GROUP


@triton.constexpr_function
def ring_size(DEPTH, DGRAD):
    """Planes of the result that are open at one time while the input's planes pass by."""
    kernel, stride, dilation = DEPTH
    return max((kernel - 1) * dilation + 1, stride) if DGRAD else (kernel - 1) * dilation // stride + 1


@triton.constexpr_function
def depth_tap(plane, open_plane, DEPTH, DGRAD):
    """The tap through which a step's input plane meets an open plane of the result, the oldest first; -1: none."""
    kernel, stride, dilation = DEPTH
    ahead = open_plane if DGRAD else (ring_size(DEPTH, False) - 1 - open_plane) * stride + plane
    return ahead // dilation if ahead % dilation == 0 and ahead // dilation < kernel else -1


@triton.constexpr_function
def row_of_taps(plane, open_plane, output, slot, OUTPUTS, DEPTH, HEIGHT, DGRAD):
    """The row of taps through which a row of inputs meets a row of outputs; -1 if there is none."""
    kd = depth_tap(plane, open_plane, DEPTH, DGRAD)
    kh = tap_of(output, slot, OUTPUTS, HEIGHT, DGRAD)
    return kd * HEIGHT[0] + kh if kd >= 0 and kh >= 0 else -1


@triton.constexpr_function
def taps(AXIS):
    return AXIS[0]


@triton.constexpr_function
def stride(AXIS):
    return AXIS[1]


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
def _lanes(tile, UNIT: tl.constexpr, LAST: tl.constexpr, BLOCK: tl.constexpr):
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
def _tile_of(program, tiles, chunks, LAST: tl.constexpr):
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
            loaded += _split(x, BLOCK, GROUP)
        for slot in tl.static_range(count(OUTPUTS, AXIS, DGRAD)):
            line += (_float32(loaded[place_in_groups(slot, OUTPUTS, AXIS, DGRAD, GROUP)]),)
    return line


@triton.jit
def _store_line(
    row_ptr,
    lane,
    at,
    size,
    in_row,
    values,
    PIXEL: tl.constexpr,
    GROUP: tl.constexpr,
    EVEN: tl.constexpr,
    COLUMNS: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The strips' outputs of one row, in vectors of GROUP pixels."""
    for first in tl.static_range(0, COLUMNS, GROUP):
        inside = _in_width(in_row, at, size, first, COLUMNS, EVEN)
        if GROUP == 1:
            value = _rounded(values[first], row_ptr.dtype.element_ty, UPCAST)
            tl.store(row_ptr + first * PIXEL + lane, value, mask=inside)
        else:
            value = _rounded(
                _join(values[first : first + GROUP], BLOCK, GROUP), row_ptr.dtype.element_ty, UPCAST
            )
            tl.store(row_ptr + first + lane[:, None] + tl.arange(0, GROUP)[None, :], value, mask=inside[:, None])


@triton.jit
def _add_row(values, line, weights, COLUMNS: tl.constexpr, AXIS: tl.constexpr, DGRAD: tl.constexpr):
    """values[j] += sum over taps t of one row of weights[t] * the input that output j meets through t."""
    added = ()
    for j in tl.static_range(COLUMNS):
        value = values[j]
        for t in tl.static_range(taps(AXIS)):
            if slot_of(j, t, COLUMNS, AXIS, DGRAD) >= 0:
                value = tl.fma(line[slot_of(j, t, COLUMNS, AXIS, DGRAD)], weights[t], value)
        added += (value,)
    return added


@triton.jit
def slide(
    x_ptr,
    w_ptr,
    bias_ptr,
    y_ptr,
    x_size,  # (d, h, w)
    y_size,
    pad_d,
    x_strides,  # (n, c, d, h) in X_UNIT
    w_strides,  # (filter, d, h, w) in elements
    y_strides,  # (n, c, d, h) in Y_UNIT
    channels,  # of the result, in C_UNIT
    tile,  # lanes along (channels in C_UNIT, H, W)
    tiles,
    strips,  # along (H, W)
    chunk,  # planes of the result that one program computes
    chunks,
    X_UNIT: tl.constexpr,
    Y_UNIT: tl.constexpr,
    C_UNIT: tl.constexpr,
    X_PIXEL: tl.constexpr,
    Y_PIXEL: tl.constexpr,
    X_GROUP: tl.constexpr,
    Y_GROUP: tl.constexpr,
    X_EVEN: tl.constexpr,
    Y_EVEN: tl.constexpr,
    LAST: tl.constexpr,  # the channels of x are dense
    Y_LAST: tl.constexpr,
    MULTIPLIER: tl.constexpr,
    DGRAD: tl.constexpr,
    DEPTH: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    BIAS: tl.constexpr,
    INDEX: tl.constexpr,
    UPCAST: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Planes of the input pass by; an accumulator is open for every plane of the result that still awaits some."""
    n, tile_c, tile_h, tile_w, part = _tile_of(tl.program_id(0), tiles, chunks, LAST)
    c, h, w, inside = _lanes(tile, C_UNIT, LAST, BLOCK)
    c += tile_c * tile[0] * C_UNIT
    inside &= c < channels * C_UNIT
    inside &= (tile_h * tile[1] + h < strips[0]) & (tile_w * tile[2] + w < strips[1])
    h = tl.minimum(tile_h * tile[1] + h, strips[0] - 1)
    w = tl.minimum(tile_w * tile[2] + w, strips[1] - 1)

    xh = h * strip_step(ROWS, HEIGHT, DGRAD)
    xw = w * strip_step(COLUMNS, WIDTH, DGRAD)
    x_lane = (c // MULTIPLIER).to(INDEX) * (1 if LAST else x_strides[1] * X_UNIT)
    x_lane += xh.to(INDEX) * (x_strides[3] * X_UNIT) + xw.to(INDEX) * X_PIXEL
    x_ptr += n.to(INDEX) * (x_strides[0] * X_UNIT)
    yh = h * ROWS
    yw = w * COLUMNS
    y_lane = c.to(INDEX) * (1 if Y_LAST else y_strides[1] * Y_UNIT)
    y_lane += yh.to(INDEX) * (y_strides[3] * Y_UNIT) + yw.to(INDEX) * Y_PIXEL
    y_ptr += n.to(INDEX) * (y_strides[0] * Y_UNIT)

    weights = ()
    for kd in tl.static_range(taps(DEPTH)):
        for kh in tl.static_range(taps(HEIGHT)):
            row_of_weights = ()
            for kw in tl.static_range(taps(WIDTH)):
                tap_ptr = w_ptr + kd * w_strides[1] + kh * w_strides[2] + kw * w_strides[3]
                row_of_weights += (tl.load(tap_ptr + c * w_strides[0], mask=inside, other=0.0).to(tl.float32),)
            weights += (row_of_weights,)
    initial = tl.zeros([BLOCK], tl.float32)
    if BIAS:
        initial += tl.load(bias_ptr + c, mask=inside, other=0.0).to(tl.float32)

    RING: tl.constexpr = ring_size(DEPTH, DGRAD)
    PLANES: tl.constexpr = 1 if DGRAD else stride(DEPTH)  # of the input, that one step reads
    DONE: tl.constexpr = stride(DEPTH) if DGRAD else 1  # planes of the result that one step completes
    STRIDE: tl.constexpr = stride(DEPTH)
    first = part * chunk
    end = tl.minimum(first + chunk, y_size[0])
    if DGRAD:
        step_0 = (tl.maximum(first + pad_d - (RING - 1), 0) + STRIDE - 1) // STRIDE
        steps = (end - 1 + pad_d) // STRIDE + 1
    else:
        step_0 = first
        steps = end + RING - 1
    empty_row = ()
    for _ in tl.static_range(COLUMNS):
        empty_row += (initial,)
    acc = ()
    for _ in tl.static_range(RING * ROWS):
        acc += (empty_row,)
    for step in range(step_0, steps):
        for p in tl.static_range(PLANES):
            z = step if DGRAD else step * STRIDE + p - pad_d
            height = tl.where((z >= 0) & (z < x_size[0]), x_size[1], 0)
            plane_ptr = x_ptr + tl.minimum(tl.maximum(z, 0), x_size[0] - 1).to(INDEX) * (x_strides[2] * X_UNIT)
            for r in tl.static_range(count(ROWS, HEIGHT, DGRAD)):
                in_row = inside & ((xh + position(r, ROWS, HEIGHT, DGRAD)).to(tl.uint32, bitcast=True) < height)
                row_ptr = plane_ptr + position(r, ROWS, HEIGHT, DGRAD) * (x_strides[3] * X_UNIT)
                line = load_line(
                    row_ptr, x_lane, xw, x_size[2], in_row, X_PIXEL, X_GROUP, X_EVEN, COLUMNS, WIDTH, DGRAD, BLOCK
                )
                for b in tl.static_range(RING):
                    for i in tl.static_range(ROWS):
                        if row_of_taps(p, b, i, r, ROWS, DEPTH, HEIGHT, DGRAD) >= 0:
                            row_of_weights = weights[row_of_taps(p, b, i, r, ROWS, DEPTH, HEIGHT, DGRAD)]
                            added = _add_row(acc[b * ROWS + i], line, row_of_weights, COLUMNS, WIDTH, DGRAD)
                            acc = acc[: b * ROWS + i] + (added,) + acc[b * ROWS + i + 1 :]
        for b in tl.static_range(DONE):
            o = step * STRIDE - pad_d + b if DGRAD else step - (RING - 1)
            if (o >= first) & (o < end):
                for i in tl.static_range(ROWS):
                    _store_line(
                        y_ptr + o.to(INDEX) * (y_strides[2] * Y_UNIT) + i * (y_strides[3] * Y_UNIT),
                        y_lane,
                        yw,
                        y_size[2],
                        inside & (yh + i < y_size[1]),
                        acc[b * ROWS + i],
                        Y_PIXEL,
                        Y_GROUP,
                        Y_EVEN,
                        COLUMNS,
                        UPCAST,
                        BLOCK,
                    )
        acc = acc[DONE * ROWS :]
        for _ in tl.static_range(DONE * ROWS):
            acc += (empty_row,)


@triton.jit
def rows(
    x_ptr,
    w_ptr,  # float32 (d, h, w, channel), dense
    bias_ptr,
    y_ptr,
    x_size,  # (d, h, w)
    y_size,
    kernel,  # (d, h)
    scale,  # (d, h): input positions from one output to the next
    start,  # (d, h): input position of the first output's first tap; of a strided dgrad: the padding
    step,  # (d, h): input positions from tap to tap
    stride,  # (d, h) of a strided dgrad: the parity classes
    dilation,
    tap_step,
    x_strides,  # (n, c, d, h) in X_UNIT
    y_strides,  # (n, c, d, h) in Y_UNIT
    channels,  # of the result, in C_UNIT
    all_weights,  # channels of the weight
    multiplier,
    parts,  # of a row of taps
    tile,  # lanes along (channels in C_UNIT, H, W)
    tiles,
    strips,  # along W
    chunk,  # planes of the result (of a parity class) that one program computes
    chunks,
    X_UNIT: tl.constexpr,
    Y_UNIT: tl.constexpr,
    C_UNIT: tl.constexpr,
    X_PIXEL: tl.constexpr,
    Y_PIXEL: tl.constexpr,
    X_GROUP: tl.constexpr,
    Y_GROUP: tl.constexpr,
    X_EVEN: tl.constexpr,
    Y_EVEN: tl.constexpr,
    LAST: tl.constexpr,
    Y_LAST: tl.constexpr,
    SINGLE: tl.constexpr,  # multiplier == 1
    DGRAD: tl.constexpr,
    STRIDED: tl.constexpr,
    WIDTH: tl.constexpr,  # of one part
    REST: tl.constexpr,  # the same axis with the taps that are left over
    SHIFT: tl.constexpr,  # input columns from part to part
    BIAS: tl.constexpr,
    INDEX: tl.constexpr,
    UPCAST: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Strips of one row: for every row of taps that meets the input, its inputs and its weights are loaded."""
    taps_d, taps_h = kernel[0], kernel[1]
    start_d, start_h = start[0], start[1]
    planes, lines = y_size[0], y_size[1]
    if STRIDED:
        index_h = tl.program_id(1) % stride[1]
        index_d = tl.program_id(1) // stride[1]
        taps_d, tap_d, start_d, planes = _parity_class(
            index_d, start[0], y_size[0], kernel[0], stride[0], dilation[0], tap_step[0]
        )
        taps_h, tap_h, start_h, lines = _parity_class(
            index_h, start[1], y_size[1], kernel[1], stride[1], dilation[1], tap_step[1]
        )
    n, tile_c, tile_h, tile_w, part = _tile_of(tl.program_id(0), tiles, chunks, LAST)
    c, h, w, inside = _lanes(tile, C_UNIT, LAST, BLOCK)
    c += tile_c * tile[0] * C_UNIT
    inside &= c < channels * C_UNIT
    inside &= (tile_h * tile[1] + h < lines) & (tile_w * tile[2] + w < strips)
    h = tl.minimum(tile_h * tile[1] + h, tl.maximum(lines - 1, 0))
    w = tl.minimum(tile_w * tile[2] + w, strips - 1)

    xh = h * scale[1] + start_h
    xw = w * strip_step(COLUMNS, WIDTH, DGRAD)
    if SINGLE:
        x_channel = c
    elif DGRAD:
        x_channel = c * multiplier
    else:
        x_channel = c // multiplier
    x_lane = x_channel.to(INDEX) * (1 if LAST else x_strides[1] * X_UNIT)
    x_lane += xh.to(INDEX) * (x_strides[3] * X_UNIT) + xw.to(INDEX) * X_PIXEL
    x_ptr += n.to(INDEX) * (x_strides[0] * X_UNIT)
    w_channel = x_channel if DGRAD else c
    yh = h
    yd = 0
    y_lane = c.to(INDEX) * (1 if Y_LAST else y_strides[1] * Y_UNIT) + (w * COLUMNS).to(INDEX) * Y_PIXEL
    initial = tl.zeros([BLOCK], tl.float32)
    if BIAS:
        initial += tl.load(bias_ptr + c, mask=inside, other=0.0).to(tl.float32)
