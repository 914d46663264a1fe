"""Machine code of the depthwise engine, compiled ahead of time with no GPU: no spills, wide loads, few instructions.

``PYTHONPATH=. python tests/test_depthwise_code.py sm_90`` prints the reports of an architecture's representative set.
"""

from __future__ import annotations

import json
import re
import sys

import ahead_of_time
import pytest

pytest.importorskip("triton")
from perf.disassembly import loops, resources
from perf.machine_code import compiled, compiling_for, launches

ARCHITECTURES = ("sm_80", "sm_90", "gfx942")
# (pass, dtype, layout, kernel, whether architectures beside sm_90 compile it too); the first config of that kernel.
SET = (
    ("forward", "bfloat16", "channels_last", "slide", True),
    ("wgrad", "bfloat16", "channels_last", "slide", False),
    ("forward", "bfloat16", "channels_last", "rows", False),
    ("forward", "float32", "channels_last", "slide", False),
    ("forward", "bfloat16", "contiguous", "slide", False),
    ("wgrad", "float16", "contiguous", "slide", False),
)
# Instructions of a thread for one output and channel of a 3x3x3 kernel, 27 of them its products.
MOST = {"slide": 40, "rows": 52}


def report(arch: str, pass_: str, dtype: str, layout: str, kernel: str) -> dict:
    """What the first config of a 3x3x3 layer with 64 channels became; in float32 the first that loads 16 bytes."""
    import torch
    from depthwise_cases import ENGINE

    from triton_conv3d.problem import Operands, describe

    def empty(*shape: int) -> torch.Tensor:
        form = torch.channels_last_3d if layout == "channels_last" else torch.contiguous_format
        return torch.empty(shape, dtype=getattr(torch, dtype), memory_format=form)

    x, w, bias = empty(2, 64, 32, 64, 64), empty(64, 1, 3, 3, 3), torch.empty(64, dtype=getattr(torch, dtype))
    operands = {"forward": Operands(x, w, None, bias), "dgrad": Operands(None, w, x), "wgrad": Operands(x, None, x)}[
        pass_
    ]
    problem = describe(
        pass_, operands, x.shape, w.shape, (1,) * 3, (1,) * 6, (1,) * 3, 64, layout == "channels_last", "ieee"
    ).replace(arch=arch, device=arch)  # fmt: skip
    offers = [config for config in ENGINE.configs(problem) if config.kernel == kernel]
    config = next(c for c in offers if dtype != "float32" or c.vector * problem.itemsize == 16)
    with compiling_for(arch):
        kernels = dict(map(compiled, launches(problem, operands, ENGINE, config)))
    name = "wgrad" if pass_ == "wgrad" else kernel
    found = {"arch": arch, "pass": pass_, "dtype": dtype, "layout": layout, "kernel": kernel, "config": str(config)}
    registers, spills, text = resources(arch, kernels[name])
    return found | {"registers": registers, "spills": spills} | ({} if arch.startswith("gfx") else innermost(text))


def innermost(text: str) -> dict:
    """Of the innermost loop with the products: instructions, products, loads of 16 bytes."""
    loop = min((loop for loop in loops(text) if any("FFMA" in line for line in loop)), key=len)
    return {
        "wide": sum("LDG.E.128" in line for line in loop),
        "loop": len(loop),
        "products": sum(bool(re.search(r"\bFFMA2?\b", line)) * (1 + ("FFMA2" in line)) for line in loop),
    }


@pytest.fixture(scope="module")
def reports() -> list[dict]:
    return ahead_of_time.reports(__file__, *ARCHITECTURES)


def test_nothing_spills(reports: list[dict]) -> None:
    assert {row["arch"] for row in reports} == set(ARCHITECTURES)
    assert [row for row in reports if row["spills"]] == []


def test_loads_are_wide(reports: list[dict]) -> None:
    """16 bytes where registers leave a thread so many channels, and along dense rows."""
    wide = [r for r in reports if r["kernel"] == "rows" or r["layout"] == "contiguous" or r["dtype"] == "float32"]
    assert len(wide) == 4 and [row for row in wide if not row["wide"]] == []


def test_instructions_of_one_output(reports: list[dict]) -> None:
    counted = {
        (row["arch"], row["pass"], row["dtype"], row["layout"], row["kernel"]): 27 * row["loop"] / row["products"]
        for row in reports
        if row["arch"].startswith("sm_")
    }
    assert len(counted) == 7 and {key: n for key, n in counted.items() if n > MOST[key[-1]]} == {}


def main(*architectures: str) -> None:
    for arch in architectures:
        for *what, everywhere in SET:
            if everywhere or arch == "sm_90":
                print(json.dumps(report(arch, *what)), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
