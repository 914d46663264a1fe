"""Result files read, judged, written as Markdown and compared: figures that are right, losses first, failures in view."""

from __future__ import annotations

import dataclasses
import re

import pytest

from perf import __main__ as cli
from perf import compare, report, results, summary
from perf.end_to_end import EndToEnd
from perf.results import Row, Stamp
from perf.summary import LEVEL, LOSS, WIN, Outcome, load

STAMP = Stamp("Made-up GPU", "sm_90", "1", "2", "3", "4", "5", "abc", "invented")
CASE = "net.c8_k8_3x3x3_8x8x8/forward/fp16/ieee/channels_last"


def row(provider: str, time_us: float | None = 100.0, case: str = CASE, noise: float = 0.02, **changes) -> Row:
    layer, pass_, dtype, precision, layout = case.split("/")
    timed = {} if time_us is None else {
        "time_us": time_us, "low_us": time_us * (1 - noise), "high_us": time_us * (1 + noise), "samples": 9,
        "host_us": 5.0, "tflops": 2e9 / time_us / 1e6, "roofline": 50.0 / time_us,
    }  # fmt: skip
    plan = "implicit_gemm [-] from measured" if provider == "ours" else ""
    fields = {
        "suite": "made up", "case": case, "layer": layer, "model": "A net", "op": "conv3d", "pass_": pass_,
        "dtype": dtype, "precision": precision, "layout": layout, "shape": "1x8x8x8x8 -> 8, kernel 3x3x3", "calls": 1,
        "provider": provider, "status": "ok", "plan": plan, "flops": 2_000_000_000, "min_bytes": 1_000_000,
        "matmul_tflops": 500.0, "copy_gbps": 3000.0, "roofline_us": 50.0, **timed, **changes,
    }  # fmt: skip
    return Row(**fields)


def network(provider: str, time_us: float | None, mode: str = "train", **changes) -> EndToEnd:
    timed = {} if time_us is None else {"time_us": time_us, "low_us": time_us * 0.99, "high_us": time_us * 1.01}
    return EndToEnd("net", "A net", mode, "1x1x8x8x8", "fp16", provider, **timed, peak_bytes=2**30, **changes)


def other(case: str, **parts) -> str:
    """Another case: ``pass_`` or ``layer`` replaced."""
    layer, pass_, *rest = case.split("/")
    return "/".join((parts.get("layer", layer), parts.get("pass_", pass_), *rest))


@pytest.fixture
def folder(tmp_path):
    """``folder(name=rows, ...)`` writes result files; a file's rows may be given with another stamp as (rows, stamp)."""

    def write(**files):
        for name, rows in files.items():
            rows, stamp = rows if isinstance(rows, tuple) else (rows, STAMP)
            results.append(tmp_path / f"{name}.csv", rows, stamp)
        return tmp_path

    return write


def outcome(*rows: Row) -> Outcome:
    return Outcome({r.provider: r for r in rows})


def test_speedup_is_over_the_fastest_of_torch():
    found = outcome(row("ours", 100.0), row("torch", 300.0), row("torch_cl_bench", 125.0), row("implicit_gemm", 90.0))
    assert found.torch.provider == "torch_cl_bench" and found.speedup == 1.25


@pytest.mark.parametrize("status", ("wrong", "failed", "memory", "unsupported"))
def test_a_row_that_is_not_ok_is_nobodys_time(status):
    lost = row("torch_cl", 10.0, status=status)  # even with a time
    assert outcome(row("ours"), row("torch", 150.0), lost).speedup == 1.5
    found = outcome(row("ours", 10.0, status=status), row("torch"))
    assert found.speedup is None and found.verdict is None and found.missing_ours == status


@pytest.mark.parametrize(
    "theirs, noise, verdict",
    [
        (150.0, 0.02, WIN),
        (103.0, 0.02, LEVEL),
        (97.0, 0.02, LEVEL),
        (80.0, 0.02, LOSS),
        (80.0, 0.2, LEVEL),
        (103.0, 0.01, WIN),
    ],
)
def test_verdict_is_by_the_quantile_bands(theirs, noise, verdict):
    assert outcome(row("ours", 100.0, noise=noise), row("torch", theirs, noise=noise)).verdict == verdict


def test_missing_quantiles_are_the_median():
    bare = {"low_us": None, "high_us": None}
    assert outcome(row("ours", 100.0, **bare), row("torch", 101.0, **bare)).verdict == WIN


@pytest.mark.parametrize(
    "us, text", [(0.123, "0.123 us"), (12.34, "12.3 us"), (999.9, "1000 us"), (1500, "1.50 ms"), (2e6, "2.00 s")]
)
def test_duration(us, text):
    assert summary.duration(us) == text


def test_what_was_measured_last_counts(folder):
    early, late = {"measured": "2020-01-01T00:00:00+00:00"}, {"measured": "2021-01-01T00:00:00+00:00"}
    path = folder(
        a=[row("ours", 50.0, **late), row("torch", 90.0, **early)],
        b=[row("ours", 100.0, **early), row("torch", 75.0, **late)],
    )
    found = load(path)
    assert found.files == {"a.csv": 2, "b.csv": 2}
    assert found.outcomes[CASE].speedup == 1.5


def test_a_later_row_of_one_file_counts(folder):
    assert load(folder(a=[row("ours", 50.0), row("ours", 20.0)])).outcomes[CASE].ours.time_us == 20.0


def test_models_and_sweeps_are_kept_apart(folder):
    sweep = "sweep.channels.16/forward/fp16/ieee/channels_last"
    found = load(folder(a=[row("ours"), row("ours", case=sweep)]))
    assert [(o.group, o.layer) for o in found.layers] == [("net", "c8_k8_3x3x3_8x8x8")]
    assert [(o.group, o.layer) for o in found.sweeps] == [("sweep.channels", "16")]


def test_foreign_files_are_named_in_a_folder_and_refused_alone(folder):
    path = folder(a=[row("ours")])
    (path / "foreign.csv").write_text("a,b\n1,2\n")
    found = load(path)
    assert list(found.files) == ["a.csv"] and "schema" in found.unread["foreign.csv"]
    with pytest.raises(results.Refused, match="schema"):
        load(path / "foreign.csv")
    (path / "a.csv").unlink()
    with pytest.raises(results.Refused, match="holds no result files"):
        load(path)


def text(path) -> str:
    return report.markdown(load(path), [], path)


def lines_with(markdown: str, *parts: str) -> list[list[str]]:
    """Cells of the table lines that contain all parts."""
    return [
        [cell.strip() for cell in line.strip("|").split(" | ")]
        for line in markdown.splitlines()
        if line.startswith("|") and all(part in line for part in parts)
    ]


def test_report_tells_where_how_and_how_much(folder):
    found = text(folder(core=[row("ours", 100.0), row("torch", 300.0), row("torch_cl_bench", 125.0)]))
    assert found.startswith("# Made-up GPU\n") and "core.csv (3 rows)" in found
    assert lines_with(found, "Made-up GPU", "sm_90") == [[*dataclasses.astuple(STAMP), "3"]]
    assert lines_with(found, "forward", "1.25x", "| 1 |")[0] == "forward 1 1.25x 1 0 0 1.25x 0 0".split()
    (line,) = lines_with(found, "c8_k8_3x3x3_8x8x8", "kernel 3x3x3")
    assert line[2:] == [
        "forward", "100 us", "98.0 us to 102 us", "20", "50%", "implicit_gemm", "torch_cl_bench", "125 us", "1.25x"
    ]  # fmt: skip
    assert lines_with(found, "torch ", "3.00x", "5.00 us")
    assert "Not run, and so not among the peers: torch_cl, torch_bench, compile" in found


def test_report_names_the_worst_loss_first(folder):
    times = {"net.a": 90.0, "net.b": 50.0, "net.c": 200.0, "net.d": 70.0}
    rows = [
        r
        for name, us in times.items()
        for r in (row("ours", case=other(CASE, layer=name)), row("torch", us, case=other(CASE, layer=name)))
    ]
    found = text(folder(core=rows))
    losses = found.split("### Losses")[1].split("##")[0]
    assert re.findall(r"net\.\w", losses) == ["net.b", "net.d", "net.a"]
    assert "**0.50x loss**" in found and lines_with(found, "forward", "| 4 |")[0][3:7] == ["1", "0", "3", "0.50x"]


def test_report_counts_what_torch_computed_for_us(folder):
    found = text(folder(core=[row("ours", plan="aten [-] from measured"), row("torch", 100.0)]))
    assert lines_with(found, "forward", "1.00x", "| 1 |")[0][-1] == "1" and "1.00x level" in found


def test_report_lists_failures_with_reasons_ours_first(folder):
    rows = [
        row("compile", None, status="unsupported", reason="no a|b <here>"),
        row("torch", None, status="failed", reason="x" * 900),
        row("ours", None, status="memory", reason="92 GiB"),
    ]
    section = text(folder(core=rows)).split("### No time")[1].split("##")[0]
    (first, second, third) = [line for line in section.splitlines() if line.startswith("| ")][2:]
    assert first.startswith("| ours | memory | 1 | 92 GiB |")
    assert second.startswith("| torch | failed | 1 | xxx") and "x" * 250 not in second
    assert "no a\\|b &lt;here>" in third


def test_report_without_a_measurement_says_so(folder):
    found = text(folder(core=[row("ours", None, status="failed", reason="broken")]))
    assert "nothing was measured" in found and "broken" in found and "1.00x" not in found


def test_report_of_networks(folder):
    rows = [network("torch", 3000.0), network("torch_cl", 2000.0), network("ours", 1600.0),
            network("ours_compile", 2500.0), network("ours", None, "infer", status="wrong", reason="far off")]  # fmt: skip
    found = text(folder(end_to_end=rows))
    assert lines_with(found, "| ours |", "train")[0][5:9] == ["1.60 ms", "1.58 ms to 1.62 ms", "1.00 GiB", "1.25x"]
    assert lines_with(found, "ours_compile")[0][8] == "**0.80x loss**"
    assert lines_with(found, "infer")[0][5] == "-" and "wrong: far off" in found
    assert "## Summary" not in found


def test_report_command_writes_beside_the_results(folder, capsys):
    pytest.importorskip("matplotlib")
    path = folder(core=[row("ours"), row("torch", 150.0)], end_to_end=[network("ours", 10.0), network("torch", 20.0)])
    assert cli.main(["report", str(path)]) == 0
    assert capsys.readouterr().out == f"{path / 'report.md'}\n"
    shown = re.findall(r"!\[Made-up GPU.*?\]\((.*?)\)", (path / "report.md").read_text())
    assert sorted(shown) == [f"pictures/{p.name}" for p in sorted((path / "pictures").iterdir())]
    assert set(shown) == {f"pictures/{name}.png" for name in ("speedup", "speedup-net", "roofline", "end-to-end")}


@pytest.mark.parametrize(
    "arguments, message", [(["x/y"], "x/y"), (["--out", "z"], "of which results"), ([], "no results yet")]
)
def test_report_of_nothing(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    assert cli.main(["report", *arguments]) == 2
    assert message in capsys.readouterr().err


class TestCompare:
    """``compare A B``: what became slower, beyond noise."""

    @pytest.fixture
    def call(self, tmp_path, capsys):
        def compared(before, after, *options, stamp=STAMP):
            results.append(tmp_path / "a.csv", before, STAMP)
            results.append(tmp_path / "b.csv", after, stamp)
            status = cli.main(["compare", str(tmp_path / "a.csv"), str(tmp_path / "b.csv"), *options])
            return (status, *capsys.readouterr())

        return compared

    @pytest.mark.parametrize(
        "after, noise, options, status, says",
        [
            (120.0, 0.02, (), 1, "slower:"),
            (120.0, 0.2, (), 0, "1 within noise"),  # bands overlap
            (102.5, 0.001, (), 0, "1 within noise"),  # bands apart, below the threshold
            (102.5, 0.001, ("--threshold", "0.01"), 1, "slower:"),
            (80.0, 0.02, (), 0, "faster:"),
            (120.0, 0.02, ("--threshold", "0.5"), 0, "1 within noise"),
            (100.0, 0.02, (), 0, "1 within noise"),
        ],
        ids=["slower", "overlapping", "below-threshold", "threshold-lowered", "faster", "threshold-raised", "same"],
    )
    def test_beyond_noise(self, call, after, noise, options, status, says):
        got, out, _ = call([row("ours", 100.0, noise=noise)], [row("ours", after, noise=noise)], *options)
        assert got == status and says in out

    def test_shows_both_times(self, call):
        _, out, _ = call([row("ours", 100.0)], [row("ours", 120.0)])
        assert f" 1.20x  {CASE} ours: 100 us (98.0 us to 102 us) -> 120 us (118 us to 122 us)" in out

    def test_the_most_changed_comes_first(self, call):
        cases = [other(CASE, layer=f"net.{name}") for name in "abc"]
        after = [row("ours", us, case=case) for case, us in zip(cases, (120, 300, 200), strict=True)]
        _, out, _ = call([row("ours", case=case) for case in cases], after)
        assert re.findall(r"x  net\.(\w)", out) == ["b", "c", "a"]

    @pytest.mark.parametrize("status", ["failed", "wrong", "memory"])
    def test_a_time_that_is_lost_is_worse(self, call, status):
        got, out, _ = call([row("ours")], [row("ours", None, status=status, reason="why")])
        assert got == 1 and f"-> {status} (why)" in out

    def test_a_time_that_is_gained_is_not(self, call):
        got, out, _ = call([row("ours", None, status="failed", reason="why")], [row("ours")])
        assert got == 0 and "failed (why) -> 100 us" in out

    def test_names_what_is_in_one_only(self, call):
        got, out, _ = call([row("ours"), row("torch")], [row("ours"), row("compile")])
        assert got == 0 and f"only before:\n  {CASE} torch" in out and f"only after:\n  {CASE} compile" in out

    def test_whole_networks(self, call):
        got, out, _ = call([network("ours", 10.0)], [network("ours", 20.0)])
        assert got == 1 and "net/train/1x1x8x8x8 ours" in out

    def test_another_gpu_is_refused(self, call):
        there = dataclasses.replace(STAMP, gpu="Another GPU")
        got, _, error = call([row("ours")], [row("ours")], stamp=there)
        assert got == 2 and "Made-up GPU" in error and "Another GPU" in error and "--force" in error

    def test_another_gpu_by_force(self, call):
        there = dataclasses.replace(STAMP, gpu="Another GPU", torch="9.9")
        got, out, _ = call([row("ours")], [row("ours", 150.0)], "--force", stamp=there)
        assert got == 1 and "gpu: Made-up GPU -> Another GPU" in out and "torch: 2 -> 9.9" in out

    def test_nothing_in_common(self, call):
        got, _, error = call([row("ours")], [row("torch")])
        assert got == 2 and "in common" in error

    def test_threshold_must_be_a_part(self, call):
        got, _, error = call([row("ours")], [row("ours")], "--threshold", "-1")
        assert got == 2 and "--threshold -1.0" in error

    def test_join_is_by_case_and_provider(self):
        before = {(CASE, "ours"): row("ours", 100.0), (CASE, "torch"): row("torch", 500.0)}
        after = {(CASE, "ours"): row("ours", 500.0), (CASE, "torch"): row("torch", 100.0)}
        found = compare.compare(before, after, 0.03)
        assert found.slower == [(5.0, (CASE, "ours"))] and found.faster == [(0.2, (CASE, "torch"))]
