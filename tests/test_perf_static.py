"""Predictions with no GPU: what the cost model says, which kernels are compiled for it, and that nothing looks measured."""

from __future__ import annotations

import csv
import dataclasses
import subprocess
import sys
import time

import pytest

pytest.importorskip("triton")

from perf import __main__ as cli
from perf import compiling, machine_code, plots, static, workloads
from perf.compiling import Kernel
from perf.disassembly import Report
from perf.static import Prediction
from triton_conv3d import settings
from triton_conv3d.engines import base, folded, implicit_gemm
from triton_conv3d.engines.implicit_gemm import GemmConfig
from triton_conv3d.problem import Problem
from triton_conv3d.tuning import cost_model
from triton_conv3d.tuning.select import ranking

LAYER = "nnunet3d.c320_k320_3x3x3_8x8x8"  # its reductions are split, so that each pass launches two kernels
PROBLEM = Problem("forward", 1, 64, 64, (8, 8, 8), (3, 3, 3), padding=(1,) * 6, device="H200", arch="sm_90")
SMALL = GemmConfig(32, 16, 16, 2, 2)
EXTRA = (  # one that does not compile, two that do
    Kernel(PROBLEM, "implicit_gemm", dataclasses.replace(SMALL, block_m=24), 0),
    Kernel(PROBLEM.replace(groups=16), "implicit_gemm", SMALL, 0),
    Kernel(PROBLEM.replace(in_channels=8), "folded", folded.FoldedConfig(32, 16, 16, 2), 0),
)


@pytest.fixture(scope="module")
def cases():
    return workloads.select(workloads.cases(workloads.suite("nnunet3d"), ("forward", "wgrad")), LAYER)


@pytest.fixture(scope="module")
def compiled(cases, tmp_path_factory):
    """(predictions, variants) of the cases, and the answers to EXTRA, by one compiling process."""
    answers = []

    def with_extra(kernels, processes):
        answers.extend(real([*kernels, *EXTRA], processes))
        return iter(answers[: len(kernels)])

    real = compiling.compiled
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        patch.setattr(compiling, "compiled", with_extra)
        predicted = static.predict(cases, "H200", processes=1)
    return predicted, answers[-len(EXTRA) :]


@pytest.fixture(scope="module")
def predicted(compiled):
    return compiled[0]


def test_gpus_are_those_of_the_cost_model():
    assert static.GPUS.keys() == cost_model.RATES.keys()
    assert set(static.GPUS.values()) <= set(machine_code.ARCHITECTURES)
    for gpu, arch in static.GPUS.items():
        assert cost_model.rates(PROBLEM.replace(device=gpu, arch=arch)) is cost_model.RATES[gpu]


def test_predictions_are_the_rankings(cases, predicted):
    predictions, _ = predicted
    for case in cases:
        ranked = ranking(static._problem(case, "H200"))
        mine = [p for p in predictions if p.case == case.key]
        assert [p.rank for p in mine] == list(range(1, len(mine) + 1))
        assert [p.engine for p in mine] == list(dict.fromkeys(engine.NAME for _, engine, _ in ranked))
        for prediction in mine:
            best = next(item for item in ranked if item[1].NAME == prediction.engine)
            assert (prediction.predicted_us, prediction.config) == (best[0] * 1e6, str(best[2]))


@pytest.mark.parametrize("channels, bound", [(512, "compute"), (8, "memory")])
def test_roofline_and_what_makes_it(channels, bound):
    problem = PROBLEM.replace(in_channels=channels, out_channels=channels, input_size=(64,) * 3)
    case = workloads.cases(workloads.suite("sweep.channels"))[0]
    config = implicit_gemm.configs(problem)[0]
    found = static._prediction(case, problem, "H200", 1, 1.0, implicit_gemm, config, "")
    rates = cost_model.RATES["H200"]
    times = {"compute": problem.flops / rates.tensor, "memory": problem.min_bytes / rates.bandwidth}
    assert found.predicted_bound == bound and found.predicted_roofline_us == pytest.approx(1e6 * times[bound])
    assert times[bound] == max(times.values())


def test_predicted_bytes_are_those_of_the_launch():
    work = implicit_gemm.work(PROBLEM, SMALL)
    read = work.programs * work.iterations * (32 + 16) * 16 * 2
    assert static._bytes(PROBLEM, implicit_gemm, SMALL) == read + work.programs * 32 * 16 * 2


def test_every_kernel_of_the_predictions_is_reported(predicted):
    predictions, variants = predicted
    numbers = {int(number) for p in predictions for number in p.kernels.split()}
    assert numbers == {variant.number for variant in variants} and len(numbers) == len(variants) >= 3
    assert {v.result.report.kernel for v in variants} == {"gather_gemm", "wgrad_gemm", "reduce_splits"}
    by_number = {variant.number: variant for variant in variants}
    for prediction in predictions:
        kernels = [by_number[int(number)].result.report for number in prediction.kernels.split()]
        assert {report.engine for report in kernels} == {prediction.engine} & {"implicit_gemm"}
        if kernels:
            assert kernels[0].pass_ == prediction.case.split("/")[1] and kernels[0].arch == "sm_90"
            same_tile = kernels[0].config.split(" splits")[0] == prediction.config.split(" splits")[0]
            assert same_tile and kernels[0].matrix and kernels[0].registers > 0
    assert sum(variant.uses for variant in variants) == sum(len(p.kernels.split()) for p in predictions)


@pytest.mark.parametrize(
    "changes, config, same",
    [
        ({"batch": 4, "input_size": (16, 24, 32)}, SMALL, True),
        ({"in_channels": 128}, SMALL, True),
        ({"in_channels": 60}, SMALL, False),  # narrower vectors, a last block that is not full
        ({"dtype": "bfloat16"}, SMALL, False),
        ({"arch": "sm_80"}, SMALL, False),
        ({"bias": True}, SMALL, False),
        ({"kernel_size": (4, 4, 4)}, SMALL, False),  # more taps than bits
        ({"index64": True}, SMALL, False),
        ({}, dataclasses.replace(SMALL, num_stages=3), False),
    ],
    ids=lambda value: "-".join(value) or "config" if isinstance(value, dict) else "",
)
def test_launches_share_a_variant_only_if_their_code_is_alike(changes, config, same, monkeypatch):
    monkeypatch.setattr(base, "interpreted", lambda: False)  # which compiles for other types than the GPU
    (first,), (second,) = (
        compiling.variants(problem, implicit_gemm, of)
        for problem, of in ((PROBLEM, SMALL), (PROBLEM.replace(**changes), config))
    )
    assert (first == second) == same


@pytest.mark.parametrize("pass_", ["forward", "dgrad", "wgrad"])
@pytest.mark.parametrize("layout", ["channels_last", "contiguous"])
def test_variants_of_every_pass_and_layout(pass_, layout):
    problem = PROBLEM.replace(pass_=pass_, layouts=(layout,) * 3)
    names = [variant[1] for variant in compiling.variants(problem, implicit_gemm, dataclasses.replace(SMALL, splits=3))]
    assert names == ["wgrad_gemm" if pass_ == "wgrad" else "gather_gemm", "reduce_splits"]


def test_a_launch_that_does_not_compile_gives_its_reason(compiled):
    broken, sound, _ = compiled[1]
    assert isinstance(broken, str) and "CompilationError" in broken
    assert sound.report.kernel == "gather_gemm" and sound.report.vectors  # 4 groups of 4 channels are one copy


def test_other_engines_load_element_by_element(compiled):
    code = compiled[1][2]
    assert code.report.kernel == "folded_gemm" and not code.report.wide_copies and not code.report.vectors
    assert code.report.gemm and code.report.matrix and code.faults == ()


def test_a_process_that_dies_is_an_error(monkeypatch):
    monkeypatch.setattr(compiling, "_COMMAND", (sys.executable, "-c", "raise SystemExit(3)"))
    with pytest.raises(RuntimeError, match="ended early, with status 3"):
        list(compiling.compiled(EXTRA, processes=1))


def test_answers_come_in_order_and_nothing_is_left_running(monkeypatch):
    """Each of the processes answers with the batch sizes that it was asked for, and would not end by itself soon."""
    code = (
        "import json, pickle, sys, time\n"
        "for kernel in pickle.load(sys.stdin.buffer): print(json.dumps(str(kernel.problem.batch)), flush=True)\n"
        "time.sleep(20)"
    )
    monkeypatch.setattr(compiling, "_COMMAND", (sys.executable, "-c", code))
    started = []
    popen = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: started.append(popen(*a, **k)) or started[-1])
    begin = time.monotonic()
    kernels = [Kernel(PROBLEM.replace(batch=n), "implicit_gemm", SMALL, 0) for n in range(5)]
    answers = compiling.compiled(kernels, processes=2)
    assert list(answers) == ["0", "1", "2", "3", "4"]
    assert (
        len(started) == 2 and all(process.poll() is not None for process in started) and time.monotonic() - begin < 15
    )


def header_cells(markdown: str) -> set[str]:
    lines = markdown.splitlines()
    headers = [above for above, below in zip(lines, lines[1:], strict=False) if below.startswith("| ---")]
    return {cell.strip() for header in headers for cell in header.strip("|").split("|")}


def test_report_calls_its_figures_predictions(predicted):
    text = static.markdown(*predicted, "H200")
    assert text.splitlines()[0] == "# Predictions for H200 (sm_90): nothing here was measured"
    engines = {p.engine for p in predicted[0]}
    assert {f"predicted {name}" for name in (*engines, "roofline", "MB")} <= header_cells(text)
    assert not engines & header_cells(text)


def test_report_shows_each_case_and_kernel_once(predicted, cases):
    predictions, variants = predicted
    lines = static.markdown(predictions, variants, "H200").splitlines()
    for case in cases:
        (line,) = [line for line in lines if line.startswith(f"| c320_k320_3x3x3_8x8x8 | {case.pass_} |")]
        ours = next(p for p in predictions if p.case == case.key and p.kernels)
        assert ours.config in line and line.endswith(f"| {ours.kernels} |") and line.count("**") == 2
    code = lines[lines.index("## Machine code") :]
    assert len([line for line in code if line.startswith("| ")]) == 2 + len(variants)


@pytest.mark.parametrize("suite", ["mednext_L_k3", "x3d_m"])
def test_report_shows_a_depthwise_layer_before_and_after(suite, monkeypatch):
    """Predicted time and bytes: with the implicit GEMM, and with the engine that is chosen."""
    monkeypatch.setattr(compiling, "compiled", lambda kernels, processes: iter(["not compiled"] * len(kernels)))
    (case, *_) = (c for c in workloads.cases(workloads.suite(suite), ("forward",)) if c.workload.layer.groups > 1)
    predictions, _ = static.predict([case], "H200", processes=1)
    header, _, line = static._suite_table(predictions).splitlines()
    cells = dict(zip((c.strip() for c in header.split("|")), (c.strip() for c in line.split("|")), strict=True))
    by = {p.engine: p for p in predictions}
    assert predictions[0].engine == "depthwise" and cells["predicted depthwise"].startswith("**")
    assert cells["predicted implicit_gemm"] == static.duration(by["implicit_gemm"].predicted_us)
    assert cells["predicted MB"] == static._megabytes(by["depthwise"].predicted_bytes)
    assert cells["predicted MB by implicit_gemm"] == static._megabytes(by["implicit_gemm"].predicted_bytes)
    assert by["depthwise"].predicted_bytes < by["implicit_gemm"].predicted_bytes / 4


def test_faults_come_first_and_fail(predicted, monkeypatch, capsys):
    predictions, variants = predicted
    spilling = dataclasses.replace(variants[0], result=dataclasses.replace(variants[0].result, faults=("7 spills",)))
    broken = dataclasses.replace(variants[1], result="CompilationError: no")
    found = [spilling, broken, *variants[2:]]
    text = static.markdown(predictions, found, "H200")
    section = text.split("## Faults")[1].split("##")[0]
    assert f"| 1 | 7 spills | implicit_gemm | {variants[0].kernel.config} | {variants[0].kernel.problem} |" in section
    assert "| 2 | CompilationError: no | implicit_gemm |" in section
    assert text.index("## Faults") < text.index("## nnunet3d")
    monkeypatch.setattr(static, "predict", lambda *arguments: settings.current().engine or (predictions, found))
    with settings.configure(engine="aten"):  # predictions are of every engine all the same
        assert cli.main(["static", "--suite", "nnunet3d"]) == 1
    assert "2 of them with faults" in capsys.readouterr().err


def test_command_writes_each_format(predicted, tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    asked = []
    monkeypatch.setattr(static, "predict", lambda *arguments: asked.append(arguments) or predicted)
    files = [tmp_path / "new" / f"x{ending}" for ending in (".md", ".csv", ".png")]
    command = ["static", "--suite", "nnunet3d", "--filter", LAYER, "--processes", "3", "--out", *map(str, files)]
    assert cli.main(command) == 0
    ((cases, gpu, processes),) = asked
    assert {case.workload.id for case in cases} == {LAYER} and (gpu, processes) == ("H200", 3)
    assert files[0].read_text() == static.markdown(*predicted, "H200")
    with open(files[1], newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["case"] for row in rows] == [p.case for p in predicted[0]]
    facts = {"suite", "model", "case", "gpu", "engine", "rank", "config", "flops", "min_bytes", "kernels"}
    assert all(name.startswith("predicted_") for name in set(rows[0]) - facts)
    assert files[2].read_bytes().startswith(b"\x89PNG") and not capsys.readouterr().out


def test_map_of_tiles_is_called_a_prediction(predicted, cases, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    drawn = []
    figures = plots.figures()
    heat_map = figures.heat_map
    monkeypatch.setattr(figures, "heat_map", lambda *arguments: drawn.append(arguments) or heat_map(*arguments))
    static.write(tmp_path / "tiles.png", *predicted, cases)
    ((shares, title, _),) = drawn
    assert title.startswith("Prediction of the cost model for H200, nothing measured")
    assert set(shares) == {"forward", "wgrad"}
    for pass_, cells in shares.items():
        problem = static._problem(next(c for c in cases if c.pass_ == pass_), "H200")
        assert set(cells) == {(c.block_m, c.block_n) for c in implicit_gemm.configs(problem)}
        assert max(share for share, _ in cells.values()) == 1.0


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--suite", "nnunet4d"], "no suite named 'nnunet4d'"),
        (["--filter", "nothing like it"], "matches no case"),
        (["--out", "x.txt"], "--out x.txt: its name must end in one of .md, .csv, .png"),
        (["--processes", "0"], "--processes 0"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_mistakes(arguments, message, capsys):
    assert cli.main(["static", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_an_unknown_gpu(capsys):
    with pytest.raises(SystemExit):
        cli.main(["static", "--gpu", "V100"])
    message = capsys.readouterr().err
    assert all(gpu in message for gpu in static.GPUS)


def test_report_and_prediction_are_plain_data():
    for kind in (Report, Prediction):
        assert {field.type for field in dataclasses.fields(kind)} <= {"str", "int", "float", "bool"}
