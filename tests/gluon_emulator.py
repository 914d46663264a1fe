"""The kernels of engine hopper in plain Python and NumPy: Gluon has no interpreter, so this runs their very source.

Producer, consumers and the copy engine take turns at random, as a seed has it, at everything that synchronises. Copies
arrive late and in any order, products read their operands as late as they may, and shared memory is NaN until a copy has
arrived: what a stage is overwritten or read too early for shows in the result or raises. If nobody can go on, it raises.
Layouts, registers and the limits of the hardware are not modelled; test_hopper_code.py looks at those.
"""

from __future__ import annotations

import builtins
import copy
import functools
import random
import threading
from collections.abc import Callable
from types import FunctionType, SimpleNamespace

import numpy as np
import torch
import triton.language as tl
from copy_engine import Descriptor, Im2colDescriptor
from triton.runtime.jit import ConstexprFunction

from triton_conv3d.engines import launching

_ABORTED = object()


class Value(np.ndarray):
    """A tensor or scalar of a kernel. Integers divide as in C."""

    def __array_wrap__(self, array, context=None, return_scalar=False):
        return np.asarray(array).view(Value)

    def to(self, dtype) -> Value:
        return self.astype(np.float32 if dtype in (tl.float32, tl.float16, tl.bfloat16) else np.int64)

    def __floordiv__(self, other):
        a, b = np.asarray(self), np.asarray(other)
        return value(np.abs(a) // np.abs(b) * np.sign(a) * np.sign(b))

    def __rfloordiv__(self, other):
        return value(other) // self

    def __mod__(self, other):
        return self - (self // other) * other

    def __rmod__(self, other):
        return value(other) % self


def value(x) -> Value:
    return np.asarray(x).view(Value)


def _wrapped(argument):
    """A kernel's argument as its source expects it; constants stay as they are."""
    if isinstance(argument, tuple):
        return tuple(map(_wrapped, argument))
    if isinstance(argument, bool) or argument is None:
        return argument
    if isinstance(argument, (int, float)):
        return value(argument)
    if isinstance(argument, torch.Tensor):
        return Pointer(argument)
    return (Im2colDescriptor if hasattr(argument, "pixel_box_lower_corner") else Descriptor)(argument)


class Pointer:
    def __init__(self, tensor: torch.Tensor):
        # From the tensor's first element to the end of its own elements, as the kernel addresses it.
        extent = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        self.memory = tensor.as_strided((extent,), (1,))
        self.written = torch.zeros(extent, dtype=torch.bool)
        self.dtype = SimpleNamespace(element_ty=getattr(tl, str(tensor.dtype).removeprefix("torch.")))

    def __add__(self, offsets) -> Address:
        return Address(self, value(offsets))


class Address:
    def __init__(self, pointer: Pointer, offsets: Value):
        self.pointer, self.offsets, self.dtype = pointer, offsets, pointer.dtype

    def __add__(self, offsets) -> Address:
        return Address(self.pointer, self.offsets + offsets)

    def chosen(self, mask) -> tuple[torch.Tensor, np.ndarray]:
        """(the addresses under the mask, the mask in full)."""
        offsets, mask = np.broadcast_arrays(self.offsets, mask)
        found = torch.from_numpy(np.ascontiguousarray(offsets[mask]).astype(np.int64))
        extent = self.pointer.memory.numel()
        assert not found.numel() or (0 <= found.min() and found.max() < extent), "an address outside of the tensor"
        return found, mask


def _load(address: Address, mask, other: float) -> Value:
    found, mask = address.chosen(mask)
    result = np.full(mask.shape, other, np.float32)
    result[mask] = address.pointer.memory[found].float().numpy()
    address.pointer.written[found] = False  # who knows what is there may write it anew
    return value(result)


def _store(address: Address, values: Value, mask) -> None:
    found, mask = address.chosen(mask)
    pointer = address.pointer
    assert not pointer.written[found].any() and found.unique().numel() == found.numel(), "an element written twice"
    pointer.written[found] = True
    pointer.memory[found] = torch.from_numpy(np.broadcast_to(values, mask.shape)[mask].astype(np.float32)).to(
        pointer.memory
    )


class Barrier:
    def init(self, count: int) -> None:
        self.count = self.pending = count
        self.bytes, self.phase = 0, 0

    def change(self, arrivals: int, bytes_: int) -> None:
        self.pending -= arrivals
        self.bytes += bytes_
        assert self.pending >= 0, "more arrivals than the barrier counts"
        if self.pending == 0 and self.bytes == 0:
            self.pending, self.phase = self.count, self.phase ^ 1


class Registers(SimpleNamespace):
    """What was read from a stage, for products to read: ``data``."""


class Buffer:
    """A stage of a ring, or a turned view of it."""

    def __init__(self, program: Program, data: np.ndarray, state: SimpleNamespace | None = None):
        self.program, self.data, self.state = program, data, state or SimpleNamespace(arriving=0, read=0, copies=0)

    def permute(self, order) -> Buffer:
        return Buffer(self.program, self.data.transpose(order), self.state)

    def load(self, layout) -> Registers:
        return self.program.read(self)


class Beside:
    """Buffers side by side, to be read, or turned."""

    def __init__(self, buffers: list[Buffer], turned: bool = False):
        self.buffers, self.turned = buffers, turned

    def permute(self, order) -> Beside:
        return Beside(self.buffers, self.turned != (order == (1, 0)))

    def load(self, layout) -> Registers:
        found = np.concatenate([buffer.load(layout).data for buffer in self.buffers], axis=1)
        return Registers(data=found.T if self.turned else found)


class Memory:
    def __init__(self, program: Program, dtype, shape, layout):
        barriers = dtype is tl.int64
        self.parts = [
            Barrier() if barriers else Buffer(program, np.full(shape[1:], np.nan, np.float32)) for _ in range(shape[0])
        ]

    def index(self, i):
        assert 0 <= int(i) < len(self.parts)
        return self.parts[int(i)]


def _beside(memory: Memory, number: int, rows: int, columns: int, layout) -> Memory:
    found, each = copy.copy(memory), len(memory.parts) // number
    found.parts = [Beside(memory.parts[i : i + each]) for i in builtins.range(0, len(memory.parts), each)]
    assert len(found.parts) == number and memory.parts[0].data.shape == (rows, columns // each)
    return found


class Product:
    """One that is not done until somebody waits for it."""

    def __init__(self, a: Buffer | Registers, b: Buffer):
        self.a, self.b, self.result = a, b, None
        self.buffers = [operand for operand in (a, b) if isinstance(operand, Buffer)]
        for buffer in self.buffers:
            buffer.state.read += 1

    def finish(self) -> None:
        self.result = self.a.data.astype(np.float64) @ self.b.data
        for buffer in self.buffers:
            buffer.state.read -= 1


class Products:
    """Sums with products that may not be done yet."""

    def __init__(self, sums: Value, left: list[Product]):
        self.sums, self.left = sums, left

    def added(self) -> Products | Value:
        """The sums with those that are done."""
        while self.left and self.left[0].result is not None:
            self.sums = value(self.sums + self.left.pop(0).result)
        return self if self.left else self.sums


class Program:
    """One program of a grid: its warps, its copies, and whose turn it is."""

    def __init__(self, number: int, programs: int, seed: object):
        self.number, self.programs, self.random = number, programs, random.Random(f"{seed} {number}")
        self.copies: list[Callable[[], None]] = []
        self.turn = threading.local()
        self.traces: list[list[tuple]] = []  # what each side did: its name, barrier or buffers, and numbers

    def specialise(self, sides, warps, registers) -> None:
        """Run all sides to their end."""
        assert len(sides) == 1 + len(warps) == 1 + len(registers)
        self.traces += [[] for _ in sides]
        self.products: list[list[Product]] = [[] for _ in sides]  # that are not done, in their order
        self.weights = [self.random.choice((1, 1, 10)) for _ in (*sides, "any copy")]
        self.ready: list[Callable[[], bool] | None] = [lambda: True] * len(sides)
        self.mine = [threading.Semaphore(0) for _ in sides]
        self.back, self.failed = threading.Semaphore(0), None
        threads = [threading.Thread(target=self._side, args=(i, *side)) for i, side in enumerate(sides)]
        for thread in threads:
            thread.start()
        try:
            self._take_turns()
        finally:
            self.failed = self.failed or _ABORTED
            for semaphore in self.mine:
                semaphore.release()
            for thread in threads:
                thread.join()
        assert not self.copies, "a copy that nobody waited for"

    def _take_turns(self) -> None:
        while any(self.ready):
            able = [i for i, ready in enumerate(self.ready) if ready and ready()] + [len(self.mine)] * bool(self.copies)
            assert able, "deadlock"
            chosen = self.random.choices(able, [self.weights[i] for i in able])[0]
            if chosen == len(self.mine):
                self.copies.pop(self.random.randrange(len(self.copies)))()
                continue
            self.mine[chosen].release()
            self.back.acquire()
            if self.failed:
                raise self.failed

    def _side(self, number: int, function: Callable, arguments: tuple) -> None:
        self.turn.number = number
        self.mine[number].acquire()
        try:
            if self.failed is None:
                function(*arguments)
        except BaseException as error:  # handed to the thread that takes turns
            self.failed = self.failed or error
        self.ready[number] = None
        self.back.release()

    def others(self, until: Callable[[], bool] = lambda: True) -> None:
        """Let others take their turns, at least until this holds."""
        number = self.turn.number
        self.ready[number] = until
        self.back.release()
        self.mine[number].acquire()
        if self.failed:
            raise SystemExit

    def _note(self, *what) -> None:
        self.traces[self.turn.number].append(what)

    # What kernels call.

    def wait(self, barrier: Barrier, parity) -> None:
        parity = int(parity)
        self._note("wait", barrier, parity)
        self.others(lambda: barrier.phase != parity)

    def expect(self, barrier: Barrier, count: int) -> None:
        self._note("expect", barrier, count)
        self.others()
        barrier.change(1, count)

    def arrive(self, barrier: Barrier, pred=True) -> None:
        self.others()
        if pred:
            self._note("arrive", barrier)
            barrier.change(1, 0)

    def load(self, descriptor: Descriptor, at, barrier: Barrier, buffer: Buffer, *offsets: tuple[int, ...]) -> None:
        self.others()
        where = tuple(map(int, at))
        self._note("load", buffer.state, barrier, descriptor.block_type.nbytes)
        assert not buffer.state.read, "a copy into what is being multiplied"
        assert not buffer.state.arriving, "a copy into what is being copied"
        buffer.state.arriving = 1
        buffer.state.copies += 1
        buffer.data[:] = np.nan

        def arrived() -> None:
            buffer.data[:] = descriptor.read(where, *offsets)
            buffer.state.arriving = 0
            barrier.change(0, -descriptor.block_type.nbytes)

        self.copies.append(arrived)

    def read(self, buffer: Buffer) -> Registers:
        """By threads, at once."""
        self.others()
        self._note("read", buffer.state, buffer.state.copies)
        return Registers(data=buffer.data.copy())

    def load_im2col(self, descriptor: Im2colDescriptor, at, h, w, barrier: Barrier, buffer: Buffer) -> None:
        self.load(descriptor, at, barrier, buffer, (0, int(h), int(w)))

    def multiply(self, a: Buffer | Registers, b: Buffer, acc, is_async: bool) -> Products:
        self.others()
        assert is_async and a.data.shape[1] == b.data.shape[0]
        before = acc if isinstance(acc, Products) else Products(acc, [])
        product = Product(a, b)
        self._note("multiply", *(what for buffer in product.buffers for what in (buffer.state, buffer.state.copies)))
        self.products[self.turn.number].append(product)
        return Products(before.sums, [*before.left, product])

    def waited(self, outstanding: int, deps) -> Products | Value | tuple:
        self.others()
        self._note("waited", outstanding)
        mine = self.products[self.turn.number]
        kept = {id(dep) for dep in deps}
        while len(mine) > outstanding:
            product = mine.pop(0)
            assert isinstance(product.a, Buffer) or id(product.a) in kept, "registers that nothing keeps for a product"
            product.finish()
        found = tuple(acc.added() if isinstance(acc, Products) else acc for acc in deps)
        return found if len(found) > 1 else found[0]


def _static_assert(condition: bool, message: str) -> None:
    assert condition, message


def _namespace(program: Program) -> dict:
    """Names that kernels use, their own functions left out."""
    language = SimpleNamespace(
        where=lambda c, a, b: value(np.where(c, a, b)), minimum=lambda a, b: value(np.minimum(a, b)),
        maximum=lambda a, b: value(np.maximum(a, b)), cdiv=lambda a, b: (value(a) + b - 1) // b,
        exp=lambda x: value(np.exp(x)), abs=lambda x: value(np.abs(x)), static_range=builtins.range,
        program_id=lambda axis: value(program.number), num_programs=lambda axis: value(program.programs),
        zeros=lambda shape, dtype, layout: value(np.zeros(shape)), load=_load, store=_store,
        arange=lambda begin, end, layout: value(np.arange(begin, end)), SliceLayout=lambda *_: None,
        reshape=lambda x, shape: x.reshape(shape), permute=lambda x, order: x.transpose(order),
        split=lambda x: (x[..., 0], x[..., 1]), static_assert=_static_assert,
        expand_dims=lambda x, axis: value(np.expand_dims(x, axis)), convert_layout=lambda x, layout: x,
        allocate_shared_memory=functools.partial(Memory, program), warp_specialize=program.specialise,
        **{name: getattr(tl, name) for name in ("int32", "int64", "float32", "float16", "bfloat16", "constexpr")},
    )  # fmt: skip
    barrier = SimpleNamespace(
        init=lambda barrier, count: barrier.init(count), wait=program.wait, expect=program.expect, arrive=program.arrive,
        MBarrierLayout=lambda: None,
    )  # fmt: skip
    return {
        "tl": language, "gl": language, "mbarrier": barrier, "load": program.load, "load_im2col": program.load_im2col,
        "beside": _beside, "warpgroup_mma": program.multiply,
        "warpgroup_mma_wait": program.waited, "range": lambda *limits: map(value, builtins.range(*map(int, limits))),
        "__builtins__": builtins,
    }  # fmt: skip


def _bound(function, known: dict, functions: dict) -> FunctionType:
    """A kernel's function over these names, and with it all jitted functions that it calls."""
    plain = function.fn
    if plain not in functions:
        names = dict(known)
        functions[plain] = FunctionType(plain.__code__, names, plain.__name__, plain.__defaults__)
        for name in plain.__code__.co_names:
            if name in plain.__globals__ and name not in known:
                other = plain.__globals__[name]
                if hasattr(other, "fn") and not isinstance(other, ConstexprFunction):
                    other = _bound(other, known, functions)
                names[name] = getattr(other, "value", other)
    return functions[plain]


def launched(kernel, grid: tuple[int, int], args: tuple, options: dict, seed: object = 0) -> list[Program]:
    """Run a kernel of engine hopper over its grid, in place of :func:`launching._run`."""
    programs = []
    arguments = tuple(map(_wrapped, args))
    constants = {name: x for name, x in options.items() if name not in ("num_warps", "enable_fp_fusion")}
    for number in range(grid[0]):
        program = Program(number, grid[0], seed)
        _bound(kernel, _namespace(program), {})(*arguments, **constants)
        programs.append(program)
    return programs


def emulating(seed: object = 0, programs: list[Program] | None = None):
    """Within the block, kernels in Gluon are emulated, each program joining the list, and all others launched as ever."""
    usual = launching._runner

    def run(kernel, grid, args, options) -> None:
        if getattr(kernel, "is_gluon", lambda: False)():
            found = launched(kernel, grid, args, options, seed)
            if programs is not None:
                programs.extend(found)
        else:
            usual(kernel, grid, args, options)

    return launching.replaced(run)
