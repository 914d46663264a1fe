"""Parity classes of a dgrad with a stride, known when a kernel is compiled: plain Python over AXES.

AXES = (taps, stride, phase) along d, h and w, with the padding for a phase, less whole strides of it. Along each, cell m has
the pixels stride * m + c of all classes c; they meet the gradient at m + i, for shifts i, through tap c + phase - stride * i.
"""

import math

import triton


@triton.constexpr_function
def shifts(AXIS):
    """The first, and how many there are, through which a cell meets the gradient."""
    taps, stride, phase = AXIS
    first = -((taps - 1 - phase) // stride)
    return first, (stride - 1 + phase) // stride - first + 1


@triton.constexpr_function
def shifts_of(AXES, axis):
    return shifts(AXES[axis])[1]


@triton.constexpr_function
def strides_of(AXES):
    return tuple(stride for _, stride, _ in AXES)


@triton.constexpr_function
def sizes(AXES):
    """(taps, classes, steps of a block of filters)."""
    taps = math.prod(taps for taps, _, _ in AXES)
    return taps, math.prod(strides_of(AXES)), shifts_of(AXES, 0) * shifts_of(AXES, 2)


@triton.constexpr_function
def class_of(index, AXES):
    """Parity class -> its place (d, h, w) in a block of strides."""
    _, by_h, by_w = strides_of(AXES)
    return index // (by_h * by_w), index // by_w % by_h, index % by_w


@triton.constexpr_function
def tap_of(index, step, h, AXES):
    """The tap through which a class meets the gradient in a step, at the h-th shift along H; None: through none."""
    found, by_w = 0, shifts_of(AXES, 2)
    for axis, place, shift in zip(AXES, class_of(index, AXES), (step // by_w, h, step % by_w), strict=True):
        taps, stride, phase = axis
        first, number = shifts(axis)
        tap = place + phase - stride * (first + shift)
        if not (0 <= shift < number and 0 <= tap < taps):
            return None
        found = found * taps + tap
    return found


@triton.constexpr_function
def taps_of(step, AXES):
    """The taps that a step needs, of all classes and at all shifts along H."""
    _, classes, _ = sizes(AXES)
    met = (tap_of(index, step, h, AXES) for index in range(classes) for h in range(shifts_of(AXES, 1)))
    return tuple(sorted(tap for tap in met if tap is not None))
