"""What an error of a launch means: a config that does not fit here, no memory left, or a kernel that must not run."""

from __future__ import annotations

import torch

from .. import settings
from ..engines.base import Config
from ..problem import Problem

# Errors after which the device's context, or the kernel, can no longer be trusted: all of CUDA's that stay (cudaError, 700 to
# 721), for whatever is launched after them fails alike.
_FATAL = (
    "illegal memory access",
    "illegal address",
    "illegal instruction",
    "misaligned address",
    "device-side assert",
    "unspecified launch failure",
    "launch timed out",
    "hardware stack error",
    "global/shared address space",
    "invalid program counter",
    "tensor memory not completely freed",
    "uncorrectable ecc error",
)
_UNFIT_TYPES = ("OutOfResources", "CompilationError", "CompileTimeAssertionFailure", "PTXASError")  # Triton's, by name
_UNFIT = ("passmanager::run failed", "out of resource", "too many resources requested")


def is_illegal_access(error: BaseException) -> bool:
    """The kernel touched memory that is not its own, or failed on the device."""
    return _says(error, _FATAL)


def blamed(engine: str, config: Config, problem: Problem, error: BaseException) -> RuntimeError:
    """What to raise after an illegal access: which kernel did it, and how the next process does without it."""
    remedy = f"{settings.variable('engine')}=aten computes everything by torch's own convolution"
    remedy += f"; {settings.variable('autotune')}=off measures no candidates, should this have been one, and where plans are "
    remedy += "kept on disk, one that was being measured is left out from now on"
    lost = "Please report it. This process can compute nothing more on the GPU"
    return RuntimeError(f"{engine} [{config}] failed on {problem}: {error}\n{lost}. For the next one, {remedy}.")


def is_out_of_resources(error: BaseException) -> bool:
    """This config does not compile, or needs more shared memory, registers or threads than there are."""
    return any(kind.__name__ in _UNFIT_TYPES for kind in type(error).__mro__) or _says(error, _UNFIT)


def is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, torch.OutOfMemoryError)


def _says(error: BaseException, signs: tuple[str, ...]) -> bool:
    text = str(error).lower()
    return any(sign in text for sign in signs)
