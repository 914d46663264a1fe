"""What ``triton-conv3d try`` does: run an engine on this GPU, so that nobody else has to be the first.

A few small and ragged layers, by the most promising config of every kind, are compared with torch's own results; then they
run again and again, for what goes wrong at some times only. Where memory is accessed illegally, or a kernel never ends, it is
this process that is lost.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import torch

from .engines.base import Config
from .problem import CHANNELS_LAST, CONTIGUOUS, PASSES, Problem
from .tuning import cost_model, measure, verify
from .tuning.proof import RUNNING
from .tuning.select import ranking
from .workload import LAYOUTS, Layer

_RUNS = 20  # of each config, which all have to give the same bits
_ONES, _PADDED = (1, 1, 1), (1, 1, 1)
# No size is a multiple of a tile's. The first four have tiles enough for programs to take several, of each kind, or several
# chains of one; the first walks 72 channels in short steps in forward, and 184 in long ones in dgrad.
LAYERS = (
    (Layer("wide", 2, 72, 184, (15, 57, 58), (3, 3, 3), _ONES, _PADDED, _ONES, 1, True, "bf16", "silu", True), CHANNELS_LAST),
    (Layer("narrow", 1, 96, 48, (33, 59, 130), (3, 3, 3), _ONES, _PADDED, _ONES, 1, True, "fp16"), CHANNELS_LAST),
    (Layer("halving", 1, 32, 64, (33, 43, 130), (3, 3, 3), (2, 2, 2), _PADDED, _ONES, 1, False, "bf16"), CHANNELS_LAST),
    (Layer("deep", 1, 520, 392, (2, 5, 5), (3, 3, 3), _ONES, _PADDED, _ONES, 1, False, "fp16"), CHANNELS_LAST),
    (Layer("strided", 1, 64, 72, (5, 7, 18), (3, 3, 3), (2, 2, 2), _PADDED, _ONES, 1, False, "bf16"), CONTIGUOUS),
    (Layer("grouped", 1, 64, 64, (3, 6, 9), (1, 3, 3), _ONES, (0, 2, 2), (1, 2, 2), 2, False, "bf16"), CHANNELS_LAST),
)


class _Untimed:
    """Nothing is timed, and no memory is kept to overwrite the L2 cache with."""

    def time(self, function: Callable[[], object]) -> float:
        raise NotImplementedError


class Untried(Exception):
    """The engine cannot be tried here; the message says why."""


def run(engine: ModuleType, device: torch.device, tell: Callable[[str], object]) -> str | None:
    """How the engine failed, or None.

    Args:
        tell: takes lines about what is being done, :data:`.tuning.proof.RUNNING` among them.

    Raises:
        Untried: it takes none of the layers, none of its configs fits this GPU, or there is no memory to find out.
        RuntimeError: it accessed memory illegally.
        torch.OutOfMemoryError: the GPU has no room for them.
    """
    benches = list(_benches(engine, device))
    if not benches:
        reasons = {reason for _, _, reason in _problems(engine, device)}
        raise Untried(f"{engine.NAME} takes none of the layers: {'; '.join(map(str, reasons))}")
    if not all(bench.ready for bench, _ in benches):
        raise Untried("torch has no result to compare with, for want of memory")
    tell(f"compiling {sum(len(candidates) for _, candidates in benches)} configs of {engine.NAME}")
    for bench, candidates in benches:
        bench.prepare(candidates)
    tell(RUNNING)
    for bench, candidates in benches:
        failures = [failure for _, config in candidates if (failure := _failure(bench, engine, config))]
        if failures:
            return f"{failures[0]} on {bench.problem}"
        tell(f"right: {bench.problem}, {len(bench.right)} of {len(candidates)} configs")
    if not any(bench.right for bench, _ in benches):
        raise Untried(f"none of the configs of {engine.NAME} could be launched")
    return None


def _problems(engine: ModuleType, device: torch.device):
    """(problem, operands, why the engine does not take it or None)."""
    for layer, layout in LAYERS:
        for pass_ in PASSES:
            operands = layer.operands(pass_, device, LAYOUTS[layout])
            problem = layer.problem(pass_, operands, "ieee", LAYOUTS[layout])
            yield problem, operands, engine.supports(problem)


def _benches(engine: ModuleType, device: torch.device):
    """(bench, candidates), of every problem that the engine takes."""
    for problem, operands, refused in _problems(engine, device):
        if refused is None:
            own = measure.own(ranking(problem, measuring=True))
            candidates = [(engine, config) for config in _candidates(engine, problem)]
            yield measure.Bench(problem, operands, own, _Untimed()), candidates


def _candidates(engine: ModuleType, problem: Problem) -> list[Config]:
    """The most promising config of each kind."""
    ranked = cost_model.rank(problem, [(engine, config) for config in engine.configs(problem)])
    return list({type(config): config for _, _, config in reversed(ranked)}.values())


def _failure(bench: measure.Bench, engine: ModuleType, config: Config) -> str | None:
    """A config that does not fit this GPU is no failure."""
    if not bench.is_usable((engine, config)):
        return f"{engine.NAME} [{config}] gave a wrong result" if (engine, config) in bench.wrong else None
    first = None
    for _ in range(1 + _RUNS):
        result = bench.attempt(engine, config, lambda: bench.launch(engine, config))
        if result is None:
            raise Untried(f"{engine.NAME} [{config}] could not be launched again")
        first = result if first is None else first
        if not verify.same(first, result):
            return f"{engine.NAME} [{config}] gave two results"
    return None
