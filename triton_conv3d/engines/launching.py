"""The one door through which every Triton kernel of this package is launched."""

from __future__ import annotations

import contextlib
import ctypes
import functools
from collections.abc import Callable, Iterator

import torch

GRID_LIMIT = (2**31 - 1, 65_535)  # of CUDA and HIP, for the axes x and y
_RELAXED = 2  # CU_STREAM_CAPTURE_MODE_RELAXED, hipStreamCaptureModeRelaxed


def _run(kernel, grid: tuple[int, int], args: tuple, options: dict) -> None:
    with _on_device(args[0].device), _loading_allowed(args[0].device):
        kernel.run(*args, grid=(*grid, 1), warmup=False, **options)


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


def launch_kernel(kernel, grid: tuple[int, int], args: tuple, options: dict) -> None:
    """Launch a jitted kernel over a grid of (x, y) programs, on the device of its first argument, a tensor.

    Triton skips a launch silently when the product of the grid's sizes overflows 32 bits, so it is checked here.
    """
    x, y = grid
    if not (0 < x <= GRID_LIMIT[0] and 0 < y <= GRID_LIMIT[1] and x * y <= GRID_LIMIT[0]):
        raise ValueError(f"grid={grid} of {kernel.__name__}: each size must be positive and the product below 2**31")
    # a * b + c in one instruction: the default up to Triton 3.9, announced to end with 3.10.
    _runner(kernel, grid, args, {**options, "enable_fp_fusion": True})


@contextlib.contextmanager
def replaced(runner: Callable) -> Iterator[None]:
    """Hand every launch to ``runner(kernel, grid, args, options)`` instead: to compile only, or to measure the host."""
    global _runner
    before, _runner = _runner, runner
    try:
        yield
    finally:
        _runner = before
