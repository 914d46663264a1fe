"""An instruction as a function of a warp and the lanes that run it."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np

from .arithmetic import FUNCTIONS, converted, signed, special
from .machine import DESCRIPTORS, LANE, LANES, SHARED_BASE, SINT, UINT, Barrier, Fault, Product, Warp
from .matrices import add, fragment, operand, right_fragment
from .text import Kernel, split

Mask = np.ndarray | None  # of lanes; None: all
Run = Callable[[Warp, Mask], None]
Read = Callable[[Warp], np.ndarray]

# What has no effect here: hints, and orders that are always kept.
_NOTHING = ("griddepcontrol", "nanosleep", "membar", "bar.warp", "wgmma.fence", "fence")


def _lanes(mask: Mask) -> list[int]:
    return list(range(LANES)) if mask is None else np.flatnonzero(mask).tolist()


def _of(mask: Mask, values: np.ndarray) -> np.ndarray:
    return values if mask is None else values[mask]


class Instruction:
    """One instruction of a kernel.

    Attributes:
        names: registers that it names. of_products: it is a wgmma, or waits for some. loops_back: it may.
    """

    def __init__(self, kernel: Kernel, number: int):
        self.kernel = kernel
        self.guard, self.opcode, self.operands = kernel.code[number]
        self.parts = self.opcode.split(".")
        self.names = frozenset(re.findall(r"%[a-z]+\d+", " ".join([*self.operands, *(self.guard or ())[:1]])))
        self.of_products = self.parts[0] == "wgmma"
        self.target: Callable[[Warp], int] | None = None
        self.run = self._made()
        self.loops_back = self.parts[0] == "bra" and kernel.labels[self.operands[0]] <= number

    def step(self, warp: Warp, pc: int, active: Mask) -> None:
        mask = active
        if self.guard is not None:
            holds = warp.regs[self.guard[0]] ^ self.guard[1]
            mask = holds if active is None else holds & active
            mask = None if mask.all() else mask
        if mask is None or mask.any():
            if self.target is None:
                self.run(warp, mask)
            else:
                target = self.target(warp)
                warp.go(active, pc + 1)
                return warp.go(mask, target)
        if warp.pc is not None or not warp.done:
            warp.go(active, pc + 1)

    # Operands

    def read(self, text: str, bits: int) -> Read:
        """An operand as unsigned numbers of so many bits; predicates as booleans, of 1."""
        if text.startswith("!"):
            other = self.read(text[1:], bits)
            return lambda warp: ~other(warp)
        if own := self.kernel.register_bits(text):
            if own == bits:
                return lambda warp: warp.regs[text]
            return lambda warp: warp.regs[text].astype(UINT[bits])
        if text.startswith("%"):
            return special(text)
        names = [name for name, _ in self.kernel.params]
        if match := re.fullmatch(r"0[fFdD]([0-9a-fA-F]{8,})", text):
            number = int(match[1], 16)
        elif re.fullmatch(r"(-?\d+|0x[0-9a-fA-F]+)U?", text):
            number = int(text.rstrip("U"), 0)
            number = number & (1 << bits) - 1 if bits > 1 else number != 0
        elif text == "global_smem":
            number = SHARED_BASE
        elif text in names:
            number = DESCRIPTORS + 128 * names.index(text)
        else:
            raise Fault(f"{text} of {self.opcode} is not known")
        value = np.full(LANES, number, UINT[bits])
        return lambda warp: value

    def reads(self, texts: list[str], bits: int) -> list[Read]:
        return [self.read(text, bits) for text in texts]

    def address(self, text: str) -> Callable[[Warp], np.ndarray]:
        base, sign, offset = re.fullmatch(r"\[\s*(.*?)\s*(?:([+-])\s*(-?\w+)\s*)?\]", text).groups()
        by = np.int64(int(offset or "0", 0) * (-1 if sign == "-" else 1))
        read = self.read(base, self.kernel.register_bits(base) or 32)
        return lambda warp: read(warp).astype(np.int64) + by

    @staticmethod
    def vector(text: str) -> list[str]:
        return split(text.strip("{} ")) if text.startswith("{") else [text]

    # Kinds of instructions

    def _made(self) -> Run:
        if self.opcode.startswith("fence.proxy.async"):
            return lambda warp, mask: warp.block.fence(warp)
        if self.opcode.startswith(_NOTHING):
            return lambda warp, mask: None
        name = "_" + self.parts[0]
        if name == "_cp":
            name += "_bulk" if "bulk" in self.parts else "_async"
        if name == "_wgmma" and self.parts[1] != "mma_async":
            name = "_" + self.parts[1]
        return getattr(self, name, self._value)()

    def _bra(self) -> Run:
        target = self.kernel.labels[self.operands[0]]
        self.target = lambda warp: target
        return None

    def _brx(self) -> Run:
        table = [self.kernel.labels[name] for name in self.kernel.tables[self.operands[1]]]
        index = self.read(self.operands[0], 32)

        def target(warp: Warp) -> int:
            values = set(index(warp).tolist())
            if len(values) > 1:
                raise Fault("a branch by index with lanes that differ")
            return table[values.pop()]

        self.target = target
        return None

    def _ret(self) -> Run:
        return lambda warp, mask: warp.leave(mask)

    _exit = _ret

    def _bar(self) -> Run:
        barrier = self.read(self.operands[0], 32)
        threads = self.read(self.operands[1] if len(self.operands) > 1 else str(self.kernel.threads), 32)
        return lambda warp, mask: warp.block.wait(warp, int(barrier(warp)[0]), int(threads(warp)[0]))

    _barrier = _bar

    def _setmaxnreg(self) -> Run:
        count, more = int(self.operands[0]), self.parts[1] == "inc"
        return lambda warp, mask: warp.block.set_registers(warp, count, more)

    def _mbarrier(self) -> Run:
        what = self.parts[1]
        at = self.address(next(text for text in self.operands if text.startswith("[")))

        def each(action: Callable[[Warp, int, int], None]) -> Run:
            """action(warp, lane, address)"""

            def run(warp: Warp, mask: Mask) -> None:
                addresses = at(warp)
                for lane in _lanes(mask):
                    action(warp, lane, int(addresses[lane]))

            return run

        if what == "init":
            count = self.read(self.operands[1], 32)
            return each(lambda warp, lane, at: warp.block.barriers.update({at: Barrier(int(count(warp)[lane]))}))
        if what == "inval":
            return each(lambda warp, lane, at: warp.block.barriers.pop(at))
        if what == "arrive":
            announced = self.read(self.operands[-1] if "expect_tx" in self.parts else "0", 32)
            return each(lambda warp, lane, at: warp.block.barriers[at].arrive(1, int(announced(warp)[lane])))
        if what != "try_wait":
            raise Fault(f"{self.opcode} is not known")
        parity = self.read(self.operands[2], 32)

        def wait(warp: Warp, mask: Mask) -> None:
            passed = (parity(warp) & 1) != warp.block.barriers[int(at(warp)[_lanes(mask)[0]])].phase
            warp.write(self.operands[0], passed, mask)
            warp.spins = not passed.all()

        return wait

    def _elect(self) -> Run:
        into = self.operands[0].rpartition("|")[2]
        return lambda warp, mask: warp.write(into, LANE == _lanes(mask)[0], mask)

    def _shfl(self) -> Run:
        into, (value, by) = self.operands[0].partition("|")[0], self.reads(self.operands[1:3], 32)
        source = {"idx": lambda b: b & 31, "bfly": lambda b: LANE ^ b, "up": lambda b: LANE - b, "down": lambda b: LANE + b}[
            self.parts[2]
        ]

        def run(warp: Warp, mask: Mask) -> None:
            lanes = source(by(warp).astype(np.int64))
            warp.write(into, value(warp)[np.where((lanes < 0) | (lanes > 31), LANE, lanes)], mask)

        return run

    def _ld(self) -> Run:
        into, kind = self.vector(self.operands[0]), self.parts[-1]
        wide = [self.kernel.register_bits(name) for name in into]
        if "param" in self.parts:
            name, whole = self.operands[1].strip("[] "), (1 << wide[0]) - 1
            return lambda warp, mask: warp.write(
                into[0], np.full(LANES, warp.block.params[name] & whole, UINT[wide[0]]), mask
            )
        bits, at, shared = int(kind[1:]), self.address(self.operands[1]), "shared" in self.opcode

        def run(warp: Warp, mask: Mask) -> None:
            addresses = _of(mask, at(warp))
            memory = warp.block.shared if shared else warp.block.memory(int(addresses[0]))
            places = memory.places(addresses, bits, len(into))
            for index, name in enumerate(into):
                found = signed(memory.views[bits][places + index], kind).astype(SINT[wide[index]]).view(UINT[wide[index]])
                if mask is not None:
                    whole = np.zeros(LANES, found.dtype)
                    whole[mask] = found
                    found = whole
                warp.write(name, found, mask)

        return run

    def _st(self) -> Run:
        bits = int(self.parts[-1][1:])
        values = self.reads(self.vector(self.operands[1]), bits)
        at, shared = self.address(self.operands[0]), "shared" in self.opcode

        def run(warp: Warp, mask: Mask) -> None:
            addresses = _of(mask, at(warp))
            memory = warp.block.shared if shared else warp.block.memory(int(addresses[0]))
            places = memory.places(addresses, bits, len(values))
            for index, value in enumerate(values):
                memory.views[bits][places + index] = _of(mask, value(warp))
            if shared:
                bytes_ = len(values) * bits // 8
                warp.block.stored(warp, (addresses - SHARED_BASE)[:, None] + np.arange(bytes_))

        return run

    def _ldmatrix(self) -> Run:
        into, at, turned = self.vector(self.operands[0]), self.address(self.operands[1]), "trans" in self.parts

        def run(warp: Warp, mask: Mask) -> None:
            rows, memory = at(warp), warp.block.shared
            for index, name in enumerate(into):
                matrix = memory.views[16][memory.places(rows[8 * index : 8 * index + 8], 16, 8)[:, None] + np.arange(8)]
                matrix = matrix.T if turned else matrix
                low, high = (matrix[LANE // 4, LANE % 4 * 2 + i].astype(np.uint32) for i in range(2))
                warp.write(name, low | high << np.uint32(16), mask)

        return run

    def _stmatrix(self) -> Run:
        values = self.reads(self.vector(self.operands[1]), 32)
        at, turned = self.address(self.operands[0]), "trans" in self.parts

        def run(warp: Warp, mask: Mask) -> None:
            rows, memory = at(warp), warp.block.shared
            for index, value in enumerate(values):
                matrix = np.zeros((8, 8), np.uint16)
                for i in range(2):
                    matrix[LANE // 4, LANE % 4 * 2 + i] = value(warp) >> np.uint32(16 * i) & np.uint32(0xFFFF)
                places = memory.places(rows[8 * index : 8 * index + 8], 16, 8)[:, None] + np.arange(8)
                memory.views[16][places] = matrix.T if turned else matrix
                warp.block.stored(warp, (2 * places[..., None] + np.arange(2)).reshape(8, 16))

        return run

    def _cp_async(self) -> Run:
        if "commit_group" in self.parts:
            return lambda warp, mask: warp.copies.append([])
        if "wait_group" in self.parts:
            left = int(self.operands[0], 0)
            return lambda warp, mask: warp.finish_copies(left)
        to, source, size = self.address(self.operands[0]), self.address(self.operands[1]), int(self.operands[2], 0)
        taken = self.read(self.operands[3] if len(self.operands) > 3 else str(size), 32)

        def run(warp: Warp, mask: Mask) -> None:
            memory = warp.block.shared
            places = memory.places(_of(mask, to(warp)), 8, size)[:, None] + np.arange(size)
            origin, sizes = _of(mask, source(warp)), _of(mask, taken(warp))
            if not set(sizes.tolist()) <= {0, size}:
                raise Fault("a copy of a part")
            values = np.zeros((len(origin), size), np.uint8)
            if (sizes > 0).any():
                inputs = warp.block.memory(int(origin[sizes > 0][0]))
                values[sizes > 0] = inputs.views[8][inputs.places(origin[sizes > 0], 8, size)[:, None] + np.arange(size)]
            warp.copies[-1].append(lambda: warp.block.put(places, values))

        return run

    def _cp_bulk(self) -> Run:
        to, barrier = self.address(self.operands[0]), self.address(self.operands[2])
        name, place = split(self.operands[1].strip("[] "))
        described, coordinates = self.read(name, 64), self.reads(self.vector(place), 32)
        offsets = self.reads(self.vector(self.operands[3]), 16) if "im2col" in self.parts else []

        def run(warp: Warp, mask: Mask) -> None:
            for lane in _lanes(mask):
                at = [int(read(warp).view(np.int32)[lane]) for read in reversed(coordinates)]
                by = [int(read(warp)[lane]) for read in reversed(offsets)]
                descriptor = warp.block.descriptors[int(described(warp)[lane])]
                warp.block.copy(descriptor, at, by, int(to(warp)[lane]), int(barrier(warp)[lane]))

        return run

    # Products

    def _commit_group(self) -> Run:
        def run(warp: Warp, mask: Mask) -> None:
            warp.groups.append(warp.open)
            warp.open = []

        return run

    def _wait_group(self) -> Run:
        left = int(self.operands[0], 0)
        return lambda warp, mask: warp.finish_products(left)

    def _wgmma(self) -> Run:
        n, k = map(int, re.search(r"m64n(\d+)k(\d+)", self.opcode).groups())
        kind = self.parts[-1]
        sums, left, right, keeps, *flags = self.operands
        sums, left = self.vector(sums), self.vector(left)
        if flags[:2] != ["1", "1"]:
            raise Fault(f"{self.opcode} with signs {flags[:2]}")
        from_registers = len(left) > 1
        turned = [flag != "0" for flag in (["0"] * 2 + flags[2:])[-2:]]  # (left, right); of what is in registers there is none
        lefts, right, keeps = self.reads(left, 32 if from_registers else 64), self.read(right, 64), self.read(keeps, 1)
        touched = frozenset(sums + left * from_registers)

        def run(warp: Warp, mask: Mask) -> None:
            if mask is not None:
                raise Fault("a product of some lanes only")
            at, kept, rows = int(right(warp)[0]), bool(keeps(warp)[0]), 16 * (warp.number % 4)
            left_at = None if from_registers else int(lefts[0](warp)[0])

            def product() -> None:
                if from_registers:
                    a = fragment([read(warp) for read in lefts], kind)
                else:
                    a = operand(warp, left_at, rows, 16, k, kind, turned[0])
                add(warp, sums, a @ operand(warp, at, 0, n, k, kind, turned[1]).T, kept)

            warp.multiply(Product(product, touched))

        return run

    def _mma(self) -> Run:
        kind = self.parts[-2]
        into, left, right, sums = map(self.vector, self.operands)
        left, right, sums = self.reads(left, 32), self.reads(right, 32), self.reads(sums, 32)

        def run(warp: Warp, mask: Mask) -> None:
            product = fragment([read(warp) for read in left], kind) @ right_fragment([read(warp) for read in right], kind).T
            for name, value in zip(into, [read(warp) for read in sums], strict=True):
                warp.write(name, value, mask)
            add(warp, into, product, True)

        return run

    # Values

    def _mov(self) -> Run:
        into, value = self.operands
        bits = 1 if self.parts[-1] == "pred" else int(self.parts[-1][1:])
        if value.startswith("{"):
            parts = self.vector(value)
            part, values = bits // len(parts), self.reads(parts, bits // len(parts))

            def pack(warp: Warp, mask: Mask) -> None:
                whole = sum(read(warp).astype(np.uint64) << np.uint64(part * i) for i, read in enumerate(values))
                warp.write(into, whole.astype(UINT[bits]), mask)

            return pack
        read = self.read(value, bits)
        if into.startswith("{"):
            names = self.vector(into)
            part = bits // len(names)

            def unpack(warp: Warp, mask: Mask) -> None:
                for i, name in enumerate(names):
                    warp.write(name, (read(warp) >> UINT[bits](part * i)).astype(UINT[part]), mask)

            return unpack
        return lambda warp, mask: warp.write(into, read(warp), mask)

    def _cvta(self) -> Run:
        read = self.read(self.operands[1], 64)
        return lambda warp, mask: warp.write(self.operands[0], read(warp), mask)

    def _setp(self) -> Run:
        into, first, second, *other = self.operands
        how, kind = self.parts[1], self.parts[-1]
        compare = {"eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater,
                   "ge": np.greater_equal, "neu": np.not_equal, "nan": lambda a, b: np.isnan(a) | np.isnan(b),
                   "num": lambda a, b: ~(np.isnan(a) | np.isnan(b))}.get(how)  # fmt: skip
        if compare is None:
            raise Fault(f"{self.opcode} is not known")
        a, b = self.reads([first, second], int(kind[1:]))
        join = {"and": np.logical_and, "or": np.logical_or}[self.parts[2]] if other else lambda a, b: a
        other = self.read(other[0] if other else "0", 1)
        return lambda warp, mask: warp.write(
            into, join(compare(signed(a(warp), kind), signed(b(warp), kind)), other(warp)), mask
        )

    def _selp(self) -> Run:
        into, *values, which = self.operands
        a, b = self.reads(values, int(self.parts[-1][1:]))
        which = self.read(which, 1)
        return lambda warp, mask: warp.write(into, np.where(which(warp), a(warp), b(warp)), mask)

    def _cvt(self) -> Run:
        into, *values = self.operands
        to, source = self.parts[-2:]
        reads = self.reads(values, 16 if source == "bf16" else int(source[1:]))
        bits = self.kernel.register_bits(into)
        return lambda warp, mask: warp.write(into, converted(to, source, bits, *[read(warp) for read in reads]), mask)

    def _value(self) -> Run:
        """Arithmetic with one result."""
        base, kind = self.parts[0], self.parts[-1]
        if base not in FUNCTIONS:
            raise Fault(f"{self.opcode} is not known")
        function, (into, *values) = FUNCTIONS[base], self.operands
        bits = 1 if kind == "pred" else 32 if kind.endswith("x2") else int(kind[1:])
        reads = self.reads(values, bits)
        for index in {"shl": [1], "shr": [1], "bfe": [1, 2], "bfi": [2, 3]}.get(base, []):
            reads[index] = self.read(values[index], 32)
        if self.parts[:2] == ["mad", "wide"]:
            reads[2] = self.read(values[2], 2 * bits)
        how = self.parts[1]

        def run(warp: Warp, mask: Mask) -> None:
            with np.errstate(all="ignore"):
                warp.write(into, function(kind, how, *[read(warp) for read in reads]), mask)

        return run


def parsed(ptx: str) -> Kernel:
    """A kernel with its instructions. Raises :class:`Fault` for one that is not known."""
    kernel = Kernel(ptx)
    kernel.instructions = [Instruction(kernel, number) for number in range(len(kernel.code))]
    return kernel
