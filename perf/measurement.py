"""One case by every provider: prepared, checked against float64, timed in turns, and written down as rows."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Sequence

import torch

from triton_conv3d.tuning import Plan
from triton_conv3d.tuning.faults import is_illegal_access, is_out_of_memory
from triton_conv3d.workload import DTYPES

from .checking import Reference
from .machine import Machine
from .providers import Prepared, Provider, alike
from .results import FAILED, MEMORY, OK, UNSUPPORTED, WRONG, Row, now
from .tensors import Tensors
from .threads import separately
from .timing import race
from .workloads import Case

_REASON = 300  # characters


class Measurement:
    """One case on its way to its rows.

    Attributes:
        lost: there was an illegal memory access: the process can compute nothing more.
    """

    def __init__(self, case: Case, suite: str, machine: Machine):
        self.case, self.machine, self.lost = case, machine, False
        self.tensors = Tensors(case, machine.device)
        self.ready: dict[str, tuple[Prepared, dict]] = {}
        self.done: dict[str, Row] = {}
        self.blank = _blank(case, suite, machine)

    @functools.cached_property
    def references(self) -> list[Reference]:
        return [Reference(problem, self.tensors.operands(problem)) for problem in self.tensors.problems]

    def rows(self, providers: Sequence[Provider]) -> list[Row]:
        """A row for each provider; after an illegal access only for those that were through before."""
        with alike(self.case), contextlib.ExitStack() as ends:
            for provider in providers:
                if not self.lost:
                    self.begin(provider, ends)
            self.race({provider.name: provider.thread for provider in providers})
        return [self.done[provider.name] for provider in providers if provider.name in self.done]

    def begin(self, provider: Provider, ends: contextlib.ExitStack) -> None:
        """Prepare a provider and check it; it is timed later, or has its row now."""
        try:
            prepared = separately(provider.thread, lambda: provider.prepare(self.case, self.tensors))
            if isinstance(prepared, str):
                return self.put(provider.name, status=UNSUPPORTED, reason=prepared)
            ends.callback(prepared.end)
            found = separately(provider.thread, lambda: self.checked(prepared))
        except Exception as error:
            return self.fail(provider.name, error)
        if found["status"] == OK:
            self.ready[provider.name] = prepared, found
        else:
            self.put(provider.name, **found)

    def checked(self, prepared: Prepared) -> dict:
        """Whether the results are right, and what else is known before anything is timed, as columns of the row."""
        timer = self.machine.timer
        with prepared.context():
            before = timer.allocated()
            for _ in range(prepared.warmups):
                prepared.call()
            _poison(self.tensors)
            results, highest = timer.highest(prepared.call)
            plans = prepared.plans()
        columns = {"status": OK, "plan": _text(plans), "error": 0.0}
        if highest is not None:
            columns["peak_bytes"] = highest - before + self.tensors.bytes_read
        for index, (reference, result) in enumerate(zip(self.references, results, strict=True)):
            right, error = reference.judge(result, coarse=not plans or plans[index].engine == "aten")
            columns["error"] = max(columns["error"], error)
            if not right:
                reason = f"{reference.problem.pass_} is wrong beyond rounding, RMS error {error:.3g} of the magnitude"
                columns.update(status=WRONG, reason=reason)
        return columns

    def race(self, threads: dict[str, str]) -> None:
        """Time those that are right, in turns, each in its thread."""
        contestants = {} if self.lost else {name: prepared for name, (prepared, _) in self.ready.items()}
        times, errors = race(contestants, self.machine.timer, lambda name, sample: separately(threads[name], sample))
        for name, error in errors.items():
            self.fail(name, error)
            if self.lost:  # what the others raised or took after that says nothing about them
                return
        for name, mine in times.items():
            speedups = (f"{other}={t.median / mine.median:.3g}" for other, t in times.items() if other != name)
            self.put(
                name,
                **self.ready[name][1],
                time_us=mine.median * 1e6,
                low_us=mine.low * 1e6,
                high_us=mine.high * 1e6,
                samples=mine.samples,
                host_us=mine.host * 1e6,
                tflops=self.blank.flops / mine.median / 1e12,
                gbps=self.blank.min_bytes / mine.median / 1e9,
                roofline=self.blank.roofline_us / (mine.median * 1e6),
                speedups=" ".join(speedups),
            )

    def fail(self, name: str, error: Exception) -> None:
        out_of_memory = is_out_of_memory(error) or "out of memory" in str(error).lower()
        self.lost = self.lost or is_illegal_access(error)
        self.put(name, status=MEMORY if out_of_memory else FAILED, reason=f"{type(error).__name__}: {error}"[:_REASON])

    def put(self, name: str, **columns) -> None:
        self.done[name] = dataclasses.replace(self.blank, provider=name, measured=now(), **columns)


def _blank(case: Case, suite: str, machine: Machine) -> Row:
    """What all rows of a case have in common. The passes of ``train`` follow each other: what they need adds up."""
    problems, ceilings = case.problems(machine.gpu, machine.arch), machine.ceilings
    return Row(
        suite=suite,
        case=case.key,
        layer=case.workload.id,
        model=case.workload.model,
        op="conv_transpose3d" if case.workload.transposed else "conv3d",
        pass_=case.pass_,
        dtype=case.dtype,
        precision=case.precision,
        layout=case.layout,
        shape=str(problems[0]).partition(" ")[2].rpartition(", ")[0],
        calls=case.workload.calls,
        provider="",
        status="",
        flops=sum(problem.flops for problem in problems),
        min_bytes=sum(problem.min_bytes for problem in problems),
        matmul_tflops=ceilings.tflops(case.dtype, case.precision),
        copy_gbps=ceilings.copy_gbps,
        roofline_us=1e6 * sum(ceilings.least(problem, case.dtype, case.precision) for problem in problems),
    )


def _text(plans: Sequence[Plan]) -> str:
    return "; ".join(f"{plan.engine} [{plan.config}] from {plan.source}" for plan in plans)


def _poison(tensors: Tensors) -> None:
    """Leave NaN in the memory that results of these shapes are likely to get: what is not written then shows."""
    like = {"dtype": DTYPES[tensors.case.dtype], "device": tensors.device}
    for memory in [torch.empty(problem.result_shape, **like) for problem in tensors.problems]:
        memory.fill_(math.nan)
