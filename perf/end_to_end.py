"""``python -m perf end-to-end``: training steps and inference of whole networks, torch beside this package.

Every provider starts from equal weights and gets equal data. Its first steps are compared with torch's: the losses of
20 training steps, or the output; then all are timed in turns, so that a drift of the clock hits each.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import gc
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from triton_conv3d import compile_backend, convert_conv3d
from triton_conv3d.tuning.faults import is_illegal_access, is_out_of_memory
from triton_conv3d.workload import DTYPES

from . import machine as machines
from . import networks, results
from .machine import Machine
from .networks import MODES, TRAIN, Network
from .providers import cudnn_benchmark
from .results import FAILED, LOST, MEMORY, OK, WRONG
from .threads import MAIN, separately
from .timing import Times, race

FILE = "end_to_end.csv"
STEPS = 20  # training steps that are compared, which warm up as well
WARM_UP = 3  # calls of inference
LEARNING_RATE, MOMENTUM = 1e-3, 0.9
COMPILE_MODE = "max-autotune-no-cudagraphs"  # a CUDA graph's output would be overwritten by the next step
LOSS_SCALE = 2.0**14  # of float16, fixed: a scale that is searched for would skip steps, and others for each provider
ROUNDINGS = 4  # of the convolutions' type, that results may differ by where torch's own providers agree
FACTOR = 2.0  # times what torch's own providers differ by, as in rule T3
_EPS = {"fp16": 2.0**-10, "bf16": 2.0**-7, "fp32": 2.0**-10}  # float32 layers multiply in tf32 by default


@dataclass(frozen=True)
class Provider:
    """How a network is run. ours: its convolutions by this package; compiled: by ``torch.compile``, ours by its backend."""

    layout: torch.memory_format = torch.channels_last_3d
    benchmark: bool = False
    compiled: bool = False
    ours: bool = False

    @property
    def thread(self) -> str:
        """Of :mod:`perf.threads`: whoever lets cuDNN search has one to himself, and ours may."""
        return "ours" if self.ours else "bench" if self.benchmark else MAIN


REFERENCE = "torch"
PROVIDERS = {
    REFERENCE: Provider(torch.contiguous_format),
    "torch_cl": Provider(),
    "torch_bench": Provider(torch.contiguous_format, benchmark=True),
    "torch_cl_bench": Provider(benchmark=True),
    "compile": Provider(compiled=True),
    "ours": Provider(ours=True),
    "ours_compile": Provider(ours=True, compiled=True),
}


@dataclass(frozen=True)
class EndToEnd:
    """One network, mode and provider, or why there is no time.

    Attributes:
        network, title, mode: of :mod:`perf.networks`; mode ``train`` or ``infer``. shape: of the input.
        dtype: of the convolutions. provider: a key of :data:`PROVIDERS`.
        status: of :data:`perf.results.STATUSES`; ``wrong`` if it differs from torch by more than ``allowed``.
        time_us: median of a step. low_us, high_us: quantiles 0.2 and 0.8. samples: how many.
        peak_bytes: allocated on the device at most, by this provider alone; weights and optimiser included.
        deviation: from torch contiguous: the largest relative difference of a loss over 20 steps; for inference RMS
            difference of the outputs over their RMS. allowed: see :func:`allowed`.
        first_loss, last_loss: of those steps.
        measured: when, ISO 8601 in UTC.
    """

    network: str
    title: str
    mode: str
    shape: str
    dtype: str
    provider: str
    status: str = OK
    reason: str = ""
    time_us: float | None = None
    low_us: float | None = None
    high_us: float | None = None
    samples: int = 0
    peak_bytes: int | None = None
    deviation: float | None = None
    allowed: float | None = None
    first_loss: float | None = None
    last_loss: float | None = None
    measured: str = ""


class Candidate:
    """A network in the hands of one provider; ``call()`` trains on, or infers from, the same batch every time."""

    def __init__(self, network: Network, mode: str, provider: Provider, device: torch.device):
        self.network, self.mode, self.provider, self.device = network, mode, provider, device
        module = network.module(device=device).train(mode == TRAIN)
        if provider.ours and not provider.compiled:  # the backend of torch.compile finds the convolutions itself
            convert_conv3d(module)
        for parameter in module.parameters():
            if parameter.dim() == 5:
                parameter.data = parameter.data.contiguous(memory_format=provider.layout)
        self.parameters = list(module.parameters())
        self.optimiser = torch.optim.SGD(self.parameters, LEARNING_RATE, MOMENTUM)
        self.scale = LOSS_SCALE if network.dtype == "fp16" else 1.0
        input, self.target = network.batch(mode, device)
        self.input = input.contiguous(memory_format=provider.layout)
        self.module = _compiled(module, provider.ours) if provider.compiled else module

    def call(self) -> torch.Tensor:
        """The loss of a training step, or the output."""
        if self.mode != TRAIN:
            with torch.no_grad():
                return self._output()
        self.optimiser.zero_grad(set_to_none=True)
        loss = self.network.loss(self._output(), self.target)
        (loss * self.scale).backward()
        if self.scale != 1.0:
            torch._foreach_div_([parameter.grad for parameter in self.parameters], self.scale)
        self.optimiser.step()
        return loss.detach()

    def context(self) -> contextlib.AbstractContextManager:
        return cudnn_benchmark(self.provider.benchmark)

    def begin(self) -> torch.Tensor:
        """The losses of the first steps from fresh weights, or the output of inference; in float32, on the CPU."""
        with self.context():
            if self.mode == TRAIN:
                return torch.stack([self.call() for _ in range(STEPS)]).float().cpu()
            for _ in range(WARM_UP):
                output = self.call()
            return output.float().cpu()

    def _output(self) -> torch.Tensor:
        dtype = DTYPES[self.network.dtype]
        with torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32):
            return self.module(self.input)


def _compiled(module: torch.nn.Module, ours: bool) -> torch.nn.Module:
    return torch.compile(module, backend=compile_backend.backend if ours else "inductor", mode=COMPILE_MODE)


def deviation(found: torch.Tensor, expected: torch.Tensor, mode: str) -> float:
    """How far losses or outputs of two providers are apart, see :class:`EndToEnd`; infinite if one is not finite."""
    difference = found - expected
    apart = (difference / expected).abs().max() if mode == TRAIN else difference.norm() / expected.norm()
    return apart.item() if math.isfinite(apart.item()) else math.inf


def allowed(dtype: str, peers: Iterable[float]) -> float:
    """What a provider may deviate from torch, given what torch's other providers do: twice that, or some roundings."""
    return FACTOR * max((ROUNDINGS * _EPS[dtype], *filter(math.isfinite, peers)))


def pending(path: Path, network: Network, mode: str, names: Sequence[str], stamp: results.Stamp) -> list[str]:
    """Those of these providers that ``path`` has no row of, by this stamp."""
    known = rows(path, network, mode, stamp)
    return [name for name in names if name not in known]


def rows(path: Path, network: Network, mode: str, stamp: results.Stamp) -> dict[str, EndToEnd]:
    """The rows of a network and mode by this stamp, by provider."""
    found = results.read(path, EndToEnd) if path.exists() else []
    return {
        row.provider: row
        for row, other in found
        if other == stamp and (row.network, row.mode, row.shape) == (network.name, mode, _shape(network, mode))
    }


def _shape(network: Network, mode: str) -> str:
    return "x".join(map(str, network.shape(mode)))


def measure(
    chosen: Sequence[Network],
    modes: Sequence[str],
    names: Sequence[str],
    path: Path,
    *,
    machine: Machine,
    budget: float | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> collections.Counter[str]:
    """Measure what ``path`` does not hold yet, a network and mode after the other; the number of new rows by status.

    Args:
        names: keys of :data:`PROVIDERS`. Torch contiguous is run in any case: the others are compared with it.
        budget: seconds. No provider is begun that would not be ready within them if it took as long as the slowest so
            far; those that are ready are timed.

    A provider that accesses memory illegally takes the device with it: its row is kept, :data:`LOST` is counted, and
    the next process goes on.
    """
    deadline = math.inf if budget is None else clock() + budget
    statuses: collections.Counter[str] = collections.Counter()
    for network in chosen:
        for mode in modes:
            known = rows(path, network, mode, machine.stamp)
            wanted = [name for name in PROVIDERS if name in names and name not in known]
            if wanted and clock() < deadline:
                comparison = _Comparison(network, mode, machine, deadline, clock)
                added = comparison.rows(wanted, known)
                results.append(path, added, machine.stamp)
                statuses.update(row.status for row in added)
                for row in added:
                    print(line(row), flush=True)
                if comparison.lost:
                    statuses[LOST] += 1
                    return statuses
    return statuses


class _Comparison:
    """One network in one mode: everybody's first steps, then everybody's times."""

    def __init__(self, network: Network, mode: str, machine: Machine, deadline: float, clock: Callable[[], float]):
        self.network, self.mode, self.machine = network, mode, machine
        self.deadline, self.clock = deadline, clock
        self.candidates: dict[str, Candidate] = {}
        self.found: dict[str, torch.Tensor] = {}
        self.peaks: dict[str, int | None] = {}
        self.errors: dict[str, Exception] = {}

    @property
    def lost(self) -> str | None:
        """The provider that the device was lost to."""
        return next((name for name, error in self.errors.items() if is_illegal_access(error)), None)

    def rows(self, wanted: Sequence[str], known: dict[str, EndToEnd]) -> list[EndToEnd]:
        slowest = 0.0
        for name in dict.fromkeys((REFERENCE, *wanted)):
            start = self.clock()
            if self.lost or (name != REFERENCE and start + slowest >= self.deadline):
                break
            self._begin(name)
            slowest = max(slowest, self.clock() - start)
        racing = {} if self.lost else {name: c for name, c in self.candidates.items() if name in wanted}
        times, errors = race(racing, self.machine.timer, lambda n, sample: separately(PROVIDERS[n].thread, sample))
        self.errors.update(errors)
        self._end()
        if self.lost:
            return [self._row(self.lost, None, None, None)]
        expected = self.found.get(REFERENCE)
        apart = {} if expected is None else {n: deviation(f, expected, self.mode) for n, f in self.found.items()}
        peers = {name: row.deviation for name, row in known.items() if row.deviation is not None} | apart
        bound = allowed(self.network.dtype, (d for name, d in peers.items() if not PROVIDERS[name].ours))
        done = [name for name in wanted if name in times or name in self.errors]
        return [self._row(name, times.get(name), apart.get(name), bound) for name in done]

    def _begin(self, name: str) -> None:
        def first() -> torch.Tensor:
            self.candidates[name] = Candidate(self.network, self.mode, PROVIDERS[name], self.machine.device)
            return self.candidates[name].begin()

        before = self.machine.timer.allocated()
        try:
            self.found[name], highest = separately(
                PROVIDERS[name].thread, lambda: self.machine.timer.highest(first)
            )
            self.peaks[name] = None if highest is None else highest - before
        except Exception as error:
            self.candidates.pop(name, None)
            self.errors[name] = error.with_traceback(None)  # which holds tensors
            _free()

    def _end(self) -> None:
        self.candidates.clear()
        torch._dynamo.reset()
        _free()

    def _row(self, name: str, times: Times | None, apart: float | None, bound: float | None) -> EndToEnd:
        row = EndToEnd(
            self.network.name, self.network.title, self.mode, _shape(self.network, self.mode), self.network.dtype, name,
            measured=results.now(),
        )  # fmt: skip
        if name in self.errors:
            error = self.errors[name]
            status = MEMORY if is_out_of_memory(error) else FAILED
            return dataclasses.replace(row, status=status, reason=f"{type(error).__name__}: {error}"[:500])
        wrong = PROVIDERS[name].ours and apart is not None and apart > bound
        losses = self.found[name] if self.mode == TRAIN else None
        return dataclasses.replace(
            row,
            status=WRONG if wrong else OK,
            reason=f"deviates by {apart:.3g} from {REFERENCE}, allowed are {bound:.3g}" if wrong
            else "" if apart is not None else f"not compared: {REFERENCE} has no result",
            time_us=times.median * 1e6, low_us=times.low * 1e6, high_us=times.high * 1e6, samples=times.samples,
            peak_bytes=self.peaks[name], deviation=apart, allowed=bound,
            first_loss=None if losses is None else losses[0].item(),
            last_loss=None if losses is None else losses[-1].item(),
        )  # fmt: skip


def _free() -> None:
    """Return what is not used any more to the device, as far as it still answers."""
    gc.collect()
    with contextlib.suppress(RuntimeError):
        torch.cuda.empty_cache()


def line(row: EndToEnd) -> str:
    """A row, for people."""
    head = f"{row.title}, {row.mode}, {row.dtype}, {row.provider}: "
    if row.time_us is None:
        return head + f"{row.status}: {row.reason}"
    memory = "" if row.peak_bytes is None else f", {row.peak_bytes / 2**30:.2f} GiB"
    return head + f"{row.time_us / 1e3:.2f} ms{memory}" + (f", {row.status}: {row.reason}" if row.reason else "")


def arguments(parser: argparse.ArgumentParser) -> None:
    known = ", ".join(networks.networks())
    parser.add_argument("--network", metavar="NAME,NAME", help=f"some of {known} (default: all)")
    parser.add_argument("--mode", choices=MODES, help="default: both")
    parser.add_argument("--provider", metavar="NAME,NAME", help=f"some of {', '.join(PROVIDERS)} (default: all)")
    parser.add_argument("--budget", type=float, metavar="SECONDS", help="begin nothing new later; call again to go on")
    parser.add_argument("--out", type=Path, metavar="FILE", help=f"default: {FILE} in the folder of this GPU's results")


def main(options: argparse.Namespace) -> int:
    chosen = networks.get(options.network)
    names = list(PROVIDERS) if options.provider is None else options.provider.split(",")
    for name in names:
        if name not in PROVIDERS:
            raise ValueError(f"no provider named {name!r}: the providers are {', '.join(PROVIDERS)}")
    modes = MODES if options.mode is None else (options.mode,)
    machine = machines.here()
    path = options.out or results.folder(machine.gpu) / FILE
    statuses = measure(chosen, modes, names, path, machine=machine, budget=options.budget)
    left = sum(len(pending(path, network, mode, names, machine.stamp)) for network in chosen for mode in modes)
    statuses.pop(LOST, None)
    print(f"{statuses.total()} rows added to {path}" + (f"; {left} left: call again to go on" if left else ""))
    return 1 if statuses[WRONG] or statuses[FAILED] else 0
