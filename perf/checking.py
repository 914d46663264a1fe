"""Whether a result is right: against float64, slab by slab, so that even the largest volume is checked in full."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property

import torch

from triton_conv3d import reference
from triton_conv3d.problem import Operands, Problem
from triton_conv3d.tuning import verify

SLAB = 2**27  # elements of a slab's input or output: 1 GiB in float64, of which the reference holds a few at a time

Index = tuple[slice, ...]


class Reference:
    """The exact result of a problem. It is kept if it is one slab, else computed anew for each result.

    Args:
        operands: uniform in (-1, 1), as :func:`triton_conv3d.tuning.verify.is_right` expects.
        elements: of a slab, at most, as far as planes along depth can be told apart.
    """

    def __init__(self, problem: Problem, operands: Operands, elements: int = SLAB):
        self.problem, self.operands, self.elements = problem, operands, elements

    def judge(self, result: torch.Tensor, *, coarse: bool = False) -> tuple[bool, float]:
        """(whether every element is within the error that its arithmetic allows, RMS error over RMS magnitude).

        Args:
            coarse: partial sums may be rounded to the result's type, as some of torch's own algorithms do.
        """
        if result.shape != self.problem.result_shape or result.dtype != self.problem.torch_dtype:
            return False, math.inf
        right, squares = True, 0.0
        for index, expected in self._slabs():
            part = result[index]
            right = verify.is_right(self.problem, part, expected, coarse=coarse) and right
            squares += (part.to(torch.float64) - expected).square().sum().item()
        error = math.sqrt(squares / self._magnitude) if self._magnitude else 0.0
        return right, error if math.isfinite(error) else math.inf

    def _slabs(self) -> Iterable[tuple[Index, torch.Tensor]]:
        samples, planes = _steps(self.problem, self.elements)
        one = samples >= self.problem.batch and planes == self.problem.output_size[0]
        if one or self.problem.pass_ == "wgrad":
            return self._kept
        return slabs(self.problem, self.operands, reference.compute, self.elements)

    @cached_property
    def _kept(self) -> list[tuple[Index, torch.Tensor]]:
        return list(slabs(self.problem, self.operands, reference.compute, self.elements))

    @cached_property
    def _magnitude(self) -> float:
        """Sum of the squared magnitude of every element."""
        found = slabs(self.problem, self.operands, reference.magnitude, self.elements)
        return sum(part.square().sum().item() for _, part in found)


def slabs(
    problem: Problem,
    operands: Operands,
    function: Callable[[Problem, Operands], torch.Tensor],
    elements: int = SLAB,
) -> Iterator[tuple[Index, torch.Tensor]]:
    """``function`` of a problem in parts: (index into the result, float64 values there).

    Args:
        function: :func:`triton_conv3d.reference.compute` or :func:`~triton_conv3d.reference.magnitude`.
        elements: as of :class:`Reference`.
    """
    samples, planes = _steps(problem, elements)
    if problem.pass_ == "wgrad":
        yield (slice(None),), sum(_wgrad(problem, operands, function, samples, planes))
        return
    part, step = _forward, planes
    if problem.pass_ == "dgrad":  # planes of the input: so many to one of the output
        part, step = _dgrad, problem.input_size[0] if planes == problem.output_size[0] else planes * problem.stride[0]
    for batch in _ranges(problem.batch, samples):
        for rows in _ranges(problem.result_shape[2], step):
            yield (batch, slice(None), rows), part(problem, operands, function, batch, rows)


def _steps(problem: Problem, elements: int) -> tuple[int, int]:
    """Samples, and planes of the output, of one slab."""
    sample = max(math.prod(problem.input_shape[1:]), math.prod(problem.output_shape[1:]))
    depth = problem.output_size[0]
    return (elements // sample, depth) if sample <= elements else (1, max(1, elements * depth // sample))


def _ranges(size: int, step: int) -> Iterator[slice]:
    for first in range(0, size, step):
        yield slice(first, min(first + step, size))


def _window(problem: Problem, batch: slice, planes: slice) -> tuple[slice, Problem]:
    """The planes of the input that these planes of the output read, and the problem between the two."""
    size, reach = problem.input_size[0], problem.dilation[0] * (problem.kernel_size[0] - 1) + 1
    begin = planes.start * problem.stride[0] - problem.padding[0]
    end = (planes.stop - 1) * problem.stride[0] - problem.padding[0] + reach
    first = min(max(begin, 0), size)
    last = max(min(end, size), first)
    front = min(max(-begin, 0), end - begin)
    part = problem.replace(
        batch=batch.stop - batch.start,
        input_size=(last - first, *problem.input_size[1:]),
        padding=(front, end - begin - (last - first) - front, *problem.padding[2:]),
    )
    return slice(first, last), part


def _forward(problem, operands, function, batch: slice, planes: slice) -> torch.Tensor:
    rows, part = _window(problem, batch, planes)
    return function(part, operands._replace(input=operands.input[batch, :, rows]))


def _wgrad(problem, operands, function, samples: int, planes: int) -> Iterator[torch.Tensor]:
    for batch in _ranges(problem.batch, samples):
        for some in _ranges(problem.output_size[0], planes):
            rows, part = _window(problem, batch, some)
            yield function(part, Operands(operands.input[batch, :, rows], None, operands.grad[batch, :, some]))


def _dgrad(problem, operands, function, batch: slice, rows: slice) -> torch.Tensor:
    """Some planes of the input's gradient, from every plane of the output's that reaches them."""
    stride, front = problem.stride[0], problem.padding[0]
    reach = problem.dilation[0] * (problem.kernel_size[0] - 1)
    first = max(0, -(-(rows.start + front - reach) // stride))
    last = min(problem.output_size[0], (rows.stop - 1 + front) // stride + 1)
    shape = (batch.stop - batch.start, problem.in_channels, rows.stop - rows.start, *problem.input_size[1:])
    result = torch.zeros(shape, dtype=torch.float64, device=operands.grad.device)
    if first < last:
        planes = slice(first, last)
        reached, part = _window(problem, batch, planes)
        found = function(part, operands._replace(grad=operands.grad[batch, :, planes]))
        low, high = max(rows.start, reached.start), min(rows.stop, reached.stop)
        if low < high:
            into = result[:, :, low - rows.start : high - rows.start]
            into.copy_(found[:, :, low - reached.start : high - reached.start])
    return result
