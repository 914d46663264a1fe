"""What the compiler made of the kernels, run by an emulator of PTX: exact, whatever the order of what is asynchronous.

``PYTHONPATH=. python tests/test_ptx.py ENGINE... [--most N] [--arch sm_80]`` runs the first N configs of these engines for
each case, and prints a JSON object for each; without engines the representative set of the tests, with faults in its PTX too.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from collections.abc import Iterator

import ahead_of_time
import pytest

pytest.importorskip("triton")
from cases import Case

from triton_conv3d import engines

TWOS, SAME = (2, 2, 2), (1,) * 6
# Sizes that leave parts of tiles empty. Each engine takes those that it supports.
DENSE = [
    dict(in_channels=64, out_channels=64, input_size=(3, 5, 9), padding=SAME, dtype="bfloat16"),
    dict(in_channels=64, out_channels=48, input_size=(5, 7, 9), stride=TWOS, padding=SAME, dtype="float16"),
    dict(in_channels=128, out_channels=64, input_size=(3, 5, 9), kernel_size=(3, 1, 3), stride=(1, 2, 3),
         padding=(1, 1, 0, 0, 2, 2), dilation=(2, 1, 1), groups=2, dtype="bfloat16"),
    dict(in_channels=32, out_channels=32, input_size=(3, 4, 66), padding=SAME, dtype="bfloat16"),
    dict(in_channels=16, out_channels=24, input_size=(3, 6, 65), kernel_size=(1, 3, 3), padding=(0, 0, 1, 1, 1, 1),
         dtype="bfloat16"),
    dict(in_channels=256, out_channels=128, input_size=(2, 6, 6), padding=SAME, dtype="bfloat16"),
    dict(in_channels=24, out_channels=40, input_size=(4, 9, 10), kernel_size=TWOS, padding=(1, 0, 0, 1, 0, 0),
         dtype="bfloat16", batch=2),
    dict(in_channels=64, out_channels=64, input_size=(3, 21, 21), padding=SAME, dtype="bfloat16"),
    dict(in_channels=64, out_channels=128, input_size=(3, 15, 15), stride=(1, 2, 2), padding=SAME, dtype="bfloat16"),
    dict(in_channels=96, out_channels=160, input_size=(4, 9, 9), padding=SAME, dtype="bfloat16"),  # short steps
    dict(in_channels=48, out_channels=64, input_size=(5, 9, 9), kernel_size=(3, 1, 2), padding=(1, 1, 0, 0, 0, 0),
         dtype="bfloat16"),
]  # fmt: skip
TF32 = [
    dict(in_channels=64, out_channels=128, input_size=(3, 5, 7), padding=SAME, precision="tf32"),
    dict(in_channels=20, out_channels=13, input_size=(3, 5, 7), padding=SAME, precision="tf32"),
]
FEW = [
    dict(in_channels=3, out_channels=16, input_size=(4, 12, 12), kernel_size=(3, 5, 5), stride=(1, 2, 2),
         padding=(1, 1, 2, 2, 2, 2), dtype="bfloat16"),
    dict(in_channels=1, out_channels=32, input_size=(4, 8, 8), padding=SAME, dtype="bfloat16"),
    dict(in_channels=32, out_channels=2, input_size=(4, 8, 8), stride=TWOS, padding=SAME, dtype="bfloat16"),
    dict(in_channels=96, out_channels=3, input_size=(3, 6, 130), dtype="bfloat16"),
    dict(in_channels=2, out_channels=24, input_size=(4, 8, 8), padding=SAME, precision="tf32"),
]  # fmt: skip
GROUPS = [
    dict(in_channels=64, out_channels=64, groups=16, input_size=(3, 6, 6), padding=SAME, dtype="bfloat16"),
    dict(in_channels=64, out_channels=64, groups=64, input_size=(3, 6, 9), padding=SAME, dtype="bfloat16"),
    dict(in_channels=24, out_channels=48, groups=24, input_size=(3, 6, 9), kernel_size=(3, 3, 5), stride=TWOS,
         padding=(1, 1, 1, 1, 2, 2)),
    dict(in_channels=10, out_channels=10, groups=10, input_size=(6, 5, 11), kernel_size=(5, 5, 5), dilation=(1, 2, 1),
         padding=(2, 2, 4, 3, 2, 1), dtype="bfloat16"),
]  # fmt: skip
ODD = [dict(in_channels=20, out_channels=45, input_size=(3, 5, 9), padding=SAME, dtype="bfloat16")]
CASES = [
    Case(pass_, **case, bias=pass_ == "forward", channels_last=last, layouts=("channels_last" if last else "contiguous",) * 2)
    for case in (*DENSE, *TF32, *FEW, *GROUPS, *ODD)
    for pass_ in ("forward", "dgrad", "wgrad")
    for last in (True, False)
]
OURS = [name for name in engines.available() if name not in ("aten", "matmul")]
FIRST = CASES[0].replace(input_size=(3, 5, 20), bias=True)  # more bricks than programs
REPRESENTATIVE = [("hopper", FIRST, "BrickConfig"), ("hopper", FIRST.replace(pass_="wgrad", bias=False), "BrickConfig"),
                  ("implicit_gemm", Case("dgrad", in_channels=64, out_channels=3, input_size=(3, 5, 9), padding=SAME,
                                         dtype="bfloat16"), "GemmConfig")]  # fmt: skip
# What is changed in the PTX of the first of them, of the last for "fence", and what has to be said of it: sums that are read
# early, stages that are never freed, stages that are taken for filled, warps that do not wait for each other, and products of
# what was stored by threads.
PLANTED = {
    "wait": (r"wgmma\.wait_group\.sync\.aligned\s+0;", "wgmma.wait_group.sync.aligned 1;", "registers of a product under way"),
    "arrive": (r"@%p\d+ mbarrier\.arrive\.shared::cta\.b64 _, \[%r\d+\];", "", "nothing goes on"),
    "parity": (r"(mbarrier\.try_wait\.parity\.\S+\s+complete, \[%r\d+\]), %r\d+;", r"\1, 1;", "more arrivals"),
    "barrier": (r"bar\.sync\s+0, 256;", "", "nothing goes on"),
    "fence": (r"fence\.proxy\.async\S*;", "", "no fence behind it"),
}


def emulate(arch: str = "sm_90", seed: int = 0, edit=lambda ptx: ptx):
    """A runner of launches: each is compiled for an architecture, and emulated."""
    from ptx_emulator import emulated

    from perf.machine_code import compiled, compiling_for

    def run(kernel, grid, args, options) -> None:
        with compiling_for(arch):
            _, made = compiled((kernel, args, options))
        emulated(made, edit(made.asm["ptx"]), grid, args, seed)

    return run


def outcome(engine: str, case: Case, config, runner) -> dict:
    """``error`` is empty if the result is exact."""
    import cases

    from triton_conv3d.engines import launching

    row, begin = {"engine": engine, "case": repr(case), "config": f"{type(config).__name__} {config}"}, time.monotonic()
    try:
        with launching.replaced(runner):
            cases.run(case, engine, config)
        error = ""
    except Exception as raised:
        error = f"{type(raised).__name__}: {raised}"
    return row | {"error": error[:2000], "seconds": round(time.monotonic() - begin, 1)}


def rows(options: argparse.Namespace) -> Iterator[dict]:
    import cases

    from triton_conv3d import problem
    from triton_conv3d.engines.hopper import host

    if cases.DEVICE.type != "cpu":
        raise SystemExit("the tensors have to be in the host's memory: set CUDA_VISIBLE_DEVICES= (empty) where there is a GPU")
    problem.device_name = cases.device_name = lambda device: (options.arch, options.arch)
    host._MULTIPROCESSORS = 3  # so that a program has several tiles
    if options.engines:
        for case in CASES:
            for name in options.engines:
                engine, posed = engines.get(name), cases.make(case)[0]
                for config in engine.configs(posed)[: options.most] if engine.supports(posed) is None else ():
                    yield outcome(name, case, config, emulate(options.arch, options.seed))
        return
    for name, case, kind in REPRESENTATIVE:
        config = next(c for c in engines.get(name).configs(cases.make(case)[0]) if type(c).__name__ == kind)
        yield outcome(name, case, config, emulate(options.arch, options.seed))
        for what, (pattern, text, _) in PLANTED.items():
            if (name, case, kind) == REPRESENTATIVE[-1 if what == "fence" else 0]:
                changed = emulate(edit=lambda ptx: re.sub(pattern, text, ptx))
                yield {"planted": what} | outcome(name, case, config, changed)


@pytest.fixture(scope="module")
def found() -> list[dict]:
    return ahead_of_time.reports(__file__)


def test_representative_kernels_are_exact(found: list[dict]) -> None:
    whole = [row for row in found if "planted" not in row]
    assert len(whole) == len(REPRESENTATIVE) and [row for row in whole if row["error"]] == []


@pytest.mark.parametrize("planted", PLANTED)
def test_faults_are_seen(found: list[dict], planted: str) -> None:
    (row,) = [row for row in found if row.get("planted") == planted]
    assert PLANTED[planted][2] in row["error"]


@pytest.mark.long
@pytest.mark.parametrize("engine", OURS)
def test_every_engine_is_exact(engine: str) -> None:
    found = ahead_of_time.reports(__file__, engine, "--most", "2")
    assert found and [row for row in found if row["error"]] == []


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("engines", nargs="*", choices=[[], *OURS])
    parser.add_argument("--most", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--arch", choices=("sm_80", "sm_90"), default="sm_90")
    for row in rows(parser.parse_args()):
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
