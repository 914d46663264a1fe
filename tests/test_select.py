"""select: where a plan comes from, for how long it holds, and what keeps a problem from being measured."""

from __future__ import annotations

import dataclasses
import importlib
import os
import subprocess
import sys
import threading
import timeit
import types
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from triton_conv3d import configure, engines
from triton_conv3d.engines.aten import AtenConfig
from triton_conv3d.engines.base import Config, Memory, in_format, sharing
from triton_conv3d.problem import Operands, Problem
from triton_conv3d.tuning import measure, quarantine, run, select, table
from triton_conv3d.tuning.cache import Entry, PlanCache

selecting = importlib.import_module("triton_conv3d.tuning.select")  # the name in the package is the function

GPU = Problem("forward", 1, 2, 3, (3, 3, 3), (3, 3, 3), dtype="float32", device="NVIDIA H200", arch="sm_90")
OPERANDS = Operands(torch.ones(GPU.input_shape), torch.ones(GPU.weight_shape))
ENVIRONMENT = {"gpu": GPU.device, "arch": GPU.arch, "torch": "2.13"}


@dataclasses.dataclass(frozen=True)
class Knob(Config):
    value: int = 0


class Engine(types.SimpleNamespace):
    def __init__(self, name, configs, refuses=None, error=None):
        super().__init__(
            NAME=name,
            supports=lambda problem: refuses,
            configs=lambda problem: tuple(configs),
            memory=lambda problem, config: Memory(),
        )
        self.error, self.launches = error, []

    def launch(self, problem, operands, config):
        self.launches.append(config)
        if self.error is not None:
            raise self.error
        return F.conv3d(operands.input, operands.weight)


class Timer:
    """The knob of the candidate that ran last; torch's own is slow."""

    def __init__(self, table):
        self.table = table

    def time(self, function):
        before = {name: len(engine.launches) for name, engine in self.table.items()}
        function()
        (engine,) = [engine for name, engine in self.table.items() if len(engine.launches) > before[name]]
        return getattr(engine.launches[-1], "value", 99)


@pytest.fixture
def world(monkeypatch, tmp_path):
    """A process on a GPU whose engines are made up, with a cache of its own."""
    world = {
        "fast": Engine("fast", [Knob(7), Knob(5), Knob(6)]),
        "aten": Engine("aten", [AtenConfig(benchmark=True), AtenConfig()]),
    }
    monkeypatch.setattr(engines, "available", lambda: world)
    monkeypatch.setattr(engines, "get", lambda name: world[name])
    monkeypatch.setattr(selecting, "_environment", lambda problem: (ENVIRONMENT, True))
    monkeypatch.setattr(selecting, "environment", lambda device: ENVIRONMENT)
    monkeypatch.setattr(selecting.cost_model, "predict", lambda p, engine, c: 2.0 if engine.NAME == "aten" else 1.0)
    monkeypatch.setattr(measure, "EventTimer", lambda device: Timer(world))
    monkeypatch.setattr(quarantine, "_left_out", {})
    monkeypatch.setattr(table, "SHIPPED", tmp_path / "shipped")
    selecting.forget()
    settled = configure(cache_dir=tmp_path / "cache", autotune="quick", engine=None, strict=False, tables=None)
    with settled, measure.budget(60.0):  # a busy machine would end a second's budget early
        yield world
    selecting.forget()


def store(directory, config):
    PlanCache(directory).store(
        Entry(GPU.to_dict(), ENVIRONMENT, {"mode": "quick"}, "fast", config.to_dict(), 5.0, 9.0, 3)
    )


class TestSources:
    def test_measured_then_memory_then_cache(self, world):
        first = select(GPU, OPERANDS)
        assert (first.engine, first.config, first.source, first.time_us) == ("fast", Knob(5), "measured", 5e6)
        assert select(GPU) is first
        selecting.forget()
        again = select(GPU)
        assert (again.config, again.source, again.time_us) == (Knob(5), "cache", 5e6)

    def test_aten_has_its_time_in_the_entry(self, world, tmp_path):
        select(GPU, OPERANDS)
        ((_, entry),) = PlanCache(tmp_path / "cache").entries()
        assert (entry.engine, entry.aten_us, entry.policy["mode"]) == ("fast", 99e6, "quick")

    @pytest.mark.parametrize("config", (Knob(8), Knob(True)), ids=("unknown", "of-another-type"))
    def test_a_stored_config_that_is_not_offered_is_a_miss(self, world, tmp_path, config):
        store(tmp_path / "cache", config)
        assert select(GPU).source == "ranking"

    def test_full_does_not_take_what_quick_measured(self, world, tmp_path):
        store(tmp_path / "cache", Knob(7))
        assert select(GPU, OPERANDS).config == Knob(7)
        with configure(autotune="full"):
            assert select(GPU, OPERANDS).config == Knob(5)
        assert select(GPU, OPERANDS).config == Knob(5)  # and quick takes what full measured

    def test_without_a_cache_a_change_of_settings_measures_nothing_again(self, world):
        with configure(cache_dir=None):
            select(GPU, OPERANDS)
            launches = len(world["fast"].launches)
            with configure(log="plan"):
                again = select(GPU, OPERANDS)
            assert (again.config, again.source, again.time_us) == (Knob(5), "memory", 5e6)
            assert len(world["fast"].launches) == launches
            with configure(engine="aten"):
                assert select(GPU).engine == "aten"
            with configure(autotune="full"):
                assert select(GPU, OPERANDS).source == "measured"

    @pytest.mark.parametrize("distance, source", ((0.0, "table"), (1.5, "nearest")))
    def test_table(self, world, monkeypatch, distance, source):
        entry = Entry(GPU.to_dict(), ENVIRONMENT, {}, "fast", {"value": 6}, 6.0, None, 3)
        monkeypatch.setattr(selecting, "lookup", lambda *a: [(entry, distance)])
        with configure(autotune="off"):
            plan = select(GPU, OPERANDS)
        assert (plan.config, plan.source, plan.time_us) == (Knob(6), source, None if distance else 6.0)
        assert select(GPU, OPERANDS).source == ("measured" if distance else "table")

    def test_the_cache_comes_before_the_table(self, world, tmp_path, monkeypatch):
        store(tmp_path / "cache", Knob(7))
        entry = Entry(GPU.to_dict(), ENVIRONMENT, {}, "fast", {"value": 6}, 6.0, None, 3)
        monkeypatch.setattr(selecting, "lookup", lambda *a: [(entry, 0.0)])
        assert (select(GPU).config, select(GPU).source) == (Knob(7), "cache")

    def test_a_gpu_that_is_not_here_has_no_cache(self, tmp_path):
        selecting.forget()
        missing = GPU.replace(device="NVIDIA Z9")
        with configure(cache_dir=tmp_path):
            assert select(missing).source == "ranking"


class TestOnTrial:
    """An engine that was never measured on an architecture is no plan there but by a measurement, or where asked for."""

    @pytest.fixture(autouse=True)
    def _new(self, world):
        world["new"] = self.new = Engine("new", [Knob(3)])
        self.new.MEASURED = ("sm_100",)
        self.world = world

    def test_no_prediction_makes_it_a_plan(self, monkeypatch):
        monkeypatch.setattr(selecting.cost_model, "predict", lambda p, engine, c: 1.0 if engine.NAME == "new" else 2.0)
        assert select(GPU).engine == "fast" and "on trial, never measured on sm_90" in selecting.refusals(GPU)["new"]
        with configure(engine="new"):
            assert select(GPU).engine == "new"
        self.new.MEASURED = ("sm_90",)
        selecting.forget()
        assert "new" in {engine.NAME for _, engine, _ in selecting.ranking(GPU)} and "new" not in selecting.refusals(GPU)

    def test_a_measurement_does(self):
        assert select(GPU, OPERANDS).engine == "new"
        selecting.forget()
        assert (select(GPU).engine, select(GPU).source) == ("new", "cache")

    @pytest.mark.parametrize("measured, expected", [("new", "new"), ("fast", "fast")])
    def test_of_a_similar_problem_only_what_was_measured_there(self, monkeypatch, measured, expected):
        seconds = {"new": 1e-9, "fast": 1.0, "aten": 2.0}
        monkeypatch.setattr(selecting.cost_model, "predict", lambda p, engine, c: seconds[engine.NAME])
        value = {"new": 3, "fast": 6}[measured]
        entry = Entry(GPU.to_dict(), ENVIRONMENT, {}, measured, {"value": value}, 6.0, None, 3)
        monkeypatch.setattr(selecting, "lookup", lambda *a: [(entry, 1.5)])
        assert (select(GPU).engine, select(GPU).source) == (expected, "nearest")


class TestForced:
    def test_is_tuned_and_kept_apart(self, world):
        world["aten"].configs = lambda problem: (AtenConfig(),)
        world["slow"] = Engine("slow", [Knob(200), Knob(150)])
        with configure(engine="slow"):
            assert select(GPU, OPERANDS).config == Knob(150)
            selecting.forget()
            assert select(GPU).source == "cache"
        assert select(GPU, OPERANDS).config == Knob(5)

    def test_strict_takes_torchs_own_where_it_was_measured_faster(self, world):
        world["fast"].configs = lambda problem: (Knob(500),)
        with configure(strict=True):
            assert select(GPU, OPERANDS).engine == "aten"

    def test_empty_problems_are_torchs_own_even_if_strict(self, world):
        with configure(strict=True, engine="fast"):
            assert select(GPU.replace(batch=0)).engine == "aten"


class TestPutOff:
    @pytest.fixture(autouse=True)
    def _world(self, world):
        self.world = world

    def test_without_operands(self):
        assert select(GPU).source == "ranking" and select(GPU, OPERANDS).source == "measured"

    def test_capture_reads_no_file(self, monkeypatch, tmp_path):
        store(tmp_path / "cache", Knob(6))
        with monkeypatch.context() as patch:
            patch.setattr(selecting, "_quiet", lambda: True)
            patch.setattr(selecting, "PlanCache", None)
            assert select(GPU, OPERANDS).source == "ranking"
        assert select(GPU, OPERANDS).source == "cache"

    def test_tensors_that_are_not_real(self, monkeypatch):
        monkeypatch.setattr(measure, "best", lambda *a, **k: pytest.fail("measured"))
        with FakeTensorMode():
            fake = Operands(torch.empty(GPU.input_shape), torch.empty(GPU.weight_shape))
            assert select(GPU, fake).source == "ranking"

    def test_determinism_times_nothing_and_searches_nothing(self):
        self.world["fast"].configs = lambda problem: (Knob(500),)
        assert select(GPU, OPERANDS).config == AtenConfig(benchmark=True)
        torch.use_deterministic_algorithms(True)
        try:
            launches = len(self.world["fast"].launches)
            first = select(GPU, OPERANDS)
            assert (first.engine, first.source) == ("fast", "ranking")
            assert select(GPU, OPERANDS) is first and len(self.world["fast"].launches) == launches
            assert AtenConfig(benchmark=True) not in [config for _, _, config in selecting.ranking(GPU)]
        finally:
            torch.use_deterministic_algorithms(False)
        assert select(GPU).config == AtenConfig(benchmark=True)

    def test_one_thread_measures(self, monkeypatch):
        entered, leave, seen = threading.Event(), threading.Event(), []

        def slow(*a, **k):
            entered.set()
            assert leave.wait(10)
            return measure.Result("fast", Knob(5), 5.0, None, 1, {"mode": "quick"})

        monkeypatch.setattr(measure, "best", slow)
        thread = threading.Thread(target=lambda: seen.append(select(GPU, OPERANDS)))
        thread.start()
        assert entered.wait(10)
        assert select(GPU, OPERANDS).source == "ranking"
        leave.set()
        thread.join(10)
        assert seen[0].source == "measured" and select(GPU) == seen[0]

    def test_a_failed_measurement_frees_the_way(self, monkeypatch):
        def illegal(*a, **k):
            raise RuntimeError("fast [value=5] failed: an illegal memory access")

        with monkeypatch.context() as patch:
            patch.setattr(measure, "best", illegal)
            with pytest.raises(RuntimeError, match="illegal"):
                select(GPU, OPERANDS)
        assert not list(PlanCache(selecting.settings.current().cache_dir).entries())
        assert select(GPU, OPERANDS).source == "measured"

    def test_what_could_not_be_measured_is_not_tried_again(self, monkeypatch):
        calls = []
        monkeypatch.setattr(measure, "best", lambda *a, **k: calls.append(1))
        assert select(GPU, OPERANDS).source == select(GPU, OPERANDS).source == "ranking" and len(calls) == 1


class TestRun:
    def test_known_problem_costs_little(self, world):
        with configure(autotune="off"):
            select(GPU)
            world["fast"].launch = lambda problem, operands, config: None
            best = min(timeit.repeat(lambda: run(GPU, OPERANDS), number=2000, repeat=5)) / 2000
        assert best < 5e-6, f"{best * 1e6:.2f} us"

    def test_strict_does_not_end_at_torchs_own(self, world):
        world["fast"].error = type("OutOfResources", (Exception,), {})("shared memory")
        with configure(strict=True, autotune="off"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with pytest.raises(RuntimeError, match="fast: every config failed"):
                run(GPU, OPERANDS)

    def test_a_config_is_dropped_for_problems_alike_only(self, world):
        world["fast"].error = type("OutOfResources", (Exception,), {})("shared memory")
        with configure(autotune="off"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert run(GPU, OPERANDS).shape == GPU.output_shape
            assert select(GPU).engine == "aten"
            assert select(GPU.replace(batch=4)).engine == "aten"
            assert select(GPU.replace(dtype="float16")).engine == "fast"

    @pytest.mark.parametrize("needed, strict, rescued", [(8, False, True), (0, False, False), (8, True, False)])
    def test_where_memory_runs_out_what_needs_less_takes_over_for_the_call(self, world, needed, strict, rescued):
        """In strict mode torch's own does not."""
        world["fast"].memory = lambda problem, config: Memory(workspace=needed)
        world["fast"].error = torch.OutOfMemoryError("no room")
        with configure(autotune="off", strict=strict):
            if not rescued:
                with pytest.raises(torch.OutOfMemoryError, match="no room"):
                    run(GPU, OPERANDS)
                return
            with sharing(OPERANDS.input):
                copy = in_format(OPERANDS.input, torch.channels_last_3d)
                assert run(GPU, OPERANDS).shape == GPU.output_shape
                assert in_format(OPERANDS.input, torch.channels_last_3d) is not copy  # it took memory
            assert len(world["aten"].launches) == 1 and select(GPU).engine == "fast"
            world["fast"].error = None
            run(GPU, OPERANDS)
            assert len(world["aten"].launches) == 1


@pytest.mark.parametrize("kernel, expected", [((1, 1, 1), "matmul"), ((3, 3, 3), "implicit_gemm")])
def test_the_interpreter_runs_kernels(kernel, expected):
    pytest.importorskip("triton")
    here = Problem("forward", 1, 16, 4, (6, 6, 6), kernel, dtype="float32", arch="interpreter")
    ranked = selecting.ranking(here)
    assert ranked[0][1].NAME == expected and ranked[-1][1].NAME == "aten"
    assert select(here.replace(arch="cpu")).engine == "aten"


def test_cudnn_searches_only_where_it_is_measured():
    """Not by a ranking, which may be used under capture; and a measured one always does."""
    def searches(**how):
        offers = selecting.ranking(GPU, **how)
        return {config.benchmark for _, engine, config in offers if engine.NAME == "aten"}

    assert searches() == {False} and searches(measuring=True) == {True}
    torch.use_deterministic_algorithms(True)
    try:
        assert searches(measuring=True) == {False}
    finally:
        torch.use_deterministic_algorithms(False)


def test_a_plan_is_logged_once_and_again_when_it_changes(world, caplog):
    with configure(log="plan"), caplog.at_level("INFO", logger="triton_conv3d"):
        for operands in (None, None, OPERANDS, OPERANDS):
            select(GPU, operands)
    sources = [record.getMessage().split(" from ")[1] for record in caplog.records]
    assert sources == ["ranking", "measured, 5000000.0 us"]


def test_log_is_shown_whatever_the_root_logger_says():
    code = (
        "from triton_conv3d.tuning import select\n"
        "from triton_conv3d.problem import Problem\n"
        "for _ in range(2): select(Problem('forward', 1, 2, 3, (3, 3, 3), (3, 3, 3)))\n"
    )
    environment = {**os.environ, "TRITON_CONV3D_LOG": "plan"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.stderr.count("forward 1x2x3x3x3 -> 3") == 1 and "aten" in done.stderr, done.stderr
