"""Machine code of engine "rounded", compiled ahead of time with no GPU: operands in shared memory, no spills.

``PYTHONPATH=. python tests/test_rounded_code.py sm_80 sm_90 sm_100`` compiles every config of these architectures and prints
a line for each; with ``--few`` the representative set of the tests.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator

import ahead_of_time
import pytest

pytest.importorskip("triton")
ARCHITECTURES = ("sm_90", "sm_100")
BESIDES = (("forward", {}), ("forward", {"bias": True, "residual": True, "activation": "gelu"}), ("dgrad", {}),
           ("dgrad", {"stride": (2, 2, 2)}), ("wgrad", {}), ("wgrad", {"stride": (2, 2, 2)}))  # fmt: skip
MOST = {"gather_gemm": 170, "rounded_wgrad": 140}  # instructions of the main loop on sm_90


def reports(arch: str, few: bool) -> Iterator[dict]:
    """What each kernel became that the configs of a layer of 256 channels launch."""
    from perf.compiling import _operands
    from perf.machine_code import compiled, compiling_for, launches, main_loop, resources
    from triton_conv3d.engines import rounded
    from triton_conv3d.problem import Problem

    for pass_, more in (BESIDES[0], BESIDES[4]) if few else BESIDES:
        problem = Problem(pass_, 2, 256, 256, (32,) * 3, (3, 3, 3), padding=(1,) * 6, dtype="float32", precision="tf32",
                          layouts=("contiguous",) * 3, device=arch, arch=arch, **more)  # fmt: skip
        if rounded.supports(problem) is not None:
            continue
        offers = {(config.whole(), config.splits > 1): config for config in reversed(rounded.configs(problem))}.values()
        for config in list(offers)[-1:] if few else offers:
            kernels = {launch[0]: launch for launch in launches(problem, _operands(problem), rounded, config)}
            with compiling_for(arch):
                for name, kernel in map(compiled, kernels.values()):
                    registers, spills, text = resources(arch, kernel)
                    yield {
                        "arch": arch, "pass": pass_, "config": str(config), "kernel": name, "registers": registers,
                        "spills": spills, "shared": kernel.metadata.shared, "loop": main_loop(text)[0],
                        "products": len(re.findall(r"\b(?:HGMMA|UTC\w*MMA)", text)),
                        "from_shared": len(re.findall(r"\bHGMMA\S* R\d+, gdesc|\bUTC\w*MMA\S* gdesc\[\w+\], gdesc", text)),
                    }  # fmt: skip


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_products_read_shared_memory_and_nothing_spills(arch: str) -> None:
    rows = ahead_of_time.reports(__file__, arch, "--few")
    assert {row["kernel"] for row in rows} >= {"rounded_copy", *MOST}
    for row in rows:
        assert row["spills"] == 0 and row["shared"] <= 232_448, row
        if row["kernel"] in MOST:
            assert row["products"] == row["from_shared"] > 0, row
            assert arch != "sm_90" or row["loop"] <= MOST[row["kernel"]], row


if __name__ == "__main__":
    for architecture in [name for name in sys.argv[1:] if name != "--few"]:
        for report in reports(architecture, "--few" in sys.argv):
            print(json.dumps(report), flush=True)
