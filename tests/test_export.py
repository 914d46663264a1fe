"""torch.export and AOTInductor: what is saved runs in a process that has imported triton_conv3d; what is decomposed, made for
ONNX or traced for TorchScript, in one that has not."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from compiled import error
from tolerances import COMPILED
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

from triton_conv3d import Conv3d, ConvTranspose3d, conv3d, decompositions, ops

X = torch.randn(2, 2, 4, 5, 6, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model():
    torch.manual_seed(1)
    return nn.Sequential(Conv3d(2, 4, 3, padding=1), nn.ReLU(), Conv3d(4, 2, 1)).eval()


def elsewhere(folder: Path, code: str) -> str:
    """The output of Python code in a process of its own, outside of Triton's interpreter."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
    environment["PYTHONPATH"] = str(Path(__file__).parent.parent)
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_saved_program_runs_elsewhere(model, tmp_path):
    program = torch.export.export(model, (X,))
    torch.export.save(program, tmp_path / "model.pt2")
    torch.save((X, model(X).detach()), tmp_path / "data.pt")
    told = elsewhere(
        tmp_path,
        """
        import torch
        try:
            torch.export.load("model.pt2")
        except Exception:
            print("refused without the package")
        import triton_conv3d
        program = torch.export.load("model.pt2")
        print([str(node.target) for node in program.graph.nodes if node.op == "call_function"])
        x, expected = torch.load("data.pt")
        torch.testing.assert_close(program.module()(x), expected, rtol=1e-4, atol=1e-5)
        print("same")
        """,
    )
    op = str(ops.conv3d)
    assert told.splitlines() == ["refused without the package", str([op, "aten.relu.default", op]), "same"]


@pytest.mark.long
@pytest.mark.skipif(shutil.which("g++") is None, reason="AOTInductor compiles C++, and there is no g++")
@pytest.mark.parametrize("decomposed", [False, True], ids=["as_it_is", "decomposed"])
def test_a_compiled_package_runs_elsewhere(model, decomposed, tmp_path):
    with torch.no_grad():
        program = torch.export.export(model, (X,))
        program = program.run_decompositions(decompositions()) if decomposed else program
        torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
    torch.save((X, model(X).detach()), tmp_path / "data.pt")
    load_and_run = """
        import torch
        x, expected = torch.load("data.pt")
        try:
            result = torch._inductor.aoti_load_package("model.pt2")(x)
            torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-5)
            print("same")
        except RuntimeError as error:
            print("refused")
        """
    assert elsewhere(tmp_path, "import triton_conv3d\n" + textwrap.dedent(load_and_run)) == "same\n"
    assert elsewhere(tmp_path, load_and_run) == ("same\n" if decomposed else "refused\n")


OPS = {ops.conv3d, ops.conv3d_fused, ops.conv3d_dgrad, ops.conv3d_wgrad}


def targets(graph) -> list:
    return [node.target for node in graph.nodes if node.op == "call_function"]


class Everything(nn.Module):
    """Padding that differs at both ends, a transposed convolution with positions left over, an epilogue of its own."""

    def __init__(self):
        super().__init__()
        self.same = Conv3d(2, 4, (2, 3, 4), padding="same")
        self.up = ConvTranspose3d(4, 4, (3, 2, 2), stride=2, padding=(1, 0, 0), output_padding=1, groups=2)
        self.last = Conv3d(4, 4, 3, stride=(1, 2, 3), groups=4)

    def forward(self, x):
        x = self.up(self.same(x))
        x = conv3d(x, self.last.weight, self.last.bias, padding=1, groups=4, activation="leaky_relu", residual=x)
        return self.last(x)


@pytest.fixture
def everything():
    torch.manual_seed(2)
    return Everything().eval()


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last_3d], ids=["contiguous", "last"])
def test_decomposed_it_is_torchs(everything, memory_format):
    x = X.to(memory_format=memory_format)
    sizes = {dim: torch.export.Dim.DYNAMIC for dim in (0, 2, 3, 4)}
    program = torch.export.export(everything, (x,), dynamic_shapes=({**sizes},))
    assert OPS & set(targets(program.graph)) == {ops.conv3d, ops.conv3d_fused, ops.conv3d_dgrad}
    program = program.run_decompositions(decompositions())
    assert not OPS & set(targets(program.graph))
    for other in (x, torch.randn(3, 2, 5, 4, 7).to(memory_format=memory_format)):
        expected = everything(other)
        got = program.module()(other)
        assert error(got, expected) <= COMPILED
        assert got.stride() == expected.stride()


GEOMETRIES = {
    "plain": ((1, 1, 1), (0,) * 6, (1, 1, 1), 1),
    "strided": ((2, 3, 1), (1, 1, 0, 0, 2, 2), (1, 1, 1), 2),
    "dilated": ((1, 2, 2), (2, 2, 1, 1, 0, 0), (2, 1, 3), 1),
    "one_sided": ((2, 1, 3), (2, 0, 1, 0, 0, 1), (1, 2, 1), 4),
}


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "last"])
@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
@pytest.mark.parametrize("op", [ops.conv3d_dgrad, ops.conv3d_wgrad, ops.conv3d, ops.conv3d_fused], ids=lambda op: op._opname)
def test_every_op_decomposes(op, geometry, channels_last):
    torch.manual_seed(3)
    x, weight = torch.randn(2, 4, 6, 7, 8), torch.randn(8, 4 // geometry[3], 3, 2, 2)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last_3d)
    grad = torch.randn(ops.output_shape(x.shape, weight.shape, *geometry[:3]))
    arguments = {
        ops.conv3d: (x, weight, torch.randn(8), *geometry),
        ops.conv3d_fused: (x, weight, None, grad, *geometry, "silu", 0.0),
        ops.conv3d_dgrad: (grad, weight, x.shape, *geometry, channels_last),
        ops.conv3d_wgrad: (grad, x, weight.shape, *geometry, channels_last),
    }[op]
    graph = make_fx(op, decompositions(), tracing_mode="fake")(*arguments).graph
    assert not OPS & set(targets(graph))
    expected, got = op(*arguments), decompositions()[op](*arguments)
    assert error(got, expected) <= COMPILED
    assert got.stride() == expected.stride()


def test_a_traced_model_knows_torch_alone(everything, tmp_path):
    torch.save((X, everything(X).detach()), tmp_path / "data.pt")
    torch.jit.trace(everything, X).save(tmp_path / "model.pt")
    told = elsewhere(
        tmp_path,
        """
        import torch
        x, expected = torch.load("data.pt")
        torch.testing.assert_close(torch.jit.load("model.pt")(x), expected, rtol=1e-4, atol=1e-5)
        print("same")
        """,
    )
    assert told == "same\n"


def test_what_onnx_is_made_from_is_torchs(everything, monkeypatch):
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
    program = torch.export.export(everything, (X,))
    assert not OPS & set(targets(program.graph))
    assert error(program.module()(X), everything(X)) <= COMPILED
    x = X.clone().requires_grad_()
    everything(x).sum().backward()  # beside an export: what is called meanwhile is not part of a graph
    assert x.grad is not None


@pytest.mark.parametrize("dynamo", [True, False], ids=["exported", "traced"])
def test_onnx(everything, dynamo, tmp_path):
    pytest.importorskip("onnxscript" if dynamo else "onnx")
    torch.onnx.export(everything, (X,), tmp_path / "model.onnx", dynamo=dynamo)
    runtime = pytest.importorskip("onnxruntime")
    session = runtime.InferenceSession(tmp_path / "model.onnx")
    (got,) = session.run(None, {session.get_inputs()[0].name: X.numpy()})
    assert error(torch.from_numpy(got), everything(X).detach()) <= COMPILED
