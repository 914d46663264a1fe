"""``python -m autotune sweep | merge | analyze | fit | variants | export``: the table factory's command line."""

from __future__ import annotations

import argparse
import functools
import math
import re
import sys
from datetime import datetime, timezone
from pathlib import Path

import torch

from triton_conv3d import console, settings
from triton_conv3d.problem import PASSES
from triton_conv3d.tuning import coefficients, cost_model, table
from triton_conv3d.tuning import variants as tuned_variants
from triton_conv3d.tuning.environment import environment, source_hash
from triton_conv3d.tuning.faults import is_illegal_access
from triton_conv3d.tuning.select import ranking
from triton_conv3d.tuning.variants import MOST as MOST_VARIANTS
from triton_conv3d.workload import DTYPES

from . import analysis, device, export, fit, pictures, records, suites, sweep, variants
from .records import Sweep

_ranking = functools.partial(ranking, measuring=True)


def main(arguments: list[str] | None = None) -> int:
    """Run one command. Returns the exit status: 0 done, 1 the device was lost, 2 a mistake in the call or nothing could be
    done."""
    options = _parser().parse_args(arguments)
    return console.status(lambda: options.run(options), "error", (ValueError, device.NoGPU))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m autotune", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    sweeping = commands.add_parser("sweep", help="measure candidates of many problems into a file; goes on where it ended")
    sweeping.add_argument("suites", nargs="+", metavar="SUITE", help=f"a workload file, or {suites.DESIGNED}")
    sweeping.add_argument("--out", type=Path, required=True, metavar="FILE", help="the sweep file (JSON lines)")
    sweeping.add_argument("--passes", type=_list, default=PASSES, help=f"default: {','.join(PASSES)}")
    sweeping.add_argument("--dtypes", type=_list, default=(), help=f"of {','.join(DTYPES)} (default: each layer's own)")
    sweeping.add_argument("--precisions", type=_list, default=("tf32",), help="of float32 products (default: tf32)")
    sweeping.add_argument("--layouts", type=_list, default=("channels_last",), help="default: channels_last")
    sweeping.add_argument("--guided", type=int, metavar="N", help="search N candidates of a problem (default: measure all)")
    sweeping.add_argument("--budget", type=float, metavar="SECONDS", help="begin no candidate after that")
    sweeping.add_argument("--dry-run", action="store_true", help="say what would be measured, on the GPU given by --gpu")
    sweeping.add_argument("--gpu", default="NVIDIA H200,sm_90", metavar="NAME,ARCH", help="for --dry-run")
    sweeping.set_defaults(run=_sweep)

    merging = commands.add_parser("merge", help="one sweep of several, or one table of several")
    merging.add_argument("files", nargs="+", type=Path, metavar="FILE", help="sweeps (.jsonl), or tables (.json)")
    merging.add_argument("--out", type=Path, required=True, help="the merged sweep; of tables the directory")
    merging.set_defaults(run=_merge)

    analyzing = commands.add_parser("analyze", help="regret, the value of the best k variants, heat maps of tiles")
    analyzing.add_argument("sweep", type=Path)
    analyzing.add_argument("--out", type=Path, metavar="FOLDER", help="for pictures (default: beside the sweep)")
    analyzing.set_defaults(run=_analyze)

    fitting = commands.add_parser("fit", help="calibrate the cost model's coefficients of a sweep's GPU")
    fitting.add_argument("sweep", type=Path)
    fitting.add_argument("--out", type=Path, default=table.SHIPPED, metavar="DIRECTORY", help="default: the shipped tables'")
    fitting.set_defaults(run=_fit)

    choosing = commands.add_parser("variants", help="choose the compiled variants that tuning draws from, by the model")
    choosing.add_argument("suites", nargs="+", metavar="SUITE", help=f"a workload file, or {suites.DESIGNED}")
    choosing.add_argument("--gpu", default="NVIDIA H200,sm_90", metavar="NAME,ARCH")
    choosing.set_defaults(run=_variants)

    exporting = commands.add_parser("export", help="write the table of a sweep's GPU")
    exporting.add_argument("sweep", type=Path)
    exporting.add_argument("--out", type=Path, default=table.SHIPPED, metavar="DIRECTORY", help="default: the shipped tables'")
    exporting.set_defaults(run=_export)
    return parser


def _list(text: str) -> tuple[str, ...]:
    return tuple(part for part in text.split(",") if part)


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds").replace("+00:00", "Z")


def _sweep(options: argparse.Namespace) -> int:
    if options.guided is not None and options.guided < 2:
        raise ValueError(f"--guided {options.guided}: at least 2, torch's own and another")
    if options.budget is not None and not 0 < options.budget < math.inf:
        raise ValueError(f"--budget {options.budget:g}: expected seconds above 0")
    cases = suites.cases(
        suites.layers(options.suites), options.passes, options.dtypes, options.precisions, options.layouts
    )
    with _of_every_engine():
        return _plan(cases, options) if options.dry_run else _measure(cases, options)


def _measure(cases: list[suites.Case], options: argparse.Namespace) -> int:
    here = device.find()
    names = environment(here)
    problems = {case.problem(names["gpu"], names["arch"]): case for case in cases}
    policy = {"mode": "full" if options.guided is None else f"guided {options.guided}", "rounds": sweep.REPETITIONS}
    header = records.header(names, policy, device.commit(), _now())
    try:
        with records.Writer(options.out, header) as writer, torch.no_grad():
            done = sweep.run(
                list(problems), _ranking, device.benches(problems, here), writer, most=options.guided, budget=options.budget,
                report=lambda line: print(line, flush=True),
            )  # fmt: skip
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        raise
    except RuntimeError as error:
        if not is_illegal_access(error):
            raise
        print(f"error: {error}\nit is quarantined in this sweep; the same command goes on without it", file=sys.stderr)
        return 1
    print(f"{done.measured} measurements in {done.seconds:.0f} s; {done.done} problems are done, {done.left} left")
    if done.left:
        print("the same command goes on")
    return 0


def _of_every_engine() -> settings.configure:
    """Whatever the environment asks for; the mode ``full`` has those on trial too."""
    return settings.configure(autotune="full", engine=None)


def _gpu(text: str) -> tuple[str, str]:
    name, _, arch = (part.strip() for part in text.partition(","))
    if not name or not re.fullmatch(r"sm_\d+|gfx[0-9a-f]+", arch):
        raise ValueError(f"--gpu {text!r}: expected a name and an architecture, as 'NVIDIA H200,sm_90'")
    return name, arch


def _plan(cases: list[suites.Case], options: argparse.Namespace) -> int:
    gpu, arch = _gpu(options.gpu)
    problems = [case.problem(gpu, arch) for case in cases]
    counts = [len(_ranking(problem)) for problem in problems]
    print(f"{len(problems)} problems, {sum(counts)} candidates; a table needs at least "
          f"{sweep.least_seconds(problems, _ranking):.0f} s on a {gpu}, by the cost model's predictions")  # fmt: skip
    return 0


def _merge(options: argparse.Namespace) -> None:
    if all(path.suffix == ".json" for path in options.files):
        merged = table.merged([_table(path) for path in options.files])
        options.out.mkdir(parents=True, exist_ok=True)
        print(f"{len(merged.entries)} plans written to {table.write(merged, options.out)}")
        return
    together = records.merged([records.read(path) for path in options.files])
    records.write(options.out, together)
    print(f"{len(together.problems)} problems, {len(together)} measurements written to {options.out}")


def _table(path: Path) -> table.Table:
    try:
        return table.read(path)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _of_these_sources(path: Path) -> Sweep:
    """A sweep of the engines as they are here. Raises :class:`.records.Refused`."""
    found = records.read(path)
    if found.environment.get("engines") != source_hash():
        raise records.Refused(
            f"{path}: it was measured with engine sources {found.environment.get('engines')!r:.14}..., here they are "
            f"{source_hash()!r:.14}...: its times are void; sweep again, or check out commit {found.header['commit']}"
        )
    return found


def _analyze(options: argparse.Namespace) -> None:
    found = analysis.measured(_of_these_sources(options.sweep))
    if not found:
        raise ValueError(f"{options.sweep}: no problem of which enough candidates were measured: nothing to analyze")
    print(analysis.text(found, MOST_VARIANTS))
    for path in pictures.draw(found, options.out or options.sweep.with_suffix(""), MOST_VARIANTS):
        print(path)


def _fit(options: argparse.Namespace) -> None:
    read = _of_these_sources(options.sweep)
    gpu, arch = read.environment["gpu"], read.environment["arch"]
    defaults = cost_model.defaults(gpu)
    found = fit.fit(analysis.measured(read), defaults)
    header = {"gpu": gpu, "arch": arch, "engines": read.environment["engines"], "created": _now(),
              "measurements": found.measurements}  # fmt: skip
    options.out.mkdir(parents=True, exist_ok=True)
    path = coefficients.write(found.values, defaults, options.out, header)
    print(f"mean error of log(predicted / measured): {found.before:.3f} with the defaults, {found.after:.3f} fitted")
    for name, value in found.values.items():
        print(f"  {name:<18} {getattr(defaults, name):.4g} -> {value:.4g}")
    print(path)


def _variants(options: argparse.Namespace) -> None:
    problems = variants.problems(suites.layers(options.suites), *_gpu(options.gpu))
    with _of_every_engine():
        losses = variants.write(problems, tuned_variants.FILE)
    for name, loss in losses.items():
        print(f"{name}: {MOST_VARIANTS} variants, {loss:.3f} of the best's time by the model")
    print(tuned_variants.FILE)


def _export(options: argparse.Namespace) -> None:
    made = export.table(_of_these_sources(options.sweep), _now())
    options.out.mkdir(parents=True, exist_ok=True)
    print(f"{len(made.entries)} plans written to {table.write(made, options.out)}")


if __name__ == "__main__":
    sys.exit(main())
