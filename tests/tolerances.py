"""Every tolerance of the project. A change here needs a reason, written beside it.

ref is the float64 result on the already quantised operands, A the same pass over absolute values
(:func:`triton_conv3d.reference.magnitude`), L the products of one accumulator, S the splits of the reduction.

    T1  small integers, every partial sum below 2^24: bit-equal, for every config, split and order
    T2  |y - ref| <= u |ref| + (c_in + c_acc) A
    T3  against torch's own in the same precision: RMS error <= 1.25x, maximum error <= 2x
    T4  same-sign data and long reductions: mean relative bias <= 1e-4
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from triton_conv3d import reference
from triton_conv3d.problem import NO_ACTIVATION, Operands, Problem

T3_RMS, T3_MAX = 1.25, 2.0
T4_BIAS = 1e-4
EXACT = 2**24  # float32 holds every integer up to here
COMPILED = 1e-5  # relative norm of a float32 model's outputs and gradients, compiled against eager: another order of sums
_UNIT = 2.0**-24  # roundoff of the float32 accumulator


def largest_integer(problem: Problem) -> int:
    """The largest integer m such that T1 data in [-m, m] keeps every partial sum, bias included, below 2^24.

    At most 8, so that products and most results stay exact in bfloat16 and float16 too.
    """
    products = max(1, reference.reduction(problem)) + problem.bias + problem.residual
    m = min(8, math.isqrt((EXACT - 1) // products))
    if problem.dtype == "float16":  # results have to stay below 65504
        m = min(m, math.isqrt(65504 // products))
    if m < 1:
        raise ValueError(f"no exact integer data for a reduction over {products} products: {problem}")
    return m


def check_exact(result: torch.Tensor, problem: Problem, operands: Operands) -> None:
    """T1: bit-equal to the exact integers, rounded once to the result's type (-0 and 0 count as equal)."""
    scale = reference.magnitude(problem, operands)
    assert scale.numel() == 0 or scale.max() < EXACT, f"T1 data reach {scale.max():.0f}: sums may round"
    expected = reference.compute(problem, operands).to(result.dtype)
    wrong = ~(result == expected)
    assert not bool(wrong.any()), _first(wrong, result, expected, "T1, exact integers")


def input_error(problem: Problem, operands: Operands, truncated: bool = False) -> torch.Tensor | float:
    """c_in of T2: what the products lose before they are summed, relative to A.

    Rounded tf32 loses at most 2^-10 a product; over K products of independent data errors cancel to
    8 * 2^-11 / sqrt(K). K counts the products of each element by itself: padding leaves fewer at the border. An
    expanded operand repeats one value, whose errors add up instead.
    """
    if problem.precision != "tf32":
        return {"ieee": 0.0, "tf32x3": 2.0**-22}[problem.precision]
    if truncated:
        return 2.0**-9
    if any(0 in tensor.stride() for tensor in operands.tensors if tensor is not None):
        return 2.0**-10
    ones = Operands(*operands[:3]).map(torch.ones_like)
    products = reference.compute(problem.replace(activation=NO_ACTIVATION), ones)
    return (8 * 2.0**-11 / products.sqrt()).clamp(max=2.0**-10)


def bound(
    problem: Problem,
    operands: Operands,
    expected: torch.Tensor,
    magnitude: torch.Tensor,
    *,
    length: int | None = None,
    splits: int = 1,
    tensor_cores: bool = False,
    truncated: bool = False,
    roundings: int = 1,
) -> torch.Tensor:
    """T2: the largest error allowed for each element.

    Args:
        length: L, the products of one accumulator; the whole reduction if not given.
        splits: S, the parts of the reduction that are summed afterwards.
        tensor_cores: products are summed by tensor cores, else by float32 additions (the interpreter, CPUs, ieee).
        truncated: tf32 operands are truncated instead of rounded (torch's own on some GPUs).
        roundings: to the result's type, on the way to one element; ours is 1, torch's own on CPUs one for every tap.
    """
    total = max(1, reference.reduction(problem))
    length = total if length is None else length
    c_in = input_error(problem, operands, truncated)
    if tensor_cores:
        chain = length / (8 if problem.precision != "ieee" else 16)
    else:
        chain = 4 * math.sqrt(length)
    c_acc = (chain + 4 * math.sqrt(splits) + 8) * _UNIT
    limits = torch.finfo(problem.torch_dtype)
    # Below the normal numbers roundoff is absolute: half the spacing of the subnormal ones.
    underflow = limits.smallest_normal * limits.eps / 2
    rounding = limits.eps / 2 * (expected.abs() + (roundings - 1) * magnitude)
    # exp, erf and a division each are a few units in the last place off, of numbers up to 6 where they cancel
    activation = 16 * _UNIT * (problem.activation != NO_ACTIVATION)
    return rounding + (c_in + c_acc) * magnitude + roundings * underflow + activation


def check_bound(result: torch.Tensor, problem: Problem, operands: Operands, **how) -> None:
    """T2, with the keywords of :func:`bound`."""
    expected = reference.compute(problem, operands)
    allowed = bound(problem, operands, expected, reference.magnitude(problem, operands), **how)
    wrong = ~((result.to(torch.float64) - expected).abs() <= allowed)
    assert not bool(wrong.any()), _first(wrong, result, expected, "T2, the error bound")


@dataclass(frozen=True)
class Errors:
    """
    max: largest error, each element's divided by its magnitude; ``inf`` if an element that must be 0 is not.
    rms: root of the mean squared error, divided by the root of the mean squared magnitude.
    bias: mean of the signed relative error, over the elements that are not 0: drift, on same-sign data.
    """

    max: float
    rms: float
    bias: float


def errors(result: torch.Tensor, expected: torch.Tensor, magnitude: torch.Tensor) -> Errors:
    """How far ``result`` is from ``expected``; NaN or infinity in ``result`` gives ``inf``.

    Args:
        result: what an engine computed, any dtype.
        expected, magnitude: of :func:`triton_conv3d.reference.compute` and ``magnitude``. All three of one shape.
    """
    if result.shape != expected.shape or expected.shape != magnitude.shape:
        raise ValueError(
            f"shapes differ: result {tuple(result.shape)}, expected {tuple(expected.shape)}, "
            f"magnitude {tuple(magnitude.shape)}"
        )
    if result.numel() == 0:
        return Errors(0.0, 0.0, 0.0)
    error = result.detach().to(torch.float64) - expected
    if not bool(error.isfinite().all()):
        return Errors(math.inf, math.inf, math.inf)
    relative = torch.where(error == 0, 0.0, error.abs() / magnitude)
    scale = magnitude.square().mean().sqrt().item()
    rms = error.square().mean().sqrt().item()
    nonzero = expected != 0
    bias = (error[nonzero] / expected[nonzero].abs()).mean().item() if bool(nonzero.any()) else 0.0
    return Errors(relative.max().item(), rms / scale if scale else (math.inf if rms else 0.0), bias)


def check_peer(ours: Errors, peer: Errors) -> None:
    """T3: our errors against those of torch's own convolution on the same operands and in the same precision."""
    assert ours.rms <= T3_RMS * peer.rms, f"T3: RMS error {ours.rms:.3g}, torch's {peer.rms:.3g}"
    assert ours.max <= T3_MAX * peer.max, f"T3: maximum error {ours.max:.3g}, torch's {peer.max:.3g}"


def check_drift(result: torch.Tensor, problem: Problem, operands: Operands) -> None:
    """T4, on operands of one sign."""
    expected = reference.compute(problem, operands)
    bias = errors(result, expected, expected.abs()).bias
    assert abs(bias) <= T4_BIAS, f"T4: mean relative bias {bias:.3g}, allowed {T4_BIAS:g}"


def _first(wrong: torch.Tensor, result: torch.Tensor, expected: torch.Tensor, rule: str) -> str:
    where = tuple(wrong.nonzero()[0].tolist())
    return (
        f"{rule}: {int(wrong.sum())} of {wrong.numel()} elements are wrong, "
        f"the first at {where}: {result[where].item()}, expected {expected[where].item()}"
    )
