"""Faults planted in implicit_gemm, one at a time, must all be caught by a small battery of the checks used elsewhere.

``python tests/test_planted_faults.py`` prints how each of them ended; :mod:`planting` says how it is done.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import sys
from pathlib import Path
from types import ModuleType

import planting
from guarded import guards, overflow_checked, run_large

from triton_conv3d.problem import PASSES

KERNELS, TAPS, HOST = "kernels.py", "taps.py", "__init__.py"

# name: (file, what stands there once, what is planted)
FAULTS = {
    # masks
    "mask_of_rows_off": (KERNELS, "in_rows = m < pixels", "in_rows = m >= 0"),
    "mask_of_rows_one_too_many": (KERNELS, "in_rows = m < pixels", "in_rows = m <= pixels"),
    "mask_of_filters_off": (KERNELS, "in_q = q < produced", "in_q = q >= 0"),
    "mask_of_filters_one_too_many": (KERNELS, "in_q = q < produced", "in_q = q <= produced"),
    "mask_of_reduction_off_in_x": (KERNELS, "in_x &= (r + k < reduced)[None, :]", "in_x &= (k >= 0)[None, :]"),
    "mask_of_reduction_off_in_w": (KERNELS, "in_w &= (r + k < reduced)[:, None]", "in_w &= (k >= 0)[:, None]"),
    "even_always": (HOST, "EVEN=reduced % config.block_k == 0", "EVEN=True"),
    "position_below_zero": (TAPS, "inside = (at >= 0) & (at < size)", "inside = at < size"),
    "position_above_size": (TAPS, "inside = (at >= 0) & (at < size)", "inside = (at >= 0) & (at <= size)"),
    "mask_without_other_tap_bits": (KERNELS, "in_x = (valid & bits) == bits", "in_x = (valid & bits) != 0"),
    "tap_bit_narrow": (TAPS, "unit = inner if FLAT else inner * 0 + 1", "unit = inner if FLAT else 1"),
    "wgrad_mask_of_depth_off": (KERNELS, "in_x = (xd + tap_d[None, :]).to(tl.uint32, bitcast=True) < x_size[0]", "in_x = (xd + tap_d[None, :]) < x_size[0]"),
    "wgrad_mask_of_width_one_too_many": (KERNELS, "bitcast=True) < x_size[2]", "bitcast=True) <= x_size[2]"),
    "wgrad_mask_of_pixels_off": (KERNELS, "mask=in_x & (row_p < left)", "mask=in_x"),
    "wgrad_mask_of_columns_off": (KERNELS, "in_columns = column < columns", "in_columns = column >= 0"),
    "wgrad_mask_of_filters_off": (KERNELS, "in_k = k < group_out", "in_k = k >= 0"),
    "mask_of_reduced_splits_off": (KERNELS, "inside = at < elements", "inside = at >= 0"),
    # indices
    "height_for_width": (KERNELS, "jh = m // rows_w % rows_h", "jh = m // rows_h % rows_h"),
    "no_carry_to_depth": (KERNELS, "td += (th == taps_h).to(tl.int32)", "td += 0"),
    "order_of_planes": (TAPS, "inner = tl.where(by_depth, samples, depth)", "inner = depth"),
    "live_taps_one_too_few": (TAPS, "tl.maximum(inside + by, 0) // by", "tl.maximum(inside, 0) // by"),
    "weight_of_the_first_tap": (KERNELS, "tap_d += lo * tap_step[0]", "tap_d += 0"),
    "swizzle_last_band": (KERNELS, "height = tl.minimum(tiles_m - first, GROUP_M)", "height = GROUP_M"),
    "wgrad_carry_lost": (KERNELS, "n = first_n + row_n + carry", "n = first_n + row_n"),
    "wgrad_hop_short": (KERNELS, "hop_h = BLOCK_K // size_w % size_h", "hop_h = BLOCK_K // size_w % size_w"),
    "wgrad_tap_order": (KERNELS, "tap_h = tap // kernel[2] % kernel[1]", "tap_h = tap // kernel[1] % kernel[1]"),
    "strides_of_result": (KERNELS, "jh * y_strides[2] + jw * y_strides[3]) * Y_UNIT", "jw * y_strides[2] + jh * y_strides[3]) * Y_UNIT"),
    "large_depth_in_32_bits": (KERNELS, "n.to(INDEX) * x_strides[0] + xd.to(INDEX) * x_strides[1]", "n.to(INDEX) * x_strides[0] + xd * x_strides[1]"),
    "large_row_in_32_bits": (HOST, '"INDEX": tl.int64 if problem.index64 else tl.int32', '"INDEX": tl.int32'),
    # groups
    "group_offset_in_x": (KERNELS, "(x_rows + group.to(INDEX) * reduced)", "(x_rows + group.to(INDEX) * produced)"),
    "group_offset_in_weight": (KERNELS, "(group.to(INDEX) * produced + q[None, :])", "(q[None, :])"),
    "group_offset_in_bias": (KERNELS, "bias_ptr + group * produced + q", "bias_ptr + q"),
    "packed_beside_the_diagonal": (KERNELS, "in_q[None, :] & (of_k[:, None] == of_q[None, :])", "in_q[None, :]"),
    "packed_channel_of_weight": (KERNELS, "dense = dense % group_in", "dense = dense"),
    "packed_channels_beyond_the_last": (KERNELS, "in_k &= k < packed[0] * X_UNIT - group * reduced", "in_k &= k >= 0"),
    "packed_filters_beyond_the_last": (KERNELS, "in_q &= q < packed[1] * Y_UNIT - group * produced", "in_q &= q >= 0"),
    "packed_groups_left_over": (HOST, "tiles_m * tiles_n * -(-problem.groups // together) * config.splits, classes", "tiles_m * tiles_n * (problem.groups // together) * config.splits, classes"),
    "wgrad_beside_the_diagonal": (KERNELS, "in_dw &= (k // packed[2])[:, None] == (c // packed[1])[None, :]", "in_dw &= (k >= 0)[:, None]"),
    "wgrad_packed_filters_beyond_the_last": (KERNELS, "in_k &= k < all_out * G_UNIT - group * group_out", "in_k &= k >= 0"),
    "wgrad_packed_channels_beyond_the_last": (KERNELS, "in_columns &= c < packed[0] * X_UNIT - group * group_in", "in_columns &= c >= 0"),
    "wgrad_group_of_gradient": (KERNELS, "(group * group_out + k)[None, :]", "(group + k)[None, :]"),
    # padding, stride, dilation, parity classes
    "padding_at_the_end": (HOST, "low, stride, dilation = problem.padding[::2]", "low, stride, dilation = problem.padding[1::2]"),
    "wgrad_padding_at_the_end": (HOST, "pad, dilation = problem.padding[::2], problem.dilation", "pad, dilation = problem.padding[1::2], problem.dilation"),
    "wgrad_exchanged_padding": (HOST, "tuple(-by for by in pad)", "pad"),
    "wgrad_exchanged_weight": (HOST, "away, (channel, tap, filters)", "away, (filters, tap, channel)"),
    "wgrad_stride_forgotten": (KERNELS, "xh = yh * stride[1] - pad[1]", "xh = yh - pad[1]"),
    "wgrad_dilation_of_width": (KERNELS, "tap_w = tap % kernel[2] * dilation[2]", "tap_w = tap % kernel[2] * dilation[1]"),
    "dgrad_step_forward": (HOST, "step, tap_step = dgrad_steps(stride, dilation)", "step, tap_step = dgrad_steps(stride, dilation); step = tuple(-s for s in step)"),
    "dgrad_common_factor": (HOST, "step, tap_step = dgrad_steps(stride, dilation)", "step, tap_step = tuple(-d for d in dilation), stride"),
    "dgrad_class_size_of_another": (TAPS, "(size - index + stride - 1) // stride", "size // stride"),
    "dgrad_class_first_tap_last": (TAPS, "tap = kernel - 1 - back", "tap = back"),
    "dgrad_class_too_few": (HOST, "classes = math.prod(stride) if strided", "classes = math.prod(stride) - 1 if strided"),
    "dgrad_class_order": (TAPS, "index // stride[2] % stride[1], index %", "index // stride[1] % stride[1], index %"),
    # splits and accumulation
    "split_share_rounded_down": (KERNELS, "share = tl.cdiv(steps, splits)", "share = steps // splits"),
    "split_begins_at_zero": (KERNELS, "begin = split * share\n    end = tl.minimum(begin + share, steps)", "begin = split * 0\n    end = tl.minimum(begin + share, steps)"),
    "wgrad_split_off_by_one": (KERNELS, "end = tl.minimum(begin + share, pixels)", "end = tl.minimum(begin + share, pixels - 1)"),
    "partial_sums_in_half": (HOST, "target = x.new_empty((config.splits, y.numel()), dtype=torch.float32)", "target = x.new_empty((config.splits, y.numel()))"),
    "reduction_misses_one": (KERNELS, "for split in range(splits):", "for split in range(splits - 1):"),
    "bias_in_every_split": (HOST, "BIAS=problem.bias and not split", "BIAS=problem.bias"),
    "chain_dropped": (KERNELS, "total += acc", "total = acc"),
    "transposed_result": (HOST, "TRANSPOSED=problem.result_layout != CHANNELS_LAST", "TRANSPOSED=False"),
    # numbers
    "tf32_truncated": (KERNELS, "((bits + 0x1000) & ~0x1FFF)", "(bits & ~0x1FFF)"),
    "accumulator_in_half": (KERNELS, "acc = dot(a, b, acc, PRECISION, UPCAST)", "acc = dot(a, b, acc, PRECISION, UPCAST).to(tl.float16).to(tl.float32)"),
    # layout
    "copy_forgotten": (HOST, "return tensor if tensor.stride(1) == 1 else dense(tensor)", "return tensor"),
    "result_always_channels_last": (HOST, "y = problem.empty_result(x.device)", "y = problem.replace(layouts=(CHANNELS_LAST,) * 3).empty_result(x.device)"),
    "unaligned_base_in_vectors": (HOST, "w = dense(operands.weight)", "w = dense(operands.weight); x = x.as_strided(x.shape, x.stride(), x.storage_offset() // 8 * 8)"),
}  # fmt: skip


# In float32, whole and split, each between pages that fault.
GEOMETRIES = (
    dict(batch=2, in_channels=7, out_channels=19, input_size=(3, 5, 2), kernel_size=(2, 3, 2), padding=(1, 0, 2, 0, 0, 1)),
    dict(in_channels=20, out_channels=25, groups=5, stride=(2, 3, 2), input_size=(5, 5, 6), kernel_size=(3, 2, 3),
         padding=(1, 1, 0, 0, 1, 0), dilation=(1, 1, 2)),
    dict(in_channels=16, out_channels=16, kernel_size=(1, 2, 2), input_size=(2, 3, 3), layouts=("unaligned",) * 2),
    dict(in_channels=4, out_channels=20, groups=1, stride=(2, 1, 1), dilation=(2, 3, 1), input_size=(5, 7, 3), batch=3,
         kernel_size=(2, 2, 1), layouts=("contiguous", "channel_step")),
    dict(in_channels=2, out_channels=2, kernel_size=(1, 2, 36), input_size=(1, 2, 37), padding=(0, 0, 1, 0, 0, 1)),
)  # fmt: skip


def battery(engine: ModuleType, fault: str) -> None:
    """Raises, or kills the process, if the engine is wrong; begins with the part that the fault's name begins with."""
    parts = {pass_: functools.partial(_check_pass, pass_) for pass_ in PASSES}
    parts |= {"swizzle": _check_bands, "tf32": _check_same_sign, "chain": _check_chain, "large": _check_large}
    for name in sorted(parts, key=lambda name: not fault.startswith(name)):
        parts[name](engine)


def _check_pass(pass_: str, engine: ModuleType) -> None:
    from cases import Case, run

    for i, geometry in enumerate(GEOMETRIES):
        for at_end in (True, False):
            case = Case(pass_, bias=pass_ == "forward", channels_last=at_end, seed=i, dtype="float32", **geometry)
            with guards(at_end) as fresh:
                smallest = engine.configs(case.geometry())[-1]
                run(case, engine, smallest, fresh)
                run(case, engine, dataclasses.replace(smallest, splits=3), fresh)
    half = Case(
        pass_, in_channels=40, out_channels=24, input_size=(3, 3, 4), kernel_size=(1, 2, 3), padding=(0, 0, 1, 0, 1, 1),
        dtype="float16",
    )  # fmt: skip
    smallest = engine.configs(half.geometry())[-1]
    for splits in (1, 3):
        run(half.replace(exact=False), engine, dataclasses.replace(smallest, splits=splits))


def _check_bands(engine: ModuleType) -> None:
    """Ten rows of tiles: one band of the swizzle and a rest, and two columns."""
    from cases import Case, run

    run(Case("forward", in_channels=1, out_channels=17, input_size=(5, 8, 8), kernel_size=(1, 1, 1)), engine)


def _check_same_sign(engine: ModuleType) -> None:
    """T4 in tf32 on operands of one sign, where truncation of each product does not cancel."""
    import tolerances
    from cases import Case, make, pose

    case = Case("forward", in_channels=40, out_channels=8, input_size=(2, 2, 2), kernel_size=(2, 2, 2), precision="tf32")
    _, operands = make(case.replace(exact=False))
    for tensor in (operands.input, operands.weight):
        tensor.abs_()
    problem = pose(case, operands)
    result = engine.launch(problem, operands, engine.configs(problem)[-1])
    tolerances.check_drift(result, problem, operands)


def _check_chain(engine: ModuleType) -> None:
    """A wgrad of more products than one accumulator takes."""
    from cases import Case, run

    chain = Case("wgrad", in_channels=1, out_channels=2, input_size=(17, 31, 32), kernel_size=(1, 1, 1), dtype="float16")
    run(chain, engine, dataclasses.replace(engine.configs(chain.geometry())[-1], block_k=256))


def _check_large(engine: ModuleType) -> None:
    """Offsets beyond 32 bits."""
    for pass_ in PASSES:
        for crossing in ("batch", "depth"):
            with overflow_checked():
                run_large(engine, pass_, crossing)


outcomes, test_without_a_fault_the_battery_passes, test_planted_fault_is_caught = planting.tests(Path(__file__).name, FAULTS)


def test_every_fault_has_its_place() -> None:
    """Those that only the long run tries, too."""
    scripts = {"planted": "implicit_gemm"} | {name: name for name in ("depthwise", "folded", "halo", "hopper", "tma")}
    for script, engine in scripts.items():
        assert planting.stale(engine, importlib.import_module(f"test_{script}_faults").FAULTS) == []


def test_enough_faults() -> None:
    assert len(FAULTS) >= 30 and len({fault[1:] for fault in FAULTS.values()}) == len(FAULTS)


if __name__ == "__main__":
    planting.try_all("implicit_gemm", FAULTS, battery, sys.argv[1:])
