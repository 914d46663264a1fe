"""Faults planted in the engine that makes blocks along W channels, one at a time, must all be caught by a small battery of its
checks.

``python tests/test_space_to_depth_faults.py`` prints how each of them ended; :mod:`planting` says how it is done.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import planting
from cases import Case, run
from guarded import guards, overflow_checked, run_large

from triton_conv3d.problem import PASSES

KERNELS, HOST = "lines.py", "__init__.py"
FAULTS = {
    "before_the_line": (KERNELS, "((w >= 0) & (w < size[1]))", "(w < size[1])"),
    "behind_the_line": (KERNELS, "((w >= 0) & (w < size[1]))", "(w >= 0)"),
    "above": (KERNELS, "& (h >= 0) & (h < size[0])", "& (h < size[0])"),
    "below": (KERNELS, "& (h >= 0) & (h < size[0])", "& (h >= 0)"),
    "behind_the_copy": (KERNELS, "(pixel < pixels)[:, None]", "(pixel >= 0)[:, None]"),
    "behind_the_channels": (KERNELS, "(column < CHANNELS)[None, :]", "(column >= 0)[None, :]"),
    "step_of_lines": (KERNELS, "* step + first[0]", "+ first[0]"),
    "dilation_of_taps": (KERNELS, "column // channels * dilation", "column // channels"),
    "order_of_channels": (KERNELS, "(column % channels).to(INDEX)", "(column // taps).to(INDEX)"),
    "planes": (KERNELS, "(plane % depth).to(INDEX)", "(plane // depth).to(INDEX)"),
    "first_of_h": (HOST, "-problem.padding[2], problem.stride[1]", "-problem.padding[3], problem.stride[1]"),
    "first_of_w": (HOST, "-of.front, taps", "of.front, taps"),
    "last_pixels": (KERNELS, "(-(-pixels // block), 1)", "(pixels // block, 1)"),
    "taps_of_the_weight": (HOST, "line = columns if of.taps_h == 1 else problem.in_channels", "line = columns"),
    "planes_of_the_weight": (HOST, "plane = math.prod(inner.kernel_size[1:]) * columns", "plane = columns"),
    "dgrad_flip": (HOST, "part if of.forward else part.flip(4)", "part"),
    "wgrad_flip": (HOST, "taps if of.forward else taps.flip(3)", "taps"),
    "offsets_in_32_bits": (KERNELS, "tl.int64 if large else tl.int32", "tl.int32"),
}
GEOMETRIES = (
    dict(in_channels=2, out_channels=16, input_size=(3, 9, 9), kernel_size=(2, 5, 3), padding=(1, 0, 4, 3, 2, 1),
         stride=(1, 2, 1), dilation=(1, 2, 1)),
    dict(in_channels=7, out_channels=3, input_size=(3, 4, 11), kernel_size=(2, 3, 4), padding=(0, 1, 1, 1, 2, 1)),
)  # fmt: skip


def battery(engine: ModuleType, fault: str) -> None:
    """Raises, or kills the process, if the engine is wrong."""
    for pass_ in sorted(PASSES, key=lambda pass_: not fault.startswith(pass_)):
        if fault == "offsets_in_32_bits":
            with overflow_checked():
                run_large(engine, pass_, "depth")
        for i, geometry in enumerate(GEOMETRIES):
            layouts = ("channels_last" if i else "contiguous",) * 2
            case = Case(
                pass_, batch=2, dtype="float16", seed=i, channels_last=i > 0, layouts=layouts, bias=pass_ == "forward",
                **geometry,
            )  # fmt: skip
            offers = [config for config in engine.configs(case.geometry()) if config.engine == "implicit_gemm"]
            smallest = min(offers, key=lambda config: config.pixels)  # whose windows have taps along H as channels in the first
            with guards(at_end=i == 0) as fresh:
                run(case, engine, smallest, fresh)


outcomes, test_without_a_fault_the_battery_passes, test_planted_fault_is_caught = planting.tests(Path(__file__).name, FAULTS)


if __name__ == "__main__":
    planting.try_all("space_to_depth", FAULTS, battery, sys.argv[1:])
