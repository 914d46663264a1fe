"""The README: its examples run, and its tables agree with the code."""

from __future__ import annotations

import dataclasses
import inspect
import os
import re
import subprocess
import sys
import types
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import torch

import triton_conv3d
from triton_conv3d import __main__ as cli
from triton_conv3d import compile_backend, engines, settings
from triton_conv3d.engines.implicit_gemm.configs import SHARED_BYTES

ROOT = Path(__file__).resolve().parent.parent
MEASURED = list((ROOT / "perf" / "results").glob("*/*.csv"))  # of a GPU; what is compiled only is kept as JSON
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.fixture(autouse=True, scope="module")
def _installed():
    """Of a checkout that is only on the path torch does not know the backend by its name."""
    if not entry_points(group="torch_dynamo_backends", name="triton_conv3d"):
        torch._dynamo.register_backend(compile_backend.backend, name="triton_conv3d")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def table(first_cell: str) -> list[list[str]]:
    """The rows of the table whose header begins with this cell."""
    lines = README.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"| {first_cell} |"))
    rows = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows


def test_the_readme_has_examples():
    assert len(blocks("python")) >= 5 and README.count("```python") == len(blocks("python"))


@pytest.mark.parametrize("code", blocks("python"), ids=lambda code: code.strip().splitlines()[-1][:50])
def test_example_runs_on_its_own(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if "init_process_group" in code:
        run_to_its_end(code)
    else:
        before = settings.current()
        module = types.ModuleType("readme")
        monkeypatch.setitem(sys.modules, "readme", module)  # where torch.compile looks for the globals of its classes
        exec(compile(code, "README.md", "exec"), vars(module))
        assert settings.current() == before, "an example leaves a setting changed"
    assert list(tmp_path.iterdir()) == []


def run_to_its_end(code: str) -> None:
    """In a process of its own, that ends without destroying anything: to destroy a module in DDP behind its gloo group now
    and then waits forever, for a thread that waits for Python's lock (torch 2.13)."""
    code = f"{code}\nimport os, sys\nsys.stdout.flush()\nos._exit(0)\n"
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_settings_table_is_complete_and_right(monkeypatch):
    names = {field.name for field in dataclasses.fields(settings.Settings)}
    for name in names:
        monkeypatch.delenv(settings.variable(name), raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    defaults = settings.from_environment()
    rows = {row[0].strip("`"): row[1:] for row in table("variable")}
    assert set(rows) == {settings.variable(name) for name in names}
    for name in names:
        twin, default, meaning = rows[settings.variable(name)]
        assert twin == f"`configure({name}=...)`"
        value = getattr(defaults, name)
        expected = {"cache_dir": "~/.cache/triton_conv3d", "strict": "0"}.get(name, value or "none")
        assert default.strip("`") == expected
        values = {"autotune": settings.AUTOTUNE_MODES, "fp32": settings.FP32_MODES, "log": settings.LOG_LEVELS}
        for allowed in filter(None, values.get(name, ())):
            assert f"`{allowed}`" in meaning


def test_engine_table_lists_the_engines_and_how_each_is_chosen():
    chosen = {row[0].strip("`"): row[3] for row in table("engine")}
    assert chosen.pop("padded") == "as those"  # that it hands its work to
    assert chosen == {
        name: f"by {'prediction' if getattr(engine, 'MEASURED', True) else 'measurement'}"
        + ", once it was tried" * getattr(engine, "TRIAL", False)
        for name, engine in engines.available().items()
        if name != "padded"
    }
    meaning = next(row for row in table("variable") if row[0] == "`TRITON_CONV3D_ENGINE`")[3]
    assert set(re.findall(r"`(\w+)`", meaning)) == {"padded", *chosen}


def test_gpu_table_names_architectures_that_are_known_and_claims_nothing_unmeasured():
    rows = table("GPU")
    named = set(re.findall(r"sm_\d+|gfx\d+", " ".join(row[0] for row in rows)))
    assert named == {"sm_80", "sm_90", "sm_100", "gfx942"}
    assert named <= set(SHARED_BYTES)
    assert MEASURED or {row[2] for row in rows} == {"not yet"}


def test_no_speed_without_a_result_file():
    if not MEASURED:
        assert not re.search(r"\d\s*(x|times) faster|\d\s*(TFLOP|GFLOP|ms\b)", README)


def test_names_in_the_text_exist():
    for name in ("Conv3d", "LazyConv3d", "conv3d", "convert_conv3d", "materialize", "explain", "configure",
                 "broadcast_plans"):
        assert f"`{name}" in README or f"import {name}" in README
        assert hasattr(triton_conv3d, name)
    arguments = inspect.signature(triton_conv3d.conv3d).parameters.values()
    torchs = [argument.name for argument in arguments if argument.kind is not argument.KEYWORD_ONLY]
    assert torchs == ["input", "weight", "bias", "stride", "padding", "dilation", "groups"]


@pytest.mark.parametrize("line", [line for block in blocks("sh") for line in block.splitlines() if line])
def test_commands_exist(line):
    command = line.split("#")[0].split()
    if command[0] == "triton-conv3d":
        cli._parser().parse_args(command[1:])
    else:
        assert command[:2] in (["pip", "install"], ["python", "-m"])


@pytest.mark.parametrize("target", re.findall(r"\]\(([^)#:]+)\)", README))
def test_links_lead_somewhere(target):
    assert (ROOT / target).exists()


def test_extras_of_the_install_command_exist():
    extras = re.search(r'pip install -e "\.\[(.*?)\]"', README)[1].split(",")
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    section = project.split("[project.optional-dependencies]")[1].split("\n[")[0]
    assert set(extras) <= set(re.findall(r"^(\w+) =", section, re.MULTILINE))
