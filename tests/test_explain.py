"""explain: what it tells of a call, and that it runs nothing."""

from __future__ import annotations

import pytest
import torch

import triton_conv3d
from triton_conv3d import configure, engines, explain
from triton_conv3d.explain import explain_problem
from triton_conv3d.problem import PASSES, Problem
from triton_conv3d.tuning import forget, measure

GPU = Problem(
    "forward", 2, 32, 64, (16, 17, 18), (3, 3, 3), padding=(1,) * 6, device="NVIDIA H200", arch="sm_90"
)
X, W = torch.zeros(2, 4, 5, 6, 7), torch.zeros(8, 4, 3, 3, 3)


@pytest.fixture(autouse=True)
def nothing_runs(monkeypatch):
    """No engine is launched, nothing is measured, and no plan is left over."""

    def forbidden(*_):
        raise AssertionError("explain must not run anything")

    for engine in engines.available().values():
        monkeypatch.setattr(engine, "launch", forbidden)
    monkeypatch.setattr(measure, "best", forbidden)
    forget()
    yield
    forget()


def test_all_passes_of_a_call():
    told = explain(X, W, padding=1)
    assert tuple(told.passes) == PASSES
    assert {name: p.problem.result_shape for name, p in told.passes.items()} == {
        "forward": (2, 8, 5, 6, 7), "dgrad": X.shape, "wgrad": W.shape,
    }  # fmt: skip


@pytest.mark.parametrize("pass_", PASSES)
def test_one_pass(pass_):
    assert tuple(explain(X, W, pass_=pass_).passes) == (pass_,)


def test_unknown_pass():
    with pytest.raises(ValueError, match="pass_='backward'.*forward, dgrad, wgrad"):
        explain(X, W, pass_="backward")


@pytest.mark.parametrize("layer", (torch.nn.Conv3d, triton_conv3d.Conv3d))
@pytest.mark.parametrize("mode, padding", (("zeros", (1, 1, 2, 2, 0, 0)), ("reflect", (0,) * 6)))
def test_a_layer_and_its_input(layer, mode, padding):
    told = explain(layer(4, 8, (2, 3, 1), padding=(1, 2, 0), stride=2, padding_mode=mode), X, pass_="forward")
    problem = told.passes["forward"].problem
    assert (problem.kernel_size, problem.stride, problem.padding, problem.bias) == ((2, 3, 1), (2, 2, 2), padding, True)
    assert problem.output_size == (3, 4, 4)


def test_without_a_batch():
    assert explain(X[0], W, pass_="forward").passes["forward"].problem.batch == 1


def test_wrong_calls_are_conv3ds():
    with pytest.raises(RuntimeError, match="channels"):
        explain(X[:, :3], W)


def test_the_text_names_it_all():
    told = explain_problem(GPU.replace(pass_="wgrad"))
    text = str(told)
    flops = 2 * 2 * 16 * 17 * 18 * 32 * 64 * 27
    assert str(told.problem) in text and f"{flops / 1e9:.3f} GFLOP" in text
    assert f"plan: {told.plan.engine} [{told.plan.config}] from ranking" in text
    assert f"refused by matmul: {engines.get('matmul').supports(told.problem)}" in text
    assert f"{told.candidates[0].seconds * 1e6:.1f} us  {told.candidates[0].engine}" in text
    assert f"and {len(told.candidates) - 5} more" in text


def test_candidates_are_ranked_and_the_plan_is_the_first():
    told = explain_problem(GPU)
    seconds = [candidate.seconds for candidate in told.candidates]
    assert seconds == sorted(seconds) and {c.engine for c in told.candidates} == {"implicit_gemm", "aten"}
    assert (told.plan.engine, str(told.plan.config)) == (told.candidates[0].engine, told.candidates[0].config)


def test_memory_beyond_the_operands():
    with configure(engine="implicit_gemm"):
        split = explain_problem(GPU.replace(pass_="wgrad"))
        copied = explain_problem(GPU.replace(layouts=("contiguous",) * 3))
        plain = explain_problem(GPU)
    assert split.memory.workspace > 0 and f"workspace {split.memory.workspace / 2**20:.2f} MiB" in str(split)
    assert copied.memory.copies > 0 and f"copies {copied.memory.copies / 2**20:.2f} MiB" in str(copied)
    assert plain.memory.copies == 0


def test_a_plan_that_is_only_explained_is_still_measured_later():
    explain_problem(GPU)
    from triton_conv3d.tuning.select import _memory

    assert GPU not in _memory[0]
