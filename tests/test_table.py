"""Tables of measured plans: what is found for a problem, in which order, and which files are refused."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import warnings
from pathlib import Path

import pytest

from triton_conv3d.problem import Problem
from triton_conv3d.tuning import storage, table
from triton_conv3d.tuning.cache import Entry
from triton_conv3d.tuning.table import MAX_DISTANCE, Table, distance, lookup, why_refused

GPU = "NVIDIA H200"
ENVIRONMENT = {"gpu": GPU, "arch": "sm_90", "torch": "2.13.0", "triton": "3.9.0", "driver": "13000, cuda 13.0",
               "cudnn": "91900", "package": "0.1.0", "engines": "0" * 64}
PROBLEM = Problem("forward", 2, 32, 64, (63, 65, 66), (3, 3, 3), padding=(1,) * 6, device=GPU, arch="sm_90")


def entry(problem: Problem = PROBLEM, time_us: float = 10.0) -> Entry:
    config = {"channels_last": False, "benchmark": False}
    return Entry(problem.to_dict(), ENVIRONMENT, {"mode": "full"}, "aten", config, time_us, 20.0, 40)


def make(*entries: Entry) -> Table:
    return Table(ENVIRONMENT, {"mode": "full"}, "abc123", "2026-01-01T00:00:00Z", entries)


@pytest.fixture(autouse=True)
def fresh(monkeypatch, tmp_path):
    """No shipped tables, no warnings given, nothing remembered."""
    monkeypatch.setattr(storage, "_warned", {})
    monkeypatch.setattr(table, "_known", {})
    monkeypatch.setattr(table, "SHIPPED", tmp_path / "shipped")
    (tmp_path / "shipped").mkdir()


@pytest.fixture
def own(tmp_path) -> Path:
    (tmp_path / "own").mkdir()
    return tmp_path / "own"


def test_no_table_finds_nothing(own):
    assert lookup(PROBLEM, ENVIRONMENT, None) == lookup(PROBLEM, ENVIRONMENT, own) == []
    assert lookup(PROBLEM, ENVIRONMENT, own / "missing") == lookup(PROBLEM, ENVIRONMENT, Path(os.devnull)) == []


def test_a_table_comes_back_as_it_was_written(own):
    path = table.write(make(entry(), entry(PROBLEM.replace(batch=4))), own)
    assert path.name == "nvidia-h200.json" and table.read(path) == make(entry(), entry(PROBLEM.replace(batch=4)))


@pytest.mark.parametrize("gpu, name", [
    ("NVIDIA H200", "nvidia-h200"), ("AMD Instinct MI300X\0/", "amd-instinct-mi300x"),
    ("../../etc/passwd", "etc-passwd"), ("..", "unknown"), ("", "unknown"),
])
def test_a_file_name_stays_in_its_directory(gpu, name):
    assert table.path_for(Path("tables"), gpu) == Path("tables") / f"{name}.json"


def test_exact_before_near_and_own_before_shipped(own):
    near, nearer = PROBLEM.replace(batch=8), PROBLEM.replace(batch=4)
    table.write(make(entry(near, 1.0), entry(nearer, 2.0), entry(PROBLEM, 3.0)), table.SHIPPED)
    table.write(make(entry(near, 4.0), entry(PROBLEM, 5.0)), own)
    found = [(e.time_us, d) for e, d in lookup(PROBLEM, ENVIRONMENT, own)]
    assert found == [(5.0, 0.0), (3.0, 0.0), (2.0, 1.0), (4.0, 2.0), (1.0, 2.0)]


@pytest.mark.parametrize("changes, octaves", [
    ({}, 0), ({"batch": 4}, 1), ({"batch": 1}, 1), ({"in_channels": 256}, 3), ({"out_channels": 128}, 1),
    ({"input_size": (126, 65, 66)}, 1), ({"input_size": (126, 130, 66)}, math.sqrt(2)), ({"alignment": 4}, 2),
    ({"bias": True}, 1), ({"residual": True}, 1), ({"activation": "silu"}, 1),
    ({"padding": (0,) * 6}, 1), ({"index64": True}, 1), ({"layouts": ("contiguous",) * 3}, 1),
], ids=str)
def test_distance_in_octaves(changes, octaves):
    other = PROBLEM.replace(**changes)
    assert distance(PROBLEM, other) == distance(other, PROBLEM) == pytest.approx(octaves)


@pytest.mark.parametrize("changes", [
    {"pass_": "wgrad"}, {"dtype": "bfloat16"}, {"precision": "tf32"}, {"kernel_size": (1, 3, 3)}, {"stride": (2, 1, 1)},
    {"dilation": (1, 1, 2)}, {"groups": 2}, {"groups": 32}, {"device": "NVIDIA A100"}, {"arch": "sm_80"},
], ids=str)
def test_nothing_is_learnt_from_another_kind(own, changes):
    other = PROBLEM.replace(**changes)
    assert distance(PROBLEM, other) == math.inf
    if not {"device", "arch"} & set(changes):
        table.write(make(entry(other)), own)
        assert lookup(PROBLEM, ENVIRONMENT, own) == [] and len(lookup(other, ENVIRONMENT, own)) == 1


def test_every_field_separates_two_problems():
    changes = {"pass_": "dgrad", "batch": 0, "in_channels": 33, "out_channels": 65, "input_size": (63, 66, 66),
               "kernel_size": (3, 3, 1), "stride": (2, 2, 2), "padding": (1, 1, 1, 1, 1, 0), "dilation": (1, 2, 1),
               "groups": 4, "bias": True, "residual": True, "activation": "relu",
               "dtype": "float32", "precision": "tf32", "layouts": ("view",) * 3,
               "alignment": 8, "index64": True, "device": "x", "arch": "y"}
    assert set(changes) == {field.name for field in dataclasses.fields(Problem)}
    assert all(distance(PROBLEM, PROBLEM.replace(**{name: value})) > 0 for name, value in changes.items())


def test_kinds_of_groups():
    depthwise, grouped = PROBLEM.replace(groups=32), PROBLEM.replace(groups=4)
    assert distance(depthwise, depthwise.replace(in_channels=64, groups=64)) == pytest.approx(math.sqrt(2))
    assert distance(grouped, PROBLEM.replace(groups=8)) == 1
    assert distance(grouped, depthwise) == distance(grouped, PROBLEM) == math.inf


def test_the_distance_is_bounded(own):
    table.write(make(entry(PROBLEM.replace(batch=16)), entry(PROBLEM.replace(batch=17))), own)
    assert [d for _, d in lookup(PROBLEM, ENVIRONMENT, own)] == [MAX_DISTANCE]


def test_a_table_is_read_once_and_again_after_a_change(own, monkeypatch):
    path, reads = table.write(make(entry(time_us=1.0)), own), []
    monkeypatch.setattr(table, "read", lambda path, real=table.read: reads.append(path) or real(path))
    for _ in range(3):
        assert lookup(PROBLEM, ENVIRONMENT, own)[0][0].time_us == 1.0
    assert reads == [path]
    table.write(make(entry(time_us=2.25)), own)
    assert lookup(PROBLEM, ENVIRONMENT, own)[0][0].time_us == 2.25
    assert len(reads) == 2


@pytest.mark.parametrize("changes, reason", [
    ({}, None), ({"gpu": "NVIDIA A100"}, "gpu 'NVIDIA H200', here it is 'NVIDIA A100'"), ({"arch": "sm_80"}, "arch"),
    ({"engines": "1" * 64}, "engines"),
    ({"triton": "3.6.0", "torch": "2.11.0", "driver": "x", "cudnn": "x", "package": "x"}, None),
], ids=["same", "gpu", "arch", "engines", "versions"])
def test_why_a_table_is_refused(changes, reason):
    answer = why_refused(make(), {**ENVIRONMENT, **changes})
    assert answer == reason or reason in answer


def text(**changes) -> str:
    return json.dumps({**make(entry()).to_dict(), **changes})


def plan(**changes) -> list:
    return [{**make(entry()).to_dict()["plans"][0], **changes}]


@pytest.mark.parametrize("content", [
    pytest.param("", id="empty"),
    pytest.param(text()[:-9], id="truncated"),
    pytest.param("[" * 100_000, id="deep"),
    pytest.param("[]", id="list"),
    pytest.param(text(schema=0), id="old-schema"),
    pytest.param(text(schema=True), id="schema-is-a-flag"),
    pytest.param(text(extra=1), id="unknown-field"),
    pytest.param(text(torch=2.13), id="version-is-a-number"),
    pytest.param(text(plans={}), id="plans-is-an-object"),
    pytest.param(text(plans=[[]]), id="plan-is-a-list"),
    pytest.param(text(policy=[]), id="policy-is-a-list"),
    pytest.param(text(gpu="NVIDIA A100"), id="plans-of-another-gpu"),
    pytest.param(text(plans=plan(time_us=-1.0)), id="negative-time"),
    pytest.param(text(plans=plan(extra=1)), id="unknown-plan-field"),
    pytest.param(text(plans=plan(problem={})), id="no-problem"),
    pytest.param(text(plans=plan(problem={**PROBLEM.to_dict(), "batch": 2.0})), id="batch-is-a-float"),
    pytest.param(text(plans=plan(time_us=float("nan"))), id="nan"),
    pytest.param(text().replace('"commit"', '"gpu": "x", "commit"'), id="name-twice"),
    pytest.param(json.dumps({**make().to_dict(), "gpu": "NVIDIA A100"}), id="foreign"),
    pytest.param(text(engines="1" * 64), id="other-engines"),
])
def test_a_damaged_or_foreign_table_is_ignored_with_one_warning(own, content):
    table.write(make(entry(time_us=7.0)), table.SHIPPED)
    table.path_for(own, GPU).write_text(content)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for _ in range(3):
            assert [e.time_us for e, _ in lookup(PROBLEM, ENVIRONMENT, own)] == [7.0]
    assert len(seen) == 1 and "nvidia-h200.json is ignored" in str(seen[0].message)


@pytest.mark.parametrize("kind", ["directory", "pipe", "link-to-itself", "too-long"])
def test_a_table_that_is_no_plain_file_is_ignored(own, kind, monkeypatch):
    path = table.path_for(own, GPU)
    if kind == "directory":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "link-to-itself":
        path.symlink_to(path)
    else:
        monkeypatch.setattr(table, "MAX_BYTES", 100)
        table.write(make(entry()), own)
    with pytest.warns(UserWarning, match="is ignored"):
        assert lookup(PROBLEM, ENVIRONMENT, own) == []


def test_every_truncation_of_a_table_is_refused():
    content = text().encode()
    for length in range(len(content)):
        with pytest.raises(ValueError):
            Table.from_dict(storage.parse(content[:length]))


def test_a_wrong_table_is_not_written(own):
    with pytest.raises(ValueError, match="a plan is for cpu"):
        table.write(make(entry(PROBLEM.replace(device="cpu"))), own)
    assert os.listdir(own) == []


@pytest.mark.parametrize("path", sorted((Path(table.__file__).parent / "tables").glob("*.json")), ids=lambda p: p.name)
def test_shipped_tables_are_valid(path):
    shipped = table.read(path)
    assert path == table.path_for(path.parent, shipped.environment["gpu"]) and shipped.entries
