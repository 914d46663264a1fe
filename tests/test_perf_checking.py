"""Checking results: the reference in slabs is the reference, and what is wrong is seen wherever it is."""

from __future__ import annotations

import math

import pytest
import tolerances
import torch

from perf.checking import Reference, slabs
from triton_conv3d import reference
from triton_conv3d.problem import PASSES, Operands, Problem

# kernel, stride, padding and dilation along depth, where slabs are cut
DEPTHS = {
    "plain": (3, 1, 1, 1),
    "strided": (3, 2, 1, 1),
    "gaps between patches": (2, 3, 0, 1),
    "dilated": (3, 1, 2, 2),
    "planes of padding only": (1, 1, 3, 1),
    "wide and strided": (5, 2, 4, 1),
    "pixels that no tap meets": (1, 2, 0, 1),
}


def problem_of(pass_: str, depth=(3, 1, 1, 1), batch: int = 3, **changes) -> Problem:
    kernel, stride, padding, dilation = depth
    return Problem(
        pass_, batch, 2, 4, (7, 3, 2), (kernel, 1, 2), stride=(stride, 1, 1), padding=(padding, padding, 0, 0, 1, 0),
        dilation=(dilation, 1, 1), groups=2, dtype="float32",
    ).replace(**changes)  # fmt: skip


def operands_of(problem: Problem) -> Operands:
    generator = torch.Generator().manual_seed(1)

    def random(shape: tuple[int, ...]) -> torch.Tensor:
        return torch.empty(shape, dtype=problem.torch_dtype).uniform_(-1, 1, generator=generator)

    return {
        "forward": lambda: Operands(random(problem.input_shape), random(problem.weight_shape)),
        "dgrad": lambda: Operands(None, random(problem.weight_shape), random(problem.output_shape)),
        "wgrad": lambda: Operands(random(problem.input_shape), None, random(problem.output_shape)),
    }[problem.pass_]()


@pytest.mark.parametrize("elements", (1, 60, 200, 10**6), ids=("planes", "few planes", "samples", "whole"))
@pytest.mark.parametrize("depth", DEPTHS.values(), ids=DEPTHS)
@pytest.mark.parametrize("pass_", PASSES)
def test_slabs_are_the_reference(pass_, depth, elements):
    problem = problem_of(pass_, depth)
    operands = operands_of(problem)
    expected = reference.compute(problem, operands)
    found, parts = torch.full_like(expected, math.nan), 0
    for index, part in slabs(problem, operands, reference.compute, elements):
        found[index] = part
        parts += 1
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    assert (parts == 1) == (pass_ == "wgrad" or elements == 10**6)


@pytest.mark.parametrize("elements", (60, 10**6), ids=("slabs", "whole"))
@pytest.mark.parametrize("pass_", PASSES)
class TestJudge:
    @pytest.mark.parametrize("dtype", ("float32", "float16"))
    def test_a_right_result_and_its_error(self, pass_, dtype, elements):
        problem = problem_of(pass_, dtype=dtype)
        operands = operands_of(problem)
        expected, magnitude = reference.compute(problem, operands), reference.magnitude(problem, operands)
        result = expected.to(problem.torch_dtype)
        judged = Reference(problem, operands, elements)
        for _ in range(2):  # whether the reference is kept or not
            right, error = judged.judge(result)
            assert right and error == pytest.approx(tolerances.errors(result, expected, magnitude).rms, rel=1e-6)

    @pytest.mark.parametrize("place", (0, -1), ids=("first", "last"))
    @pytest.mark.parametrize("value", (0.5, math.nan, math.inf))
    def test_one_wrong_element_is_seen(self, pass_, elements, place, value):
        problem = problem_of(pass_)
        operands = operands_of(problem)
        result = reference.compute(problem, operands).float()
        result.view(-1)[place] += value
        right, error = Reference(problem, operands, elements).judge(result)
        assert not right and error > 1e-3

    def test_another_shape_or_type_is_wrong(self, pass_, elements):
        problem = problem_of(pass_)
        judged = Reference(problem, operands_of(problem), elements)
        result = reference.compute(problem, judged.operands)
        assert judged.judge(result) == (False, math.inf)
        assert judged.judge(result.float()[..., :-1]) == (False, math.inf)


@pytest.mark.parametrize("elements, computed", [(60, 3), (10**6, 1)], ids=("slabs", "whole"))
def test_a_small_reference_is_computed_once(monkeypatch, elements, computed):
    problem = problem_of("forward", batch=1)
    judged = Reference(problem, operands_of(problem), elements)
    calls = []
    compute = reference.compute
    monkeypatch.setattr(reference, "compute", lambda part, operands: calls.append(part) or compute(part, operands))
    result = compute(problem, judged.operands).float()
    judged.judge(result)
    once = len(calls)
    for _ in range(2):
        assert judged.judge(result)[0]
    parts = len(list(slabs(problem, judged.operands, compute, elements)))
    # reference.magnitude calls compute as well: once for every part, however many results are judged
    assert once == 2 * parts and len(calls) == parts * (computed + 1)
