"""What meets what along one dimension, known when a kernel is compiled: plain Python over AXIS and DEPTH.

AXIS = (kernel, stride, dilation, padding before) of H or W; DEPTH = (kernel, stride, dilation). Positions count from
the start of a strip: a number of neighbouring outputs that one lane computes. In dgrad the input is the gradient.
"""

import triton


@triton.constexpr_function
def positions(OUTPUTS, AXIS, DGRAD):
    """Input positions that a strip of so many outputs meets, in increasing order."""
    kernel, stride, dilation, pad = AXIS
    ahead = [pad - t * dilation for t in range(kernel)]
    if DGRAD:  # output o meets the gradient at (o + ahead) / stride, where stride divides
        met = [range(-(-a // stride), (OUTPUTS - 1 + a) // stride + 1) for a in ahead]
    else:  # and the input at o * stride - ahead
        met = [range(-a, OUTPUTS * stride - a, stride) for a in ahead]
    return sorted(set().union(*met))


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


@triton.constexpr_function
def dilation(AXIS):
    return AXIS[2]
