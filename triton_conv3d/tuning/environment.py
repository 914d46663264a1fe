"""Everything beside the problem that a measured time depends on."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import re
from importlib import metadata
from pathlib import Path

import torch

from ..problem import device_name

_NONE = "none"
_KERNEL_DRIVERS = (Path("/proc/driver/nvidia/version"), Path("/sys/module/amdgpu/version"))
_PACKAGE = Path(__file__).resolve().parent.parent


def environment(device: torch.device) -> dict[str, str]:
    """Names and versions that plans measured on this device are valid for.

    ``gpu``, ``arch``, ``torch``, ``triton``, ``driver`` (and behind it the runtime: ``580.65.06, cuda 13.0``), ``cudnn``,
    ``package`` and ``engines`` (hash of the engines' source). What a device does not use is ``none``.
    """
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    return dict(_environment(device))


@functools.cache
def _environment(device: torch.device) -> dict[str, str]:
    gpu, arch = device_name(device)
    on_gpu = device.type == "cuda"
    return {
        "gpu": gpu,
        "arch": arch,
        "torch": str(torch.__version__),
        "triton": _triton(),
        "driver": _driver() if on_gpu else _NONE,
        "cudnn": str(torch.backends.cudnn.version()) if on_gpu else _NONE,
        "package": _version(),
        "engines": source_hash(),
    }


def _triton() -> str:
    try:
        import triton
    except ImportError:
        return _NONE
    return str(triton.__version__)


def _driver() -> str:
    runtime = f"hip {torch.version.hip}" if torch.version.hip else f"cuda {torch.version.cuda}"
    return f"{_kernel_driver() or _cuda_driver() or _NONE}, {runtime}"


def _kernel_driver() -> str | None:
    """What the kernel's driver says of itself: ``580.65.06``."""
    for path in _KERNEL_DRIVERS:
        try:
            found = re.search(r"(?:^|Kernel Module.*?\s)(\d+\.\d+\S*)", path.read_text())
        except OSError:
            continue
        if found:
            return found[1]
    return None


def _cuda_driver() -> str | None:
    """The version of CUDA that the driver knows (CUDA driver API, cuDriverGetVersion): ``13000``."""
    version = ctypes.c_int()
    try:
        failed = ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    except (OSError, AttributeError):
        return None
    return None if failed else str(version.value)


def _version() -> str:
    try:
        return metadata.version("triton_conv3d")
    except metadata.PackageNotFoundError:  # a source tree that is not installed; the hash tells versions apart
        return _NONE


@functools.cache
def source_hash() -> str:
    """SHA-256 over the engines and the problem's definition: a changed kernel makes every measured time void."""
    digest = hashlib.sha256()
    for path in (_PACKAGE / "problem.py", *sorted((_PACKAGE / "engines").rglob("*.py"))):
        try:
            content = path.read_bytes()
        except OSError:  # imported from an archive: the package version has to do
            content = b""
        digest.update(f"{path.relative_to(_PACKAGE).as_posix()} {len(content)}\n".encode() + content)
    return digest.hexdigest()
