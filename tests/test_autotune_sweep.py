"""Sweeps: what is measured, what is on disk after a kill, and what is refused."""

from __future__ import annotations

import json
import os
import threading
import types

import pytest
import torch
from autotune_cases import ENVIRONMENT, GPU, PROBLEMS, World, call, header, offers
from fake_clock import Clock

from autotune import __main__ as command
from autotune import device, records, suites, sweep
from triton_conv3d import ops, settings, workload
from triton_conv3d.problem import PASSES, interpreted
from triton_conv3d.tuning import measure
from triton_conv3d.tuning.measure import QUICK_CANDIDATES
from triton_conv3d.tuning.search import OWN
from triton_conv3d.tuning.select import ranking
from triton_conv3d.tuning.storage import canonical

COUNTS = [len(offers(problem)) for problem in PROBLEMS]
LAYER = {"id": "a", "N": 1, "C": 4, "D": 5, "H": 6, "W": 7, "K": 6, "kernel": [3, 3, 3], "stride": [1, 1, 1],
         "padding": [1, 1, 1], "dilation": [1, 1, 1], "groups": 1, "bias": True, "dtype": "fp16"}  # fmt: skip


@pytest.fixture
def world():
    return World(Clock())


class TestSweep:
    def test_exhaustive_measures_everything_once(self, world, tmp_path):
        outcome = world.run(tmp_path / "s")
        assert (outcome.done, outcome.left, outcome.measured) == (len(PROBLEMS), 0, sum(COUNTS))
        found = records.read(tmp_path / "s")
        assert len(found) == sum(COUNTS) == len(world.asked)
        for problem, bench in zip(PROBLEMS, world.benches, strict=True):
            assert min(found.times(problem).values()) == min(bench.times.values())
        assert world.run(tmp_path / "s").measured == 0

    def test_a_candidate_that_never_ends_takes_the_process_but_not_the_sweep(self, tmp_path, monkeypatch):
        ended = threading.Event()
        monkeypatch.setattr(sweep, "HANGING_SECONDS", 0.1)
        monkeypatch.setattr(sweep.os, "_exit", lambda status: ended.set())
        World(Clock(), limit=lambda: ended.wait(20)).run(tmp_path / "s", PROBLEMS[:1])
        found = records.read(tmp_path / "s")
        assert ended.is_set() and len(found.wrong) == 1

    def test_guided_measures_few_and_finds_the_best(self, world, tmp_path):
        world.run(tmp_path / "s", most=QUICK_CANDIDATES)
        found = records.read(tmp_path / "s")
        for problem, bench in zip(PROBLEMS, world.benches, strict=True):
            assert len(found.of(problem)) <= QUICK_CANDIDATES < len(bench.times)
            assert min(found.times(problem).values()) <= 1.1 * min(bench.times.values())
            assert any(name == OWN for name, _ in found.of(problem))
        assert world.run(tmp_path / "s", most=QUICK_CANDIDATES).measured == 0

    def test_a_kill_at_any_measurement_loses_at_most_that_one(self, tmp_path):
        """Killed before each answer in turn: all earlier lines are on disk, and the sweep ends as if nothing had been."""

        class Killed(BaseException):
            pass

        path, lines = tmp_path / "s", 0
        while True:
            left = [3]

            def limit():
                left[0] -= 1
                if left[0] < 0:
                    raise Killed

            world = World(Clock(), limit=limit)
            try:
                world.run(path, PROBLEMS[:2])
                break
            except Killed:
                assert len(records.read(path)) == lines + 3
                lines += 3
        found = records.read(path)
        assert len(found) == sum(COUNTS[:2]) and path.read_text().count("\n") == 1 + len(found)

    def test_every_measurement_is_synced_before_the_next(self, tmp_path, monkeypatch):
        synced, path = [], tmp_path / "s"

        def sync(descriptor: int) -> None:
            status = os.fstat(descriptor)
            if status.st_ino == path.stat().st_ino:
                synced.append(status.st_size)

        monkeypatch.setattr(records.os, "fsync", sync)
        world = World(Clock(), limit=lambda: synced.append("begin"))
        world.run(path, PROBLEMS[:1])
        assert synced[1::2] == ["begin"] * COUNTS[0] and synced[0::2] == sorted(set(synced[0::2]))

    def test_wrong_candidates_are_quarantined(self, tmp_path):
        _, engine, config = next(item for item in offers(PROBLEMS[0]) if item[1].NAME != OWN)
        world = World(Clock(), wrong=[(engine.NAME, config)])
        world.run(tmp_path / "s", [PROBLEMS[0], PROBLEMS[0].replace(batch=3)])
        assert world.asked.count((engine.NAME, config)) == 1
        found = records.read(tmp_path / "s")
        assert found.wrong == {(engine.NAME, canonical(config.to_dict()))}
        again = World(Clock())
        again.run(tmp_path / "s", [PROBLEMS[0].replace(batch=4)])  # and after a restart
        assert again.asked and (engine.NAME, config) not in again.asked

    def test_an_illegal_access_ends_the_process_and_not_the_sweep(self, tmp_path):
        _, engine, config = next(item for item in offers(PROBLEMS[0]) if item[1].NAME != OWN)
        fatal = (engine.NAME, config)
        with pytest.raises(RuntimeError, match="illegal"):
            World(Clock(), fatal=[fatal]).run(tmp_path / "s")
        again = World(Clock(), fatal=[fatal])
        assert again.run(tmp_path / "s").left == 0 and fatal not in again.asked

    @pytest.mark.parametrize("most", (None, QUICK_CANDIDATES), ids=("exhaustive", "guided"))
    def test_a_compiler_that_ends_the_process_costs_one_candidate(self, tmp_path, most):
        """It ends it for this candidate whatever is compiled beside it; each process begins where the last one ended."""
        ranked, path = [(engine.NAME, config) for _, engine, config in offers(PROBLEMS[0])], tmp_path / "s"
        crashing = next(key for key in ranked if key[0] != OWN)

        class Crashed(BaseException):
            pass

        def compiled(batch) -> None:
            if crashing in batch:
                raise Crashed

        path.with_name("s.begun").write_text("{")  # damaged: as if there were none
        for _ in range(4):
            with pytest.raises(Crashed):
                World(Clock(), compiled=compiled).run(path, PROBLEMS[:1], most=most)
        world = World(Clock(), compiled=compiled)
        assert world.run(path, PROBLEMS[:1], most=most).left == 0 and crashing not in world.asked
        name, config = crashing
        found = records.read(path).of(PROBLEMS[0])
        assert [key for key, record in found.items() if record.fault] == [(name, canonical(config.to_dict()))]
        assert len(found) == (COUNTS[0] if most is None else most) and [p.name for p in tmp_path.iterdir()] == ["s"]

    def test_what_fails_is_not_tried_again_but_on_other_problems(self, tmp_path):
        _, engine, config = next(item for item in offers(PROBLEMS[0]) if item[1].NAME != OWN)
        world = World(Clock(), failed=[(engine.NAME, config)])
        both = [PROBLEMS[0], PROBLEMS[0].replace(batch=3)]
        world.run(tmp_path / "s", both)
        assert world.asked.count((engine.NAME, config)) == 2 and world.run(tmp_path / "s", both).measured == 0

    def test_a_problem_without_room_is_done(self, world, tmp_path):
        world.open_bench = lambda problem: None
        assert world.run(tmp_path / "s").left == 0 and not world.asked
        assert all(record.fault == "failed" for of in records.read(tmp_path / "s").records.values() for record in of.values())

    def test_progress(self, world, tmp_path):
        lines = []
        world.run(tmp_path / "s", report=lines.append)
        assert [line[:5] for line in lines] == ["[1/4]", "[2/4]", "[3/4]", "[4/4]"] and all("best" in line for line in lines)


class TestBudget:
    def test_ends_and_goes_on(self, world, tmp_path):
        least = sweep.least_seconds(PROBLEMS, offers)
        outcome = world.run(tmp_path / "s", budget=least + 1)
        assert outcome.left > 0 and least < outcome.seconds <= least + 3
        assert world.run(tmp_path / "s").left == 0 and len(world.asked) == sum(COUNTS)

    def test_an_impossible_one_says_the_least(self, world, tmp_path):
        with pytest.raises(sweep.Impossible, match=r"--budget 0.5 s .* 4 problems: the least is about 4 s"):
            world.run(tmp_path / "s", budget=0.5)
        assert not world.asked


class TestFile:
    @pytest.fixture
    def whole(self, world, tmp_path):
        world.run(tmp_path / "s", PROBLEMS[:1])
        return tmp_path / "s"

    def test_cut_anywhere_it_resumes(self, whole):
        data = whole.read_bytes()
        second = data.index(b"\n", data.index(b"\n") + 1) + 1
        for length in [*range(data.index(b"\n") + 1, second + 2, 23), len(data) - 1]:
            whole.write_bytes(data[:length])
            world = World(Clock())
            world.run(whole, PROBLEMS[:1])
            assert records.read(whole).times(PROBLEMS[0]).keys() == {
                (name, canonical(config.to_dict())) for name, config in world.benches[0].times
            }
            assert len(world.asked) == COUNTS[0] - (data[:length].count(b"\n") - 1)

    @pytest.mark.parametrize("change, reason", [
        (lambda t: t.replace('"schema":1', '"schema":2', 1), "schema 2, expected 1"),
        (lambda t: t.replace('"fault":null', '"fault":1', 1), "line 2 is damaged"),
        (lambda t: t.replace('"seconds":', '"seconds":-', 1), "line 2 is damaged"),
        (lambda t: t.replace('"batch":2', '"bitch":2', 1), "line 2 is damaged"),
        (lambda t: t.replace('"gpu":"', '"gpu":1,"_":"', 1), "gpu in the header"),
        (lambda t: "[]\n", "no header"), (lambda t: "x\n", "no sweep"), (lambda t: t[:20], "cut off"),
    ])  # fmt: skip
    def test_what_is_no_sweep_is_refused(self, whole, change, reason):
        whole.write_text(change(whole.read_text()))
        with pytest.raises(records.Refused, match=reason):
            World(Clock()).run(whole)

    def test_two_processes_do_not_write_to_one_file(self, whole):
        before = whole.read_bytes()
        with records.Writer(whole, header()), pytest.raises(records.Refused, match="another process"):
            World(Clock()).run(whole)
        assert whole.read_bytes() == before

    @pytest.mark.parametrize("name", ("gpu", "arch", "engines", "triton"))
    def test_another_environment_does_not_go_on(self, whole, name):
        with pytest.raises(records.Refused, match=f"cannot go on: it was measured with {name}"):
            World(Clock()).run(whole, created=header(**{name: "other"}))

    def test_merge(self, whole, tmp_path):
        other = World(Clock(), seed=9)
        other.run(tmp_path / "t", PROBLEMS[:2], created=header("2026-02-01T00:00:00Z"))
        one, two = records.read(whole), records.read(tmp_path / "t")
        for given in ([one, two], [two, one]):
            together = records.merged(given)
            assert together.times(PROBLEMS[0]) == two.times(PROBLEMS[0]) != one.times(PROBLEMS[0])
            assert len(together.problems) == 2 and together.header == two.header
        records.write(tmp_path / "m", records.merged([one]))
        assert records.read(tmp_path / "m").records == one.records
        with pytest.raises(records.Refused, match="gpu 'NVIDIA H200'"):
            records.merged([one, records.Sweep(header("2026-03-01", gpu="NVIDIA A100"))])


class TestSuites:
    def test_every_combination_once(self, tmp_path):
        path = tmp_path / "w.json"
        path.write_text(json.dumps([LAYER, {**LAYER, "id": "the same"}]))
        cases = suites.cases(suites.layers([str(path)]), dtypes=("fp16", "fp32"), precisions=("tf32", "ieee"))
        assert len(cases) == 3 * (1 + 2)
        problem = cases[0].problem(GPU, "sm_90")
        assert (problem.device, problem.arch, problem.bias, problem.batch) == (GPU, "sm_90", True, 1)

    @pytest.mark.parametrize("pass_", PASSES)
    def test_a_case_is_what_a_call_asks_for(self, pass_):
        """A single frame: of the taps in depth only those in the middle meet it, and a call asks for no others."""
        case = suites.Case(workload.layer({**LAYER, "D": 1, "bias": False}), pass_, "ieee", "channels_last")
        last = {"dtype": torch.float16, "device": "meta", "memory_format": torch.channels_last_3d}
        x, w = (torch.empty(shape, **last) for shape in (case.layer.input_shape, case.layer.weight_shape))
        asked = ops.problems(x, w, None, (1, 1, 1), (1,) * 6, (1, 1, 1), 1)[PASSES.index(pass_)]
        problem, operands = case.on("meta")
        assert problem == asked and problem.kernel_size == (1, 3, 3)
        assert operands.weight is None or operands.weight.shape == problem.weight_shape

    def test_the_designed_set(self):
        layers = suites.designed()
        assert len({layer.id for layer in layers}) == len(layers) > 100
        assert {layer.groups == 1 for layer in layers} == {True, False}

    @pytest.mark.parametrize("what, value", [("passes", "back"), ("dtypes", "fp8"), ("precisions", "x"), ("layouts", "y")])
    def test_unknown_values_name_what_there_is(self, what, value):
        with pytest.raises(ValueError, match=f"'{value}' is not known: expected some of"):
            suites.cases(suites.designed()[:1], **{what: (value,)})


class TestCommand:
    def test_without_a_gpu_it_says_what_can_be_done(self, capsys, tmp_path, monkeypatch):
        monkeypatch.setattr(device.torch.cuda, "is_available", lambda: False)
        status, _, err = call(capsys, "sweep", suites.DESIGNED, "--out", str(tmp_path / "s"))
        assert status == 2 and "--dry-run" in err and not (tmp_path / "s").exists()

    def test_dry_run(self, capsys, tmp_path):
        (tmp_path / "w.json").write_text(json.dumps([LAYER]))
        status, out, _ = call(capsys, "sweep", str(tmp_path / "w.json"), "--out", "s", "--dry-run")
        assert status == 0 and out.startswith("3 problems,") and "NVIDIA H200" in out

    @pytest.mark.parametrize("arguments, named", [
        (("--guided", "1"), "--guided 1"), (("--budget", "0"), "--budget 0"), (("--passes", "x"), "'x' is not known"),
    ])  # fmt: skip
    def test_mistakes(self, capsys, arguments, named):
        status, _, err = call(capsys, "sweep", suites.DESIGNED, "--out", "s", *arguments)
        assert status == 2 and named in err and err.count("\n") == 1

    def test_a_suite_that_is_not_there(self, capsys):
        status, _, err = call(capsys, "sweep", "nothing.json", "--out", "s")
        assert status == 2 and "'nothing.json' is no file" in err

    def test_the_real_bench(self, capsys, tmp_path, monkeypatch):
        """Every config of every engine is launched and verified, in the interpreter; its times mean nothing."""
        if not interpreted():
            pytest.skip("on the CPU, in the interpreter")
        monkeypatch.setattr(device, "find", lambda: torch.device("cpu"))
        timer = types.SimpleNamespace(time=lambda launch: float(launch().numel()))
        monkeypatch.setattr(measure, "EventTimer", lambda here: timer)
        monkeypatch.setattr(sweep, "REPETITIONS", 1)
        small = {**LAYER, "D": 3, "H": 4, "W": 3, "C": 2, "K": 3, "dtype": "fp32"}
        (tmp_path / "w.json").write_text(json.dumps([small]))
        arguments = (str(tmp_path / "w.json"), "--out", str(tmp_path / "s"), "--precisions", "ieee")
        status, out, err = call(capsys, "sweep", *arguments)
        found = records.read(tmp_path / "s")
        assert status == 0, err
        assert "3 problems are done, 0 left" in out and len(found.problems) == 3
        assert all(r.seconds and not r.fault for of in found.records.values() for r in of.values()) and len(found) > 10

    def test_on_a_gpu(self, capsys, tmp_path, monkeypatch):
        """The command with a device that is made up: it measures, and the same command has nothing left."""
        world = World(Clock())
        monkeypatch.setattr(device, "find", lambda: types.SimpleNamespace(type="cuda"))
        monkeypatch.setattr(command, "environment", lambda here: ENVIRONMENT)
        monkeypatch.setattr(device, "benches", lambda cases, here: world.open_bench)
        (tmp_path / "w.json").write_text(json.dumps([LAYER]))
        arguments = ("sweep", str(tmp_path / "w.json"), "--out", str(tmp_path / "s"), "--passes", "forward")
        assert call(capsys, *arguments)[0] == 0
        assert "0 measurements" in call(capsys, *arguments)[1] and world.asked


def test_every_engine_is_swept_whatever_the_settings_ask_for(capsys, tmp_path):
    """Those on trial too."""
    layer = {**LAYER, "C": 16, "K": 32}
    (tmp_path / "w.json").write_text(json.dumps([layer]))
    with settings.configure(autotune="off", engine="implicit_gemm"):
        out = call(capsys, "sweep", str(tmp_path / "w.json"), "--out", "s", "--dry-run", "--passes", "forward")[1]
    problem = suites.cases([workload.layer(layer)], ("forward",))[0].problem(GPU, "sm_90")
    with settings.configure(autotune="full"):
        ranked = ranking(problem, measuring=True)
    assert f"1 problems, {len(ranked)} candidates" in out and "hopper" in {engine.NAME for _, engine, _ in ranked}


@pytest.mark.parametrize("gpu", ("NVIDIA H200", "NVIDIA H200,", ",sm_90", "x,sm90"))
def test_a_gpu_has_a_name_and_an_architecture(capsys, gpu):
    status, _, err = call(capsys, "variants", suites.DESIGNED, "--gpu", gpu)
    assert status == 2 and repr(gpu) in err
