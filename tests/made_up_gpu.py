"""A GPU that is made up, for what no machine without one runs otherwise: specialising, compiling and launching kernels as
on an H200, tuning, and measuring by device events. CPU tensors say that they are on ``cuda:0``; kernels are compiled for
sm_90 and launched by Triton's own launchers into nothing (made_up_driver.c), so that results are what memory held and no test
may look at them.

As a program, ``python tests/made_up_gpu.py MODULE ARGUMENT...`` runs ``python -m MODULE ARGUMENT...`` on that GPU, on a
few tiny layers in place of perf's suites, and prints how often each kernel was launched.
"""

from __future__ import annotations

import atexit
import collections
import contextlib
import ctypes
import functools
import json
import os
import runpy
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

os.environ.pop("TRITON_INTERPRET", None)  # before triton is imported

import torch
import torch._dynamo
import torch._inductor
import triton
from ahead_of_time import COMPILER
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.driver import CudaDriver

from perf import machine, workloads
from triton_conv3d.tuning import verify
from triton_conv3d.workload import Layer

NAME = "NVIDIA H200"
DEVICE = torch.device("cuda", 0)
MEMORY = 141 * 10**9
PADDED, ONES = (1, 1, 1), (1, 1, 1)
LAYERS = (
    Layer("t.dense", 1, 16, 32, (2, 6, 8), (3, 3, 3), ONES, PADDED, ONES, 1, True, "fp16"),
    Layer("t.depthwise", 1, 16, 16, (2, 6, 8), (3, 3, 3), (1, 2, 2), PADDED, ONES, 16, True, "bf16"),
    Layer("t.transposed", 1, 16, 8, (3, 6, 8), (2, 2, 2), (2, 2, 2), (0, 0, 0), ONES, 1, False, "fp32"),
)

launched: collections.Counter[str] = collections.Counter()
described: collections.Counter[str] = collections.Counter()  # tensors that kernels were given as descriptors
given: collections.deque[tuple[str, int]] = collections.deque(maxlen=100)  # a digest of grid and numbers of the last launches


def _built() -> Path:
    """The folder with the made-up driver, which whoever asks for CUDA's finds from now on."""
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder)
    library = folder / "libcuda.so.1"
    source, include = Path(__file__).with_name("made_up_driver.c"), Path(triton.__file__).parent / "backends/nvidia/include"
    command = [COMPILER, "-shared", "-fPIC", f"-I{include}", f"-Wl,-soname,{library.name}", str(source), "-o", str(library)]
    subprocess.run(command, check=True)
    ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL).made_up_on_launch(_on_launch)
    return folder


@ctypes.CFUNCTYPE(None, ctypes.c_char_p, ctypes.c_int, ctypes.c_ulonglong)
def _on_launch(name: bytes, descriptors: int, numbers: int) -> None:
    launched[name.decode()] += 1
    described[name.decode()] += descriptors
    given.append((name.decode(), numbers))


def _driver() -> CudaDriver:
    """Triton's own, but for what it asks torch."""
    os.environ["TRITON_LIBCUDA_PATH"] = str(_built())
    driver = CudaDriver()
    driver.get_current_target = lambda: GPUTarget("cuda", 90, 32)
    driver.get_current_device, driver.get_current_stream = lambda: 0, lambda device: 0
    driver.get_device_capability, driver.set_current_device = lambda device: (9, 0), lambda device: None
    return driver


class Event:
    """The host's clock; nothing takes no time, which no ratio could be made of."""

    def __init__(self, enable_timing: bool = False):
        self.seconds = 0.0

    def record(self, stream=None) -> None:
        self.seconds = time.perf_counter()

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: Event) -> float:
        return max(1e-3, (end.seconds - self.seconds) * 1e3)


def _on_cpu(value):
    """The device that is meant by one of this GPU."""
    is_gpu = isinstance(value, torch.device) and value.type == "cuda" or isinstance(value, str) and value[:4] == "cuda"
    return torch.device("cpu") if is_gpu else value


def _redirect(owner, *names: str) -> None:
    """Have functions of torch make their tensors on the CPU; in every thread, which a mode of torch's would not reach."""

    def redirected(function):
        @functools.wraps(function)
        def call(*args, **kwargs):
            return function(*map(_on_cpu, args), **{name: _on_cpu(value) for name, value in kwargs.items()})

        return call

    for name in names:
        setattr(owner, name, redirected(getattr(owner, name)))


def install() -> None:
    """Make this process believe that it has the GPU. There is no way back.

    Raises:
        RuntimeError: there is a GPU: what is made up here would pass for measured on it.
    """
    if torch.cuda.is_available():
        raise RuntimeError(f"there is a GPU, {torch.cuda.get_device_name()}: the made-up one is for machines without")
    triton.runtime.driver.set_active(_driver())
    _redirect(torch, "empty", "empty_strided", "empty_like", "zeros", "ones", "full", "rand", "randn", "randint", "tensor")
    _redirect(torch, "arange", "Generator")
    _redirect(torch.Tensor, "to", "new_empty", "new_zeros", "new_empty_strided")
    real = torch._C.TensorBase.device.__get__
    torch.Tensor.device = property(lambda self: DEVICE if real(self).type == "cpu" else real(self))
    properties = SimpleNamespace(
        name=NAME, major=9, minor=0, total_memory=MEMORY, multi_processor_count=132, L2_cache_size=60 * 2**20,
    )  # fmt: skip
    fakes = {
        "is_available": True, "is_initialized": True, "device_count": 1, "current_device": 0, "get_device_name": NAME,
        "get_device_properties": properties, "get_device_capability": (9, 0), "is_current_stream_capturing": False,
        "memory_allocated": 0, "max_memory_allocated": 0, "mem_get_info": (MEMORY, MEMORY),
    }  # fmt: skip
    fakes |= dict.fromkeys(("synchronize", "empty_cache", "set_device", "reset_peak_memory_stats", "_sleep", "_lazy_init"))
    for name, value in fakes.items():
        setattr(torch.cuda, name, lambda *args, value=value: value)
    torch.cuda.Event, torch.cuda.device = Event, contextlib.nullcontext
    torch.backends.cudnn.version = lambda: 91900
    verify.is_right = verify.same = lambda *args, **kwargs: True  # nothing was computed


def main() -> None:
    install()
    machine._MATMUL, machine._COPY_BYTES = 64, 2**16
    tiny = [
        workloads.Workload(layer, "t", "tiny", transposed=layer.id == "t.transposed", core=True) for layer in LAYERS
    ]
    workloads.suite = lambda names: tiny
    sys.argv = sys.argv[1:]
    status = 0
    try:
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    except SystemExit as end:
        status = end.code
    print(json.dumps(launched))
    sys.exit(status)


if __name__ == "__main__":
    main()
