"""The acceptance's machinery: steps against a fake clock, resuming, exit statuses, processes and pytest's reports."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import os
import pathlib
import signal
import sys
import threading
import time
import types

import pytest
import test_fuzz
from fake_clock import Clock
from perf_cases import STAMP

from perf import __main__ as cli
from perf import results, validate, validation
from perf.results import FAILED, MEMORY, OK, STATUSES, UNSUPPORTED, WRONG
from perf.validation import (
    Check,
    DeviceLost,
    Outcome,
    Setting,
    Step,
    advance,
    child,
    process,
    progress,
    pytested,
    summed,
)
from perf.validation.slices import SLICES, chosen


def slice_of(*steps: Step, name: str = "some", workers: int = 1, reason: str | None = None) -> types.SimpleNamespace:
    return types.SimpleNamespace(
        NAME=name, WHAT="what it does", WORKERS=workers,
        unavailable=lambda: reason, steps=lambda where: list(steps),
    )  # fmt: skip


FINE = Outcome(checks=1)


def takes(clock: Clock, seconds: float, outcome=FINE, log: list | None = None):
    """A step's run that takes so long; ``outcome`` may be an exception."""

    def run(limit: float):
        if log is not None:
            log.append(limit)
        clock.wait(seconds)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    return run


class TestAdvance:
    def go(self, clock, *steps, seconds=540.0, workers=1) -> dict[str, Check]:
        state = progress(slice_of(*steps, workers=workers), Setting(None), [])
        recorded: list[Check] = []
        try:
            advance(state, clock() + seconds, recorded.append, clock)
        finally:
            self.recorded = {row.step: row for row in recorded}
            assert self.recorded == state.rows
        return self.recorded

    def test_what_fits_is_run_and_recorded(self):
        clock, limits = Clock(), []
        steps = [Step(name, 90.0, takes(clock, 90.0, log=limits)) for name in "abcdefgh"]
        rows = self.go(clock, *steps)
        assert list(rows) == list("abcdef") and limits == [450.0, 450.0, 360.0, 270.0, 180.0, 90.0]
        assert {(row.slice, row.status, row.checks, row.seconds) for row in rows.values()} == {("some", OK, 1, 90.0)}

    def test_a_shorter_one_takes_the_place_of_one_that_does_not_fit(self):
        clock = Clock()
        steps = [Step("long", 600.0, takes(clock, 1.0)), Step("short", 100.0, takes(clock, 1.0))]
        assert list(self.go(clock, *steps)) == ["short"]

    def test_one_that_raises_has_failed_and_the_others_go_on(self):
        clock = Clock()
        rows = self.go(clock, Step("a", 1.0, takes(clock, 1.0, KeyError("gone"))), Step("b", 1.0, takes(clock, 1.0)))
        assert (rows["a"].status, rows["a"].reason) == (FAILED, "KeyError: 'gone'") and rows["b"].status == OK

    @pytest.mark.parametrize("estimate, seconds, keeps, status", [
        (200, 540, False, FAILED), (200, 300, False, None), (200, 540, True, None),
        (9, 130, False, FAILED), (9, 110, False, None),
    ])  # fmt: skip
    def test_one_that_is_not_done_in_time(self, estimate, seconds, keeps, status):
        """It is left for the next call, unless it had long enough and nothing of it is kept."""
        clock = Clock()
        rows = self.go(clock, Step("a", estimate, takes(clock, 400.0, None), keeps), seconds=seconds)
        assert [row.status for row in rows.values()] == ([status] if status else [])

    @pytest.mark.parametrize("keeps, seconds, recorded", [
        (False, 540, True), (False, 50, False), (True, 540, True), (True, 300, False),
    ])  # fmt: skip
    def test_one_that_never_ends_takes_the_process_but_not_the_rest(self, keeps, seconds, recorded, monkeypatch):
        """As a kernel may, and soon after the call's time is up: the next call begins behind it if it had long enough."""
        ended, rows, statuses = threading.Event(), [], []
        monkeypatch.setattr(validation, "_GRACE", 0.1 - (seconds if keeps else min(seconds, validation._LEAST_PATIENCE)))
        monkeypatch.setattr(validation.os, "_exit", lambda status: statuses.append(status) or ended.set())
        step = Step("a", 9.0, lambda limit: ended.wait(20) and FINE, keeps)
        advance(progress(slice_of(step), Setting(None), []), seconds, lambda row: rows.append(row), lambda: 0.0)
        assert [row.status for row in rows] == [FAILED] * recorded + [OK]
        assert statuses == [1 if recorded else validation.UNFINISHED]

    def test_one_that_ends_the_process_is_tried_once_more(self, tmp_path, monkeypatch):
        """As a compiler's crash does, which leaves no word but the file that names the step."""
        begun = tmp_path / "new" / "begun.json"
        steps = [Step(name, 1.0, lambda limit: FINE) for name in "ab"]
        names = []
        for _ in range(3):
            rows: list[Check] = []
            state = progress(slice_of(*steps), Setting(None), [])
            with monkeypatch.context() as crash:
                crash.setattr(pathlib.Path, "unlink", lambda *a, **k: None)  # so does a process that is gone
                crash.setattr(validation, "_watched", lambda state, step, *rest: names.append(step.name) or sys.exit())
                with contextlib.suppress(SystemExit):
                    advance(state, 9.0, rows.append, lambda: 0.0, begun)
        assert names == ["a", "a", "b"] and [(row.step, row.status) for row in rows] == [("a", FAILED)]
        advance(progress(slice_of(*steps), Setting(None), rows), 9.0, rows.append, lambda: 0.0, begun)
        assert [(row.step, row.status) for row in rows[1:]] == [("b", OK)] and not begun.exists()

    @pytest.mark.parametrize("outcome", [None, Outcome(FAILED, "illegal")])
    def test_a_lost_device_ends_the_call(self, outcome):
        clock = Clock()
        steps = [Step("a", 1.0, takes(clock, 1.0, DeviceLost(outcome))), Step("b", 1.0, takes(clock, 1.0))]
        with pytest.raises(DeviceLost, match="illegally"):
            self.go(clock, *steps)
        assert [row.reason for row in self.recorded.values()] == ([outcome.reason] if outcome else [])

    def test_workers_run_at_the_same_time(self):
        meeting = threading.Barrier(3, timeout=20)
        steps = [Step(name, 1.0, lambda limit: Outcome(checks=1 + meeting.wait() * 0)) for name in "abcdef"]
        rows = self.go(time.monotonic, *steps, workers=3)
        assert {row.status for row in rows.values()} == {OK} and len(rows) == 6

    def test_an_interrupt_ends_what_runs(self):
        def sleeps(limit):
            return process.run([sys.executable, "-c", "import time; time.sleep(60)"], limit)

        def interrupts(limit):
            while not process._running:
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGINT)

        begin = time.monotonic()
        inherited = signal.signal(signal.SIGINT, signal.default_int_handler)  # what runs in the background ignores it
        try:
            with pytest.raises(KeyboardInterrupt):
                self.go(time.monotonic, Step("a", 1.0, sleeps), Step("b", 1.0, interrupts), workers=2)
        finally:
            signal.signal(signal.SIGINT, inherited)
        assert time.monotonic() - begin < 30 and not process._running


def test_summed():
    parts = [Outcome(OK, "", 2), Outcome(MEMORY, "no room"), Outcome(WRONG, "off", 3), Outcome(WRONG, "off", 1)]
    assert summed(parts) == Outcome(WRONG, "no room; off", 6)
    assert summed(parts[:2]) == Outcome(MEMORY, "no room", 2) and summed(parts[:1]) == parts[0]
    assert summed([*parts[:2], Outcome(FAILED, "x" * 1000)]).status == FAILED


# A whole call


@pytest.fixture
def acceptance(tmp_path, monkeypatch):
    """Runs the command with the slices that it is given, on a clock of its own."""
    clock = Clock()
    monkeypatch.setattr(validate, "setting", lambda out: Setting(tmp_path, "Test GPU", 2**30))
    monkeypatch.setattr(validate, "_stamp", lambda: STAMP)
    run = validate.run
    monkeypatch.setattr(validate, "run", lambda *args: run(*args, clock))

    def call(*slices, arguments=()) -> int:
        monkeypatch.setattr(validate, "chosen", lambda names: slices)
        return cli.main(["validate", *arguments])

    call.clock, call.state, call.patch = clock, tmp_path / "validate" / "steps.csv", monkeypatch
    return call


def test_calls_go_on_until_all_is_done(acceptance, capsys):
    clock, log = acceptance.clock, []
    steps = {name: [Step(f"{name}{i}", 200.0, takes(clock, 150.0, log=log)) for i in range(3)] for name in "pq"}
    slices = [slice_of(*some, name=name) for name, some in steps.items()]
    assert acceptance(*slices) == validate.UNFINISHED
    assert "3 steps are left: the same command goes on" in capsys.readouterr().out
    assert acceptance(*slices) == 0
    output = capsys.readouterr().out
    assert len(log) == 6 and "all is done" in output and "q 3/3 q2: ok, 150 s, 1 checks" in output
    assert acceptance(*slices) == 0 and len(log) == 6
    assert [row.step for row, stamp in results.read(acceptance.state, Check)] == ["p0", "p1", "p2", "q0", "q1", "q2"]


def test_other_versions_begin_anew(acceptance):
    log: list = []
    some = slice_of(Step("a", 1.0, takes(acceptance.clock, 1.0, log=log)))
    acceptance(some)
    acceptance.patch.setattr(validate, "_stamp", lambda: dataclasses.replace(STAMP, driver="2"))
    assert acceptance(some) == 0 and len(log) == 2


@pytest.mark.parametrize("status", STATUSES)
def test_the_exit_status_and_the_summary_tell_what_is_wrong(acceptance, capsys, status):
    clock = acceptance.clock
    bad = Outcome(status, "because" * (status != OK), 7)
    steps = [Step("a", 1.0, takes(clock, 1.0, bad)), Step("b", 1.0, takes(clock, 1.0))]
    for _ in range(2):  # the next call does not forget it
        assert acceptance(slice_of(*steps)) == (1 if status in (WRONG, FAILED) else 0)
        output = capsys.readouterr().out
        assert (f"some, a: {status}: because" in output) == (status != OK)
        counts = output.split("\nsome  ")[1].split()
        assert counts[:2] == ["2/2", "8"]
        assert counts[2:4] == [str(int(status in (WRONG, FAILED))), str(int(status in (UNSUPPORTED, MEMORY)))]


def test_what_cannot_run_here_is_named_and_not_run(acceptance, capsys):
    log: list = []
    step = Step("a", 1.0, takes(acceptance.clock, 1.0, log=log))
    assert acceptance(slice_of(step, reason="no such tool")) == 0
    assert not log and "some, not here: no such tool" in capsys.readouterr().out


def test_a_lost_device_leaves_the_rest_to_the_next_call(acceptance, capsys):
    clock, log = acceptance.clock, []
    first = slice_of(Step("a", 1.0, takes(clock, 1.0, DeviceLost(Outcome(FAILED, "illegal")))), name="first")
    second = slice_of(Step("b", 1.0, takes(clock, 1.0, log=log)), name="second")
    assert acceptance(first, second) == 1 and not log
    assert "the next call goes on" in capsys.readouterr().out
    assert acceptance(first, second) == 1 and len(log) == 1


def test_the_gpu_gives_folder_memory_and_stamp(monkeypatch, tmp_path):
    cuda = validate.torch.cuda
    monkeypatch.setattr(cuda, "is_available", lambda: True)
    monkeypatch.setattr(cuda, "current_device", lambda: 1)
    monkeypatch.setattr(cuda, "get_device_properties", lambda i: types.SimpleNamespace(name=f"GPU {i}", total_memory=5))
    assert validate.setting(None) == Setting(results.RESULTS / "gpu-1", "GPU 1", 5)
    assert validate.setting(tmp_path).out == tmp_path
    monkeypatch.setattr(validate.machine, "stamp", lambda device, policy: (str(device), policy))
    monkeypatch.setattr(validation.machine, "here", lambda policy: policy)
    device, policy = validate._stamp()
    assert device == "cuda:1" and policy == validate.setting(None).machine and policy.endswith("ours tuned: quick")


def test_a_file_that_is_none_is_refused(acceptance, capsys):
    acceptance.state.parent.mkdir()
    acceptance.state.write_text("something else\n")
    assert acceptance(slice_of()) == 2
    assert "is no result file" in capsys.readouterr().err


# Without a GPU


def test_dry_run_lists_the_slices(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(validate.torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert cli.main(["validate", "--dry-run"]) == 0
    output = capsys.readouterr().out
    for module in SLICES:
        assert f"\n{module.NAME} " in output and module.WHAT in output
    assert "correctness.sanitizer, not here: compute-sanitizer is not on the PATH" in output
    assert "nothing of this can run here: torch sees no GPU" in output and " calls of 9 min" in output
    assert list(tmp_path.iterdir()) == []


def test_dry_run_knows_what_is_done(acceptance, capsys):
    steps = [Step(name, 120.0, takes(acceptance.clock, 1.0)) for name in "abcdefgh"]
    acceptance(slice_of(*steps), arguments=["--budget", "121"])
    capsys.readouterr()
    assert acceptance(slice_of(*steps), arguments=["--dry-run"]) == 0
    assert "about 12 min in all, estimated: 2 calls of 9 min" in capsys.readouterr().out


@pytest.mark.parametrize("arguments, told", [
    ((), "torch sees no GPU, so nothing can be validated; --dry-run lists"),
    (("--slice", "tune,benches"), "'benches': the slices are correctness.tests, correctness.fuzz"),
    (("--budget", "-1"), "--budget -1.0: expected seconds"),
])  # fmt: skip
def test_bad_input_is_told_what_would_be_right(monkeypatch, arguments, told, capsys):
    monkeypatch.setattr(validate.torch.cuda, "is_available", lambda: False)
    assert cli.main(["validate", *arguments]) == 2
    assert told in capsys.readouterr().err


def test_slices_by_name():
    assert chosen(None) == list(SLICES) and len({module.NAME for module in SLICES}) == len(SLICES)
    assert [module.NAME for module in chosen("report,tune")] == ["tune", "report"]
    assert [module.NAME.split(".")[0] for module in chosen("correctness")] == ["correctness"] * 5


def test_steps_have_names_of_their_own_and_fit_into_a_call(tmp_path):
    for module in SLICES:
        steps = module.steps(Setting(tmp_path))
        assert steps and not [name for name, n in collections.Counter(s.name for s in steps).items() if n > 1]
        assert all(0 < step.seconds < validation.BUDGET / 1.5 for step in steps)


def test_the_core_suite_is_tuned_and_measured_within_25_minutes(tmp_path):
    states = [progress(module, Setting(tmp_path), []) for module in chosen("tune,bench")]
    assert sum(state.seconds_left for state in states) <= 25 * 60
    assert [len(state.steps) for state in states] == [1 + 81 + 1, 81]


def test_fuzz_and_sanitizer_take_as_many_cases_as_the_bar_asks_for():
    fuzz, sanitizer = (module for module in SLICES if module.NAME in ("correctness.fuzz", "correctness.sanitizer"))
    assert test_fuzz.IN_CI + (test_fuzz.LONG - test_fuzz.IN_CI) * fuzz._TAKEN // fuzz._SHARDS >= 2048
    for tool, shards in sanitizer._TAKEN.items():
        assert test_fuzz.IN_CI * shards // sanitizer._SHARDS >= (48 if tool == "memcheck" else 12)


# Processes


def python(code: str, limit: float = 60.0, **environment: str) -> process.Done | None:
    return process.run([sys.executable, "-c", code], limit, **environment)


def test_a_process_reports_its_end():
    done = python("import os, sys; print('out'); print(os.environ['MORE'], file=sys.stderr); sys.exit(3)", MORE="err")
    assert done == process.Done(3, "out\nerr\n") and done.tail == "exit status 3: out\nerr"


def test_a_process_is_ended_with_its_children():
    begin = time.monotonic()
    assert python("import subprocess; subprocess.run(['sleep', '60'])", limit=0.5) is None
    assert time.monotonic() - begin < 30 and not process._running


LAST_LINE = '{"status": "wrong", "reason": "r", "checks": 2}'


def test_a_step_in_a_process_of_its_own(monkeypatch):
    def outcome(code):
        run = process.run
        monkeypatch.setattr(process, "run", lambda command, limit: run([command[0], "-c", code], limit))
        return child.step("module", "name", 60.0)

    assert outcome("print('talk'); print(json)".replace("json", repr(LAST_LINE))) == Outcome(WRONG, "r", 2)
    monkeypatch.undo()
    crashed = outcome("print('CUDA error'); import os; os.abort()")
    assert crashed.status == FAILED and "CUDA error" in crashed.reason
    monkeypatch.undo()
    monkeypatch.setattr(process, "run", lambda command, limit: None)
    assert child.step("module", "name", 60.0) is None


def test_the_child_computes_a_step(capsys, monkeypatch):
    some = types.SimpleNamespace(compute=lambda name: Outcome(checks=len(name)))
    monkeypatch.setitem(sys.modules, "some_slice", some)
    child.main("some_slice", "four")
    assert capsys.readouterr().out == '{"status": "ok", "reason": "", "checks": 4}\n'


# pytest's reports

TESTS = """
import os, pytest
@pytest.mark.parametrize("i", range(8))
def test_even(i): assert i % 2 == 0, f"{i} is odd"
def test_skipped(): pytest.skip("not here")
"""


@pytest.fixture
def tests(tmp_path):
    def write(text: str):
        path = tmp_path / "test_written.py"
        path.write_text(text)
        return ["-c", "/dev/null", "--rootdir", str(tmp_path), str(path)]

    return write


def test_failing_tests_are_named(tests):
    outcome = pytested.run([*tests(TESTS)], 60.0)
    assert outcome.status == WRONG and outcome.checks == 8
    assert outcome.reason.startswith("test_even[1]: AssertionError: 1 is odd") and outcome.reason.count("is odd") == 4


def test_shards_hold_every_test_once(tests):
    arguments = tests(TESTS)
    outcomes = [pytested.run([*arguments, "--shard", f"{i}/2"], 60.0) for i in range(2)]
    assert [outcome.checks for outcome in outcomes] == [4, 4]  # and the one that is skipped
    assert [outcome.status for outcome in outcomes] == [OK, WRONG]


@pytest.mark.parametrize("text, prefix, status, checks", [
    ("", [], OK, 0),
    ("import os\ndef test_crash(): os.abort()", [], FAILED, 0),
    ("def test_fine(): pass", ["sh", "-c", '"$@"; echo reported; exit 99', "-"], WRONG, 1),
    ("def test_fine(): pass", ["sh", "-c", '"$@"; echo refused; exit 2', "-"], FAILED, 1),
], ids=["empty", "crash", "sanitizer_reports", "sanitizer_fails"])  # fmt: skip
def test_other_ends(tests, text, prefix, status, checks):
    outcome = pytested.run(tests(text), 60.0, prefix)
    assert (outcome.status, outcome.checks) == (status, checks)


def test_the_sanitizer_is_asked_for_its_exit_status(monkeypatch):
    (sanitizer,) = chosen("correctness.sanitizer")
    seen = {}
    monkeypatch.setattr(pytested, "run", lambda *args, **more: seen.update(args=args, more=more))
    sanitizer.steps(None)[0].run(100.0)
    arguments, limit, prefix = seen["args"]
    assert prefix == ["compute-sanitizer", "--tool", "memcheck", "--padding", "4096", "--error-exitcode", "99"]
    assert arguments[0] == "tests/test_fuzz.py" and limit == 100.0
    assert seen["more"] == {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}


def test_every_test_file_is_run():
    (suite,) = chosen("correctness.tests")
    names = {step.name.split(" ")[0] for step in suite.steps(None)}
    assert {"test_engines.py", "test_fuzz.py", "test_functional.py", "test_perf_validate.py", *suite._KERNELS} <= names
    assert suite.unavailable() is None


@pytest.mark.long
def test_of_every_test_some_cases_where_kernels_are_compiled():
    def collected(*arguments: str, **environment: str) -> dict[str, int]:
        command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", *arguments]
        lines = process.run([*command, "tests/test_fuzz.py"], 60.0, **environment).output.splitlines()
        return collections.Counter(line.partition("[")[0] for line in lines if "::" in line)

    every = collected(TRITON_INTERPRET="1")
    assert every["tests/test_fuzz.py::test_fuzz"] == 3 * test_fuzz.IN_CI
    assert collected(*pytested.EVERY_CASE, TRITON_INTERPRET="0") == every
    assert collected(TRITON_INTERPRET="0") == {name: min(count, 8) for name, count in every.items()}
