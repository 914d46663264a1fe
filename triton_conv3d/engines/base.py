"""What every engine offers. An engine is a module with these names; it knows nothing of tuning.

    NAME                                   "implicit_gemm"
    supports(problem) -> str | None        None if it can compute the problem, else the reason why not
    configs(problem) -> tuple[Config, ...] valid configs, the safest (smallest) last; empty only if unsupported
    launch(problem, operands, config)      the result tensor, in problem.memory_format; raises on failure. A forward
                                           pass ends with the residual and the activation: in the kernel (epilogue.py,
                                           :func:`residual_and_slope`), or by :func:`finish`
    memory(problem, config) -> Memory      bytes that it needs beyond operands and result
    MEASURED = ("sm_90",)                  architectures whose results are published, if its code is for certain chips:
                                           on others no prediction makes it a plan, only a measurement there
                                           (of a config with the field ``engine``, that engine's holds too)
    TRIAL = True                           if it has run on no GPU yet: it is measured only once a process of its own has
                                           tried it (`triton-conv3d try`), or where it is asked for; in the mode
                                           ``full`` also where it could not be tried
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.util
import math
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ..problem import NO_ACTIVATION, VECTOR_BYTES, Operands, Problem, interpreted
from .launching import GRID_LIMIT

CHAIN = 16_384  # products of one wgrad accumulator before they join a float32 total: bounds the drift of tensor cores
WORKSPACE_LIMIT = 64 * 2**20  # bytes of float32 partial sums
READ = {"forward": (0, 1), "dgrad": (1, 2), "wgrad": (0, 2)}  # roles of what a pass reads: 0 input, 1 weight, 2 output
LEAST_TRANSPOSED = 2**20  # elements: a smaller copy takes less time than launching a kernel from Python
HAS_TRITON = importlib.util.find_spec("triton") is not None  # which exists for Linux only
MOST_COPIED = 2**30  # bytes of copies that only save time: a GPU's memory has better uses
_switching = threading.RLock()  # torch's switches


@dataclass(frozen=True)
class Config:
    """The knobs of one engine: frozen, comparable, self-describing. Engines derive their own."""

    def whole(self) -> Config:
        """What its compiled kernel depends on: every knob but those that are run-time values, as the number of splits."""
        return self.replace(splits=1) if hasattr(self, "splits") else self

    def to_dict(self) -> dict:
        return dataclasses.asdict(self)

    def replace(self, **knobs) -> Config:
        """The same with other knobs, faster than dataclasses.replace: a ranking makes a hundred."""
        config = object.__new__(type(self))
        config.__dict__.update(self.__dict__, **knobs)
        return config

    def __str__(self) -> str:
        return " ".join(f"{name}={value}" for name, value in self.to_dict().items()) or "-"


@dataclass(frozen=True)
class Memory:
    """Bytes beyond operands and result: scratch of the engine, and copies of operands in another layout."""

    workspace: int = 0
    copies: int = 0


@dataclass(slots=True)
class Order:
    """How programs that run at once share what they read: tiles in rows and columns, a group of rows at a time.

    All programs of a row read the same ``row_bytes`` in a step, those of a column ``column_bytes``. Of the former, only
    one in ``reuse`` is new to the program: the others were read for an earlier tap.
    """

    rows: int
    columns: int
    group: int
    row_bytes: float
    column_bytes: float
    reuse: float = 1.0


@dataclass(slots=True)  # not frozen, which doubles what one costs: a ranking makes a hundred
class Work:
    """One launch as pure geometry: what a cost model needs to predict its time."""

    programs: int  # thread blocks
    iterations: int  # main-loop steps of one program
    flops: float  # of one step, the tile's padding included
    bytes_read: float  # of one step
    bytes_written: float  # of one program
    num_warps: int
    shared_bytes: int  # of one program
    extra_bytes: float = 0.0  # moved for copies of operands and for partial sums
    launches: int = 1
    tensor_cores: bool = True
    sums: int = 0  # float32 accumulators of one program; 0: of an engine that counts its instructions as flops
    vector_bytes: int = VECTOR_BYTES  # of one load
    stages: int = 3  # of the pipeline
    order: Order | None = None  # None: what programs share is unknown, and taken to come from L2
    instructions: float = 0.0  # of one warp in one step; 0: as many as an implicit GEMM of so many loads has
    product: tuple[int, int] = (0, 0)  # rows and columns of one product of tensor cores; (0, 0): unknown
    tiles: tuple[float, float] = (1, 1)  # of rows and of columns that a step loads for its products
    in_registers: bool = False  # rows go there first, once for all products of sm_90 that read them
    operations: float = 20.0  # on tiles, of one step; as counted in a step of an implicit GEMM


def refused_by_kernels(problem: Problem) -> str | None:
    """Why no Triton kernel of this package can compute a problem; None if one might."""
    if problem.dtype not in ("float16", "bfloat16", "float32"):
        return f"no kernel for {problem.dtype}"
    if problem.arch == "cpu":
        return "CPU tensors need Triton's interpreter (TRITON_INTERPRET=1)"
    if problem.empty:
        return "nothing to multiply"
    if problem.pass_ == "dgrad" and math.prod(problem.stride) > GRID_LIMIT[1]:
        return f"stride {problem.stride} makes more than {GRID_LIMIT[1]} parity classes"
    return None


def dgrad_steps(stride: tuple[int, ...], dilation: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(steps in the gradient, steps in taps) of a position i of the input, dimension by dimension: it meets tap t at
    (i + padding - t * dilation) / stride, if that divides, and so every so many-th tap."""
    common = tuple(map(math.gcd, stride, dilation))
    back, taps = (tuple(a // b for a, b in zip(by, common, strict=True)) for by in (dilation, stride))
    return tuple(-step for step in back), taps


def aligned(tensor: torch.Tensor) -> bool:
    """Whether the base allows vectors: Triton proves a base aligned to 16 bytes or not at all."""
    return tensor.data_ptr() % VECTOR_BYTES == 0


def upcast(problem: Problem) -> bool:
    """The interpreter multiplies raw bits of bfloat16, and truncates to it: kernels then compute in float32."""
    return problem.dtype == "bfloat16" and interpreted()


@contextlib.contextmanager
def switched(owner: object, name: str, value: object) -> Iterator[None]:
    """Within the block one of torch's switches has this value; None: the one that it has.

    It is the same for all threads, of which autograd has one for each device: they take turns.
    """
    if value is None:
        yield
        return
    with _switching:
        before = getattr(owner, name)
        if value == before:
            yield
            return
        setattr(owner, name, value)
        try:
            yield
        finally:
            setattr(owner, name, before)


def in_format(tensor: torch.Tensor, memory_format: torch.memory_format, by_kernels: bool = True) -> torch.Tensor:
    """A volume with exactly the strides of a fresh one of this memory format; a copy only where elements have to move.

    ``by_kernels``: a large one by a kernel of this package, which may fail as any kernel may; else by torch.
    """
    wanted = format_strides(tensor.shape, memory_format)
    if tensor.stride() == wanted:
        return tensor
    if tensor.is_contiguous(memory_format=memory_format):  # torch is indifferent to some: of one channel, of one pixel
        return tensor.as_strided(tensor.shape, wanted)
    shared = _shared.copies if _shared.tensor is tensor else {}
    copy = shared.get(memory_format)
    if copy is None and by_kernels:
        copy = _transposed(tensor, memory_format)
    if copy is None:
        copy = torch.empty_strided(tensor.shape, wanted, dtype=tensor.dtype, device=tensor.device).copy_(tensor)
    shared[memory_format] = copy
    return copy


class _Shared(threading.local):
    """The tensor of a :class:`sharing`, if one is under way, and its copies by memory format."""

    tensor: torch.Tensor | None = None
    copies: dict[torch.memory_format, torch.Tensor]


_shared = _Shared()


class sharing:
    """Within the block :func:`in_format` copies this tensor once, and not for each pass that reads it.

    The copy takes memory until the block ends, or :func:`forget_copies` says that it is wanted elsewhere.
    """

    __slots__ = ("_tensor",)

    def __init__(self, tensor: torch.Tensor):
        self._tensor = tensor

    def __enter__(self) -> None:
        _shared.tensor, _shared.copies = self._tensor, {}

    def __exit__(self, *_) -> None:
        _shared.tensor, _shared.copies = None, {}


def forget_copies() -> None:
    """Of a :class:`sharing`, as none was made."""
    _shared.copies = {}


def _transposed(tensor: torch.Tensor, memory_format: torch.memory_format) -> torch.Tensor | None:
    """None where torch's copy is the faster one, or there is no kernel for it."""
    if tensor.numel() < LEAST_TRANSPOSED or not HAS_TRITON or (tensor.device.type == "cpu" and not interpreted()):
        return None
    from .transposing import transposed

    return transposed(tensor, memory_format == torch.channels_last_3d)


@functools.lru_cache(maxsize=4096)
def format_strides(shape: tuple[int, ...], memory_format: torch.memory_format) -> tuple[int, ...]:
    """Strides of ``torch.empty(shape, memory_format=memory_format)``, for the two formats of 5-D tensors."""
    n, c, d, h, w = (max(1, size) for size in shape)
    if memory_format == torch.channels_last_3d:
        return (d * h * w * c, 1, h * w * c, w * c, c)
    return (c * d * h * w, d * h * w, h * w, w, 1)


NO_EPILOGUE = (None, None)


def residual_and_slope(problem: Problem, operands: Operands) -> tuple[torch.Tensor | None, float | None]:
    """(residual, slope) as kernels take them: the residual has the strides of the result, by a copy if it must be."""
    if not problem.fused:
        return NO_EPILOGUE
    residual, slope = operands.residual, operands.negative_slope if problem.activation == "leaky_relu" else None
    if residual is None:
        return None, slope
    wanted = format_strides(problem.result_shape, problem.memory_format)
    sides = zip(residual.shape, residual.stride(), wanted, strict=True)
    same = all(ours == theirs for size, ours, theirs in sides if size > 1)
    return residual if same else in_format(residual, problem.memory_format), slope


def finish(problem: Problem, operands: Operands, result: torch.Tensor) -> torch.Tensor:
    """A fresh sum of products and bias with its residual and activation, in place by torch's own operations."""
    if operands.residual is not None:
        result.add_(operands.residual)
    return activate(result, problem.activation, operands.negative_slope, in_place=True)


def finish_bytes(problem: Problem) -> int:
    """Bytes that :func:`finish` moves: it reads and writes the result once for each of its steps."""
    passes = 3 * problem.residual + 2 * (problem.activation != NO_ACTIVATION)
    return passes * problem.itemsize * math.prod(problem.result_shape)


def activate(tensor: torch.Tensor, activation: str, negative_slope: float, in_place: bool = False) -> torch.Tensor:
    """torch's own function of one of :data:`..problem.ACTIVATIONS`."""
    if activation == NO_ACTIVATION:
        return tensor
    name, more = ("gelu", {"approximate": "tanh"}) if activation == "gelu_tanh" else (activation, {})
    slope = (negative_slope,) if activation == "leaky_relu" else ()
    return getattr(torch.ops.aten, name + "_" * in_place)(tensor, *slope, **more)
