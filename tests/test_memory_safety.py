"""No access outside, no dependence on what lies there, and 64-bit offsets where a tensor needs them."""

from __future__ import annotations

import math
import signal

import pytest
import torch
from cases import Case, check_footprint, make
from guarded import run_modes, subprocess_of

from triton_conv3d import engines, reference
from triton_conv3d.problem import PASSES


def test_in_a_process_of_its_own() -> None:
    """end, start: tensors flush with pages that fault; checked: no 32-bit overflow; large: views of more than 2^31 elements."""
    run_modes("guarded.py", "end", "start", "checked", "large", "overflow")


def test_guards_stop_an_access_outside() -> None:
    done = subprocess_of("guarded.py", "overrun")
    assert done.returncode == -signal.SIGSEGV and "too far" in done.stdout


@pytest.mark.parametrize("pass_", PASSES)
@pytest.mark.parametrize("which", [0, 1], ids=["first_operand", "second_operand"])
@pytest.mark.parametrize("geometry", [
    dict(batch=2, in_channels=5, out_channels=6, padding=(1, 1, 0, 1, 2, 0)),
    dict(in_channels=6, out_channels=4, groups=2, stride=(2, 1, 2), input_size=(5, 3, 4), kernel_size=(2, 2, 3)),
    dict(in_channels=3, out_channels=2, dilation=(2, 1, 3), input_size=(5, 4, 7), kernel_size=(2, 2, 2)),
], ids=["padded", "groups_strided", "dilated"])  # fmt: skip
def test_one_nan_touches_only_its_footprint(geometry: dict, which: int, pass_: str) -> None:
    """The result is NaN exactly where the definition multiplies that element, and exact everywhere else.

    A weight in dgrad may also meet the zeros around the gradient: 0 * NaN, but only in its own channel. What is gathered
    meets the zeros between the weights of the groups that share its tile, but only in the same pixels.
    """
    problem, operands = make(Case(pass_, **geometry))

    def beyond(where: tuple[int, ...]) -> tuple | torch.Tensor | None:
        if problem.groups > 1 and (pass_, which) in (("forward", 0), ("dgrad", 1)):
            tensor = operands.input if pass_ == "forward" else operands.grad
            value, tensor[where] = tensor[where].item(), math.nan
            touched = reference.compute(problem, operands).isnan()
            tensor[where] = value
            return touched.any(1, keepdim=True).expand_as(touched)
        channel = where[0] // problem.group_out * problem.group_in + where[1]
        return (slice(None), channel) if (pass_, which) == ("dgrad", 0) else None

    check_footprint(engines.get("implicit_gemm"), problem, operands, which, beyond)
