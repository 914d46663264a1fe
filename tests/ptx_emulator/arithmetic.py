"""Values of instructions: arrays of unsigned numbers, one for each lane, seen as what their type says."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .machine import FLOAT, LANE, LANES, SINT, UINT, Fault, Warp


def signed(value: np.ndarray, kind: str) -> np.ndarray:
    """Unsigned numbers as their type sees them: ``s32``, ``f32``; ``b32``, ``u32`` and predicates as they are."""
    if kind[0] == "s":
        return value.view(SINT[int(kind[1:])])
    if kind[0] == "f" and not kind.endswith("x2"):
        return value.view(FLOAT[int(kind[1:])])
    return value


def _bits_of(value: np.ndarray) -> np.ndarray:
    """The other way round."""
    return value if value.dtype.kind in "ub" else value.view(UINT[8 * value.itemsize])


def special(name: str) -> Callable[[Warp], np.ndarray]:
    """A register of what a thread is."""
    register, _, axis = name[1:].partition(".")
    index = "xyz".find(axis)
    if register == "tid":
        return lambda warp: (32 * warp.number + LANE if axis == "x" else 0 * LANE).astype(np.uint32)
    if register in ("ctaid", "nctaid"):
        return lambda warp: np.full(LANES, (warp.block.number if register == "ctaid" else warp.block.grid)[index], np.uint32)
    if register == "laneid":
        return lambda warp: LANE.astype(np.uint32)
    raise Fault(f"{name} is not known")


# Numbers of 16 bits


def to_bf16(value: np.ndarray) -> np.ndarray:
    """float32 to the nearest bfloat16, as bits."""
    bits = value.astype(np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(value), np.uint32(0x7FFF), rounded).astype(np.uint16)


def from_bf16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def _to_16(value: np.ndarray, kind: str) -> np.ndarray:
    return to_bf16(value) if kind.startswith("bf16") else value.astype(np.float16).view(np.uint16)


def converted(to: str, source: str, bits: int, *values: np.ndarray) -> np.ndarray:
    """cvt.TO.SOURCE, in a register of so many bits."""
    if to.endswith("x2"):
        high, low = (_to_16(value.view(np.float32), to).astype(np.uint32) for value in values)
        return low | high << np.uint32(16)
    value = from_bf16(values[0]) if source == "bf16" else signed(values[0], source)
    if to == "tf32":
        return (values[0] + np.uint32(0x1000)) & np.uint32(0xFFFFE000)
    if to == "bf16":
        return to_bf16(value)
    if to[0] == "f":
        return _bits_of(value.astype(FLOAT[int(to[1:])]))
    kinds = SINT if to[0] == "s" else UINT
    return _bits_of(value.astype(kinds[int(to[1:])]).astype(kinds[bits]))


# Functions of (type, the part of the opcode behind its name, values)


def _plain(function: Callable) -> Callable:
    """Of values of one type; of pairs of 16-bit floats each by itself."""

    def run(kind: str, how: str, *values: np.ndarray) -> np.ndarray:
        if not kind.endswith("x2"):
            return _bits_of(function(*[signed(value, kind) for value in values]))
        halves = []
        for i in (0, 16):
            parts = [(value >> np.uint32(i)).astype(np.uint16) for value in values]
            parts = [from_bf16(part) if kind == "bf16x2" else part.view(np.float16) for part in parts]
            halves.append(_to_16(function(*parts), kind).astype(np.uint32))
        return halves[0] | halves[1] << np.uint32(16)

    return run


def _multiplied(kind: str, how: str, a: np.ndarray, b: np.ndarray, c: np.ndarray | None = None) -> np.ndarray:
    if kind[0] == "f":
        product = _plain(np.multiply)(kind, how, a, b)
        return product if c is None else _plain(np.add)(kind, how, product, c)
    bits = 8 * a.itemsize
    if how == "wide":
        kinds = SINT if kind[0] == "s" else UINT
        product = _bits_of(signed(a, kind).astype(kinds[2 * bits]) * signed(b, kind).astype(kinds[2 * bits]))
    elif how == "hi":
        products = [int(x) * int(y) >> bits for x, y in zip(signed(a, kind), signed(b, kind), strict=True)]
        product = np.array([value & (1 << bits) - 1 for value in products], a.dtype)
    else:
        product = a * b
    return product if c is None else product + c


def _divided(kind: str, how: str, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Integers towards zero, as C does."""
    if kind[0] == "f":
        return _bits_of(signed(a, kind) / signed(b, kind))
    x, y = (signed(value, kind).astype(np.int64) for value in (a, np.where(b == 0, b.dtype.type(1), b)))
    return (np.abs(x) // np.abs(y) * np.sign(x) * np.sign(y)).astype(SINT[8 * a.itemsize]).view(a.dtype)


def _remainder(kind: str, how: str, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return a - _divided(kind, how, a, b) * np.where(b == 0, b.dtype.type(1), b)


def _shifted(function: Callable) -> Callable:
    def run(kind: str, how: str, a: np.ndarray, by: np.ndarray) -> np.ndarray:
        value, bits = signed(a, kind), 8 * a.itemsize
        result = function(value, np.minimum(by, bits - 1).astype(value.dtype))
        gone = (by >= bits) & (function is np.left_shift or kind[0] != "s")
        return _bits_of(np.where(gone, value.dtype.type(0), result))

    return run


def _funnel(kind: str, how: str, low: np.ndarray, high: np.ndarray, by: np.ndarray) -> np.ndarray:
    """The high word of the 64 bits, shifted to the left by as many as wrap around 32."""
    if how != "l" or kind != "b32":
        raise Fault(f"shf.{how} of {kind} is not known")
    both = high.astype(np.uint64) << np.uint64(32) | low.astype(np.uint64)
    return (both << (by & np.uint32(31)).astype(np.uint64) >> np.uint64(32)).astype(np.uint32)


def _ones(at: np.ndarray, length: np.ndarray) -> np.ndarray:
    return ((np.uint64(1) << length) - np.uint64(1)) << at


def _field(kind: str, how: str, a: np.ndarray, at: np.ndarray, length: np.ndarray) -> np.ndarray:
    at, length = at.astype(np.uint64), length.astype(np.uint64)
    value = a.astype(np.uint64) >> at & _ones(np.uint64(0), length)
    if kind[0] == "s":
        negative = value >> np.maximum(length, np.uint64(1)) - np.uint64(1) & np.uint64(1)
        value = np.where(negative, value | ~_ones(np.uint64(0), length), value)
    return value.astype(a.dtype)


def _inserted(kind: str, how: str, a: np.ndarray, b: np.ndarray, at: np.ndarray, length: np.ndarray) -> np.ndarray:
    at = at.astype(np.uint64)
    field = _ones(at, length.astype(np.uint64))
    return (b.astype(np.uint64) & ~field | a.astype(np.uint64) << at & field).astype(a.dtype)


def _chosen_bytes(kind: str, how: str, a: np.ndarray, b: np.ndarray, codes: np.ndarray) -> np.ndarray:
    both = np.stack([value >> np.uint32(8 * i) & np.uint32(255) for value in (a, b) for i in range(4)])
    result = np.zeros(LANES, np.uint32)
    for i in range(4):
        code = codes >> np.uint32(4 * i) & np.uint32(15)
        byte = both[code & np.uint32(7), LANE]
        sign = np.where(byte & np.uint32(128), np.uint32(255), np.uint32(0))
        result |= np.where(code & np.uint32(8), sign, byte) << np.uint32(8 * i)
    return result


def _by_table(kind: str, how: str, a: np.ndarray, b: np.ndarray, c: np.ndarray, table: np.ndarray) -> np.ndarray:
    rows = [i for i in range(8) if int(table[0]) >> i & 1]
    terms = [(a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c) for i in rows]
    return np.bitwise_or.reduce(terms) if terms else np.zeros_like(a)


FUNCTIONS = {
    "add": _plain(np.add), "sub": _plain(np.subtract), "mul": _multiplied, "mad": _multiplied,
    "fma": _plain(lambda a, b, c: a * b + c), "div": _divided, "rem": _remainder, "min": _plain(np.fmin),
    "max": _plain(np.fmax), "and": _plain(np.bitwise_and), "or": _plain(np.bitwise_or), "xor": _plain(np.bitwise_xor),
    "not": _plain(np.invert), "neg": _plain(np.negative), "abs": _plain(np.abs), "shl": _shifted(np.left_shift),
    "shr": _shifted(np.right_shift), "bfe": _field, "bfi": _inserted, "prmt": _chosen_bytes, "lop3": _by_table,
    "shf": _funnel,
}  # fmt: skip
