"""What otherwise runs on a GPU only, rehearsed on one that is made up: that it runs at all, not what it computes."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ahead_of_time import COMPILER

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there: nothing has to be rehearsed"),
    pytest.mark.skipif(COMPILER is None, reason="no C compiler with Python's headers, as Triton needs on a GPU"),
]
ROOT = Path(__file__).resolve().parent.parent
PROGRAM = str(Path(__file__).with_name("made_up_gpu.py"))


def rehearse(folder: Path, *command: str, **settings: str) -> tuple[list[str], dict[str, int]]:
    """(lines printed, launches by kernel) of a program that ends well and does not warn."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
    environment |= {"PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(folder / "triton")}
    environment |= {"TRITON_CONV3D_CACHE_DIR": str(folder / "plans"), **settings}
    done = subprocess.run(
        [sys.executable, "-W", "error::RuntimeWarning", *command],
        env=environment, cwd=folder, capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    *lines, counts = done.stdout.splitlines()
    return lines, json.loads(counts)


LAYER = """
import json, sys
import made_up_gpu
made_up_gpu.install()
import torch, triton_conv3d
with triton_conv3d.configure(engine=sys.argv[1]):
    layer = triton_conv3d.Conv3d(64, 32, **json.loads(sys.argv[2])).half()
    x = torch.randn(1, 64, 3, 4, 5).half().to(memory_format=torch.channels_last_3d).requires_grad_()
    for _ in range(2):
        print(*made_up_gpu.launched)
        made_up_gpu.launched.clear()
        y = layer(x)
        y.backward(torch.randn_like(y))
    print(" ".join(sorted({found.plan.source for found in triton_conv3d.explain(layer, x).passes.values()})))
print(json.dumps(made_up_gpu.launched))
"""


STRIDED, NARROW = {"kernel_size": 1, "stride": 2}, {"kernel_size": [1, 3, 1]}


@pytest.mark.parametrize("engine, layer, kernels, tried", [
    ("implicit_gemm", STRIDED, ("gather_gemm", "wgrad_gemm"), ()),
    pytest.param("tma", STRIDED, ("gather_bricks", "wgrad_bricks"), (), marks=pytest.mark.long),
    pytest.param("hopper", STRIDED, ("gather_ring", "wgrad_ring"), (), marks=pytest.mark.long),
    pytest.param("hopper", NARROW, ("wgrad_ring",), ("gather_ring", "line_ring"), marks=pytest.mark.long),
], ids=["implicit_gemm", "tma", "hopper", "hopper_lines"])  # fmt: skip
def test_a_layer_is_tuned_once_and_its_plans_are_read_by_the_next_process(tmp_path, engine, layer, kernels, tried):
    """``kernels`` are launched, and while tuning those ``tried`` besides, of which the made-up clock chooses."""
    file = tmp_path / "layer.py"
    file.write_text(f"import sys; sys.path.insert(0, {str(ROOT / 'tests')!r})\n{LAYER}")
    for source in ("measured", "cache"):
        lines, launched = rehearse(tmp_path, str(file), engine, json.dumps(layer))
        assert lines[-1] == source
        assert set(kernels) <= set(launched) and max(launched.values()) <= 2  # forward and dgrad: of one
        assert set(launched) | set((*kernels, *tried) if source == "measured" else ()) <= set(lines[-2].split())


PROGRAMS = {
    "run": ("perf", "run", "--provider", "ours,torch_cl,implicit_gemm,tma", "--out", "run.csv"),
    "validate": ("perf", "validate", "--slice", "tune,bench", "--out", "validated"),
    "try": ("triton_conv3d", "try", "hopper"),
    "sweep": ("autotune", "sweep", "designed.json", "--out", "sweep.jsonl", "--guided", "2"),
}
ONE_LAYER = {
    "id": "one", "N": 1, "C": 16, "K": 32, "D": 2, "H": 6, "W": 8, "kernel": [3, 3, 3], "stride": [1, 1, 1],
    "padding": [1, 1, 1], "dilation": [1, 1, 1], "groups": 1, "bias": True, "dtype": "fp16",
}  # fmt: skip


@pytest.mark.long
@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_ends_well(tmp_path, name):
    (tmp_path / "designed.json").write_text(json.dumps([ONE_LAYER]))
    _, launched = rehearse(tmp_path, PROGRAM, *PROGRAMS[name])
    assert launched
    if name == "run":
        rows = list(csv.DictReader((tmp_path / "run.csv").open()))
        assert {row["status"] for row in rows} <= {"ok", "unsupported"}
        assert all(row["status"] == "ok" for row in rows if row["provider"] in ("ours", "torch_cl", "implicit_gemm"))
