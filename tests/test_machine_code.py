"""Kernels compiled ahead of time, with no GPU: tensor cores, wide asynchronous copies, no spills, shared memory."""

from __future__ import annotations

import collections
import dataclasses
import functools
import itertools
import json
from pathlib import Path

import ahead_of_time
import pytest

pytest.importorskip("triton")
import triton

from perf.disassembly import BEYOND, SERIALISED, Report, early, main_loop, unwaited
from perf.machine_code import ARCHITECTURES, KEPT, LAYERS, configs, problems
from triton_conv3d import engines
from triton_conv3d.engines.hopper import gluon
from triton_conv3d.engines.hopper.class_configs import LineDgradConfig, axes
from triton_conv3d.engines.hopper.classes import sizes
from triton_conv3d.engines.implicit_gemm.configs import SHARED_BYTES
from triton_conv3d.tuning import cost_model

ROOT = Path(__file__).resolve().parent.parent
REPORTS = sorted((ROOT / "perf" / "results" / "machine_code").glob("*.json"))

# Every architecture, float32 on the one that is measured; float16 becomes the code of bfloat16, with another suffix.
SETS = [
    ("sm_80", "bfloat16"),
    ("sm_90", "bfloat16"),
    ("sm_90", "float32"),
    ("sm_100", "bfloat16"),
    ("gfx942", "bfloat16"),
]


LOOP = 120  # instructions
TRITON = tuple(map(int, triton.__version__.split(".")[:2]))
if TRITON > (3, 6):
    LOOP += 6  # by which it orders asynchronous copies before the products: FENCE, MEMBAR, four LDS
    LOOP += TRITON == (3, 7)


def command(out, *arguments):
    ahead_of_time.run("-m", "perf.machine_code", *arguments, "--out", str(out), limit=9000.0)


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    """Reports by (arch, dtype)."""

    @functools.cache
    def compiled(arch, dtype):
        out = tmp_path_factory.mktemp("machine_code") / "report.json"
        command(out, "--arch", arch, "--dtype", dtype, "--most", "2" if (arch, dtype) == ("sm_90", "bfloat16") else "1")
        return json.loads(out.read_text())["kernels"]

    return compiled


@pytest.mark.parametrize("arch, dtype", SETS, ids=lambda value: value)
def test_no_faults(kernels, arch, dtype):
    rows = kernels(arch, dtype)
    assert {row["pass_"] for row in rows} == {"forward", "dgrad", "wgrad"}
    assert {row["kernel"] for row in rows} == {"gather_gemm", "wgrad_gemm", "reduce_splits"}
    assert not [(row["kernel"], row["config"], row["faults"]) for row in rows if row["faults"]]


@pytest.mark.parametrize("split, most", [(False, LOOP), (True, LOOP + 10)], ids=("whole", "split"))
def test_main_loop_of_the_forward_kernel(kernels, split, most):
    rows = kernels("sm_90", "bfloat16")
    loops = {
        row["loop"]
        for row in rows
        if row["pass_"] == "forward"
        and "block_m=128 block_n=128 block_k=64 num_warps=8" in row["config"]
        and row["config"].endswith("splits=1") != split
    }
    assert loops and max(loops) <= most


DOT = "%acc_1 = ttng.warp_group_dot %a, %b, %acc {{isAsync = true}} : {}<64x16xbf16> * !ttg.memdesc<16x64xbf16>"
WAIT = "%acc_2:2 = ttng.warp_group_dot_wait %acc_1, %b {{pendings = {} : i32}} : tensor<64x64xf32>"


@pytest.mark.parametrize("left, going, more, count", [
    ("!ttg.memdesc", 1, "scf.yield %acc_1", 0), ("tensor", 0, "scf.yield %acc_2", 0), ("tensor", 7, "scf.yield %acc_2", 1),
    ("!ttg.memdesc", 1, "%c = arith.addf %acc_1, %d", 1), ("!ttg.memdesc", 1, "%c = arith.addf %acc_11, %d", 0),
], ids=("shared", "registers", "registers-filled-again", "sums-read-early", "other-sums"))  # fmt: skip
def test_products_that_are_not_waited_for_are_seen(left, going, more, count):
    assert unwaited("\n".join((DOT.format(left), WAIT.format(going), more))) == count


@pytest.mark.parametrize("barrier, count", [("", 1), ("bar.sync 0, 256;", 0)])
def test_a_stage_that_one_warpgroup_frees_for_both_is_seen(barrier, count):
    assert early(f"wgmma.wait_group.sync.aligned 1; {barrier} @%p mbarrier.arrive.shared::cta.b64 _, [%r];") == count


def test_what_a_wait_is_gone_on_with_behind_the_end_is_no_loop():
    product = "HGMMA.64x32x16.F32.BF16 R24 ;"
    loop = [".L_x_1:", *[product] * 4, "SYNCS.PHASECHK.TRANS64.TRYWAIT P0 ;", "@!P0 BRA `(.L_x_2) ;", ".L_x_3:", product]
    behind = ["@P1 BRA `(.L_x_1) ;", "EXIT ;", ".L_x_2:", "SYNCS.PHASECHK.TRANS64.TRYWAIT P0 ;", "BRA `(.L_x_3) ;"]
    lines = (line if line.startswith(".L") else f"        /*{16 * i:04x}*/ {line}" for i, line in enumerate(loop + behind))
    assert main_loop("\n".join(lines)) == (8, 5)


# Kernels without a fault, at the limits.
SOUND = Report(
    "sm_90", "bfloat16", "ieee", "forward", "implicit_gemm", "", "block_m=256 block_n=256 block_k=64", "gather_gemm", gemm=True,
    vectors=True, registers=255, spills=0, shared=SHARED_BYTES["sm_90"], matrix=4, wide_copies=1, narrow_copies=0, loop=56,
    loop_matrix=4, from_shared=4, bulk_copies=2, shares=2,
)  # fmt: skip
TMA = {"engine": "tma", "kernel": "wgrad_bricks", "vectors": False, "wide_copies": 0}
REGISTERS = {"kind": "by registers", "config": "brick_w=128 block_n=64 block_k=64", "from_shared": 0, "loop": 78}
HOPPER = {"engine": "hopper", "kernel": "gather_ring", "vectors": False, "wide_copies": 0}
WITHOUT_FAULT = {
    "implicit_gemm": {"from_shared": 0, "loop": 999, "bulk_copies": 0, "shares": 0},
    "tma": TMA | {"shares": 0},
    "by-registers": TMA | REGISTERS,
    "sm_100": TMA | {"arch": "sm_100", "loop": 999},
    "hopper": HOPPER,
    "im2col": HOPPER | {"config": "pixels=256 block_n=256 block_k=64", "im2col": 1},
    "rounded": {"engine": "rounded", "kernel": "rounded_wgrad"},
    "rounded-gather": {"engine": "rounded", "bulk_copies": 0},
    "rounded-copy": {"engine": "rounded", "kernel": "rounded_copy", "gemm": False, "matrix": 0, "loop": 999},
    "sm_80": {"engine": "rounded", "arch": "sm_80", "shared": SHARED_BYTES["sm_80"], "from_shared": 0, "loop": 999},
}
OF_ALL = ({"spills": 1}, {"shared": SOUND.shared + 1}, {"unwaited": 1})
OF_SHARED_PRODUCTS = (
    {"from_shared": 3}, {"from_shared": 5}, {"bulk_copies": 1}, {"loop": 57}, {"loop": 0}, {"loop_matrix": 3},
    {"serialised": "C7515"}, {"im2col": 1},
)  # fmt: skip
PLANTED = [(name, fault) for name in WITHOUT_FAULT for fault in OF_ALL] + [
    *((name, fault) for name in ("tma", "hopper", "rounded") for fault in OF_SHARED_PRODUCTS),
    ("implicit_gemm", {"matrix": 0}), ("implicit_gemm", {"wide_copies": 0}), ("rounded", {"wide_copies": 0}),
    ("tma", {"kind": "by registers", "config": REGISTERS["config"]}), ("by-registers", {"from_shared": 4}),
    ("by-registers", {"loop": 79}), ("sm_100", {"from_shared": 3}), ("hopper", {"early": 1}), ("hopper", {"shares": 1}),
    ("im2col", {"im2col": 0}),
]  # fmt: skip


@pytest.mark.parametrize("name", WITHOUT_FAULT)
def test_what_may_be_is_no_fault(name):
    assert dataclasses.replace(SOUND, **WITHOUT_FAULT[name]).faults() == []


@pytest.mark.parametrize("name, fault", PLANTED, ids=lambda value: value if isinstance(value, str) else next(iter(value)))
def test_what_must_not_be_is_seen(name, fault):
    assert len(dataclasses.replace(SOUND, **WITHOUT_FAULT[name] | fault).faults()) == 1


@pytest.mark.parametrize("version, rows, count", [("3.6.0", 128, 0), ("3.6.0", 512, 1), ("3.9.0", 128, 1)])
def test_products_that_wait_for_one_another_are_seen_but_where_that_is_known(version, rows, count, monkeypatch):
    monkeypatch.setattr(triton, "__version__", version)
    config = f"engine=implicit_gemm block_m={rows} block_n=256 block_k=32"
    report = dataclasses.replace(SOUND, engine="rounded", config=config, serialised="C7515")
    assert len(report.faults()) == count


def kept(path):
    """Reports of a file."""
    names = {field.name for field in dataclasses.fields(Report)}
    rows = json.loads(path.read_text())["kernels"]
    return [Report(**{name: value for name, value in row.items() if name in names}) for row in rows]


@pytest.mark.parametrize("path", REPORTS, ids=lambda path: path.stem)
def test_the_kept_report_covers_every_config_of_today(path, monkeypatch):
    version = path.stem.removeprefix("triton-")
    monkeypatch.setattr(triton, "__version__", version)
    monkeypatch.setattr(gluon, "IM2COL", tuple(map(int, version.split(".")[:2])) >= (3, 8))  # which it has, or lacks
    rows = kept(path)
    assert not [(row, row.faults()) for row in rows if row.faults()]
    reported = {(row.arch, row.dtype, row.precision, row.pass_, row.engine, row.layer, row.config) for row in rows}
    for arch, (dtype, precision), layer in itertools.product(ARCHITECTURES, KEPT, LAYERS):
        for problem, _ in problems(arch, dtype, precision, layer):
            key = (arch, dtype, precision, problem.pass_, layer.engine, str(layer))
            offers = configs(problem, engines.get(layer.engine))
            missing = [str(c) for c in offers if (*key, str(c)) not in reported]
            assert not missing, f"{key}: {missing}; again: python -m perf.machine_code --all --engine {layer.engine}"


def steps_of(problem, config):
    """Of the cost model, that a main loop has one after the other."""
    return sizes(axes(problem))[2] if isinstance(config, LineDgradConfig) else 1


@pytest.mark.parametrize("arch", ("sm_80", "sm_90", "sm_100"))
def test_products_are_those_that_the_cost_model_counts(arch, monkeypatch):
    """Their number in the main loop of a warp, or a warpgroup, or on sm_100 of a program, tells how large each one is."""
    monkeypatch.setattr(gluon, "IM2COL", False)
    counted = {}
    for row in kept(REPORTS[0]):
        if row.arch == arch and row.gemm and row.loop_matrix:
            counted[row.dtype, row.precision, row.pass_, row.engine, row.layer, row.config] = row
    seen = collections.Counter()
    for (dtype, precision), layer in itertools.product(KEPT, LAYERS):
        depth = 16 if dtype == "bfloat16" else 8
        for problem, _ in problems(arch, dtype, precision, layer):
            for config in configs(problem, engines.get(layer.engine)):
                row = counted.get((dtype, precision, problem.pass_, layer.engine, str(layer), str(config)))
                if row is None:
                    continue
                work = engines.get(layer.engine).work(problem, config)
                rows, columns, asynchronous = cost_model.instruction(arch, *work.product, work.num_warps)
                if layer.engine == "kn2row" and not asynchronous:  # compilers leave out what only pads, as far as warps allow
                    continue
                if not asynchronous:  # of 16 x 8, however many of them a warp has
                    rows, columns, sharing = 16, 8, work.num_warps
                else:
                    sharing = 1 if arch == "sm_100" else work.num_warps // 4
                if row.kernel in ("line_ring", "line_wgrad_ring"):  # one for each part of the filters
                    computing = getattr(config, "config", config)  # behind another engine
                    columns /= len(computing.parts[0] if row.kernel == "line_ring" else computing.parts)
                products = steps_of(problem, config) * work.flops / (2 * rows * columns * depth * sharing)
                assert row.loop_matrix == products, (row, work)
                seen[layer.engine] += 1
    assert len(seen) >= 4 and min(seen.values()) >= 10, seen


def test_every_engine_says_what_it_multiplies(monkeypatch):
    """All products of a step, which the model counts by their size, are its flops, and what they read is what it loads."""
    monkeypatch.setattr(gluon, "IM2COL", False)
    for (dtype, precision), layer in itertools.product(KEPT, LAYERS):
        for problem, _ in problems("sm_90", dtype, precision, layer):
            for config in configs(problem, engines.get(layer.engine)):
                work = engines.get(layer.engine).work(problem, config)
                (m, n), (rows, columns) = work.product, work.tiles
                if work.tensor_cores:
                    depth = getattr(getattr(config, "config", config), "block_k", 0)
                    assert min(m, n) > 0 and steps_of(problem, config) * work.flops % (2 * m * n) == 0, (problem, config)
                    if layer.engine in ("implicit_gemm", "halo", "folded", "rounded"):
                        assert work.bytes_read == problem.itemsize * depth * (m * rows + n * columns), (problem, config)


def test_what_is_allowed_is_there():
    rows = [row for row in kept(REPORTS[0]) if row.engine in ("tma", "hopper", "rounded") and row.loop_matrix]
    assert BEYOND.keys() <= {(row.name, row.tile) for row in rows}
    assert set(SERIALISED) == {(row.kernel, row.tile) for row in rows if row.serialised}


@pytest.mark.long
@pytest.mark.parametrize("engine", dict.fromkeys(layer.engine for layer in LAYERS))
def test_every_config(engine, tmp_path):
    out = tmp_path / "report.json"
    command(out, "--all", "--engine", engine)
    rows = json.loads(out.read_text())["kernels"]
    assert rows and [row for row in rows if row["faults"]] == []


def test_the_report_of_the_oldest_triton_is_kept():
    assert (ROOT / "perf" / "results" / "machine_code" / "triton-3.6.0.json").is_file()
