"""Faults planted in the tma engine, one at a time, must all be caught by a small battery of the checks used elsewhere.

``python tests/test_tma_faults.py`` prints how each of them ended; :mod:`planting` says how it is done.
"""

# ruff: noqa: E501 - a table of source lines

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import planting
from guarded import guards

# name: (file, what stands there once, what is planted); the battery tries only the pass that a name begins with, if any.
FAULTS = {
    # kernels
    "bricks_decoded_wrongly": ("kernels.py", "h = index // sizes[3] % sizes[2]", "h = index // sizes[3] % sizes[1]"),
    "forward_scale_of_width": ("kernels.py", "x_w = w_ * scale[2] + start_w", "x_w = w_ + start_w"),
    "forward_taps_of_a_view": ("kernels.py", "first_h + th * tap_step[1]", "first_h + th"),
    "forward_taps_of_the_next_line": ("kernels.py", "tl.where(over, next_line, w_by)", "w_by"),
    "forward_taps_of_a_lone_view": ("__init__.py", "SKIPS=read.tap_step != (1, 1, 1)", "SKIPS=len(read.views) > 1"),
    "forward_channels_begin_again": ("kernels.py", "r = tl.where(over, 0, r)", "r = r"),
    "forward_channels_of_the_group": ("kernels.py", "at_w, group * reduced + r]", "at_w, r]"),
    "forward_filters_of_the_group": ("kernels.py", "w.load([w_tap, group * produced + q, r])", "w.load([w_tap, q, r])"),
    "forward_bias_of_the_group": ("kernels.py", "bias_ptr + group * produced + channel", "bias_ptr + channel"),
    "forward_splits_overlap": ("kernels.py", "end = tl.minimum(begin + share, steps)", "end = begin + share + 1"),
    "forward_weight_of_the_first_tap": ("kernels.py", "first_d += lo * tap_step[0]", "first_d += 0"),
    "dgrad_start_of_the_first_tap": ("kernels.py", "+ start_d + lo * step[0]", "+ start_d"),
    "forward_pixels_beyond_the_end": ("kernels.py", "inside = (in_n < y_size[0]) & (in_d", "inside = (in_d"),
    "dgrad_rows_of_the_class": ("kernels.py", "(in_w < rows_w)", "(in_w < y_size[3])"),
    "dgrad_filters_of_the_group": ("kernels.py", "w.load([w_tap, group * reduced + r, q])", "w.load([w_tap, r, q])"),
    "dgrad_step_of_the_class": ("kernels.py", "in_h * stride[1] + index_h", "in_h * stride[1]"),
    "wgrad_chains_forgotten": ("kernels.py", "total += acc", "total = acc"),
    "wgrad_channels_beyond_the_group": ("kernels.py", "filter < group_out, channel < group_in", "filter < group_out, channel >= 0"),
    "wgrad_scale_of_width": ("kernels.py", "w * scale[2] + x_w", "w + x_w"),
    "wgrad_bricks_not_carried": ("kernels.py", "n += tl.where(over, BRICK[0], 0)", "n += 0"),
    "wgrad_group_of_gradient": ("kernels.py", "filters = group * group_out + k", "filters = k"),
    "wgrad_flat_gradient_of_a_split": ("kernels.py", "pixel = chain * BLOCK_K", "pixel = 0"),
    "wgrad_flat_where_it_is_not": ("geometry.py", "sizes[axis] % brick[axis] == 0 or math.prod", "True or math.prod"),
    # views
    "forward_view_beyond_the_input": ("geometry.py", "if offset < size:", "if True:"),
    "forward_padding_of_views": ("geometry.py", "divmod(first * dilation - pad, stride)", "divmod(first * dilation, stride)"),
    "forward_dilation_of_views": ("geometry.py", "(stride, 1, dilation // common, tap_step)", "(stride, 1, dilation, tap_step)"),
    "forward_padding_at_the_end": ("geometry.py", "    low = problem.padding[::2]", "    low = problem.padding[1::2]"),
    "dgrad_taps_not_flipped": ("geometry.py", "ones, ones, step, tap_step)", "ones, ones, tuple(-s for s in step), tap_step)"),
    # launches
    "forward_offset_of_views": ("descriptors.py", " if any(self.offset) else tensor", " if False else tensor"),
    "forward_strides_of_views": ("descriptors.py", "h * step[1]", "h"),
    "forward_copy_forgotten": ("__init__.py", "w = dense(operands.weight)", "w = operands.weight"),
    "forward_partial_sums_in_half": ("__init__.py", "dtype=torch.float32) if split", "dtype=torch.float16) if split"),
    "wgrad_skipped_taps_not_zeroed": ("__init__.py", "target.zero_()", "pass"),
    "wgrad_layout_of_result": ("__init__.py", "weight_strides(problem, split)", "weight_strides(problem, True)"),
    "forward_alignment_not_asked": ("__init__.py", "if problem.alignment % VECTOR_BYTES:", "if False:"),
    "dgrad_blocks_across_groups": ("configs.py", "whole = divides or (", "whole = True or ("),
}  # fmt: skip


def battery(engine: ModuleType, fault: str) -> None:
    """Raises, or kills the process, if the engine is wrong."""
    from dataclasses import replace

    from cases import Case, make, run

    from triton_conv3d.problem import PASSES

    base = dict(in_channels=24, out_channels=24, dtype="float16", batch=2)
    geometries = (
        dict(input_size=(2, 3, 5), kernel_size=(2, 2, 1), padding=(1, 0, 0, 1, 0, 0), channels_last=False),
        dict(in_channels=8, input_size=(2, 5, 6), kernel_size=(1, 3, 3), stride=(1, 2, 3), padding=(0, 0, 1, 0, 1, 2), dilation=(1, 1, 2)),
        dict(in_channels=8, out_channels=8, batch=1, input_size=(1, 1, 4), kernel_size=(3, 1, 3), stride=(2, 1, 1), padding=(2, 2, 0, 0, 0, 0)),
        dict(in_channels=32, out_channels=32, batch=1, groups=2, input_size=(1, 2, 5), kernel_size=(1, 1, 2), stride=(1, 1, 2), dilation=(1, 1, 2), layouts=("cropped", "contiguous")),
    )  # fmt: skip
    for pass_ in [fault.split("_")[0]] if fault.split("_")[0] in PASSES else PASSES:
        with guards(at_end=True) as fresh:
            for i, geometry in enumerate(geometries):
                case = Case(pass_, **{**base, **geometry}, seed=i, bias=pass_ == "forward")
                if pass_ == "wgrad":
                    case = case.replace(layouts=case.layouts[:1] * 2)
                offers = engine.configs(case.geometry())
                small = replace(offers[0], brick_n=4 if i == 0 else 1, brick_d=1 + (i == 2), brick_h=4 >> (i == 3), brick_w=4)
                run(case, engine, small, fresh)
                run(case.replace(exact=False), engine, replace(small, splits=2, brick_w=1 if i == 1 else 2, brick_d=2), fresh)
        if pass_ == "wgrad":  # flat, and in one case only as far as the first brick
            for height in (3, 2):
                case = Case(pass_, **{**base, "in_channels": 40, "input_size": (3, height, 4), "kernel_size": (1, 1, 1)})
                config = replace(engine.configs(case.geometry())[0], brick_n=1, brick_d=1, brick_h=2, brick_w=4, splits=2)
                run(case, engine, config, fresh)
        grouped = Case(pass_, in_channels=96, out_channels=96, groups=2, kernel_size=(1, 1, 1), dtype="float16")
        if pass_ == "dgrad":
            run(grouped, engine, max(engine.configs(grouped.geometry()), key=lambda config: config.block_k))
        assert engine.supports(make(grouped.replace(layouts=("unaligned", "channels_last")))[0])
        if fault in ("wgrad_chains_forgotten", planting.SOUND) and pass_ == "wgrad":
            engine.CHAIN = 64
            engine._wgrad_launch.cache_clear()
            case = Case(pass_, in_channels=8, out_channels=8, input_size=(2, 4, 32), kernel_size=(1, 1, 1), dtype="float16")
            run(case, engine, replace(engine.configs(case.geometry())[0], brick_n=1, brick_d=1, brick_h=4, brick_w=8))


outcomes, test_without_a_fault_the_battery_passes, test_planted_fault_is_caught = planting.tests(Path(__file__).name, FAULTS)


if __name__ == "__main__":
    planting.try_all("tma", FAULTS, battery, sys.argv[1:])
