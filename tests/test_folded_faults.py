"""Faults planted in the engine for few channels, one at a time, must all be caught by a small battery of its checks.

``python tests/test_folded_faults.py`` prints how each of them ended; :mod:`planting` says how it is done.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import planting
from blocks_cases import GEOMETRIES, case
from cases import run
from folded_cases import draw
from guarded import guards, overflow_checked, run_large

from triton_conv3d.problem import PASSES

KERNELS, HOST = "kernels.py", "__init__.py"
FAULTS = {
    "rows_off": (KERNELS, "in_rows = m < sample * batch", "in_rows = m >= 0"),
    "filters_off": (KERNELS, "in_q = q < columns", "in_q = q >= 0"),
    "reduction_off": (KERNELS, "needed = tl.where(in_r, needed, -1)", "needed = tl.where(in_r, needed, 0)"),
    "one_dimension_checked": (KERNELS, "(one << tw) | (one << (KERNEL_W + th)) |", "(one << tw) |"),
    "tap_order": (KERNELS, "th = r // (REDUCED * KERNEL_W) % KERNEL_H", "th = r // (REDUCED * KERNEL_H) % KERNEL_H"),
    "channel_first": (KERNELS, "channel = r % REDUCED", "channel = r // (KERNEL_D * KERNEL_H * KERNEL_W)"),
    "group_of_input": (KERNELS, "x_pixels += group.to(INDEX) * REDUCED * x_strides[1]", "x_pixels += group * 0"),
    "group_of_weight": (KERNELS, "w_filters = group.to(INDEX) * w_strides[5]", "w_filters = group.to(INDEX) * 0"),
    "group_of_bias": (KERNELS, "bias_ptr + group * produced + q", "bias_ptr + q"),
    "padding_at_the_end": (HOST, "copies = problem.padding[::2]", "copies = problem.padding[1::2]"),
    "dgrad_forward": (HOST, "step, _ = dgrad_steps", "_, step = dgrad_steps"),
    "dgrad_class_order": (KERNELS, "index_d, index_h, index_w = class_at(", "index_d, index_w, index_h = class_at("),
    "dgrad_taps_of_a_class": (KERNELS, "in_r = in_r & (td < taps_d) & (th < taps_h) & (tw < taps_w)", "in_r = in_r"),
    "dgrad_first_tap": (KERNELS, "tw = tap_w + tw * tap_step[2]", "tw = tw * tap_step[2]"),
    "dgrad_next_tap": (KERNELS, "th = tap_h + th * tap_step[1]", "th = tap_h + th"),
    "dgrad_group_of_class": (KERNELS, "group // (stride[2] * stride[1] * stride[0])", "group // (stride[2] * stride[1])"),
    "dgrad_positions": (KERNELS, "jw = jw * stride[2] + index_w", "jw = jw * stride[2]"),
    "dgrad_block_columns": (KERNELS, "columns = BLOCK[0] * BLOCK[1] *", "columns = BLOCK[0] * BLOCK[0] *"),
    "dgrad_block_class": (KERNELS, "class_at(q // BLOCK[3], BLOCK)", "class_at(q, BLOCK)"),
    "dgrad_block_zeros": (KERNELS, "in_w &= (ahead[:, None] & ", "in_w &= (0 * ahead[:, None] & "),
    "dgrad_block_front": (KERNELS, "(aw - front[2]) * w_strides[4]", "aw * w_strides[4]"),
    "dgrad_block_next_tap": (KERNELS, "tw = tw * BLOCK[2]", "tw = tw * 1"),
    "dgrad_block_begins": (KERNELS, "ah < before[1], aw < before[2])", "ah < before[1], aw < 0)"),
    "dgrad_block_ends": (KERNELS, "_bits(ad >= last[0], ah >= last[1],", "_bits(ad >= last[0], ah >= BLOCK[1],"),
    "dgrad_block_place": (KERNELS, "(aw - before[2]).to(INDEX)", "aw.to(INDEX)"),
    "dgrad_block_low": (HOST, "rows, start = of.count, of.low", "rows = of.count"),
    "roles_of_channels": (HOST, "channels = (w_strides[1], w_strides[0])", "channels = w_strides[:2]"),
    "wgrad_rows_off": (KERNELS, "in_dw = (r < REDUCTION)[:, None]", "in_dw = (r >= 0)[:, None]"),
    "wgrad_filters_off": (KERNELS, "in_g = in_p[:, None] & in_q[None, :]", "in_g = in_p[:, None] & (q >= 0)[None, :]"),
    "wgrad_pixels_off": (KERNELS, "in_p = p < end", "in_p = p >= 0"),
    "wgrad_x_beyond_the_pixels": (KERNELS, "unmet = tl.where(in_p, ~valid, -1)", "unmet = ~valid"),
    "wgrad_lines": (KERNELS, "planes = lines // y_size[1]", "planes = lines // y_size[0]"),
    "wgrad_group_of_input": (KERNELS, "x_taps = (group * REDUCED + channel)", "x_taps = channel"),
    "wgrad_group_of_gradient": (KERNELS, "g_filters += (group * produced + q)", "g_filters += q"),
    "wgrad_split_short": (KERNELS, "tl.minimum(begin + share, pixels)", "tl.minimum(begin + share, pixels - 1)"),
    "wgrad_order_of_result": (HOST, "wgrad_roles(problem, split)", "wgrad_roles(problem, False)"),
    "wgrad_dilation": (KERNELS, "tw.to(INDEX) * dilation[2] * x_strides[4]", "tw.to(INDEX) * dilation[1] * x_strides[4]"),
    "wgrad_block_front": (KERNELS, "dw_columns += (ad - front[0])", "dw_columns += ad"),
    "wgrad_block_zeros": (KERNELS, "in_dw &= (_bits(", "in_dw &= (0 * _bits("),
    "wgrad_block_ends": (KERNELS, "in_g &= (ends[:, None] & ", "in_g &= (0 * ends[:, None] & "),
    "wgrad_block_low": (HOST, "tuple(-by for by in of.low)", "tuple(by for by in of.low)"),
    "last_step_only": (KERNELS, "acc = dot(w, x, acc, PRECISION, UPCAST)", "acc = dot(w, x, acc * 0, PRECISION, UPCAST)"),
    "offsets_in_32_bits": (HOST, "tl.int64 if problem.index64 else tl.int32,", "tl.int32,"),
}  # fmt: skip


def battery(engine: ModuleType, fault: str) -> None:
    """Raises, or kills the process, if the engine is wrong."""
    for name in GEOMETRIES if fault.startswith("dgrad_") or "_block_" in fault or fault == planting.SOUND else ():
        of = case(name, out_channels=3, pass_="wgrad" if fault.startswith("wgrad") else "dgrad")
        blocks, *_, smallest = engine.configs(of.geometry())
        with guards(at_end=True) as fresh:
            run(of, engine, blocks, fresh)
            run(of, engine, smallest, fresh)
    for pass_ in sorted(PASSES, key=lambda pass_: not fault.startswith(pass_)):
        for seed in range(12):
            of, config = draw(pass_, seed)
            with guards(at_end=seed % 3 > 0) as fresh:
                run(of, engine, engine.configs(of.geometry())[-1] if seed % 2 and pass_ != "wgrad" else config, fresh)
        with overflow_checked():
            run_large(engine, pass_, "batch")


outcomes, test_without_a_fault_the_battery_passes, test_planted_fault_is_caught = planting.tests(Path(__file__).name, FAULTS)


if __name__ == "__main__":
    planting.try_all("folded", FAULTS, battery, sys.argv[1:])
