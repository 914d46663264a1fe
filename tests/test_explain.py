"""explain: what it tells of a call, and that it runs nothing."""

from __future__ import annotations

import pytest
import torch

import triton_conv3d
from triton_conv3d import compile_backend, configure, engines, explain
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


def test_without_a_batch_but_a_residual():
    residual = X.new_empty(8, 5, 6, 7)
    assert explain(X[0], W, padding=1, residual=residual).passes["forward"].problem.residual


@pytest.mark.parametrize("layer", (torch.nn.Conv3d, torch.nn.ConvTranspose3d, None), ids=("layer", "transposed", "call"))
@pytest.mark.parametrize("cast", (True, False))
def test_under_autocast(layer, cast):
    called = (X, W, None) if layer is None else (layer(4, 8, 3), X)
    with torch.autocast("cpu", torch.bfloat16, enabled=cast):
        told = explain(*called)
    assert {p.problem.dtype for p in told.passes.values()} == {"bfloat16" if cast else "float32"}


@pytest.mark.parametrize("arguments, error, message", [
    ((X[:, :3], W), RuntimeError, "channels"),
    ((X, None), TypeError, "explain: weight must be a Tensor, got NoneType"),
    ((X, W.tolist()), TypeError, "explain: weight must be a Tensor, got list"),
    ((X, W, 1.0), TypeError, "explain: bias must be a Tensor or None, got float"),
    (("x", W), TypeError, "explain: input must be a tensor, or a module and then its input, got str"),
    ((torch.nn.Conv3d(4, 8, 3, padding=1, padding_mode="reflect"), None), TypeError, "explain: input must be .* got NoneType"),
    ((torch.nn.ConvTranspose3d(4, 8, 3), None), TypeError, "explain: input must be .* got NoneType"),
], ids=("channels", "none", "list", "number", "text", "layer", "transposed"))  # fmt: skip
def test_wrong_calls_are_conv3ds(arguments, error, message):
    with pytest.raises(error, match=message):
        explain(*arguments)


@pytest.mark.parametrize("residual, message", [
    (X.new_empty(2, 8, 3, 4, 5).half(), "residual is torch.float16"), (X[:1], "must be"),
], ids=("dtype", "shape"))  # fmt: skip
def test_a_wrong_residual(residual, message):
    with pytest.raises(RuntimeError, match=message):
        explain(X, W, residual=residual)


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


class Counted(torch.nn.Module):
    """A convolution in a block that has state, and is told apart from its copies."""

    def __init__(self):
        super().__init__()
        self.body = torch.nn.Sequential(torch.nn.Conv3d(4, 4, 2), torch.nn.BatchNorm3d(4), torch.nn.ReLU())

    def forward(self, x, scale=None):
        return self.body(torch.nn.functional.pad(x, (0, 0, 0, 0, 1, 0))) * (1 if scale is None else scale)


class Deciding(torch.nn.Module):
    def forward(self, x):
        return x if x.mean() > 0 else -x


class Sealed(torch.nn.Module):
    def __deepcopy__(self, memo):
        raise AssertionError("sealed")


@pytest.mark.parametrize("training", (True, False), ids=("training", "inference"))
def test_a_model_is_told_what_is_fused_and_stays_as_it_is(training):
    model, kept = Counted().train(training), len(compile_backend.reports())
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.set_grad_enabled(training):
        told = explain(torch.compile(model), (X, torch.tensor(2.0)) if training else X)
    fused = "padding 1" if training else "padding 1, scale 1, bias + relu 1"
    kinds = ["forward", "backward"] if training else ["inference"]
    assert [graph.kind for graph in told.graphs] == kinds and f"replaced conv3d 1; fused {fused};" in str(told)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert len(compile_backend.reports()) == kept


def test_models_in_numbers_leave_dynamos_cache_alone():
    compiled = []

    def count(graph, inputs):
        compiled.append(graph)
        return graph

    model = Counted()
    with torch.no_grad():
        for size in range(9):  # more than Dynamo compiles of one function
            assert len(explain(model, torch.zeros(1, 4, 2 + size, 2, 2)).graphs) == 1
    torch.compile(model, backend=count)(X)
    assert len(compiled) == 1


def test_a_layer_that_does_more_is_a_model():
    class Causal(torch.nn.Conv3d):
        def forward(self, x):
            return super().forward(torch.nn.functional.pad(x, (0, 0, 0, 0, 2, 0)))

    layer = Causal(4, 4, 3, padding=(0, 1, 1)).requires_grad_(False)
    for _ in range(2):
        assert "fused padding 1" in str(explain(layer, X))
        triton_conv3d.convert_conv3d(layer)


def test_a_model_without_a_convolution():
    assert str(explain(torch.nn.Identity(), X)) == "no 3-D convolution in any graph: nothing is changed"


@pytest.mark.parametrize(
    "model, further, error, message",
    (
        (torch.nn.Sequential(triton_conv3d.LazyConv3d(2, 1)), {}, RuntimeError, "parameters of 0 do not exist.*materialize"),
        (Counted(), {"pass_": "dgrad"}, ValueError, "pass_='dgrad'.*Counted is a model"),
        (torch.nn.Sequential(Sealed()), {}, RuntimeError, "Sequential cannot be copied .*sealed.*before it is sharded"),
        (Deciding(), {}, RuntimeError, "Deciding decides by what tensors hold"),
        (torch.relu, {}, TypeError, "input must be a tensor, or a module.*builtin_function"),
    ),
    ids=("lazy", "pass", "sealed", "deciding", "function"),
)
def test_models_that_cannot_be_explained(model, further, error, message):
    with pytest.raises(error, match=message):
        explain(model, X, **further)
