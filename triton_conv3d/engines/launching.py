"""The one door through which every Triton kernel of this package is launched."""

from __future__ import annotations

import contextlib
import ctypes
import functools
from collections.abc import Callable, Iterator

import torch

from ..problem import VECTOR_BYTES

GRID_LIMIT = (2**31 - 1, 65_535)  # of CUDA and HIP, for the axes x and y
_RELAXED = 2  # CU_STREAM_CAPTURE_MODE_RELAXED, hipStreamCaptureModeRelaxed


def _run(kernel, grid: tuple[int, int], args: tuple, options: dict):
    with _on_device(args[0].device), _loading_allowed(args[0].device):
        return kernel.run(*args, grid=(*grid, 1), warmup=False, **options)


def _on_device(device: torch.device) -> contextlib.AbstractContextManager:
    """Triton launches on the current device, wherever its tensors are."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(device)


def _loading_allowed(device: torch.device) -> contextlib.AbstractContextManager:
    """While a CUDA graph is captured the driver refuses to load a kernel, which its first launch does."""
    if device.type != "cuda" or not torch.cuda.is_current_stream_capturing():
        return contextlib.nullcontext()
    return _relaxed()


@contextlib.contextmanager
def _relaxed() -> Iterator[None]:
    """This thread may make calls that a capture does not record (CUDA driver API, cuThreadExchangeStreamCaptureMode)."""
    exchange, mode = _exchange_capture_mode(), ctypes.c_int(_RELAXED)
    exchange(ctypes.byref(mode))  # which then holds the mode before
    try:
        yield
    finally:
        exchange(ctypes.byref(mode))


@functools.cache
def _exchange_capture_mode() -> Callable:
    if torch.version.hip:
        return ctypes.CDLL("libamdhip64.so").hipThreadExchangeStreamCaptureMode
    return ctypes.CDLL("libcuda.so.1").cuThreadExchangeStreamCaptureMode


_runner: Callable = _run

# Triton finds out at every launch which of its compiled kernels is meant: with so many arguments, that takes the host longer
# than the rest of a call. What it found is kept: (compiled kernel, constants, what lives on so that no other takes its id).
_known: dict[tuple, tuple] = {}
_MOST_KNOWN = 16_384


def _key(kernel, args: tuple, options: dict) -> tuple | None:
    """What decides which compiled kernel is meant: the numbers, and of tensors what Triton specialises kernels for; None where
    it looks at more, or that is unknown."""
    if torch.version.hip:  # also at the size of the memory behind a tensor
        return None
    key = [id(kernel), id(options), args[0].device]
    for arg in args:
        kind = type(arg)
        if kind is int or kind is tuple or arg is None:
            key.append(arg)
        elif kind is torch.Tensor or kind is torch.nn.Parameter:
            key += arg.dtype, arg.data_ptr() % VECTOR_BYTES
        elif kind is float:
            key.append(float)
        elif hasattr(arg, "block_shape"):  # a tensor's descriptor; the layout in shared memory follows from the options
            key += kind, arg.base.dtype, *arg.block_shape
        else:
            return None
    return tuple(key)


def _constants(kernel, count: int, options: dict) -> tuple:
    """The kernel's parameters behind the first so many."""
    parameters = tuple(kernel.signature.parameters.values())[count:]
    return tuple(options.get(parameter.name, parameter.default) for parameter in parameters)


def launch_kernel(kernel, grid: tuple[int, int], args: tuple, options: dict) -> None:
    """Launch a jitted kernel over a grid of (x, y) programs, on the device of its first argument, a tensor.

    Triton skips a launch silently when the product of the grid's sizes overflows 32 bits, so it is checked here.

    Args:
        options: the same dict for the same problem, never changed: Triton is asked only once for each which of its kernels
            it means (:func:`same_options`).
    """
    x, y = grid
    if not (0 < x <= GRID_LIMIT[0] and 0 < y <= GRID_LIMIT[1] and x * y <= GRID_LIMIT[0]):
        raise ValueError(f"grid={grid} of {kernel.__name__}: each size must be positive and the product below 2**31")
    key = _key(kernel, args, options) if _runner is _run else None
    if known := _known.get(key):
        compiled, constants, _ = known
        with _on_device(args[0].device):
            compiled[x, y, 1](*args, *constants)
        return
    # a * b + c in one instruction: the default up to Triton 3.9, announced to end with 3.10.
    compiled = _runner(kernel, grid, args, {**options, "enable_fp_fusion": True})
    if key is not None and hasattr(compiled, "packed_metadata"):  # Triton's interpreter has nothing to keep
        if len(_known) >= _MOST_KNOWN:
            _known.clear()
        _known[key] = compiled, _constants(kernel, len(args), options), (kernel, options)


@functools.lru_cache(maxsize=4096, typed=True)
def same_options(**options) -> dict:
    """The same dict whenever the options are the same."""
    return options


@contextlib.contextmanager
def replaced(runner: Callable) -> Iterator[None]:
    """Hand every launch to ``runner(kernel, grid, args, options)`` instead: to compile only, or to measure the host."""
    global _runner
    before, _runner = _runner, runner
    try:
        yield
    finally:
        _runner = before
