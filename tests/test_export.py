"""torch.export and AOTInductor: what is saved runs in a process that has imported triton_conv3d."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from torch import nn

from triton_conv3d import Conv3d, ops

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
def test_a_compiled_package_runs_elsewhere(model, tmp_path):
    with torch.no_grad():
        program = torch.export.export(model, (X,))
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
    assert elsewhere(tmp_path, load_and_run) == "refused\n"
