"""Faults planted in what kernels do after their sums, one at a time, must all be caught; see :mod:`planting`."""

# ruff: noqa: E501 - a table of source lines

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from types import ModuleType

import planting
import pytest
from guarded import guards

# engine: {name: (file, what stands there once, what is planted)}; the first plants nothing
FAULTS = {
    "implicit_gemm": {
        "gemm_sound": ("kernels.py", "finished(acc, ", "finished(acc, "),
        "residual_without_mask": ("epilogue.py", "tl.load(residual_ptr + offsets, mask=mask, other=0.0)", "tl.load(residual_ptr + offsets)"),
        "residual_after_activation": ("epilogue.py", "value += tl.load", "value = activated(value, ACTIVATION, slope) + tl.load"),
        "slope_ignored": ("epilogue.py", "value * slope)", "value * 0.01)"),
        "tanh_overflows": ("epilogue.py", "shrunk = tl.exp(-2.0 * tl.abs(value))", "shrunk = tl.exp(-2.0 * value)"),
        "gelu_by_the_wrong_root": ("epilogue.py", "0.7071067811865476", "0.7978845608028654"),
        "activation_after_rounding": ("kernels.py", "acc = finished(acc, ", "acc = finished(rounded(acc, y_ptr.dtype.element_ty, UPCAST).to(tl.float32), "),
        "bias_after_activation": ("kernels.py", "acc += tl.load(bias_ptr", "acc = finished(acc, None, q, in_q, ACTIVATION, slope) + tl.load(bias_ptr"),
        "bias_after_activation_of_splits": ("kernels.py", "total += tl.load(bias_ptr", "total = finished(total, None, at, inside, ACTIVATION, slope) + tl.load(bias_ptr"),
        "residual_of_another_group": ("kernels.py", "finished(acc, residual_ptr, y_tile, in_y", "finished(acc, residual_ptr, y_rows[:, None] + (q * y_strides[4])[None, :], in_y"),
        "residual_in_every_split": ("__init__.py", "*(NO_EPILOGUE if split else end)", "*end"),
        "activation_in_every_split": ("__init__.py", "ACTIVATION=NO_ACTIVATION if split else problem.activation", "ACTIVATION=problem.activation"),
        "residual_not_transposed": ("kernels.py", "total = finished(total, residual_ptr, at,", "total = finished(total, residual_ptr, tl.program_id(0) * BLOCK + tl.arange(0, BLOCK),"),
    },
    "folded": {
        "folded_sound": ("kernels.py", "finished(acc, ", "finished(acc, "),
        "folded_mask": ("kernels.py", "finished(acc, residual_ptr, y_tile, in_y", "finished(acc, residual_ptr, y_tile, in_q[:, None] | in_rows[None, :]"),
        "folded_activation": ("__init__.py", "ACTIVATION=problem.activation", 'ACTIVATION="none"'),
    },
    "tma": {
        "tma_sound": ("kernels.py", "finished(acc, ", "finished(acc, "),
        "tma_mask": ("kernels.py", "finished(acc, residual_ptr, y_tile, in_y", "finished(acc, residual_ptr, y_tile, in_q[:, None] | inside[None, :]"),
        "tma_in_every_split": ("__init__.py", "NO_EPILOGUE if split else end", "end"),
        "tma_of_splits": ("__init__.py", "operands.bias, y, end)", "operands.bias, y)"),
    },
    "depthwise": {
        "depthwise_sound": ("lanes.py", "finished(value, ", "finished(value, "),
        "slide_sample": ("kernels.py", "residual_ptr, n * y_n + o * y_d", "residual_ptr, o * y_d"),
        "rows_sample": ("kernels.py", "residual_ptr, n * y_n + plane", "residual_ptr, plane"),
        "pixels": ("lanes.py", "row + first * PIXEL + lane, inside", "row + first + lane, inside"),
        "groups_of_pixels": ("lanes.py", "row + first + group, inside[:, None]", "row + group, inside[:, None]"),
        "depthwise_mask": ("lanes.py", "row + first * PIXEL + lane, inside", "row + first * PIXEL + lane, in_row"),
    },
}  # fmt: skip
NAMES = [name for faults in FAULTS.values() for name in faults]


def battery(engine: ModuleType, fault: str) -> None:
    """Raises, or kills the process, if the engine is wrong."""
    from cases import Case, run

    shapes = {
        "implicit_gemm": dict(batch=2, in_channels=12, out_channels=18, groups=6, input_size=(2, 2, 3), kernel_size=(1, 2, 2)),
        "folded": dict(batch=2, in_channels=2, out_channels=5, input_size=(2, 2, 3), kernel_size=(1, 2, 2)),
        "tma": dict(batch=2, in_channels=8, out_channels=6, input_size=(2, 2, 3), kernel_size=(1, 2, 2), dtype="float16"),
        "depthwise": dict(batch=2, in_channels=3, out_channels=3, groups=3, input_size=(2, 2, 16), kernel_size=(1, 1, 1)),
    }[engine.NAME]
    for at_end in (True, False):
        layout = "channels_last" if at_end else "contiguous"
        case = Case("forward", bias=True, residual=layout, layouts=(layout,) * 2, channels_last=at_end, **shapes)
        case = case.replace(activation="leaky_relu")
        offers = engine.configs(case.geometry())
        with guards(at_end) as fresh:
            run(case, engine, offers[-1], fresh)
            if engine.NAME in ("implicit_gemm", "tma"):
                run(case, engine, dataclasses.replace(offers[-1], splits=3), fresh)
            if engine.NAME == "depthwise":  # several vectors of pixels, and a row that ends within a strip
                for kernel in ("slide", "rows"):
                    widest = max((o for o in offers if o.kernel == kernel), key=lambda offer: offer.columns)
                    run(case, engine, widest, fresh)
                run(case.replace(input_size=(1, 1, 9)), engine, widest, fresh)
    for activation, dtype in (("silu", "float16"), ("tanh", "float32"), ("gelu", "float32")):
        like = {"dtype": dtype, **shapes, "input_size": (3, 5, 6)}
        run(Case("forward", exact=False, activation=activation, **like), engine)


@pytest.fixture(scope="module")
def outcomes() -> dict[str, str]:
    return planting.outcomes(Path(__file__).name)


@pytest.mark.parametrize("name", NAMES)
def test_planted_fault_is_caught(name: str, outcomes: dict[str, str]) -> None:
    if name.endswith("_sound"):
        assert outcomes[name] == "survived"
    else:
        planting.check(outcomes[name])


if __name__ == "__main__":
    for engine, faults in FAULTS.items():
        if names := [name for name in faults if name in (sys.argv[1:] or NAMES)]:
            planting.try_all(engine, faults, battery, names)
