"""space_to_depth: few channels on both sides: neighbouring pixels of a line as channels of another convolution.

    y[b * P + p, k] = sum over taps (e, f) of D and H, pixels r and channels c of  x[e, f, b * P * stride - pad + r, c] * v
                      v = w[k, c, e, f, t] where r = p * stride + t * dilation, 0 elsewhere

A product of tensor cores has 8 or 16 columns and sums over 8 or 16 channels at the least, and a tile of an implicit GEMM
reads every pixel once for each tap: of 3 -> 3 channels it computes 28 times what it must. With blocks of P neighbours along W
as one pixel, (p, k) are the channels that are produced and (r, c) those that are summed over, r through the window of pixels
that a block meets. As pixels of a channels-last line lie one after another, a window is P * stride + overlap of them, and
the next one begins P * stride later: a view, not a copy. Another engine computes this convolution, which has no taps along W,
so that a pixel is read once for all of them. One of (P + kw - 1) / kw parts of its weight is no zeros (stride 1).

    forward   blocks of the output, windows of the input
    dgrad     blocks of the input, windows of the gradient; v then has the flipped taps of each parity class along W
    wgrad     either, so that the windows are those of the narrower side; of the other convolution's gradient, kept in
              float32, the sums along its diagonals

Windows reach beyond the ends of a line: they lie in a copy with zeros there, unless nothing is padded. The name is that of
the operation that makes channels of blocks of pixels (TensorFlow's tf.nn.space_to_depth), here along W alone.

An infinity or NaN also makes NaN of what its block computes through zeros: results up to a block away along W; in wgrad all
taps along W of its channel, or of its filter.

Bytes by design: those of the other engine, and the copy of the narrower side once in each direction.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch

from ..problem import CHANNELS_LAST, INT32_BYTES, VECTOR_BYTES, VIEW, Operands, Problem
from . import halo, implicit_gemm, kn2row, matmul, tma
from .base import MOST_COPIED, Memory, Work, aligned, in_format, refused_by_kernels
from .through import Float32Sums, Moved, ThroughConfig, memory_through, offers_through, work_through

NAME = "space_to_depth"
MEASURED = ()  # architectures; it has not run on a GPU yet
_ENGINES = {engine.NAME: engine for engine in (kn2row, halo, tma, implicit_gemm)}  # the one that takes everything last
_MOST_NARROW, _MOST_WIDE = 16, 128  # channels of the narrower and of the wider side: others fill tiles by themselves
_WIDTHS = (128, 64, 32)  # channels of the wider side in a block: by the cost model the best of every layer is one of these
_MOST_PIXELS = 32  # of a block
_WORD = 8  # bytes: the widest element type of torch's copies


@dataclass(frozen=True)
class SpaceToDepthConfig(ThroughConfig):
    """
    pixels: of a block, neighbours along W.
    """

    pixels: int

    def whole(self) -> SpaceToDepthConfig:
        return super().whole().replace(pixels=1)

    def to_dict(self) -> dict:
        return {"pixels": self.pixels, **super().to_dict()}


@dataclass(frozen=True)
class Blocked:
    """The convolution without taps along W, and how its windows lie in the lines of what they are of, or of a copy.

    problem: the other engine's.
    forward: the windows are of the input, the blocks of the output; else the other way round.
    pixels: of a block. count: pixels of a line that its blocks have. step: pixels from a window to the next.
    copied: the windows lie in a copy. width: pixels of its lines. channels: of its pixels.
    front: where the line begins in the copy; below 0: as many pixels of it come before the copy.
    filled: pixels of the copy that are the line's.
    """

    problem: Problem
    forward: bool
    pixels: int
    count: int
    step: int
    copied: bool
    width: int
    channels: int
    front: int
    filled: range


def supports(problem: Problem) -> str | None:
    if reason := refused_by_kernels(problem):
        return reason
    if problem.groups != 1:
        return f"groups={problem.groups}: the channels of each would have to be moved apart"
    narrow, wide = sorted((problem.in_channels, problem.out_channels))
    if narrow > _MOST_NARROW or wide > _MOST_WIDE:
        return f"{narrow} and {wide} channels fill products by themselves: more than {_MOST_NARROW} and {_MOST_WIDE}"
    if problem.pass_ == "dgrad" and min(problem.stride[2], problem.dilation[2]) > 1:
        return f"dgrad of stride {problem.stride[2]} and dilation {problem.dilation[2]} along W: windows would have gaps"
    if matmul.supports(problem) is None:
        return "engine matmul computes it without zeros"
    if not _sizes(problem):
        return (
            f"no block of pixels saves anything of {problem.kernel_size[2]} taps along W, divides {_line(problem)} pixels as "
            f"a residual needs, and is divided by the stride {problem.stride[2]} of a dgrad"
        )
    copied = max(_moved(problem, pixels).copies for pixels in _sizes(problem))
    if copied > MOST_COPIED:
        return f"copies of {copied} bytes: more than {MOST_COPIED}"
    return implicit_gemm.supports(blocked(problem, _sizes(problem)[-1]).problem)


def _line(problem: Problem) -> int:
    """Pixels of what is computed, or of a gradient that is summed over, along W."""
    return (problem.input_size if problem.pass_ == "dgrad" else problem.output_size)[2]


@functools.lru_cache(maxsize=4096)
def _sizes(problem: Problem) -> tuple[int, ...]:
    """Pixels of the blocks that are offered, the most first. With a residual, which is read by blocks, they divide lines."""
    wide, line = max(problem.in_channels, problem.out_channels), _line(problem)
    fit = {min(1 << (width // wide).bit_length() - 1, _MOST_PIXELS) for width in _WIDTHS if width >= wide}
    found = [pixels for pixels in sorted(fit, reverse=True) if pixels > 1 or problem.kernel_size[2] > 1]
    found = [pixels for pixels in found if not (problem.residual and line % pixels)]
    if problem.pass_ == "dgrad":
        found = [pixels for pixels in found if pixels % problem.stride[2] == 0]
    return tuple(pixels for pixels in found if pixels <= line) or tuple(found[-1:])


@functools.lru_cache(maxsize=4096)
def blocked(problem: Problem, pixels: int) -> Blocked:
    (inputs, outputs), read, made = (problem.input_size[2], problem.output_size[2]), problem.in_channels, problem.out_channels
    reach, stride, front = problem.dilation[2] * (problem.kernel_size[2] - 1), problem.stride[2], problem.padding[4]
    line, count, role, item = inputs, outputs, 0, problem.itemsize
    forward = problem.pass_ == "forward" or (problem.pass_ == "wgrad" and (stride > 1 or read <= made))
    window, step = (pixels - 1) * stride + reach + 1, pixels * stride
    if not forward:
        met = [(first - (taps - 1) * problem.dilation[2], first) for _, taps, first in _classes(problem) if taps]
        low, high, step = min(low for low, _ in met), max(high for _, high in met), pixels // stride
        read, made, line, count, front, role, window = made, read, outputs, inputs, -low, 2, step + high - low
    blocks, vector = -(-count // pixels), VECTOR_BYTES // item
    channels = _multiple(read, vector // math.gcd(vector, step))  # so that every window begins at a vector
    whole = vector // math.gcd(vector, channels)  # pixels of which are whole vectors
    length = _multiple(window, whole)
    width = _multiple((blocks - 1) * step + length, whole)
    copied = front != 0 or width > line or channels != read or line % whole > 0 or problem.layouts[role] != CHANNELS_LAST
    wide, window, start = pixels * made, length * channels, max(0, front)
    values = problem.replace(
        in_channels=window if forward else wide,
        out_channels=wide if forward else window,
        input_size=(*problem.input_size[:2], blocks),
        kernel_size=(*problem.kernel_size[:2], 1),
        stride=(*problem.stride[:2], 1),
        padding=(*problem.padding[:4], 0, 0),
        dilation=(*problem.dilation[:2], 1),
        layouts=(VIEW, CHANNELS_LAST, CHANNELS_LAST) if forward else (CHANNELS_LAST, CHANNELS_LAST, VIEW),
        alignment=VECTOR_BYTES if problem.pass_ == "forward" else math.gcd(VECTOR_BYTES, wide * item),
    )
    largest = max(map(math.prod, (values.input_shape, values.weight_shape, values.output_shape)))
    inner = values.replace(index64=problem.index64 or largest * item > INT32_BYTES)
    return Blocked(
        problem=Float32Sums(*inner._values()) if problem.pass_ == "wgrad" else inner,
        forward=forward,
        pixels=pixels,
        count=count,
        step=step,
        copied=copied,
        width=width if copied else line,
        channels=channels,
        front=front,
        filled=range(start, max(start, min(width, front + line))),
    )


def _classes(problem: Problem) -> list[tuple[int, int, int]]:
    """Of every parity class along W: its first tap, its taps, and the output that its first position meets through that.

    Position i meets output (i + pad - t * dilation) / stride through the taps that divide; one of stride and dilation is 1.
    """
    stride, before = problem.stride[2], problem.padding[4]
    first = [(position + before) % stride for position in range(stride)]
    taps = [len(range(tap, problem.kernel_size[2], stride)) for tap in first]
    return [(tap, count, (i + before) // stride) for i, (tap, count) in enumerate(zip(first, taps, strict=True))]


def _multiple(count: int, of: int) -> int:
    return -(-count // of) * of


def configs(problem: Problem) -> tuple[SpaceToDepthConfig, ...]:
    return tuple(
        SpaceToDepthConfig(offer.engine, offer.config, pixels)
        for pixels in _sizes(problem)
        for offer in offers_through(_ENGINES, blocked(problem, pixels).problem)
    )


@functools.lru_cache(maxsize=4096)
def _moved(problem: Problem, pixels: int) -> Moved:
    of, item, wgrad = blocked(problem, pixels), problem.itemsize, problem.pass_ == "wgrad"
    inner, copies, moved, launches = of.problem, 0, 0, 0
    read, made = (problem.input_shape, problem.output_shape)[:: 1 if of.forward else -1]
    if of.copied:
        copy = item * math.prod((read[0], of.channels, *read[2:4], of.width))
        copies, moved, launches = copy, copy + item * math.prod(read), 3
    weight = math.prod(inner.weight_shape) * (4 if wgrad else item)
    parts = 1 if of.forward else 2 * problem.stride[2]
    copies, moved, launches = copies + weight, moved + 2 * weight, launches + 1 + parts + inner.bias
    whole, role = of.count % pixels == 0, 2 if of.forward else 0
    if not whole or problem.layouts[role] != CHANNELS_LAST:  # of the result, or of what wgrad reads by blocks
        blocks = item * math.prod((*made[:4], _multiple(of.count, pixels)))
        copies, moved, launches = copies + blocks, moved + blocks + item * math.prod(made), launches + 1 + (wgrad and not whole)
    return Moved(copies, moved, launches)


def memory(problem: Problem, config: SpaceToDepthConfig) -> Memory:
    """An operand that is read as it is is copied too where its address is no multiple of 16: not counted."""
    return memory_through(_ENGINES, blocked(problem, config.pixels).problem, config, _moved(problem, config.pixels))


def work(problem: Problem, config: SpaceToDepthConfig) -> Work:
    """The launches as the cost model sees them."""
    return work_through(_ENGINES, blocked(problem, config.pixels).problem, config, _moved(problem, config.pixels))


def launch(problem: Problem, operands: Operands, config: SpaceToDepthConfig) -> torch.Tensor:
    of, other = blocked(problem, config.pixels), _ENGINES[config.engine]
    windows = _windows(of, operands.input if of.forward else operands.grad)
    if problem.pass_ == "wgrad":
        blocks = _blocks(of, operands.grad if of.forward else operands.input)
        input, grad = (windows, blocks) if of.forward else (blocks, windows)
        sums = other.launch(of.problem, Operands(input=input, grad=grad), config.config)
        return problem.empty_result(sums.device).copy_(_by_tap(problem, of, sums))
    bias, residual = operands.bias, operands.residual
    inner = Operands(
        input=windows if of.forward else None,
        weight=_diagonal(problem, of, operands.weight),
        grad=None if of.forward else windows,
        bias=None if bias is None else bias.repeat(of.pixels),
        residual=None if residual is None else _blocks(of, residual),
        negative_slope=operands.negative_slope,
    )
    lines = other.launch(of.problem, inner, config.config).permute(0, 2, 3, 4, 1)
    lines = lines.reshape(*lines.shape[:3], -1, lines.shape[4] // of.pixels)[..., : of.count, :]
    return in_format(lines.permute(0, 4, 1, 2, 3), problem.memory_format)


def _windows(of: Blocked, tensor: torch.Tensor) -> torch.Tensor:
    """(N, pixels of a window x channels, D, H, blocks), which overlap, of a tensor (N, channels, D, H, W)."""
    lines = tensor.permute(0, 2, 3, 4, 1)
    if of.copied or not aligned(tensor):
        copy = lines.new_empty((*lines.shape[:3], of.width, of.channels))
        start, stop = of.filled.start, of.filled.stop
        if of.channels > lines.shape[4]:
            copy.zero_()
        else:
            copy[..., :start, :] = 0
            copy[..., stop:, :] = 0
        filled, lines = copy[..., start:stop, : lines.shape[4]], lines[..., start - of.front : stop - of.front, :]
        if _in_words(filled) and _in_words(lines):  # torch copies 16-bit elements one at a time
            filled, lines = (part.flatten(3).view(torch.int64) for part in (filled, lines))
        filled.copy_(lines)
        lines = copy
    (n, d, h), inner = lines.stride()[:3], of.problem
    window = inner.in_channels if of.forward else inner.out_channels
    shape = (lines.shape[0], window, *lines.shape[1:3], inner.input_size[2])
    return lines.as_strided(shape, (n, 1, d, h, of.step * of.channels))


def _in_words(lines: torch.Tensor) -> bool:
    """Whether what a tensor (N, D, H, W, C) has of a line is whole words, one after another, and so are the lines."""
    word = _WORD // lines.element_size()
    return (
        lines.numel() > 0
        and lines.data_ptr() % _WORD == 0
        and lines.stride()[3:] == (lines.shape[4], 1)
        and lines.shape[3] * lines.shape[4] % word == 0
        and all(stride % word == 0 for stride in lines.stride()[:3])
    )


def _blocks(of: Blocked, tensor: torch.Tensor) -> torch.Tensor:
    """(N, pixels of a block x channels, D, H, blocks), channels last, of a tensor (N, channels, D, H, W)."""
    lines = tensor.permute(0, 2, 3, 4, 1)
    more = -of.count % of.pixels
    if more:
        lines = torch.nn.functional.pad(lines, (0, 0, 0, more))
    elif not aligned(tensor):
        lines = lines.clone(memory_format=torch.contiguous_format)
    return lines.reshape(*lines.shape[:3], -1, of.pixels * lines.shape[4]).permute(0, 4, 1, 2, 3)


def _diagonal(problem: Problem, of: Blocked, weight: torch.Tensor) -> torch.Tensor:
    """The other convolution's weight, channels last."""
    copy = weight.new_zeros((of.problem.out_channels, *of.problem.kernel_size, of.problem.in_channels))
    for taps, diagonals in _diagonals(problem, of, copy):
        part = weight[..., taps]
        diagonals.copy_((part if of.forward else part.flip(4)).permute(0, 2, 3, 4, 1))
    return copy.permute(0, 4, 1, 2, 3)


def _by_tap(problem: Problem, of: Blocked, sums: torch.Tensor) -> torch.Tensor:
    """(K, C, taps), of the gradient of the other convolution's weight."""
    ((_, diagonals),) = _diagonals(problem, of, sums.permute(0, 2, 3, 4, 1))
    taps = diagonals.sum(0)
    return (taps if of.forward else taps.flip(3)).permute(0, 4, 1, 2, 3)


def _diagonals(problem: Problem, of: Blocked, matrix: torch.Tensor) -> list[tuple[slice, torch.Tensor]]:
    """[taps along W, a view (pixels of a block, K, kd, kh, taps, C) of what of (filters, kd, kh, 1, channels) is theirs].

    Pixel p of a block meets pixel p * stride + t * dilation of its window. Where the windows are of the gradient, of
    each parity class along W its own pixels of the block do, through its own taps, the last one first.
    """
    inner, (kernel_d, kernel_h, kernel_w), dilation = of.problem, problem.kernel_size, problem.dilation[2]
    stride, filters, columns = problem.stride[2], problem.out_channels, inner.in_channels
    row = kernel_d * kernel_h * columns
    if of.forward:  # rows (p, k), columns (r, c)
        pixel, tap = filters * row + stride * of.channels, dilation * of.channels
        parts = [(slice(None), of.pixels, kernel_w, pixel, tap, 0)]
    else:  # rows (r, k), columns (p, c)
        position, parts = of.channels * row, []
        for i, (first, taps, output) in enumerate(_classes(problem)):
            at = (output - (taps - 1) * dilation + of.front) * position + i * problem.in_channels
            pixel, tap = position + stride * problem.in_channels, dilation * position
            parts.append((slice(first, None, stride), of.pixels // stride, taps, pixel, tap, at))
    return [
        (
            which,
            matrix.as_strided(
                (pixels, filters, kernel_d, kernel_h, taps, problem.in_channels),
                (pixel, row, kernel_h * columns, columns, tap, 1),
                matrix.storage_offset() + at,
            ),
        )
        for which, pixels, taps, pixel, tap, at in parts
    ]
