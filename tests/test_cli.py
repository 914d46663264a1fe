"""The command line: what it prints, its exit status, and one line instead of a traceback for a user's mistake."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import triton_conv3d
from triton_conv3d import __main__ as cli
from triton_conv3d import console, settings
from triton_conv3d.problem import Problem
from triton_conv3d.tuning.cache import Entry, PlanCache
from triton_conv3d.workload import Layer, read

needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="what happens without a GPU")
LAYER = {
    "id": "one", "N": 1, "C": 4, "D": 5, "H": 6, "W": 7, "K": 6, "kernel": [3, 3, 3], "stride": [2, 1, 1],
    "padding": [1, 1, 0], "dilation": [1, 1, 2], "groups": 2, "bias": True, "dtype": "fp32",
}  # fmt: skip


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """A cache directory of this test's own, and settings as the environment gives them."""
    directory = tmp_path / "cache"
    monkeypatch.setenv("TRITON_CONV3D_CACHE_DIR", str(directory))
    settings.reload()
    yield directory
    monkeypatch.undo()
    settings.reload()


def call(capsys, *arguments: str) -> tuple[int, str, str]:
    """(exit status, stdout, stderr) of a command in this process."""
    capsys.readouterr()
    try:
        status = cli.main(list(arguments))
    except SystemExit as exit_:
        status = exit_.code
    return (status, *capsys.readouterr())


def some_entry(batch: int = 1) -> Entry:
    problem = Problem("forward", batch, 8, 8, (9, 9, 9), (3, 3, 3), device="Some GPU", arch="sm_90")
    names = ("gpu", "arch", "torch", "triton", "driver", "cudnn", "package", "engines")
    environment = {**dict.fromkeys(names, "1"), "gpu": "Some GPU", "arch": "sm_90"}
    return Entry(problem.to_dict(), environment, {"mode": "full"}, "aten", {"channels_last": True}, 12.5, 25.0, 7)


def test_version(capsys):
    assert call(capsys, "--version")[:2] == (0, f"triton_conv3d {triton_conv3d.__version__}\n")


def test_info_names_versions_and_every_setting(capsys, cache, monkeypatch):
    monkeypatch.setenv("TRITON_CONV3D_AUTOTUNE", "full")
    settings.reload()
    PlanCache(cache).store(some_entry())
    status, out, _ = call(capsys, "info")
    assert status == 0
    for expected in (torch.__version__, triton_conv3d.__version__, f"{cache}, 1 plan, writable"):
        assert expected in out
    rows = {line.split()[0]: line.split() for line in out.splitlines()[out.splitlines().index("settings") + 1 :]}
    assert set(rows) == {field.name for field in dataclasses.fields(settings.Settings)}
    assert rows["autotune"][1:] == ["full", "TRITON_CONV3D_AUTOTUNE"]
    assert rows["strict"][1:] == ["False", "default", "(TRITON_CONV3D_STRICT)"]


def test_without_a_cache_directory(capsys, tmp_path, monkeypatch):
    PlanCache(tmp_path).store(some_entry())
    PlanCache(tmp_path).export(tmp_path / "plans.json")
    monkeypatch.setenv("TRITON_CONV3D_CACHE_DIR", "")
    settings.reload()
    out = call(capsys, "info")[1]
    assert "memory only: TRITON_CONV3D_CACHE_DIR is empty" in out
    rows = {line.split()[0]: line.split() for line in out.splitlines() if line.startswith("  ")}
    assert rows["cache_dir"][1:] == ["None", "TRITON_CONV3D_CACHE_DIR"]
    for command in (("import", str(tmp_path / "plans.json")), ("clear",)):
        assert "nowhere: there is no cache directory" in call(capsys, "cache", *command)[1]


def test_cache_list_export_clear_import(capsys, cache, tmp_path):
    for batch in (1, 2):
        assert PlanCache(cache).store(some_entry(batch))
    status, out, _ = call(capsys, "cache", "list")
    assert status == 0 and out.endswith(f"2 plans in {cache}\n")
    assert "Some GPU: forward 2x8x9x9x9 -> 8" in out and "12.5 us, torch 25.0 us, best of 7" in out

    file = str(tmp_path / "plans.json")
    assert call(capsys, "cache", "export", file)[:2] == (0, f"2 plans written to {file}\n")
    assert call(capsys, "cache", "clear")[:2] == (0, f"2 plans deleted from {cache}\n")
    assert call(capsys, "cache", "list")[1] == f"0 plans in {cache}\n"
    assert call(capsys, "cache", "import", file)[:2] == (0, f"2 plans added to {cache}\n")
    status, out, err = call(capsys, "cache", "import", file)
    assert (status, out, err) == (0, f"0 plans added to {cache}\n", "skipped 2: already in the cache\n")


def test_cache_import_of_a_foreign_file_adds_nothing(capsys, tmp_path):
    file = tmp_path / "foreign.json"
    file.write_text('{"plans": 1}')
    status, out, err = call(capsys, "cache", "import", str(file))
    assert status == 2 and out.startswith("0 plans added") and "not an export" in err


MISTAKES = {
    "no command": ([], "COMMAND"),
    "unknown command": (["bench"], "bench"),
    "import of nothing": (["cache", "import", "/no/such/file"], "/no/such/file"),
    "export to nowhere": (["cache", "export", "/no/such/directory/plans.json"], "/no/such/directory"),
    "workload missing": (["tune", "no_such.json"], "no_such.json"),
    "model without shape": (["tune", "torch.nn:Identity"], "--input-shape"),
    "shape too short": (["tune", "torch.nn:Identity", "--input-shape", "1,2,3"], "'1,2,3'"),
    "shape not positive": (["tune", "torch.nn:Identity", "--input-shape", "1,1,8,0,8"], "'1,1,8,0,8'"),
    "module missing": (["tune", "no_such_module:f", "--input-shape", "1,1,8,8,8"], "no_such_module"),
    "attribute missing": (["tune", "torch:no_such", "--input-shape", "1,1,8,8,8"], "no_such"),
    "not a model": (["tune", "builtins:dict", "--input-shape", "1,1,8,8,8"], "dict"),
    "unknown pass": (["tune", "x.json", "--passes", "forward,back"], "'forward,back'"),
    "unknown mode": (["tune", "x.json", "--mode", "off"], "'off'"),
    "unknown dtype": (["tune", "x.json", "--dtype", "fp8"], "'fp8'"),
    "budget not positive": (["tune", "x.json", "--budget", "0"], "'0'"),
    "patch odd": (["demo", "--device", "cpu", "--patch", "10"], "patch=10"),
    "import of a name too long": (["cache", "import", "a" * 300], "is no file"),
    "export names its file": (["cache", "export", "/no/such/plans.json"], "'/no/such/plans.json'"),
    "workload is a folder": (["tune", "/"], "workload / is no file"),
    "seed too large": (["demo", "--device", "cpu", "--seed", str(2**64)], f"seed={2**64}"),
    "no steps": (["demo", "--device", "cpu", "--steps", "0"], "steps=0"),
}


@pytest.mark.parametrize("arguments, named", MISTAKES.values(), ids=MISTAKES.keys())
def test_a_mistake_is_one_line_that_names_it(capsys, arguments, named):
    status, out, err = call(capsys, *arguments)
    assert status == 2 and out == ""
    assert err.count("\n") == 1 and "error:" in err and named in err


@pytest.mark.parametrize("name, value, right", [
    ("AUTOTUNE", "fast", "'quick'"), ("ENGINE", "cudnn", "implicit_gemm"), ("CACHE_DIR", "~no.such.user/x", "no home"),
])  # fmt: skip
def test_a_bad_environment_variable_is_a_mistake(capsys, monkeypatch, name, value, right):
    monkeypatch.setenv(f"TRITON_CONV3D_{name}", value)
    settings._install(None)
    status, _, err = call(capsys, "info")
    assert status == 2 and f"TRITON_CONV3D_{name}={value!r}" in err and right in err and err.count("\n") == 1


@pytest.mark.parametrize("name", ["a" * 300, "file/x"], ids=("too long", "in a file"))
def test_info_tells_of_directories_that_cannot_be(capsys, tmp_path, monkeypatch, name):
    (tmp_path / "file").touch()
    for variable in ("CACHE_DIR", "TABLES"):
        monkeypatch.setenv(f"TRITON_CONV3D_{variable}", str(tmp_path / name))
    settings.reload()
    status, out, _ = call(capsys, "info")
    assert status == 0 and f"{tmp_path / name}, not used: " in out


@needs_no_gpu
def test_demo_on_cuda_without_a_gpu(capsys):
    status, _, err = call(capsys, "demo", "--device", "cuda")
    assert status == 2 and "--device interpreter" in err


# Workloads


def write_workload(path: Path, **changes) -> Path:
    layer = {name: value for name, value in {**LAYER, **changes}.items() if value is not ...}
    path.write_text(json.dumps([layer]))
    return path


def test_workload_is_read(tmp_path):
    (layer,), left_out = read(write_workload(tmp_path / "w.json", note="kept out", op="conv3d"))
    assert left_out == 0
    assert layer.input_shape == (1, 4, 5, 6, 7) and layer.weight_shape == (6, 2, 3, 3, 3)
    expected = torch.nn.functional.conv3d(
        torch.zeros(layer.input_shape), torch.zeros(layer.weight_shape), None, (2, 1, 1), (1, 1, 0), (1, 1, 2), 2
    )
    assert layer.output_shape == expected.shape


def test_other_ops_are_left_out(tmp_path):
    assert read(write_workload(tmp_path / "w.json", op="conv_transpose3d")) == ([], 1)


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"C": 0}, "C=0"),
        ({"C": 5}, "groups=2"),
        ({"K": "8"}, "K='8'"),
        ({"N": ...}, "N is missing"),
        ({"kernel": [3, 3]}, "kernel=[3, 3]"),
        ({"kernel": [9, 3, 3]}, "kernel=[9, 3, 3]"),
        ({"stride": [0, 1, 1]}, "stride=[0, 1, 1]"),
        ({"padding": 1}, "padding=1"),
        ({"dtype": "float"}, "dtype='float'"),
        ({"bias": 1}, "bias=1"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_a_wrong_field_is_named(capsys, tmp_path, changes, named):
    file = write_workload(tmp_path / "w.json", **changes)
    status, _, err = call(capsys, "tune", str(file))
    assert status == 2 and "layer one" in err and named in err and "Traceback" not in err


@pytest.mark.parametrize("text", ["", "{}", "[]", "[1]", "[[]]"])
def test_a_file_that_is_no_workload(capsys, tmp_path, text):
    file = tmp_path / "w.json"
    file.write_text(text)
    status, _, err = call(capsys, "tune", str(file))
    assert status == 2 and err.startswith("triton-conv3d: error: ")


@pytest.mark.parametrize("memory_format", [torch.channels_last_3d, torch.contiguous_format], ids=str)
def test_a_layer_poses_the_problems_of_its_passes(tmp_path, posed, memory_format):
    (layer,), _ = read(write_workload(tmp_path / "w.json"))
    layer.run(("forward", "dgrad", "wgrad"), torch.device("cpu"), memory_format)
    assert [p.pass_ for p in posed] == ["forward", "dgrad", "wgrad"]
    for problem in posed:
        assert problem.input_shape == layer.input_shape and problem.output_shape == layer.output_shape
        assert problem.memory_format == memory_format
    assert [p.bias for p in posed] == [True, False, False]


@needs_no_gpu
def test_tune_without_a_gpu_says_what_it_would_do(capsys, tmp_path):
    file = str(write_workload(tmp_path / "w.json"))
    status, _, err = call(capsys, "tune", file, "--passes", "forward")
    assert status == 2 and "no GPU" in err and "1 layer, forward, mode full" in err
    status, _, err = call(capsys, "tune", "torch.nn:Identity", "--input-shape", "1x1x8x8x8")
    assert status == 2 and "torch.nn:Identity on an input of (1, 1, 8, 8, 8)" in err


def small_model() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Conv3d(2, 3, 3), torch.nn.Conv3d(3, 1, 1))


def test_tune_runs_every_pass_of_a_model(capsys, monkeypatch, posed):
    monkeypatch.setattr(cli, "_need_gpu", lambda what: torch.device("cpu"))
    status, out, _ = call(capsys, "tune", f"{__name__}:small_model", "--input-shape", "1,2,5,5,5")
    assert status == 0 and "2 converted, 0 skipped" in out
    assert sorted(p.pass_ for p in posed) == ["dgrad", "forward", "forward", "wgrad", "wgrad"]
    posed.clear()
    call(capsys, "tune", f"{__name__}:small_model", "--input-shape", "1,2,5,5,5", "--passes", "forward")
    assert [p.pass_ for p in posed] == ["forward", "forward"]


def test_tune_measures_in_its_own_mode_and_budget(capsys, tmp_path, monkeypatch):
    seen = []

    def note(self, passes, device, memory_format):
        seen.append((passes, settings.current().autotune, triton_conv3d.tuning.measure._budget, memory_format))

    monkeypatch.setattr(Layer, "run", note)
    monkeypatch.setattr(cli, "_need_gpu", lambda what: torch.device("cpu"))
    before = settings.current()
    file = str(write_workload(tmp_path / "w.json"))
    assert call(capsys, "tune", file, "--mode", "quick", "--budget", "2.5", "--passes", "wgrad,forward")[0] == 0
    expected = [((pass_,), "quick", 2.5, torch.channels_last_3d) for pass_ in ("wgrad", "forward")]
    assert seen == expected and settings.current() == before


@pytest.mark.parametrize("message, status, runs", [("cuDNN: not supported", 1, 3), ("an illegal memory access", 2, 2)])
def test_a_layer_that_fails_does_not_keep_the_others_from_being_tuned(capsys, tmp_path, monkeypatch, message, status, runs):
    """But for the device's being lost, after which nothing can be computed."""
    seen = []

    def run(self, passes, device, memory_format):
        seen.append(passes)
        if passes == ("dgrad",):
            raise RuntimeError(message)

    monkeypatch.setattr(Layer, "run", run)
    monkeypatch.setattr(cli, "_need_gpu", lambda what: torch.device("cpu"))
    ended, _, err = call(capsys, "tune", str(write_workload(tmp_path / "w.json")))
    assert (ended, len(seen)) == (status, runs) and message in err


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_tune_fills_the_cache(capsys, tmp_path, cache):
    file = str(write_workload(tmp_path / "w.json", dtype="fp16"))
    assert call(capsys, "tune", file, "--mode", "quick")[0] == 0
    assert {entry.problem["pass_"] for _, entry in PlanCache(cache).entries()} == {"forward", "dgrad", "wgrad"}


def test_module_runs_as_a_program():
    done = subprocess.run([sys.executable, "-m", "triton_conv3d", "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"triton_conv3d {triton_conv3d.__version__}\n"), done.stderr


PROGRAM = """
import runpy, sys

def command():
    print("\\udcff")
    print("x" * 100_000)

sys.exit(runpy.run_path(sys.argv[1])["status"](command, "program"))
"""


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_command_that_is_ended_ends_what_it_began(name):
    program = f"""
import os, runpy, signal, sys, time

def command():
    try:
        os.kill(os.getpid(), signal.{name})
        time.sleep(9)
    finally:
        print("ended")

signal.signal(signal.SIGINT, signal.default_int_handler)  # what runs in the background ignores it
sys.exit(runpy.run_path({console.__file__!r})["status"](command, "program"))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, "ended\n", "")


@pytest.mark.parametrize("stdout, status, told", [
    ("|:", 1, ""), (">&-", 0, ""), (">/dev/full", 2, "program: [Errno 28] No space left on device\n"), (">/dev/null", 0, ""),
], ids=("nobody reads", "closed", "disk full", "not text"))  # fmt: skip
def test_what_cannot_be_written_is_at_most_one_line(stdout, status, told):
    program = [sys.executable, "-c", PROGRAM, console.__file__]
    done = subprocess.run(
        ["bash", "-c", f'"$@" {stdout}; exit ${{PIPESTATUS[0]}}', "-", *program], capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (status, told)
