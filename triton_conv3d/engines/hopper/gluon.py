"""Gluon under one set of names: what is called differently, or is missing, from Triton 3.6 to the newest.

What exists is asked for by its name, never by a version. :data:`MISSING` says what this Triton lacks; then the kernels
cannot be imported, and nothing else of this module is to be used. Without :data:`IM2COL` only :func:`load_im2col` and its
descriptor are not.
"""

from __future__ import annotations

__all__ = [
    "IM2COL", "MISSING", "TensorDescriptor", "TensorDescriptorIm2Col", "beside", "gl", "gluon", "load", "load_im2col",
    "mbarrier", "warpgroup_mma", "warpgroup_mma_wait",
]  # fmt: skip

MISSING: str | None = None
IM2COL = False  # whether there are copies in im2col mode
try:
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
    from triton.experimental.gluon.nvidia import hopper as described
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    _ASKED_FOR = (
        gl.allocate_shared_memory, gl.BlockedLayout, gl.convert_layout, gl.NVMMADistributedLayout, gl.NVMMASharedLayout,
        gl.SliceLayout, gl.split, gl.static_assert, gl.warp_specialize, mbarrier.MBarrierLayout, mbarrier.arrive,
        mbarrier.expect, mbarrier.init, mbarrier.wait,
    )  # fmt: skip
    _copy = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
    _copy_im2col = getattr(tma, "async_load_im2col", None)
    TensorDescriptorIm2Col = getattr(described, "TensorDescriptorIm2Col", None)
    IM2COL = _copy_im2col is not None and TensorDescriptorIm2Col is not None
    if hasattr(gl.shared_memory_descriptor, "reinterpret"):

        @gluon.jit
        def _seen_as(buffer, descriptor):
            return buffer.reinterpret(buffer.dtype, descriptor.block_type.shape, descriptor.layout)

        @gluon.jit
        def beside(buffers, NUMBER: gl.constexpr, ROWS: gl.constexpr, COLUMNS: gl.constexpr, LAYOUT: gl.constexpr):
            """Buffers of (rows, fewer columns) as so many, in each of which several of them lie side by side."""
            return buffers.reinterpret(buffers.dtype, [NUMBER, ROWS, COLUMNS], LAYOUT)

    else:
        _ASKED_FOR += (gl.shared_memory_descriptor._reinterpret,)

        @gluon.jit
        def _seen_as(buffer, descriptor):
            return buffer._reinterpret(buffer.dtype, descriptor.block_type.shape, descriptor.layout)

        @gluon.jit
        def beside(buffers, NUMBER: gl.constexpr, ROWS: gl.constexpr, COLUMNS: gl.constexpr, LAYOUT: gl.constexpr):
            return buffers._reinterpret(buffers.dtype, [NUMBER, ROWS, COLUMNS], LAYOUT)

    @gluon.jit
    def load(descriptor, at, barrier, buffer):
        """Have the copy engine fill a buffer of (pixels, channels) with the block at these coordinates."""
        _copy(descriptor, at, barrier, _seen_as(buffer, descriptor))

    @gluon.jit
    def load_im2col(descriptor, at, h, w, barrier, buffer):
        """The same with so many pixels one after the other from these coordinates on, all (h, w) further."""
        _copy_im2col(descriptor, at, [0, h.to(gl.int16), w.to(gl.int16)], barrier, buffer)

except (ImportError, AttributeError) as error:
    MISSING = f"the Gluon of this Triton lacks what the kernels are written in: {error}"
