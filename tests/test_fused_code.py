"""Machine code of kernels with a residual and gelu, the longest of the activations: no spills, the main loop as it was.

``python tests/test_fused_code.py`` compiles them, with no GPU, and prints what became of them.
"""

from __future__ import annotations

import dataclasses
import json

import ahead_of_time
import pytest

pytest.importorskip("triton")
# engine, input channels, output channels, groups; on which architectures. Of cubes of 32, for kn2row of 128: it has long tiles.
SET = (
    ("implicit_gemm", 128, 128, 1, ("sm_80", "sm_90", "gfx942")),
    ("folded", 4, 64, 1, ("sm_90",)),
    ("depthwise", 64, 64, 64, ("sm_90",)),
    ("halo", 32, 32, 1, ("sm_80",)),
    ("kn2row", 96, 3, 1, ("sm_90",)),
)


def main() -> None:
    import torch

    from perf.machine_code import compiled, compiling_for, launches, read
    from triton_conv3d import engines
    from triton_conv3d.problem import Operands, describe

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.bfloat16, memory_format=torch.channels_last_3d)

    for name, channels, filters, groups, architectures in SET:
        size = (128 if name == "kn2row" else 32,) * 3
        x, w, y = empty(2, channels, *size), empty(filters, channels // groups, 3, 3, 3), empty(2, filters, *size)
        operands = Operands(x, w, None, torch.empty(filters, dtype=torch.bfloat16), y)
        geometry = (x.shape, w.shape, (1,) * 3, (1,) * 6, (1,) * 3, groups, True, "ieee", "gelu")
        engine, posed = engines.get(name), describe("forward", operands, *geometry)
        for arch in architectures:
            problem = posed.replace(arch=arch, device=arch)
            config = engine.configs(problem)[0]
            both = arch == "sm_90" and name == "implicit_gemm"
            for offer in (config, dataclasses.replace(config, splits=2)) if both else (config,):
                with compiling_for(arch):
                    for kernel, code in map(compiled, launches(problem, operands, engine, offer)):
                        row = read(problem, engine, offer, kernel, code)
                        print(json.dumps(dataclasses.asdict(row) | {"faults": row.faults()}), flush=True)


@pytest.fixture(scope="module")
def reports() -> list[dict]:
    return ahead_of_time.reports(__file__)


def test_nothing_spills(reports: list[dict]) -> None:
    compiled = {(row["arch"], row["kernel"]) for row in reports}
    assert compiled == {(arch, "gather_gemm") for arch in SET[0][-1]} | {
        ("sm_90", name) for name in ("reduce_splits", "folded_gemm", "slide", "kn2row_gemm")
    } | {("sm_80", "halo_gemm")}
    assert [row for row in reports if row["faults"]] == []


def test_the_main_loop_is_that_of_the_plain_kernel(reports: list[dict]) -> None:
    from test_machine_code import LOOP

    whole = [row for row in reports if row["kernel"] == "gather_gemm" and row["config"].endswith("splits=1")]
    loops = [row["loop"] for row in whole if row["arch"] == "sm_90"]
    assert loops and max(loops) <= LOOP


if __name__ == "__main__":
    main()
