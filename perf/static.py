"""``python -m perf static``: predictions, no measurements: what the cost model and the compiler say, with no GPU.

For every layer and pass of the suites: the cost model's roofline, and its time and bytes for the best config of each
engine; beside them the machine code of what the fastest of our engines launches (see :mod:`.compiling`).
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch
import triton

from triton_conv3d import engines, settings
from triton_conv3d.engines import implicit_gemm
from triton_conv3d.engines.base import Config
from triton_conv3d.problem import Problem
from triton_conv3d.tuning import cost_model
from triton_conv3d.tuning.progress import progress
from triton_conv3d.tuning.select import ranking

from . import compiling, plots, workloads
from .compiling import Compiled, Kernel
from .markdown import table
from .summary import duration
from .workloads import Case

# The GPUs whose rates the cost model knows, and their architectures.
GPUS = {"A100": "sm_80", "H100": "sm_90", "H200": "sm_90", "B200": "sm_100", "MI300X": "gfx942"}
_FORMATS = (".md", ".csv", ".png")
_BEFORE = implicit_gemm.NAME  # which computes every layer: what the engines for some of them are compared with


@dataclass(frozen=True)
class Prediction:
    """The best config of one engine for one case, as the cost model sees it. Nothing of it was measured.

    Attributes:
        suite, model, case: as in :class:`perf.workloads.Workload`, and :attr:`perf.workloads.Case.key`.
        gpu: a key of :data:`GPUS`.
        engine, rank, config: rank 1 is the engine that is predicted to be fastest.
        predicted_us, predicted_roofline_us: with this config; and the least, by the rates of the data sheet.
        predicted_bound: what makes that roofline: ``compute`` or ``memory``.
        flops, min_bytes: of the case. predicted_bytes: that the launches read and write, caches included.
        kernels: numbers of the variants that are launched, ``3 17``; given for the fastest engine with kernels of ours.
    """

    suite: str
    model: str
    case: str
    gpu: str
    engine: str
    rank: int
    config: str
    predicted_us: float
    predicted_roofline_us: float
    predicted_bound: str
    flops: int
    min_bytes: int
    predicted_bytes: int
    kernels: str


@dataclass
class Variant:
    """A kernel of ours.

    Attributes:
        number: its name in the tables. uses: predictions with it.
        kernel: the launch that it is compiled for. result: of that.
    """

    number: int
    kernel: Kernel
    uses: int = 0
    result: Compiled | str = "not compiled"

    @property
    def faults(self) -> Sequence[str]:
        return [self.result] if isinstance(self.result, str) else self.result.faults


def predict(cases: Sequence[Case], gpu: str, processes: int) -> tuple[list[Prediction], list[Variant]]:
    """Predictions for single passes, and the kernels they launch.

    Args:
        gpu: a key of :data:`GPUS`. processes: that compile at the same time.
    """
    predictions: list[Prediction] = []
    variants: dict[compiling.Variant, Variant] = {}
    for case in cases:
        problem = _problem(case, gpu)
        candidates = _best_of_each(problem)
        ours = next((engine for _, engine, _ in candidates if _has_kernels(engine)), None)
        for rank, (seconds, engine, config) in enumerate(candidates, 1):
            used = _kernels(problem, engine, config, variants) if engine is ours else []
            predictions.append(_prediction(case, problem, gpu, rank, seconds, engine, config, used))
    found = list(variants.values())
    with progress(f"compiling for {gpu}", len(found)) as step:
        results = compiling.compiled([variant.kernel for variant in found], processes)
        for variant, result in zip(found, results, strict=True):
            variant.result = result
            step()
    return predictions, found


def _kernels(
    problem: Problem, engine: ModuleType, config: Config, variants: dict[compiling.Variant, Variant]
) -> list[Variant]:
    """What this launch starts; new ones join ``variants``."""
    used = []
    for index, key in enumerate(compiling.variants(problem, engine, config)):
        kernel = Kernel(problem, engine.NAME, config, index)
        used.append(variants.setdefault(key, Variant(len(variants) + 1, kernel)))
        used[-1].uses += 1
    return used


def _has_kernels(engine: ModuleType) -> bool:
    return hasattr(engine, "work")


def _problem(case: Case, gpu: str) -> Problem:
    (problem,) = case.problems(gpu, GPUS[gpu])
    return problem


def _best_of_each(problem: Problem) -> list[tuple[float, ModuleType, Config]]:
    """The most promising candidate of every engine that has one, the best first."""
    best: dict[str, tuple[float, ModuleType, Config]] = {}
    for candidate in ranking(problem):
        best.setdefault(candidate[1].NAME, candidate)
    return list(best.values())


def _prediction(
    case: Case,
    problem: Problem,
    gpu: str,
    rank: int,
    seconds: float,
    engine: ModuleType,
    config: Config,
    kernels: Sequence[Variant],
) -> Prediction:
    rates = cost_model.rates(problem)
    roofline = cost_model.roofline(problem, rates)
    memory = problem.min_bytes / rates.bandwidth
    return Prediction(
        case.workload.suite, case.workload.model, case.key, gpu, engine.NAME, rank, str(config), seconds * 1e6,
        roofline * 1e6, "memory" if memory >= roofline else "compute", problem.flops, problem.min_bytes,
        round(_bytes(problem, engine, config)), " ".join(str(kernel.number) for kernel in kernels),
    )  # fmt: skip


def _bytes(problem: Problem, engine: ModuleType, config: Config) -> float:
    if not _has_kernels(engine):  # what torch's own launches move is not known: the least, and copies to and fro
        return problem.min_bytes + 2 * engine.memory(problem, config).copies
    work = engine.work(problem, config)
    return work.programs * (work.iterations * work.bytes_read + work.bytes_written) + work.extra_bytes


def tiles(cases: Iterable[Case], gpu: str) -> Iterator[tuple[str, str, plots.Tile, float]]:
    """(pass, case, tile, predicted seconds) of every config that has a tile, for :func:`perf.plots.tile_shares`."""
    for case in cases:
        for seconds, engine, config in ranking(_problem(case, gpu)):
            if engine is implicit_gemm:
                yield case.pass_, case.key, (config.block_m, config.block_n), seconds


def markdown(predictions: Sequence[Prediction], variants: Sequence[Variant], gpu: str) -> str:
    faulty = [variant for variant in variants if variant.faults]
    first = [prediction.engine for prediction in predictions if prediction.rank == 1]
    counts = ", ".join(f"{name} {first.count(name)}" for name in dict.fromkeys(first))
    parts = [
        f"# Predictions for {gpu} ({GPUS[gpu]}): nothing here was measured",
        "Times, bytes and rooflines are the cost model's (`triton_conv3d/tuning/cost_model.py`), from data sheets and "
        f"assumptions; for `aten` they are a guess. Machine code is what Triton {triton.__version__} makes, with torch "
        f"{torch.__version__}. Made by `python -m perf static --gpu {gpu}`.",
        f"Where another engine is chosen, times and bytes before and after are `{_BEFORE}`'s and the chosen one's.",
        f"{len(first)} cases. Predicted to be fastest: {counts}. {len(variants)} variants of our kernels, "
        f"{len(faulty)} of them with faults.",
    ]
    if faulty:
        parts += ["## Faults", table("number: | fault | engine | config | compiled for", map(_fault, faulty))]
    for suite in dict.fromkeys(prediction.suite for prediction in predictions):
        parts += [f"## {suite}", _suite_table([p for p in predictions if p.suite == suite])]
    parts += ["## Machine code", _code_table(variants)]
    return "\n\n".join(parts) + "\n"


def _fault(variant: Variant) -> tuple:
    return (
        variant.number,
        "; ".join(variant.faults),
        variant.kernel.engine,
        variant.kernel.config,
        variant.kernel.problem,
    )


def _suite_table(predictions: Sequence[Prediction]) -> str:
    """A line for each case: every engine's time with its best config; the fastest with kernels of ours in full, and beside
    its bytes those of the implicit GEMM."""
    by_case: dict[str, list[Prediction]] = {}
    for prediction in predictions:
        by_case.setdefault(prediction.case, []).append(prediction)
    names = [name for name in engines.available() if any(p.engine == name for p in predictions)]
    header = "layer | pass | type | bound | least MB: | predicted roofline: | {} | config | predicted MB: | {} | kernels"
    header = header.format(" | ".join(f"predicted {name}:" for name in names), f"predicted MB by {_BEFORE}:")
    return table(header, (_line(found, names) for found in by_case.values()))


def _line(found: Sequence[Prediction], names: Sequence[str]) -> Iterator[object]:
    """Of one case, its fastest engine first and in bold."""
    best = found[0]
    workload, pass_, *kind = best.case.split("/")
    yield from (workload.removeprefix(f"{best.suite}."), pass_, " ".join(kind), best.predicted_bound)
    yield from (_megabytes(best.min_bytes), duration(best.predicted_roofline_us))
    times = {p.engine: f"**{duration(p.predicted_us)}**" if p is best else duration(p.predicted_us) for p in found}
    yield from map(times.get, names)
    ours = next((p for p in found if p.kernels), None)
    before = next((_megabytes(p.predicted_bytes) for p in found if p.engine == _BEFORE), None)
    yield from (ours.config, _megabytes(ours.predicted_bytes)) if ours else (None, None)
    yield from (before, ours.kernels if ours else None)


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.{2 * (count < 1e8)}f}"


def _code_table(variants: Sequence[Variant]) -> str:
    names = ("kernel", "dtype", "precision", "pass_", "config", "registers", "spills", "shared", "matrix", "wide_copies",
             "narrow_copies", "loop")  # fmt: skip
    header = (
        "number: | name | type | precision | pass | config | registers: | spills: | shared bytes: | matrix: | "
        "16-byte copies: | narrower: | loop: | uses:"
    )
    compiled = [variant for variant in variants if isinstance(variant.result, Compiled)]
    return table(header, ((v.number, *(getattr(v.result.report, name) for name in names), v.uses) for v in compiled))


def write(path: Path, predictions: Sequence[Prediction], variants: Sequence[Variant], cases: Sequence[Case]) -> None:
    """Write to a file in the format of its ending, one of ``.md``, ``.csv`` and ``.png`` (the map of tiles)."""
    gpu = predictions[0].gpu
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".md":
        path.write_text(markdown(predictions, variants, gpu), encoding="utf-8")
    elif path.suffix == ".csv":
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(field.name for field in dataclasses.fields(Prediction))
            writer.writerows(map(dataclasses.astuple, predictions))
    else:
        title = f"Prediction of the cost model for {gpu}, nothing measured: tiles of implicit_gemm"
        figures = plots.figures()
        figures.save(figures.heat_map(plots.tile_shares(tiles(cases, gpu)), title, plots.TILE_CAPTION), path)


def arguments(parser: argparse.ArgumentParser) -> None:
    every = ",".join(workloads.suites())
    parser.add_argument("--suite", default=every, metavar="A,B", help=f"some of {every} (default: all of them)")
    parser.add_argument("--filter", metavar="TEXT", help="only cases whose key contains or matches this: *k64*/fp16/*")
    parser.add_argument("--gpu", default="H200", choices=GPUS, help="whose rates and architecture (default: H200)")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), metavar="N",
                        help="that compile at the same time (default: one for each core)")  # fmt: skip
    parser.add_argument("--out", type=Path, nargs="+", default=(), metavar="FILE",
                        help="*.md: report; *.csv: predictions; *.png: map of tiles (default: report to stdout)")  # fmt: skip


def main(options: argparse.Namespace) -> int:
    for path in options.out:
        if path.suffix not in _FORMATS:
            raise ValueError(f"--out {path}: its name must end in one of {', '.join(_FORMATS)}")
    if options.processes < 1:
        raise ValueError(f"--processes {options.processes}: expected 1 or more")
    cases = workloads.cases(workloads.suite(options.suite))
    if options.filter is not None:
        cases = workloads.select(cases, options.filter)
    with settings.configure(engine=None):  # of every engine, whatever the environment asks for
        predictions, variants = predict(cases, options.gpu, options.processes)
        for path in options.out:
            write(path, predictions, variants, cases)
    if not options.out:
        print(markdown(predictions, variants, options.gpu), end="")
    faulty = sum(bool(variant.faults) for variant in variants)
    print(f"{len(cases)} cases, {len(variants)} variants of kernels, {faulty} of them with faults", file=sys.stderr)
    return 1 if faulty else 0
