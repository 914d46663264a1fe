"""What ended a process while it was measured: later ones leave it out, and nothing else."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
import test_select
from test_select import ENVIRONMENT, GPU, OPERANDS, Knob

from triton_conv3d import __main__ as command_line
from triton_conv3d.settings import configure
from triton_conv3d.tuning import quarantine, select, storage
from triton_conv3d.tuning.cache import PlanCache
from triton_conv3d.tuning.storage import canonical

world = test_select.world
pytestmark = pytest.mark.usefixtures("new_process")
ILLEGAL = RuntimeError("CUDA error: an illegal memory access was encountered")
OTHER = {**ENVIRONMENT, "triton": "9.9"}


@pytest.fixture
def directory(tmp_path) -> Path:
    return tmp_path / "home" / "cache"


def trial(directory, value=5, environment=ENVIRONMENT):
    return quarantine.trial(directory, environment, GPU, "fast", Knob(value))


def left_out(directory, environment=ENVIRONMENT) -> list[int]:
    quarantine.recall(directory, environment)
    return [value for value in (5, 6, 7) if quarantine.quarantined("fast", Knob(value), environment["arch"])]


def child(directory, value=5, ends=True) -> int:
    """The number of a process that has begun a trial, and is gone by its own hand, or waits to be killed."""
    number = os.fork()
    if not number:
        with trial(directory, value):
            if ends:
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(100)
            os._exit(0)
    if ends:
        os.waitpid(number, 0)
    while not quarantine.files(directory):
        time.sleep(0.01)
    return number


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
class TestKilled:
    def test_is_left_out_in_its_environment_and_told_of_once(self, directory, new_process):
        child(directory)
        with pytest.warns(UserWarning, match=r"fast \[value=5\] ended a process while it was measured on forward") as told:
            assert left_out(directory) == left_out(directory) == [5]
        assert len(told) == 1
        new_process()
        assert left_out(directory, OTHER) == []

    @pytest.mark.filterwarnings("ignore:.*ended a process")
    def test_once_it_has_ended(self, directory, new_process):
        number = child(directory, ends=False)
        assert left_out(directory) == []
        new_process()
        os.kill(number, signal.SIGKILL)
        os.waitid(os.P_PID, number, os.WEXITED | os.WNOWAIT)  # ended, its parent has not looked: a zombie
        assert left_out(directory) == [5]
        new_process()
        os.waitpid(number, 0)
        assert left_out(directory) == [5]


@pytest.mark.parametrize("error", (None, ValueError("x"), KeyboardInterrupt()), ids=repr)
def test_a_trial_that_comes_to_its_end_leaves_nothing(directory, error):
    try:
        with trial(directory):
            assert len(quarantine.files(directory)) == 1
            assert left_out(directory) == []  # this process runs
            if error:
                raise error
    except (ValueError, KeyboardInterrupt) as raised:
        assert raised is error
    assert not quarantine.files(directory)


@pytest.mark.filterwarnings("ignore:.*ended a process")
def test_an_illegal_access_counts_while_its_process_still_runs(directory):
    with pytest.raises(RuntimeError, match="illegal"), trial(directory, 6):
        raise ILLEGAL
    assert left_out(directory) == [6]


@pytest.mark.filterwarnings("ignore:.*ended a process")
@pytest.mark.parametrize("change, age, expected", (
    ({}, 0, []),
    ({2: "1"}, 0, [5]),
    ({0: "another machine"}, 0, []),
    ({0: "another machine"}, 3599, []),
    ({0: "another machine"}, 3601, [5]),
    ({0: "", 2: ""}, 0, []),
    ({0: "", 2: ""}, 3601, [5]),
), ids=("runs", "number-used-again", "elsewhere", "elsewhere-young", "elsewhere-old", "no-proc", "no-proc-old"))  # fmt: skip
def test_whether_a_process_has_ended(directory, change, age, expected):
    with trial(directory):
        (path,) = quarantine.files(directory)
        values = storage.parse(path.read_bytes())
        for index, text in change.items():
            values["process"][index] = text
        path.write_text(canonical(values))
        os.utime(path, (time.time() - age,) * 2)
        assert left_out(directory) == expected


GOOD = {"schema": 1, "environment": ENVIRONMENT, "engine": "fast", "config": {"value": 5}, "problem": "p", "process": None}


@pytest.mark.filterwarnings("ignore:.*ended a process")
@pytest.mark.parametrize("change, expected", (
    ({}, [5]), ({"schema": 2}, []), ({"schema": True}, []), ({"engine": 5}, []), ({"config": "x"}, []), ({"config": {}}, []),
    ({"environment": None}, []), ({"problem": None}, []), ({"process": 5}, []), ({"process": ["a", "b"]}, []),
    ({"process": ["a", 1, "b"]}, []), ({"more": 1}, []), ({"config": {"value": True}}, []), ({"engine": "none"}, []),
), ids=repr)  # fmt: skip
def test_only_what_is_a_trial_counts(directory, change, expected):
    storage.make_directory(directory)
    path = directory / f"{0:032x}.trial"
    storage.write(path, canonical({**GOOD, **change}).encode())
    assert left_out(directory) == expected


@pytest.mark.parametrize("content", (b"", b"\x00" * 99, b"[" * 10**5, b"[]", b"5", b" " * 70_000), ids=lambda c: str(len(c)))
def test_a_damaged_file_is_none(directory, content):
    storage.make_directory(directory)
    storage.write(directory / f"{0:032x}.trial", content)
    assert left_out(directory) == []


@pytest.mark.filterwarnings("ignore:.*ended a process")
def test_files_are_read_once_and_only_what_this_user_alone_can_have_written(directory, monkeypatch, new_process):
    storage.make_directory(directory)
    path = directory / f"{0:032x}.trial"
    storage.write(path, canonical(GOOD).encode())
    path.chmod(0o620)
    assert left_out(directory) == []
    path.chmod(0o600)
    new_process()
    assert left_out(directory) == [5]
    monkeypatch.setattr(storage, "read", None)
    assert left_out(directory) == [5]


@pytest.mark.parametrize("where", (None, "/proc/none", "x" * 300, "a\0b", "\ud800"), ids=repr)
def test_where_nothing_can_be_kept_it_runs_all_the_same(directory, where):
    where = where and directory / where
    with trial(where):
        pass
    assert left_out(where) == [] == quarantine.files(where)


@pytest.mark.filterwarnings("ignore:.*ended a process")
class TestTuning:
    def test_goes_on_without_it_in_the_next_process(self, world, tmp_path, new_process, capsys):
        launch, runs = world["fast"].launch, []

        def failing(problem, operands, config):
            runs.append((config.value, len(quarantine.files(tmp_path / "cache"))))
            if config.value == 5:
                raise ILLEGAL
            return launch(problem, operands, config)

        world["fast"].launch = failing
        with pytest.raises(RuntimeError, match=r"fast \[value=5\] failed [\s\S]*left out from now on"):
            select(GPU, OPERANDS)
        new_process()
        runs.clear()
        assert select(GPU, OPERANDS).config == Knob(6)
        assert {value for value, _ in runs} == {6, 7}
        counts = [count for value, count in runs if value == 7]  # the first runs are named, beside what is left of 5
        assert counts[0] == 2 and counts[-1] == 1
        with configure(cache_dir=tmp_path / "cache"):
            assert command_line.main(["cache", "list"]) == 0
            assert "left out: fast [value=5], which ended a process" in capsys.readouterr().out
        assert PlanCache(tmp_path / "cache").clear() == 1
        assert not list((tmp_path / "cache").iterdir())
        new_process()
        with pytest.raises(RuntimeError, match="illegal"):
            select(GPU, OPERANDS)

    def test_no_prediction_makes_it_a_plan(self, world, tmp_path, new_process):
        with configure(autotune="off"):
            first = select(GPU).config
            with pytest.raises(RuntimeError), trial(tmp_path / "cache", first.value):
                raise ILLEGAL
            new_process()
            plan = select(GPU)
        assert plan.engine == "fast" and plan.config != first

    def test_torchs_own_is_never_named(self, world, tmp_path):
        def failing(problem, operands, config):
            raise ILLEGAL

        world["aten"].launch = failing
        with pytest.raises(RuntimeError, match="illegal"):
            select(GPU, OPERANDS)
        assert not quarantine.files(tmp_path / "cache")
