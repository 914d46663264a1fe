"""``python -m perf run``: what a row says, what happens to cases that go wrong, and how an interrupted run goes on."""

from __future__ import annotations

import dataclasses
import runpy
import subprocess
import sys

import perf_cases
import pytest
import torch
from cases import DEVICE
from perf_cases import FakeTimer, Raises, Right, Wrong

from perf import __main__, machine, providers, results, run, timing
from perf.results import FAILED, MEMORY, OK, UNSUPPORTED, WRONG
from triton_conv3d import settings
from triton_conv3d.engines.base import Config
from triton_conv3d.tuning import Plan

CASES = [perf_cases.case("plain", dtype=dtype) for dtype in ("fp16", "bf16", "fp32")]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "results.csv"


def measure(path, chosen, cases=CASES[:1], **more):
    more.setdefault("machine", perf_cases.machine())
    return run.measure(cases, chosen, path, suite="tiny", show=False, **more)


def rows(path):
    return {(row.case, row.provider): row for row, _ in results.read(path)}


def statuses(path):
    return {row.provider: row.status for row, _ in results.read(path)}


class TestRows:
    def test_what_a_row_says(self, path):
        chosen = [Right("fast", 0.01), Right("slow", 0.04)]
        assert measure(path, chosen, machine=perf_cases.machine(FakeTimer((1000, 1700)))) == {OK: 2}
        (problem,) = CASES[0].problems()
        row, stamp = results.read(path)[0]
        assert stamp == perf_cases.STAMP and row.measured.endswith("+00:00")
        assert row.case == CASES[0].key and (row.layer, row.model, row.suite) == ("t.plain", "tiny", "tiny")
        assert (row.op, row.pass_, row.dtype, row.precision) == ("conv3d", "forward", "fp16", "ieee")
        assert row.shape == "2x3x2x3x3 -> 4, kernel 2x2x3, stride 1x2x1, padding 1x0x1"
        assert (row.provider, row.time_us, row.low_us, row.high_us, row.host_us) == ("fast", 1e4, 1e4, 1e4, 10.0)
        assert row.samples == timing.SAMPLES and row.speedups == "slow=4"
        assert row.peak_bytes == 700 + problem.min_bytes - problem.itemsize * torch.Size(problem.output_shape).numel()
        assert 0 < row.error < 1e-3
        assert (row.flops, row.min_bytes) == (problem.flops, problem.min_bytes)
        assert row.tflops == pytest.approx(problem.flops / 0.01 / 1e12, rel=1e-5)
        assert row.gbps == pytest.approx(problem.min_bytes / 0.01 / 1e9, rel=1e-5)
        assert (row.matmul_tflops, row.copy_gbps) == (0.5, 2.0)
        assert row.roofline_us == pytest.approx(1e6 * max(problem.flops / 0.5e12, problem.min_bytes / 2e9), rel=1e-5)
        assert row.roofline == pytest.approx(row.roofline_us / row.time_us, rel=1e-5)
        assert results.read(path)[1][0].speedups == "fast=0.25"

    @pytest.mark.parametrize("name, op", [("plain", "conv3d"), ("transposed", "conv_transpose3d")])
    def test_train_is_the_sum_of_its_passes_and_ours_is_right_in_it(self, path, name, op):
        case = perf_cases.case(name, "train", precision="ieee")
        slow = perf_cases.machine(FakeTimer(seconds=60.0))  # so that one sample is enough
        assert measure(path, providers.get(["ours", "torch_cl"]), [case], machine=slow) == {OK: 2}
        problems = case.problems()
        for row, _ in results.read(path):
            assert row.op == op and row.flops == sum(p.flops for p in problems) == 3 * problems[0].flops
            assert row.min_bytes == sum(p.min_bytes for p in problems)
            least = (perf_cases.CEILINGS.least(p, case.dtype, "ieee") for p in problems)
            assert row.roofline_us == pytest.approx(1e6 * sum(least), rel=1e-5)
        assert rows(path)[case.key, "ours"].plan.count(" from ") == 3

    def test_tf32x3_has_a_third_of_the_rate(self, path):
        case = perf_cases.case("plain", dtype="fp32", precision="tf32x3")
        measure(path, providers.get(["torch"]), [case])
        ((row, _),) = results.read(path)
        assert row.matmul_tflops == pytest.approx(0.5 / 3, rel=1e-5) and row.status == UNSUPPORTED

    @pytest.mark.parametrize("told, status", [((), OK), (("implicit_gemm",), WRONG), (("aten",), OK)], ids=str)
    def test_only_torchs_own_may_round_partial_sums(self, path, told, status):
        class Coarse(Right):
            def prepare(self, case, tensors):
                right = super().prepare(case, tensors)
                plans = tuple(Plan(engine, Config(), "forced") for engine in told)
                return dataclasses.replace(right, call=lambda: (right.call()[0] + 5e-3,), plans=lambda: plans)

        measure(path, [Coarse()])
        ((row, _),) = results.read(path)
        assert row.status == status and row.plan == "".join(f"{engine} [-] from forced" for engine in told)

    def test_memory_that_is_left_over_is_poisoned(self, path):
        """Results start from NaN where the allocator hands freed memory out again: what is not written shows."""
        filled: list = []
        fill = torch.Tensor.fill_

        class Watching(Right):
            def prepare(self, case, tensors):
                right = super().prepare(case, tensors)
                return dataclasses.replace(right, call=lambda: filled.append("call") or right.call())

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.Tensor, "fill_", lambda t, value: filled.append(tuple(t.shape)) or fill(t, value))
            measure(path, [Watching()])
        assert filled[:3] == ["call", CASES[0].workload.layer.output_shape, "call"]


class TestWhatGoesWrong:
    @pytest.mark.parametrize(
        "bad, status, reason",
        [
            (Raises("bad", RuntimeError("no kernel\nimage")), FAILED, "RuntimeError: no kernel image"),
            (Raises("bad", RuntimeError("late"), 2), FAILED, "RuntimeError: late"),
            (Raises("bad", RuntimeError("in the race"), 5), FAILED, "RuntimeError: in the race"),
            (Raises("bad", torch.OutOfMemoryError("24 GiB")), MEMORY, "OutOfMemoryError: 24 GiB"),
            (Raises("bad", RuntimeError("CUDA error: out of memory"), 1), MEMORY, "RuntimeError: CUDA error: out of"),
            (Wrong("bad"), WRONG, "forward is wrong beyond rounding, RMS error"),
        ],
        ids=("prepared", "checked", "timed", "memory", "memory by its text", "wrong"),
    )
    def test_is_a_row_with_its_reason_and_the_others_go_on(self, path, bad, status, reason):
        counts = measure(path, [Right("first"), bad, Right("last")], CASES[:2])
        found = [row for row, _ in results.read(path)]
        assert [row.status for row in found if row.provider == "bad"][0] == status
        assert all(row.status == OK for row in found if row.provider != "bad") and len(found) == 6
        row = found[1]
        assert row.reason.startswith(reason) and row.time_us is None and not row.speedups
        assert found[0].speedups == "last=1"
        assert sum(counts.values()) == 6

    @pytest.mark.parametrize(
        "provider",
        (
            Right("right"),
            Wrong("wrong"),
            Raises("raises", RuntimeError("no"), 2),
            Raises("late", RuntimeError("no"), 5),
        ),
        ids=lambda provider: provider.name,
    )
    def test_what_a_provider_keeps_is_freed_at_last(self, path, provider):
        log: list = []

        class Keeps(Right):
            def prepare(self, case, tensors):
                ready = provider.prepare(case, tensors)
                call = lambda: log.append("call") or ready.call()  # noqa: E731
                return dataclasses.replace(ready, call=call, end=lambda: log.append("end"))

        measure(path, [Keeps(), Right("last")])
        assert len(log) > 2 and log.count("end") == 1 and log[-1] == "end"

    def test_a_provider_that_cannot_says_why(self, path):
        measure(path, providers.get(["matmul", "torch"]))
        assert statuses(path) == {"matmul": UNSUPPORTED, "torch": OK}
        assert "patches must not leave the input" in rows(path)[CASES[0].key, "matmul"].reason

    def test_no_memory_for_the_tensors_is_a_row_for_everybody(self, path, monkeypatch):
        def full(*args):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 80 GiB")

        monkeypatch.setattr("perf.tensors.Tensors._make", full)
        assert measure(path, providers.get(["ours", "implicit_gemm", "torch"])) == {MEMORY: 3}

    @pytest.mark.parametrize("number, done", [(1, {"bad"}), (4, {"bad", "dull"})], ids=("checked", "timed"))
    def test_after_an_illegal_access_nothing_is_believed(self, path, number, done):
        error = RuntimeError("CUDA error: an illegal memory access was encountered")
        chosen = [Right("first"), Raises("bad", error, number), Raises("dull", RuntimeError("no"), 0)]
        assert measure(path, chosen, CASES)[run.LEFT] == 3
        assert set(statuses(path)) == done and statuses(path)["bad"] == FAILED
        chosen[1:] = [Raises("bad", error, number)]
        assert run.LEFT not in measure(path, chosen[:1], CASES)  # the next process goes on past it


class TestResume:
    def test_what_is_there_is_not_measured_again(self, path):
        measure(path, [Right("one")], CASES[:2])
        one, two = Right("one"), Right("two")
        assert measure(path, [one, two], CASES) == {OK: 4}
        assert one.prepared == [CASES[2].key] and two.prepared == [case.key for case in CASES]
        assert measure(path, [one, two], CASES) == {}
        assert len(results.read(path)) == len(rows(path)) == 6

    @pytest.mark.parametrize("change", [{"commit": "def"}, {"torch": "9"}, {"policy": "other"}], ids=str)
    def test_rows_of_another_stamp_do_not_count(self, path, change):
        measure(path, [Right()])
        assert measure(path, [Right()], machine=perf_cases.machine(**change)) == {OK: 1}

    def test_an_interrupted_run_keeps_its_cases_and_goes_on(self, path):
        class Interrupted(Right):
            def prepare(self, case, tensors):
                if case is CASES[1]:
                    raise KeyboardInterrupt
                return super().prepare(case, tensors)

        with pytest.raises(KeyboardInterrupt):
            measure(path, [Right("one"), Interrupted("two")], CASES)
        assert set(rows(path)) == {(CASES[0].key, "one"), (CASES[0].key, "two")}
        path.write_bytes(path.read_bytes()[:-5])  # and the last line was cut off
        assert measure(path, [Right("one"), Right("two")], CASES) == {OK: 5}
        assert set(rows(path)) == {(case.key, name) for case in CASES for name in ("one", "two")}

    def test_a_foreign_file_is_refused_before_anything_is_measured(self, path):
        path.write_text("time,speed\n1,2\n")
        one = Right()
        with pytest.raises(results.Refused):
            measure(path, [one])
        assert not one.prepared and path.read_text() == "time,speed\n1,2\n"


class TestBudget:
    @pytest.mark.parametrize("budget, done", [(None, 3), (1000, 3), (25, 2), (29.9, 2), (30.1, 3), (15, 1), (0.1, 1)])
    def test_no_case_is_begun_that_would_not_fit(self, path, monkeypatch, budget, done):
        """Each case takes ten seconds."""
        now = [0.0]
        monkeypatch.setattr(run.time, "monotonic", lambda: now[0])

        class Slow(Right):
            def prepare(self, case, tensors):
                now[0] += 10.0
                return super().prepare(case, tensors)

        counts = measure(path, [Slow()], CASES, budget=budget)
        assert counts == ({OK: done, run.LEFT: 3 - done} if done < 3 else {OK: 3})
        assert measure(path, [Slow()], CASES) == ({OK: 3 - done} if done < 3 else {})


class TestCommand:
    @pytest.fixture
    def here(self, monkeypatch, tmp_path):
        monkeypatch.setattr(machine, "here", lambda policy: perf_cases.machine(policy=policy))
        monkeypatch.setattr(results, "RESULTS", tmp_path)
        return results.folder(perf_cases.STAMP.gpu)

    @pytest.mark.parametrize(
        "arguments, message",
        [
            ("--suite resnet", "no suite named 'resnet': the suites are core, all, nnunet3d"),
            ("--provider ours,cudnn", "no provider named 'cudnn': the providers are ours, "),
            ("--filter c33", "filter 'c33' matches no case: there are nnunet3d"),
            ("--pass backward", "no pass named 'backward': there are forward, dgrad, wgrad, train"),
            ("--dtype float16", "no dtype named 'float16': there are fp16, bf16, fp32"),
            ("--layout NHWC", "no layout named 'NHWC': there are channels_last, contiguous"),
            ("--precision high", "no precision named 'high': there are ieee, tf32, tf32x3"),
            ("--budget 0", "--budget 0.0: expected seconds, more than 0"),
        ],
        ids=lambda value: value.split()[0],
    )
    def test_a_mistake_is_one_line_that_lists_what_exists(self, capsys, arguments, message):
        assert __main__.main(["run", *arguments.split()]) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"perf run: {message}") and error.count("\n") == 1

    def test_without_a_gpu_it_names_what_can_be_run(self, capsys, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        assert __main__.main(["run"]) == 2
        error = capsys.readouterr().err
        assert "python -m perf static" in error and "python -m perf validate --dry-run" in error

    def test_a_run(self, here, capsys, monkeypatch):
        monkeypatch.setattr(providers, "PROVIDERS", {"one": Right("one"), "bad": Wrong("bad")})
        monkeypatch.setattr(run.workloads, "suite", lambda name: tuple(perf_cases.WORKLOADS.values())[:1])
        seen = []
        monkeypatch.setattr(
            Right, "prepare", lambda s, *a, f=Right.prepare: seen.append(settings.current()) or f(s, *a)
        )
        call = "run --suite r3d18,x3d_m --provider one,bad --pass forward --mode full".split()
        assert __main__.main(call) == 1
        out = capsys.readouterr().out
        found = results.read(here / "r3d18+x3d_m.csv")
        assert [row.status for row, _ in found] == [OK, WRONG]
        assert found[0][1].policy == timing.policy("full") and seen[0].autotune == "full"
        assert "bad: wrong: forward is wrong" in out and "2 rows added, 1 ok, 1 wrong" in out
        assert __main__.main(call) == 0 and "0 rows added" in capsys.readouterr().out

    def test_what_is_left_is_told(self, here, capsys, monkeypatch):
        monkeypatch.setattr(run, "measure", lambda *args, **more: run.collections.Counter({OK: 3, run.LEFT: 7}))
        assert __main__.main(["run", "--budget", "5"]) == 0
        assert "7 of 243 cases are left: run the same command again" in capsys.readouterr().out

    @pytest.mark.parametrize("arguments", [[], ["resnet"], ["run", "--mode", "off"]], ids=("none", "unknown", "choice"))
    def test_no_such_command(self, capsys, arguments):
        with pytest.raises(SystemExit) as ended:
            __main__.main(arguments)
        assert ended.value.code == 2 and "error" in capsys.readouterr().err

    def test_help_names_every_command(self, capsys):
        with pytest.raises(SystemExit) as ended:
            __main__.main(["--help"])
        out = capsys.readouterr().out
        assert ended.value.code == 0 and all(f"  {name} " in out for name in __main__.COMMANDS)

    def test_an_interrupt_is_no_traceback(self, here, monkeypatch):
        def interrupted(*args, **more):
            raise KeyboardInterrupt

        monkeypatch.setattr(run, "measure", interrupted)
        assert __main__.main(["run"]) == 130


class TestMachine:
    def test_ceilings_are_rates(self, monkeypatch):
        monkeypatch.setattr(machine, "_COPY_BYTES", 1000)
        monkeypatch.setattr(machine, "_MATMUL", 8)
        seen = []
        mm = torch.mm
        monkeypatch.setattr(
            torch, "mm", lambda a, b: seen.append((a.dtype, torch.backends.cuda.matmul.allow_tf32, a.any())) or mm(a, b)
        )
        found = machine.ceilings(DEVICE, FakeTimer())
        assert found.copy_gbps == pytest.approx(2 * 1000 / 0.1 / 1e9)
        assert set(found.matmul_tflops) == set(machine.PRODUCTS)
        assert all(rate == pytest.approx(2 * 8**3 / 0.1 / 1e12) for rate in found.matmul_tflops.values())
        assert {(torch.float32, True), (torch.float32, False)} < {(dtype, tf32) for dtype, tf32, _ in seen}
        assert all(random for *_, random in seen)

    def test_a_ceiling_that_cannot_be_measured_is_an_error(self, monkeypatch):
        monkeypatch.setattr(machine, "_COPY_BYTES", 8)
        monkeypatch.setattr(machine, "_MATMUL", 8)
        monkeypatch.setattr(torch, "mm", lambda a, b: torch.mm_that_is_not_there)
        with pytest.raises(AttributeError):
            machine.ceilings(DEVICE, FakeTimer())

    @pytest.mark.parametrize("changed, sign", [(False, ""), (True, "+")], ids=("clean", "changed"))
    def test_the_commit_is_the_last_that_changed_the_code(self, monkeypatch, tmp_path, changed, sign):
        def git(*arguments):
            who = ("-c", "user.name=a", "-c", "user.email=a@b")
            done = subprocess.run(["git", *who, *arguments], cwd=tmp_path, capture_output=True, text=True, check=True)
            return done.stdout.strip()

        monkeypatch.setattr(machine, "_ROOT", tmp_path)
        assert machine.stamp(DEVICE, "p").commit.startswith("engines ")  # no repository
        git("init", "-q")
        for number, name in enumerate(("triton_conv3d/a.py", "perf/results/gpu/core.csv", "perf/README.md")):
            file = tmp_path / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text("1")
            git("add", ".")
            git("commit", "-qm", str(number))
        (tmp_path / "perf/results/gpu/core.csv").write_text("2")
        if changed:
            (tmp_path / "triton_conv3d/a.py").write_text("2")
        assert machine.stamp(DEVICE, "p").commit == git("rev-parse", "--short=12", "HEAD~2") + sign

    @pytest.mark.gpu
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
    def test_on_a_gpu(self, path):
        here = machine.here()
        assert here.ceilings.copy_gbps > 10 and here.ceilings.matmul_tflops["fp16", "ieee"] > 1
        cases = [
            perf_cases.case(name, p) for name in perf_cases.WORKLOADS for p in ("forward", "dgrad", "wgrad", "train")
        ]
        counts = measure(path, providers.get(run.DEFAULT_PROVIDERS), cases, machine=here)
        assert counts == {OK: len(cases) * len(run.DEFAULT_PROVIDERS)}
        assert all(row.host_us > 0 and row.peak_bytes > 0 and 0 < row.roofline < 1 for row, _ in results.read(path))


def test_the_module_runs(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["perf", "run", "--suite", "resnet"])
    monkeypatch.delitem(sys.modules, "perf.__main__")
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("perf", run_name="__main__")
    assert ended.value.code == 2 and "no suite named 'resnet'" in capsys.readouterr().err
