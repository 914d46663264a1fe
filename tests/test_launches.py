"""Kernels launched whole but for the GPU: by Triton's own launchers, on a driver that refuses what CUDA's documentation
forbids of a launch and of the descriptors of tensors (made_up_driver.c).

``PYTHONPATH=. python tests/test_launches.py ENGINE... [--most N]`` launches the first N configs of these engines for each
problem, and prints a JSON object for each: the kernels that started, and the descriptors that they were given; with
``--refusals`` what the driver answers to unsound descriptors.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from functools import partial

import ahead_of_time
import pytest
import torch
from ahead_of_time import COMPILER
from counting import calls

pytest.importorskip("triton")

from triton_conv3d import engines
from triton_conv3d.workload import LAYOUTS, Layer

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there, with a driver of its own"),
    pytest.mark.skipif(COMPILER is None, reason="no C compiler with Python's headers, as Triton needs on a GPU"),
]
ONES, NONE, TWOS = (1, 1, 1), (0, 0, 0), (2, 2, 2)
# (C, K, size, kernel, stride, padding, dilation, groups, dtype): odd, so that nothing divides by accident.
LAYERS = [
    Layer(f"{c}->{k}", 2, c, k, size, kernel, stride, padding, dilation, groups, True, dtype)
    for c, k, size, kernel, stride, padding, dilation, groups, dtype in (
        (64, 128, (5, 9, 17), (3, 3, 3), ONES, ONES, ONES, 1, "bf16"),
        (64, 64, (6, 21, 21), (3, 3, 3), ONES, ONES, ONES, 1, "fp16"),
        (32, 32, (4, 8, 70), (3, 3, 3), ONES, ONES, ONES, 1, "bf16"),
        (128, 64, (5, 9, 17), (3, 3, 3), TWOS, ONES, ONES, 1, "bf16"),
        (128, 128, (5, 9, 17), (3, 1, 3), (1, 2, 3), (1, 0, 2), (2, 1, 1), 2, "bf16"),
        (256, 256, (3, 8, 8), (3, 3, 3), ONES, ONES, ONES, 1, "fp32"),
        (20, 45, (5, 9, 17), (3, 3, 3), ONES, ONES, ONES, 1, "bf16"),
        (3, 16, (5, 20, 20), (5, 7, 7), (1, 2, 2), (2, 3, 3), ONES, 1, "bf16"),
        (1, 32, (8, 20, 20), (3, 3, 3), ONES, ONES, ONES, 1, "fp32"),
        (96, 3, (4, 20, 130), (3, 3, 3), ONES, NONE, ONES, 1, "bf16"),
        (32, 2, (8, 20, 20), (3, 3, 3), TWOS, ONES, ONES, 1, "bf16"),
        (64, 64, (5, 9, 17), (3, 3, 3), ONES, ONES, ONES, 64, "bf16"),
        (24, 48, (5, 9, 17), (5, 5, 5), TWOS, TWOS, ONES, 24, "fp32"),
        (24, 24, (5, 9, 17), (5, 5, 5), ONES, TWOS, ONES, 24, "bf16"),
        (64, 64, (8, 20, 20), (3, 3, 3), ONES, ONES, ONES, 16, "bf16"),
    )
]
# What each engine starts of its own for these layers, by the first three configs of a problem.
KERNELS = {
    "implicit_gemm": {"gather_gemm", "wgrad_gemm", "reduce_splits", "transpose"},
    "tma": {"gather_bricks", "wgrad_bricks"},
    "hopper": {"gather_ring", "wgrad_ring", "line_ring", "line_dgrad_ring", "line_wgrad_ring"},
    "rounded": {"rounded_copy", "rounded_wgrad"},
    "padded": {"gather_lines"},
    "space_to_depth": {"gather_lines"},
    "toeplitz": {"move_blocks", "expand", "collect"},
}
# Of a descriptor of (5, 4, 64) 16-bit elements that is sound, what the driver does not take.
UNSOUND = {
    "address % 16": {"address": 8}, "strides[i] % 16": {"strides": (260, 65, 1)}, "strides[i] >= 1ull << 40":
    {"strides": (2**40, 64, 1)}, "box[i] > 256": {"block": (1, 257, 64)}, "inner * bytes % 16": {"block": (1, 4, 4)},
    "swizzled[swizzle]": {"swizzle": 2}, "sizes[i] < 1": {"shape": (0, 4, 64)}, "rank > 5": {"block": (1,) * 5 + (64,),
    "shape": (1,) * 5 + (64,), "strides": (64,) * 5 + (1,)},
}  # fmt: skip

# Their tests look at nothing but what :mod:`made_up_tests` takes for right.
ENGINE_TESTS = ("block_diagonal", "blocks", "folded", "fuzz", "halo", "hopper", "hopper_lines", "hopper_line_dgrad",
    "hopper_line_wgrad", "kn2row", "padded", "rounded", "space_to_depth", "subpixel", "tma", "toeplitz")  # fmt: skip


def launches(names: list[str], most: int | None, problems: int | None) -> Iterator[dict]:
    import made_up_gpu

    from autotune import suites
    from triton_conv3d.engines import base, launching

    made_up_gpu.install()
    base.LEAST_TRANSPOSED = 0  # of any size
    asked, run = [], launching._run
    launching._run = launching._runner = lambda *launch: (asked.append(launch), run(*launch))[1]
    for case in suites.cases(LAYERS, layouts=tuple(LAYOUTS))[:problems]:
        problem, operands = case.on(made_up_gpu.DEVICE)
        for engine in map(engines.get, names):
            for config in engine.configs(problem)[:most] if engine.supports(problem) is None else ():
                row, given = {"engine": engine.NAME, "problem": str(problem), "layout": case.layout, "config": str(config)}, []
                try:
                    launch = partial(engine.launch, problem, operands, config)
                    for how in (lambda: launch(), lambda: row.update(calls=calls(launch))):
                        for counted in (made_up_gpu.launched, made_up_gpu.described, made_up_gpu.given, asked):
                            counted.clear()
                        how()
                        given.append(list(made_up_gpu.given))
                    if asked or given[0] != given[1]:  # the second time nobody asks Triton which of its kernels it means
                        row["error"] = f"launched again: {given[1]} and not {given[0]}, {len(asked)} by Triton"
                except Exception as error:
                    row["error"] = f"{type(error).__name__}: {error}"
                yield row | {"launched": dict(made_up_gpu.launched), "described": dict(made_up_gpu.described)}


def refusals() -> Iterator[dict]:
    """What the driver answers to descriptors, a sound one first."""
    import made_up_gpu
    import triton

    made_up_gpu.install()
    utils = triton.runtime.driver.active.utils
    fill = getattr(utils, "fill_tma_descriptor_tiled", None) or utils.fill_tma_descriptor  # up to Triton 3.6
    sound = {"address": 1 << 20, "swizzle": 3, "block": (1, 4, 64), "shape": (5, 4, 64), "strides": (256, 64, 1)}
    for change in ({}, *UNSOUND.values()):
        asked = {**sound, **change}
        try:
            fill(asked["address"], asked["swizzle"], 2, 6, asked["block"], asked["shape"], asked["strides"], 0)
            yield {"error": ""}
        except RuntimeError as error:
            yield {"error": str(error)}


def kernels_of(rows: list[dict]) -> set[str]:
    """What was started; every launch was taken, and every product of tma and hopper got its descriptors."""
    assert not [row for row in rows if "error" in row]
    assert rows and all(row["launched"] for row in rows)
    for row in rows:
        by_descriptor = [name for name in row["launched"] if name.endswith(("_bricks", "_ring"))]
        assert all(row["described"][name] >= 2 for name in by_descriptor)
        assert bool(by_descriptor) == (row["engine"] in ("tma", "hopper") or "engine=tma" in row["config"])
    return {name for row in rows for name in row["launched"]}


@pytest.fixture(scope="module")
def two() -> list[dict]:
    return ahead_of_time.reports(__file__, "tma", "hopper", "--most", "1", "--problems", "1")


def test_one_launch_of_each_kind_of_descriptor(two: list[dict]) -> None:
    assert kernels_of(two) == {"gather_bricks", "gather_ring"}


def test_what_a_launch_costs_the_host(two: list[dict]) -> None:
    """Of a known problem: 160 and 183 calls with Triton 3.6, 128 and 144 with 3.9; where Triton is asked, from 187 to 300."""
    assert [row["calls"] <= most for row, most in zip(two, (175, 200), strict=True)] == [True, True]


@pytest.mark.long
@pytest.mark.parametrize("engine", [name for name in engines.available() if name not in ("aten", "matmul")])
def test_every_engine(engine: str) -> None:
    rows = ahead_of_time.reports(__file__, engine, "--most", "3")
    assert kernels_of(rows) >= KERNELS.get(engine, set())


@pytest.mark.long
@pytest.mark.parametrize("name", ENGINE_TESTS)
def test_tests_of_engines_compile_and_launch(name: str) -> None:
    """A few cases of each; ``made_up_tests`` says how to run them all."""
    command = ("-m", "pytest", "-q", "-p", "made_up_tests", "-p", "no:cacheprovider", "--cases", "2")
    done = ahead_of_time.run(*command, f"tests/test_{name}.py")
    assert done.returncode == 0, done.stdout[-3000:]


def test_the_driver_refuses() -> None:
    sound, *unsound = ahead_of_time.reports(__file__, "--refusals")
    assert sound["error"] == ""
    for reason, row in zip(UNSOUND, unsound, strict=True):
        assert reason in row["error"]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("engines", nargs="*")
    parser.add_argument("--most", type=int)
    parser.add_argument("--problems", type=int, help="so many, the first")
    parser.add_argument("--refusals", action="store_true")
    options = parser.parse_args()
    rows = refusals() if options.refusals else launches(options.engines, options.most, options.problems)
    for row in rows:
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
