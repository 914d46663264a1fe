"""Matrix products: fragments in registers, and operands in shared memory as wgmma's descriptors lay them out."""

from __future__ import annotations

import numpy as np

from .arithmetic import from_bf16
from .machine import LANE, Fault, Warp, swizzled

_ROW, _PAIR = LANE // 4, LANE % 4  # of a fragment


def _numbers(bits: np.ndarray, kind: str) -> np.ndarray:
    """Elements of a product, exact as float64. Of tf32 the low bits are not looked at."""
    if kind == "bf16":
        return from_bf16(bits).astype(np.float64)
    if kind == "f16":
        return bits.astype(np.uint16).view(np.float16).astype(np.float64)
    if kind == "tf32":
        return (bits & np.uint32(0xFFFFE000)).view(np.float32).astype(np.float64)
    raise Fault(f"products of {kind} are not known")


def operand(warp: Warp, descriptor: int, first: int, rows: int, k: int, kind: str, turned: bool) -> np.ndarray:
    """(rows, k) of a matrix in shared memory: "Matrix Descriptor Format", "Canonical layouts".

    turned: rows lie along 16 bytes, not k.
    """
    start, leading, stride = ((descriptor >> at & 0x3FFF) << 4 for at in (0, 16, 32))
    mode = (0, 128, 64, 32)[descriptor >> 62 & 3]
    if descriptor >> 49 & 7:
        raise Fault("a base offset")
    size = 4 if kind == "tf32" else 2
    m, c = np.meshgrid(np.arange(first, first + rows), np.arange(k), indexing="ij")
    if turned:
        wide = mode or 16
        each = wide // size
        along, across = (leading, stride) if mode else (stride, leading)
        at = m % each * size + m // each * along + c % 8 * wide + c // 8 * across
    elif mode:
        at = m % 8 * mode + m // 8 * stride + c * size
    else:
        at = m % 8 * 16 + m // 8 * stride + c * size // 16 * leading + c * size % 16
    shared = warp.block.shared
    places = shared.places(swizzled(start + at, mode), 8 * size)
    if (warp.block.stored_at[size * places] > warp.fenced).any():
        raise Fault("a product reads what was stored with no fence behind it")
    return _numbers(shared.views[8 * size][places], kind)


def _place(matrix: np.ndarray, rows: np.ndarray, part: int, value: np.ndarray, kind: str) -> None:
    """One register of a fragment: 4 numbers of tf32 along k, or 4 pairs of 16 bits."""
    if kind == "tf32":
        matrix[rows, _PAIR + 4 * part] = _numbers(value, kind)
        return
    for i in range(2):
        half = value >> np.uint32(16 * i) & np.uint32(0xFFFF)
        matrix[rows, 2 * _PAIR + 8 * part + i] = _numbers(half, kind)


def fragment(values: list[np.ndarray], kind: str) -> np.ndarray:
    """(16, k), a left side in registers."""
    a = np.zeros((16, (4 if kind == "tf32" else 8) * max(1, len(values) // 2)))
    for index, value in enumerate(values):
        _place(a, _ROW + 8 * (index % 2), index // 2, value, kind)
    return a


def right_fragment(values: list[np.ndarray], kind: str) -> np.ndarray:
    """(8, k), the right side of mma.sync, its columns first."""
    b = np.zeros((8, (4 if kind == "tf32" else 8) * len(values)))
    for part, value in enumerate(values):
        _place(b, _ROW, part, value, kind)
    return b


def add(warp: Warp, sums: list[str], product: np.ndarray, kept: bool) -> None:
    """Add (16, n) to a warp's float32 sums, or put it in their place."""
    for index, name in enumerate(sums):
        row, column = _ROW + 8 * (index // 2 % 2), 8 * (index // 4) + 2 * _PAIR + index % 2
        before = warp.regs[name].view(np.float32) if kept else 0.0
        warp.regs[name] = (before + product[row, column]).astype(np.float32).view(np.uint32)
