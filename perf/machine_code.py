"""Machine code of every config, compiled ahead of time: no GPU and no driver are needed.

    python -m perf.machine_code        the representative set, printed as a table
    python -m perf.machine_code --all  every config of every architecture and type, written to perf/results/machine_code
    python -m perf.machine_code --all --engine halo  those of one engine (and --arch), the others as they were written before

A launch is compiled exactly as it would be at run time: the engine's own ``launch`` runs with a driver that only names
the architecture, and every kernel that it would start is compiled instead.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import json
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch
import triton
from triton.backends.compiler import GPUTarget

from triton_conv3d import console, engines
from triton_conv3d.engines import launching, tma
from triton_conv3d.engines.base import Config
from triton_conv3d.engines.implicit_gemm.configs import spills
from triton_conv3d.engines.tma.configs import WGRAD_BRICKS
from triton_conv3d.engines.tma.configs import spills as spills_by_bricks
from triton_conv3d.problem import CHANNELS_LAST, CONTIGUOUS, Operands, Problem, describe
from triton_conv3d.tuning import storage
from triton_conv3d.workload import LAYOUTS

from .disassembly import AROUND, Report, read

ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx942")
TYPES = (("float16", "ieee"), ("bfloat16", "ieee"), ("float32", "tf32"))
KEPT = TYPES[1:]  # of the report of every config: float16 becomes the code of bfloat16, with another suffix
RESULTS = Path(__file__).with_name("results") / "machine_code"
# What a problem may be beside a layer, in words of :attr:`Layer.besides`.
_INTO_CONTIGUOUS = {"residual": True, "layouts": (CHANNELS_LAST, CHANNELS_LAST, CONTIGUOUS)}
BESIDES = {
    "gelu": {"residual": True, "activation": "gelu"},  # the longest of the activations
    "tanh_into_contiguous": {"activation": "tanh", **_INTO_CONTIGUOUS},
    "into_contiguous": _INTO_CONTIGUOUS,
    "index64": {"index64": True},
    "ragged": {"input_size": (5, 21, 21)},  # which bricks fit badly
    "flat": {"stride": (1, 2, 2)},
    "k2": {"kernel_size": (2, 2, 2), "padding": (0,) * 6},
    "k4": {"kernel_size": (4, 4, 4), "padding": (2, 1) * 3},
    "k5": {"kernel_size": (5, 5, 5), "padding": (2,) * 6},
    "k7": {"kernel_size": (7, 7, 7), "padding": (3,) * 6},
}
_SPLITS_EVERY_TILE = ("implicit_gemm", "folded", "halo", "tma")


@dataclass(frozen=True)
class Layer:
    """A 3x3x3 convolution with padding 1 of two cubes, and the engine that computes it."""

    engine: str
    in_channels: int
    out_channels: int
    stride: int = 1
    groups: int = 1
    channels_last: bool = True
    size: int = 32  # of an edge
    besides: str = ""  # some of :data:`BESIDES`

    def __str__(self) -> str:
        """``64 -> 64, groups 64, contiguous``."""
        text = f"{self.in_channels} -> {self.out_channels}"
        text += f", stride {self.stride}" if self.stride != 1 else ""
        text += f", groups {self.groups}" if self.groups != 1 else ""
        return text + ("" if self.channels_last else ", contiguous") + (f", {self.besides}" if self.besides else "")


_OF_HOPPER = ("gelu", "tanh_into_contiguous", "into_contiguous", "index64")
_OF_HOPPER += ("ragged gelu", "ragged tanh_into_contiguous", "ragged index64")
LAYERS = (
    Layer("implicit_gemm", 128, 128),
    Layer("implicit_gemm", 128, 128, stride=2),
    Layer("implicit_gemm", 96, 192),  # large tiles with short steps, as of the next
    Layer("implicit_gemm", 96, 96, stride=2),
    Layer("implicit_gemm", 16, 16),  # has tiles of its own
    Layer("implicit_gemm", 16, 16, stride=2),
    Layer("implicit_gemm", 20, 20),  # fills no vector
    Layer("implicit_gemm", 64, 64, groups=16),  # several groups in a tile
    Layer("folded", 1, 128),
    Layer("folded", 3, 128),
    Layer("folded", 128, 3),  # its dgrad: forward has too many channels
    Layer("folded", 16, 3, stride=2),  # its dgrad and wgrad, by blocks too
    Layer("halo", 64, 64),
    Layer("halo", 32, 32),
    Layer("halo", 48, 48),  # short steps
    Layer("halo", 16, 16),
    Layer("halo", 96, 96, size=4),  # wgrad of few planes
    Layer("halo", 20, 20),
    Layer("kn2row", 96, 3, size=128),  # lines as long as its tiles
    Layer("kn2row", 20, 8, size=128),
    Layer("kn2row", 1, 64, size=128),  # its dgrad
    Layer("depthwise", 64, 64, groups=64),
    Layer("depthwise", 64, 64, groups=64, channels_last=False),
    Layer("toeplitz", 64, 64, groups=64, besides="k5"),
    Layer("toeplitz", 48, 48, groups=48, channels_last=False, besides="k7"),
    Layer("space_to_depth", 1, 64, besides="k7"),
    *(Layer("tma", c, c, stride) for c, stride in ((256, 1), (128, 2), (192, 1), (96, 1), (48, 1), (24, 1))),  # every tile
    *(Layer("hopper", c, c, stride) for c, stride in ((256, 1), (128, 2), (96, 1), (96, 2), (64, 1), (48, 1), (24, 1))),
    *(Layer("hopper", c, 64, 2, besides=words) for c in (16, 32) for words in ("", "k2", "k4", "flat")),  # classes of dgrad
    Layer("hopper", 64, 64, 2, besides="flat"),
    Layer("hopper", 128, 80),  # tiles of 80 filters by lines; the next have those of wgrad by other taps
    *(Layer("hopper", 64, filters, besides=k) for filters, k in ((128, "k2"), (64, "k4"), (64, "k5"), (32, "k7"))),
    *(Layer("hopper", c, c, besides=words) for c in (256, 96, 48, 32) for words in _OF_HOPPER),
    *(Layer("hopper", 128, 128, 2, besides=words) for words in ("ragged gelu", "ragged index64")),
    Layer("rounded", 256, 256, channels_last=False),
    Layer("rounded", 256, 256, channels_last=False, besides="gelu"),
    Layer("rounded", 256, 256, channels_last=False, stride=2),
)


class NamedTarget:
    """A driver that knows the architecture and nothing else: enough for Triton to specialise and compile."""

    def __init__(self, target: GPUTarget):
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.target.arch if isinstance(self.target.arch, int) else 0

    def get_current_stream(self, device: int) -> int:
        return 0


def target(arch: str) -> GPUTarget:
    return GPUTarget("hip", arch, 64) if arch.startswith("gfx") else GPUTarget("cuda", int(arch[3:]), 32)


def operands_of(problem: Problem) -> Operands:
    """Dense tensors without memory, in the layouts of the problem."""

    def empty(role: int) -> torch.Tensor:
        shape = problem.shapes[role]
        like = {"dtype": problem.torch_dtype, "device": "meta"}
        return torch.empty(shape, **like, memory_format=LAYOUTS[problem.layouts[role]])

    if problem.pass_ == "forward":
        bias = torch.empty(problem.out_channels, dtype=problem.torch_dtype, device="meta") if problem.bias else None
        return Operands(empty(0), empty(1), None, bias, problem.empty_result("meta") if problem.residual else None)
    return Operands(None, empty(1), empty(2)) if problem.pass_ == "dgrad" else Operands(empty(0), None, empty(2))


def problems(arch: str, dtype: str, precision: str, layer: Layer) -> Iterator[tuple[Problem, Operands]]:
    """Those passes of a layer that its engine computes, as the GPU of that architecture would see them."""
    besides = {name: value for word in layer.besides.split() for name, value in BESIDES[word].items()}
    for pass_ in ("forward",) if "residual" in besides else ("forward", "dgrad", "wgrad"):
        posed = Problem(
            pass_, 2, layer.in_channels, layer.out_channels, (layer.size,) * 3, (3,) * 3, (layer.stride,) * 3, (1,) * 6,
            groups=layer.groups, bias=pass_ == "forward", dtype=dtype,
            layouts=(CHANNELS_LAST if layer.channels_last else CONTIGUOUS,) * 3,
        )  # fmt: skip
        seen = describe(
            pass_, operands_of(posed), posed.input_shape, posed.weight_shape, posed.stride, posed.padding, posed.dilation,
            posed.groups, layer.channels_last, precision,
        )  # fmt: skip
        problem = seen.replace(device=arch, arch=arch, **besides)
        if engines.get(layer.engine).supports(problem) is None:
            yield problem, operands_of(problem)


def launches(problem: Problem, operands: Operands, engine: ModuleType, config: Config) -> list[tuple]:
    """(kernel, arguments, options) of every kernel that this launch would start; nothing runs."""
    found: list[tuple] = []
    with launching.replaced(lambda kernel, grid, args, options: found.append((kernel, args, options))):
        engine.launch(problem, operands, config)
    return found


@contextlib.contextmanager
def compiling_for(arch: str) -> Iterator[None]:
    """Triton compiles for this architecture within the block."""
    triton.runtime.driver.set_active(NamedTarget(target(arch)))
    try:
        yield
    finally:
        with contextlib.suppress(RuntimeError):  # without a GPU there is no driver to go back to
            triton.runtime.driver.reset_active()


def compiled(launch: tuple) -> tuple[str, object]:
    """(name, compiled kernel) of one of :func:`launches`, within :func:`compiling_for`."""
    kernel, args, options = launch
    return kernel.__name__, kernel.run(*args, grid=(1, 1, 1), warmup=True, **options)


def configs(problem: Problem, engine: ModuleType, most: int | None = None) -> list[Config]:
    """What decides about the code: every tile, whole and split; or the first of ``most`` tiles split, the others whole.

    Of engines whose splits are not of the reduction alone, or not all of whose tiles can be split, what they offer: all splits
    above 1 share their code, but in wgrad of ``hopper``, where they decide about its chains. Of ``kn2row`` every tile once:
    its lines are a number at run time. Of wgrad of ``tma`` on sm_90 every tile also with the left side in registers. Of lines
    of ``hopper`` those of one sample and those of two.
    """
    offers = engine.configs(problem)
    if engine.NAME == "hopper":
        offers = (*offers, *(dataclasses.replace(o, samples=3 - o.samples) for o in offers if hasattr(o, "samples")))
    if engine.NAME == "kn2row":
        offers = {dataclasses.replace(offer, lines=0): offer for offer in offers}.values()
    if engine.NAME not in _SPLITS_EVERY_TILE or not any(hasattr(offer, "splits") for offer in offers):
        in_chains = engine.NAME == "hopper" and problem.pass_ == "wgrad"
        return list(offers if in_chains else dict.fromkeys(map(_clipped, offers)))[:most]
    whole = list(dict.fromkeys(offer.whole() for offer in offers))[:most]
    if engine is tma and problem.pass_ == "wgrad" and problem.arch == "sm_90":
        whole += list(map(_by_registers, whole))
    refused = spills_by_bricks if engine is tma else spills
    split = [config for config in (tile.replace(splits=2) for tile in whole) if not refused(problem, config)]
    return whole + split if most is None else split[:1] + whole[1:]


def _clipped(config: Config) -> Config:
    """With 2 splits for more."""
    if hasattr(config, "config"):  # of another engine
        return config.replace(config=_clipped(config.config))
    return config.replace(splits=min(config.splits, 2)) if hasattr(config, "splits") else config


def _by_registers(config: Config) -> Config:
    n, d, h, w = WGRAD_BRICKS[math.prod(config.brick)][-1]
    return config.replace(brick_n=n, brick_d=d, brick_h=h, brick_w=w)


def reports(arch: str, dtype: str, precision: str, layer: Layer, chosen: Callable = configs) -> Iterator[Report]:
    """One report for every kernel that the passes of a layer start with the configs that ``chosen(problem, engine)`` gives.

    What several configs start around their products, all the same, is reported with the first.
    """
    engine = engines.get(layer.engine)
    for problem, operands in problems(arch, dtype, precision, layer):
        around = set()
        for config in chosen(problem, engine):
            kernels = {launch[0]: launch for launch in reversed(launches(problem, operands, engine, config))}  # each once
            with compiling_for(arch):
                for name, kernel in map(compiled, reversed(kernels.values())):
                    if kernel.hash in around:
                        continue
                    if name.startswith(AROUND):
                        around.add(kernel.hash)
                    yield read(problem, engine, config, name, kernel, layer)


def table(rows: list[Report]) -> str:
    header = "arch    type      pass     layer          kernel          regs spill  shared  mma  16B <16B  loop  config"
    lines = [
        f"{r.arch:7} {r.dtype:9} {r.pass_:8} {r.layer:14} {r.kernel:15} {r.registers:4} {r.spills:5} {r.shared:7} "
        f"{r.matrix:4} {r.wide_copies:4} {r.narrow_copies:4} {r.loop:5}  {r.config}"
        + "".join(f"  FAULT: {fault}" for fault in r.faults())
        for r in rows
    ]
    return "\n".join([header, *lines])


def _written(path: Path | None) -> list[dict]:
    """The kernels of a file; none without it."""
    return json.loads(path.read_text())["kernels"] if path and path.is_file() else []


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m perf.machine_code", description=__doc__.splitlines()[0])
    parser.add_argument("--all", action="store_true", help="every config of every layer and engine")
    parser.add_argument("--arch", choices=ARCHITECTURES, nargs="+", default=ARCHITECTURES)
    parser.add_argument("--engine", choices=sorted({layer.engine for layer in LAYERS}), help="with --all: no other is compiled")
    parser.add_argument("--dtype", choices=[name for name, _ in TYPES], default="bfloat16", help="without --all")
    parser.add_argument("--most", type=int, default=2, help="configs of a pass, without --all")
    kept = "write the report as JSON (with --all, of one engine or of all architectures: where it is kept)"
    parser.add_argument("--out", type=Path, help=kept)
    options = parser.parse_args()
    if options.engine and not options.all:
        parser.error(f"--engine {options.engine}: it goes with --all; the representative set is of one engine")
    out = options.out
    if out is None and options.all and (options.engine or options.arch == ARCHITECTURES):
        out = RESULTS / f"triton-{triton.__version__}.json"
    before = _written(out) if options.engine else []
    chosen = configs if options.all else functools.partial(configs, most=options.most)
    rows = []
    for arch in ARCHITECTURES if options.engine else options.arch:
        for dtype, precision in KEPT if options.all else [t for t in TYPES if t[0] == options.dtype]:
            for layer in LAYERS if options.all else LAYERS[:1]:
                if options.engine not in (None, layer.engine) or arch not in options.arch:
                    key = (arch, dtype, precision, layer.engine, str(layer))
                    names = ("arch", "dtype", "precision", "engine", "layer")
                    rows += [row for row in before if tuple(map(row.get, names)) == key]
                    continue
                found = list(reports(arch, dtype, precision, layer, chosen))
                print(table(found), flush=True)
                rows += [dataclasses.asdict(report) | {"faults": report.faults()} for report in found]
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        kernels = ",\n".join(map(json.dumps, rows))
        storage.write(out, f'{{"triton": "{triton.__version__}", "kernels": [\n{kernels}\n]}}\n'.encode())
        out.chmod(0o644)
    faulty = [row for row in rows if row["faults"]]
    print(f"{len(rows)} kernels, {len(faulty)} with faults")
    return 1 if faulty else 0


if __name__ == "__main__":
    sys.exit(console.status(main, "perf.machine_code", (ValueError,)))
