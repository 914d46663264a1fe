"""The float64 reference against torch's own float64 convolution and its autograd, and the error measures."""

from __future__ import annotations

import math

import pytest
import tolerances
import torch
import torch.nn.functional as F
from cases import Case, make

from triton_conv3d import reference
from triton_conv3d.problem import PASSES, Operands

GEOMETRIES = {
    "plain": dict(),
    "padded": dict(padding=(1, 1, 2, 2, 0, 0), batch=2),
    "strided": dict(stride=(2, 3, 1), input_size=(5, 7, 4)),
    "dilated": dict(dilation=(2, 1, 3), input_size=(6, 3, 8)),
    "groups": dict(groups=3, in_channels=6, out_channels=9),
    "depthwise": dict(groups=5, in_channels=5, out_channels=10, padding=(1,) * 6),
    "stride_above_kernel": dict(kernel_size=(1, 2, 1), stride=(2, 3, 4), input_size=(5, 8, 6)),
    "all": dict(
        batch=2, in_channels=4, out_channels=6, input_size=(5, 6, 7), kernel_size=(2, 3, 4), stride=(2, 1, 3),
        padding=(1, 1, 0, 0, 2, 2), dilation=(1, 2, 1), groups=2,
    ),
}  # fmt: skip


@pytest.mark.parametrize("pass_", PASSES)
@pytest.mark.parametrize("name", GEOMETRIES)
def test_reference_equals_torch_in_float64(name: str, pass_: str) -> None:
    case = Case(pass_, exact=False, **GEOMETRIES[name])
    p = case.geometry()
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(p.input_shape, dtype=torch.float64, generator=generator, requires_grad=True)
    w = torch.randn(p.weight_shape, dtype=torch.float64, generator=generator, requires_grad=True)
    b = torch.randn(p.out_channels, dtype=torch.float64, generator=generator)
    y = F.conv3d(x, w, b, p.stride, p.padding[::2], p.dilation, p.groups)
    grad = torch.randn(y.shape, dtype=torch.float64, generator=generator)
    y.backward(grad)
    expected = {"forward": y.detach(), "dgrad": x.grad, "wgrad": w.grad}[pass_]
    operands = {
        "forward": Operands(input=x, weight=w, bias=b),
        "dgrad": Operands(grad=grad, weight=w),
        "wgrad": Operands(grad=grad, input=x),
    }[pass_]
    result = reference.compute(p, operands)
    assert result.dtype == torch.float64 and result.is_contiguous() and not result.requires_grad
    torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("pass_", PASSES)
def test_asymmetric_padding_is_explicit_padding(pass_: str) -> None:
    case = Case(pass_, padding=(0, 2, 1, 0, 3, 1), stride=(1, 2, 2))
    problem, operands = make(case)
    grown = case.replace(padding=(0,) * 6, input_size=(6, 5, 8))
    if pass_ != "dgrad":
        operands = operands._replace(input=F.pad(operands.input, (3, 1, 1, 0, 0, 2)))
    explicit = reference.compute(grown.geometry(), operands)
    if pass_ == "dgrad":
        explicit = explicit[:, :, 0:4, 1:5, 3:7]
        _, operands = make(case)
    else:
        _, operands = make(case)
    assert torch.equal(reference.compute(problem, operands), explicit)


def test_reference_does_not_round_twice() -> None:
    """float16 operands are widened before, not after, the products."""
    x, w = torch.full((1, 1, 1, 1, 1), 1.0009765625).half(), torch.full((1, 1, 1, 1, 1), 1.0009765625).half()
    problem = Case("forward", in_channels=1, out_channels=1, input_size=(1, 1, 1), kernel_size=(1, 1, 1)).geometry()
    assert reference.compute(problem, Operands(input=x, weight=w)).item() == 1.0009765625**2


def test_magnitude_is_the_pass_over_absolute_values() -> None:
    problem, operands = make(Case("forward", bias=True, exact=False))
    absolute = operands.map(torch.abs)
    assert torch.equal(reference.magnitude(problem, operands), reference.compute(problem, absolute))
    assert bool((reference.magnitude(problem, operands) > reference.compute(problem, operands).abs()).any())


def test_reduction_counts_products() -> None:
    case = Case("forward", batch=2, in_channels=6, out_channels=4, groups=2, input_size=(4, 5, 6))
    assert reference.reduction(case.geometry()) == 3 * 27
    assert reference.reduction(case.replace(pass_="dgrad").geometry()) == 2 * 27
    assert reference.reduction(case.replace(pass_="wgrad").geometry()) == 2 * 2 * 3 * 4


def test_errors_measures() -> None:
    expected = torch.tensor([1.0, -2.0, 0.0], dtype=torch.float64)
    scale = torch.tensor([2.0, 4.0, 1.0], dtype=torch.float64)
    measured = tolerances.errors(torch.tensor([1.5, -2.0, 0.0]), expected, scale)
    assert measured.max == 0.25
    assert measured.rms == pytest.approx(0.5 / math.sqrt(21))
    assert measured.bias == 0.25
    assert tolerances.errors(expected, expected, scale) == tolerances.Errors(0.0, 0.0, 0.0)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_errors_of_what_is_not_finite(value: float) -> None:
    one = torch.ones(2, dtype=torch.float64)
    assert tolerances.errors(torch.tensor([1.0, value]), one, one).max == math.inf


def test_errors_where_the_result_must_be_zero() -> None:
    zero = torch.zeros(2, dtype=torch.float64)
    assert tolerances.errors(torch.tensor([0.0, 1e-30]), zero, zero).max == math.inf
    assert tolerances.errors(torch.zeros(2), zero, zero).max == 0


def test_errors_of_nothing_and_of_other_shapes() -> None:
    nothing = torch.empty(0, dtype=torch.float64)
    assert tolerances.errors(nothing, nothing, nothing) == tolerances.Errors(0.0, 0.0, 0.0)
    with pytest.raises(ValueError, match=r"result \(3,\), expected \(2,\)"):
        tolerances.errors(torch.ones(3), torch.ones(2), torch.ones(2))
