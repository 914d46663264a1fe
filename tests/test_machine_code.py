"""Kernels compiled ahead of time, with no GPU: tensor cores, wide asynchronous copies, no spills, shared memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parent.parent

# Every architecture, float32 on the one that is measured; float16 becomes the code of bfloat16, with another suffix.
SETS = [
    ("sm_80", "bfloat16"),
    ("sm_90", "bfloat16"),
    ("sm_90", "float32"),
    ("sm_100", "bfloat16"),
    ("gfx942", "bfloat16"),
]


LOOP = 120  # instructions
if tuple(map(int, triton.__version__.split(".")[:2])) > (3, 6):
    LOOP += 6  # by which it orders asynchronous copies before the products: FENCE, MEMBAR, four LDS


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    """Reports by (arch, dtype), from a process of its own: the interpreter of the other tests cannot compile."""
    found = {}

    def compile_set(arch, dtype):
        if (arch, dtype) not in found:
            out = tmp_path_factory.mktemp("machine_code") / "report.json"
            environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
            environment["TRITON_CACHE_DIR"] = str(out.parent / "triton")
            command = [sys.executable, "-m", "perf.machine_code", "--arch", arch, "--dtype", dtype, "--out", str(out)]
            subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
            found[arch, dtype] = json.loads(out.read_text())["kernels"]
        return found[arch, dtype]

    return compile_set


@pytest.mark.parametrize("arch, dtype", SETS, ids=lambda value: value)
def test_no_faults(kernels, arch, dtype):
    rows = kernels(arch, dtype)
    assert {row["pass_"] for row in rows} == {"forward", "dgrad", "wgrad"}
    assert {row["kernel"] for row in rows} == {"gather_gemm", "wgrad_gemm", "reduce_splits"}
    assert not [(row["kernel"], row["config"], row["faults"]) for row in rows if row["faults"]]


@pytest.mark.parametrize("split, most", [(False, LOOP), (True, LOOP + 10)], ids=("whole", "split"))
def test_main_loop_of_the_forward_kernel(kernels, split, most):
    rows = kernels("sm_90", "bfloat16")
    loops = {
        row["loop"]
        for row in rows
        if row["pass_"] == "forward"
        and "block_m=128 block_n=128 block_k=64 num_warps=8" in row["config"]
        and row["config"].endswith("splits=1") != split
    }
    assert loops and max(loops) <= most


DOT = "%acc_1 = ttng.warp_group_dot %a, %b, %acc {{isAsync = true}} : {}<64x16xbf16> * !ttg.memdesc<16x64xbf16>"
WAIT = "%acc_2:2 = ttng.warp_group_dot_wait %acc_1, %b {{pendings = {} : i32}} : tensor<64x64xf32>"


@pytest.mark.parametrize("left, going, more, count", [
    ("!ttg.memdesc", 1, "scf.yield %acc_1", 0), ("tensor", 0, "scf.yield %acc_2", 0), ("tensor", 7, "scf.yield %acc_2", 1),
    ("!ttg.memdesc", 1, "%c = arith.addf %acc_1, %d", 1), ("!ttg.memdesc", 1, "%c = arith.addf %acc_11, %d", 0),
], ids=("shared", "registers", "registers-filled-again", "sums-read-early", "other-sums"))  # fmt: skip
def test_products_that_are_not_waited_for_are_seen(left, going, more, count):
    from perf.machine_code import unwaited

    assert unwaited("\n".join((DOT.format(left), WAIT.format(going), more))) == count


@pytest.mark.parametrize(
    "report", sorted((ROOT / "perf" / "results" / "machine_code").glob("*.json")), ids=lambda p: p.stem
)
def test_the_kept_report_covers_every_config_of_today(report):
    from perf.machine_code import ARCHITECTURES, KEPT, LAYERS, configs, problems
    from triton_conv3d import engines

    rows = json.loads(report.read_text())["kernels"]
    assert not [row for row in rows if row["faults"]]
    reported = {
        (row["arch"], row["dtype"], row["precision"], row["pass_"], row["engine"], row["layer"], row["config"])
        for row in rows
    }
    for arch in ARCHITECTURES:
        for dtype, precision in KEPT:
            for layer in LAYERS:
                for problem, _ in problems(arch, dtype, precision, layer):
                    key = (arch, dtype, precision, problem.pass_, layer.engine, str(layer))
                    offers = configs(problem, engines.get(layer.engine))
                    missing = [str(c) for c in offers if (*key, str(c)) not in reported]
                    assert not missing, f"{key}: {missing}; again: python -m perf.machine_code --all"


def test_the_report_of_the_oldest_triton_is_kept():
    assert (ROOT / "perf" / "results" / "machine_code" / "triton-3.6.0.json").is_file()
