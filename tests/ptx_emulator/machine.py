"""What a kernel runs on: memory, descriptors of tensors, barriers, warps and the thread block that lets them take turns."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np

LANES = 32
LANE = np.arange(LANES)
SHARED_BASE = 1024  # where dynamic shared memory begins: behind what sm_90 reserves, and aligned as swizzling needs it
DESCRIPTORS = 0xD0000000  # where parameters that are descriptors seem to be; their addresses may be numbers of 32 bits
UINT = {1: np.bool_, 8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
SINT = {8: np.int8, 16: np.int16, 32: np.int32, 64: np.int64}
FLOAT = {16: np.float16, 32: np.float32, 64: np.float64}

_TURNS = (1, 7, 60, 400)  # instructions of a warp at a time
_EARLY = 0.2  # how likely at each turn something asynchronous happens before it is waited for
_TRIES = 3  # turns of every warp without any progress, after which there is none to come


class Fault(Exception):
    """What a GPU would not forgive, or what this emulator does not know."""


class Memory:
    """Bytes from the address ``start`` on, as unsigned numbers of 8, 16, 32 and 64 bits in ``views``."""

    def __init__(self, start: int, data: np.ndarray, name: str):
        self.start, self.size, self.name = start, data.nbytes, name
        self.views = {bits: data[: self.size // (bits // 8) * (bits // 8)].view(UINT[bits]) for bits in (8, 16, 32, 64)}

    def places(self, addresses: np.ndarray, bits: int, count: int = 1) -> np.ndarray:
        """Indices into a view. Raises :class:`Fault` unless all is inside, and aligned to the whole of an access."""
        offset = addresses.astype(np.int64) - self.start
        width = bits // 8 * count
        if (offset < 0).any() or (offset + width > self.size).any():
            raise Fault(f"access outside of {self.name}: {offset.min()} to {offset.max() + width} of {self.size} bytes")
        if (addresses % addresses.dtype.type(width)).any():
            raise Fault(f"misaligned access of {width} bytes to {self.name}")
        return offset // (bits // 8)


class Descriptor:
    """A tensor as the copy engine sees it.

    Attributes:
        first: index of its first element in memory. sizes, strides (in elements), box: the innermost dimension last.
        element: bytes. swizzle: bytes of a row whose 16-byte units are exchanged, 0 for none.
        im2col: (lower corner, upper corner, steps, pixels) in place of the box's outer dimensions, or None.
    """

    def __init__(self, memory: Memory, first: int, sizes, strides, box, element: int, swizzle: int, im2col=None):
        self.memory, self.first, self.sizes, self.strides = memory, first, list(sizes), list(strides)
        self.box, self.element, self.swizzle, self.im2col = list(box), element, swizzle, im2col

    def block(self, at: list[int], offsets: list[int]) -> np.ndarray:
        """(pixels, channels) of a box from these coordinates on, zeros outside, in the order in which they are written."""
        pixels = self._walk(at[:-1], offsets) if self.im2col else self._brick(at[:-1])
        sizes, strides = np.array(self.sizes[:-1]), np.array(self.strides[:-1])
        inner = at[-1] + np.arange(self.box[-1])
        inside = ((pixels >= 0) & (pixels < sizes)).all(1)[:, None] & ((inner >= 0) & (inner < self.sizes[-1]))
        index = self.first + (pixels * strides).sum(1)[:, None] + inner
        view = self.memory.views[8 * self.element]
        values = np.zeros(index.shape, view.dtype)
        if inside.any() and not 0 <= index[inside].min() <= index[inside].max() < view.size:
            raise Fault(f"a descriptor of {self.memory.name} reaches outside of it")
        values[inside] = view[index[inside]]
        return values

    def _brick(self, at: list[int]) -> np.ndarray:
        axes = [c + np.arange(n) for c, n in zip(at, self.box[:-1], strict=True)]
        return np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, len(at))

    def _walk(self, at: list[int], offsets: list[int]) -> np.ndarray:
        """Pixels one after the other within the corners, sample after sample ("im2col mode")."""
        lower, upper, steps, count = self.im2col
        position, pixels = list(at), []
        for _ in range(count):
            pixels.append([p + o for p, o in zip(position, [0, *offsets], strict=True)])
            for axis in range(len(position) - 1, 0, -1):
                position[axis] += steps[axis]
                if position[axis] < self.sizes[axis] + upper[axis - 1]:
                    break
                position[axis] = lower[axis - 1]
            else:
                position[0] += 1
        return np.array(pixels)


def swizzled(addresses: np.ndarray, mode: int) -> np.ndarray:
    """Addresses in shared memory, the 16-byte units of rows of so many bytes exchanged ("Swizzling modes")."""
    return addresses ^ (((addresses >> 7) & {0: 0, 32: 1, 64: 3, 128: 7}[mode]) << 4)


class Barrier:
    """An mbarrier: the phase completes when all have arrived and all bytes that were announced."""

    def __init__(self, count: int):
        self.count = self.pending = count
        self.phase = self.bytes = 0

    def arrive(self, arrivals: int, announced: int) -> None:
        self.pending -= arrivals
        self.bytes += announced
        if self.pending < 0:
            raise Fault("more arrivals at a barrier than it counts")
        if not self.pending and not self.bytes:
            self.phase, self.pending = self.phase ^ 1, self.count


class Product:
    """A wgmma under way, of one warp's 16 rows. touched: registers that it writes, and those that it reads."""

    def __init__(self, run: Callable[[], None], touched: frozenset[str]):
        self.run, self.touched = run, touched


class Registers(dict):
    """Numbers of all lanes by register. One that was never written, as a compiler may leave what nobody needs, has all bits
    set: NaN, and addresses of nothing."""

    def __init__(self, kernel):
        self.kernel = kernel

    def __missing__(self, name: str) -> np.ndarray:
        bits = self.kernel.register_bits(name)
        return ~np.zeros(LANES, UINT[bits])


class Warp:
    """``pc``: the next instruction of all lanes; None where they differ, and then ``pcs``. ``waits``: at a barrier."""

    def __init__(self, block: Block, number: int):
        self.block, self.number, self.registers = block, number, block.kernel.registers
        self.regs = Registers(block.kernel)
        self.pc: int | None = 0
        self.pcs, self.live = np.zeros(LANES, np.int64), np.ones(LANES, bool)
        self.waits = self.spins = False
        self.open: list[Product] = []
        self.groups: list[list[Product]] = []  # of products, the oldest first
        self.touched: frozenset[str] = frozenset()
        self.copies: list[list[Callable]] = [[]]  # groups of cp.async, the last of which is open
        self.stored: list[tuple[int, np.ndarray]] = []  # (when, bytes of shared memory), since its last fence
        self.fenced = 0  # when that was

    @property
    def done(self) -> bool:
        return not self.live.any()

    def active(self) -> tuple[int, np.ndarray | None]:
        """The next instruction, and the lanes that run it (None: all); of lanes that differ, those that are behind."""
        if self.pc is None:
            pc = int(self.pcs[self.live].min())
            mask = (self.pcs == pc) & self.live
            if not mask.all():
                return pc, mask
            self.pc = pc
        return self.pc, None

    def go(self, mask: np.ndarray | None, target: int) -> None:
        if mask is None:
            self.pc = target
        else:
            if self.pc is not None:
                self.pcs[:], self.pc = self.pc, None
            self.pcs[mask] = target

    def leave(self, mask: np.ndarray | None) -> None:
        self.live &= False if mask is None else ~mask
        self.pcs[:], self.pc = self.pcs if self.pc is None else self.pc, None

    def write(self, name: str, value: np.ndarray, mask: np.ndarray | None) -> None:
        if mask is not None:
            value = np.where(mask, value, self.regs[name])
        self.regs[name] = value

    def multiply(self, product: Product) -> None:
        self.open.append(product)
        self.touched |= product.touched

    def finish_products(self, left: int) -> None:
        """All but so many of the newest groups."""
        while len(self.groups) > left:
            for product in self.groups.pop(0):
                product.run()
        going = [product.touched for group in (*self.groups, self.open) for product in group]
        self.touched = frozenset().union(*going)

    def finish_copies(self, left: int) -> None:
        while len(self.copies) - 1 > left:
            for copy in self.copies.pop(0):
                copy()


class Block:
    """One thread block.

    Args:
        params: of the kernel in their order: bits, or a :class:`Descriptor`.
        memories: what may be read and written. shared: bytes of dynamic shared memory.
        seed: of the order in which things happen.
    """

    def __init__(self, kernel, grid: tuple, number: tuple, params: list, memories: list[Memory], shared: int, seed: int):
        self.kernel, self.grid, self.number, self.memories = kernel, grid, number, memories
        self.params = {name: value for (name, _), value in zip(kernel.params, params, strict=True)}
        described = ((i, value) for i, value in enumerate(params) if isinstance(value, Descriptor))
        self.descriptors = {DESCRIPTORS + 128 * i: value for i, value in described}
        self.shared = Memory(SHARED_BASE, np.full(-(-shared // 16) * 16 + 16, 0xFF, np.uint8), "shared memory")
        self.stores, self.stored_at = 0, np.zeros(self.shared.size, np.int64)  # until a fence of whoever stored them
        self.barriers: dict[int, Barrier] = {}
        self.waiting: dict[int, list[Warp]] = {}  # at bar.sync
        self.copies: list[Callable] = []  # of the copy engine, under way
        self.spare, self.asked = 0, []  # registers that no warp holds; warps that want more, and how many they want then
        self.warps = [Warp(self, i) for i in range(kernel.threads // LANES)]
        self.random = random.Random(seed)

    def run(self) -> None:
        tries: dict[int, int] = {}
        while not all(warp.done for warp in self.warps):
            ready = [warp for warp in self.warps if not warp.done and not warp.waits]
            if self.copies and (not ready or self.random.random() < _EARLY):
                self.copies.pop(self.random.randrange(len(self.copies)))()
                tries.clear()
                continue
            stuck = all(tries.get(warp.number, 0) >= _TRIES for warp in ready)
            if stuck and not self.copies:
                places = ", ".join(f"warp {w.number} at {self.kernel.code[w.active()[0]]}" for w in self.warps if not w.done)
                raise Fault(f"nothing goes on: {places}")
            warp = self.random.choice(ready)
            if self._turn(warp, self.random.choice(_TURNS)):
                tries.clear()
            else:
                tries[warp.number] = tries.get(warp.number, 0) + 1
        if self.copies or any(warp.groups or warp.open for warp in self.warps):
            raise Fault("the block ends while copies or products are under way")

    def _turn(self, warp: Warp, most: int) -> bool:
        """Up to so many instructions of a warp, or until it waits. Whether anything went on."""
        if warp.groups and self.random.random() < _EARLY:
            warp.finish_products(len(warp.groups) - 1)
        if len(warp.copies) > 1 and self.random.random() < _EARLY:
            warp.finish_copies(len(warp.copies) - 2)
        progress = False
        for _ in range(most):
            if warp.done or warp.waits:
                return True
            pc, active = warp.active()
            instruction = self.kernel.instructions[pc]
            try:
                if warp.touched and not instruction.of_products and instruction.names & warp.touched:
                    raise Fault("registers of a product under way")
                instruction.step(warp, pc, active)
            except (Fault, KeyError) as fault:
                raise Fault(f"warp {warp.number} at {self.kernel.code[pc]}: {fault!r}") from fault
            if warp.spins and instruction.loops_back:
                return progress
            progress = progress or not warp.spins
        return progress

    def memory(self, address: int) -> Memory:
        for memory in self.memories:
            if memory.start <= address < memory.start + memory.size:
                return memory
        raise Fault(f"address {address:#x} is of no tensor")

    def wait(self, warp: Warp, barrier: int, threads: int) -> None:
        together = self.waiting.setdefault(barrier, [])
        together.append(warp)
        warp.waits = True
        if len(together) * LANES >= threads:
            if len(together) * LANES > threads:
                raise Fault(f"{len(together)} warps at barrier {barrier} of {threads} threads")
            for other in self.waiting.pop(barrier):
                other.waits = False

    def set_registers(self, warp: Warp, count: int, more: bool) -> None:
        """Of each thread of a warp; for more it waits until others hold so many less ("setmaxnreg")."""
        if (count < warp.registers) if more else (count > warp.registers):
            raise Fault(f"from {warp.registers} registers to {count}")
        self.asked.insert(0, (warp, count))
        warp.waits = True
        for other, wanted in list(self.asked):  # what is given back before what is asked for
            if wanted - other.registers <= self.spare:
                self.spare -= wanted - other.registers
                other.registers, other.waits = wanted, False
                self.asked.remove((other, wanted))

    def stored(self, warp: Warp, places: np.ndarray) -> None:
        """Bytes of shared memory that a product may read only behind a fence, of the warp that stored them or of its own
        ("Async proxy")."""
        self.stores += 1
        self.stored_at[places] = self.stores
        warp.stored.append((self.stores, places))

    def put(self, places: np.ndarray, values: np.ndarray) -> None:
        """Bytes of shared memory by a copy. Those of ``cp.async`` would need a fence as well, which Triton 3.6 leaves out."""
        self.shared.views[8][places] = values
        self.stored_at[places] = 0

    def fence(self, warp: Warp) -> None:
        for when, places in warp.stored:
            self.stored_at[places[self.stored_at[places] == when]] = 0
        warp.stored.clear()
        warp.fenced = self.stores

    def copy(self, descriptor: Descriptor, at: list[int], offsets: list[int], target: int, barrier: int) -> None:
        """By the copy engine: a box to shared memory, which completes its bytes at the barrier."""
        if target % 128:
            raise Fault(f"a bulk copy to {target}, no multiple of 128")
        units = descriptor.block(at, offsets).reshape(-1).view(np.uint8).reshape(-1, 16)

        def land() -> None:
            to = swizzled(target + 16 * np.arange(len(units)), descriptor.swizzle)
            self.put(self.shared.places(to, 8, 16)[:, None] + np.arange(16), units)
            self.barriers[barrier].arrive(0, -units.size)

        self.copies.append(land)
