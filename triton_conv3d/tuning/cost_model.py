"""An analytic model of a kernel's time: enough to rank candidates before anything is measured.

    time  = launches + copies + waves * (prologue + iterations * step) + writes, and not below the roofline
    step  = the slowest of products, instructions, shared memory, L2, memory and latency; see :func:`_wave`
    waves = programs / (multiprocessors * programs that one holds), each begun wave a whole one for its busiest member

The geometry is the engine's (:class:`.engines.base.Work`), tiles at the edge counted as whole ones. What a GPU does is
in :class:`Rates`: figures of data sheets, and coefficients that ``python -m autotune fit`` replaces by fitted ones.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from .. import settings
from ..engines.base import Config, Order, Work, finish_bytes
from ..problem import CHANNELS_LAST, NO_ACTIVATION, Problem
from . import coefficients


@dataclass(frozen=True)
class Rates:
    """One GPU: what its data sheet says, then coefficients, which are assumptions until they are fitted.

    Attributes:
        units: multiprocessors (AMD: compute units). clock: Hz.
        tensor: dense bf16 flop/s of all tensor cores. fma: float32 flop/s without them.
        bandwidth: bytes/s of memory. cache: bytes of L2. cache_rate: bytes/s from it.
        shared: bytes of one multiprocessor. registers: of 32 bits, of one.
        tensor_part, fma_part, cache_part, memory_part: of these rates, that a kernel reaches.
        warp_part: of ``tensor``, that instructions of single warps (mma.sync) can reach.
        shared_part: of 128 bytes a cycle of a multiprocessor's shared memory, that copies and products reach together.
        issue_part: of 4 instructions of warps in a cycle, that a main loop reaches.
        launch: seconds of a launch on a busy stream.
        prologue: seconds before a program's first loads, and for its end. latency: of a load from L2 or memory.
        aten_part: of the roofline, that torch's own convolution reaches; aten_grouped_part: with groups;
            aten_depthwise_part: of ``fma``, where every channel is a group; aten_other_layout: of these, on contiguous
            volumes; aten_benchmark: what cuDNN's own search gains; matmul_part: of the roofline, that a vendor's GEMM reaches.
    """

    units: int
    clock: float
    tensor: float
    fma: float
    bandwidth: float
    cache: int
    cache_rate: float
    shared: int
    registers: int = 65_536
    tensor_part: float = 0.7  # a vendor's GEMM reaches 0.75 to 0.8
    fma_part: float = 0.85
    cache_part: float = 0.6  # reads alone reach 5.4 TB/s on an A100, 9.7 on an H200 (github.com/te42kyfo/gpu-benches)
    memory_part: float = 0.9  # of a copy kernel
    warp_part: float = 1.0
    shared_part: float = 0.9
    issue_part: float = 0.7
    launch: float = 4e-6
    prologue: float = 1.0e-6
    latency: float = 0.7e-6  # 1,000 to 1,300 cycles from address to shared memory, under load
    aten_part: float = 0.3  # cuDNN, channels last: 290 of 989 TFLOP/s have been reported on an H200
    aten_grouped_part: float = 0.03
    aten_depthwise_part: float = 0.01  # a thread for each output: 2.8 GFLOP in 14.9 ms (pytorch#51027), GPU not named
    aten_other_layout: float = 0.5
    aten_benchmark: float = 1.05
    matmul_part: float = 0.8


_MB, _KB = 2**20, 2**10
_HOPPER_WARPS = 0.62  # Luo et al., 2024 (arXiv 2402.13499): mma on an H100; assumed for B200: as fast in a cycle

# Data sheets and architecture white papers; an entry holds for every device whose name contains its key. From L2, each
# NVIDIA multiprocessor takes 64 bytes a cycle (Jia et al., 2018, of Volta; later ones are the same); AMD gives the rate
# and the size of its Infinity Cache.
RATES = {
    "A100": Rates(108, 1.41e9, 312e12, 19.5e12, 1.6e12, 40 * _MB, 9.7e12, 164 * _KB),
    "H100": Rates(132, 1.755e9, 989e12, 67e12, 3.35e12, 50 * _MB, 14.8e12, 228 * _KB, warp_part=_HOPPER_WARPS),
    "H200": Rates(132, 1.755e9, 989e12, 67e12, 4.8e12, 50 * _MB, 14.8e12, 228 * _KB, warp_part=_HOPPER_WARPS),
    "B200": Rates(148, 1.85e9, 2250e12, 80e12, 8.0e12, 126 * _MB, 17.5e12, 228 * _KB, warp_part=_HOPPER_WARPS / 2),
    "MI300X": Rates(304, 2.1e9, 1307e12, 163e12, 5.3e12, 256 * _MB, 17.2e12, 64 * _KB, registers=131_072),
}
_UNKNOWN = RATES["A100"]  # any other GPU: the order of candidates depends on ratios, which are alike

_REGISTERS = 128  # of a thread, where an engine does not count its sums
_MOST_REGISTERS = 255
_MOST_WARPS = 64  # that a multiprocessor holds
_ISSUED = 4  # warps' instructions that a multiprocessor starts in a cycle
_BANKS = 128  # bytes that a multiprocessor's shared memory reads or writes in a cycle: 32 banks of 4 (CUDA programming guide)


@dataclass(frozen=True)
class Code:
    """What compilers make of a main loop, of ``warp`` threads in a warp: registers of a thread = a + b * its sums + c * its
    loads, and instructions of a warp = d + e * loads."""

    warp: int
    a: float
    b: float
    c: float
    d: float
    e: float

    def loads(self, work: Work) -> float:
        """Of one thread in one step."""
        return work.bytes_read / (work.vector_bytes * work.num_warps * self.warp)

    def registers(self, work: Work) -> float:
        """Of one thread."""
        if not work.sums:
            return _REGISTERS
        needed = self.a + self.b * work.sums / (work.num_warps * self.warp) + self.c * self.loads(work)
        return min(needed, _MOST_REGISTERS)

    def instructions(self, work: Work) -> float:
        """Of one warp in one step; 0 where an engine counts them among its products."""
        if work.instructions or not work.sums:
            return work.instructions
        return self.d + self.e * self.loads(work)


# By (AMD, wgrad, bytes of an element). Least squares over every config compiled for sm_80, sm_90, sm_100 and gfx942
# (perf/results/machine_code; tests/test_cost_model.py holds them against it).
_CODE = {
    (False, False, 2): Code(32, 36.0, 1.25, 3.0, 56.0, 10.7),
    (False, False, 4): Code(32, 32.0, 1.5, 4.7, 44.0, 21.0),
    (False, True, 2): Code(32, 59.0, 1.75, 8.7, 5.0, 44.0),
    (False, True, 4): Code(32, 47.0, 0.0, 25.0, 35.0, 55.0),
    (True, False, 2): Code(64, 35.0, 1.8, 6.6, 60.0, 11.2),
    (True, False, 4): Code(64, 28.0, 2.5, 8.4, 47.0, 34.0),
    (True, True, 2): Code(64, 89.0, 2.8, 5.7, 117.0, 30.0),
    (True, True, 4): Code(64, 11.0, 6.0, 14.3, 19.0, 58.0),
}

# Seconds in Triton's interpreter, fitted to small layers: before and after the steps of a program, of an operation on
# tiles whatever their size, and what each element adds that is loaded.
_INTERPRETED_PROGRAM, _INTERPRETED_OPERATION, _INTERPRETED_ELEMENT = 6.5e-3, 1e-4, 2e-8


def rates(problem: Problem) -> Rates:
    """The rates of the problem's GPU, by its name; with fitted coefficients where there are any for it."""
    return _rates(problem.device, settings.current().tables)


@functools.lru_cache(maxsize=64)
def _rates(device: str, own: Path | None) -> Rates:
    return coefficients.fitted(defaults(device), device, own)


def defaults(device: str) -> Rates:
    """Of a GPU by its name, nothing fitted."""
    return next((rates for name, rates in RATES.items() if name in device), _UNKNOWN)


def code(problem: Problem) -> Code | None:
    """None for a type that no kernel computes."""
    return _CODE.get((problem.arch.startswith("gfx"), problem.pass_ == "wgrad", problem.itemsize))


class _Shared:
    """What all candidates of a problem have in common, worked out once."""

    def __init__(self, problem: Problem, gpu: Rates):
        self.problem, self.gpu = problem, gpu
        self.roofline = roofline(problem, gpu)
        self.code = code(problem)
        # Flop/s that products reach, of one multiprocessor: (without tensor cores, with them).
        parts = ((False, gpu.fma_part), (True, gpu.tensor_part))
        self.products = tuple(part * _peak(problem, gpu, tensor) / gpu.units for tensor, part in parts)
        self.issue = _ISSUED * gpu.issue_part * gpu.clock
        self.banks = _BANKS * gpu.shared_part * gpu.clock
        self.instructions: dict[tuple, tuple[int, int, bool]] = {}  # see :func:`instruction`
        self.l2, self.memory = gpu.cache_part * gpu.cache_rate, gpu.memory_part * gpu.bandwidth
        self.added = math.prod(problem.output_shape) * problem.itemsize if problem.residual else 0


def predict(problem: Problem, engine: ModuleType, config: Config, gpu: Rates | None = None) -> float:
    """Seconds that this launch is expected to take, on the problem's GPU or on one of these rates."""
    return _predict(_Shared(problem, rates(problem) if gpu is None else gpu), engine, config)


def rank(
    problem: Problem, candidates: list[tuple[ModuleType, Config]]
) -> list[tuple[float, ModuleType, Config]]:
    """Candidates with their predicted seconds, the fastest first; ties keep their order."""
    shared = _Shared(problem, rates(problem))
    timed = [(_predict(shared, engine, config), engine, config) for engine, config in candidates]
    return sorted(timed, key=lambda item: item[0])


def _predict(shared: _Shared, engine: ModuleType, config: Config) -> float:
    problem = shared.problem
    if not hasattr(engine, "work"):
        return _guess(shared, engine, config)
    work = engine.work(problem, config)
    if problem.arch == "interpreter":
        step = work.operations * _INTERPRETED_OPERATION + work.bytes_read / problem.itemsize * _INTERPRETED_ELEMENT
        return work.programs * (_INTERPRETED_PROGRAM + work.iterations * step)
    return max(_predicted(shared, work), shared.roofline)


def _predicted(shared: _Shared, work: Work) -> float:
    """Waves of programs, one after the other; the last may be a small one."""
    gpu = shared.gpu
    slots = gpu.units * _resident(shared, work)
    waves, rest = divmod(work.programs, slots)
    one = max(work.num_warps * shared.code.instructions(work) / shared.issue, *_products(shared, work))
    main = waves * _wave(shared, work, one, slots) if waves else 0.0
    main += _wave(shared, work, one, rest) if rest else 0.0
    # Of a split reduction this holds the partial sums: written as float32 here, and read again (extra_bytes).
    writes = (work.extra_bytes + shared.added + work.programs * work.bytes_written) / shared.memory
    # Small programs without tensor cores write while others of their multiprocessor read.
    return work.launches * gpu.launch + (main + writes if work.tensor_cores else max(main, writes))


def _resident(shared: _Shared, work: Work) -> int:
    """Programs that a multiprocessor holds: by shared memory, registers and warps (CUDA's occupancy calculation)."""
    by_registers = shared.gpu.registers / (work.num_warps * shared.code.warp * shared.code.registers(work))
    by_shared = shared.gpu.shared / (work.shared_bytes or 1)
    return max(1, int(min(by_registers, by_shared, _MOST_WARPS / work.num_warps)))


def _products(shared: _Shared, work: Work) -> tuple[float, float]:
    """Seconds of a multiprocessor for the products of a program's step, and for its shared memory to be written and read."""
    seconds = work.flops / shared.products[work.tensor_cores]
    if not work.tensor_cores or not work.product[0]:
        return seconds, 0.0
    key = work.product, work.num_warps
    if key not in shared.instructions:
        shared.instructions[key] = instruction(shared.problem.arch, *work.product, work.num_warps)
    rows, columns, asynchronous = shared.instructions[key]
    (m, n), (of_rows, of_columns) = work.product, work.tiles
    once = work.bytes_read / (of_rows / n + of_columns / m)  # item * m * n * k, with k channels a step
    if asynchronous:  # each one reads both of its sides
        each = shared.problem.itemsize * work.flops / 2
        read = each / rows + (once * of_rows if work.in_registers else each) / columns
    else:  # each warp reads once what it multiplies
        read = once * (of_rows / columns + of_columns / rows)
        seconds /= shared.gpu.warp_part
    return seconds, (work.bytes_read + read) / shared.banks


def instruction(arch: str, rows: int, columns: int, num_warps: int) -> tuple[int, int, bool]:
    """What tensor cores multiply at a time: (rows, columns, whether both sides come from shared memory).

    wgmma and tcgen05 of 64 rows and more; else of one warp, by mma.sync, whatever it has of the product: Triton deals the
    product out among warps along the side of which they have more left.
    """
    if arch == "sm_90" and rows >= 64 and num_warps % 4 == 0:
        groups = num_warps // 4
        down = min(groups, rows // 64)
        return 64, min(256, columns * down // groups), True
    if arch == "sm_100" and rows >= 64:
        return min(128, rows), min(256, columns), True
    for _ in range(num_warps.bit_length() - 1):
        rows, columns = (rows // 2, columns) if rows >= columns else (rows, columns // 2)
    return rows, columns, False


def _wave(shared: _Shared, work: Work, one: float, programs: int) -> float:
    """Seconds of programs that run at once; the multiprocessor that holds the most of them is the last to end.

    A step takes as long as the slowest of

    - ``one``, for each program on one multiprocessor, the slowest of
      - products, at its share of the peak (roofline, Williams et al., 2009);
      - instructions of the main loop at its rate of issue, which addresses and masks take more of than products do;
      - shared memory, which copies write and products read;
    - L2: every program's operands;
    - memory: of these, what no other program of the wave reads too, see :func:`_shared_reads`;
    - latency: of a load, shared out among the stages in flight (Little's law).
    """
    gpu, order = shared.gpu, work.order
    held = -(-programs // gpu.units)
    l2 = programs * work.bytes_read / shared.l2
    memory = _shared_reads(order, work.iterations, programs, gpu.cache) / shared.memory if order is not None else 0.0
    latency = gpu.latency / (work.stages - 1 or 1)
    return gpu.prologue + gpu.latency + work.iterations * max(held * one, l2, memory, latency)


def _shared_reads(order: Order, iterations: int, programs: int, cache: int) -> float:
    """Bytes of one step that come from memory while so many programs run: each row and column of tiles once.

    Programs visit the tiles in groups of rows, column by column (grouped ordering of Triton's matmul tutorial). What a
    row reads again for the next tap is still in L2 if all that the wave reads fits.
    """
    whole, rest = divmod(programs, order.rows * order.columns)
    down, across = whole * order.rows, whole * order.columns
    if rest:
        group = min(order.group, order.rows)
        down += min(rest, order.rows, group * math.ceil(rest / (group * order.columns)))
        across += min(order.columns, math.ceil(rest / group))
    row = order.row_bytes / order.reuse
    if down * row * iterations > cache:
        row = order.row_bytes
    return down * row + across * order.column_bytes


def _peak(problem: Problem, gpu: Rates, tensor_cores: bool = True) -> float:
    """Products and additions a second; tf32 runs at half the rate of bf16, tf32x3 takes three of its products."""
    if not tensor_cores or problem.dtype not in ("float16", "bfloat16", "float32") or not problem.on_tensor_cores:
        return gpu.fma
    return gpu.tensor / {"tf32": 2, "tf32x3": 6}.get(problem.precision, 1)


def roofline(problem: Problem, gpu: Rates) -> float:
    """Seconds that no kernel can beat: the flops at the peak rate, or the minimal bytes at the memory's."""
    return max(problem.flops / _peak(problem, gpu), problem.min_bytes / gpu.bandwidth)


def _guess(shared: _Shared, engine: ModuleType, config: Config) -> float:
    """For engines that launch what is not ours, and so has no geometry to reason about: a part of the roofline."""
    problem, gpu = shared.problem, shared.gpu
    copies = (2 * engine.memory(problem, config).copies + finish_bytes(problem)) / gpu.bandwidth
    copies += gpu.launch * (problem.residual + (problem.activation != NO_ACTIVATION))
    if engine.NAME == "matmul":
        return gpu.launch + copies + shared.roofline / gpu.matmul_part
    seconds = shared.roofline / (gpu.aten_part if problem.groups == 1 else gpu.aten_grouped_part)
    if problem.groups == problem.in_channels > 1:
        seconds = max(seconds, problem.flops / (gpu.aten_depthwise_part * gpu.fma))
    if any(layout != CHANNELS_LAST for layout in problem.layouts) and not getattr(config, "channels_last", False):
        seconds /= gpu.aten_other_layout
    if getattr(config, "benchmark", False):
        seconds /= gpu.aten_benchmark
    return 2 * gpu.launch + copies + seconds
