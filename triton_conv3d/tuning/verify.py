"""Whether a candidate computes the right thing: private operands, a trusted result, and the bound between the two."""

from __future__ import annotations

import math

import torch

from ..engines import aten
from ..engines.base import CHAIN
from ..problem import NO_ACTIVATION, Operands, Problem
from ..reference import reduction, steepest

_SEED = 20_170_427
_CHUNKS = 16  # parts of a result that are compared one by one, so that differences need little memory
_ACTIVATION_ERROR = 16 * 2.0**-24  # of exp, erf and a division of a few units in the last place, up to 6
_DEVIATIONS = 8  # standard deviations that no element of a tensor of any size exceeds


def private_operands(operands: Operands) -> Operands:
    """Random tensors in (-1, 1) with the shapes, strides and alignments of these.

    The caller's own data would not do: zeros hide every fault, and one NaN makes every candidate look wrong. They are
    drawn from a generator of their own.
    """
    device = next(t for t in operands[:3] if t is not None).device
    generator = torch.Generator(device).manual_seed(_SEED)

    def like(tensor: torch.Tensor) -> torch.Tensor:
        offset = tensor.data_ptr() % 16 // tensor.element_size()
        extent = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        memory = torch.empty(offset + extent, dtype=tensor.dtype, device=device).uniform_(-1, 1, generator=generator)
        return memory.as_strided(tensor.shape, tensor.stride(), offset)

    return operands.map(like)


def trusted(problem: Problem, operands: Operands) -> torch.Tensor:
    """torch's own result in a wider type: float32 for 16-bit operands, else float64.

    Products of 16-bit operands are exact in tf32 as well, and float64 knows no other precision. Where memory does not
    permit it, 16-bit operands are judged by torch's result in their own type.

    Raises:
        torch.OutOfMemoryError: there is nothing to judge float32 by.
    """
    wide = torch.float32 if problem.itemsize == 2 else torch.float64
    try:
        widened = operands.map(lambda t: t.to(wide))
        wider = problem.replace(dtype=str(wide).removeprefix("torch."), precision="tf32")
        return aten.launch(wider, widened, aten.AtenConfig())
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        if problem.itemsize != 2:
            raise
        return aten.launch(problem, operands, aten.AtenConfig())


def is_right(
    problem: Problem,
    result: torch.Tensor,
    expected: torch.Tensor,
    *,
    negative_slope: float = 0.0,
    coarse: bool = False,
    stepwise: bool = False,
) -> bool:
    """Whether every element of a result on :func:`private_operands` is within the error that its arithmetic allows.

    A sum of L products of independent numbers in (-1, 1) has the standard deviation s = sqrt(L) / 3. Allowed are

    - 2 u (|expected| + bias): the result, and the one it is compared with, are rounded once, torch's also before bias;
    - 2^-5 s for tf32, 2^-16 s for tf32x3: 16 times what rounding or truncating the operands does to a sum;
    - 2 C 2^-24 s: tensor cores that truncate, with 8 products to a step and partial sums below 8 s. C is L up to
      16,384; beyond that partial sums are added up in turn and errors grow with the square root.

    An activation enlarges what its sum carries by its steepest slope at most, and adds 16 * 2^-24 of its own: functions
    that cancel, as 1 + erf, lose less on either side.

    A tap, a channel or a tile's edge that is missing or counted twice is far outside for every L in use; so is a
    residual that is missing, and an activation of another name or in another place.

    Args:
        negative_slope: of the operands.
        coarse: partial sums may be rounded to the result's type too, as some of torch's own algorithms do.
        stepwise: the sum may be rounded before the residual is added, and before the activation.
    """
    length = max(1, reduction(problem))
    deviation = math.sqrt(length) / 3
    unit = torch.finfo(result.dtype).eps / 2
    chain = min(length, CHAIN) * math.sqrt(max(1.0, length / CHAIN))
    rounded = {"tf32": 2.0**-5, "tf32x3": 2.0**-16}.get(problem.precision, 0.0)
    absolute = (rounded + 2 * chain * 2.0**-24) * deviation + 2 * unit * problem.bias
    if coarse:
        absolute += _DEVIATIONS * unit * deviation
    if stepwise:
        absolute += 2 * unit * (_DEVIATIONS * deviation + problem.bias + problem.residual)
    if problem.activation != NO_ACTIVATION:
        absolute = absolute * steepest(problem.activation, negative_slope) + _ACTIVATION_ERROR
    wide, longest = torch.promote_types(expected.dtype, torch.float32), max(range(result.dim()), key=result.size)
    within = []
    for part, other in zip(result.chunk(_CHUNKS, longest), expected.chunk(_CHUNKS, longest), strict=True):
        other = other.to(wide)
        within.append(((part.to(wide) - other).abs() <= 2 * unit * other.abs() + absolute).all())
    return bool(torch.stack(within).all())


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two results of the same launch have the same bits; those of no number count as one."""
    return bool(((one == other) | (one.isnan() & other.isnan())).all())
