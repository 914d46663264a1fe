"""Result files: what is written is read again, an interruption costs at most the line it hit, nothing is misread."""

from __future__ import annotations

import dataclasses
import threading
from dataclasses import dataclass

import pytest

from perf import results
from perf.results import OK, Refused, Row, Stamp

STAMP = Stamp("NVIDIA H200", "sm_90", "580.1", "2.11", "13.0", "91900", "3.6.0", "abc+", "events")


def row(case: str = "a/forward/fp16/ieee/channels_last", provider: str = "ours", **columns) -> Row:
    blank = Row("t", case, "a", "A", "conv3d", "forward", "fp16", "ieee", "channels_last", "1x2", 1, provider, OK)
    return dataclasses.replace(blank, **columns)


@dataclass(frozen=True)
class Step:
    """Rows of another kind, as other commands have them."""

    network: str
    steps: int
    time_us: float | None = None
    loss: float = 0.0


@pytest.fixture
def path(tmp_path):
    return tmp_path / "new" / "file.csv"


class TestRoundTrip:
    @pytest.mark.parametrize(
        "rows",
        [
            [row(time_us=1.5, samples=7, peak_bytes=2**40, error=1e-9), row(provider="torch")],
            [row(status="failed", reason='RuntimeError: "a", b; c')],
            [Step("unet", 3, 12.5, 0.25), Step("vae", 1)],
        ],
        ids=("rows", "commas and quotes", "another kind"),
    )
    def test_what_is_written_is_read(self, path, rows):
        results.append(path, rows, STAMP)
        results.append(path, rows[:1], STAMP)
        assert results.read(path, type(rows[0])) == [(r, STAMP) for r in [*rows, rows[0]]]

    def test_line_breaks_become_spaces(self, path):
        results.append(path, [row(reason="CUDA\nerror:\r\n\u2028 no\x0bmemory")], STAMP)
        ((read, _),) = results.read(path)
        assert read.reason == "CUDA error: no memory"
        assert path.read_text().count("\n") == 2

    def test_no_rows_make_no_file(self, path):
        results.append(path, [], STAMP)
        assert not path.exists()


def test_a_file_cut_anywhere_is_read_and_gone_on_with(path):
    first, second = row("a"), row("b", reason='"x", y')
    results.append(path, [first], STAMP)
    one = path.stat().st_size
    results.append(path, [second], STAMP)
    whole = path.read_bytes()
    for size in range(0, len(whole), 23):
        path.write_bytes(whole[:size])
        kept = [first] if size >= one else []
        assert [r for r, _ in results.read(path)] == kept, size
        results.append(path, [second], STAMP)
        assert [r for r, _ in results.read(path)] == [*kept, second], size


def test_what_two_processes_add_at_once_is_all_there(path, monkeypatch):
    results.append(path, [row("a")], STAMP)
    whole, other = results._whole_lines, threading.Thread(target=results.append, args=(path, [row("b")], STAMP))

    def slow(*args) -> bytes:
        lines = whole(*args)
        if not other.ident:
            other.start()
            other.join(0.2)  # which adds nothing yet
        return lines

    monkeypatch.setattr(results, "_whole_lines", slow)
    results.append(path, [row("c")], STAMP)
    other.join()
    assert [r for r, _ in results.read(path)] == [row("a"), row("c"), row("b")]


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda text: text.replace("schema,", "version,", 1), "its first line must name the columns schema, suite"),
        (lambda text: text.replace("time_us", "time_ms", 1), "its first line must name the columns"),
        (lambda text: "{}", "its first line must name the columns"),
        (lambda text: text.replace("\n1,", "\n2,", 1), "line 2: schema 2, expected 1"),
        (lambda text: text.replace(",ok,", ",fine,", 1), "line 2: status='fine', expected one of ok, unsupported"),
        (lambda text: text.replace("1.5", "fast", 1), "line 2: could not convert string to float: 'fast'"),
        (lambda text: text.replace("1.5", "1,5", 1), "line 2: 43 values for 42 columns"),
    ],
    ids=("first column", "column", "json", "schema", "status", "number", "values"),
)
def test_another_schema_is_refused(path, damage, message):
    results.append(path, [row(time_us=1.5)], STAMP)
    damaged = damage(path.read_text())
    path.write_text(damaged)
    with pytest.raises(Refused) as refused:
        results.read(path)
    assert str(path) in str(refused.value) and message in str(refused.value)
    if "first line" in message:  # nothing is added to it either
        with pytest.raises(Refused):
            results.append(path, [row()], STAMP)
        assert path.read_text() == damaged


def test_bytes_that_are_no_text_are_refused(path):
    results.append(path, [row()], STAMP)
    path.write_bytes(path.read_bytes() + b"1,\xff\xfe\n")
    with pytest.raises(Refused, match="is no result file"):
        results.read(path)


def test_a_file_of_another_kind_is_refused(path):
    results.append(path, [Step("unet", 3)], STAMP)
    with pytest.raises(Refused, match="must name the columns"):
        results.read(path)
    with pytest.raises(Refused):
        results.append(path, [row()], STAMP)


@pytest.mark.parametrize(
    "gpu, name",
    [("NVIDIA H200", "nvidia-h200"), ("AMD Instinct MI300X (x)", "amd-instinct-mi300x-x"), ("../..", "unknown")],
)
def test_a_gpu_has_a_folder(gpu, name):
    assert results.folder(gpu) == results.RESULTS / name
