"""From a launch as the engines make it to thread blocks of the emulator."""

from __future__ import annotations

import ctypes
import functools

import numpy as np
import torch

from .instructions import parsed
from .machine import Block, Descriptor, Memory

_SWIZZLES = (0, 32, 64, 128)  # bytes, by their number in a descriptor

_kernel = functools.lru_cache(maxsize=64)(parsed)


class _Arguments:
    """A kernel's arguments as the launcher passes them on: tuples flattened, descriptors followed by sizes and strides."""

    def __init__(self, described: list[dict]):
        self.described, self.params, self.memories = list(described), [], {}

    def memory(self, tensor: torch.Tensor) -> Memory:
        storage = tensor.untyped_storage()
        start, size = storage.data_ptr(), storage.nbytes()
        if start not in self.memories:
            data = np.frombuffer((ctypes.c_uint8 * size).from_address(start), np.uint8)
            self.memories[start] = Memory(start, data, f"a tensor of {tuple(tensor.shape)}")
        return self.memories[start]

    def add(self, signature, value) -> None:
        if isinstance(signature, tuple):
            for each in zip(signature, value, strict=True):
                self.add(*each)
        elif signature == "constexpr":
            pass
        elif signature.startswith("tensordesc"):
            self.params += [self._descriptor(value, self.described.pop(0)), *value.shape, *value.strides]
        elif isinstance(value, torch.Tensor):
            self.memory(value)
            self.params.append(value.data_ptr())
        elif isinstance(value, float):
            self.params.append(int(np.float32(value).view(np.uint32)))
        else:
            self.params.append(int(value))

    def _descriptor(self, value, meta: dict) -> Descriptor:
        memory, size, box, walk = self.memory(value.base), value.base.element_size(), list(meta["block_size"]), None
        if meta.get("is_im2col"):
            pixels, channels = box
            walk = (value.pixel_box_lower_corner, value.pixel_box_upper_corner, value.element_strides[:-1], pixels)
            box = [1] * (len(value.shape) - 1) + [channels]
        first = (value.base.data_ptr() - memory.start) // size
        return Descriptor(memory, first, value.shape, value.strides, box, size, _SWIZZLES[meta["swizzle"]], walk)


def emulated(compiled, ptx: str, grid: tuple[int, int], args: tuple, seed: int = 0) -> None:
    """Run a kernel that was compiled for a GPU of NVIDIA's on tensors of the CPU.

    Args:
        compiled: as Triton's ``kernel.run(..., warmup=True)`` returns it. ptx: its code. args: its positional arguments.

    Raises:
        Fault: see the package.
    """
    kernel = _kernel(ptx)
    arguments = _Arguments(getattr(compiled.metadata, "tensordesc_meta", None) or [])
    values = dict(zip(compiled.src.fn.arg_names, args, strict=False))
    for name, signature in compiled.src.signature.items():
        arguments.add(signature, values.get(name))
    params = arguments.params + [0] * (len(kernel.params) - len(arguments.params))  # scratch memory that nobody asked for
    memories = list(arguments.memories.values())
    for y in range(grid[1]):
        for x in range(grid[0]):
            place = (x, y, 0)
            Block(kernel, (*grid, 1), place, params, memories, compiled.metadata.shared, seed + x).run()
