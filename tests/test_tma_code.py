"""Machine code of the tma engine, compiled ahead of time with no GPU: bulk copies, operands in shared memory, no spills.

``PYTHONPATH=. python tests/test_tma_code.py sm_90 sm_100`` compiles every tile of these architectures, whole and split,
and prints a line for each; with ``--few`` the representative set of the tests.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import ahead_of_time
import pytest

pytest.importorskip("triton")
ARCHITECTURES = ("sm_90", "sm_100")
# (channels of both sides, stride of all dimensions) of kernel 3x3x3: between them they are offered every tile.
LAYERS = ((256, 1), (128, 2), (192, 1), (48, 1), (24, 1))
SHARED_BYTES = 232_448  # of one block, from NVIDIA's documentation
MOST_PER_PRODUCT = 14  # instructions of a thread in the main loop of sm_90 for one matrix instruction
# Tiles beyond that, and what they take at most with Triton 3.6.0 and 3.9.0. A product with its operands' addresses is 4 to 5
# instructions; in each step Triton waits, counts stages and copies in 65, and the walk to the next one is 10 to 20.
BEYOND = {
    # Eight products, 103 to 107 instructions without any walk. Those of 256 columns take 128 cycles each: issue waits for them.
    ("gather", "256 x 128 x 128"): 15.6,
    ("wgrad", "128 x 128 x 128"): 14.8,
    # Four: shared memory has no room for longer steps that hide their copies, or the channels end. Two taps in a step, with
    # copies of their own, would take 22 for each product.
    ("gather", "256 x 128 x 64"): 27.3,
    ("gather", "256 x 64 x 64"): 27.8,
    ("gather", "64 x 64 x 64"): 26.0,
    # Two and one, where the channels of a group end.
    ("gather", "256 x 64 x 32"): 48.5,
    ("gather", "64 x 64 x 16"): 95,
    # A gradient that is neither flat nor in rows: the left side of eight products, which it reaches through registers.
    ("wgrad by bricks", "128 x 128 x 128"): 20.6,
    ("wgrad by bricks", "128 x 64 x 64"): 19.6,
}


def chosen(problem, few: bool) -> list:
    """For every tile one config, whole and split, and in wgrad on sm_90 one more whose brick goes through registers.

    Of few, the first; on sm_90 without strides the first of each number of warps, in wgrad one through registers.
    """
    from triton_conv3d.engines.tma.configs import _WGRAD_BRICKS, configs, spills

    def through_registers(config):
        brick = _WGRAD_BRICKS[config.brick_n * config.brick_d * config.brick_h * config.brick_w][-1]
        return dataclasses.replace(config, **dict(zip(("brick_n", "brick_d", "brick_h", "brick_w"), brick, strict=True)))

    tiles, doubled = {}, problem.pass_ == "wgrad" and problem.arch == "sm_90"
    for config in configs(problem):
        whole = dataclasses.replace(config, splits=1)
        tiles.setdefault(whole.num_warps if few else whole, whole)
    found = [*tiles.values()]
    if few:
        more = found[1:] if problem.arch == "sm_90" and problem.stride == (1, 1, 1) else []
        return found[:1] + [through_registers(config) if doubled else config for config in more]
    found += [through_registers(config) for config in found] if doubled else []
    split = [dataclasses.replace(config, splits=2) for config in found]
    return found + [config for config in split if not spills(problem, config)]


def reports(arch: str, channels: int, stride: int, few: bool) -> Iterator[dict]:
    """What the first kernel became that each chosen config of this layer launches: the others differ in numbers."""
    from perf.machine_code import Layer, compiled, compiling_for, launches, problems
    from triton_conv3d.engines import tma

    for problem, operands in problems(arch, "bfloat16", "ieee", Layer("tma", channels, channels, stride)):
        if few and stride > 1 and problem.pass_ != "forward":
            continue
        for config in chosen(problem, few):
            with compiling_for(arch):
                _, kernel = compiled(launches(problem, operands, tma, config)[0])
            row = {"arch": arch, "pass": problem.pass_, "channels": channels, "stride": stride, "config": str(config)}
            flat = tma.is_flat(problem, config)
            row["left"] = "shared" if flat or config.brick[:3] == (1, 1, 1) else "brick"
            kind = "gather" if problem.pass_ != "wgrad" else "wgrad" if row["left"] == "shared" else "wgrad by bricks"
            row["tile"] = kind, f"{math.prod(config.brick)} x {config.block_n} x {config.block_k}"
            yield row | {"warps": config.num_warps} | _read(arch, kernel)


def _read(arch: str, kernel) -> dict:
    """Resources; products, and those whose operands both come from shared memory; instructions of the main loop."""
    from triton.backends.nvidia.compiler import get_ptxas

    from perf.machine_code import main_loop, resources, unwaited

    registers, spills, text = resources(arch, kernel)
    warnings = ""
    if arch == "sm_90":  # only its products can be serialised
        with tempfile.TemporaryDirectory() as folder:
            ptx = Path(folder, "ptx")
            ptx.write_text(kernel.asm["ptx"])
            command = [get_ptxas(90).path, "--gpu-name", "sm_90a", "-o", Path(folder, "again"), ptx]
            warnings = subprocess.run(command, capture_output=True, text=True).stderr
    loop, in_loop = main_loop(text)
    return {
        "registers": registers,
        "spills": spills,
        "shared": kernel.metadata.shared,
        "products": len(re.findall(r"\b(?:HGMMA|UTCHMMA)", text)),
        "from_shared": len(re.findall(r"\bHGMMA\S* R\d+, gdesc|\bUTCHMMA\S* gdesc\[\w+\], gdesc", text)),
        "copies": len(re.findall(r"\bUTMALDG\.[35]D", text)),
        "im2col": len(re.findall(r"\bUTMALDG\.5D\.IM2COL", text)),
        "loop": loop,
        "per_product": round(loop / max(in_loop, 1), 1),
        "unwaited": unwaited(kernel.asm["ttgir"]),
        "warnings": warnings.strip(),
    }


def faults(row: dict) -> list[str]:
    """What must not be. On sm_90, what wgrad has on the left reaches its products through registers, unless it is flat or
    a row."""
    found = []
    through_registers = row["pass"] == "wgrad" and row["arch"] == "sm_90" and row["left"] == "brick"
    if row["spills"]:
        found.append(f"{row['spills']} spills")
    if row["shared"] > SHARED_BYTES:
        found.append(f"{row['shared']} bytes of shared memory")
    if not row["products"] or row["from_shared"] != (0 if through_registers else row["products"]):
        found.append(f"{row['from_shared']} of {row['products']} products from shared memory")
    if row["unwaited"]:
        found.append(f"{row['unwaited']} products are not waited for")
    if not row["copies"]:
        found.append("no bulk copies")
    if row["arch"] == "sm_90" and not 0 < row["per_product"] <= BEYOND.get(tuple(row["tile"]), MOST_PER_PRODUCT):
        found.append(f"{row['per_product']} instructions for a product")
    if row["warnings"]:
        found.append(row["warnings"])
    return found


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    return ahead_of_time.reports(__file__, "--few", *ARCHITECTURES)


def test_copies_products_registers_and_instructions(rows: list[dict]) -> None:
    kinds = {(row["arch"], row["pass"], row["warps"]) for row in rows}
    assert kinds >= {("sm_90", pass_, warps) for pass_ in ("forward", "dgrad", "wgrad") for warps in (4, 8)}
    assert {pass_ for arch, pass_, _ in kinds if arch == "sm_100"} == {"forward", "dgrad", "wgrad"}
    assert {row["left"] for row in rows if row["arch"] == "sm_90" and row["pass"] == "wgrad"} == {"shared", "brick"}
    assert [(row, faults(row)) for row in rows if faults(row)] == []


@pytest.mark.long
def test_every_tile() -> None:
    rows = ahead_of_time.reports(__file__, "sm_90")
    assert [(row, faults(row)) for row in rows if faults(row)] == []
    assert BEYOND.keys() <= {tuple(row["tile"]) for row in rows}


def test_what_must_not_be_is_seen() -> None:
    sound = {"arch": "sm_90", "pass": "wgrad", "left": "shared", "spills": 0, "shared": SHARED_BYTES, "products": 4,
             "from_shared": 4, "copies": 6, "per_product": 14, "tile": ["wgrad", "128 x 64 x 64"], "warnings": "",
             "unwaited": 0}  # fmt: skip
    assert faults(sound) == []
    assert faults({**sound, "from_shared": 0, "left": "brick"}) == []
    for bad in (dict(spills=1), dict(shared=SHARED_BYTES + 1), dict(products=0), dict(from_shared=2), dict(copies=0),
                dict(left="brick"), dict(per_product=14.1), dict(per_product=0), dict(unwaited=1),
                dict(warnings="serialized")):  # fmt: skip
        assert len(faults({**sound, **bad})) == 1


def main(*arguments: str) -> None:
    few, count, bad = "--few" in arguments, 0, 0
    for arch in (argument for argument in arguments if argument != "--few"):
        for layer in LAYERS if not few else LAYERS[:1] if arch != "sm_90" else LAYERS[:2]:
            for row in reports(arch, *layer, few):
                count, bad = count + 1, bad + bool(faults(row))
                print(json.dumps(row), flush=True)
                if found := faults(row):
                    print("FAULT", row["arch"], row["pass"], row["config"], *found, sep=", ", file=sys.stderr, flush=True)
    print(f"{count} kernels, {bad} with faults", file=sys.stderr)


if __name__ == "__main__":
    main(*sys.argv[1:])
