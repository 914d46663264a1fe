"""select and run: the order of sources, the modes, what is never measured, and faults while running."""

from __future__ import annotations

import dataclasses
import importlib
import timeit
import types
import warnings

import pytest
import torch

from triton_conv3d import configure, engines
from triton_conv3d.engines.base import Config, Memory
from triton_conv3d.problem import Operands, Problem
from triton_conv3d.tuning import cost_model, measure, quarantine, run, select
from triton_conv3d.tuning.select import forget, may_measure

selecting = importlib.import_module("triton_conv3d.tuning.select")  # the name in the package is the function

GPU = Problem("forward", 1, 8, 8, (8, 8, 8), (3, 3, 3), device="NVIDIA H200", arch="sm_90")
CPU = Problem("forward", 1, 2, 3, (3, 3, 3), (3, 3, 3), dtype="float32")


@dataclasses.dataclass(frozen=True)
class Knob(Config):
    value: int = 0


def fake_engine(name, configs, launch=None, refuses=None):
    return types.SimpleNamespace(
        NAME=name,
        supports=lambda problem: refuses,
        configs=lambda problem: tuple(map(Knob, configs)),
        memory=lambda problem, config: Memory(),
        launch=launch or (lambda problem, operands, config: torch.zeros(problem.result_shape)),
    )


@pytest.fixture
def fakes(monkeypatch):
    """Replace the engines; torch's own stays the last."""

    def install(*fake):
        table = {engine.NAME: engine for engine in (*fake, fake_engine("aten", [0]))}
        monkeypatch.setattr(engines, "available", lambda: table)
        monkeypatch.setattr(engines, "get", lambda name: table[name])
        return table

    forget()
    monkeypatch.setattr(selecting, "remembered", lambda problem: None)
    monkeypatch.setattr(quarantine, "_left_out", {})
    yield install
    forget()


OPERANDS = Operands(torch.zeros(CPU.input_shape), torch.zeros(CPU.weight_shape))


class TestSelect:
    def test_known_problem_is_a_lookup(self):
        select(CPU)
        best = min(timeit.repeat(lambda: select(CPU), number=2000, repeat=5)) / 2000
        assert best < 3e-6, f"{best * 1e6:.2f} us"

    def test_for_a_cpu_no_gpu_is_asked(self, monkeypatch):
        """In a process that was forked from one with a GPU, asking it is an error."""

        def refused():
            raise RuntimeError("CUDA error: initialization error")

        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", refused)
        assert select(CPU.replace(batch=77)).engine == "aten"

    def test_forced_engine(self):
        with configure(engine="aten"):
            assert select(CPU).source == "forced" and select(CPU).engine == "aten"
        with configure(engine="none-such"), pytest.raises(ValueError, match="implicit_gemm"):
            select(CPU)

    def test_forced_engine_that_cannot(self, fakes):
        fakes(fake_engine("stubborn", [1], refuses="not today"))
        with configure(engine="stubborn"):
            with pytest.warns(RuntimeWarning, match="not today"):
                assert select(CPU).source == "fallback"
            with configure(engine="stubborn", strict=True), pytest.raises(RuntimeError, match="not today"):
                select(CPU)

    def test_strict_wants_more_than_aten(self, fakes):
        fakes(fake_engine("stubborn", [1], refuses="not today"))
        with configure(strict=True), pytest.raises(RuntimeError, match="stubborn: not today"):
            select(CPU)

    def test_change_of_settings_forgets_plans(self):
        plan = select(CPU)
        with configure(engine="aten"):
            assert select(CPU).source == "forced"
        assert select(CPU) == plan

    @pytest.mark.parametrize("value, on", ((1, True), ("on", True), (True, True), (0, False), ("", False), (False, False)))
    def test_a_switch_as_it_is_written(self, value, on):
        with configure(strict=value) as now:
            assert now.strict is on

    @pytest.mark.parametrize("name, value, expected", [
        ("strict", 2, "strict=2 is not a switch"), ("strict", None, "strict=None"), ("log", 1, "log=1 is not known"),
        ("cache_dir", 5, "cache_dir=5 is no directory: expected a path"), ("tables", "~no.such.user", "no such user"),
    ])  # fmt: skip
    def test_a_value_that_a_setting_does_not_take(self, name, value, expected):
        with pytest.raises(ValueError, match=expected):
            configure(**{name: value})


class TestModes:
    @pytest.fixture(autouse=True)
    def measured(self, fakes, monkeypatch):
        fakes(fake_engine("fast", [1, 2]))
        self.calls = []
        result = measure.Result("fast", Knob(2), 5.0, 9.0, 3, {})
        monkeypatch.setattr(measure, "best", lambda *a, **k: self.calls.append(a[3]) or result)
        monkeypatch.setattr(selecting, "environment", lambda device: {"gpu": GPU.device})

    @pytest.mark.parametrize("mode, measures", (("off", 0), ("quick", 1), ("full", 1)))
    def test_first_call(self, mode, measures):
        with configure(autotune=mode, cache_dir=None):
            first, second = select(GPU, OPERANDS), select(GPU, OPERANDS)
        assert len(self.calls) == measures and first == second
        assert first.source == ("measured" if measures else "ranking")

    FORBIDDEN = {
        "capture": ("torch.cuda.is_current_stream_capturing", True),
        "tracing": ("torch.compiler.is_compiling", True),
        "deterministic": ("torch.are_deterministic_algorithms_enabled", True),
    }

    @pytest.mark.parametrize("name, value", FORBIDDEN.values(), ids=FORBIDDEN.keys())
    def test_put_off(self, name, value, monkeypatch):
        monkeypatch.setattr("torch.cuda.is_available", lambda: True)
        monkeypatch.setattr("torch.cuda.is_current_stream_capturing", lambda: False)
        assert may_measure()
        with configure(autotune="quick", cache_dir=None):
            with monkeypatch.context() as patch:
                patch.setattr(name, lambda: value)
                assert select(GPU, OPERANDS).source == "ranking" and not self.calls
            assert select(GPU, OPERANDS).source == "measured"  # the first call that may

    def test_cpu_is_never_measured(self):
        select(CPU, OPERANDS)
        assert not self.calls


OUT_OF_RESOURCES = type("OutOfResources", (Exception,), {})
COMPILATION = type("CompilationError", (Exception,), {})
FAULTS = {
    "shared-memory": OUT_OF_RESOURCES("out of resource: shared memory"),
    "registers": OUT_OF_RESOURCES("out of resource: registers"),
    "threads": OUT_OF_RESOURCES("out of resource: threads"),
    "compile": COMPILATION("at 3:4"),
    "ptxas": type("PTXASError", (Exception,), {})("ptxas failed"),
    "passes": RuntimeError("PassManager::run failed"),
}
FATAL = {
    "illegal-access": RuntimeError("CUDA error: an illegal memory access was encountered"),
    "misaligned": RuntimeError("CUDA error: misaligned address"),
    "assert": RuntimeError("CUDA error: device-side assert triggered"),
}


def raising(error, times=10**9):
    left = [times]

    def launch(problem, operands, config):
        if left[0] > 0:
            left[0] -= 1
            raise error
        return torch.full(problem.result_shape, 1.0)

    return launch


class TestRunFaults:
    @pytest.mark.parametrize("error", FAULTS.values(), ids=FAULTS.keys())
    def test_next_config(self, fakes, error):
        fakes(fake_engine("weak", [1, 2], raising(error, times=1)))
        with configure(engine="weak"), pytest.warns(RuntimeWarning, match="dropped"):
            assert run(CPU, OPERANDS).eq(1).all()

    @pytest.mark.parametrize("error", FAULTS.values(), ids=FAULTS.keys())
    def test_aten_in_the_end(self, fakes, error):
        fakes(fake_engine("weak", [1, 2], raising(error)))
        with configure(engine="weak"), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert run(CPU, OPERANDS).eq(0).all()
            run(CPU, OPERANDS)
        assert [("dropped" in str(w.message)) for w in caught] == [True, True, False]

    @pytest.mark.parametrize("error", FATAL.values(), ids=FATAL.keys())
    def test_illegal_access_is_raised_with_its_config(self, fakes, error):
        fakes(fake_engine("weak", [1, 2], raising(error)))
        with configure(engine="weak"), pytest.raises(RuntimeError, match=r"(?s)weak \[value=1\].*TRITON_CONV3D_ENGINE=aten"):
            run(CPU, OPERANDS)

    @pytest.mark.parametrize("error", (KeyError("bug"), torch.OutOfMemoryError("memory")), ids=("bug", "memory"))
    def test_other_errors_are_the_callers(self, fakes, error):
        fakes(fake_engine("weak", [1], raising(error)))
        with configure(engine="weak"), pytest.raises(type(error)):
            run(CPU, OPERANDS)


class FakeTimer:
    """Times by the knob of the candidate: engine.launch leaves it behind."""

    def __init__(self):
        self.last = None

    def time(self, function):
        function()
        return self.last


class TestMeasure:
    @pytest.fixture(autouse=True)
    def _fakes(self, fakes, monkeypatch):
        self.timer, self.monkeypatch = FakeTimer(), monkeypatch
        x = torch.randn(CPU.input_shape, generator=torch.Generator().manual_seed(1))
        w = torch.randn(CPU.weight_shape, generator=torch.Generator().manual_seed(2))
        self.operands = Operands(x, w)

    def engine(self, name, times, wrong=(), error=None):
        def launch(problem, operands, config):
            self.timer.last = config.value * 1e-6
            if error is not None and config.value in wrong:
                raise error
            return torch.nn.functional.conv3d(*operands[:2]) + (1.0 if config.value in wrong else 0.0)

        return fake_engine(name, times, launch)

    def best(self, engine, mode="full"):
        ranked = [(1.0, e, c) for e in (engine, self.engine("aten", [50])) for c in e.configs(CPU)]
        return measure.best(CPU, self.operands, ranked, mode, self.timer, seconds=60.0)

    def test_fastest_wins(self):
        result = self.best(self.engine("fast", [30, 10, 20]))
        assert (result.engine, result.config, result.candidates) == ("fast", Knob(10), 4)
        assert (result.time_us, result.aten_us) == pytest.approx((10.0, 50.0))

    def test_aten_wins_where_it_is_faster(self):
        assert self.best(self.engine("slow", [80, 90])).engine == "aten"

    def test_aten_is_always_among_the_quick(self):
        assert self.best(self.engine("slow", range(80, 120)), "quick").engine == "aten"

    def test_wrong_results_are_quarantined(self):
        with pytest.warns(RuntimeWarning, match=r"fast \[value=10\] gave a wrong result"):
            assert self.best(self.engine("fast", [10, 20], wrong=[10])).config == Knob(20)
        assert quarantine.quarantined("fast", Knob(10), CPU.arch) and not quarantine.quarantined("fast", Knob(20), CPU.arch)

    @pytest.mark.parametrize("error", [*FAULTS.values(), torch.OutOfMemoryError("memory")], ids=[*FAULTS, "memory"])
    def test_what_cannot_run_does_not_win(self, error):
        assert self.best(self.engine("fast", [10, 20], wrong=[10], error=error)).config == Knob(20)

    @pytest.mark.parametrize("error", FATAL.values(), ids=FATAL.keys())
    def test_illegal_access_is_never_swallowed(self, error):
        with pytest.raises(RuntimeError, match=r"fast \[value=10\]"):
            self.best(self.engine("fast", [10, 20], wrong=[10], error=error))

    def test_random_state_and_operands_stay(self):
        copies, state = [t.clone() for t in self.operands[:2]], torch.get_rng_state()
        self.best(self.engine("fast", [10, 20]))
        assert torch.equal(state, torch.get_rng_state())
        assert all(torch.equal(a, b) for a, b in zip(copies, self.operands[:2], strict=True))


class TestCostModel:
    @pytest.mark.parametrize("pass_", ("forward", "dgrad", "wgrad"))
    def test_no_prediction_beats_the_roofline(self, pass_):
        big = dataclasses.replace(GPU, pass_=pass_, batch=2, in_channels=128, out_channels=128, input_size=(64, 64, 64))
        gpu = cost_model.rates(big)
        floor = max(big.flops / gpu.tensor, big.min_bytes / gpu.bandwidth)
        assert all(seconds >= floor for seconds, _, _ in selecting.ranking(big))

    def test_large_tiles_for_large_layers(self):
        big = dataclasses.replace(
            GPU, batch=2, in_channels=256, out_channels=256, input_size=(64, 64, 64), padding=(1,) * 6
        )
        best = next(config for _, engine, config in selecting.ranking(big) if engine.NAME == "implicit_gemm")
        assert best.block_m * best.block_n >= 128 * 64 and best.splits == 1

    def test_deep_and_small_layers_are_split(self):
        deep = dataclasses.replace(
            GPU, batch=2, in_channels=320, out_channels=320, input_size=(4, 4, 4), padding=(1,) * 6
        )
        best = next(config for _, engine, config in selecting.ranking(deep) if engine.NAME == "implicit_gemm")
        assert best.splits > 1
