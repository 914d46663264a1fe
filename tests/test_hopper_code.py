"""Machine code of the hopper engine, compiled ahead of time with no GPU: who copies, who multiplies, and from where.

``PYTHONPATH=. python tests/test_hopper_code.py`` compiles every config of some layers, plain and with all that a kernel can
be asked for besides, and prints a line for each; with ``--few`` the representative set of the tests.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import re
import sys
from collections.abc import Iterator

import ahead_of_time
import pytest

pytest.importorskip("triton")
from test_tma_code import SHARED_BYTES, _read

from triton_conv3d.engines.hopper.gluon import IM2COL, MISSING

pytestmark = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))

# (channels of both sides, stride of all dimensions) of kernel 3x3x3, and what the problem is besides.
BESIDES = {
    "plain": {},
    "gelu": {"bias": True, "residual": True, "activation": "gelu"},  # the longest of the activations
    "tanh": {"bias": True, "residual": True, "activation": "tanh", "layouts": ("channels_last",) * 2 + ("contiguous",)},
    "contiguous": {"bias": True, "residual": True, "layouts": ("channels_last",) * 2 + ("contiguous",)},
    "index64": {"index64": True},
}
RAGGED = {"input_size": (5, 21, 21)}  # of these the configs by im2col copies
BESIDES |= {f"ragged_{name}": BESIDES[name] | RAGGED for name in ("gelu", "tanh", "index64")}
LAYERS = [(c, s, "plain") for c, s in ((256, 1), (128, 2), (48, 1), (24, 1))]
LAYERS += [(channels, 1, name) for channels in (256, 48, 32) for name in BESIDES if name != "plain"]
LAYERS += [(128, 2, "ragged_gelu"), (128, 2, "ragged_index64")]
FEW = [(c, 1, besides) for c, besides in ((256, "gelu"), (32, "gelu"), (256, "plain"), (256, "ragged_gelu"))]
MOST_PER_PRODUCT = 14  # instructions of a consumer's thread in its loop for one matrix instruction, in steps of 64


def chosen(problem, few: bool, ragged: bool) -> Iterator:
    """Every config, split or not; or the largest, whole or split; ragged: of those by im2col copies."""
    from triton_conv3d.engines import hopper

    offers = [config for config in hopper.configs(problem) if not ragged or isinstance(config, hopper.Im2colConfig)]
    if problem.pass_ != "wgrad":  # of which splits differ in their chains
        offers = [
            dataclasses.replace(config, splits=min(config.splits, 2)) if hasattr(config, "splits") else config
            for config in offers
        ]
    return dict.fromkeys(offers[:1] if few else offers)


def reports(channels: int, stride: int, besides: str, few: bool) -> Iterator[dict]:
    """What the first kernel became that each chosen config launches: the others differ in numbers."""
    from perf.compiling import _operands
    from perf.machine_code import Layer, compiled, compiling_for, launches, problems
    from triton_conv3d.engines import hopper

    for problem, _ in problems("sm_90", "bfloat16", "ieee", Layer("hopper", channels, channels, stride)):
        fused = "residual" in BESIDES[besides]
        if fused and problem.pass_ != "forward" or few and not fused and problem.pass_ == "forward":
            continue
        problem = problem.replace(**BESIDES[besides])
        operands = _operands(problem)
        if problem.residual:
            operands = operands._replace(residual=problem.empty_result(operands.input.device))
        for config in chosen(problem, few, "ragged" in besides):
            with compiling_for("sm_90"):
                _, kernel = compiled(launches(problem, operands, hopper, config)[0])
            row = {"pass": problem.pass_, "channels": channels, "stride": stride, "besides": besides}
            step = config.block_k if problem.pass_ != "wgrad" else math.prod(config.brick)
            if isinstance(config, hopper.LineConfig):  # all taps along H of all lines
                step = config.planes * config.lines * config.block_k
            row |= {"config": str(config), "step": step}
            registers = sorted(set(map(int, re.findall(r"setmaxnreg\S+\s+(\d+)", kernel.asm["ptx"]))))
            yield row | {"setmaxnreg": registers, "early": early(kernel.asm["ptx"])} | _read("sm_90", kernel)


def early(ptx: str) -> int:
    """How often a stage is freed by one warpgroup whose product is done, with no barrier to wait for the other's."""
    order = re.findall(r"wgmma\.wait_group|bar\.sync|mbarrier\.arrive\.shared", ptx)
    return sum(pair == ("wgmma.wait_group", "mbarrier.arrive.shared") for pair in itertools.pairwise(order))


def faults(row: dict) -> list[str]:
    """What must not be."""
    found = []
    if row["spills"]:
        found.append(f"{row['spills']} spills")
    if row["shared"] > SHARED_BYTES:
        found.append(f"{row['shared']} bytes of shared memory")
    if not row["products"] or row["from_shared"] != row["products"]:
        found.append(f"{row['from_shared']} of {row['products']} products from shared memory")
    if row["copies"] < 2:
        found.append("no bulk copies")
    if bool(row["im2col"]) != ("ragged" in row["besides"]):
        found.append(f"{row['im2col']} im2col copies")
    if row["early"]:
        found.append("a stage is freed by one warpgroup for both")
    if len(row["setmaxnreg"]) < 2:
        found.append("registers are not shared out among the warps")
    if row["step"] >= 64 and row["loop"] > MOST_PER_PRODUCT * row["products"]:
        found.append(f"{row['loop']} instructions for {row['products']} products")
    if row["warnings"]:
        found.append(row["warnings"])
    return found


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    return ahead_of_time.reports(__file__, "--few")


def test_every_pass_and_the_longest_epilogue(rows: list[dict]) -> None:
    assert [(row["pass"], row["besides"]) for row in rows] == [
        ("forward", "gelu"), ("forward", "gelu"), ("dgrad", "plain"), ("wgrad", "plain"),
        *[("forward", "ragged_gelu")] * IM2COL,
    ]  # fmt: skip
    assert [(row, faults(row)) for row in rows if faults(row)] == []


@pytest.mark.long
def test_every_config() -> None:
    assert [(row, faults(row)) for row in ahead_of_time.reports(__file__) if faults(row)] == []


def test_what_must_not_be_is_seen() -> None:
    sound = {"spills": 0, "shared": SHARED_BYTES, "products": 4, "from_shared": 4, "copies": 2, "setmaxnreg": [40, 232],
             "early": 0, "step": 64, "loop": 56, "warnings": "", "im2col": 0, "besides": ""}  # fmt: skip
    assert faults(sound) == []
    for bad in (dict(spills=1), dict(shared=SHARED_BYTES + 1), dict(products=5), dict(from_shared=2), dict(copies=1),
                dict(early=1), dict(setmaxnreg=[]), dict(loop=57), dict(warnings="serialized"),
                dict(besides="ragged")):  # fmt: skip
        assert len(faults({**sound, **bad})) == 1
    assert early("wgmma.wait_group.sync.aligned 1; bar.sync 0, 256; @%p mbarrier.arrive.shared::cta.b64 _, [%r];") == 0
    assert early("wgmma.wait_group.sync.aligned 1; @%p mbarrier.arrive.shared::cta.b64 _, [%r];") == 1


def main(*arguments: str) -> None:
    few, count, bad = "--few" in arguments, 0, 0
    for layer in FEW if few else LAYERS:
        for row in reports(*layer, few):
            count, bad = count + 1, bad + bool(faults(row))
            print(json.dumps(row), flush=True)
            if found := faults(row):
                print(
                    "FAULT", row["pass"], row["besides"], row["config"], *found, sep=", ", file=sys.stderr, flush=True
                )
    print(f"{count} kernels, {bad} with faults", file=sys.stderr)


if __name__ == "__main__":
    main(*sys.argv[1:])
