"""Faults planted in the engine that makes blocks channels, one at a time, must all be caught by a small battery of its checks.

``python tests/test_toeplitz_faults.py`` prints how each of them ended; :mod:`planting` says how it is done.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import planting
from cases import Case, run
from guarded import guards, overflow_checked, run_large

from triton_conv3d.problem import PASSES

KERNELS, HOST = "kernels.py", "__init__.py"
FAULTS = {
    "channels_off": (KERNELS, "in_x = (c < channels)[:, None, None]", "in_x = (c >= 0)[:, None, None]"),
    "before_the_line": (KERNELS, "in_run = (w >= 0) & (w < size[2])", "in_run = w < size[2]"),
    "behind_the_line": (KERNELS, "in_run = (w >= 0) & (w < size[2])", "in_run = w >= 0"),
    "above": (KERNELS, "in_line = (d >= 0) & (d < size[0]) & (h >= 0)", "in_line = (d >= 0) & (d < size[0])"),
    "behind_the_planes": (KERNELS, "in_line = (d >= 0) & (d < size[0])", "in_line = (d >= 0)"),
    "blocks_off": (KERNELS, "in_blocks = (b < blocks[2])[:, None]", "in_blocks = (b >= 0)[:, None]"),
    "phase_of_w": (KERNELS, "phase % phases[2] - front[2]", "phase % phases[1] - front[2]"),
    "phase_of_h": (KERNELS, "phase // phases[2] % phases[1] - front[1]", "phase // phases[2] - front[1]"),
    "samples": (KERNELS, "n = batch // (phases[0] * phases[1] * phases[2])", "n = batch // phases[2]"),
    "dilation_of_h": (KERNELS, "line % P[1]) * dilation[1]", "line % P[1]) * dilation[2]"),
    "order_of_lines": (KERNELS, ".permute(2, 0, 1, 3)", ".permute(2, 1, 0, 3)"),
    "order_of_blocks": (KERNELS, ".permute(1, 2, 0, 3)", ".permute(2, 1, 0, 3)"),
    "tap_before": (KERNELS, "mask = (d >= 0) & (d < kernel[0]) & (h >= 0)", "mask = (d < kernel[0]) & (h >= 0)"),
    "tap_behind": (KERNELS, "& (w >= 0) & (w < kernel[2])", "& (w >= 0) & (w <= kernel[2])"),
    "dgrad_flip": (KERNELS, "h = kernel[1] - 1 - h", "h = h"),
    "dgrad_front": (HOST, "far - pad for far, pad", "far for far, pad"),
    "dgrad_before": (HOST, "before = problem.padding[::2]", "before = problem.padding[1::2]"),
    "wgrad_diagonal": (KERNELS, "x_w = w[:, None] + p % P[2]", "x_w = w[:, None] - p % P[2] + P[2] - 1"),
    "wgrad_row": (KERNELS, "* taps[2] + x_w // P[2]", "* taps[1] + x_w // P[2]"),
    "wgrad_last_taps": (HOST, "-(-problem.taps // taps)", "(problem.taps // taps)"),
    "bias_by_channel": (HOST, "bias.repeat_interleave(", "bias.repeat("),
    "offsets_in_32_bits": (HOST, "tl.int64 if of.problem.index64 else tl.int32", "tl.int32"),
}  # fmt: skip
GEOMETRIES = (
    dict(in_channels=3, input_size=(5, 6, 9), kernel_size=(4, 6, 5), padding=(2, 1, 3, 2, 0, 3)),
    dict(in_channels=2, input_size=(6, 5, 8), kernel_size=(5, 5, 7), padding=(4, 4, 2, 2, 6, 9), dilation=(2, 1, 3)),
)


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
                **geometry, out_channels=geometry["in_channels"], groups=geometry["in_channels"],
            )  # fmt: skip
            offers = [config for config in engine.configs(case.geometry()) if config.engine == "implicit_gemm"]
            with guards(at_end=i == 0) as fresh:
                run(case, engine, offers[0], fresh)


outcomes, test_without_a_fault_the_battery_passes, test_planted_fault_is_caught = planting.tests(Path(__file__).name, FAULTS)


if __name__ == "__main__":
    planting.try_all("toeplitz", FAULTS, battery, sys.argv[1:])
