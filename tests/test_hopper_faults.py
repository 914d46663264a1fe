"""Faults planted in the hopper engine, one at a time, must all be caught by a small battery in the emulator.

``python tests/test_hopper_faults.py`` prints how each of them ended; :mod:`planting` says how it is done.
"""

# ruff: noqa: E501 - a table of source lines

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import planting
import pytest

pytest.importorskip("triton")
from triton_conv3d.engines.hopper.gluon import IM2COL

pytestmark = pytest.mark.long

# name: (file, what stands there once, what is planted); the battery tries only the pass that a name begins with, if any.
FAULTS = {
    # the ring
    "full_not_waited_for": ("ring.py", "mbarrier.wait(full.index(stage), parity)", "pass"),
    "full_of_another_round": ("ring.py", "mbarrier.wait(full.index(stage), parity)", "mbarrier.wait(full.index(stage), parity ^ 1)"),
    "freed_too_early": ("ring.py", "mbarrier.arrive(empty.index(before), pred=i > 0)", "mbarrier.arrive(empty.index(stage))"),
    "freed_before_the_product": ("ring.py", "acc = warpgroup_mma_wait(1, deps=(acc,))", "acc = warpgroup_mma_wait(2, deps=(acc,))"),
    "slices_product_of_another_sum": ("ring.py", "if i == WHICH:", "if i == 0:"),
    "last_stage_not_freed": ("ring.py", "mbarrier.arrive(empty.index(before), pred=steps > 0)", "pass"),
    "freed_without_a_step": ("ring.py", "mbarrier.arrive(empty.index(before), pred=steps > 0)", "mbarrier.arrive(empty.index(before))"),
    "products_not_waited_for": ("ring.py", "acc = warpgroup_mma_wait(0, deps=(acc,))", "pass"),
    "parity_stays": ("ring.py", "tl.where(last, parity ^ 1, parity)", "parity"),
    "ring_too_short": ("ring.py", "last = stage == STAGES - 1", "last = stage == STAGES - 2"),
    "parts_overlap": ("ring.py", "tl.minimum(split * share + share, steps)", "tl.minimum(split * share + share + 1, steps)"),
    "forward_empty_not_waited_for": ("gather.py", "mbarrier.wait(empty.index(stage), parity ^ 1)", "pass"),
    "forward_empty_of_this_round": ("gather.py", "mbarrier.wait(empty.index(stage), parity ^ 1)", "mbarrier.wait(empty.index(stage), parity)"),
    "forward_fewer_bytes": ("gather.py", "w.block_type.nbytes + xs[0].block_type.nbytes", "xs[0].block_type.nbytes"),
    "wgrad_empty_not_waited_for": ("wgrad.py", "mbarrier.wait(empty.index(stage), parity ^ 1)", "pass"),
    # what both sides have to agree about
    "forward_splits_and_groups": ("gather.py", "rest // splits % groups", "rest % groups"),
    "forward_brick_of_a_tile": ("gather.py", "_digits(index // tiles_n % all_bricks, bricks)", "_digits(index % all_bricks, bricks)"),
    "dgrad_class_of_steps": ("gather.py", "rest // (splits * groups)", "rest // splits % 1"),
    "dgrad_class_of_pixels": ("gather.py", "in_w = (in_w + at[3]) * by[2] + first[2]", "in_w = (in_w + at[3]) * by[2]"),
    "dgrad_weight_not_turned": ("gather.py", "stage, parity, DGRAD, True, STAGES", "stage, parity, False, True, STAGES"),
    "forward_views": ("gather.py", "x = xs[view]", "x = xs[0]"),
    "forward_taps_not_carried": ("gather.py", "td += carry", "td += 0"),
    "forward_halves_exchanged": ("gather.py", "left, right = gl.split(", "right, left = gl.split("),
    "forward_residual_before_the_mask": ("gather.py", "inside = (in_n < y_size[0]) & (in_d < y_size[1])", "inside = in_n < y_size[0]"),
    "forward_split_stride": ("gather.py", "y_tile = y_ptr + split.to(INDEX) * split_stride", "y_tile = y_ptr"),
    "wgrad_tap_of_a_tile": ("wgrad.py", "tap // taps[2] % taps[1]", "tap % taps[1]"),
    "wgrad_chains_forgotten": ("wgrad.py", "total += acc", "total = acc"),
    "wgrad_group_of_gradient": ("wgrad.py", "filters = group * group_out + tile_m * BLOCK_M", "filters = tile_m * BLOCK_M"),
    # lines
    "lines_freed_by_one_consumer": ("lines.py", "barriers(STAGES, CONSUMERS)", "barriers(STAGES)"),
    "lines_freed_before_the_products": ("lines.py", "sums = waited(0, sums, read)", "sums = waited(2, sums, read)"),
    "lines_registers_not_kept": ("lines.py", "sums = waited(_met(part, LINES, TAPS_H, STRIDE[1]) * NS, started, read)", "sums = waited(0, started, read)"),
    "lines_tap_of_the_line_before": ("lines.py", "tap = h - line % LINES", "tap = line % LINES - h + TAPS_H - 1"),
    "lines_of_the_first_channels": ("lines.py", "channel = step // kernel[2] * BLOCK_K", "channel = 0"),
    "lines_parts_side_by_side": ("lines.py", "q = tile_n * BLOCK_N + ahead_of(N_PARTS, i // len(K_PARTS))", "q = tile_n * BLOCK_N"),
    "lines_part_of_channels": ("lines.py", "channel + ahead_of(K_PARTS, k)]", "channel]"),
    "lines_written_side_by_side": ("lines.py", "q = tile_n * BLOCK_N + ahead_of(N_PARTS, i % NS)", "q = tile_n * BLOCK_N"),
    "lines_taps_of_padding": ("lines.py", "x_d = first * STRIDE[0] + start[0] + lo * dilation[0]", "x_d = first * STRIDE[0] + start[0]"),
    "lines_taps_from_the_first": ("lines.py", "tap = (td * TAPS_H + th) * kernel[2] + tw", "tap = ((td - lo) * TAPS_H + th) * kernel[2] + tw"),
    "lines_wait_for_one_part": ("lines.py", "_met(part, LINES, TAPS_H, STRIDE[1]) * NS, started, read", "_met(part, LINES, TAPS_H, STRIDE[1]) * NS + 1, started, read"),
    "lines_last_planes_not_freed": ("lines.py", "for _last in gl.static_range(SPAN - 1)", "for _last in gl.static_range(SPAN - 2)"),
    "lines_plane_too_early": ("lines.py", "for _first in gl.static_range(SPAN - 1)", "for _first in gl.static_range(SPAN - 2)"),
    "lines_taps_not_waited_for": ("lines.py", "mbarrier.wait(w_full.index(w_stage), w_parity)", "pass"),
    "lines_planes_of_the_other": ("lines.py", "plane = stage + (WHICH * MINE + part // HALO % MINE)", "plane = stage + ((1 - WHICH) * MINE + part // HALO % MINE)"),
    "lines_beyond_the_ring": ("lines.py", "tl.where(plane >= STAGES, plane - STAGES, plane)", "tl.where(plane >= STAGES, 0, plane)"),
    "lines_side_by_side": ("lines.py", "tile // dilation * (LINES * dilation) + tile % dilation", "tile * LINES"),
    "lines_of_the_first_group": ("lines.py", "w_at = [tap, group * produced + q, r]", "w_at = [tap, q, r]"),
    "lines_taps_not_turned": ("lines.py", "w_at = [taps - 1 - tap,", "w_at = [tap,"),
    "lines_samples_read": ("lines.py", "x_at = [n * SAMPLES, at_d", "x_at = [n, at_d"),
    "lines_samples_written": ("lines.py", "at = (n * SAMPLES, d", "at = (n, d"),
    "lines_pixels_of_a_sample": ("lines.py", "x_w += w_ * (LINE // SAMPLES) + first_w", "x_w += w_ * LINE + first_w"),
    "lines_start_of_dgrad": ("host.py", "p - (k - 1) * by", "p - (k - 1)"),
    "lines_strides_of_planes": ("lines.py", "(WHICH * MINE + part // HALO % MINE) * STRIDE[0]", "WHICH * MINE + part // HALO % MINE"),
    "lines_strides_of_lines": ("lines.py", "tap = h - line % LINES * STRIDE", "tap = h - line % LINES"),
    "lines_first_plane": ("lines.py", "x_d = first * STRIDE[0] +", "x_d = first +"),
    "lines_first_line": ("lines.py", "dilation[1]) * STRIDE[1] + start[1]", "dilation[1]) + start[1]"),
    "lines_place_in_a_view": ("lines.py", "x_w += w_ * (LINE // SAMPLES) + first_w", "x_w += w_ * (LINE // SAMPLES)"),
    "lines_views": ("lines.py", "load(xs[at * len(K_PARTS) + k]", "load(xs[k]"),
    "lines_planes_that_are_read": ("lines.py", "first, last, STRIDE[0], start[0]", "first, last, 1, start[0]"),
    # wgrad by lines
    "slices_input_not_waited_for": ("line_wgrad.py", "mbarrier.wait(x_full.index(stage), parity)", "pass"),
    "slices_overwritten": ("line_wgrad.py", "mbarrier.wait(x_empty.index(stage), parity ^ 1)", "pass"),
    "slices_gradient_overwritten": ("line_wgrad.py", "mbarrier.wait(g_empty.index(g_stage), g_parity ^ 1)", "pass"),
    "slices_freed_before_the_products": ("line_wgrad.py", "sums = waited(0, sums, (pixels,))", "sums = waited(1, sums, (pixels,))"),
    "slices_registers_not_kept": ("line_wgrad.py", "waited(0, sums, (pixels,))", "waited(0, sums, ())"),
    "slices_taps_turned_round": ("line_wgrad.py", "line = oldest + (MET - 1 - i % TAPS_H // STRIDE[1])", "line = oldest + i % TAPS_H // STRIDE[1]"),
    "slices_beyond_the_ring": ("line_wgrad.py", "tl.where(line >= G_STAGES, line - G_STAGES, line)", "tl.where(line >= G_STAGES, 0, line)"),
    "slices_last_lines_not_freed": ("line_wgrad.py", "for _last in gl.static_range(MET - 1)", "for _last in gl.static_range(MET - 2)"),
    "slices_first_lines_not_waited_for": ("line_wgrad.py", "for _first in gl.static_range(MET - 1)", "for _first in gl.static_range(MET - 2)"),
    "slices_freed_by_one_consumer": ("line_wgrad.py", "x_full, x_empty = barriers(STAGES, CONSUMERS)", "x_full, x_empty = barriers(STAGES)"),
    "slices_chains_forgotten": ("line_wgrad.py", "mask=inside & (chain > 0)", "mask=inside & (chain < 0)"),
    "slices_chains_added_to_nothing": ("line_wgrad.py", "mask=inside & (chain > 0)", "mask=inside"),
    "slices_chains_overlap": ("line_wgrad.py", "return begin, tl.minimum(begin + CHAIN, end)", "return begin, tl.minimum(begin + CHAIN + 1, end)"),
    "slices_chain_of_the_first": ("line_wgrad.py", "begin = tl.minimum(begin + chain * CHAIN, end)", "begin = tl.minimum(begin, end)"),
    "slices_turns_of_fewer_tiles": ("line_wgrad.py", "return (tiles - program + programs - 1) // programs * chains", "return tiles // programs * chains"),
    "slices_tap_not_carried": ("line_wgrad.py", "td, carry = next_digit(td, carry, TAPS[0])", "td, carry = next_digit(td, 0, TAPS[0])"),
    "slices_of_the_first_channels": ("line_wgrad.py", "block += carry", "block += 0"),
    "slices_of_the_other": ("line_wgrad.py", "x_rows.index(stage * CONSUMERS + WHICH)", "x_rows.index(stage * CONSUMERS + 1 - WHICH)"),
    "slices_not_turned": ("line_wgrad.py", ".permute((1, 0)).load(", ".load("),
    "slices_column_of_the_dilation": ("line_wgrad.py", "h // dilation[1] * (height * dilation[1]) + h % dilation[1]", "h * height"),
    "slices_columns_along_d": ("line_wgrad.py", "w = column // columns[1] % columns[3]", "w = column // columns[0] % columns[3]"),
    "slices_lines_of_a_part": ("line_wgrad.py", "tl.minimum(end - column * height, height)", "tl.minimum(end - column * height, height - 1)"),
    "slices_start_along_h": ("line_wgrad.py", "h + line * dilation[1] + ahead, w,", "h + line * dilation[1], w,"),
    "slices_start_along_d": ("line_wgrad.py", "d + first[0] + x_d", "d + x_d"),
    "slices_group_of_the_input": ("line_wgrad.py", "group * group_in + block * ROWS]", "block * ROWS]"),
    "slices_group_of_the_gradient": ("line_wgrad.py", "filters = group * group_out + tile_n * BLOCK_N", "filters = tile_n * BLOCK_N"),
    "slices_group_of_the_result": ("line_wgrad.py", "(group * group_out + filter).to(INDEX)", "filter.to(INDEX)"),
    "slices_parts_side_by_side": ("line_wgrad.py", "filter += tile_n * BLOCK_N + ahead_of(N_PARTS, i // TAPS_H)", "filter += tile_n * BLOCK_N"),
    "slices_rows_of_another_group": ("line_wgrad.py", "inside = gl.expand_dims(channel < group_in, 1)", "inside = gl.expand_dims(channel < 2 * group_in, 1)"),
    "slices_split_stride": ("line_wgrad.py", "dw_ptr + split.to(INDEX) * split_stride", "dw_ptr + split.to(INDEX)"),
    "slices_tap_of_a_row": ("line_wgrad.py", "tap = (td * TAPS_H + i % TAPS_H) * TAPS[2] + tw", "tap = (tw * TAPS_H + i % TAPS_H) * TAPS[2] + td"),
    "slices_lines_of_the_gradient": ("line_configs.py", "-(-(problem.input_size[1] + problem.padding[2] % stride) // (by * stride))", "-(-problem.output_size[1] // by)"),
    "slices_line_before_the_input": ("line_configs.py", "problem.input_size[1] + problem.padding[2] % stride", "problem.input_size[1]"),
    "slices_taps_of_a_phase": ("line_wgrad.py", "if i % TAPS_H % STRIDE[1] == phase", "if i % TAPS_H // MET == phase"),
    "slices_lines_of_a_phase": ("line_wgrad.py", "* STRIDE[1] + start[1] + phase", "* STRIDE[1] + start[1]"),
    "slices_lines_of_a_stride": ("line_wgrad.py", "(h + line * dilation[1]) * STRIDE[1]", "(h + line * dilation[1])"),
    "slices_before_the_padding": ("host.py", "-(h % by_h)", "0"),
    "slices_order_of_the_views": ("line_wgrad.py", "view_d * STRIDE[2] + view_w == view", "view_w * STRIDE[0] + view_d == view"),
    "slices_way_in_a_view": ("ring.py", "return at % stride, at // stride", "return at % stride, tap"),
    "slices_start_of_a_view": ("host.py", "found.append(View(offset, tuple(", "found.append(View((0, 0, 0), tuple("),
    "slices_place_in_a_view": ("host.py", "(-d % by_d, -(h % by_h), -w % by_w)", "(0, -(h % by_h), -w % by_w)"),
    # dgrad with a stride, by lines
    "classes_gradient_not_waited_for": ("line_dgrad.py", "mbarrier.wait(full.index(stage), parity)", "pass"),
    "classes_gradient_overwritten": ("line_dgrad.py", "mbarrier.wait(empty.index(stage), parity ^ 1)", "pass"),
    "classes_taps_not_waited_for": ("line_dgrad.py", "mbarrier.wait(w_full.index(w_stage * STEPS + step), 0 if STAYS else w_parity)", "pass"),
    "classes_taps_of_another_round": ("line_dgrad.py", "0 if STAYS else w_parity", "0"),
    "classes_taps_that_stay_awaited_again": ("line_dgrad.py", "0 if STAYS else w_parity", "w_parity"),
    "classes_taps_overwritten": ("line_dgrad.py", "mbarrier.wait(w_empty.index(w_stage * STEPS + step), w_parity ^ 1)", "pass"),
    "classes_taps_not_freed": ("line_dgrad.py", "mbarrier.arrive(w_empty.index(w_stage * STEPS + step))", "pass"),
    "classes_taps_that_stay_loaded_again": ("line_dgrad.py", "if not STAYS or tile == gl.program_id(0)", "if True"),
    "classes_taps_of_the_first_tile": ("line_dgrad.py", "if not STAYS or tile == gl.program_id(0)", "if tile == gl.program_id(0)"),
    "classes_taps_of_another_place": ("line_dgrad.py", "b = w_ring.index(w_stage * TAPS +", "b = w_ring.index("),
    "classes_freed_before_the_products": ("line_dgrad.py", "sums = waited(0, sums, read)", "sums = waited(1, sums, read)"),
    "classes_registers_not_kept": ("line_dgrad.py", "begun(sums, i, pixels, b), read + (pixels,))", "begun(sums, i, pixels, b), (pixels,))"),
    "classes_registers_of_the_line_before": ("line_dgrad.py", "read = (pixels,)", "read = ()"),
    "classes_freed_by_one_consumer": ("line_dgrad.py", "full, empty = barriers(STAGES, CONSUMERS)", "full, empty = barriers(STAGES)"),
    "classes_taps_freed_by_one_consumer": ("line_dgrad.py", "barriers(W_STAGES * STEPS, CONSUMERS)", "barriers(W_STAGES * STEPS)"),
    "classes_lines_of_the_other": ("line_dgrad.py", "stage * HALO + WHICH * MINE + line", "stage * HALO + (1 - WHICH) * MINE + line"),
    "classes_written_by_the_other": ("line_dgrad.py", "h * LINES + WHICH * MINE + i // CLASSES", "h * LINES + (1 - WHICH) * MINE + i // CLASSES"),
    "classes_line_of_a_sum": ("line_dgrad.py", "tap_of(i % CLASSES, step, line - i // CLASSES, AXES))", "tap_of(i % CLASSES, step, i // CLASSES - line + SHIFTS_H - 1, AXES))"),
    "classes_of_the_first_filters": ("line_dgrad.py", "q = group * reduced + block * BLOCK_K", "q = group * reduced"),
    "classes_of_the_first_group": ("line_dgrad.py", "q = group * reduced + block * BLOCK_K", "q = block * BLOCK_K"),
    "classes_of_the_first_channels": ("line_dgrad.py", "q, tile_n * BLOCK_N]", "q, 0]"),
    "classes_group_of_the_result": ("line_dgrad.py", "dx_size, dx_strides, group * produced", "dx_size, dx_strides, group * 0"),
    "classes_start_along_d": ("line_dgrad.py", "d * BRICK[1] + start[0] + step // SHIFTS_W", "d * BRICK[1] + step // SHIFTS_W"),
    "classes_shift_along_w": ("line_dgrad.py", "start[2] + step % SHIFTS_W", "start[2]"),
    "classes_samples": ("line_dgrad.py", "at = [n * BRICK[0], at_d", "at = [n, at_d"),
    "classes_order": ("classes.py", "return index // (by_h * by_w), index // by_w % by_h, index % by_w", "return index % by_w, index // by_w % by_h, index // (by_h * by_w)"),
    "classes_phase": ("classes.py", "tap = place + phase - stride * (first + shift)", "tap = place - stride * (first + shift)"),
    "classes_first_shift": ("class_configs.py", "shifts(axis)[0] + pad // stride", "shifts(axis)[0]"),
    "classes_last_lines": ("class_configs.py", "return n, d, -(-h // self.lines), w", "return n, d, h // self.lines, w"),
    # im2col copies
    "im2col_samples_and_planes": ("gather.py", "d, n, h, w = _digits(index, (y_size[1], y_size[0], y_size[2], y_size[3]))", "n, d, h, w = _digits(index, y_size)"),
    "im2col_last_plane": ("gather.py", "planes = last - d + 1", "planes = last - d"),
    "im2col_offset_from_the_first_tap": ("gather.py", "low_h = tl.minimum((taps_h - 1) * step[1], 0)", "low_h = 0"),
    "im2col_offset_twice": ("gather.py", "at_w = tw * step[2] - low_w", "at_w = tw * step[2] - 2 * low_w"),
    "im2col_start_of_the_tile": ("gather.py", "n, d, h, w = pixel_at(first, y_size)", "n, d, h, w = pixel_at(first + 1, y_size)"),
    "im2col_place_of_a_pixel": ("gather.py", "in_n, in_d, in_h, in_w = pixel_at(in_w, y_size)", "in_n, in_d, in_h, in_w = pixel_at(in_w + 1, y_size)"),
    "im2col_lower_corner": ("configs.py", "lower.append(pad - reach if dgrad else -pad)", "lower.append(-pad)"),
    "im2col_upper_corner": ("configs.py", "(problem.result_shape[2 + axis] - 1) * problem.stride[axis]", "problem.result_shape[2 + axis] * problem.stride[axis]"),
    "im2col_steps": ("host.py", "element_strides=[1, 1, *problem.stride[1:], 1]", "element_strides=[1] * 5"),
    "im2col_tile_too_few": ("configs.py", "return -(-math.prod(pixels(problem)) // size)", "return math.prod(pixels(problem)) // size"),
    "im2col_strides_of_samples": ("host.py", "[by_d, by_n, *by]", "[by_n, by_d, *by]"),
    # the host
    "wgrad_skipped_taps_not_zeroed": ("host.py", "target.zero_()", "pass"),
    "dgrad_block_of_the_weight": ("host.py", 'return (k, n) if problem.pass_ == "dgrad" else (n, k)', "return n, k"),
}  # fmt: skip
FAULTS = {name: fault for name, fault in FAULTS.items() if IM2COL or not name.startswith("im2col")}


def battery(engine: ModuleType, fault: str) -> None:
    """Raises if the engine is wrong."""
    from dataclasses import replace
    from importlib import import_module

    from cases import Case, run
    from gluon_emulator import emulating

    from triton_conv3d.engines import tma
    from triton_conv3d.problem import PASSES

    host = import_module(f"{engine.__name__}.host")
    host._multiprocessors = lambda device: 2

    def launch(*arguments):
        with emulating(fault):
            return engine.launch(*arguments)

    emulated = SimpleNamespace(NAME="hopper", supports=tma.supports, configs=engine.configs, launch=launch)
    if fault.startswith("lines") or fault == planting.SOUND:
        lines(engine, emulated)
    if fault.startswith("slices") or fault == planting.SOUND:
        slices(engine, emulated, host)
    if fault.startswith("classes") or fault == planting.SOUND:
        classes(engine, emulated)
    if IM2COL and (fault.startswith("im2col") or fault == planting.SOUND):
        im2col(engine, emulated)
    if fault.startswith(("lines", "slices", "classes", "im2col")):
        return
    geometries = (
        dict(input_size=(2, 3, 5), kernel_size=(2, 2, 2), padding=(1, 0, 0, 1, 1, 0), channels_last=False, batch=2, out_channels=72),
        dict(in_channels=8, input_size=(2, 5, 6), kernel_size=(1, 3, 3), stride=(1, 2, 3), padding=(0, 0, 1, 0, 1, 2)),
        dict(in_channels=8, out_channels=8, input_size=(1, 1, 4), kernel_size=(3, 1, 3), stride=(2, 1, 1), padding=(2, 2, 0, 0, 0, 0)),
        dict(in_channels=32, out_channels=32, groups=2, input_size=(1, 2, 5), kernel_size=(1, 1, 2), stride=(1, 1, 3), padding=(0, 0, 0, 0, 2, 0)),
    )  # fmt: skip
    for pass_ in [fault.split("_")[0]] if fault.split("_")[0] in PASSES else PASSES:
        for i, geometry in enumerate(geometries):
            case = Case(
                pass_,
                **{"in_channels": 24, "out_channels": 24, "dtype": "float16", **geometry},
                bias=pass_ == "forward",
            )
            if pass_ == "forward":
                case = case.replace(residual="channels_last", activation="relu")
            small = replace(
                engine.configs(case.geometry())[-1], brick_n=1, brick_d=1 + (i == 2), brick_h=4 >> (i == 3), brick_w=4
            )
            run(case, emulated, replace(small, num_stages=2 + i % 2))
            wide = {"block_n": 128, "brick_h": 4, "brick_w": 32, "brick_d": 1} if pass_ == "forward" and i == 0 else {}
            run(case, emulated, replace(small, splits=2, **wide))
        if fault in ("wgrad_chains_forgotten", planting.SOUND) and pass_ == "wgrad":
            import_module(f"{engine.__name__}.configs").CHAIN = 64
            tma.CHAIN = 64
            tma._wgrad_launch.cache_clear()
            host._wgrad_arguments.cache_clear()
            case = Case(
                pass_, in_channels=8, out_channels=8, input_size=(2, 4, 32), kernel_size=(1, 1, 1), dtype="float16"
            )
            run(
                case, emulated, replace(engine.configs(case.geometry())[-1], brick_n=1, brick_d=1, brick_h=4, brick_w=8)
            )


def lines(engine: ModuleType, emulated: SimpleNamespace) -> None:
    """The battery of lines.py."""
    from dataclasses import replace

    from cases import Case, run

    for pass_ in ("forward", "dgrad"):
        for dilation, groups, into, out in (((1, 1, 1), 2, 16, 16), ((2, 3, 1), 1, 16, 16), ((1, 1, 1), 1, 48, 96), ((1, 1, 1), 1, 72, 72)):
            case = Case(
                pass_, in_channels=into * groups, out_channels=out * groups, groups=groups, input_size=(6, 7, 5),
                kernel_size=(3, 2, 2), padding=(2, 1, 0, 2, 1, 0), dilation=dilation, dtype="float16",
            )  # fmt: skip
            offers = [config for config in engine.configs(case.geometry()) if isinstance(config, engine.LineConfig)]
            for planes, stages in ((2, 2), (4, 5)):
                run(case, emulated, replace(offers[0], planes=planes, lines=2, num_stages=stages, samples=1))
            if groups == 2 and pass_ == "forward":
                strided = case.replace(stride=(2, 2, 2), input_size=(12, 11, 9))
                run(strided, emulated, replace(offers[0], planes=2, lines=2, num_stages=4, samples=1))
            if groups == 2:
                several = case.replace(batch=3, input_size=(2, 3, 37))
                run(several, emulated, replace(offers[0], planes=2, lines=2, num_stages=3, samples=2))


def slices(engine: ModuleType, emulated: SimpleNamespace, host: ModuleType) -> None:
    """The battery of line_wgrad.py."""
    from cases import Case, run

    host.CHAIN = 256  # four lines
    for dilation, groups, into, out, rows, filters in (((1, 1, 1), 2, 48, 16, 32, 16), ((2, 3, 1), 1, 16, 48, 16, 48)):
        case = Case(
            "wgrad", in_channels=into * groups, out_channels=out * groups, groups=groups, input_size=(3, 8, 21),
            kernel_size=(2, 3, 3), padding=(2, 1, 1, 2, 1, 0), dilation=dilation, dtype="float16",
        )  # fmt: skip
        for stages in (2, 4):
            run(case, emulated, engine.LineWgradConfig(1, 4, 16, rows, filters, stages, splits=3))
    strided = case.replace(stride=(2, 2, 2), dilation=(1, 1, 1), input_size=(5, 14, 23), padding=(1, 1, 1, 0, 1, 2))
    run(strided, emulated, engine.LineWgradConfig(2, 2, 16, 16, 48, 3, splits=2))


def classes(engine: ModuleType, emulated: SimpleNamespace) -> None:
    """The battery of line_dgrad.py."""
    from cases import Case, run

    for groups, into, out, filters, w_stages in ((2, 16, 32, 16, 1), (1, 16, 32, 16, 2), (1, 16, 16, 16, 1), (1, 24, 48, 16, 1)):
        case = Case(
            "dgrad", batch=3, in_channels=into * groups, out_channels=out * groups, groups=groups, input_size=(3, 11, 20),
            kernel_size=(2, 3, 4), stride=(1, 2, 3), padding=(2, 0, 3, 1, 4, 2), dtype="float16",
        )  # fmt: skip
        for stages in (2, 16):  # so many that two blocks of filters are under way
            run(case, emulated, engine.LineDgradConfig(2, 2, 16, 2, 16, filters, stages, w_stages))
        run(case, emulated, engine.LineDgradConfig(1, 1, 64, 4, 16, filters, 2, w_stages))


def im2col(engine: ModuleType, emulated: SimpleNamespace) -> None:
    """The battery of im2col copies."""
    from cases import Case, run

    for pass_, by in (("forward", (2, 3, 1)), ("dgrad", (1, 1, 1))):
        case = Case(
            pass_, in_channels=16, out_channels=16, batch=3, input_size=(4, 5, 3), kernel_size=(3, 2, 3), stride=by,
            padding=(1, 1, 0, 1, 1, 0), dilation=(1, 2, 1), dtype="float16",
        )  # fmt: skip
        run(case, emulated, engine.Im2colConfig(16, 64, 16, 3))


outcomes, test_without_a_fault_the_battery_passes, test_planted_fault_is_caught = planting.tests(Path(__file__).name, FAULTS)


if __name__ == "__main__":
    planting.try_all("hopper", FAULTS, battery, sys.argv[1:])
