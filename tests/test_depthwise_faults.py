"""Faults planted in the depthwise engine, one at a time, must all be caught by a small battery of the checks used elsewhere.

``python tests/test_depthwise_faults.py`` prints how each of them ended; :mod:`planting` says how it is done.
"""

# ruff: noqa: E501 - a table of source lines

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from types import ModuleType

import planting
from guarded import guards, overflow_checked, run_large

# name: (file, what stands there once, what is planted)
FAULTS = {
    # masks
    "channels_off": ("kernels.py", "inside &= c < channels * C_UNIT", "inside &= c >= 0"),
    "width_below_zero": ("lanes.py", "((at + FIRST).to(tl.uint32, bitcast=True) < size)", "(at + FIRST < size)"),
    "always_even": ("__init__.py", "return size >= strips * step", "return True"),
    "height_below_zero": ("kernels.py", "((xh + position(r, ROWS, HEIGHT, DGRAD)).to(tl.uint32, bitcast=True) < height)", "(xh + position(r, ROWS, HEIGHT, DGRAD) < height)"),
    "depth_above_size": ("kernels.py", "height = tl.where((z >= 0) & (z < x_size[0]), x_size[1], 0)\n            plane", "height = tl.where(z >= 0, x_size[1], 0)\n            plane"),
    "wgrad_strips_off": ("wgrad.py", "inside = in_tile & (h < strips[0]) & (w < strips[1])", "inside = in_tile & (w < strips[1])"),
    "wgrad_planes_of_gradient_off": ("wgrad.py", "height = tl.where(step < end, y_size[1], 0)", "height = y_size[1]"),
    "wgrad_taps_beyond_kernel": ("wgrad.py", "wanted = tl.where(exists, filters * C_UNIT, 0)", "wanted = filters * C_UNIT"),
    "reduction_off": ("wgrad.py", "mask = (first + split < splits) & (at < elements)[None, :]", "mask = (first + split >= 0) & (at < elements)[None, :]"),
    # geometry
    "kernel_flipped": ("axes.py", "ahead = open_plane if DGRAD else", "ahead = kernel - 1 - open_plane if DGRAD else"),
    "ring_short": ("axes.py", "max((kernel - 1) * dilation + 1, stride)", "(kernel - 1) * dilation + 1"),
    "dilation_of_height": ("strips.py", "(met.kernel[i], stride[i], dilation[i], met.pad[i])", "(met.kernel[i], stride[i], dilation[2], met.pad[i])"),
    "padding_at_the_end": ("strips.py", "dilation[i], met.pad[i])", "dilation[i], problem.padding[2 * i + 1])"),
    "first_tap_lost": ("__init__.py", "w = met_taps(problem).of(operands.weight)", "w = operands.weight[(..., *map(slice, met_taps(problem).kernel))]"),
    "part_of_depth_starts_late": ("kernels.py", "first + pad_d - (RING - 1)", "first + pad_d"),
    "part_of_row_not_shifted": ("kernels.py", "xw + parts * SHIFT, x_size[2]", "xw, x_size[2]"),
    "multiplier_of_weight": ("kernels.py", "tap_ptr = w_ptr + tap * kernel[2] * w_step + m", "tap_ptr = w_ptr + tap * kernel[2] * w_step"),
    "groups_of_pixels_swapped": ("lanes.py", "parts += (even[i], odd[i])", "parts += (odd[i], even[i])"),
    "ring_not_moved": ("wgrad.py", "ring = ring[1:] + (grads,)", "ring = ring[:-1] + (grads,)"),
    # numbers and memory
    "partial_sums_in_half": ("__init__.py", "partials = torch.empty((config.splits, *kernel, filters), dtype=torch.float32", "partials = torch.empty((config.splits, *kernel, filters), dtype=torch.float16"),
    "offsets_in_32_bits": ("__init__.py", '"INDEX": tl.int64 if problem.index64 else tl.int32', '"INDEX": tl.int32'),
    "copy_forgotten": ("__init__.py", "if problem.layouts[role] != STRIDED:", "if True:"),
    "skipped_taps_not_zeroed": ("__init__.py", "        dw.zero_()\n", "        pass\n"),
    "units_of_two": ("__init__.py", "if aligned else 1", "if aligned else 2"),
}  # fmt: skip


def battery(engine: ModuleType, fault: str) -> None:
    """Raises, or kills the process, if the engine is wrong."""
    from cases import Case, make, run

    rows = ("contiguous",) * 2
    geometries = (
        dict(in_channels=7, batch=2, input_size=(2, 5, 6), kernel_size=(2, 3, 3), padding=(1, 0, 2, 0, 1, 1)),
        dict(in_channels=3, input_size=(2, 3, 8), kernel_size=(3, 1, 3), padding=(1, 1, 0, 0, 1, 1), layouts=rows, channels_last=False),
        dict(in_channels=6, input_size=(4, 5, 6), kernel_size=(1, 2, 3), stride=(2, 3, 2), padding=(1, 0, 0, 1, 1, 0), dilation=(1, 2, 1)),
        dict(in_channels=3, out_channels=6, input_size=(2, 3, 3), kernel_size=(2, 1, 2), layouts=("unaligned", "channel_step")),
        dict(in_channels=4, input_size=(1, 4, 3), kernel_size=(3, 3, 3), padding=(1,) * 6, layouts=("channel_step", "unaligned")),
        dict(in_channels=2, input_size=(1, 2, 24), kernel_size=(1, 1, 19), padding=(0, 0, 0, 0, 2, 3)),
        dict(in_channels=4, input_size=(2, 5, 6), kernel_size=(1, 5, 6), padding=(0, 0, 2, 0, 0, 2)),
        dict(in_channels=259, input_size=(1, 3, 1), kernel_size=(1, 2, 1)),
        dict(in_channels=5, input_size=(3, 5, 4), kernel_size=(1, 2, 1), exact=False),
    )  # fmt: skip
    for i, geometry in enumerate(geometries):
        for pass_ in ("forward", "dgrad", "wgrad"):
            channels = geometry["in_channels"]
            case = Case(
                pass_, seed=i, groups=channels, bias=pass_ == "forward", **{"out_channels": channels, **geometry}
            )
            offers = engine.configs(make(case)[0])
            with guards(at_end=i % 2 == 0) as fresh:
                run(case, engine, dataclasses.replace(offers[0], splits=2), fresh)
                run(case, engine, dataclasses.replace(offers[-1], splits=3, vector=1 if pass_ != "wgrad" else 4), fresh)
    for pass_ in ("forward", "dgrad", "wgrad"):
        with overflow_checked():
            run_large(engine, pass_, "batch")


outcomes, test_without_a_fault_the_battery_passes, test_planted_fault_is_caught = planting.tests(Path(__file__).name, FAULTS)


if __name__ == "__main__":
    planting.try_all("depthwise", FAULTS, battery, sys.argv[1:])
