"""A first, analytic model of a kernel's time: enough to rank candidates before anything is measured.

    time  = launches + copies + waves * (prologue + iterations * step) + writes, and not below the roofline
    step  = max(products, memory, latency)

Rates are the vendors' until measured ones replace them; every other constant is an assumption to be fitted.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import ModuleType

from ..engines.base import Config, Work, finish_bytes
from ..problem import CHANNELS_LAST, NO_ACTIVATION, Problem


@dataclass(frozen=True)
class Rates:
    """Of one GPU: multiprocessors (compute units), dense bf16 flop/s of all tensor cores, float32 flop/s without them,
    memory bytes/s, shared bytes of one multiprocessor."""

    units: int
    tensor: float
    fma: float
    bandwidth: float
    shared: int


# Data sheets; an entry holds for every device whose name contains its key.
RATES = {
    "A100": Rates(108, 312e12, 19.5e12, 1.6e12, 164 * 1024),
    "H100": Rates(132, 989e12, 67e12, 3.35e12, 228 * 1024),
    "H200": Rates(132, 989e12, 67e12, 4.8e12, 228 * 1024),
    "B200": Rates(148, 2250e12, 80e12, 8.0e12, 228 * 1024),
    "MI300X": Rates(304, 1307e12, 163e12, 5.3e12, 64 * 1024),
}
_UNKNOWN = RATES["A100"]  # any other GPU: the order of candidates depends on ratios, which are alike

_LAUNCH = 4e-6  # seconds of a launch on a busy stream
_PROLOGUE = 1.5e-6  # seconds before a program's first product, and for its last writes
_LATENCY = 0.25e-6  # seconds below which one step of the pipeline cannot go
_TENSOR_PART = 0.6  # of the tensor rate, that a pointer kernel reaches: 0.8 of a vendor's GEMM
_FMA_PART = 0.85  # of the issue rate, that a kernel without tensor cores reaches
_CACHED = 2.0  # times the bandwidth of memory, that tiles are read at: most reads hit the L2 cache
_REGISTERS = 128  # of one thread: bounds the programs that a multiprocessor holds
_REGISTER_FILE = 65_536

# Torch's own has no geometry to reason about: a part of the roofline. It is a guess, measured times replace it.
_ATEN_PART = 0.3  # cuDNN, channels last: 290 of 989 TFLOP/s have been reported on an H200
_ATEN_GROUPED_PART = 0.03  # with groups it is slower by an order of magnitude
_ATEN_OTHER_LAYOUT = 0.5  # of that, on contiguous volumes
_ATEN_BENCHMARK = 1.05  # what cuDNN's own search gains
_MATMUL_PART = 0.8  # the vendor's GEMM

# Seconds in Triton's interpreter, fitted to small layers: before and after the steps of a program, of an operation on
# tiles whatever their size, and what each element adds that is loaded.
_INTERPRETED_PROGRAM, _INTERPRETED_OPERATION, _INTERPRETED_ELEMENT = 6.5e-3, 1e-4, 2e-8


def rates(problem: Problem) -> Rates:
    """The rates of the problem's GPU, by its name."""
    return next((rates for name, rates in RATES.items() if name in problem.device), _UNKNOWN)


def predict(problem: Problem, engine: ModuleType, config: Config) -> float:
    """Seconds that this launch is expected to take."""
    gpu = rates(problem)
    work = engine.work(problem, config) if hasattr(engine, "work") else None
    if work is None:
        return _guess(problem, engine, config, gpu)
    if problem.arch == "interpreter":
        step = work.operations * _INTERPRETED_OPERATION + work.bytes_read / problem.itemsize * _INTERPRETED_ELEMENT
        return work.programs * (_INTERPRETED_PROGRAM + work.iterations * step)
    return max(_predicted(problem, work, gpu), roofline(problem, gpu))


def rank(
    problem: Problem, candidates: list[tuple[ModuleType, Config]]
) -> list[tuple[float, ModuleType, Config]]:
    """Candidates with their predicted seconds, the fastest first; ties keep their order."""
    timed = [(predict(problem, engine, config), engine, config) for engine, config in candidates]
    return sorted(timed, key=lambda item: item[0])


def _predicted(problem: Problem, work: Work, gpu: Rates) -> float:
    resident = min(gpu.shared // max(work.shared_bytes, 1), _REGISTER_FILE // (32 * work.num_warps * _REGISTERS))
    slots = gpu.units * max(1, resident)
    waves, rest = divmod(work.programs, slots)
    main = waves * _wave(problem, work, gpu, slots) + (_wave(problem, work, gpu, rest) if rest else 0.0)
    added = math.prod(problem.output_shape) * problem.itemsize * problem.residual
    writes = (work.extra_bytes + added + work.programs * work.bytes_written) / gpu.bandwidth
    # Small programs without tensor cores write while others of their multiprocessor read.
    return work.launches * _LAUNCH + (main + writes if work.tensor_cores else max(main, writes))


def _wave(problem: Problem, work: Work, gpu: Rates, programs: int) -> float:
    """Seconds of programs that run at once; the multiprocessor that holds the most of them is the last to end."""
    held = math.ceil(programs / gpu.units)
    part = _TENSOR_PART if work.tensor_cores else _FMA_PART
    products = held * work.flops * gpu.units / (part * _peak(problem, gpu, work.tensor_cores))
    memory = programs * work.bytes_read / (_CACHED * gpu.bandwidth)
    return _PROLOGUE + work.iterations * max(products, memory, _LATENCY)


def _peak(problem: Problem, gpu: Rates, tensor_cores: bool = True) -> float:
    """Products and additions a second; tf32 runs at half the rate of bf16, tf32x3 takes three of its products."""
    if not tensor_cores or problem.dtype not in ("float16", "bfloat16", "float32"):
        return gpu.fma
    if problem.dtype == "float32" and problem.precision == "ieee":
        return gpu.fma
    return gpu.tensor / {"tf32": 2, "tf32x3": 6}.get(problem.precision, 1)


def roofline(problem: Problem, gpu: Rates) -> float:
    """Seconds that no kernel can beat: the flops at the peak rate, or the minimal bytes at the memory's."""
    return max(problem.flops / _peak(problem, gpu), problem.min_bytes / gpu.bandwidth)


def _guess(problem: Problem, engine: ModuleType, config: Config, gpu: Rates) -> float:
    """For engines that launch what is not ours."""
    copies = (2 * engine.memory(problem, config).copies + finish_bytes(problem)) / gpu.bandwidth
    copies += _LAUNCH * (problem.residual + (problem.activation != NO_ACTIVATION))
    if engine.NAME == "matmul":
        return _LAUNCH + copies + roofline(problem, gpu) / _MATMUL_PART
    part = _ATEN_PART if problem.groups == 1 else _ATEN_GROUPED_PART
    if any(layout != CHANNELS_LAST for layout in problem.layouts) and not getattr(config, "channels_last", False):
        part *= _ATEN_OTHER_LAYOUT
    if getattr(config, "benchmark", False):
        part *= _ATEN_BENCHMARK
    return 2 * _LAUNCH + copies + roofline(problem, gpu) / part
