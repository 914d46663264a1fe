"""Cases that the engines have to compute: data in every layout, seeded fuzzing, and the one way to run and judge them.

Every operand lies in a buffer whose slack is NaN, every ``torch.empty`` of the engine is NaN, and operands are compared
bit by bit afterwards: reading outside, leaving a result unwritten and writing to an operand all fail.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType

import tolerances
import torch

from triton_conv3d import engines, reference
from triton_conv3d.engines.base import Config
from triton_conv3d.problem import Operands, Problem, Triple, describe, device_name, interpreted
from triton_conv3d.workload import PRECISIONS

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")  # the latter: in the interpreter
DTYPES = ("float16", "bfloat16", "float32")
_NAN = torch.tensor(0x7FFFFFFF, dtype=torch.int32).view(torch.float32)  # as NVIDIA's arithmetic writes it
_SLACK = 64  # NaN elements before and after an operand; keeps 16-byte alignment
_LONGEST_STEPS = (20, 40, 80, 200)  # programs x loop steps of a fuzz case: a few milliseconds each, in the interpreter
_EXACT_ACTIVATIONS = ("none", "relu", "leaky_relu")  # of integers, with a slope that is a power of 2
_READ = {"forward": ("input", "weight"), "dgrad": ("grad", "weight"), "wgrad": ("grad", "input")}


if interpreted():  # half of the interpreter's time; test_memory_safety.py turns the check on
    from triton.runtime import interpreter

    interpreter.interpreter_builder.options = interpreter.InterpreterOptions(sanitize_overflow=False)


@dataclass(frozen=True)
class Case:
    """One call of an engine. Its repr is Python: a failing one goes into a list as it is printed.

    Shapes as in :class:`Problem`; ``layouts`` of the two operands that the pass reads, names of :data:`LAYOUTS`, in
    the order input, weight, grad; ``residual``: None or its layout; ``channels_last`` of the result; ``exact``: integers
    for T1, else random for T2.
    """

    pass_: str
    batch: int = 1
    in_channels: int = 4
    out_channels: int = 4
    input_size: Triple = (4, 4, 4)
    kernel_size: Triple = (3, 3, 3)
    stride: Triple = (1, 1, 1)
    padding: tuple[int, int, int, int, int, int] = (0, 0, 0, 0, 0, 0)
    dilation: Triple = (1, 1, 1)
    groups: int = 1
    bias: bool = False
    residual: str | None = None
    activation: str = "none"
    negative_slope: float = 0.25
    dtype: str = "float32"
    precision: str = "ieee"
    layouts: tuple[str, str] = ("channels_last", "channels_last")
    channels_last: bool = True
    exact: bool = True
    seed: int = 0

    def replace(self, **changes) -> Case:
        return dataclasses.replace(self, **changes)

    def geometry(self) -> Problem:
        """The problem of dense, aligned operands: shapes and sizes, before there are tensors."""
        device, arch = device_name(DEVICE)
        return Problem(
            device=device,
            arch=arch,
            residual=self.residual is not None,
            **{f.name: getattr(self, f.name) for f in dataclasses.fields(Case) if f.name in _PROBLEM_FIELDS},
        )

    def __repr__(self) -> str:
        """Without what equals the default."""
        shown = [
            f"{f.name}={getattr(self, f.name)!r}"
            for f in dataclasses.fields(self)
            if f.name == "pass_" or getattr(self, f.name) != f.default
        ]
        return f"Case({', '.join(shown)})"

    @property
    def id(self) -> str:
        """Short, for pytest."""
        cross = "x".join
        p = self.geometry()
        return f"{self.pass_}-{cross(map(str, p.input_shape))}-{self.out_channels}-k{cross(map(str, self.kernel_size))}"


_PROBLEM_FIELDS = {f.name for f in dataclasses.fields(Problem)} - {"layouts", "residual"}


def _buffer(elements: int, dtype: torch.dtype, offset: int = 0) -> torch.Tensor:
    """``elements`` in the midst of NaN."""
    whole = torch.full((elements + 2 * _SLACK + offset,), math.nan, dtype=dtype, device=DEVICE)
    return whole[_SLACK + offset : _SLACK + offset + elements]


def _in_order(values: torch.Tensor, order: tuple[int, ...], offset: int = 0) -> torch.Tensor:
    """The same values, dense in memory with the dimensions in this order, the slowest first."""
    permuted = values.permute(order)
    dense = _buffer(values.numel(), values.dtype, offset).view(permuted.shape).copy_(permuted)
    return dense.permute(tuple(order.index(dim) for dim in range(5)))


_LAST, _FIRST = (0, 2, 3, 4, 1), (0, 1, 2, 3, 4)


def _cut(values: torch.Tensor, order: tuple[int, ...], dims: dict[int, tuple[int, int, int]]) -> torch.Tensor:
    """The values as a slice of a larger tensor: {dim: (before, step, after)}; what lies between them is NaN."""
    shape, cut = list(values.shape), [slice(None)] * 5
    for dim, (before, step, after) in dims.items():
        covered = max(0, (shape[dim] - 1) * step + 1)
        cut[dim] = slice(before, before + covered, step)
        shape[dim] = before + covered + after
    base = _in_order(torch.full(shape, math.nan, dtype=values.dtype, device=values.device), order)
    view = base[tuple(cut)]
    view.copy_(values)
    return view


def _expanded(values: torch.Tensor, *dims: int) -> torch.Tensor:
    """Stride 0 along these dimensions: their first value everywhere."""
    one = values[tuple(slice(0, 1) if dim in dims else slice(None) for dim in range(5))]
    return _in_order(one, _LAST).expand(values.shape)


LAYOUTS = {
    "channels_last": lambda v: _in_order(v, _LAST),
    "contiguous": lambda v: _in_order(v, _FIRST),
    "unaligned": lambda v: _in_order(v, _LAST, offset=1),
    "unaligned_contiguous": lambda v: _in_order(v, _FIRST, offset=1),
    "channel_slice": lambda v: _cut(v, _LAST, {1: (1, 1, 3)}),
    "aligned_channel_slice": lambda v: _cut(v, _LAST, {1: (8, 1, 8)}),
    "cropped": lambda v: _cut(v, _LAST, {2: (1, 1, 1), 3: (0, 1, 2), 4: (2, 1, 1)}),
    "every_second": lambda v: _cut(v, _LAST, {0: (0, 2, 0), 3: (0, 2, 0), 4: (1, 2, 0)}),
    "cropped_contiguous": lambda v: _cut(v, _FIRST, {2: (1, 1, 0), 4: (1, 2, 1)}),
    "channel_step": lambda v: _cut(v, _LAST, {1: (0, 2, 1)}),
    "permuted": lambda v: _in_order(v, (4, 2, 0, 3, 1)),
    "scrambled": lambda v: _in_order(v, (3, 1, 4, 0, 2)),
    "expanded_batch": lambda v: _expanded(v, 0),
    "expanded_pixels": lambda v: _expanded(v, 2, 4),
    "expanded_channels": lambda v: _expanded(v, 1),
    "scalar": lambda v: _expanded(v, 0, 1, 2, 3, 4),
}


def make(case: Case) -> tuple[Problem, Operands]:
    """The tensors of a case and the problem that they pose."""
    p = case.geometry()
    generator = torch.Generator().manual_seed(case.seed)
    dtype = getattr(torch, case.dtype)
    limit = tolerances.largest_integer(p) if case.exact else 0

    def values(shape) -> torch.Tensor:
        if case.exact:
            data = torch.randint(-limit, limit + 1, shape, generator=generator)
        else:
            data = torch.randn(shape, generator=generator)
        return data.to(device=DEVICE, dtype=dtype)

    tensors = {
        name: LAYOUTS[layout](values(getattr(p, f"{'output' if name == 'grad' else name}_shape")))
        for name, layout in zip(sorted(_READ[case.pass_], key=Operands._fields.index), case.layouts, strict=True)
    }
    if case.bias:
        bias = _buffer(case.out_channels, dtype)
        tensors["bias"] = bias.copy_(values((case.out_channels,)))
    if case.residual:
        tensors["residual"] = LAYOUTS[case.residual](values(p.output_shape))
    operands = Operands(**tensors, negative_slope=case.negative_slope)
    return pose(case, operands), operands


def pose(case: Case, operands: Operands) -> Problem:
    """The problem of a case over these operands."""
    p = case.geometry()
    return describe(
        case.pass_, operands, p.input_shape, p.weight_shape, case.stride, case.padding, case.dilation, case.groups,
        case.channels_last, case.precision, case.activation,
    )  # fmt: skip


@contextlib.contextmanager
def allocating(fresh: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """Hand out ``fresh(tensor)`` wherever Python code asks torch for uninitialised memory."""
    places = [(torch, name) for name in ("empty", "empty_strided", "empty_like")]
    places += [(torch.Tensor, name) for name in ("new_empty", "new_empty_strided")]
    before = [getattr(owner, name) for owner, name in places]

    def replacement(function):
        return lambda *args, **kwargs: fresh(function(*args, **kwargs))

    for (owner, name), function in zip(places, before, strict=True):
        setattr(owner, name, replacement(function))
    try:
        yield
    finally:
        for (owner, name), function in zip(places, before, strict=True):
            setattr(owner, name, function)


def poison(tensor: torch.Tensor) -> torch.Tensor:
    """NaN everywhere; integers get their largest value."""
    return tensor.fill_(math.nan if tensor.is_floating_point() else torch.iinfo(tensor.dtype).max)


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    """A copy of the whole storage behind a tensor."""
    return torch.tensor([], dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage()).clone()


def run(
    case: Case,
    engine: str | ModuleType,
    config: Config | None = None,
    fresh: Callable[[torch.Tensor], torch.Tensor] = poison,
) -> torch.Tensor:
    """Compute a case and judge everything about the result. Raises AssertionError that carries the case.

    Args:
        engine: its name, or the module itself.
        config: the smallest that the engine offers, if not given.
        fresh: what uninitialised memory is replaced with.
    """
    problem, operands = make(case)
    engine = engines.get(engine) if isinstance(engine, str) else engine
    assert engine.supports(problem) is None, f"{engine.supports(problem)}\n{case}"
    config = config or engine.configs(problem)[-1]
    before = [None if t is None else _bytes(t) for t in operands.tensors]
    try:
        with allocating(fresh):
            result = engine.launch(problem, operands, config)
        judge(case, problem, operands, result, getattr(config, "splits", 1), engine.NAME)
        for name, tensor, copy in zip(Operands._fields[:5], operands.tensors, before, strict=True):
            assert tensor is None or torch.equal(_bytes(tensor), copy), f"{name} was modified"
    except Exception as error:
        error.args = (f"{error}\n{engine.NAME}, {config}\n{case!r}", *error.args[1:])
        raise
    return result


def judge(
    case: Case, problem: Problem, operands: Operands, result: torch.Tensor, splits: int = 1, engine: str = ""
) -> None:
    """Shape, dtype, strides, and T1 or T2."""
    like = torch.empty(problem.result_shape, dtype=problem.torch_dtype, memory_format=problem.memory_format)
    assert result.shape == like.shape and result.dtype == like.dtype and result.device == DEVICE
    assert result.stride() == like.stride(), f"strides {result.stride()}, torch would return {like.stride()}"
    roundings = problem.taps if engine == "aten" and case.dtype != "float32" else 1
    if problem.fused and engine in ("aten", "matmul"):  # before the residual, and before the activation
        roundings += 2
    transforms = engine == "aten" and DEVICE.type == "cuda"  # cuDNN has algorithms by FFT and Winograd
    if case.exact and roundings == 1 and case.activation in _EXACT_ACTIVATIONS and not transforms:
        tolerances.check_exact(result, problem, operands)
        return
    tolerances.check_bound(
        result,
        problem,
        operands,
        splits=splits,
        tensor_cores=DEVICE.type == "cuda" and (case.dtype != "float32" or case.precision != "ieee"),
        truncated=engine != "implicit_gemm",
        roundings=roundings,
    )


def check_footprint(
    engine: ModuleType,
    problem: Problem,
    operands: Operands,
    which: int,
    beyond: Callable[[tuple[int, ...]], tuple | None],
) -> None:
    """One NaN in the operand that the pass reads first or second (``which``) touches only what it is multiplied into.

    Everything else stays exact. ``beyond(where)``: what of the result a NaN at ``where`` may touch besides.
    """
    tensor = [tensor for tensor in operands.tensors if tensor is not None][which]
    clean = reference.compute(problem, operands)
    offers, touched = engine.configs(problem), 0
    for position in (0, tensor.numel() // 2, tensor.numel() * 7 // 11, tensor.numel() - 1):  # corners, and within
        where = tuple(int(i) for i in torch.unravel_index(torch.tensor(position), tensor.shape))
        value = tensor[where].item()
        tensor[where] = _NAN
        expected, more = reference.compute(problem, operands).isnan(), beyond(where)
        result = engine.launch(problem, operands, offers[position % len(offers)])
        # Of wgrad torch multiplies padding too, and so may we, but for what is gathered
        least = _multiplied(problem, operands, tensor, where) if problem.pass_ == "wgrad" else expected
        tensor[where] = value
        allowed = expected.clone()
        if more is not None:
            allowed[more] = True
        assert bool((result.isnan() >= least).all()) and bool((result.isnan() <= allowed).all())
        assert torch.equal(result[~result.isnan()].double(), clean[~result.isnan()])
        touched += int(least.sum())
    assert touched


def _multiplied(problem: Problem, operands: Operands, tensor: torch.Tensor, where: tuple[int, ...]) -> torch.Tensor:
    """Which elements of the result this one of ``tensor`` is multiplied into, by the definition."""
    one = torch.zeros_like(tensor)
    one[where] = 1
    ones = Operands(*operands[:3]).map(lambda other: one if other is tensor else torch.ones_like(other))
    return reference.compute(problem, ones) > 0


def check_base_between_vectors(engine: ModuleType, case: Case) -> None:
    """Of a dgrad, every config: a gradient whose address is no multiple of 16 gives the same bits."""
    problem, operands = make(case)
    expected = engine.launch(problem, operands, engine.configs(problem)[0])
    moved = torch.empty(operands.grad.numel() + 1, dtype=operands.grad.dtype, device=DEVICE)[1:]
    moved = moved.as_strided(operands.grad.shape, operands.grad.stride()).copy_(operands.grad)
    assert moved.data_ptr() % 16
    for config in engine.configs(problem):
        assert torch.equal(engine.launch(problem, operands._replace(grad=moved), config), expected)


def engines_for(problem: Problem) -> list[str]:
    """Names of the engines that support a problem; those on trial have tests of their own, and may hang."""
    return [
        name
        for name, engine in engines.available().items()
        if engine.supports(problem) is None and not getattr(engine, "TRIAL", False)
    ]


# ------------------------------------------------------------------------------------------------ fuzzing


def seeds(in_ci: int, long: int) -> list:
    """For pytest: the first are run by every run of the tests, the others by the long one alone."""
    import pytest

    return [*range(in_ci), *(pytest.param(seed, marks=pytest.mark.long) for seed in range(in_ci, long))]


def fuzz_case(pass_: str, seed: int) -> tuple[Case, str, Config]:
    """What a seed tries: a case, an engine and one of its configs.

    Even seeds have channels in eights, odd seeds have not; every second pair of seeds is exact, the others are random.
    The interpreter computes each within a second.
    """
    rng = random.Random(f"{pass_}-{seed}")
    longest = rng.choices(_LONGEST_STEPS, weights=(8, 6, 3, 1))[0]
    while True:
        case = _draw(rng, pass_, aligned=seed % 2 == 0, exact=seed // 2 % 2 == 0, seed=seed)
        plan = case and _plan(rng, case.geometry(), longest)
        if plan and engines.get(plan[0]).supports(make(case)[0]) is None:  # where its operands lie, too
            return case, *plan


def _draw(rng: random.Random, pass_: str, aligned: bool, exact: bool, seed: int) -> Case | None:
    def triple(*choices: int) -> Triple:
        if rng.random() < 0.5:
            return (rng.choice(choices),) * 3
        return tuple(rng.choice(choices) for _ in range(3))

    groups = rng.choice((1, 1, 1, 1, 2, 3, 4))
    if aligned:
        inner, outer = (rng.choice((8, 8, 16, 24, 40)) for _ in range(2))
    else:
        inner, outer = (rng.choice((1, 1, 2, 3, 4, 5, 7, 9, 12, 17, 33)) for _ in range(2))
    if groups > 1 and not aligned and rng.random() < 0.5:  # depthwise, with a channel multiplier
        groups, inner, outer = groups * 3, 1, rng.choice((1, 2))
    kernel = triple(1, 2, 3, 3, 4, 5)
    padding = tuple(rng.choice((0, 0, 1, 1, 2, 3)) for _ in range(3))
    padding = tuple(itertools.chain.from_iterable((p, p) for p in padding))
    if rng.random() < 0.3:
        padding = tuple(rng.choice((0, 1, 2, 3)) for _ in range(6))
    dtype = rng.choice(DTYPES)
    reads = _READ[pass_]
    case = Case(
        pass_,
        batch=rng.choice((1, 1, 2, 3)),
        in_channels=inner * groups,
        out_channels=outer * groups,
        input_size=tuple(rng.randint(1, 7) for _ in range(3)),
        kernel_size=kernel,
        stride=triple(1, 1, 1, 2, 2, 3, 5),
        padding=padding,
        dilation=triple(1, 1, 1, 2, 3),
        groups=groups,
        bias=pass_ == "forward" and rng.random() < 0.5,
        dtype=dtype,
        precision=rng.choice(PRECISIONS) if dtype == "float32" else "ieee",
        layouts=tuple(rng.choice(("channels_last", *LAYOUTS)) for _ in reads),
        channels_last=rng.random() < 0.5,
        exact=exact,
        seed=seed,
    )
    return case if math.prod(case.stride) <= 30 and small(case.geometry()) else None


def small(problem: Problem) -> bool:
    """Whether there is a result, few enough products for the interpreter, and exact integers for them."""
    if min(problem.output_size) < 1 or problem.flops > 2**24:
        return False
    try:
        return tolerances.largest_integer(problem) > 0
    except ValueError:
        return False


def _plan(rng: random.Random, problem: Problem, longest: int) -> tuple[str, Config] | None:
    """An engine and a config that takes at most so many steps, if there is one."""
    names = engines_for(problem)
    name = "implicit_gemm" if rng.random() < 0.85 else rng.choice(names)
    engine = engines.get(name)
    offers = list(engine.configs(problem))
    if not hasattr(engine, "work"):
        return name, rng.choice(offers)
    if name == "implicit_gemm" and rng.random() < 0.3:
        offers = [dataclasses.replace(offer, splits=rng.choice((2, 3, 5))) for offer in offers]
    works = [engine.work(problem, offer) for offer in offers]
    cheap = [
        offer
        for offer, work in zip(offers, works, strict=True)
        if work.programs * (2 + work.iterations) <= longest and work.programs * work.iterations * work.flops <= 2**27
    ]
    return (name, rng.choice(cheap)) if cheap else None


def fuzz(pass_: str, seed: int) -> None:
    """Run the case of a seed; a failure prints the one line that reproduces it."""
    case, name, config = fuzz_case(pass_, seed)
    try:
        run(case, name, config)
    except Exception as error:
        again = f"again: python -m pytest -m '' 'tests/test_fuzz.py::test_fuzz[{pass_}-{seed}]'"
        error.args = (f"{error}\n{again}", *error.args[1:])
        raise
