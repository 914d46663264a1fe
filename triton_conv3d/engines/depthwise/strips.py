"""What one lane of a depthwise problem computes: strips of outputs, and their registers and instructions by design."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

from ...problem import CONTIGUOUS, STRIDED, VECTOR_BYTES, VIEW, Problem, Triple, met_taps
from . import axes as _axes

SLIDE, ROWS = "slide", "rows"  # the kernels of forward and dgrad; wgrad always slides
_ROW_TAPS = 8  # that the kernel "rows" holds at one time
_TAP_REGISTERS = 112  # of a thread, that the sums of wgrad may take
_MOST_PLANES = 8  # of the gradient, that are open at one time in wgrad

# Instructions of a thread, fitted to the SASS of sm_90 (Triton 3.6 and 3.9) within a tenth or so.
_LOAD = 3.0  # a load with its address and its mask,
_ZERO = 0.6  # and for every register that it fills
_STORE = 3.0
_STEP = 40.0  # of the loop over planes itself
_TAP_LOAD, _TAP_STEP = 2.0, 20.0  # the same in the loop over rows of taps
_WEIGHT = 2.5  # a vector of weights there

# As plain functions: Triton's compile-time ones look at each argument before they run.
ring_size, strip_step = _axes.ring_size.fn, _axes.strip_step.fn
positions = functools.lru_cache(maxsize=4096)(_axes.positions.fn)


@dataclass(frozen=True)
class Axes:
    """What all configs of a problem have in common: its dimensions, and how lanes run along them.

    depth, height, width: the three dimensions as :mod:`.axes` takes them.
    channels, size: of what lanes run over: the result, in wgrad the gradient.
    last: lanes run along channels, for these are dense in the operand in whose order they run: the input, in dgrad the
        gradient. unit: channels that lanes take together, as one vector.
    taps: those that meet more than padding; count: of them; products: of them, for one output.
    planes: of the input for one plane of the result. ring: planes of the result that are open at one time.
    copies: bytes of the operands that are copied for their layout.
    """

    dgrad: bool
    wgrad: bool
    depth: Triple
    height: tuple[int, int, int, int]
    width: tuple[int, int, int, int]
    channels: int
    size: Triple
    last: bool
    unit: int
    taps: Triple
    count: int
    products: float
    planes: float
    ring: int
    copies: int


@functools.lru_cache(maxsize=4096)
def axes(problem: Problem) -> Axes:
    met, stride, dilation = met_taps(problem), problem.stride, problem.dilation
    dgrad = problem.pass_ == "dgrad"
    depth = (met.kernel[0], stride[0], dilation[0])
    height, width = ((met.kernel[i], stride[i], dilation[i], met.pad[i]) for i in (1, 2))
    read, channels = problem.in_channels, problem.out_channels
    if dgrad:
        read, channels = channels, read
    operands = {"forward": (0,), "dgrad": (2,), "wgrad": (0, 2)}[problem.pass_]
    last = channels_dense(problem.layouts[2 if dgrad else 0], read)
    return Axes(
        dgrad=dgrad,
        wgrad=problem.pass_ == "wgrad",
        depth=depth,
        height=height,
        width=width,
        channels=channels,
        size=problem.input_size if dgrad else problem.output_size,
        last=last,
        unit=math.gcd(VECTOR_BYTES // problem.itemsize, channels) if last else 1,
        taps=met.kernel,
        count=met.count,
        products=met.count / (math.prod(stride) if dgrad else 1),
        planes=1 / stride[0] if dgrad else stride[0],
        ring=ring_size(depth, dgrad),
        copies=sum(problem.itemsize * math.prod(problem.shapes[i]) for i in operands if problem.layouts[i] == STRIDED),
    )


def channels_dense(layout: str, channels: int) -> bool:
    """Whether an operand is read with its channels as the fastest dimension. A single channel is read along W."""
    return layout == VIEW or (layout != CONTIGUOUS and channels > 1)


def parts_of_row(problem: Problem) -> tuple[int, int, int]:
    """(taps of one part, parts, input columns from part to part) of a row of taps in the kernel "rows".

    In dgrad a part has to lead to whole steps of the gradient.
    """
    at = axes(problem)
    taps, stride, dilation = at.width[:3]
    unit = stride // math.gcd(stride, dilation) if at.dgrad else 1
    part = min(taps, max(_ROW_TAPS // unit, 1) * unit)
    columns = part * dilation
    return part, taps // part, -columns // stride if at.dgrad else columns


@functools.lru_cache(maxsize=4096)
def block_of_taps(problem: Problem, vector: int) -> tuple[Triple, Triple]:
    """(taps of one program of wgrad, blocks of them): whole rows of taps before planes, as many as registers hold."""
    at, most = axes(problem), max(1, _TAP_REGISTERS // vector)
    depth, height, width = at.taps
    columns = min(width, most)
    rows = min(height, max(1, most // columns))
    whole = depth * height * width <= most and at.ring <= _MOST_PLANES
    block = depth if whole else 1, -(-height // -(-height // rows)), -(-width // -(-width // columns))
    return block, tuple(-(-taps // part) for taps, part in zip(at.taps, block, strict=True))


class Strip:
    """Neighbouring outputs along H and W that one lane computes with one of the kernels.

    rows, columns: of the input, that they meet; group, groups: where rows are dense, columns of one load, and loads of
        one row. part: taps of a row that the kernel "rows" holds.
    """

    def __init__(self, problem: Problem, kernel: str, rows: int, columns: int):
        self.problem, self.kernel, self.axes = problem, kernel, axes(problem)
        at, self.outputs, self.item = self.axes, rows * columns, problem.itemsize
        met = positions(columns, at.width, at.dgrad)
        self.rows = len(positions(rows, at.height, at.dgrad)) if kernel == SLIDE else 1
        self.columns = len(met)
        if not at.last:
            size = (problem.output_size if at.dgrad else problem.input_size)[2]
            self.group = math.gcd(VECTOR_BYTES // self.item, size, strip_step(columns, at.width, at.dgrad))
            self.groups = len({column // self.group for column in met})
        self.part = parts_of_row(problem)[0] if kernel == ROWS else 0

    def registers(self, vector: int) -> float:
        """Of a thread of so many lanes, for weights, accumulators and inputs."""
        at = self.axes
        if self.kernel == ROWS:
            return vector * (self.outputs + self.part + self.columns)
        loaded = self.rows * self.columns * self.item / 4 * max(1, at.planes)
        taps, ring = at.count, at.ring
        if at.wgrad:
            block = block_of_taps(self.problem, vector)[0]
            taps, ring = math.prod(block), ring_size((block[0], *at.depth[1:]), False)
        return vector * (taps + ring * self.outputs + loaded)

    def _loads(self, vector: int) -> tuple[float, int]:
        """(loads, registers that one fills) of a lane for one row of inputs; loads are shared by a thread's lanes."""
        if not self.axes.last:
            return self.groups, -(-self.group * self.item // 4)
        vector = min(vector, self.axes.unit)
        return self.columns / vector, -(-vector * self.item // 4)

    def instructions(self, vector: int) -> float:
        """Of a thread of so many lanes for one output (in wgrad: for one pixel of the gradient) and channel."""
        at, outputs, half, taps = self.axes, self.outputs, self.item == 2, self.axes.products
        loads, words = self._loads(vector)
        total = taps + half / 2 + _STORE / min(vector, at.unit)
        if self.kernel == ROWS:
            width = at.taps[2]
            repeats = taps * (self.problem.stride[2] if at.dgrad else 1) / width  # rows of taps
            row = self.columns * half + loads * (_TAP_LOAD + _ZERO * words) + width * _WEIGHT / min(vector, 4)
            return total + repeats * (row / outputs + _TAP_STEP / (outputs * vector))
        plane = self.rows * (self.columns * half + loads * (_LOAD + _ZERO * words)) * at.planes / outputs
        repeats = 1
        if at.wgrad:
            repeats = math.prod(block_of_taps(self.problem, vector)[1])
            plane += half + loads / self.columns * (_LOAD + _ZERO * words)
        return total + repeats * (plane + _STEP / (outputs * vector))
