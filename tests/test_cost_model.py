"""The cost model: each thing that costs time makes a prediction longer, and what is free does not."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import random
import re
import statistics
import time
import types
from pathlib import Path

import pytest
from counting import calls
from simulated import percentile, random_problem

from triton_conv3d import configure
from triton_conv3d.engines import aten, implicit_gemm
from triton_conv3d.engines.base import Config, Memory, Order, Work
from triton_conv3d.problem import PASSES, Problem
from triton_conv3d.tuning import coefficients, cost_model, storage
from triton_conv3d.tuning.select import ranking

PROBLEM = Problem("forward", 1, 64, 64, (8, 8, 8), (3, 3, 3), padding=(1,) * 6, device="NVIDIA H200", arch="sm_90")
WORK = Work(132, 27, 2.0 * 128 * 128 * 64, 16_384.0, 32_768.0, 8, 131_072)  # one program on each multiprocessor


def seconds(problem=PROBLEM, **changes):
    engine = types.SimpleNamespace(NAME="ours", work=lambda *_: dataclasses.replace(WORK, **changes))
    return cost_model.predict(problem, engine, Config())


@pytest.mark.parametrize(
    "changes",
    [
        {"programs": 133},
        {"iterations": 28},
        {"flops": WORK.flops * 2},
        {"bytes_read": WORK.bytes_read * 4},
        {"bytes_written": WORK.bytes_written * 2},
        {"extra_bytes": 1e6},
        {"launches": 2},
        {"tensor_cores": False},
        {"order": Order(12, 11, 8, 4e5, 4e5)},  # nothing is read twice: all of it comes from memory
        {"sums": 128 * 128, "vector_bytes": 2},
        {"stages": 1, "flops": 1.0, "bytes_read": 1.0, "shared_bytes": 2**17 + 1},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_more_work_takes_longer(changes):
    assert seconds(**changes) > seconds()


def test_a_second_wave_costs_as_much_as_the_first():
    gpu = cost_model.rates(PROBLEM)
    fixed = WORK.programs * WORK.bytes_written / (gpu.memory_part * gpu.bandwidth)
    one, two = seconds(), seconds(programs=2 * WORK.programs)
    launch = gpu.launch
    assert two - 2 * fixed - launch == pytest.approx(2 * (one - fixed - launch))


def test_idle_multiprocessors_help_nobody():
    products_only = {"bytes_read": 0.0, "bytes_written": 0.0, "flops": 1e8}
    assert seconds(programs=1, **products_only) == seconds(programs=132, **products_only) < seconds(
        programs=133, **products_only
    )


def test_small_programs_share_a_multiprocessor():
    short = {"flops": 1e3, "bytes_read": 1e2, "programs": 2 * WORK.programs}  # bound by latency
    assert seconds(**short, shared_bytes=16_384, num_warps=4) < 0.7 * seconds(**short)


@pytest.mark.parametrize(
    "device, known",
    [
        ("NVIDIA H200", "H200"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("AMD Instinct MI300X", "MI300X"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
    ],
)
def test_rates_by_name(device, known):
    assert cost_model.rates(PROBLEM.replace(device=device)) is cost_model.RATES[known]
    assert cost_model.rates(PROBLEM.replace(device="something new")).units > 0


class TestInstructions:
    """What tensor cores multiply at a time, and what it reads of shared memory."""

    FLOPS = 2.0 * 128 * 2**20

    @pytest.mark.parametrize(
        "arch, product, num_warps, expected",
        [
            ("sm_90", (128, 256), 8, (64, 256, True)), ("sm_90", (64, 128), 8, (64, 64, True)),
            ("sm_90", (64, 512), 4, (64, 256, True)), ("sm_90", (64, 64), 2, (32, 64, False)),
            ("sm_90", (32, 128), 4, (32, 32, False)), ("sm_100", (64, 64), 4, (64, 64, True)),
            ("sm_100", (256, 256), 8, (128, 256, True)), ("sm_80", (128, 128), 8, (32, 64, False)),
            ("gfx942", (256, 32), 4, (64, 32, False)),
        ],
        ids=str,
    )  # fmt: skip
    def test_of_an_architecture(self, arch, product, num_warps, expected):
        assert cost_model.instruction(arch, *product, num_warps) == expected

    @staticmethod
    def seconds(product, arch="sm_90", device="NVIDIA H200", **changes):
        """Of products that nothing else than tensor cores and shared memory binds."""
        problem = PROBLEM.replace(arch=arch, device=device)
        return seconds(problem, product=product, bytes_read=1e3, flops=TestInstructions.FLOPS, **changes)

    @pytest.mark.parametrize("device, arch", [("NVIDIA H200", "sm_90"), ("NVIDIA B200", "sm_100")])
    def test_narrow_products_wait_for_shared_memory(self, device, arch):
        wide, *narrow = (self.seconds((128, n), arch, device) for n in (256, 32, 16, 8))
        assert wide == self.seconds((0, 0), arch, device) and wide < 0.9 * narrow[0] < 0.81 * narrow[1] < 0.73 * narrow[2]

    def test_warps_that_multiply_alone_are_slower_on_hopper_only(self):
        warps = [self.seconds((32, 256), arch, device) for device, arch in GPUS[:2]]
        groups = [self.seconds((64, 256), arch, device) for device, arch in GPUS[:2]]
        assert warps[0] > 1.4 * groups[0] and warps[1] == groups[1]

    def test_rows_in_registers_are_read_once(self):
        shared, registers = (self.seconds((256, 16), tiles=(1.5, 3), in_registers=where) for where in (False, True))
        assert registers < 0.6 * shared

    def test_a_tile_that_several_products_share_is_read_once(self):
        problem = PROBLEM.replace(arch="sm_80", device="NVIDIA A100")
        columns, rows = (seconds(problem, product=(128, 16), flops=1.0, bytes_read=1e6, tiles=t) for t in ((1, 9), (9, 1)))
        assert columns > 1.4 * rows  # each of the eight warps has rows of its own, and reads all the columns


@pytest.mark.parametrize("slower, faster", [("ieee", "tf32x3"), ("tf32x3", "tf32")])
def test_precisions(slower, faster):
    big = PROBLEM.replace(dtype="float32", input_size=(64, 64, 64))
    times = [cost_model.predict(big.replace(precision=p), aten, aten.AtenConfig()) for p in (slower, faster)]
    assert times[0] > times[1]


def test_copies_and_other_layouts_are_paid_by_torchs_own():
    big = PROBLEM.replace(input_size=(64, 64, 64))
    contiguous = big.replace(layouts=("contiguous",) * 3)
    plain, copied = aten.AtenConfig(), aten.AtenConfig(channels_last=True)
    assert cost_model.predict(big, aten, plain) < cost_model.predict(contiguous, aten, copied)
    assert cost_model.predict(contiguous, aten, copied) < cost_model.predict(contiguous, aten, plain)


@pytest.mark.parametrize("pass_", ("forward", "dgrad", "wgrad"))
@pytest.mark.parametrize("kernel, dilation", ((5, 1), (7, 1), (7, 3)))
def test_large_depthwise_kernels_are_not_left_to_torch(kernel, dilation, pass_):
    """Unmeasured: its threads take as long as they have taps, whatever the roofline of tensor cores."""
    layer = PROBLEM.replace(pass_=pass_, groups=64, kernel_size=(kernel,) * 3, padding=(kernel // 2 * dilation,) * 6)
    layer = layer.replace(input_size=(14, 14, 14), dilation=(dilation,) * 3)
    small = layer.replace(kernel_size=(3, 3, 3), padding=(dilation,) * 6)
    large, little = (cost_model.predict(p, aten, aten.AtenConfig()) for p in (layer, small))
    assert ranking(layer)[0][1] is not aten and large > 1.8 * little


def test_the_interpreter_wants_few_programs():
    here = PROBLEM.replace(arch="interpreter", device="cpu")
    assert seconds(here, programs=2) < seconds(here, programs=3)
    assert seconds(here, flops=1e12) == seconds(here)


def test_ties_keep_their_order():
    engines_ = [types.SimpleNamespace(NAME=n, work=lambda *_: WORK, memory=lambda *_: Memory()) for n in "ab"]
    ranked = cost_model.rank(PROBLEM, [(engine, Config()) for engine in engines_])
    assert [engine.NAME for _, engine, _ in ranked] == ["a", "b"] and math.isfinite(ranked[0][0])


class TestSharedReads:
    """Programs that run at once read a row or a column of tiles once, whatever the number of tiles in it."""

    @staticmethod
    def bytes(programs, group=8, columns=16, cache=2**40, reuse=1.0):
        return cost_model._shared_reads(Order(64, columns, group, 100.0, 1.0, reuse), 10, programs, cache)

    @pytest.mark.parametrize(
        "programs, group, rows, columns",
        [(1, 8, 1, 1), (8, 8, 8, 1), (16, 8, 8, 2), (128, 8, 8, 16), (136, 8, 16, 16), (128, 1, 8, 16), (17, 1, 2, 16),
         (64 * 16, 8, 64, 16), (2 * 64 * 16 + 8, 8, 2 * 64 + 8, 2 * 16 + 1)],
    )  # fmt: skip
    def test_tiles_in_flight(self, programs, group, rows, columns):
        assert self.bytes(programs, group) == 100 * rows + columns

    def test_groups_save_reads_where_a_row_is_long(self):
        assert self.bytes(64, group=8, columns=64) < self.bytes(64, group=1, columns=64) * 10
        assert self.bytes(64, 8, columns=64) == 800 + 8 and self.bytes(64, 1, columns=64) == 100 + 64

    def test_taps_read_again_from_l2_as_long_as_it_all_fits(self):
        fits = 8 * (100 / 4) * 10
        assert self.bytes(8, reuse=4.0, cache=fits) == 8 * 25 + 1 < self.bytes(8, reuse=4.0, cache=fits - 1) == 801


def test_splits_cost_their_partial_sums():
    config = implicit_gemm.GemmConfig(64, 64, 32, 4, 3)
    whole, split = (implicit_gemm.work(PROBLEM, dataclasses.replace(config, splits=n)) for n in (1, 4))
    assert split.programs == 4 * whole.programs and split.iterations < whole.iterations and split.launches == 2
    written = split.programs * split.bytes_written + split.extra_bytes
    result = 4 * math.prod(PROBLEM.result_shape)
    assert written >= 4 * result + 4 * result + result / 2  # written, read again, and added up
    enough = PROBLEM.replace(input_size=(64, 64, 64))  # tiles for every multiprocessor without it
    times = [cost_model.predict(enough, implicit_gemm, dataclasses.replace(config, splits=n)) for n in (1, 4)]
    assert times[0] < times[1]


@pytest.mark.parametrize("pass_", PASSES)
@pytest.mark.parametrize("channels", [2, 3, 4, 6, 8])
def test_small_groups_are_packed_into_tiles(channels, pass_):
    """Predicted to take less than any other engine, and than a tile for each group."""
    whole = PROBLEM.replace(pass_=pass_, input_size=(64,) * 3, in_channels=24 * channels, out_channels=24 * channels)
    (first, engine, config), *_ = ranking(whole.replace(groups=24))
    assert engine is implicit_gemm and implicit_gemm.packed_groups(whole.replace(groups=24), config) > 1
    alone = whole.replace(in_channels=channels, out_channels=channels)
    launch = cost_model.rates(whole).launch
    each = min(cost_model.predict(alone, implicit_gemm, c) - launch for c in implicit_gemm.configs(alone))
    assert first < 24 * each / 1.25


@pytest.mark.parametrize("pass_", ["forward", "wgrad"])
@pytest.mark.parametrize("channels", [1, 3])
def test_first_layers_fold_taps_and_channels(channels, pass_):
    layer = PROBLEM.replace(pass_=pass_, input_size=(64,) * 3, in_channels=channels, alignment=2)
    best = {}
    for time_, engine, _ in ranking(layer):
        best.setdefault(engine.NAME, time_)
    assert best["folded"] < best["implicit_gemm"] / 1.5


MACHINE_CODE = Path(__file__).parent.parent / "perf" / "results" / "machine_code" / "triton-3.6.0.json"


@functools.cache
def compiled() -> dict[tuple, list[tuple[Problem, Work, dict]]]:
    """Every config of the report, by kind of GPU, kind of kernel and bytes of an element."""
    found = {}
    for kernel in json.loads(MACHINE_CODE.read_text())["kernels"]:
        if kernel["engine"] == "implicit_gemm" and kernel["kernel"] != "reduce_splits":
            channels, item = int(kernel["layer"].split()[0]), {"bfloat16": 2, "float32": 4}[kernel["dtype"]]
            groups = int((re.search(r"groups (\d+)", kernel["layer"]) or ("", 1))[1])
            problem = PROBLEM.replace(
                pass_=kernel["pass_"], in_channels=channels, out_channels=channels, input_size=(32,) * 3, arch=kernel["arch"],
                groups=groups, dtype=kernel["dtype"], precision=kernel["precision"], alignment=math.gcd(16, channels * item),
            )  # fmt: skip
            knobs = {name: int(value) for name, value in (knob.split("=") for knob in kernel["config"].split())}
            work = implicit_gemm.work(problem, implicit_gemm.GemmConfig(**knobs))
            key = (kernel["arch"][:2], "wgrad" if problem.pass_ == "wgrad" else "gather", item)
            found.setdefault(key, []).append((problem, work, kernel))
    return found


@pytest.mark.parametrize("gpu", ("sm", "gf"))
@pytest.mark.parametrize("kernel", ("gather", "wgrad"))
@pytest.mark.parametrize("item", (2, 4))
def test_registers_and_instructions_are_those_of_machine_code(gpu, kernel, item):
    """Half of all configs within a quarter."""
    kernels = compiled()[gpu, kernel, item]
    for count, name in ((cost_model.Code.registers, "registers"), (cost_model.Code.instructions, "loop")):
        counted = ((count(cost_model.code(problem), work), seen[name]) for problem, work, seen in kernels)
        error = statistics.median(abs(ours / theirs - 1) for ours, theirs in counted)
        assert error <= 0.25, name


GPUS = (("NVIDIA H200", "sm_90"), ("NVIDIA A100", "sm_80"), ("NVIDIA B200", "sm_100"), ("AMD Instinct MI300X", "gfx942"))


def processor_time(function) -> float:
    begin = time.process_time()
    function()
    return time.process_time() - begin


def pace() -> float:
    """How much slower this machine is now, which others may use too, than one on which a call of nothing takes 75 ns."""

    def nothing() -> None:
        pass

    return max(1.0, processor_time(lambda: [nothing() for _ in range(100_000)]) / 100_000 / 75e-9)


@pytest.mark.usefixtures("proven")
def test_ranking_takes_less_than_a_millisecond():
    """Of a new problem, by what is called, 0.15 us a call; and by the clock, at the machine's pace, with half as much again: on
    a machine that others use too, memory is slower than that pace tells."""
    draw = random.Random(3)
    problems = [random_problem(draw, *GPUS[i % len(GPUS)]) for i in range(240)]

    def rank(run: int, counted) -> list:
        new = [problem.replace(device=f"{problem.device} {run}") for problem in problems]  # no cache knows of them
        return [counted(functools.partial(ranking, problem, measuring=True)) for problem in new]

    timed = []  # of each problem the least counts: others use the machine meanwhile
    for run in range(6):
        before, seconds, after = pace(), rank(run, processor_time), pace()
        timed.append([second / max(before, after) for second in seconds])
    assert statistics.mean(map(min, zip(*timed, strict=True))) < 1.5e-3
    counts = rank(6, calls)
    assert percentile(counts, 0.95) < 6700 and statistics.mean(counts) < 3000  # they were 6,477 and 2,850


class TestFitted:
    @pytest.fixture(autouse=True)
    def _fresh(self, monkeypatch, tmp_path):
        monkeypatch.setattr(storage, "_warned", {})
        monkeypatch.setattr(coefficients, "SHIPPED", tmp_path / "shipped")
        cost_model._rates.cache_clear()
        yield
        cost_model._rates.cache_clear()

    HEADER = {"gpu": "NVIDIA H200", "arch": "sm_90", "engines": "0" * 64, "created": "2026-01-01", "measurements": 9}
    DEFAULTS = cost_model.RATES["H200"]

    def test_they_replace_the_defaults_of_their_gpu_only(self, tmp_path):
        coefficients.write({"tensor_part": 0.5, "launch": 9e-6}, self.DEFAULTS, tmp_path, self.HEADER)
        with configure(tables=tmp_path):
            assert cost_model.rates(PROBLEM) == dataclasses.replace(self.DEFAULTS, tensor_part=0.5, launch=9e-6)
            assert cost_model.rates(PROBLEM.replace(device="NVIDIA H100")) is cost_model.RATES["H100"]
        assert cost_model.rates(PROBLEM) is self.DEFAULTS

    @pytest.mark.parametrize("changes, reason", [
        ({"schema": 2}, "schema"), ({"gpu": "NVIDIA A100"}, "NVIDIA A100"), ({"more": 1}, "fields"),
        ({"coefficients": {"units": 1.0}}, "units"), ({"coefficients": {"launch": 1.0}}, "factor"),
        ({"coefficients": {"launch": True}}, "factor"), ({"coefficients": []}, "object"),
    ], ids=lambda value: str(value)[:30])  # fmt: skip
    def test_a_file_that_does_not_fit_is_ignored_with_the_reason(self, tmp_path, changes, reason):
        file = coefficients.write({"launch": 9e-6}, self.DEFAULTS, tmp_path, self.HEADER)
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))
        with configure(tables=tmp_path), pytest.warns(UserWarning, match=reason):
            assert cost_model.rates(PROBLEM) is self.DEFAULTS

    def test_nothing_implausible_is_written(self, tmp_path):
        with pytest.raises(ValueError, match="tensor_part"):
            coefficients.write({"tensor_part": 1e9}, self.DEFAULTS, tmp_path, self.HEADER)
        assert list(tmp_path.iterdir()) == []
