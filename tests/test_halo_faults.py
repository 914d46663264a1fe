"""Faults planted in the engine that reuses planes, one at a time, must all be caught by a small battery of its checks.

``python tests/test_halo_faults.py`` prints how each of them ended; :mod:`planting` says how it is done.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from types import ModuleType

import planting
from cases import Case, run
from guarded import guards, overflow_checked, run_large

from triton_conv3d.problem import PASSES

KERNELS, HOST, CONFIGS = "kernels.py", "__init__.py", "configs.py"
FAULTS = {
    "rows_off": (KERNELS, "in_rows = m < sample * batch", "in_rows = m >= 0"),
    "planes_off": (KERNELS, "in_y = (in_rows & (jd + j < y_size[0]))", "in_y = in_rows"),
    "planes_of_a_row": (KERNELS, "% rows_d * PLANES\n", "% rows_d * (PLANES - 1)\n"),
    "plane_bits": (KERNELS, "(outside & (tap | (1 << p))) == 0", "(outside & tap) == 0"),
    "bits_of_h": (KERNELS, "valid = tap_bits(valid, READ, xh,", "valid = tap_bits(valid, READ, xd,"),
    "reduction_off": (KERNELS, "in_x &= (r + k < reduced)[None, :]", "in_x &= (r + k >= 0)[None, :]"),
    "tap_order": (KERNELS, "w_tap = (th * taps_w + tw)", "w_tap = (th * taps_h + tw)"),
    "group_of_weight": (KERNELS, "w_tile = (group.to(INDEX) * produced + q[None, :])", "w_tile = q[None, :]"),
    "padding_at_the_end": (HOST, "tuple(-pad for pad in problem.padding[::2])", "tuple(-pad for pad in problem.padding[1::2])"),
    "dgrad_flip": (KERNELS, "KERNEL_D - 1 - p if DGRAD else p", "p"),
    "dgrad_first_plane": (HOST, "problem.padding[0] - (problem.kernel_size[0] - 1)", "problem.padding[0]"),
    "dgrad_group": (KERNELS, "w_tile = (group.to(INDEX) * reduced + k[:, None])", "w_tile = k[:, None]"),
    "wgrad_rows_off": (KERNELS, "in_w = (x_rows < left) & (xw.to", "in_w = (x_rows >= 0) & (xw.to"),
    "wgrad_planes_off": (KERNELS, "in_g = (g_rows < left) & (gd + i < y_size[0])", "in_g = g_rows < left"),
    "wgrad_filters_off": (KERNELS, "g_rows = tl.where(in_k[:, None], row[None, :], BLOCK_K)", "g_rows = row[None, :]"),
    "wgrad_plane_of_a_tap": (KERNELS, "dot(grads[i - td], x,", "dot(grads[(i + td) % PLANES], x,"),
    "wgrad_line_of_a_tap": (KERNELS, "(i * x_plane + th * x_line)", "i * x_plane"),
    "wgrad_line_of_a_program": (KERNELS, "start_h = tap_h * dilation[1] - pad[1]", "start_h = -pad[1]"),
    "wgrad_carry": (KERNELS, "d, carry = add_digit(a[1], b[1], carry, rows_d)", "d, carry = add_digit(a[1], b[1], 0, rows_d)"),
    "wgrad_group": (KERNELS, "x_columns = (group.to(INDEX) * channels + c)", "x_columns = c"),
    "wgrad_split_short": (KERNELS, "split * share + share), rows)", "split * share + share), rows - 1)"),
    "wgrad_sums_forgotten": (KERNELS, "summed = tl.where(done > 0, filters, 0)", "summed = tl.where(done > 0, 0, 0)"),
    "wgrad_order_of_taps": (KERNELS, "t // HELD_H * taps_h + tap_h + t % HELD_H", "t % HELD_H * taps_h + tap_h + t // HELD_H"),
    "offsets_in_32_bits": (HOST, "tl.int64 if problem.index64 else tl.int32", "tl.int32"),
}  # fmt: skip
GEOMETRIES = (
    dict(in_channels=17, out_channels=19, input_size=(5, 2, 3), kernel_size=(3, 2, 1), padding=(1, 0, 0, 1, 2, 1)),
    dict(in_channels=32, out_channels=40, groups=2, input_size=(4, 2, 3), kernel_size=(2, 1, 2)),
)


def battery(engine: ModuleType, fault: str) -> None:
    """Raises, or kills the process, if the engine is wrong."""
    configs = sys.modules[f"{engine.__name__}.configs"]
    configs.CHAIN = 32  # products of one accumulator of wgrad: several launches
    for pass_ in sorted(PASSES, key=lambda pass_: not fault.startswith(pass_)):
        if fault == "offsets_in_32_bits":
            with overflow_checked():
                run_large(engine, pass_, "depth")
        for i, geometry in enumerate(GEOMETRIES):
            case = Case(pass_, batch=2, dtype="float16", seed=i, channels_last=i == 0, **geometry)
            offers = engine.configs(case.geometry())
            if pass_ == "wgrad":  # with all taps along H, and with one
                offers = [dataclasses.replace(config, splits=2) for config in (offers[0], offers[-1])]
            for config in dict.fromkeys(offers if pass_ == "wgrad" else offers[-1:]):
                with guards(at_end=i == 0) as fresh:
                    run(case, engine, config, fresh)


outcomes, test_without_a_fault_the_battery_passes, test_planted_fault_is_caught = planting.tests(Path(__file__).name, FAULTS)


if __name__ == "__main__":
    planting.try_all("halo", FAULTS, battery, sys.argv[1:])
