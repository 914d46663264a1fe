"""Volumes copied from one memory format to the other by tiles, read along one of them and written along the other.

torch's copy walks along the result, and reads each of its elements from another line of memory.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from ..problem import INT32_BYTES, VECTOR_BYTES
from .launching import launch_kernel, same_options

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_CHANNELS, _TILE = 64, 4096  # most channels of a tile; its elements, 32 of a thread


@triton.jit
def transpose(
    y_ptr,  # (matrix, column, row), dense
    x_ptr,  # (matrix, row, column), columns dense
    matrix_stride,  # in units, as all of x
    row_stride,
    rows,  # in units of y
    columns,
    X_UNIT: tl.constexpr,
    Y_UNIT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INDEX: tl.constexpr,
):
    """y[matrix, column, row] = x[matrix, row, column]"""
    rows, columns = rows * Y_UNIT, columns * X_UNIT
    across, down = tl.cdiv(columns, COLUMNS), tl.cdiv(rows, ROWS)
    tile = tl.program_id(0)
    matrix = (tile // (across * down)).to(INDEX)
    row = (tile % down * ROWS + tl.arange(0, ROWS))[:, None]
    column = (tile // down % across * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    inside = (row < rows) & (column < columns)
    x = x_ptr + matrix * (matrix_stride * X_UNIT) + row.to(INDEX) * (row_stride * X_UNIT) + column
    y = y_ptr + (matrix * columns + column) * rows + row
    tl.store(y, tl.load(x, mask=inside), mask=inside)


def transposed(tensor: torch.Tensor, channels_last: bool) -> torch.Tensor | None:
    """A copy of a volume (N, C, D, H, W) in this memory format; None unless the pixels of one channel (or, of channels-last,
    all of them with their channels) lie one behind the other, as in the other format."""
    if tensor.dtype not in _DTYPES:
        return None
    n, channels, d, h, w = tensor.shape
    pixels, (batch, of_channel, *of_pixel) = d * h * w, tensor.stride()
    if channels_last:
        rows, columns, row_stride, line = channels, pixels, of_channel, (h * w, w, 1)
    else:
        rows, columns, row_stride, line = pixels, channels, of_pixel[2], tuple(s * of_pixel[2] for s in (h * w, w, 1))
        if of_channel != 1 or w == 1:
            return None
    if any(stride != wanted for size, stride, wanted in zip((d, h, w), of_pixel, line, strict=True) if size > 1):
        return None
    y = tensor.new_empty((n, columns, rows))
    item = tensor.element_size()
    x_unit = math.gcd(VECTOR_BYTES // item, columns, row_stride, batch if n > 1 else 0)
    y_unit = math.gcd(VECTOR_BYTES // item, rows)
    side = min(_CHANNELS, triton.next_power_of_2(channels))
    block = (side, _TILE // side) if channels_last else (_TILE // side, side)
    far = max(tensor.numel(), batch * (n - 1) + row_stride * (rows - 1) + columns) * item > INT32_BYTES
    sizes = (batch // x_unit, row_stride // x_unit, rows // y_unit, columns // x_unit)
    index = tl.int64 if far else tl.int32
    options = same_options(X_UNIT=x_unit, Y_UNIT=y_unit, ROWS=block[0], COLUMNS=block[1], INDEX=index, num_warps=4)
    programs = n * -(-rows // block[0]) * -(-columns // block[1])
    launch_kernel(transpose, (programs, 1), (y, tensor, *sizes), options)
    return y.view(n, d, h, w, channels).permute(0, 4, 1, 2, 3) if channels_last else y.view(tensor.shape)
