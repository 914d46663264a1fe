"""What a compiled kernel is: its registers and shared memory, its instructions, and what of it must not be."""

from __future__ import annotations

import itertools
import math
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import triton
from triton.backends.nvidia.compiler import get_ptxas

from triton_conv3d.engines.base import Config
from triton_conv3d.engines.hopper.line_configs import LINE
from triton_conv3d.engines.implicit_gemm.configs import SHARED_BYTES, packed_groups
from triton_conv3d.engines.tma.configs import left_is_shared
from triton_conv3d.problem import Problem

_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_MATRIX = r"\b(HGMMA|UTC\w*MMA|HMMA|IGMMA|QGMMA)|v_mfma_\w+"
_FROM_SHARED = r"\bHGMMA\S* R\d+, gdesc|\bUTC\w*MMA\S* gdesc\[\w+\], gdesc"  # both operands
# Kernels without products begin so.
AROUND = ("reduce_", "rounded_copy", "move_blocks", "expand", "collect", "gather_lines", "transpose")
# Engines whose threads copy into shared memory, kernels whose blocks the copy engine does, and engines written so that
# products of sm_90 and sm_100 read shared memory.
_COPIED_BY_THREADS = ("implicit_gemm", "halo", "kn2row", "rounded")
_BY_LINES = ("line_ring", "line_dgrad_ring", "line_wgrad_ring")  # whose products have their left side from registers
_COPIED_IN_BULK = ("gather_bricks", "wgrad_bricks", "gather_ring", "wgrad_ring", "rounded_wgrad", *_BY_LINES)
_SHARED_PRODUCTS = ("tma", "hopper", "rounded")

MOST_PER_PRODUCT = 14  # instructions of a thread in the main loop of these on sm_90 for one matrix instruction
# (kernel, tile) beyond that, and what it takes at most with Triton 3.6.0 and 3.9.0.
BEYOND = {
    # A product with its operands' addresses is 4 to 5 instructions; in each step Triton waits, counts stages and copies in 65,
    # and the walk to the next one is 10 to 20. Eight products, 103 to 107 instructions without any walk. Those of 256 columns
    # take 128 cycles each: issue waits for them.
    ("gather_bricks", "256 x 128 x 128"): 15.9,
    ("gather_bricks, strided dgrad", "128 x 128 x 64"): 15.6,
    ("wgrad_bricks", "128 x 128 x 128"): 14.8,
    ("wgrad_bricks", "128 x 64 x 64"): 14.8,  # of channels that do not fill it
    # Four: shared memory has no room for longer steps that hide their copies, or the channels end. Two taps in a step, with
    # copies of their own, would take 22 for each product.
    ("gather_bricks", "256 x 128 x 64"): 27.3,
    ("gather_bricks", "256 x 64 x 64"): 27.8,
    ("gather_bricks", "64 x 64 x 64"): 26.0,
    ("gather_bricks", "128 x 128 x 32"): 28.5,
    # Two and one, where longer steps would walk clearly more channels, or the channels of a group end.
    ("gather_bricks", "256 x 128 x 32"): 51,
    ("gather_bricks", "256 x 64 x 32"): 54.5,
    ("gather_bricks", "64 x 64 x 16"): 95,
    ("gather_ring", "256 x 128 x 32"): 23,
    ("gather_ring", "256 x 64 x 32"): 23,
    ("gather_ring", "128 x 64 x 16"): 34,
    # A gradient that is neither flat nor in rows: the left side of eight products, which it reaches through registers.
    ("wgrad_bricks, by registers", "128 x 128 x 128"): 20.6,
    ("wgrad_bricks, by registers", "128 x 64 x 64"): 19.6,
    # Of rounded, in tf32: four or eight products of 8 channels each, beside the copies of all threads. Of a strided dgrad those
    # of the weight are of 4 bytes.
    ("gather_gemm", "128 x 256 x 32"): 40,
    ("gather_gemm", "256 x 128 x 32"): 21.2,
    ("gather_gemm", "128 x 128 x 32"): 33.2,
    ("gather_gemm", "128 x 64 x 32"): 30.2,
    ("gather_gemm", "64 x 64 x 32"): 33.2,
    ("gather_gemm, strided dgrad", "128 x 64 x 32"): 37.8,
    ("gather_gemm, strided dgrad", "64 x 64 x 32"): 42,
    ("rounded_wgrad", "128 x 256 x 32"): 26.2,
    ("rounded_wgrad", "256 x 128 x 32"): 16.4,
    ("rounded_wgrad", "128 x 128 x 32"): 24.5,
    ("rounded_wgrad", "64 x 64 x 32"): 24,
}
# Those some of whose kernels' products, with Triton 3.6.0, NVIDIA's compiler has wait for one another (C7515).
SERIALISED = (
    ("gather_gemm", "128 x 256 x 32"), ("gather_gemm", "128 x 128 x 32"), ("gather_gemm", "128 x 64 x 32"),
    ("rounded_wgrad", "256 x 128 x 32"),
)  # fmt: skip
_ROWS = ("pixels", "block_m", "brick_n", "brick_d", "brick_h", "brick_w", "planes", "lines", "rows")  # sides of a tile


@dataclass(frozen=True)
class Report:
    """What one kernel became.

    Attributes:
        layer: :class:`.machine_code.Layer`, in words. gemm: its products belong on the tensor cores. vectors: every channel
            count of a program divides by 8, and the engine copies into shared memory.
        registers: of a thread. spills: instructions that move registers to local memory or back; on AMD registers.
        shared: bytes. matrix: matrix instructions. wide_copies, narrow_copies: copies into shared memory, of 16 bytes and
            of less; on AMD loads. loop: instructions of the smallest loop with matrix instructions. unwaited: see
            :func:`unwaited`.
        loop_matrix: matrix instructions of that loop. from_shared: those, of all, whose operands both come from shared memory.
        kind: what else its code depends on: ``strided dgrad``, or ``by registers``, from which products of sm_90 have their
            left side.
        bulk_copies: by the copy engine, of bricks and weights, or of wgrad of ``rounded`` of rows. im2col: those in im2col
            mode. serialised: why NVIDIA's compiler has products of sm_90 wait for one another, if they should read shared
            memory. early: see :func:`early`. shares: numbers of registers that warps ask for.
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
    loop_matrix: int = 0
    from_shared: int = 0
    kind: str = ""
    bulk_copies: int = 0
    im2col: int = 0
    serialised: str = ""
    early: int = 0
    shares: int = 0

    @property
    def tile(self) -> str:
        """Its pixels (of wgrad filters) x channels x what a step sums over, as its config has them."""
        knobs = dict(knob.split("=") for knob in self.config.split())
        rows = math.prod(int(knobs.get(name, 1)) for name in _ROWS)
        return f"{rows} x {knobs['block_n']} x {knobs.get('block_k', LINE)}"

    @property
    def name(self) -> str:
        return f"{self.kernel}, {self.kind}" if self.kind else self.kernel

    @property
    def per_product(self) -> float:
        """Instructions of the main loop for each of its matrix instructions."""
        return round(self.loop / max(self.loop_matrix, 1), 1)

    def faults(self) -> list[str]:
        """What must not be."""
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
        asynchronous = self.gemm and self.engine in _SHARED_PRODUCTS and self.arch in ("sm_90", "sm_100")
        return found + (self._asynchronous() if asynchronous else [])

    def _asynchronous(self) -> list[str]:
        """Of products of sm_90 and sm_100 that should read shared memory."""
        found = []
        if self.from_shared != (0 if self.kind == "by registers" else self.matrix):
            found.append(f"{self.from_shared} of {self.matrix} products from shared memory")
        if self.kernel in _COPIED_IN_BULK and self.bulk_copies < 2:
            found.append(f"{self.bulk_copies} bulk copies")
        if bool(self.im2col) != self.config.startswith("pixels="):
            found.append(f"{self.im2col} im2col copies")
        most = BEYOND.get((self.name, self.tile), BEYOND.get((self.kernel, self.tile), MOST_PER_PRODUCT))
        if self.arch == "sm_90" and not 0 < self.per_product <= most:
            found.append(f"{self.per_product} instructions for a product")
        documented = (self.kernel, self.tile) in SERIALISED and triton.__version__.startswith("3.6.")
        if self.serialised and not documented:
            found.append(self.serialised)
        if self.early:
            found.append(f"{self.early} stages are freed by one warpgroup for both")
        if self.engine == "hopper" and self.shares < 2:
            found.append("registers are not shared out among the warps")
        return found


def read(problem: Problem, engine: ModuleType, config: Config, name: str, kernel, layer: object = "") -> Report:
    """Read one compiled kernel's resources and instructions."""
    arch = problem.arch
    main = not name.startswith(AROUND)
    together = packed_groups(problem, config) if engine.NAME == "implicit_gemm" else 1
    filled = math.gcd(together * problem.group_in, together * problem.group_out) % 8 == 0
    if engine.NAME == "kn2row":  # of what it produces it loads nothing
        filled = max(problem.group_in, problem.group_out) % 8 == 0
    copies = main and filled and engine.NAME in _COPIED_BY_THREADS and name not in _COPIED_IN_BULK
    registers, spills, text = resources(arch, kernel)
    if arch.startswith("gfx"):
        wide = len(re.findall(r"(buffer|global)_load_dwordx4", text))
        narrow = len(re.findall(r"(buffer|global)_load_(ushort|short|dword\b|dwordx2)", text))
    else:
        wide = len(re.findall(r"LDGSTS\.\S*128", text))
        narrow = len(re.findall(r"LDGSTS", text)) - wide
    loop, loop_matrix = main_loop(text)
    kind = "strided dgrad" if problem.pass_ == "dgrad" and problem.stride != (1, 1, 1) else ""
    if name == "wgrad_bricks" and arch == "sm_90":
        kind = "" if left_is_shared(problem, getattr(config, "config", config).brick) else "by registers"
    elif name in _BY_LINES:
        kind = "by registers"
    ptx, dimensions = kernel.asm.get("ptx", ""), "2" if engine.NAME == "rounded" else "[35]"
    return Report(
        arch, problem.dtype, problem.precision, problem.pass_, engine.NAME, str(layer), str(config), name,
        main and engine.work(problem, config).tensor_cores, copies,
        registers, spills, kernel.metadata.shared, len(re.findall(_MATRIX, text)), wide, narrow,
        loop, unwaited(kernel.asm["ttgir"]), loop_matrix, len(re.findall(_FROM_SHARED, text)),
        kind, len(re.findall(rf"\bUTMALDG\.{dimensions}D", text)), len(re.findall(r"\bUTMALDG\.5D\.IM2COL", text)),
        serialised(ptx) if "wgmma" in ptx and engine.NAME in _SHARED_PRODUCTS else "",
        early(ptx), len(set(re.findall(r"setmaxnreg\S+\s+(\d+)", ptx))),
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


def serialised(ptx: str) -> str:
    """What NVIDIA's compiler warns of when it compiles this for sm_90: products that wait for one another."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "ptx")
        source.write_text(ptx)
        command = [get_ptxas(90).path, "--gpu-name", "sm_90a", "-o", Path(folder, "cubin"), source]
        return subprocess.run(command, capture_output=True, text=True).stderr.strip()


def early(ptx: str) -> int:
    """How often a stage is freed by one warpgroup whose product is done, with no barrier to wait for the other's."""
    order = re.findall(r"wgmma\.wait_group|bar\.sync|mbarrier\.arrive\.shared", ptx)
    return sum(pair == ("wgmma.wait_group", "mbarrier.arrive.shared") for pair in itertools.pairwise(order))


def _tool(name: str, *arguments: str) -> str:
    return subprocess.run([str(_TOOLS / name), *arguments], capture_output=True, text=True, check=True).stdout


def main_loop(text: str) -> tuple[int, int]:
    """(instructions, matrix instructions among them) of the smallest loop that has any; zeros without one.

    What ends in between is none: that branch goes back from behind the kernel's end, where a wait is gone on with.
    """
    whole = (loop for loop in loops(text) if not any(re.search(r"\bEXIT\b", line) for line in loop))
    counts = ((len(loop), sum(re.search(_MATRIX, line) is not None for line in loop)) for loop in whole)
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
