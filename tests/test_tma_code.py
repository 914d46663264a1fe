"""Machine code of the tma engine, compiled ahead of time with no GPU: of each pass the first config, forward of few warps too.

``python -m perf.machine_code --all --engine tma`` compiles every one.
"""

from __future__ import annotations

import ahead_of_time
import pytest

pytest.importorskip("triton")
from perf.disassembly import Report
from perf.machine_code import Layer

WIDE = Layer("tma", 256, 256)
REGISTERS = "brick_w=4 block_n=64 block_k=64 num_warps=4"  # through which that brick's gradient reaches products on sm_90
SET = (
    *(("sm_90", WIDE, "forward", f"num_warps={warps}") for warps in (8, 4)),
    *(("sm_90", WIDE, pass_, "num_warps=8") for pass_ in ("dgrad", "wgrad")),
    ("sm_90", WIDE, "wgrad", REGISTERS),
    ("sm_90", Layer("tma", 128, 128, 2), "forward", ""),
    *(("sm_100", WIDE, pass_, "") for pass_ in ("forward", "wgrad")),
)


def test_no_faults() -> None:
    rows = [Report(**row) for row in ahead_of_time.reports(__file__)]
    wanted = [(arch, str(layer), pass_) for arch, layer, pass_, _ in SET]
    assert [(row.arch, row.layer, row.pass_) for row in rows] == wanted
    assert all(text in row.config for row, (*_, text) in zip(rows, SET, strict=True))
    assert [row.config for row in rows if row.kind == "by registers"] == [rows[4].config]
    assert [(row, row.faults()) for row in rows if row.faults()] == []


if __name__ == "__main__":
    ahead_of_time.print_first(SET)
