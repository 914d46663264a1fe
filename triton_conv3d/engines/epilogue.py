"""What kernels do to their float32 sums before they round them, once: the residual is added, then the activation applied."""

import triton
import triton.language as tl


@triton.jit
def _tanh(value):
    """By an exponential that cannot overflow; near 0, where 1 - exp(-2 |x|) would cancel, by its series."""
    shrunk = tl.exp(-2.0 * tl.abs(value))
    far = (1.0 - shrunk) / (1.0 + shrunk)
    square = value * value
    near = value * (1.0 + square * (-1.0 / 3.0 + square * (2.0 / 15.0)))  # the next term is below 6e-8 of it up to 0.1
    return tl.where(tl.abs(value) < 0.1, near, tl.where(value < 0.0, -far, far))


@triton.jit
def activated(value, ACTIVATION: tl.constexpr, slope):
    """One of :data:`..problem.ACTIVATIONS`, as torch defines it, in float32; ``slope`` is of a leaky_relu only."""
    if ACTIVATION == "relu":
        value = tl.where(value <= 0.0, 0.0, value)  # NaN stays
    if ACTIVATION == "leaky_relu":
        value = tl.where(value > 0.0, value, value * slope)
    if ACTIVATION == "silu":
        value = value / (1.0 + tl.exp(-value))
    if ACTIVATION == "gelu":
        value = 0.5 * value * (1.0 + tl.math.erf(value * 0.7071067811865476))
    if ACTIVATION == "gelu_tanh":  # 1 + tanh(u) is 2 sigmoid(2 u); 2 sqrt(2 / pi)
        value = value / (1.0 + tl.exp(-1.5957691216057308 * (value + 0.044715 * value * value * value)))
    if ACTIVATION == "sigmoid":
        value = 1.0 / (1.0 + tl.exp(-value))
    if ACTIVATION == "tanh":
        value = _tanh(value)
    if ACTIVATION == "hardswish":
        value = value * tl.minimum(tl.maximum(value + 3.0, 0.0), 6.0) / 6.0
    return value


@triton.jit
def finished(value, residual_ptr, offsets, mask, ACTIVATION: tl.constexpr, slope):
    """float32 sums, bias included, as they are to be rounded. ``residual_ptr``: None without a residual."""
    if residual_ptr is not None:
        value += tl.load(residual_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    return activated(value, ACTIVATION, slope)
