"""Machine code of the hopper engine, compiled with no GPU: every pass, the longest epilogue, lines, im2col copies.

``python -m perf.machine_code --all --engine hopper`` compiles every config.
"""

from __future__ import annotations

import ahead_of_time
import pytest

pytest.importorskip("triton")
from perf.disassembly import Report
from perf.machine_code import Layer
from triton_conv3d.engines.hopper.gluon import IM2COL, MISSING

pytestmark = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
SET = (
    ("sm_90", Layer("hopper", 256, 256, besides="gelu"), "forward", ""),
    ("sm_90", Layer("hopper", 32, 32, besides="gelu"), "forward", "lines="),
    ("sm_90", Layer("hopper", 256, 256), "dgrad", ""),
    ("sm_90", Layer("hopper", 32, 64, 2, besides="k2"), "dgrad", "line_n="),
    ("sm_90", Layer("hopper", 256, 256), "wgrad", "brick_n="),
    ("sm_90", Layer("hopper", 96, 96), "wgrad", "line_n="),
    ("sm_90", Layer("hopper", 256, 256, besides="ragged gelu"), "forward", "pixels="),
)


def test_no_faults() -> None:
    rows = [Report(**row) for row in ahead_of_time.reports(__file__)]
    assert [(row, row.faults()) for row in rows if row.faults()] == []
    rows = [row for row in rows if row.gemm]  # not the sums of splits
    kernels = ["gather_ring", "line_ring", "gather_ring", "line_dgrad_ring", "wgrad_ring", "line_wgrad_ring", "gather_ring"]
    assert [row.kernel for row in rows] == kernels[: len(rows)]
    assert [(row.layer, row.pass_) for row in rows] == [(str(layer), pass_) for _, layer, pass_, _ in SET[: 6 + IM2COL]]


if __name__ == "__main__":
    ahead_of_time.print_first(SET)
