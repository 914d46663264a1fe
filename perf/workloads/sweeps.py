"""Sweeps: one size varied, everything else at a usual value, as entries in the format of ``real.json``.

The usual layer has 64 channels, 64x64x64 pixels and 3x3x3 taps: 58 GFLOP, enough to fill a GPU. The largest layer of
any sweep moves 4 GiB in float32, so that all of them fit into the memory of small GPUs too.
"""

from __future__ import annotations

from collections.abc import Callable

_USUAL = {"N": 1, "C": 64, "K": 64, "size": 64, "kernel": 3, "stride": 1, "padding": 1, "dilation": 1, "groups": 1}

# What is varied, its values, and how each value changes the usual layer.
_SWEEPS: dict[str, tuple[tuple[int, ...], Callable[[int], dict]]] = {
    "channels": ((8, 16, 32, 64, 128, 256, 512), lambda v: {"C": v, "K": v}),
    "channels_between": ((24, 48, 80, 96, 160, 192, 320, 384), lambda v: {"C": v, "K": v}),  # that leave tiles half empty
    "few_channels": ((1, 2, 3, 4, 8, 16), lambda v: {"C": v, "K": v, "size": 128}),  # on both sides
    "odd_channels": ((12, 20, 45, 54, 115, 230, 461), lambda v: {"C": v, "K": v}),  # that fill no vectors of 16 bytes
    "size": ((8, 16, 32, 64, 128, 256), lambda v: {"C": 32, "K": 32, "size": v}),  # fewer channels, for 256^3
    "kernel": ((1, 3, 5, 7), lambda v: {"kernel": v, "padding": v // 2}),
    "batch": ((1, 2, 4, 8, 16, 32), lambda v: {"N": v}),
    "stride": ((1, 2, 3, 4), lambda v: {"stride": v}),
    "dilation": ((1, 2, 3, 4, 6), lambda v: {"dilation": v, "padding": v}),
    "groups": ((1, 2, 4, 8, 16, 32, 64), lambda v: {"groups": v}),
    "depthwise": ((8, 16, 32, 64, 128, 256, 512), lambda v: {"C": v, "K": v, "groups": v}),
    "depthwise_kernel": ((3, 5, 7, 9, 13), lambda v: {"groups": 64, "kernel": v, "padding": v // 2}),
}

NAMES = tuple(f"sweep.{name}" for name in _SWEEPS)


def entries(name: str) -> list[dict]:
    """The layers of one of :data:`NAMES`, in the order of the varied size; it is the last part of each ``id``."""
    swept = name.removeprefix("sweep.")
    values, change = _SWEEPS[swept]
    return [_entry(swept, value, {**_USUAL, **change(value)}) for value in values]


def _entry(swept: str, value: int, sizes: dict) -> dict:
    cube = {"kernel", "stride", "padding", "dilation"}
    return {
        "id": f"sweep.{swept}.{value}",
        "suite": f"sweep.{swept}",
        "model": f"sweep over {swept}",
        "source": "parametric",
        "op": "conv3d",
        "core": False,
        **{name: [size] * 3 if name in cube else size for name, size in sizes.items() if name != "size"},
        **dict.fromkeys("DHW", sizes["size"]),
        "bias": False,
        "dtype": "fp16",
        "calls_per_forward": 1,
    }
