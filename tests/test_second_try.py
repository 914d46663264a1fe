"""Where Inductor fails on an improved graph, it compiles the graph as it was; what it cannot compile at all is its error."""

from __future__ import annotations

import pytest
import torch
from compiled import Inductor, by_aten, compare, compiled  # noqa: F401
from test_compile_reports import lines
from tolerances import COMPILED
from torch import nn
from torch._dynamo.exc import SkipFrame, TensorifyScalarRestartAnalysis
from torch._inductor import compile_fx

import triton_conv3d
from triton_conv3d.compile_backend import backend, eager, norms, reports


@pytest.fixture
def inductor(monkeypatch):
    def plant(*kinds, fails=lambda ours: ours) -> Inductor:
        inductor = Inductor(kinds, fails)
        monkeypatch.setattr(compile_fx, "_compile_fx_inner", inductor)
        return inductor

    torch._dynamo.reset()
    with torch._functorch.config.patch(enable_autograd_cache=False):
        yield plant


def model() -> nn.Module:
    norm = nn.InstanceNorm3d(4, affine=True)
    return nn.Sequential(nn.Conv3d(2, 4, 3, padding=1), norm, nn.ReLU(), nn.Conv3d(4, 2, 1))


X = torch.randn(2, 2, 3, 4, 5)
SECOND = {  # the graph that fails: (what is compiled, warned about, kept as a report)
    "inference": ([("inference", True), ("inference", False)], "graph", []),
    "forward": ([("forward", True), ("forward", False), ("backward", False)], "graph", []),
    "backward": ([("forward", True), ("backward", True), ("backward", False)], "backward graph", ["forward"]),
}


@pytest.mark.parametrize("kind", SECOND)
def test_a_graph_that_inductor_fails_on_is_compiled_as_it_was(kind, inductor, caplog):
    inductor, (seen, what, kept) = inductor(kind), SECOND[kind]
    off, made = compare(model(), X, kind != "inference", inner="inductor")
    assert off <= COMPILED and inductor.seen == seen and [r.kind for r in made] == kept
    (line,) = lines(caplog)
    error = f"NotImplementedError: planted {seen.index((kind, True)) + 1}"
    assert inductor.cached == [not (kind == "backward" == graph and not ours) for graph, ours in seen]
    assert line == f"{what} (its improved form fails in inductor) left as it is: {error}"


@pytest.mark.parametrize("kind", ["forward", "backward"])
def test_at_any_size(kind, inductor, caplog):
    inductor = inductor(kind)
    network = model()
    function = torch.compile(network, backend=backend, dynamic=True)
    for size in ((3, 5, 6), (5, 6, 7)):
        x = torch.randn(2, 2, *size, requires_grad=True)
        given, wanted = (
            torch.autograd.grad(f(x).square().sum(), (x, *network.parameters())) for f in (function, network)
        )
        for a, b in zip(given, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert len(lines(caplog)) == 1 and inductor.seen.count((kind, False)) == 1


@pytest.mark.parametrize("kind", SECOND)
def test_what_inductor_cannot_compile_is_its_own_error_once(kind, inductor, caplog):
    inductor = inductor(kind, fails=lambda ours: True)
    with pytest.raises(Exception, match="planted") as caught:
        compare(model(), X, kind != "inference", inner="inductor")
    assert inductor.seen[-1] == (kind, False) and f"planted {len(inductor.seen)}" in str(caught.value)
    error, told = caught.value, []
    while error is not None:
        told.append(str(error))
        error = error.__cause__ or error.__context__
    assert not any(f"planted {len(inductor.seen) - 1}" in text for text in told) and lines(caplog) == []


@pytest.mark.parametrize("error", [SkipFrame, TensorifyScalarRestartAnalysis])
def test_what_tells_dynamo_to_go_on_otherwise_is_no_failure(error, monkeypatch, caplog):
    def once(*_, **__):
        monkeypatch.undo()
        raise error()

    monkeypatch.setattr(norms, "_normalise", once)
    with torch.no_grad():
        network, function = (m := model()), compiled(m, "aot_eager")
        torch.testing.assert_close(function(X), network(X))
    assert lines(caplog) == []


def test_a_pass_alone_leaves_inductor_its_error(inductor, caplog):
    inductor = inductor("inference")
    function = torch.compile(model(), options={"post_grad_custom_pre_pass": triton_conv3d.inductor_pass()})
    with torch.no_grad(), pytest.raises(Exception, match="NotImplementedError: planted 1"):
        function(X)
    assert inductor.seen == [("inference", True)] and lines(caplog) == []


@pytest.mark.parametrize("inner", ["aot_eager", "eager"])
@pytest.mark.parametrize("broken", [(norms, "_normalise"), (eager, "_rewrite")], ids=lambda pair: pair[1])
def test_nor_do_other_faults_of_ours_stop_a_graph(inner, broken, monkeypatch, caplog):
    def fail(*_, **__):
        raise NotImplementedError("planted")

    monkeypatch.setattr(*broken, fail)
    network = model().eval()
    with torch.no_grad():
        assert torch.equal(compiled(network, inner)(X), network(X))
    (line,) = lines(caplog)
    assert line.startswith(f"graph (its improved form fails in {inner}) left as it is: ")
    assert "planted" in line and len(reports()) == 0
