"""Machine code of kernels with a residual and gelu, the longest of the activations: no spills, the main loop as it was.

``python tests/test_fused_code.py`` compiles them, with no GPU, and prints what became of them.
"""

from __future__ import annotations

import ahead_of_time
import pytest

pytest.importorskip("triton")
from perf.disassembly import Report
from perf.machine_code import Layer

GEMM = Layer("implicit_gemm", 128, 128, besides="gelu")
SET = (
    *((arch, GEMM, "forward", "splits=1") for arch in ("sm_90", "gfx942")),
    ("sm_90", GEMM, "forward", "splits=2"),
    ("sm_90", Layer("folded", 4, 64, besides="gelu"), "forward", ""),
    ("sm_90", Layer("depthwise", 64, 64, groups=64, besides="gelu"), "forward", ""),
    ("sm_80", Layer("halo", 32, 32, besides="gelu"), "forward", ""),
    ("sm_90", Layer("kn2row", 96, 3, size=128, besides="gelu"), "forward", ""),
)


@pytest.fixture(scope="module")
def reports() -> list[Report]:
    return [Report(**row) for row in ahead_of_time.reports(__file__)]


def test_nothing_spills(reports: list[Report]) -> None:
    assert {(row.arch, row.kernel) for row in reports} == {
        *((arch, "gather_gemm") for arch in ("sm_90", "gfx942")),
        *(("sm_90", name) for name in ("reduce_splits", "folded_gemm", "slide", "kn2row_gemm")),
        ("sm_80", "halo_gemm"),
    }
    assert [row for row in reports if row.faults()] == []


def test_the_main_loop_is_that_of_the_plain_kernel(reports: list[Report]) -> None:
    from test_machine_code import LOOP

    whole = [row for row in reports if row.kernel == "gather_gemm" and row.config.endswith("splits=1")]
    loops = [row.loop for row in whole if row.arch == "sm_90"]
    assert loops and max(loops) <= LOOP


if __name__ == "__main__":
    ahead_of_time.print_first(SET)
