"""An emulator of the PTX that Triton writes for NVIDIA's GPUs: compiled kernels run on tensors in the host's memory.

What the interpreter of Triton's language cannot show is what the compiler makes of it: the order of what is asynchronous,
where threads, fragments and swizzled rows lie, barriers and their phases. Here warps take turns at random, and bulk copies,
``cp.async`` and ``wgmma`` happen at a random time before somebody waits for them, so that what is not waited for shows.
Errors are: accesses outside tensors or misaligned, registers of a product under way that are touched, shared memory that a
product reads with no fence behind the stores, barriers that nobody completes. Numbers are exact where float32 sums are.

    text.py          parsing
    machine.py       memory, descriptors, barriers, warps and a thread block
    instructions.py  an instruction as a function; arithmetic.py: values; matrices.py: products and their layouts
    launches.py      from a launch of a kernel to its thread blocks

Sources: PTX ISA 8.7, by the names of its sections. What it does not know is a :class:`Fault` that says so.
"""

from .launches import emulated
from .machine import Fault

__all__ = ["Fault", "emulated"]
