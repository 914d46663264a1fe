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
import itertools
import json
import math
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch
import triton
from triton.backends.compiler import GPUTarget

from triton_conv3d import console, engines
from triton_conv3d.engines import launching
from triton_conv3d.engines.base import Config
from triton_conv3d.engines.implicit_gemm.configs import SHARED_BYTES, packed_groups, spills
from triton_conv3d.problem import Operands, Problem, describe
from triton_conv3d.tuning import storage

ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx942")
TYPES = (("float16", "ieee"), ("bfloat16", "ieee"), ("float32", "tf32"))
KEPT = TYPES[1:]  # of the report of every config: float16 becomes the code of bfloat16, with another suffix
RESULTS = Path(__file__).with_name("results") / "machine_code"
_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_MATRIX = r"\b(HGMMA|UTC\w*MMA|HMMA|IGMMA|QGMMA)|v_mfma_\w+"


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

    def __str__(self) -> str:
        """``64 -> 64, groups 64, contiguous``."""
        text = f"{self.in_channels} -> {self.out_channels}"
        text += f", stride {self.stride}" if self.stride != 1 else ""
        text += f", groups {self.groups}" if self.groups != 1 else ""
        return text + ("" if self.channels_last else ", contiguous")


LAYERS = (
    Layer("implicit_gemm", 128, 128),
    Layer("implicit_gemm", 128, 128, stride=2),
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
    Layer("halo", 20, 20),
    Layer("kn2row", 96, 3, size=128),  # lines as long as its tiles
    Layer("kn2row", 20, 8, size=128),
    Layer("kn2row", 1, 64, size=128),  # its dgrad
    Layer("depthwise", 64, 64, groups=64),
    Layer("depthwise", 64, 64, groups=64, channels_last=False),
)


@dataclass(frozen=True)
class Report:
    """What one kernel became.

    Attributes:
        layer: :class:`Layer`, in words. gemm: its products belong on the tensor cores. vectors: every channel count
            of a program divides by 8, and the engine copies into shared memory.
        registers: of a thread. spills: instructions that move registers to local memory or back; on AMD registers.
        shared: bytes. matrix: matrix instructions. wide_copies, narrow_copies: copies into shared memory, of 16 bytes and
            of less; on AMD loads. loop: instructions of the smallest loop with matrix instructions. unwaited: see
            :func:`unwaited`.
    """

    arch: str
    dtype: str
    precision: str
    pass_: str
    engine: str
    layer: str
    config: str
    kernel: str
    gemm: bool
    vectors: bool
    registers: int
    spills: int
    shared: int
    matrix: int
    wide_copies: int
    narrow_copies: int
    loop: int
    unwaited: int = 0

    def faults(self) -> list[str]:
        """What must not be: spills, too much shared memory, no matrix instructions, narrow copies of full vectors, and
        products that are not waited for."""
        found = []
        if self.spills:
            found.append(f"{self.spills} spills")
        if self.shared > SHARED_BYTES[self.arch]:
            found.append(f"{self.shared} bytes of shared memory")
        if self.gemm and not self.matrix:
            found.append("no matrix instructions")
        if self.vectors and not self.wide_copies:
            found.append("no 16-byte copies")
        if self.unwaited:
            found.append(f"{self.unwaited} products are not waited for")
        return found


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


def problems(arch: str, dtype: str, precision: str, layer: Layer) -> Iterator[tuple[Problem, Operands]]:
    """Those passes of a layer that its engine computes, as the GPU of that architecture would see them."""
    kind = getattr(torch, dtype)
    form = torch.channels_last_3d if layer.channels_last else torch.contiguous_format

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=kind, memory_format=form)

    size = layer.size
    x = empty(2, layer.in_channels, size, size, size)
    w = empty(layer.out_channels, layer.in_channels // layer.groups, 3, 3, 3)
    grad = empty(2, layer.out_channels, *[size // layer.stride] * 3)
    bias = torch.empty(layer.out_channels, dtype=kind)
    for pass_, operands in (
        ("forward", Operands(x, w, None, bias)),
        ("dgrad", Operands(None, w, grad)),
        ("wgrad", Operands(x, None, grad)),
    ):
        problem = describe(
            pass_, operands, x.shape, w.shape, (layer.stride,) * 3, (1,) * 6, (1,) * 3, layer.groups,
            layer.channels_last, precision,
        ).replace(arch=arch, device=arch)  # fmt: skip
        if engines.get(layer.engine).supports(problem) is None:
            yield problem, operands


def read(problem: Problem, engine: ModuleType, config: Config, name: str, kernel, layer: object = "") -> Report:
    """Read one compiled kernel's resources and instructions."""
    arch = problem.arch
    main = not name.startswith("reduce_")  # the second stage of a split reduction only adds
    together = packed_groups(problem, config) if engine.NAME == "implicit_gemm" else 1
    filled = math.gcd(together * problem.group_in, together * problem.group_out) % 8 == 0
    if engine.NAME == "kn2row":  # of what it produces it loads nothing
        filled = max(problem.group_in, problem.group_out) % 8 == 0
    copies = main and filled and engine.NAME in ("implicit_gemm", "halo", "kn2row")
    registers, spills, text = resources(arch, kernel)
    if arch.startswith("gfx"):
        wide = len(re.findall(r"(buffer|global)_load_dwordx4", text))
        narrow = len(re.findall(r"(buffer|global)_load_(ushort|short|dword\b|dwordx2)", text))
    else:
        wide = len(re.findall(r"LDGSTS\.\S*128", text))
        narrow = len(re.findall(r"LDGSTS", text)) - wide
    return Report(
        arch, problem.dtype, problem.precision, problem.pass_, engine.NAME, str(layer), str(config), name,
        main and engine.work(problem, config).tensor_cores, copies,
        registers, spills, kernel.metadata.shared, len(re.findall(_MATRIX, text)), wide, narrow,
        main_loop(text)[0], unwaited(kernel.asm["ttgir"]),
    )  # fmt: skip


def resources(arch: str, kernel) -> tuple[int, int, str]:
    """(registers of a thread, spills, instructions as text) of a compiled kernel, as :class:`Report` has them."""
    if arch.startswith("gfx"):
        text = kernel.asm["amdgcn"]
        registers, spills = (re.search(rf"\.{name}:\s+(\d+)", text)[1] for name in ("vgpr_count", "vgpr_spill_count"))
        return int(registers), int(spills), text
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage, text = _tool("cuobjdump", "-res-usage", file.name), _tool("nvdisasm", "-c", file.name)
    return int(re.search(r"REG:(\d+)", usage)[1]), len(re.findall(r"\b(?:LDL|STL)\b", text)), text


def unwaited(ttgir: str) -> int:
    """Products of sm_90, which go on by themselves, whose sums something reads that does not wait for them, or whose left side
    is in registers that the next step of a loop may fill before they are done.

    Triton up to 3.9 overlooks what reads sums in a branch of the loop; then NVIDIA's compiler waits for every single product.
    3.6 splits a product whose left side is in registers, and at the end of a step leaves all parts going but one.
    """
    lines = [line.partition(" loc(")[0] for line in ttgir.splitlines()]
    waits = re.compile(r"ttng\.warp_group_dot|scf\.yield")
    count, left, going = 0, 0, False
    for number, line in enumerate(lines):
        if product := re.match(r"(\s*)(%\w+) = ttng\.warp_group_dot .*isAsync = true.*\} : (tensor)?", line):
            in_loop = itertools.takewhile(lambda other: other.startswith(product[1]), lines[number + 1 :])
            count += any(re.search(rf"{product[2]}\b", other) and not waits.search(other) for other in in_loop)
            left += product[3] is not None
        elif wait := re.search(r"warp_group_dot_wait .*pendings = (\d+)", line):
            going = wait[1] != "0"
        elif "scf.yield" in line:
            count, left = count + left * going, 0
    return count


def _tool(name: str, *arguments: str) -> str:
    return subprocess.run([str(_TOOLS / name), *arguments], capture_output=True, text=True, check=True).stdout


def main_loop(text: str) -> tuple[int, int]:
    """(instructions, matrix instructions among them) of the smallest loop that has any; zeros without one."""
    counts = ((len(loop), sum(re.search(_MATRIX, line) is not None for line in loop)) for loop in loops(text))
    return min((count for count in counts if count[1]), default=(0, 0))


def loops(text: str) -> Iterator[list[str]]:
    """The instructions of every loop, from a label to the branch back to it."""
    labels: dict[str, int] = {}
    body: list[str] = []
    for line in text.splitlines():
        label = re.match(r"\s*(\.L\w+):", line)
        if label:
            labels[label[1]] = len(body)
        elif re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+\S", line) or re.match(r"\s+[sv]_\w+|\s+(global|buffer|ds)_\w+", line):
            body.append(line)
            branch = re.search(r"(?:BRA\S*\s.*`\(|s_c?branch\w*\s+)(\.L\w+)", line)
            if branch and branch[1] in labels:
                yield body[labels[branch[1]] :]


def configs(problem: Problem, engine: ModuleType, most: int | None = None) -> list[Config]:
    """What decides about the code: every tile, whole and split; or the first of ``most`` tiles split, the others whole.

    Of ``depthwise``, which splits more than the reduction, what it offers: all splits above 1 share their code. Of
    ``kn2row`` every tile once: its lines are a number at run time.
    """
    offers = engine.configs(problem)
    if engine.NAME == "kn2row":
        offers = {dataclasses.replace(offer, lines=0): offer for offer in offers}.values()
    if not any(hasattr(offer, "splits") for offer in offers):
        return list(offers)[:most]
    if engine.NAME == "depthwise":
        return list(dict.fromkeys(dataclasses.replace(config, splits=min(config.splits, 2)) for config in offers))[:most]
    whole = list(dict.fromkeys(dataclasses.replace(config, splits=1) for config in offers))[:most]
    split = [dataclasses.replace(tile, splits=2) for tile in whole]
    split = [config for config in split if not spills(problem, config)]
    return whole + split if most is None else split[:1] + whole[1:]


def reports(arch: str, dtype: str, precision: str, layer: Layer, most: int | None) -> Iterator[Report]:
    """One report for every kernel that the passes of a layer start with :func:`configs`."""
    engine = engines.get(layer.engine)
    for problem, operands in problems(arch, dtype, precision, layer):
        for config in configs(problem, engine, most):
            kernels = {launch[0]: launch for launch in launches(problem, operands, engine, config)}  # each once
            with compiling_for(arch):
                for name, kernel in map(compiled, kernels.values()):
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


def _written(path: Path | None) -> list[Report]:
    """The reports of a file; none without it."""
    if not path or not path.is_file():
        return []
    names = {field.name for field in dataclasses.fields(Report)}
    kernels = json.loads(path.read_text())["kernels"]
    return [Report(**{name: value for name, value in kernel.items() if name in names}) for kernel in kernels]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m perf.machine_code", description=__doc__.splitlines()[0])
    parser.add_argument("--all", action="store_true", help="every config of every layer and engine")
    parser.add_argument("--arch", choices=ARCHITECTURES, nargs="+", default=ARCHITECTURES)
    parser.add_argument("--engine", choices=sorted({layer.engine for layer in LAYERS}), help="with --all: no other is compiled")
    parser.add_argument("--dtype", choices=[name for name, _ in TYPES], default="bfloat16", help="without --all")
    kept = "write the report as JSON (with --all, of one engine or of all architectures: where it is kept)"
    parser.add_argument("--out", type=Path, help=kept)
    options = parser.parse_args()
    if options.engine and not options.all:
        parser.error(f"--engine {options.engine}: it goes with --all; the representative set is of one engine")
    out = options.out
    if out is None and options.all and (options.engine or options.arch == ARCHITECTURES):
        out = RESULTS / f"triton-{triton.__version__}.json"
    before = _written(out) if options.engine else []
    rows = []
    for arch in ARCHITECTURES if options.engine else options.arch:
        for dtype, precision in KEPT if options.all else [t for t in TYPES if t[0] == options.dtype]:
            for layer in LAYERS if options.all else LAYERS[:1]:
                if options.engine not in (None, layer.engine) or arch not in options.arch:
                    key = (arch, dtype, precision, layer.engine, str(layer))
                    rows += [r for r in before if (r.arch, r.dtype, r.precision, r.engine, r.layer) == key]
                    continue
                found = list(reports(arch, dtype, precision, layer, None if options.all else 2))
                print(table(found), flush=True)
                rows += found
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        kernels = ",\n".join(json.dumps(dataclasses.asdict(row) | {"faults": row.faults()}) for row in rows)
        storage.write(out, f'{{"triton": "{triton.__version__}", "kernels": [\n{kernels}\n]}}\n'.encode())
        out.chmod(0o644)
    faulty = [r for r in rows if r.faults()]
    print(f"{len(rows)} kernels, {len(faulty)} with faults")
    return 1 if faulty else 0


if __name__ == "__main__":
    sys.exit(console.status(main, "perf.machine_code", (ValueError,)))
