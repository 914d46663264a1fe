"""Memory that cannot be overrun: tensors between pages that fault on every access, and huge tensors that cost nothing.

The interpreter reads and writes real addresses, so an access outside kills the process. These tests therefore run in
a process of their own: ``python tests/guarded.py MODE`` (see ``main``), which prints each case before it runs it.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import mmap
import os
import subprocess
import sys
from collections.abc import Callable, Iterator

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_PROT_NONE, _NORESERVE = 0, 0x4000
_READ_WRITE = mmap.PROT_READ | mmap.PROT_WRITE
_ALIGNMENT = 16  # of a guarded tensor's base: what kernels may take for granted


def _map(size: int, protection: int, flags: int = 0) -> int:
    """Address of a fresh anonymous mapping of the host; it stays for the life of the process."""
    import pytest
    import torch

    if torch.cuda.is_available():
        pytest.skip("no GPU reads these pages")
    address = _libc.mmap(None, size, protection, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | flags, -1, 0)
    if address in (None, ctypes.c_void_p(-1).value):
        raise OSError(ctypes.get_errno(), f"mmap of {size} bytes failed")
    return address


def _tensor(address: int, elements: int, dtype):
    import torch

    memory = (ctypes.c_char * (elements * dtype.itemsize)).from_address(address)
    return torch.frombuffer(memory, dtype=dtype, count=elements)


def guarded(elements: int, dtype, at_end: bool):
    """A flat tensor between two pages that fault, NaN throughout, at the start or the end of what lies between.

    At the end it stands at the last aligned address that leaves room for it; up to 15 bytes of NaN may follow.
    """
    page, size = mmap.PAGESIZE, max(1, elements) * dtype.itemsize
    room = -(-size // page) * page
    address = _map(room + 2 * page, _PROT_NONE) + page
    if _libc.mprotect(address, room, _READ_WRITE):
        raise OSError(ctypes.get_errno(), "mprotect failed")
    slack = _tensor(address, room // dtype.itemsize, dtype)
    slack.fill_(math.nan if dtype.is_floating_point else 0)
    offset = (room - size) // _ALIGNMENT * _ALIGNMENT if at_end else 0
    return _tensor(address + offset, max(1, elements), dtype)[:elements]


def reserved(elements: int, dtype):
    """A flat tensor of any size, zero, that takes memory only where it is touched."""
    return _tensor(_map(elements * dtype.itemsize, _READ_WRITE, _NORESERVE), elements, dtype)


@contextlib.contextmanager
def guards(at_end: bool) -> Iterator[Callable]:
    """Operands of :mod:`cases` between guards; yields what does it to results and workspaces (``run(fresh=)``)."""
    import cases

    def fresh(tensor):
        last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        memory = guarded(last + 1 if tensor.numel() else 0, tensor.dtype, at_end)
        return memory.as_strided(tensor.shape, tensor.stride())

    def buffer(elements: int, dtype, offset: int = 0):
        memory = guarded(elements + offset, dtype, at_end)
        return memory[offset:]

    before, cases._buffer = cases._buffer, buffer
    try:
        yield fresh
    finally:
        cases._buffer = before


@contextlib.contextmanager
def overflow_checked() -> Iterator[None]:
    """The interpreter raises where 32-bit integers overflow, instead of wrapping."""
    from triton.runtime import interpreter

    builder = interpreter.interpreter_builder
    before, builder.options = builder.options, interpreter.InterpreterOptions(debug=True, sanitize_overflow=True)
    try:
        yield
    finally:
        builder.options = before


def small_cases() -> list:
    """Ragged in every direction, so that every mask is needed; but for the last one, read natively, without a copy."""
    from cases import Case

    geometries = (
        dict(),
        dict(in_channels=1, out_channels=1, input_size=(1, 1, 1), kernel_size=(1, 1, 1)),
        dict(batch=2, in_channels=7, out_channels=19, input_size=(2, 5, 3), padding=(1, 1, 2, 0, 0, 1)),
        dict(in_channels=6, out_channels=10, groups=2, stride=(2, 1, 2), padding=(1, 1, 0, 0, 1, 0), dtype="float16"),
        dict(in_channels=17, out_channels=8, kernel_size=(2, 1, 2), dilation=(2, 1, 3), input_size=(4, 3, 5)),
        dict(in_channels=16, out_channels=16, kernel_size=(1, 2, 2), input_size=(2, 3, 3), dtype="float16"),
        dict(in_channels=3, out_channels=5, stride=(3, 2, 1), kernel_size=(2, 1, 2), input_size=(5, 4, 3)),
        dict(in_channels=9, out_channels=3, layouts=("cropped", "cropped"), kernel_size=(2, 2, 1)),
        dict(in_channels=9, out_channels=3, layouts=("unaligned", "channel_slice"), channels_last=False, bias=True),
        dict(batch=2, in_channels=7, out_channels=5, input_size=(3, 5, 3), layouts=("contiguous", "contiguous")),
    )
    return [
        Case(pass_, seed=i, **{**geometry, "bias": geometry.get("bias", False) and pass_ == "forward"})
        for pass_ in ("forward", "dgrad", "wgrad")
        for i, geometry in enumerate(geometries)
    ]


CROSSINGS = ("batch", "depth", "height", "width")


def large_case(pass_: str, crossing: str, depthwise: bool = False, contiguous: bool = False, taps: int | None = None) -> tuple:
    """(problem, operands) of a tiny case over views whose offsets pass 2^31 along one dimension: channels last, or in rows.

    ``taps``: in each dimension, with as much padding; None: two along that dimension.
    """
    import torch
    from cases import Case, make, pose

    from triton_conv3d.problem import Operands

    size = {"batch": 2, "channels": 3, "depth": 1, "height": 1, "width": 1, crossing: 4}
    kernel = tuple(taps or 1 + (crossing == name) for name in ("depth", "height", "width"))
    padding = ((taps or 1) // 2,) * 6
    batch, channels, *pixels = size.values()
    case = Case(
        pass_, batch=batch, in_channels=channels, out_channels=channels, groups=channels if depthwise else 1,
        input_size=tuple(pixels), kernel_size=kernel, padding=padding, dtype="float16",
        layouts=("contiguous" if contiguous else "channels_last",) * 2,
    )  # fmt: skip
    _, operands = make(case)

    def spread(tensor: torch.Tensor) -> torch.Tensor:
        step = 2**30 + 5  # itself a 32-bit number: twice it is not
        strides = [step if name == crossing else 7 for name in size]
        strides[4 if contiguous else 1] = 1
        extent = sum((size - 1) * stride for size, stride in zip(tensor.shape, strides, strict=True)) + 1
        return reserved(extent, tensor.dtype).as_strided(tensor.shape, strides).copy_(tensor)

    # A weight of such an extent would be copied.
    wide = Operands(*(spread(t) if t is not None and i != 1 else t for i, t in enumerate(operands.tensors)))
    problem = pose(case, wide)
    return problem.replace(layouts=("contiguous",) * 3) if contiguous else problem, wide


def run_large(engine, pass_: str, crossing: str, contiguous: bool = False) -> None:
    """Exact over a view whose offsets need 64 bits."""
    import tolerances

    large_kernels = engine.NAME == "toeplitz"
    depthwise = large_kernels or engine.NAME == "depthwise"
    problem, operands = large_case(pass_, crossing, depthwise, contiguous, 5 if large_kernels else None)
    assert problem.index64
    offers = engine.configs(problem)
    for config in {offers[0], offers[-1]} if engine.NAME == "depthwise" else offers[-1:]:  # of its kernels the two kinds
        tolerances.check_exact(engine.launch(problem, operands, config), problem, operands)


def run_far() -> None:
    """Exact where 32 bits count the elements of a tensor, but not those to a plane beyond the padding before it."""
    import tolerances
    import torch
    from cases import Case, make, pose

    from triton_conv3d import engines

    case = Case(
        "forward", in_channels=3, input_size=(2, 1, 1), kernel_size=(2, 1, 1), dilation=(8, 1, 1), dtype="float16",
        padding=(8, 8, 0, 0, 0, 0),
    )  # fmt: skip
    _, operands = make(case)
    plane = 2**28 + 5  # 7 of them are a 32-bit number, 8 are not
    wide = reserved(2 * plane, torch.float16).as_strided(operands.input.shape, (1, 1, plane, 3, 3)).copy_(operands.input)
    operands = operands._replace(input=wide)
    problem, gemm = pose(case, operands), engines.get("implicit_gemm")
    tolerances.check_exact(gemm.launch(problem, operands, gemm.configs(problem)[-1]), problem, operands)


def overflow_is_caught() -> None:
    """The same with 32-bit offsets on purpose must not pass: neither in silence nor with the right result."""
    from triton_conv3d import engines

    gemm = engines.get("implicit_gemm")
    problem, operands = large_case("forward", "batch")
    try:
        with overflow_checked():
            gemm.launch(problem.replace(index64=False), operands, gemm.configs(problem)[-1])
    except Exception as error:  # the interpreter wraps what it raises
        assert "overflow" in str(error) + str(error.__cause__), error
        return
    raise AssertionError("32-bit offsets overflowed unnoticed")


def main(mode: str) -> None:
    import torch
    from cases import run

    from triton_conv3d import engines
    from triton_conv3d.engines import base

    torch.set_num_threads(1)
    base.LEAST_TRANSPOSED = 0  # of any size
    if mode in ("end", "start"):
        with guards(mode == "end") as fresh:
            for i, case in enumerate(small_cases()):
                gemm = engines.get("implicit_gemm")
                offers = gemm.configs(case.geometry())
                print(case, flush=True)
                run(case, gemm, offers[i % len(offers)], fresh)
    elif mode == "checked":
        with overflow_checked():
            for case in small_cases():
                print(case, flush=True)
                run(case, "implicit_gemm")
    elif mode == "large":
        for pass_ in ("forward", "dgrad", "wgrad"):
            for crossing in CROSSINGS:
                print(pass_, crossing, flush=True)
                run_large(engines.get("implicit_gemm"), pass_, crossing)
        print("far", flush=True)
        run_far()
    elif mode == "overflow":
        overflow_is_caught()
    elif mode == "overrun":  # that the guards are there
        with guards(at_end=True) as fresh:
            tensor = fresh(torch.empty(16))
            print("reading one element too far", flush=True)
            ctypes.string_at(tensor.data_ptr() + 64, 1)
    else:
        raise ValueError(f"mode {mode!r} is not known")
    print("done", mode, flush=True)


def subprocess_of(script: str, *arguments: str) -> subprocess.CompletedProcess:
    """Run a script of this folder in Triton's interpreter. Where there is a GPU the test is skipped: nothing of it is tried,
    and NumPy may be one that the interpreter does not know (from 2.4 on, Triton 3.6)."""
    import pytest
    import torch

    if torch.cuda.is_available():
        pytest.skip("in the interpreter: for machines without a GPU")
    folder = os.path.dirname(os.path.abspath(__file__))
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([os.path.dirname(folder), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-W", "ignore", os.path.join(folder, script), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)


def run_modes(script: str, *modes: str) -> None:
    """A script that does one after the other, and says so: the last thing that it said is where it failed."""
    done = subprocess_of(script, *modes)
    said = done.stdout.splitlines()
    finished = [line for line in said if line.startswith("done")] == [f"done {mode}" for mode in modes]
    assert done.returncode == 0 and finished, f"exit {done.returncode} in {said[-1:]}\n{done.stderr[-3000:]}"


if __name__ == "__main__":
    from interpreting import quick

    with quick():
        for mode in sys.argv[1:]:
            main(mode)
