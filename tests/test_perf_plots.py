"""Pictures: legible at 800 px, safe for the colour-blind, nothing cut off, losses and failures in view."""

from __future__ import annotations

import pytest

pytest.importorskip("matplotlib")

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.patches import Rectangle
from matplotlib.text import Text
from test_perf_report import CASE, STAMP, network, other, outcome, row

from perf import __main__ as cli
from perf import drawing, figures, plots, results, summary, workloads
from perf.summary import by_group

COLOURS = {"#000000", "#e69f00", "#56b4e9", "#009e73", "#0072b2", "#d55e00", "#cc79a7"}  # Okabe and Ito
STATUSES = [("memory", "no room"), ("failed", "a long reason " * 30), ("wrong", "far off")]


def layer_rows(index: int, workload, pass_: str):
    """Invented: wins, level results and losses over many orders, a failure of ours or of torch here and there."""
    case = "/".join((workload.id, pass_, workload.layer.dtype, "ieee", "channels_last"))
    speedup = (0.4, 0.98, 1.3, 2.0, 12.0)[index % 5]
    rows = [row("ours", 1000.0 / speedup, case), row("torch_cl", 1000.0, case), row("torch", 3000.0, case)]
    if index % 11 == 3:
        rows[0] = row("ours", None, case, status=STATUSES[index % 3][0], reason=STATUSES[index % 3][1])
    if index % 13 == 5:
        rows[1:] = [row("torch", None, case, status="memory", reason="no room")]
    return rows


@pytest.fixture(scope="module")
def core():
    """Three passes of the 81 core layers; one pass of one layer was not run."""
    found = [
        outcome(*layer_rows(index + len(pass_), workload, pass_))
        for index, workload in enumerate(workloads.suite("core"))
        for pass_ in ("forward", "dgrad", "wgrad")
        if (index, pass_) != (4, "dgrad")
    ]
    assert len(found) == 81 * 3 - 1
    return found


@pytest.fixture(scope="module")
def sweep():
    rows = {
        workload.id: [outcome(*layer_rows(index, workload, pass_)) for pass_ in summary.PASSES]
        for index, workload in enumerate(workloads.suite("sweep.channels"))
    }
    return [found for of in rows.values() for found in of], {name: int(name.split(".")[-1]) for name in rows}


@pytest.fixture(scope="module")
def networks():
    names = ("a_network", "another_network_of_a_long_name", "third")
    return {
        (name, mode, "1x1x8x8x8"): {
            "ours": network("ours", None, mode, status="memory", reason="no room")
            if name == "third"
            else network("ours", 500.0, mode),
            "ours_compile": network("ours_compile", 1200.0, mode),
            "torch": network("torch", 40_000.0, mode),
            "torch_cl": network("torch_cl", 1000.0, mode),
        }
        for name in names
        for mode in ("train", "infer")
    }


TILES = {"forward": {(128, 64): (1.0, 5), (64, 64): (0.25, 0)}, "wgrad": {(16, 16): (0.9, 1)}}


@pytest.fixture(scope="module")
def drawn(core, sweep, networks):
    """Every figure by name, at a low resolution: proportions are the same."""
    before, drawing.DPI = drawing.DPI, 60
    try:
        made = {f"bars {group}": figures.speedup_bars(of, f"GPU, {group}") for group, of in by_group(core).items()}
        made |= {
            "overview": figures.speedup_overview(core, "GPU"),
            "roofline": figures.roofline(core, "GPU"),
            "sweep": figures.sweep_lines(*sweep, "channels", "GPU"),
            "networks": figures.step_times(networks, "GPU"),
            "tiles": figures.heat_map(TILES, "GPU", plots.TILE_CAPTION),
        }
        for figure in made.values():
            FigureCanvasAgg(figure).draw()
        return made
    finally:
        drawing.DPI = before


def texts(figure):
    return [text for text in figure.findobj(Text) if text.get_visible() and text.get_text().strip()]


def test_there_is_a_figure_for_each_model(drawn):
    assert {name for name in drawn if name.startswith("bars")} == {f"bars {w.suite}" for w in workloads.suite("core")}


def test_width_and_type_are_legible(drawn):
    for name, figure in drawn.items():
        assert figure.get_size_inches()[0] == 8.0, name  # 800 px show 100 to the inch
        assert not [t.get_text() for t in texts(figure) if t.get_fontsize() < 8 or "$" in t.get_text()], name


def test_nothing_reaches_beyond_the_picture(drawn):
    for name, figure in drawn.items():
        (width, height), box = figure.get_size_inches(), figure.get_tightbbox()
        assert min(box.x0, box.y0) > -0.02 and box.x1 < width + 0.02 and box.y1 < height + 0.02, (name, box)


def test_labels_of_lines_do_not_touch(drawn):
    for name, figure in drawn.items():
        labels = [t for t in figure.axes[0].get_yticklabels() if t.get_text()]
        boxes = sorted((t.get_window_extent() for t in labels), key=lambda box: box.y0)
        assert all(low.y1 < high.y0 + 1 for low, high in zip(boxes, boxes[1:], strict=False)), name
        labels = [axes.xaxis.label.get_window_extent() for axes in figure.axes if axes.xaxis.label.get_text()]
        assert not any(one.overlaps(other) for i, one in enumerate(labels) for other in labels[:i]), name


def test_colours_are_okabe_and_itos(drawn):
    for name in ("overview", "sweep", "roofline", "bars nnunet3d", "networks"):
        lines = [line for axes in drawn[name].axes for line in axes.lines]
        patches = [patch for axes in drawn[name].axes for patch in axes.patches]
        used = {to_hex(line.get_color()) for line in lines} | {to_hex(patch.get_facecolor()) for patch in patches}
        assert used <= COLOURS | {to_hex(drawing.GREY)}, name


def bars(axes):
    return [patch for patch in axes.patches if isinstance(patch, Rectangle) and patch.get_width()]


def test_losses_are_hatched_bars_left_of_one(drawn, core):
    for group, of in by_group(core).items():
        found = [bar for axes in drawn[f"bars {group}"].axes for bar in bars(axes)]
        losses = [bar for bar in found if bar.get_hatch()]
        assert len(losses) == sum(o.verdict == summary.LOSS for o in of)
        assert all(bar.get_width() < 0 and to_hex(bar.get_facecolor()) == "#d55e00" for bar in losses)
        assert {bar.get_x() for bar in found} == {1.0}
        ends = sorted(bar.get_x() + bar.get_width() for bar in found)
        assert ends == pytest.approx(sorted(o.speedup for o in of if o.speedup is not None))


def test_what_was_not_measured_is_written_out(drawn, core):
    shown = [text.get_text() for name in drawn if name.startswith("bars") for text in texts(drawn[name])]
    assert shown.count("not run") == 1
    for status, _ in STATUSES:
        assert shown.count(f"ours: {status}") == sum(o.missing_ours == status for o in core) > 0
    failed = [t.get_text() for t in texts(drawn["overview"]) if "failed" in t.get_text()]
    assert sum(int(t.split()[0]) for t in failed) == sum(bool(o.missing_ours) for o in core)


def test_sweep_has_bands_and_breaks(drawn, sweep):
    forward = drawn["sweep"].axes[0]
    assert len(forward.collections) == 3  # a band for each provider
    crosses = [x for line in forward.lines if line.get_marker() == "x" for x in line.get_xdata()]
    failed = [o for o in sweep[0] if o.any.pass_ == "forward" for r in o.rows.values() if r.status != "ok"]
    assert sorted(crosses) == sorted(sweep[1][o.workload] for o in failed) and failed


def test_roofline_has_every_layer_under_measured_ceilings(drawn, core):
    """Invented rows have 2,000 flops to a byte, and ceilings of 500 TFLOP/s and 3 TB/s."""
    panels = [axes for axes in drawn["roofline"].axes if axes.lines]
    assert {panel.get_title("left") for panel in panels} == {
        f"{dtype} ieee: product 500 TFLOP/s, copy 3000 GB/s" for dtype in ("fp16", "bf16", "fp32")
    }
    ceiling, *points = [line for panel in panels for line in panel.lines if panel.get_title("left").startswith("fp16")]
    assert max(ceiling.get_ydata()) == 500 and ceiling.get_ydata()[0] == pytest.approx(ceiling.get_xdata()[0] * 3.0)
    of = [o for o in core if o.any.dtype == "fp16"]
    rates = [2e9 / row.time_us / 1e6 for o in of for row in (o.ours, o.torch) if row]
    assert sorted(y for line in points for y in line.get_ydata()) == pytest.approx(sorted(rates))
    assert {x for line in points for x in line.get_xdata()} == {2000.0}


def test_no_two_providers_look_alike():
    looks = figures._looks({"ours", *summary.TORCH, "ours_compile", "implicit_gemm", "matmul", "aten", "flag_gems"})
    assert len({(line, marker) for _, line, marker in looks.values()}) == len(looks)


def test_networks_show_losses_failures_and_times(drawn):
    train = drawn["networks"].axes[0]
    assert [round(bar.get_width(), 3) for bar in bars(train) if bar.get_hatch()] == [1.2] * 3
    assert max(bar.get_width() for bar in bars(train)) == 3.0  # the one of 40 is cut, and says so
    shown = [text.get_text().strip() for text in train.texts]
    assert shown.count("memory") == 1 and shown.count("500 us") == 2 and "40.0 ms, 40.0x: cut" in shown


def test_tile_shares():
    timed = [("forward", "a", (64, 64), 2.0), ("forward", "a", (64, 64), 4.0), ("forward", "a", (128, 64), 1.0),
             ("forward", "b", (64, 64), 1.0), ("wgrad", "a", (16, 16), 3.0)]  # fmt: skip
    assert plots.tile_shares(timed) == {
        "forward": {(64, 64): (pytest.approx(0.5**0.5), 1), (128, 64): (1.0, 1)}, "wgrad": {(16, 16): (1.0, 1)}
    }  # fmt: skip


def test_tiles_are_drawn_from_rows_that_tuning_left(tmp_path):
    tiles = [(16, 16), (32, 16), (64, 64), (128, 64)]
    plan = "implicit_gemm [block_m={} block_n={} block_k=32] from measured"
    rows = [row(f"config {i}", 10.0 + i, plan=plan.format(*tile)) for i, tile in enumerate(tiles)]
    results.append(tmp_path / "tuned.csv", rows, STAMP)
    (picture,) = [p for p in plots.draw(summary.load(tmp_path), tmp_path / "pictures") if p.path.stem == "tiles"]
    assert picture.caption == "Made-up GPU: tiles of configs that were measured"


@pytest.mark.parametrize(
    "rows",
    [
        [row("ours", None, status="failed", reason="broken"), row("torch", None, status="failed", reason="broken")],
        [row("ours", None, "sweep.batch.2/forward/fp16/ieee/channels_last", status="memory", reason="no room")],
        [row("torch", 5.0)],
        [row("ours", 5.0, matmul_tflops=None, copy_gbps=None, roofline_us=None)],
        [row("ours", 5.0), row("torch", 6.0, low_us=None, high_us=None, host_us=None, plan="")],
        [row("ours", 5.0, case=other(CASE, pass_="train"))],
    ],
    ids=["nothing-ok", "empty-sweep", "torch-only", "no-ceilings", "no-quantiles", "train-only"],
)
def test_whatever_a_file_holds_it_can_be_drawn(rows, tmp_path, capsys):
    results.append(tmp_path / "some.csv", rows, STAMP)
    assert cli.main(["plot", str(tmp_path / "some.csv"), "--out", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    assert "nothing that was measured" in out or all(map(str.strip, out.splitlines()))
    for path in (tmp_path / "out").rglob("*.png"):
        assert path.read_bytes().startswith(b"\x89PNG") and str(path) in out


def test_the_same_figure_gives_the_same_bytes(tmp_path):
    one, two = (figures.save(figures.heat_map(TILES, "GPU", "x"), tmp_path / f"{i}.png") for i in "ab")
    assert one.read_bytes() == two.read_bytes()


def test_without_matplotlib_one_line_says_what_to_install(tmp_path, monkeypatch, capsys):
    results.append(tmp_path / "some.csv", [row("ours")], STAMP)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert cli.main(["plot", str(tmp_path)]) == 2
    assert capsys.readouterr().err == "perf plot: pictures need matplotlib: pip install matplotlib\n"
