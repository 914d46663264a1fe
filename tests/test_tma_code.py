"""Machine code of the tma engine, compiled ahead of time with no GPU: bulk copies, operands in shared memory, no spills.

``python tests/test_tma_code.py sm_90 sm_100`` compiles every config of these architectures and prints a line for each.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parent.parent
ARCHITECTURES = ("sm_90", "sm_100")
LAYERS = ((128, 1), (256, 1), (128, 2), (48, 1))  # (channels of both sides, stride of all dimensions), kernel 3x3x3
SHARED_BYTES = 232_448


def reports(arch: str, channels: int, stride: int, representative: bool):
    """What every kernel became that this layer's configs launch: all, or for tests one of each kind."""
    from perf.machine_code import compiled, compiling_for, launches, problems
    from triton_conv3d.engines import tma

    for problem, operands in problems(arch, "bfloat16", "ieee", channels, stride):
        offers = [config for config in tma.configs(problem) if config.splits == 1]
        for config in offers[: 2 if problem.pass_ == "wgrad" else 1] if representative else offers:
            with compiling_for(arch):
                for launch in launches(problem, operands, tma, config)[:1]:  # views differ in numbers only
                    _, kernel = compiled(launch)
                    found = {"arch": arch, "pass": problem.pass_, "channels": channels, "stride": stride}
                    yield found | {"rows": config.brick[:3] == (1, 1, 1), "config": str(config)} | _read(kernel)


def _read(kernel) -> dict:
    """Resources; products, and those whose operands both come from shared memory; instructions of the main loop."""
    from perf.machine_code import _loop, _tool

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage, text = _tool("cuobjdump", "-res-usage", file.name), _tool("nvdisasm", "-c", file.name)
    return {
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "spills": len(re.findall(r"\b(?:LDL|STL)\b", text)),
        "shared": kernel.metadata.shared,
        "products": len(re.findall(r"\b(?:HGMMA|UTCHMMA)", text)),
        "from_shared": len(re.findall(r"\bHGMMA\S* R\d+, gdesc|\bUTCHMMA\S* gdesc\[\w+\], gdesc", text)),
        "copies": len(re.findall(r"\bUTMALDG\.[35]D", text)),
        "loop": _loop(text.splitlines()),
    }


def faults(row: dict) -> list[str]:
    """What must not be. The bricks of wgrad reach the products of sm_90 through registers, unless they are rows."""
    found = []
    if row["spills"]:
        found.append(f"{row['spills']} spills")
    if row["shared"] > SHARED_BYTES:
        found.append(f"{row['shared']} bytes of shared memory")
    if not row["products"]:
        found.append("no tensor cores")
    through_registers = row["pass"] == "wgrad" and row["arch"] == "sm_90" and not row["rows"]
    if row["from_shared"] not in ((0,) if through_registers else (row["products"],)):
        found.append(f"{row['from_shared']} of {row['products']} products from shared memory")
    if not row["copies"]:
        found.append("no bulk copies")
    return found


def main(*architectures: str) -> None:
    for arch in architectures:
        for channels, stride in LAYERS:
            for row in reports(arch, channels, stride, False):
                print(json.dumps(row), *faults(row), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
