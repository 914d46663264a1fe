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

Windows reach beyond the ends of a line: they lie in a copy with zeros there, unless nothing is padded. Where that leaves
fewer to sum over, a pixel of an input's copy has the channels of all taps along H, (tap, channel), of a line of the output: a
window of 8 pixels of one channel and 7 taps is then 64 channels of one tap, in place of 7 taps of 32, three quarters of which
are there so that each window begins at a vector. The name is that of the operation that makes channels of blocks of pixels
(TensorFlow's tf.nn.space_to_depth), here along W alone.

An infinity or NaN also makes NaN of what its block computes through zeros: results up to a block away along W; in wgrad all
taps along W of its channel, or of its filter.

Bytes by design: those of the other engine, and the copy of the narrower side once in each direction, with taps along H as
many times as there are.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch

from ...problem import CHANNELS_LAST, INT32_BYTES, VECTOR_BYTES, VIEW, Operands, Problem
from .. import halo, hopper, implicit_gemm, kn2row, matmul, tma
from ..base import MOST_COPIED, Memory, Work, aligned, in_format, refused_by_kernels
from ..through import Float32Sums, Moved, ThroughConfig, memory_through, offers_through, work_through
from .lines import ONE_TAP, Taps, gathered

NAME = "space_to_depth"
MEASURED = ()  # architectures; it has not run on a GPU yet
_ENGINES = {engine.NAME: engine for engine in (kn2row, halo, tma, hopper, implicit_gemm)}  # what takes everything last
_MOST_NARROW, _MOST_WIDE = 16, 128  # channels of the narrower and of the wider side: others fill tiles by themselves
_WIDTHS = (128, 64, 32)  # channels of the wider side in a block: by the cost model the best of every layer is one of these
_MOST_PIXELS = 32  # of a block
_LEAST_SUMMED = 16  # channels of a product of tensor cores
# Of what is summed over without taps along H as channels, what may be left with them: with taps along D, which read the larger
# copy again, and without.
_GAIN, _FLAT_GAIN = 0.8, 0.5


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
    copied: the windows lie in a copy. width: pixels of its lines. channels: of its pixels. taps_h: that these are of.
    front: where the line begins in the copy; below 0: as many pixels of it come before the copy.
    """

    problem: Problem
    forward: bool
    pixels: int
    count: int
    step: int
    copied: bool
    width: int
    channels: int
    taps_h: int
    front: int


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
    """With taps along H as channels where fewer are summed over then, of a copy that is not too large."""
    apart, taps = _blocked(problem, pixels, 1), problem.kernel_size[1]
    gain = _GAIN if problem.kernel_size[0] > 1 else _FLAT_GAIN
    if taps == 1 or problem.pass_ == "dgrad" or not apart.forward or problem.in_channels > gain * apart.channels:
        return apart
    together = _blocked(problem, pixels, taps)
    summed = [_multiple(of.problem.in_channels, _LEAST_SUMMED) * of.problem.kernel_size[1] for of in (apart, together)]
    return together if summed[1] <= gain * summed[0] and _copy_bytes(problem, together) <= MOST_COPIED else apart


def _copy_bytes(problem: Problem, of: Blocked) -> int:
    """Of what the windows lie in."""
    lines = of.problem.input_size[:2] if of.forward else problem.output_size[:2]
    return problem.itemsize * math.prod((problem.batch, of.channels, *lines, of.width))


def _taps_as_channels(problem: Problem) -> Problem:
    """The same convolution, of an input with a line for each of the output, the channels of all taps along H in its pixels."""
    return problem.replace(
        in_channels=problem.kernel_size[1] * problem.in_channels,
        input_size=(problem.input_size[0], problem.output_size[1], problem.input_size[2]),
        kernel_size=(problem.kernel_size[0], 1, problem.kernel_size[2]),
        stride=(problem.stride[0], 1, problem.stride[2]),
        padding=(*problem.padding[:2], 0, 0, *problem.padding[4:]),
        dilation=(problem.dilation[0], 1, problem.dilation[2]),
    )


def _blocked(problem: Problem, pixels: int, taps_h: int) -> Blocked:
    if taps_h > 1:
        problem = _taps_as_channels(problem)
    (inputs, outputs), read, made = (problem.input_size[2], problem.output_size[2]), problem.in_channels, problem.out_channels
    reach, stride, front = problem.dilation[2] * (problem.kernel_size[2] - 1), problem.stride[2], problem.padding[4]
    line, count, role, item = inputs, outputs, 0, problem.itemsize
    forward = taps_h > 1 or problem.pass_ == "forward" or (problem.pass_ == "wgrad" and (stride > 1 or read <= made))
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
    vectors = channels == read and line % whole == 0 and problem.layouts[role] == CHANNELS_LAST
    copied = taps_h > 1 or front != 0 or width > line or not vectors
    wide, window = pixels * made, length * channels
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
    largest = max(map(math.prod, values.shapes))
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
        taps_h=taps_h,
        front=front,
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
        copy = _copy_bytes(problem, of)
        copies, moved, launches = copy, copy + item * math.prod(read), 1
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
    windows = _windows(problem, of, operands.input if of.forward else operands.grad)
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


def _windows(problem: Problem, of: Blocked, tensor: torch.Tensor) -> torch.Tensor:
    """(N, pixels of a window x channels, D, H, blocks), which overlap, of a tensor (N, channels, D, H, W)."""
    copied = of.copied or not aligned(tensor)
    lines = _copied(problem, of, tensor) if copied else tensor.permute(0, 2, 3, 4, 1)
    (n, d, h), inner = lines.stride()[:3], of.problem
    window = inner.in_channels if of.forward else inner.out_channels
    shape = (lines.shape[0], window, *lines.shape[1:3], inner.input_size[2])
    return lines.as_strided(shape, (n, 1, d, h, of.step * of.channels))


def _copied(problem: Problem, of: Blocked, tensor: torch.Tensor) -> torch.Tensor:
    """(N, D, lines, pixels, channels), with zeros where there is nothing of a tensor (N, channels, D, H, W)."""
    lines, taps = tensor.shape[3], ONE_TAP
    if of.taps_h > 1:
        lines = of.problem.input_size[1]
        taps = Taps(of.taps_h, -problem.padding[2], problem.stride[1], problem.dilation[1])
    return gathered(tensor, (lines, of.width, of.channels), -of.front, taps, index64=problem.index64)


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
    each parity class along W its own pixels of the block do, through its own taps, the last one first. Taps along H are
    those of the matrix, or of its channels.
    """
    inner, (kernel_d, kernel_h, kernel_w), dilation = of.problem, problem.kernel_size, problem.dilation[2]
    stride, filters, columns = problem.stride[2], problem.out_channels, inner.in_channels
    line = columns if of.taps_h == 1 else problem.in_channels  # from a tap along H to the next
    plane = math.prod(inner.kernel_size[1:]) * columns
    row = kernel_d * plane
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
                (pixel, row, plane, line, tap, 1),
                matrix.storage_offset() + at,
            ),
        )
        for which, pixels, taps, pixel, tap, at in parts
    ]
