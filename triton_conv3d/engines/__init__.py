"""The engines, by name, in the order in which they are ranked when nothing else tells them apart."""

from __future__ import annotations

import functools
import importlib
from types import ModuleType

from .base import HAS_TRITON

# Engines without kernels of their own are plain torch.
_NEED_TRITON = (
    "depthwise", "folded", "implicit_gemm", "halo", "kn2row", "tma", "hopper", "padded", "subpixel", "rounded",
    "space_to_depth", "block_diagonal", "toeplitz",
)  # fmt: skip
_MODULES = ("matmul", *_NEED_TRITON, "aten")


@functools.cache
def available() -> dict[str, ModuleType]:
    """Every engine that can be imported here, by name. See :mod:`.base` for what an engine offers."""
    names = [name for name in _MODULES if HAS_TRITON or name not in _NEED_TRITON]
    return {name: importlib.import_module(f"{__name__}.{name}") for name in names}


def get(name: str) -> ModuleType:
    """The engine of this name. Raises ValueError that lists what exists."""
    try:
        return available()[name]
    except KeyError:
        raise ValueError(f"no engine named {name!r}: the engines are {', '.join(available())}") from None
