"""An engine on trial: another process tries it first, and what that found holds for this GPU and these versions."""

from __future__ import annotations

import contextlib
import os
import sys
import types

import pytest
import test_select
import torch
from test_select import ENVIRONMENT, GPU, OPERANDS, Engine, Knob

from triton_conv3d import __main__ as command_line
from triton_conv3d import engines, tryout
from triton_conv3d.problem import CHANNELS_LAST, PASSES
from triton_conv3d.settings import configure
from triton_conv3d.tuning import measure, proof, select, storage
from triton_conv3d.tuning.cache import PlanCache
from triton_conv3d.tuning.storage import canonical
from triton_conv3d.workload import Layer

world = test_select.world
pytestmark = pytest.mark.usefixtures("new_process")
NAME = "new"
WORKS, FAILED, UNTRIED = map(proof.Outcome, (True, True, False), (None, "it gave a wrong result", "no GPU"))
OTHER = {**ENVIRONMENT, "triton": "9.9"}


@pytest.fixture
def tried(monkeypatch) -> list:
    """Engines that were tried; ``tried.outcome`` is what comes of it."""

    class Tried(list):
        outcome = WORKS

    trials = Tried()
    monkeypatch.setattr(proof, "_try", lambda engine, index: (trials.append(engine), trials.outcome)[1])
    return trials


def found(directory, environment=ENVIRONMENT) -> proof.Outcome:
    proof.find_out(NAME, 0, environment, directory)
    return proof.outcome(NAME, environment["gpu"])


@pytest.mark.filterwarnings("ignore:.*failed its trial")
class TestWhatIsKept:
    @pytest.mark.parametrize("outcome, trials", ((WORKS, 1), (FAILED, 1), (UNTRIED, 2)), ids=("works", "fails", "untried"))
    def test_holds_for_later_processes_if_it_tells_anything(self, tmp_path, tried, new_process, outcome, trials):
        tried.outcome = outcome
        for _ in range(2):
            assert found(tmp_path / "cache") == found(tmp_path / "cache") == outcome
            assert proof.works(NAME, GPU.device) == (outcome is WORKS)
            new_process()
        assert len(tried) == trials

    def test_holds_in_its_environment(self, tmp_path, tried, new_process):
        found(tmp_path / "cache")
        new_process()
        tried.outcome = FAILED
        assert found(tmp_path / "cache", OTHER) == FAILED
        new_process()
        assert found(tmp_path / "cache") == WORKS and len(tried) == 2

    @pytest.mark.parametrize("change", (
        {"schema": 2}, {"schema": True}, {"engine": "old"}, {"engine": 5}, {"environment": OTHER}, {"environment": None},
        {"environment": {**ENVIRONMENT, "torch": 2}}, {"failure": 5}, {"failure": False}, {"more": 1}, None,
    ), ids=repr)  # fmt: skip
    def test_anything_else_in_its_file_counts_for_nothing_and_is_written_anew(self, tmp_path, tried, new_process, change):
        tried.outcome = FAILED
        found(tmp_path / "cache")
        (path,) = (tmp_path / "cache").iterdir()
        good = path.read_bytes()
        path.write_bytes(b"{" if change is None else canonical({**storage.parse(good), **change}).encode())
        new_process()
        assert found(tmp_path / "cache") == FAILED and len(tried) == 2
        assert path.read_bytes() == good

    def test_only_what_this_user_alone_can_have_written_counts(self, tmp_path, tried, new_process):
        found(tmp_path / "cache")
        (path,) = (tmp_path / "cache").iterdir()
        assert path.stat().st_mode & 0o777 == 0o600
        path.chmod(0o620)
        new_process()
        found(tmp_path / "cache")
        assert len(tried) == 2

    @pytest.mark.filterwarnings("ignore:.*kept in memory only")
    @pytest.mark.parametrize("where", (None, "/proc/none", "x" * 300, "a\0b", "\ud800"), ids=repr)
    def test_where_nothing_can_be_kept_it_holds_in_this_process(self, tmp_path, tried, where):
        where = where and tmp_path / where
        assert found(where) == found(where) == WORKS and tried == [NAME]

    def test_is_listed_and_forgotten_with_the_plans(self, tmp_path, tried, new_process, capsys):
        for outcome, environment in ((WORKS, ENVIRONMENT), (FAILED, OTHER)):
            tried.outcome = outcome
            new_process()
            found(tmp_path / "cache", environment)
        with configure(cache_dir=tmp_path / "cache"):
            assert command_line.main(["cache", "list"]) == 0
            out = capsys.readouterr().out
            assert "NVIDIA H200: engine new, on trial: works" in out
            assert "NVIDIA H200: engine new, on trial: left out: it gave a wrong result" in out
        PlanCache(tmp_path / "cache").clear()
        assert not list((tmp_path / "cache").iterdir())


def test_a_failure_is_told_of_once(tmp_path, tried):
    tried.outcome = FAILED
    with pytest.warns(UserWarning, match="engine new failed its trial on NVIDIA H200 .*: it gave a wrong result") as told:
        found(tmp_path), found(tmp_path)
    assert len(told) == 1


@pytest.mark.filterwarnings("ignore:.*failed its trial")
class TestTuning:
    @pytest.fixture(autouse=True)
    def on_trial(self, world):
        world[NAME] = Engine(NAME, [Knob(1)])
        world[NAME].MEASURED, world[NAME].TRIAL = (), True
        return world[NAME]

    @pytest.mark.parametrize("mode, outcome, expected", (
        ("quick", WORKS, NAME), ("quick", FAILED, "fast"), ("quick", UNTRIED, "fast"),
        ("full", WORKS, NAME), ("full", FAILED, "fast"), ("full", UNTRIED, NAME),
    ), ids=lambda v: v if isinstance(v, str) else "")  # fmt: skip
    def test_measures_only_what_was_right_or_in_full_what_nobody_could_try(self, tried, mode, outcome, expected):
        tried.outcome = outcome
        with configure(autotune=mode):
            assert select(GPU, OPERANDS).engine == expected
        assert tried == [NAME]
        reason = {WORKS: "never measured on sm_90", FAILED: "it gave a wrong result", UNTRIED: "no GPU"}[outcome]
        assert f"on trial, {reason}: a plan only where measured" in test_select.selecting.refusals(GPU)[NAME]

    def test_no_prediction_makes_it_a_plan_even_then(self, tried):
        select(GPU, OPERANDS)
        assert select(GPU.replace(batch=2)).engine == "fast"

    def test_nothing_is_tried_without_need(self, world, on_trial, tried):
        with configure(autotune="off"):
            select(GPU, OPERANDS)
        select(GPU.replace(batch=2))
        with configure(engine="fast"):
            select(GPU, OPERANDS)
        with configure(engine=NAME):  # asked for
            assert select(GPU, OPERANDS).engine == NAME
        on_trial.supports = lambda problem: "not this one"
        select(GPU, OPERANDS)
        assert tried == []


class TestProcess:
    """What the other process may do, and what is made of it."""

    RUN = f"print({proof.RUNNING!r}, flush=True)\n"

    @pytest.fixture(autouse=True)
    def no_mps(self, monkeypatch, tmp_path):
        monkeypatch.setenv("CUDA_MPS_PIPE_DIRECTORY", str(tmp_path / "none"))

    @pytest.fixture
    def program(self, monkeypatch):
        def put(text: str) -> None:
            monkeypatch.setattr(proof, "_command", lambda engine, index: [sys.executable, "-c", text])

        monkeypatch.setattr(proof, "SECONDS", 20)
        return put

    @pytest.mark.parametrize("text, expected", (
        ("", WORKS),
        (f"print({proof.FAILED!r} + 'so'); raise SystemExit(1)", (True, "so")),
        (RUN + "raise ValueError('unforeseen')", (False, "ValueError: unforeseen")),
        ("raise SystemExit('no GPU')", (False, "no GPU")),
        ("raise SystemExit(2)", (False, "its process ended with status 2")),
        ("import os; os.kill(os.getpid(), 11)", (True, "SIGSEGV ended its process")),
        ("import os; os.abort()", (True, "SIGABRT ended its process")),
        ("import os; os.kill(os.getpid(), 9)", (False, "its process ended with status -9")),  # for want of memory, or by hand
        ("import sys; sys.stdout.buffer.write(b'\\xff' * 10**6)", WORKS),
    ), ids=("right", "wrong", "unforeseen", "nothing", "status", "segfault", "abort", "killed", "chatty"))  # fmt: skip
    def test_ends(self, program, text, expected):
        program(text)
        assert proof._try("new", 0) == expected

    @pytest.mark.parametrize("text, expected", (
        (RUN + "time.sleep(100)", (True, "a kernel did not end within 1 s")),
        (RUN + "for _ in range(100): print('right', flush=True); time.sleep(0.1)", (False, "it did not end within 3 s")),
        ("time.sleep(100)", (False, "it did not end within 3 s")),
    ), ids=("running", "slow", "compiling"))  # fmt: skip
    def test_does_not_end(self, program, monkeypatch, tmp_path, text, expected):
        monkeypatch.setattr(proof, "SECONDS", 3)
        monkeypatch.setattr(proof, "SILENT", 1)
        number = tmp_path / "number"
        program(f"import os, time; open({str(number)!r}, 'w').write(str(os.getpid()))\n{text}")
        assert proof._try("new", 0) == expected
        with pytest.raises(ProcessLookupError):
            os.kill(int(number.read_text()), 0)

    @pytest.mark.parametrize("name", ("", "/opt/program/bin/Program-real", "/no/python3.11"), ids=("none", "inside", "gone"))
    def test_cannot_be_started(self, monkeypatch, name):
        monkeypatch.setattr(sys, "executable", name)
        assert not proof._try("new", 0)[0]

    def test_is_not_started_where_its_faults_would_be_shared(self, monkeypatch, tmp_path, program):
        program("")
        monkeypatch.setenv("CUDA_MPS_PIPE_DIRECTORY", str(tmp_path))
        assert not proof._try("new", 0).conclusive

    @pytest.mark.parametrize("name", ("python", "python3", "python3.13t", "Python.exe", "pypy3.10"))
    def test_pythons_are_known(self, name):
        assert proof._PYTHON.fullmatch(name)

    @pytest.mark.skipif(torch.cuda.is_available(), reason="what happens without a GPU")
    def test_is_this_package_whatever_stands_in_the_working_directory(self, tmp_path, monkeypatch):
        (tmp_path / "torch.py").write_text("raise SystemExit(0)")
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("TRITON_CONV3D_ENGINE", "nonsense")
        conclusive, reason = proof._try("aten", 0)
        assert not conclusive and "torch sees no GPU" in reason


class TestCommand:
    @pytest.fixture
    def comes_of_it(self, monkeypatch):
        """Sets what a trial on a GPU that is made up returns, or raises."""
        for name, value in (("is_available", True), ("device_count", 1), ("get_device_name", "Some GPU")):
            monkeypatch.setattr(torch.cuda, name, lambda *args, value=value: value)
        monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())

        def put(outcome: str | Exception | None) -> None:
            def run(engine, device, tell):
                if isinstance(outcome, Exception):
                    raise outcome
                return outcome

            monkeypatch.setattr(tryout, "run", run)

        return put

    @pytest.mark.skipif(torch.cuda.is_available(), reason="what happens without a GPU")
    def test_needs_a_gpu(self, capsys):
        assert command_line.main(["try", "aten"]) == 2
        assert "torch sees no GPU" in capsys.readouterr().err

    def test_names_the_engines(self, capsys):
        with pytest.raises(SystemExit):
            command_line.main(["try", "nonsense"])
        assert "implicit_gemm" in capsys.readouterr().err

    @pytest.mark.parametrize("outcome, expected", (
        (None, (0, "aten is right on Some GPU")),
        ("it is wrong", (1, proof.FAILED + "it is wrong")),
        (RuntimeError("illegal memory access\nat x"), (1, proof.FAILED + "illegal memory access at x")),
        (tryout.Untried("not here"), (2, "")),
        (torch.OutOfMemoryError("no room"), (2, "")),
    ), ids=("right", "wrong", "illegal", "untried", "no-memory"))  # fmt: skip
    def test_status_and_last_line(self, comes_of_it, capsys, outcome, expected):
        comes_of_it(outcome)
        status = command_line.main(["try", "aten"])
        assert (status, capsys.readouterr().out.strip()) == expected
        assert command_line.main(["try", "aten", "--device", "1"]) == 2
        assert "--device 1: torch sees 1 GPU" in capsys.readouterr().err

    def test_what_is_unforeseen_is_no_fault_of_the_engine(self, comes_of_it, capsys):
        comes_of_it(RuntimeError("unforeseen"))
        with pytest.raises(RuntimeError, match="unforeseen"):
            command_line.main(["try", "aten"])
        assert proof.FAILED not in capsys.readouterr().out


class TestTrial:
    """On the CPU: an engine of the interpreter's, and faults put around its launch."""

    LAYERS = tuple(
        (Layer("a", 1, channels, 6, (2, 3, 4), (1, 2, 2), (1, 1, 1), (0, 0, 0), (1, 1, 1), 1, False, "fp16"), CHANNELS_LAST)
        for channels in (16, 24)
    )

    @pytest.fixture
    def engine(self, monkeypatch):
        monkeypatch.setattr(tryout, "LAYERS", self.LAYERS)
        return types.SimpleNamespace(**{name: getattr(engines.get("implicit_gemm"), name) for name in (
            "NAME", "supports", "configs", "memory", "launch", "work")})  # fmt: skip

    def run(self, engine) -> tuple[str | None, list[str]]:
        lines: list[str] = []
        return tryout.run(engine, torch.device("cpu"), lines.append), lines

    @pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="in the interpreter")
    def test_right(self, engine):
        failure, lines = self.run(engine)
        assert failure is None
        assert lines[:2] == ["compiling 6 configs of implicit_gemm", proof.RUNNING] and len(lines) == 8

    @pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="in the interpreter")
    @pytest.mark.parametrize("fault, expected", (
        (lambda y, count: y + 1, "gave a wrong result on forward 1x16"),
        (lambda y, count: y * float("nan"), "gave a wrong result on forward 1x16"),
        (lambda y, count: y.mul(1 + 2**-10 * (count == 15)), "gave two results on forward 1x16"),
    ), ids=("wrong", "nan", "two"))  # fmt: skip
    def test_wrong(self, engine, fault, expected):
        launch, count = engine.launch, iter(range(1000))
        engine.launch = lambda *args: fault(launch(*args), next(count))
        assert expected in self.run(engine)[0]

    def test_takes_nothing(self, engine):
        engine.supports = lambda problem: "not this"
        with pytest.raises(tryout.Untried, match="none of the layers: not this"):
            self.run(engine)

    @pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="in the interpreter")
    @pytest.mark.parametrize("error", (RuntimeError("out of resource"), torch.OutOfMemoryError("full")), ids=repr)
    @pytest.mark.parametrize("after, expected", ((0, "none of the configs"), (10, "could not be launched again")))
    def test_what_cannot_be_launched_tells_nothing(self, engine, error, after, expected):
        launch, count = engine.launch, iter(range(1000))

        def failing(*args):
            if next(count) >= after:
                raise error
            return launch(*args)

        engine.launch = failing
        with pytest.raises(tryout.Untried, match=expected):
            self.run(engine)

    @pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="in the interpreter")
    def test_nor_does_a_gpu_without_room_for_torchs_own_result(self, engine, monkeypatch):
        def trusted(*args):
            raise torch.OutOfMemoryError("full")

        monkeypatch.setattr(measure.verify, "trusted", trusted)
        with pytest.raises(tryout.Untried, match="for want of memory"):
            self.run(engine)


def test_a_trial_of_hopper_runs_every_kind_of_its_configs_and_several_turns_of_each_in_a_program():
    from triton_conv3d.engines.hopper.gluon import IM2COL, MISSING

    if MISSING:
        pytest.skip(MISSING)
    hopper, kinds, many = engines.get("hopper"), {pass_: set() for pass_ in PASSES}, {pass_: set() for pass_ in PASSES}
    tried = 0
    for problem, _, _ in tryout._problems(hopper, torch.device("cpu")):
        there = problem.replace(device="NVIDIA H200", arch="sm_90")
        for config in tryout._candidates(hopper, there):
            tried += 1
            kinds[problem.pass_].add(type(config))
            work, lines = hopper.work(there, config), isinstance(config, hopper.LineWgradConfig)
            if work.programs > 2 * 132 or lines and work.iterations > 256:  # multiprocessors, a program on each; of a chain
                many[problem.pass_].add(type(config))
    gathered = {hopper.BrickConfig, hopper.LineConfig} | ({hopper.Im2colConfig} if IM2COL else set())
    backward = {"dgrad": gathered | {hopper.LineDgradConfig}, "wgrad": {hopper.BrickConfig, hopper.LineWgradConfig}}
    assert kinds == {"forward": gathered, **backward}
    assert many == kinds and 25 <= tried <= 40  # as README says


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", [name for name, engine in engines.available().items() if getattr(engine, "TRIAL", False)])
def test_what_is_on_trial_is_right_on_this_gpu(name):
    conclusive, reason = proof._try(name, 0)
    if not conclusive:
        pytest.skip(reason)
    assert reason is None
