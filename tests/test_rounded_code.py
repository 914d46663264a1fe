"""Machine code of engine "rounded", compiled ahead of time with no GPU: the first config of forward and wgrad.

``python -m perf.machine_code --all --engine rounded`` compiles every one.
"""

from __future__ import annotations

import sys

import ahead_of_time
import pytest

pytest.importorskip("triton")
import triton

from perf.disassembly import Report
from perf.machine_code import Layer

LAYER = Layer("rounded", 256, 256, channels_last=False)


@pytest.mark.parametrize("arch", ("sm_90", pytest.param("sm_100", marks=pytest.mark.long)))
def test_no_faults(arch: str) -> None:
    rows = [Report(**row) for row in ahead_of_time.reports(__file__, arch)]
    assert {(row.pass_, row.kernel) for row in rows if row.gemm} == {("forward", "gather_gemm"), ("wgrad", "rounded_wgrad")}
    assert "rounded_copy" in {row.kernel for row in rows}
    assert [(row, row.faults()) for row in rows if row.faults()] == []
    if arch == "sm_90":  # what is documented is there, and seen
        assert ["C7515" in row.serialised for row in rows if row.gemm] == [triton.__version__.startswith("3.6."), False]


if __name__ == "__main__":
    ahead_of_time.print_first((sys.argv[1], LAYER, pass_, "") for pass_ in ("forward", "wgrad"))
