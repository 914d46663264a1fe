"""Problem: one pass of a 3-D convolution, fully described.

Shapes follow torch: input (N, C, D, H, W), weight (K, C/groups, kd, kh, kw), output (N, K, Do, Ho, Wo).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

PASSES = ("forward", "dgrad", "wgrad")
NO_ACTIVATION = "none"
ACTIVATIONS = (NO_ACTIVATION, "relu", "leaky_relu", "silu", "gelu", "gelu_tanh", "sigmoid", "tanh", "hardswish")
CHANNELS_LAST, CONTIGUOUS, VIEW, STRIDED = "channels_last", "contiguous", "view", "strided"
VECTOR_BYTES = 16  # the widest load of one thread on every GPU that Triton targets
INT32_BYTES = 2**31 - 1  # beyond this byte extent a kernel needs 64-bit offsets

Triple = tuple[int, int, int]


class Operands(NamedTuple):
    """What one pass reads: forward input, weight, bias and residual; dgrad grad and weight; wgrad grad and input.

    ``negative_slope`` is of a leaky_relu: a number of the call, as tensors are, and no part of the problem.
    """

    input: torch.Tensor | None = None
    weight: torch.Tensor | None = None
    grad: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    residual: torch.Tensor | None = None
    negative_slope: float = 0.01

    @property
    def tensors(self) -> tuple[torch.Tensor | None, ...]:
        return self[:5]

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> Operands:
        """The same with ``function(tensor)`` for every tensor."""
        return Operands(*(None if t is None else function(t) for t in self.tensors), self.negative_slope)


@dataclass(frozen=True)
class Problem:
    """One convolution pass. Frozen and hashable; two equal problems have the same plan.

    Attributes:
        pass_: ``forward``, ``dgrad`` (gradient of the input) or ``wgrad`` (gradient of the weight).
        batch, in_channels, out_channels: N, C, K.
        input_size, kernel_size, stride, dilation: in the order depth, height, width.
        padding: zeros before and after each dimension: (front, back, top, bottom, left, right).
        bias: a bias is added in this pass (forward only).
        residual: a tensor of the result's shape is added after the bias (forward only).
        activation: of :data:`ACTIVATIONS`, applied last, before the result is rounded (forward only).
        dtype: of input, weight and output, as ``float16``.
        precision: of the products of float32: ``ieee``, ``tf32`` or ``tf32x3``; other types are always ``ieee``.
            (Of what engine rounded hands on, whose operands hold tf32 already, ``rounded``.)
        layouts: of input, weight and output: ``channels_last``, ``contiguous``, ``view`` (channels are dense and
            last, the other strides free) or ``strided``.
        alignment: bytes that divide the address of every pixel of the operands as kernels read them, at most 16.
        index64: some tensor extends over 2 GiB, or taps reach as far into its padding, so that offsets need 64 bits.
        device, arch: the GPU's name and architecture (``sm_90``, ``gfx942``), or ``cpu`` and ``cpu`` / ``interpreter``.
    """

    pass_: str
    batch: int
    in_channels: int
    out_channels: int
    input_size: Triple
    kernel_size: Triple
    stride: Triple = (1, 1, 1)
    padding: tuple[int, int, int, int, int, int] = (0, 0, 0, 0, 0, 0)
    dilation: Triple = (1, 1, 1)
    groups: int = 1
    bias: bool = False
    residual: bool = False
    activation: str = NO_ACTIVATION
    dtype: str = "float16"
    precision: str = "ieee"
    layouts: tuple[str, str, str] = (CHANNELS_LAST, CHANNELS_LAST, CHANNELS_LAST)
    alignment: int = VECTOR_BYTES
    index64: bool = False
    device: str = "cpu"
    arch: str = "cpu"

    def __hash__(self) -> int:  # computed once: a problem is looked up far more often than it is made
        return self._hash

    @functools.cached_property
    def _hash(self) -> int:
        return hash(self._values())

    def _values(self) -> tuple:
        return tuple(getattr(self, field.name) for field in dataclasses.fields(self))

    def __reduce__(self):  # without what was cached: another process hashes strings differently
        return Problem, self._values()

    @functools.cached_property
    def output_size(self) -> Triple:
        """(Do, Ho, Wo), as torch computes them; an impossible geometry gives sizes below 1."""
        return tuple(
            (size + self.padding[2 * i] + self.padding[2 * i + 1] - self.dilation[i] * (self.kernel_size[i] - 1) - 1)
            // self.stride[i]
            + 1
            for i, size in enumerate(self.input_size)
        )

    @functools.cached_property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @functools.cached_property
    def itemsize(self) -> int:
        return self.torch_dtype.itemsize

    @functools.cached_property
    def taps(self) -> int:
        return math.prod(self.kernel_size)

    @functools.cached_property
    def group_in(self) -> int:
        """Input channels of one group."""
        return self.in_channels // self.groups

    @functools.cached_property
    def group_out(self) -> int:
        """Output channels of one group."""
        return self.out_channels // self.groups

    @property
    def input_shape(self) -> tuple[int, ...]:
        return (self.batch, self.in_channels, *self.input_size)

    @property
    def weight_shape(self) -> tuple[int, ...]:
        return (self.out_channels, self.group_in, *self.kernel_size)

    @property
    def output_shape(self) -> tuple[int, ...]:
        return (self.batch, self.out_channels, *self.output_size)

    @functools.cached_property
    def result_shape(self) -> tuple[int, ...]:
        """Shape of what this pass computes."""
        return self.shapes[self.result_role]

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Of input, weight and output: by role."""
        return self.input_shape, self.weight_shape, self.output_shape

    @property
    def result_role(self) -> int:
        return {"forward": 2, "dgrad": 0, "wgrad": 1}[self.pass_]

    @functools.cached_property
    def result_elements(self) -> int:
        return math.prod(self.result_shape)

    @property
    def result_layout(self) -> str:
        return self.layouts[self.result_role]

    @functools.cached_property
    def memory_format(self) -> torch.memory_format:
        """Memory format of what this pass computes."""
        return torch.channels_last_3d if self.result_layout == CHANNELS_LAST else torch.contiguous_format

    @functools.cached_property
    def pixels(self) -> int:
        """Output pixels of the whole batch, N * Do * Ho * Wo."""
        return self.batch * math.prod(self.output_size)

    @property
    def flops(self) -> int:
        """Multiplications and additions of the pass, padding counted as work (the field's convention)."""
        return 2 * self.pixels * self.out_channels * self.group_in * self.taps

    @functools.cached_property
    def min_bytes(self) -> int:
        """Bytes of input, weight, output, bias and residual, each once: what any kernel has to move."""
        added = self.out_channels * self.bias + math.prod(self.output_shape) * self.residual
        return self.itemsize * (sum(map(math.prod, self.shapes)) + added)

    @functools.cached_property
    def fused(self) -> bool:
        """More than a convolution with its bias: what is done to the sums before they are rounded."""
        return self.residual or self.activation != NO_ACTIVATION

    @property
    def on_tensor_cores(self) -> bool:
        """Whether they can multiply what this package's kernels do: all but float32 in full precision."""
        return self.dtype != "float32" or self.precision != "ieee"

    @property
    def empty(self) -> bool:
        """Nothing to multiply: some dimension of input, weight or output is 0."""
        return self.flops == 0

    @functools.cached_property
    def key(self) -> str:
        """Readable and unique: equal keys mean equal problems."""
        return ";".join(f"{name}={_plain(value)}" for name, value in self.to_dict().items())

    def to_dict(self) -> dict:
        """Plain values, ready for JSON. :meth:`from_dict` is the way back."""
        return {field.name: _listed(getattr(self, field.name)) for field in dataclasses.fields(self)}

    @classmethod
    def from_dict(cls, values: dict) -> Problem:
        """Raises ValueError for other fields than those of :meth:`to_dict`; values are taken as they are."""
        names = {field.name for field in dataclasses.fields(cls)}
        if set(values) != names:
            raise ValueError(f"a problem has the fields {sorted(names)}, got {sorted(values)}")
        return cls(**{name: tuple(v) if isinstance(v, list) else v for name, v in values.items()})

    def replace(self, **changes) -> Problem:
        return dataclasses.replace(self, **changes)

    def empty_result(self, device: torch.device) -> torch.Tensor:
        """Uninitialised memory for what this pass computes, in the format that torch would return."""
        return torch.empty(self.result_shape, dtype=self.torch_dtype, device=device, memory_format=self.memory_format)

    def __str__(self) -> str:
        """One line a person reads: ``forward 2x32x128x128x128 -> 64, kernel 3x3x3, ...``."""
        cross = "x".join
        sizes, kernel = cross(map(str, self.input_shape)), cross(map(str, self.kernel_size))
        text = f"{self.pass_} {sizes} -> {self.out_channels}, kernel {kernel}"
        if self.stride != (1, 1, 1):
            text += f", stride {cross(map(str, self.stride))}"
        if any(self.padding):
            low, high = self.padding[::2], self.padding[1::2]
            text += f", padding {cross(map(str, low))}" + ("" if low == high else f"/{cross(map(str, high))}")
        if self.dilation != (1, 1, 1):
            text += f", dilation {cross(map(str, self.dilation))}"
        if self.groups != 1:
            text += f", groups {self.groups}"
        text += ", residual" * self.residual
        if self.activation != NO_ACTIVATION:
            text += f", {self.activation}"
        return f"{text}, {self.dtype}" + (f" {self.precision}" if self.dtype == "float32" else "")


@dataclass(frozen=True)
class Taps:
    """The kernel without the taps that only ever meet padding: its first tap, its size, and the padding before it."""

    first: Triple
    kernel: Triple
    pad: Triple

    @property
    def count(self) -> int:
        return math.prod(self.kernel)

    def of(self, weight: torch.Tensor) -> torch.Tensor:
        """These taps of a weight, or of its gradient: the tensor itself where they are all of it, else a view."""
        if tuple(weight.shape[2:]) == self.kernel:
            return weight
        for dim, (first, count) in enumerate(zip(self.first, self.kernel, strict=True), start=2):
            weight = weight.narrow(dim, first, count)
        return weight


def _outputs_of(ahead: int, size: int, outputs: int, stride: int) -> tuple[int, int]:
    """First and last output of a tap through which output o meets position o * stride - ahead of so many; none: they cross."""
    return max(0, -(-ahead // stride)), min(outputs - 1, (size - 1 + ahead) // stride)


@functools.lru_cache(maxsize=4096)
def live_depth(problem: Problem, planes: int = 1, plane: int = 1) -> float:
    """Share of the taps along depth that a tile meets on average, of ``planes`` planes of the result: others read padding.

    For forward and dgrad; of a strided dgrad the planes are neighbours in their parity class. Tiles begin with every
    ``planes``-th plane of a sample. With ``plane``, the pixels of a plane, ``planes`` is the number of a tile's pixels, which
    may begin within a plane.
    """
    size, outputs, stride, before = problem.input_size[0], problem.output_size[0], problem.stride[0], problem.padding[0]
    live = walked = 0
    for tap in range(problem.kernel_size[0]):
        ahead, rows = before - tap * problem.dilation[0], outputs
        first, last = _outputs_of(ahead, size, outputs, stride)
        found = last >= first
        if problem.pass_ == "dgrad":  # input position o * stride - ahead is one of every stride-th
            first, last = first + -ahead // stride, last + -ahead // stride
            rows = -(-(size - -ahead % stride) // stride)
        live += ((last * plane + plane - 1) // planes - first * plane // planes + 1) * found
        walked += -(-rows * plane // planes)
    return live / walked if walked else 1.0


@functools.lru_cache(maxsize=4096)
def met_taps(problem: Problem) -> Taps:
    first, kernel, pad = [], [], []
    for size, outputs, taps, stride, dilation, before in zip(
        problem.input_size, problem.output_size, problem.kernel_size, problem.stride, problem.dilation,
        problem.padding[::2], strict=True,
    ):  # fmt: skip
        reach = [_outputs_of(before - t * dilation, size, outputs, stride) for t in range(taps)]
        met = [t for t, (start, end) in enumerate(reach) if start <= end] or [0]
        low = min(met[0], before // dilation)
        first.append(low)
        kernel.append(met[-1] - low + 1)
        pad.append(before - low * dilation)
    return Taps(tuple(first), tuple(kernel), tuple(pad))


def trimmed(problem: Problem) -> tuple[Problem, Taps] | None:
    """The same convolution with a smaller kernel and less padding, and the taps that it keeps; None where it has all.

    Left out are taps at the ends of a dimension that only ever meet its padding: of a single frame under a kernel of
    depth 3 all but those in the middle. They add zeros in forward and dgrad, and have zeros for a gradient.
    """
    met, kernel, padding = met_taps(problem), [], []
    for size, first, count, dilation, before, after in zip(
        problem.kernel_size, met.first, met.kernel, problem.dilation, problem.padding[::2], problem.padding[1::2],
        strict=True,
    ):  # fmt: skip
        last = min(size - first - count, after // dilation)  # padding is not below 0
        kernel.append(size - first - last)
        padding += [before - first * dilation, after - last * dilation]
    if tuple(kernel) == problem.kernel_size:
        return None
    return problem.replace(kernel_size=tuple(kernel), padding=tuple(padding)), Taps(met.first, tuple(kernel), met.pad)


def _listed(value):
    return list(value) if isinstance(value, tuple) else value


def _plain(value) -> str:
    return "x".join(map(str, value)) if isinstance(value, list) else str(value)


def layout_of(tensor: torch.Tensor) -> str:
    """One of the four layouts; where several fit (one channel, one pixel), the one that kernels read directly."""
    if tensor.is_contiguous(memory_format=torch.channels_last_3d):
        return CHANNELS_LAST
    if tensor.is_contiguous():
        return CONTIGUOUS
    return VIEW if tensor.stride(1) == 1 or tensor.size(1) == 1 else STRIDED


def _pixel_alignment(tensor: torch.Tensor, layout: str) -> int:
    """Bytes (a power of two, at most 16) that divide the address of every pixel once channels are last."""
    item = tensor.element_size()
    if layout in (CONTIGUOUS, STRIDED):  # kernels read a fresh channels-last copy
        return math.gcd(VECTOR_BYTES, tensor.size(1) * item)
    steps = [tensor.stride(dim) * item for dim in (0, 2, 3, 4) if tensor.size(dim) > 1]
    return math.gcd(VECTOR_BYTES, tensor.data_ptr(), *steps)


def _byte_extent(tensor: torch.Tensor) -> int:
    """Bytes that a tensor spans, or a dense copy of it if that is more (expanded tensors)."""
    if tensor.numel() == 0:
        return 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return max(last + 1, tensor.numel()) * tensor.element_size()


def _far(problem: Problem, tensor: torch.Tensor, largest: int) -> bool:
    """Whether 32 bits may not count the elements to what the first tap of a pixel reads, or from there to the last tap.

    Kernels add the two, and either may be far in the padding where the other is not.
    """
    _, c, *size = tensor.shape
    steps = map(max, tensor.stride()[2:], (c * size[1] * size[2], c * size[2], c))  # of the tensor, or of a copy
    axes = zip(problem.kernel_size, problem.dilation, size, steps, strict=True)
    reach = sum((taps - 1) * dilation * step for taps, dilation, extent, step in axes if extent > 1)
    return largest // problem.itemsize + reach > INT32_BYTES


@functools.cache
def device_name(device: torch.device) -> tuple[str, str]:
    """(name, architecture) of a device: ``("NVIDIA H200", "sm_90")``, or ``("cpu", "interpreter")``."""
    if device.type != "cuda":
        return device.type, "interpreter" if interpreted() else device.type
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return properties.name, properties.gcnArchName.split(":")[0]
    return properties.name, f"sm_{properties.major}{properties.minor}"


@functools.cache
def interpreted() -> bool:
    """Whether Triton kernels run in its interpreter (``TRITON_INTERPRET=1``), on CPU tensors."""
    try:
        import triton
    except ImportError:
        return False
    return bool(triton.knobs.runtime.interpret)


def describe(
    pass_: str,
    operands: Operands,
    input_shape: Sequence[int],
    weight_shape: Sequence[int],
    stride: Triple,
    padding: tuple[int, ...],
    dilation: Triple,
    groups: int,
    channels_last: bool,
    precision: str,
    activation: str = NO_ACTIVATION,
) -> Problem:
    """The problem of one pass over real tensors.

    Args:
        operands: what the pass reads; see :class:`Operands`.
        input_shape: (N, C, D, H, W). weight_shape: (K, C/groups, kd, kh, kw).
        channels_last: memory format of the result.
        precision: of float32 products; ignored for other types.
        activation: of :data:`ACTIVATIONS`.
    """
    tensors = [t for t in (operands.input, operands.weight, operands.grad) if t is not None]
    result = CHANNELS_LAST if channels_last else CONTIGUOUS
    layouts = tuple(result if t is None else layout_of(t) for t in (operands.input, operands.weight, operands.grad))
    device, arch = device_name(tensors[0].device)
    problem = Problem(
        pass_=pass_,
        batch=int(input_shape[0]),
        in_channels=int(input_shape[1]),
        out_channels=int(weight_shape[0]),
        input_size=tuple(map(int, input_shape[2:])),
        kernel_size=tuple(map(int, weight_shape[2:])),
        stride=tuple(stride),
        padding=tuple(padding),
        dilation=tuple(dilation),
        groups=groups,
        bias=operands.bias is not None,
        residual=operands.residual is not None,
        activation=activation,
        dtype=str(tensors[0].dtype).removeprefix("torch."),
        precision=precision if tensors[0].dtype == torch.float32 else "ieee",
        layouts=layouts,
        alignment=min(_pixel_alignment(t, layout_of(t)) for t in tensors),
        device=device,
        arch=arch,
    )
    largest = max([*map(_byte_extent, tensors), math.prod(problem.result_shape) * problem.itemsize])
    gathered = operands.grad if pass_ == "dgrad" else operands.input
    return problem.replace(index64=largest > INT32_BYTES or _far(problem, gathered, largest))
