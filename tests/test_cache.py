"""The plan cache: what it keeps and for whom, what damaged content becomes, and what may reach an engine."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import stat
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from cache_entries import CONFIG, DATA, ENTRY, ENVIRONMENT, NAME, PROBLEM, planted

from triton_conv3d import engines
from triton_conv3d.problem import Problem
from triton_conv3d.tuning import cache, environment, plan, storage
from triton_conv3d.tuning.cache import Entry, PlanCache, decode


@pytest.fixture(autouse=True)
def fresh_warnings(monkeypatch):
    monkeypatch.setattr(storage, "_warned", {})


@pytest.fixture
def directory(tmp_path) -> Path:
    return tmp_path / "home" / "cache"


def outcome(data: bytes) -> Entry | None:
    try:
        return decode(data)
    except ValueError:
        return None


# What is kept, and for whom


def test_what_is_stored_is_loaded_by_another_process(directory):
    assert PlanCache(directory).load(PROBLEM, ENVIRONMENT) is None
    assert PlanCache(directory).store(ENTRY)
    assert PlanCache(directory).load(PROBLEM, ENVIRONMENT) == ENTRY


def test_the_last_store_wins(directory):
    plans = PlanCache(directory)
    for time_us in (3.0, 2.0, 9.0):
        assert plans.store(dataclasses.replace(ENTRY, time_us=time_us))
    assert plans.load(PROBLEM, ENVIRONMENT).time_us == 9.0
    assert len(os.listdir(directory)) == 1


@pytest.mark.parametrize("field", ENVIRONMENT)
def test_another_environment_is_a_miss(directory, field):
    plans = PlanCache(directory)
    plans.store(ENTRY)
    assert plans.load(PROBLEM, {**ENVIRONMENT, field: "another"}) is None


@pytest.mark.parametrize("changes", [
    {"pass_": "dgrad"}, {"batch": 1}, {"in_channels": 4}, {"out_channels": 6}, {"input_size": (7, 9, 8)},
    {"kernel_size": (3, 3, 1)}, {"stride": (1, 1, 2)}, {"padding": (1, 1, 1, 1, 1, 0)}, {"dilation": (2, 1, 1)},
    {"groups": 3}, {"bias": True}, {"residual": True}, {"activation": "silu"},
    {"dtype": "bfloat16"}, {"precision": "tf32"}, {"alignment": 2}, {"index64": True},
    {"layouts": ("contiguous",) * 3}, {"device": "NVIDIA H200"}, {"arch": "sm_90"},
], ids=lambda changes: next(iter(changes)))
def test_another_problem_is_a_miss(directory, changes):
    plans = PlanCache(directory)
    plans.store(ENTRY)
    assert plans.load(PROBLEM.replace(**changes), ENVIRONMENT) is None


def test_every_field_of_a_problem_is_part_of_the_key():
    tested = {name for mark in test_another_problem_is_a_miss.pytestmark for each in mark.args[1] for name in each}
    assert tested == {field.name for field in dataclasses.fields(Problem)}


def test_modes_are_private(directory):
    inner = directory / "inner"
    old = os.umask(0)
    try:
        PlanCache(directory).store(ENTRY)
        PlanCache(inner).store(ENTRY)
    finally:
        os.umask(old)
    assert {stat.S_IMODE(path.stat().st_mode) for path in (directory.parent, directory, inner)} == {0o700}
    assert stat.S_IMODE((directory / NAME).stat().st_mode) == 0o600


def test_no_directory_means_memory_only():
    plans = PlanCache(None)
    assert (plans.store(ENTRY), plans.load(PROBLEM, ENVIRONMENT), list(plans.entries()), plans.clear()) == (
        False, None, [], 0)


def test_entries_export_import_and_clear(directory, tmp_path):
    here, there = PlanCache(directory), PlanCache(tmp_path / "there")
    kept = [dataclasses.replace(ENTRY, problem=PROBLEM.replace(batch=n).to_dict()) for n in range(1, 6)]
    assert all(map(here.store, kept))
    planted(directory, b"damaged", "0" * 64 + ".json")
    planted(directory, b"not ours", "notes.txt")
    with pytest.warns(UserWarning, match="is ignored"):
        assert sorted(entry.problem["batch"] for _, entry in here.entries()) == [1, 2, 3, 4, 5]
    assert here.export(tmp_path / "plans.json") == 5
    assert there.import_(tmp_path / "plans.json") == cache.ImportReport(5, {})
    assert sorted(map(str, here.entries())) and [e for _, e in there.entries()] == [e for _, e in here.entries()]
    assert there.import_(tmp_path / "plans.json") == cache.ImportReport(0, {"already in the cache": 5})
    assert here.clear() == 6 and os.listdir(directory) == ["notes.txt"]


@pytest.mark.parametrize("candidates, faster, wins", [(1, False, True), (0, True, True), (0, False, False), (-1, True, False)])
def test_import_prefers_what_tried_more_candidates_and_then_the_faster(directory, tmp_path, candidates, faster, wins):
    here, there = PlanCache(directory), PlanCache(tmp_path / "there")
    other = dataclasses.replace(
        ENTRY, candidates=ENTRY.candidates + candidates, time_us=ENTRY.time_us * (0.5 if faster else 2.0)
    )
    here.store(other)
    here.export(tmp_path / "plans.json")
    there.store(ENTRY)
    assert there.import_(tmp_path / "plans.json").added == wins
    assert there.load(PROBLEM, ENVIRONMENT) == (other if wins else ENTRY)


def test_import_skips_damaged_plans_and_says_why(directory, tmp_path):
    plans, file = PlanCache(directory), tmp_path / "plans.json"
    good, flipped = json.loads(DATA), json.loads(DATA)
    flipped["entry"]["time_us"] = 1.0
    file.write_text(json.dumps({"schema": cache.SCHEMA, "plans": [flipped, good, 7, {**good, "schema": 0}]}))
    report = plans.import_(file)
    assert report.added == 1
    assert report.skipped == {"the checksum does not fit": 1, "not an entry of the plan cache": 1, "another schema": 1}


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", DATA, b'{"schema":1,"plans":[]}', b'{"schema":2,"plans":{}}',
                                     b"[" * 200_000, b"\xff" * 99],
                         ids=["empty", "list", "object", "entry", "schema", "type", "deep", "bytes"])
def test_importing_another_file_reports_it(directory, tmp_path, content):
    (tmp_path / "file").write_bytes(content)
    report = PlanCache(directory).import_(tmp_path / "file")
    assert report.added == 0 and len(report.skipped) == 1


@pytest.mark.parametrize("path", ["/dev/zero", "/dev/null", "/", "/missing"])
def test_importing_what_is_no_file_reports_it(directory, path):
    report = PlanCache(directory).import_(path)
    assert report.added == 0 and any(word in str(report.skipped) for word in ("regular", "directory", "No such file"))


def test_export_to_a_place_that_cannot_be_written_is_an_error(directory, tmp_path):
    PlanCache(directory).store(ENTRY)
    with pytest.raises(OSError):
        PlanCache(directory).export(tmp_path / "missing" / "plans.json")
    with pytest.raises(OSError, match="not a regular file"):
        PlanCache(directory).export("/dev/null")


# Damage


def test_every_truncation_is_a_miss():
    assert [n for n in range(len(DATA) - 1) if outcome(DATA[:n]) is not None] == []
    assert outcome(DATA[:-1]) == ENTRY  # only the final line break


def test_every_flipped_bit_is_a_miss_or_the_same_entry():
    wrong = []
    for bit in range(8 * len(DATA)):
        data = bytearray(DATA)
        data[bit // 8] ^= 1 << bit % 8
        if outcome(bytes(data)) not in (None, ENTRY):
            wrong.append(bit)
    assert wrong == []


@pytest.mark.parametrize("kind", ["truncation", "flip", "random"])
def test_damaged_files_are_misses_that_warn_once_and_are_rewritten(directory, kind):
    draw = random.Random(kind)
    plans = PlanCache(directory)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for _ in range(200):
            data = bytearray(DATA)
            if kind == "truncation":
                del data[draw.randrange(len(data) - 1):]
            elif kind == "flip":
                data[draw.randrange(len(data) - 1)] ^= 1 << draw.randrange(8)
            else:
                data = bytearray(draw.randbytes(draw.choice((0, 1, 7, 99, 4096, cache.MAX_BYTES + 1))))
            planted(directory, bytes(data))
            assert plans.load(PROBLEM, ENVIRONMENT) is None
    assert len(seen) == 1 and NAME in str(seen[0].message)
    assert plans.store(ENTRY) and plans.load(PROBLEM, ENVIRONMENT) == ENTRY


def sealed(entry: object, schema: object = cache.SCHEMA) -> str:
    return json.dumps({"schema": schema, "checksum": cache.checksum(entry), "entry": entry})


def changed(**fields) -> str:
    """An entry with a correct checksum and wrong values: what only the checks of its fields can refuse."""
    return sealed({**ENTRY.to_dict(), **fields})


def with_problem(**fields) -> str:
    return changed(problem={**ENTRY.problem, **fields})


@pytest.mark.parametrize("text", [
    pytest.param(sealed(ENTRY.to_dict(), schema=0), id="old-schema"),
    pytest.param(sealed(ENTRY.to_dict(), schema=True), id="schema-is-a-flag"),
    pytest.param(sealed(ENTRY.to_dict(), schema=1.0), id="schema-is-a-float"),
    pytest.param(DATA.decode().replace('"schema"', '"schema":1,"schema"'), id="name-twice"),
    pytest.param(DATA.decode().replace('"time_us":12.5', '"time_us":NaN'), id="nan"),
    pytest.param(DATA.decode().replace('"time_us":12.5', '"time_us":Infinity'), id="infinity"),
    pytest.param(DATA.decode().replace('"time_us":12.5', '"time_us":1e999'), id="overflowing-float"),
    pytest.param(DATA.decode().replace('"batch":2', '"batch":' + "9" * 30), id="huge-integer"),
    pytest.param(DATA.decode().replace('"batch":2', '"batch":' + "9" * 9000), id="endless-integer"),
    pytest.param(DATA.decode() + "{}", id="trailing"),
    pytest.param("[" * 30_000 + "]" * 30_000, id="deep-list"),
    pytest.param('{"a":' * 10_000 + "1" + "}" * 10_000, id="deep-object"),
    pytest.param("null", id="null"),
    pytest.param("[]", id="list"),
    pytest.param(sealed([]), id="entry-is-a-list"),
    pytest.param(sealed({}), id="entry-is-empty"),
    pytest.param(sealed({**ENTRY.to_dict(), "extra": 1}), id="unknown-field"),
    pytest.param(changed(time_us="12.5"), id="time-is-text"),
    pytest.param(changed(time_us=0.0), id="time-is-zero"),
    pytest.param(changed(time_us=-1.0), id="time-is-negative"),
    pytest.param(changed(time_us=True), id="time-is-a-flag"),
    pytest.param(changed(time_us=None), id="time-is-missing"),
    pytest.param(changed(aten_us=[1.0]), id="aten-time-is-a-list"),
    pytest.param(changed(candidates=-1), id="candidates-negative"),
    pytest.param(changed(candidates=True), id="candidates-is-a-flag"),
    pytest.param(changed(candidates=2.0), id="candidates-is-a-float"),
    pytest.param(changed(engine=7), id="engine-is-a-number"),
    pytest.param(changed(config=[]), id="config-is-a-list"),
    pytest.param(changed(policy=None), id="policy-is-null"),
    pytest.param(changed(environment={**ENVIRONMENT, "torch": 2}), id="version-is-a-number"),
    pytest.param(changed(problem={}), id="problem-is-empty"),
    pytest.param(with_problem(batch=True), id="batch-is-a-flag"),
    pytest.param(with_problem(batch=2.0), id="batch-is-a-float"),
    pytest.param(with_problem(batch=-2), id="batch-is-negative"),
    pytest.param(with_problem(stride=[1, 1]), id="stride-too-short"),
    pytest.param(with_problem(stride=[0, 1, 1]), id="stride-is-zero"),
    pytest.param(with_problem(stride=1), id="stride-is-a-number"),
    pytest.param(with_problem(bias=0), id="bias-is-a-number"),
    pytest.param(with_problem(pass_="backward"), id="unknown-pass"),
])
def test_content_that_is_refused(directory, text):
    with pytest.raises(ValueError):
        decode(text.encode())
    planted(directory, text.encode()[: 2 * cache.MAX_BYTES])
    with pytest.warns(UserWarning, match="is ignored"):
        assert PlanCache(directory).load(PROBLEM, ENVIRONMENT) is None


@pytest.mark.parametrize("text", [
    "NaN", "Infinity", "-Infinity", "1e999", "-1e999", str(2**63), "9" * 5000, '{"a":1,"a":1}', '{"b":[{"a":1,"a":2}]}',
    "[" * 100_000, "1 1", "", "{'a': 1}", "[1,]", "// 1", "\ufeff1",
], ids=lambda text: ascii(text[:30]))
def test_json_that_is_refused(text):
    with pytest.raises(ValueError):
        storage.parse(text.encode())


@pytest.mark.parametrize("value", [
    2**63 - 1, 1 - 2**63, 1.5, 1e-300, "\ud800", {"a": [True, None, {"a": 1}]},
], ids=ascii)
def test_json_that_comes_back(value):
    assert storage.canonical(storage.parse(storage.canonical(value).encode())) == storage.canonical(value)


def test_an_entry_under_the_name_of_another_is_a_miss(directory):
    other = PROBLEM.replace(batch=9)
    planted(directory, DATA, cache.file_name(other.to_dict(), ENVIRONMENT))
    with pytest.warns(UserWarning, match="another problem"):
        assert PlanCache(directory).load(other, ENVIRONMENT) is None
    assert list(PlanCache(directory).entries()) == []


@pytest.mark.parametrize("fields", [
    {"time_us": float("nan")}, {"policy": {"a": object()}}, {"config": {"a": "x" * 99_999}},
], ids=["nan", "object", "long"])
def test_an_entry_that_no_file_may_hold_is_not_stored(directory, fields):
    with pytest.warns(UserWarning, match="memory only"):
        assert PlanCache(directory).store(dataclasses.replace(ENTRY, **fields)) is False
    assert not directory.exists()


# Configs from a file


@pytest.mark.parametrize("engine, config", [
    ("aten", {}), ("aten", None), ("aten", {**CONFIG, "x": 1}), ("aten", {"channels_last": False}),
    ("aten", {"channels_last": 0, "benchmark": False}), ("aten", {"channels_last": False, "benchmark": 0.0}),
    ("aten", {"channels_last": True, "benchmark": False}), ("aten", {**CONFIG, "benchmark": "False"}),
    ("no_such_engine", CONFIG), ("os", {}), (None, CONFIG), (["aten"], CONFIG), ("matmul", {}),
    ("aten", {"a": object()}),
], ids=repr)
def test_what_is_not_offered_reaches_no_engine(engine, config):
    assert plan.offered(PROBLEM, engine, config) is None


def test_every_offered_config_comes_back_as_the_engines_own():
    count = 0
    problems = [PROBLEM.replace(arch=arch, device=arch) for arch in ("sm_90", "cpu", "interpreter")]
    for problem in problems:
        for name, engine in engines.available().items():
            for config in engine.configs(problem) if engine.supports(problem) is None else ():
                stored = json.loads(json.dumps(config.to_dict()))
                found = plan.offered(problem, name, stored)
                assert found == config and type(found) is type(config)
                count += 1
                for key, value in stored.items():
                    if type(value) is int:
                        assert plan.offered(problem, name, {**stored, key: 2**40}) is None
                        assert plan.offered(problem, name, {**stored, key: float(value)}) is None
    assert count > 4


# The environment


def test_the_environment_is_plain_and_complete():
    assert set(ENVIRONMENT) == {"gpu", "arch", "torch", "triton", "driver", "cudnn", "package", "engines"}
    assert all(isinstance(value, str) and value for value in ENVIRONMENT.values())
    assert ENVIRONMENT["torch"] == torch.__version__ and len(ENVIRONMENT["engines"]) == 64
    environment.environment(torch.device("cpu"))["gpu"] = "changed"
    assert environment.environment(torch.device("cpu")) == ENVIRONMENT


@pytest.mark.parametrize("text, version", [
    ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5 22:23:56 UTC 2024", "550.54.15"),
    ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build", "580.65.06"),
    ("6.12.12\n", "6.12.12"), ("something else", "13000"), (None, "13000"),
], ids=("closed", "open", "amdgpu", "unknown", "hidden"))  # fmt: skip
def test_the_driver_is_the_kernels_or_what_cuda_says(monkeypatch, tmp_path, text, version):
    def get_version(number) -> int:
        number._obj.value = 13000
        return 0

    monkeypatch.setattr(environment, "_KERNEL_DRIVERS", (tmp_path / "none", tmp_path / "version"))
    monkeypatch.setattr(environment.ctypes, "CDLL", lambda name: SimpleNamespace(cuDriverGetVersion=get_version))
    if text is not None:
        (tmp_path / "version").write_text(text)
    assert environment._driver() == f"{version}, cuda {torch.version.cuda}"


def test_a_changed_kernel_changes_the_source_hash(tmp_path, monkeypatch):
    (tmp_path / "engines" / "deep").mkdir(parents=True)
    hashes = set()
    monkeypatch.setattr(environment, "_PACKAGE", tmp_path)
    for name in ("problem.py", "engines/a.py", "engines/deep/b.py"):
        for content in ("1", "2"):
            (tmp_path / name).write_text(content)
            hashes.add(environment.source_hash.__wrapped__())
    assert len(hashes) == 6
