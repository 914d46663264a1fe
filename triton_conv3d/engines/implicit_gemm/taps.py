"""Which taps meet which positions, in the kernels of several engines."""

import triton
import triton.language as tl


@triton.jit
def class_at(index, stride):
    """Parity class of a strided dgrad -> its position (d, h, w) in a block of strides."""
    return index // (stride[2] * stride[1]) % stride[0], index // stride[2] % stride[1], index % stride[2]


@triton.jit
def parity_class(index, pad, size, kernel, stride, dilation, tap_step):
    """One dimension of a strided dgrad: the input positions i = j * stride + index, seen as a dense gather.

    Position i meets tap t where stride divides i + pad - t * dilation: every tap_step-th tap from a first one on.
    Returns the number of taps, the first tap, the gather's start, and the number of positions.
    """
    first = kernel
    for back in range(kernel):
        tap = kernel - 1 - back
        first = tl.where((index + pad - tap * dilation) % stride == 0, tap, first)
    taps = (kernel - first + tap_step - 1) // tap_step
    return taps, first, (index + pad - first * dilation) // stride, (size - index + stride - 1) // stride


@triton.jit
def live_taps(first, last, scale, start, step, size, taps):
    """One dimension of a gather: the taps [lo, hi) that any position first..last may meet; the others read only padding.

    Position j reads x at j * scale + start + t * step through tap t. Exact where scale is 1, and never too few.
    """
    low, high = first * scale + start, last * scale + start  # what tap 0 reads
    down = step < 0
    by = tl.where(down, -step, step)
    outside = tl.where(down, low - size + 1, -high)  # positions up to the first that lies inside,
    inside = tl.where(down, high, size - 1 - low)  # and to the last one
    hi = tl.minimum(tl.maximum(inside + by, 0) // by, taps)
    return tl.minimum(tl.cdiv(tl.maximum(outside, 0), by), hi), hi


@triton.jit
def plane_at(index, samples, depth, by_depth):
    """Plane -> (n, d): one sample after the other, or by_depth all planes of one depth before those of the next."""
    inner = tl.where(by_depth, samples, depth)
    fast, slow = index % inner, index // inner
    return tl.where(by_depth, fast, slow), tl.where(by_depth, slow, fast)


@triton.jit
def tap_bits(inner, width, at, step, size, taps, FLAT: tl.constexpr):
    """Which taps of one dimension, from position at on, lie inside [0, size); joined to the bits of those before it.

    FLAT: one bit for every tap of the kernel (inner has width bits, the result width * taps); else one for every tap
    of each dimension (width + taps bits).
    """
    bits = inner * 0 if FLAT else inner
    unit = inner if FLAT else inner * 0 + 1
    for tap in range(taps):
        inside = (at >= 0) & (at < size)
        shift = width * tap if FLAT else width + tap
        bits = bits | tl.where(inside, unit << shift, 0)
        at += step
    return bits
