"""The host's side of the kernels: descriptors, layouts, grids. To be imported only where Gluon is as they need it."""

from __future__ import annotations

import functools
import itertools
import math

import torch
import triton.language as tl

from ...problem import CHANNELS_LAST, Operands, Problem
from ..base import CHAIN
from ..implicit_gemm import dense
from ..launching import GRID_LIMIT, launch_kernel
from ..tma import _KNOWN_LAUNCHES, _gather_launch, _readable, _wgrad_launch
from ..tma.descriptors import Described, of_view, of_weight, of_whole
from ..tma.geometry import MOST_VIEWS, View, Views, views
from .class_configs import LineDgradConfig, axes, first_cells
from .configs import BrickConfig, corners, im2col_tiles, one_chain
from .gather import gather_ring
from .gluon import TensorDescriptor, TensorDescriptorIm2Col, gl
from .line_configs import (
    LINE,
    MOST_PARTS,
    MOST_STRIDED,
    MOST_VIEWS_ALONG_W,
    W_STAGES,
    LineConfig,
    LineWgradConfig,
    spacing,
)
from .line_dgrad import line_dgrad_ring
from .line_wgrad import line_wgrad_ring
from .lines import line_ring
from .wgrad import wgrad_ring

_MULTIPROCESSORS = 132  # of an H100 SXM and an H200: for launches that are only compiled
_SWIZZLED = 64  # 16-bit elements of a row of shared memory that are swizzled together, the most
_COLUMNS = 256  # of one matrix instruction, the most
_ROWS = 128  # of two warpgroups, one above the other
_AT_ONCE = 128 * 64  # elements of a wide tile that are written at once: more spill with a residual and gelu
_BRICKS = 6  # place of the number of bricks among the arguments of :func:`_gather_launch`
_VECTOR = 8  # 16-bit elements of one store


def gather(
    problem: Problem, operands: Operands, config: BrickConfig, target: torch.Tensor, end: tuple, im2col: bool = False
) -> None:
    """forward and dgrad: every brick of the result, or every row of as many pixels, gathers from its taps."""
    x, w = _gathered(problem, operands)
    of_w, of_xs = _of_bricks(problem, config, im2col, x.stride())
    xs = [described and described.of(x) for described in of_xs]
    tiles, arguments, options = _gather_arguments(problem, config, im2col)
    given = (target, operands.bias, of_w.of(w), *xs, *arguments, tiles, *end)
    launch_kernel(gather_ring, _grid(target, tiles), given, options)


def lines(
    config: LineConfig, problem: Problem, operands: Operands, brick: BrickConfig, target: torch.Tensor, end
) -> None:
    """forward and dgrad: a line is read once for every tap along it."""
    x, w = _gathered(problem, operands)
    of_ws, of_xs = _of_lines(problem, config, x.stride())
    ws, xs = ([described and described.of(whose) for described in of] for of, whose in ((of_ws, w), (of_xs, x)))
    tiles, arguments, options = _line_arguments(problem, config)
    grid = _grid(target, tiles)
    launch_kernel(line_ring, grid, (target, operands.bias, *ws, *xs, *arguments, tiles, *end), options)


def line_dgrad(
    config: LineDgradConfig, problem: Problem, operands: Operands, brick: BrickConfig, target: torch.Tensor, end
) -> None:
    """dgrad with a stride: a line is read once for all parity classes."""
    grad, w = _gathered(problem, operands)
    of_w, of_grad = _of_classes(problem, config, grad.stride())
    tiles, arguments, options = _line_dgrad_arguments(problem, config)
    given = (target, operands.bias, of_w.of(w), of_grad.of(grad), *arguments, tiles, *end)
    launch_kernel(line_dgrad_ring, _grid(target, tiles), given, options)


def wgrad(problem: Problem, operands: Operands, config: BrickConfig, target: torch.Tensor) -> None:
    """wgrad: for each tap, filters x pixels times pixels x channels; the bricks are shared out among the splits."""
    x, grad = _readable(operands.input), _readable(operands.grad)
    read = views(problem, config.brick)
    if sum(math.prod(view.taps) for view in read.views) < problem.taps:  # what meets only padding has no gradient
        target.zero_()
    of_grad, of_xs = _of_wgrad(problem, config, grad.stride(), x.stride())
    grad = of_grad.of(grad)
    for view, of_x in zip(read.views, of_xs, strict=True):
        tiles, arguments, options = _wgrad_arguments(problem, config, view, read)
        launch_kernel(wgrad_ring, _grid(target, tiles), (target, grad, of_x.of(x), *arguments, tiles), options)


def line_wgrad(
    config: LineWgradConfig, problem: Problem, operands: Operands, brick: BrickConfig, target: torch.Tensor
) -> None:
    """wgrad: the lines of all columns are shared out among the splits."""
    x, grad = _readable(operands.input), _readable(operands.grad)
    of_grads, of_xs = _of_line_wgrad(problem, config, brick.brick, grad.stride(), x.stride())
    grads, xs = ([described and described.of(whose) for described in of] for of, whose in ((of_grads, grad), (of_xs, x)))
    tiles, arguments, options = _line_wgrad_arguments(problem, config)
    launch_kernel(line_wgrad_ring, _grid(target, tiles), (target, *xs, *grads, *arguments, tiles), options)


def _gathered(problem: Problem, operands: Operands) -> tuple[torch.Tensor, torch.Tensor]:
    """What forward and dgrad read: pixels and weight."""
    return _readable(operands.grad if problem.pass_ == "dgrad" else operands.input), dense(operands.weight)


# Descriptors of tensors of these strides, as many as a kernel takes.

Several = list[Described | None]


def _up_to(most: int, found: list[Described]) -> Several:
    return [*found, *[None] * (most - len(found))]


def _role(problem: Problem) -> int:
    """Of what forward and dgrad gather from."""
    return 2 if problem.pass_ == "dgrad" else 0


@functools.lru_cache(maxsize=_KNOWN_LAUNCHES)
def _of_bricks(
    problem: Problem, config: BrickConfig, im2col: bool, strides: tuple[int, ...]
) -> tuple[Described, Several]:
    read, block = views(problem, config.brick), (*config.brick, config.block_k)
    if read.views:
        xs = [of_view(problem, _role(problem), strides, view, read.stride, block) for view in read.views]
    else:  # every tap meets padding: nothing of it is read, it gives the type
        xs = [of_whole(problem, _role(problem), strides, block)]
    xs = [_walked(problem, x) if im2col else _swizzled(x) for x in xs]
    return _swizzled(of_weight(problem, config.block_n, config.block_k)), _up_to(MOST_VIEWS, xs)


@functools.lru_cache(maxsize=_KNOWN_LAUNCHES)
def _of_lines(problem: Problem, config: LineConfig, strides: tuple[int, ...]) -> tuple[Several, Several]:
    by_n, by_k = config.parts
    step = (1, 1, problem.stride[2])  # of dgrad 1: with a stride it goes by classes
    role = _role(problem)
    read = _strided(problem.shapes[role][2:], step)
    xs = [_swizzled(of_view(problem, role, strides, view, step, (*config.line, k))) for view in read for k in by_k]
    ws = [_swizzled(of_weight(problem, n, k)) for n in by_n for k in by_k]
    return _up_to(MOST_PARTS**2, ws), _up_to(MOST_PARTS * MOST_VIEWS_ALONG_W, xs)


@functools.lru_cache(maxsize=_KNOWN_LAUNCHES)
def _of_classes(problem: Problem, config: LineDgradConfig, strides: tuple[int, ...]) -> tuple[Described, Described]:
    grad = of_whole(problem, 2, strides, (*config.line, config.block_k))
    return _swizzled(of_weight(problem, config.block_n, config.block_k)), _swizzled(grad)


@functools.lru_cache(maxsize=_KNOWN_LAUNCHES)
def _of_wgrad(
    problem: Problem, config: BrickConfig, grad_strides: tuple[int, ...], x_strides: tuple[int, ...]
) -> tuple[Described, list[Described]]:
    grad = of_whole(problem, 2, grad_strides, (*config.brick, config.block_k))
    read, block = views(problem, config.brick), (*config.brick, config.block_n)
    return _swizzled(grad), [_swizzled(of_view(problem, 0, x_strides, view, read.stride, block)) for view in read.views]


@functools.lru_cache(maxsize=_KNOWN_LAUNCHES)
def _of_line_wgrad(
    problem: Problem, config: LineWgradConfig, pixels: tuple, grad_strides: tuple[int, ...], x_strides: tuple[int, ...]
) -> tuple[Several, Several]:
    step = (problem.stride[0], 1, problem.stride[2])
    read = _strided(problem.shapes[0][2:], step)
    xs = [_swizzled(of_view(problem, 0, x_strides, view, step, (*pixels, config.rows))) for view in read]
    grads = [_swizzled(of_whole(problem, 2, grad_strides, (*pixels, n))) for n in config.parts]
    return _up_to(MOST_PARTS, grads), _up_to(MOST_STRIDED, xs)


def _strided(sizes: tuple[int, ...], step: tuple[int, int, int]) -> tuple[View, ...]:
    """Every so many positions (d, h, w) of a volume, from each of the first on."""
    found = []
    for offset in itertools.product(*map(range, step)):
        sides = zip(sizes, offset, step, strict=True)
        found.append(View(offset, tuple(-(-(size - at) // by) for size, at, by in sides), (), (), ()))
    return tuple(found)


def _weight_block(problem: Problem, n: int, k: int) -> tuple[int, int]:
    return (k, n) if problem.pass_ == "dgrad" else (n, k)


@functools.lru_cache(maxsize=_KNOWN_LAUNCHES)
def _gather_arguments(problem: Problem, config: BrickConfig, im2col: bool) -> tuple[int, tuple, dict]:
    """(tiles, arguments behind the descriptors, options)."""
    (programs, classes), arguments, options = _gather_launch(problem, config)
    pixels = math.prod(config.brick)
    if im2col:
        number = im2col_tiles(problem, pixels)
        programs = programs // math.prod(arguments[_BRICKS]) * number
        arguments = (*arguments[:_BRICKS], (1, 1, 1, number), *arguments[_BRICKS + 1 :])
        options = options | {"BRICK": (1, 1, 1, pixels)}
    last = config.splits > 1 or problem.result_layout == CHANNELS_LAST
    at_once = _AT_ONCE if last else _AT_ONCE // 2  # where every channel has an address of its own
    layouts = dict(
        W_RING=_shared(_weight_block(problem, config.block_n, config.block_k)),
        X_RING=_shared((pixels, config.block_k)),
        SUMS=_sums(config.block_n, pixels),
        WRITTEN=_written(config.block_n, last, across=32 if im2col else 8),
        WIDTH=at_once // config.block_n if config.block_n >= _ROWS else pixels,
        IM2COL=im2col,
    )
    return programs * classes, (*arguments, problem.groups), _ring(gather_ring, options, config) | layouts


@functools.lru_cache(maxsize=_KNOWN_LAUNCHES)
def _line_arguments(problem: Problem, config: LineConfig) -> tuple[int, tuple, dict]:
    """The same, of lines."""
    brick = config.brick
    _, arguments, options = _gather_launch(problem, brick)
    kernel, y_size, _, _, _, y_strides, _, reduced, produced, _ = arguments[4:]
    dilation = spacing(problem)
    low = problem.padding[::2]
    if problem.pass_ == "dgrad":  # the last tap reads what is farthest below
        start = tuple(p - (k - 1) * by for p, k, by in zip(low, kernel, dilation, strict=True))
    else:
        start = tuple(-p for p in low)
    first_w, along_w = divmod(start[2], problem.stride[2])
    start = (*start[:2], along_w)
    tiles_by = config.tiles(problem)
    last = problem.result_layout == CHANNELS_LAST
    by_n, by_k = config.parts
    sums = tuple(_sums(LINE, n, 1) for n in by_n)
    layouts = dict(
        W_RINGS=tuple(_shared(_weight_block(problem, n, k)) for n in by_n for k in by_k),
        X_RINGS=tuple(_shared((LINE, k)) for k in by_k),
        SUMS=sums,
        PIXELS=tuple(gl.DotOperandLayout(0, layout, 2) for layout in sums),
        WRITTEN=tuple(_written(n, last, 1) for n in by_n),
    )
    sizes = dict(
        PLANES=config.planes, LINES=config.lines, STRIDE=problem.stride, SAMPLES=config.samples, TAPS_H=problem.kernel_size[1],
        N_PARTS=by_n, K_PARTS=by_k,
    )  # fmt: skip
    options = _ring(line_ring, options, brick) | sizes | layouts | {"num_warps": 4, "W_STAGES": W_STAGES}
    x_depth = (problem.output_size if problem.pass_ == "dgrad" else problem.input_size)[0]
    _, halo = config.halo(problem)
    arguments = (
        x_depth, start, first_w, halo, kernel, y_size, tiles_by, dilation, y_strides, reduced, produced, problem.groups
    )  # fmt: skip
    return math.prod(tiles_by) * config.tiles_n(problem) * problem.groups, arguments, options


@functools.lru_cache(maxsize=_KNOWN_LAUNCHES)
def _line_dgrad_arguments(problem: Problem, config: LineDgradConfig) -> tuple[int, tuple, dict]:
    """The same, of all parity classes at once."""
    brick = config.brick
    _, arguments, options = _gather_launch(problem, brick)
    _, y_size, _, _, _, y_strides, _, reduced, produced, _ = arguments[4:]
    tiles_by = config.tiles(problem)
    sums = _sums(LINE, config.block_n, 1)
    layouts = dict(
        W_RING=_shared(_weight_block(problem, config.block_n, config.block_k)),
        X_RING=_shared((LINE, config.block_k)),
        SUMS=sums,
        PIXELS=gl.DotOperandLayout(0, sums, 2),
        WRITTEN=_written(config.block_n, problem.result_layout == CHANNELS_LAST, 1),
    )
    sizes = dict(LINES=config.lines, AXES=axes(problem), STAYS=config.stays(problem), W_STAGES=config.w_stages)
    options = _ring(line_dgrad_ring, options, brick) | sizes | layouts | {"num_warps": 4}
    arguments = (first_cells(problem), y_size, tiles_by, y_strides, reduced, produced, problem.groups, config.w_stages - 1)
    return math.prod(tiles_by) * config.tiles_n(problem) * problem.groups, arguments, options


@functools.lru_cache(maxsize=_KNOWN_LAUNCHES)
def _wgrad_arguments(problem: Problem, config: BrickConfig, view: View, read: Views) -> tuple[int, tuple, dict]:
    """The same, of the taps of one view."""
    (tiles, _), arguments, options = _wgrad_launch(problem, config, view, read)
    pixels = math.prod(config.brick)
    layouts = dict(
        GRAD_RING=_shared((pixels, config.block_k)),
        X_RING=_shared((pixels, config.block_n)),
        SUMS=_sums(config.block_k, config.block_n),
    )
    options = _ring(wgrad_ring, options, config) | layouts
    return tiles, arguments, options | {"CHAIN": 0 if one_chain(problem, config) else options["CHAIN"]}


@functools.lru_cache(maxsize=_KNOWN_LAUNCHES)
def _line_wgrad_arguments(problem: Problem, config: LineWgradConfig) -> tuple[int, tuple, dict]:
    """The same, of lines."""
    columns, height = config.columns(problem)
    dilation, (by_d, by_h, by_w), (d, _, h, _, w, _) = spacing(problem), problem.stride, problem.padding
    start, first = (-d % by_d, -(h % by_h), -w % by_w), (-d // by_d, -w // by_w)
    sums = tuple(_sums(LINE, n, 1) for n in config.parts)
    options = dict(
        INDEX=tl.int64 if problem.index64 else tl.int32,
        CHAIN=CHAIN // LINE,
        BRICK=config.line,
        TAPS=problem.kernel_size,
        STRIDE=problem.stride,
        ROWS=config.rows,
        N_PARTS=config.parts,
        STAGES=config.num_stages,
        G_STAGES=config.num_stages + problem.kernel_size[1],
        X_RING=_shared((LINE, config.rows)),
        G_RINGS=tuple(_shared((LINE, n)) for n in config.parts),
        SUMS=sums,
        PIXELS=tuple(gl.DotOperandLayout(0, layout, 2) for layout in sums),
        WRITTEN=gl.BlockedLayout([4, 1], [16, 2], [1, 4], [0, 1]),  # 16 bytes along the channels
        num_warps=4,
    )
    arguments = (
        start, first, h // by_h, by_h, _ROWS // config.rows, dilation, columns, height, math.prod(columns) * height,
        math.prod(problem.weight_shape), problem.group_in, problem.group_out, config.splits,
    )  # fmt: skip
    return math.prod(config.tiles(problem)) * problem.groups * config.splits, arguments, options


def _ring(kernel, options: dict, config: BrickConfig) -> dict:
    """Options of engine tma's kernel as those of this engine's: what both take, and the stages of the ring."""
    kept = {name: value for name, value in options.items() if name in kernel.arg_names}
    return kept | {"STAGES": config.num_stages, "num_warps": config.num_warps}


def _grid(target: torch.Tensor, tiles: int) -> tuple[int, int]:
    """A program for each multiprocessor, and for no more than there are tiles."""
    if tiles > GRID_LIMIT[0]:
        raise ValueError(f"{tiles} tiles: more than {GRID_LIMIT[0]}")
    return min(tiles, _multiprocessors(target.device)), 1


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else _MULTIPROCESSORS


@functools.cache
def _shared(block: tuple[int, ...]):
    """Layout of a block in shared memory as the copy engine writes and the matrix instructions read it."""
    return gl.NVMMASharedLayout(2 * min(block[-1], _SWIZZLED), element_bitwidth=16, rank=len(block))


def _swizzled(described: Described) -> Described:
    """Triton's descriptor as Gluon's."""
    of, block = described.descriptor, described.descriptor.block_shape
    return described.with_(TensorDescriptor(of.base, of.shape, of.strides, block, _shared(tuple(block))))


def _walked(problem: Problem, described: Described) -> Described:
    """A descriptor of bricks as one of rows of as many pixels, (d, n, h, w, channel), as gather.py walks through it."""
    of = described.descriptor
    (n, d, *inner), (by_n, by_d, *by) = of.shape, of.strides
    *brick, channels = of.block_shape
    block = [math.prod(brick), channels]
    lower, upper = corners(problem)
    return described.with_(
        TensorDescriptorIm2Col(
            of.base, [d, n, *inner], [by_d, by_n, *by], block, _shared(tuple(block)),
            element_strides=[1, 1, *problem.stride[1:], 1], pixel_box_lower_corner=[0, *lower],
            pixel_box_upper_corner=[0, *upper],
        )
    )  # fmt: skip


@functools.cache
def _sums(rows: int, columns: int, warpgroups: int = 2):
    """Layout of float32 sums: two warpgroups one above the other, or side by side where the rows are too few; or one."""
    beside = warpgroups if rows < _ROWS else 1
    shape = [16, min(columns // beside, _COLUMNS), 16]
    warps = [4 * warpgroups // beside, beside]
    return gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=warps, instr_shape=shape)


@functools.cache
def _written(channels: int, last: bool, warpgroups: int = 2, across: int = 8):
    """Layout in which a tile of (channels, pixels) is written: along its channels if they are last, else its pixels.

    ``across``: pixels side by side in a warp; the more there are, the fewer a thread has to know the place of.
    """
    if last:
        lanes = min(32, channels // _VECTOR)
        return gl.BlockedLayout([_VECTOR, 1], [lanes, 32 // lanes], [1, 4 * warpgroups], [0, 1])
    return gl.BlockedLayout([1, 1], [32 // across, across], [4 * warpgroups, 1], [1, 0])
