"""Machine code of the depthwise engine, compiled ahead of time with no GPU: no spills, wide loads, few instructions.

``python tests/test_depthwise_code.py sm_90`` compiles the representative set of an architecture and prints its reports.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile

import ahead_of_time
import pytest

pytest.importorskip("triton")
ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx942")
# (pass, dtype, layout, kernel, whether architectures beside sm_90 compile it too); the first config of that kernel.
SET = (
    ("forward", "bfloat16", "channels_last", "slide", True),
    ("wgrad", "bfloat16", "channels_last", "slide", True),
    ("forward", "bfloat16", "channels_last", "rows", False),
    ("dgrad", "bfloat16", "channels_last", "slide", False),
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

    from perf.machine_code import compiled, compiling_for, launches
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
    return found | (_amd if arch.startswith("gfx") else _nvidia)(kernels[name])


def _amd(compiled) -> dict:
    text = compiled.asm["amdgcn"]
    return {
        "registers": int(re.search(r"\.vgpr_count:\s+(\d+)", text)[1]),
        "spills": int(re.search(r"\.vgpr_spill_count:\s+(\d+)", text)[1]),
        "wide": len(re.findall(r"(?:buffer|global)_load_dwordx4", text)),
    }


def _nvidia(compiled) -> dict:
    """Registers and spills of all, and of the innermost loop with the products: instructions, products, 16-byte loads."""
    from perf.machine_code import _tool

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage, text = _tool("cuobjdump", "-res-usage", file.name), _tool("nvdisasm", "-c", file.name)
    labels, body, loops = {}, [], []
    for line in text.splitlines():
        if label := re.match(r"\s*(\.L\w+):", line):
            labels[label[1]] = len(body)
        elif re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+\S", line):
            body.append(line)
            branch = re.search(r"BRA\S*\s.*`\(+(\.L\w+)", line)
            if branch and branch[1] in labels:
                loops.append(body[labels[branch[1]] :])
    loop = min((inside for inside in loops if any("FFMA" in i for i in inside)), key=len)
    return {
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "spills": sum(bool(re.search(r"\b(LDL|STL)\b", i)) for i in body),
        "wide": sum("LDG.E.128" in i for i in loop),
        "loop": len(loop),
        "products": sum(bool(re.search(r"\bFFMA2?\b", i)) * (1 + ("FFMA2" in i)) for i in loop),
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
    """On sm_100 two products are one instruction."""
    counted = {
        (row["arch"], row["pass"], row["dtype"], row["layout"], row["kernel"]): 27 * row["loop"] / row["products"]
        for row in reports
        if row["arch"] in ("sm_80", "sm_90")
    }
    assert len(counted) == 9 and {key: n for key, n in counted.items() if n > MOST[key[-1]]} == {}


def main(*architectures: str) -> None:
    for arch in architectures:
        for *what, everywhere in SET:
            if everywhere or arch == "sm_90":
                print(json.dumps(report(arch, *what)), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
