"""What the slices of the acceptance compute, on tiny shapes in the interpreter, and that each sees what is wrong."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import types
import warnings

import cache_entries
import pytest
import torch
from perf_cases import DEVICE, STAMP, machine

from perf import end_to_end, results, timing
from perf import networks as whole
from perf.networks import INFER
from perf.providers import PROVIDERS, Prepared
from perf.results import FAILED, MEMORY, OK, UNSUPPORTED, WRONG
from perf.threads import MAIN
from perf.validation import DeviceLost, Outcome, Setting, bench, exact, large, networks, repeats, report, tune
from perf.workloads import Case, Workload, cases, real
from triton_conv3d import engines, reference
from triton_conv3d.problem import PASSES, Operands, Problem, layout_of
from triton_conv3d.tuning import proof, table
from triton_conv3d.tuning.cache import PlanCache
from triton_conv3d.tuning.environment import environment
from triton_conv3d.tuning.plan import Plan
from triton_conv3d.workload import Layer

GEMM = engines.get("implicit_gemm")


def layer(size=(2, 3, 4), channels=3, filters=5, kernel=(2, 1, 2), dtype="fp16", batch=2) -> Layer:
    return Layer("tiny.layer", batch, channels, filters, size, kernel, (1,) * 3, (0,) * 3, (1,) * 3, 1, False, dtype)


TINY = Workload(layer(), "tiny", "Tiny")
ILLEGAL = RuntimeError("CUDA error: an illegal memory access was encountered")


@pytest.fixture
def where(tmp_path) -> Setting:
    """A machine without a GPU that is said to have one."""
    setting = Setting(tmp_path, STAMP.gpu, 2**40)
    setting.__dict__["machine"] = machine()
    return setting


def launching(monkeypatch, change):
    """Every result of an engine that is not torch's own goes through ``change``."""
    for engine in engines.available().values():
        if engine.NAME != "aten":
            launch = engine.launch
            monkeypatch.setattr(engine, "launch", lambda *args, launch=launch: change(launch(*args)))


def illegal(result: torch.Tensor):
    raise ILLEGAL


def off_by_one(result: torch.Tensor) -> torch.Tensor:
    result[(-1,) * 5] += 1
    return result


def out_of_resources(result: torch.Tensor):
    raise RuntimeError("out of resource: shared memory")


# Exact integers


@pytest.mark.parametrize("pass_", PASSES)
@pytest.mark.parametrize("size", [(3, 4, 5), (90, 300, 300)], ids=["short", "long"])
def test_sums_of_the_integers_stay_exact(pass_, size):
    """Of as many products as the problem has: the operands themselves are samples of what it would read."""
    problem = Problem(pass_, 1, 16, 16, size, (3, 3, 3), dtype="bfloat16")
    products = reference.reduction(problem)
    sample = [torch.empty(200_000, dtype=torch.bfloat16) for _ in range(2)]
    exact.fill(problem, Operands(*sample))
    assert {value.item() for tensor in sample for value in tensor.unique()} == {-1.0, 0.0, 1.0}
    share = (sample[0] * sample[1].roll(1)).abs().float().mean().item()
    assert share * products <= 1.05 * 2**22 and share <= 0.26
    assert share * products > 2**20 or share > 0.2  # and there is something to be wrong


def test_every_element_is_compared():
    case = large.CASES["batch_65537"]
    small = dataclasses.replace(case, layer=layer(size=(4, 3, 3)))
    for pass_ in PASSES:
        problem, operands = large.make(small, pass_, DEVICE)
        result = GEMM.launch(problem, operands, GEMM.configs(problem)[-1])
        assert exact.differing(problem, operands, result, elements=30) == 0
        result[0, 0, 0, 0, 0] += 1
        result[-1, -1, -1, -1, -1] -= 1
        assert exact.differing(problem, operands, result, elements=30) == 2


def test_plans_are_of_every_engine_but_torchs_own():
    problem = Problem("forward", 2, 64, 64, (8, 8, 8), (1, 1, 1), arch="interpreter")
    found = list(exact.plans(problem, 2))
    assert {engine.NAME for engine, _ in found} >= {"implicit_gemm", "matmul"}
    assert "aten" not in {engine.NAME for engine, _ in found} and len(set(map(str, found))) == len(found)
    offers = [config for engine, config in found if engine is GEMM]
    assert len(offers) == 3 and offers[-1] == GEMM.configs(problem)[-1]


@pytest.mark.parametrize("trial", [False, True])
def test_engines_on_trial_have_steps_of_their_own(trial):
    """A kernel of theirs that hangs, or takes the device, then costs no other engine its results."""
    problem = Problem("forward", 2, 64, 64, (8, 8, 8), (3, 3, 3), arch="sm_90", device="NVIDIA H200", dtype="float16")
    found = {engine.NAME for engine, _ in exact.plans(problem, 1, trial)}
    assert found == ({"hopper"} if trial else {"implicit_gemm", "tma", "halo"})
    names = [step.name for step in large.steps(Setting(None))]
    assert [exact.parted(name) for name in names] == [(name, on) for on in (False, True) for name in large.CASES]


# Large tensors

TINY_SIZES = {
    "input_of_2^31_elements": (4, 3, 5), "output_above_2^31_elements": (3, 2, 3), "above_2^31_bytes": (2, 3, 3),
    "crossed_inside_a_sample": (2, 1, 2), "strided_dgrad": (6, 5, 4), "wgrad_over_1.3e8_pixels": (4, 4, 3),
    "view_of_a_huge_buffer": (3, 4, 5), "batch_65537": (2, 3, 3),
}  # fmt: skip


def tiny(name: str) -> large.Large:
    case = large.CASES[name]
    batch, filters = min(case.layer.batch, 3), min(case.layer.out_channels, 8)
    small = dataclasses.replace(case.layer, input_size=TINY_SIZES[name], batch=batch, out_channels=filters)
    return dataclasses.replace(case, layer=small, gap=case.gap and 2**14)


@pytest.mark.parametrize("name", large.CASES)
def test_large_cases_at_a_tiny_size(name):
    outcome = large.check(tiny(name), DEVICE, elements=200)
    assert outcome.status == OK and outcome.checks >= len(tiny(name).passes)


@pytest.mark.parametrize("name", large.CASES)
def test_large_cases_are_what_they_are_named_for(name):
    case = large.CASES[name]
    for pass_ in case.passes:
        problem = case.case(pass_).problems()[0]
        numel = max(map(math.prod, (problem.input_shape, problem.output_shape)))
        assert problem.index64 or case.gap or numel < 2**31
        if name == "batch_65537":
            assert problem.batch == 2**16 + 1
        elif name.startswith("wgrad"):
            assert problem.pass_ == "wgrad" and problem.pixels > 1.3e8
        elif name.endswith("bytes"):
            assert numel * problem.itemsize > 2**31
        elif case.gap:
            assert (problem.input_size[0] - 1) * case.gap >= 2**31
        else:
            assert numel == 2**31 if "_of_" in name else numel > 2**31
    assert case.memory < 75 * 2**30  # of the GPUs in use the smallest has 79 GiB


@pytest.mark.parametrize("name", ["batch_65537", "view_of_a_huge_buffer"])
def test_large_problems_describe_their_tensors(name):
    problem, operands = large.make(tiny(name), "forward", DEVICE)
    assert problem.layouts[:2] == (layout_of(operands.input), layout_of(operands.weight))
    assert problem.layouts[0] == ("view" if tiny(name).gap else "channels_last")


def test_a_wrong_element_of_a_large_tensor_is_seen(monkeypatch):
    launching(monkeypatch, off_by_one)
    outcome = large.check(tiny("batch_65537"), DEVICE)
    assert outcome.status == WRONG and "forward: 1 elements by implicit_gemm [block_m=" in outcome.reason


def test_a_config_that_does_not_fit_is_no_fault(monkeypatch):
    launching(monkeypatch, out_of_resources)
    assert large.check(tiny("batch_65537"), DEVICE) == Outcome(OK, "", 0)


def test_what_raises_is_named_and_the_others_go_on_until_the_device_is_lost(monkeypatch):
    checks = large.check(tiny("batch_65537"), DEVICE).checks
    monkeypatch.setattr(GEMM, "launch", lambda *args: 1 / 0)
    outcome = large.check(tiny("batch_65537"), DEVICE)
    assert outcome.status == WRONG and 0 < outcome.checks < checks
    assert "forward: implicit_gemm [block_m=" in outcome.reason and "raised ZeroDivisionError" in outcome.reason
    launching(monkeypatch, illegal)
    outcome = large.check(tiny("batch_65537"), DEVICE)
    assert outcome.reason.count("raised") == 1 and "illegal memory access" in outcome.reason


def test_large_cases_are_computed_by_name(monkeypatch):
    monkeypatch.setattr(large, "check", lambda case, device, trial: (case, device.type, trial))
    case = large.CASES["batch_65537"]
    assert [large.compute(f"batch_65537{more}") for more in ("", ", on trial")] == [(case, "cuda", on) for on in (False, True)]


def test_too_little_memory_is_named(monkeypatch):
    monkeypatch.setattr(large.child, "step", lambda module, name, limit: Outcome(checks=1))
    outcomes = {step.name: step.run(60.0) for step in large.steps(Setting(None, "GPU", 11 * 2**30))}
    assert {outcome.status for outcome in outcomes.values()} == {OK, MEMORY}
    assert "GiB, this GPU has 11.0 GiB" in outcomes["above_2^31_bytes"].reason


# Repeat runs


def repeated(pass_: str = "forward") -> Outcome:
    return repeats.check([Case(TINY, pass_, dtype) for dtype in ("fp16", "fp32")], DEVICE, runs=2)


@pytest.mark.parametrize("pass_", PASSES)
def test_equal_bits(pass_):
    outcome = repeated(pass_)
    assert outcome.status == OK and outcome.checks >= 4


def test_other_bits_are_seen(monkeypatch):
    calls = iter(range(10**6))
    launching(monkeypatch, lambda result: off_by_one(result) if next(calls) % 4 == 3 else result)
    outcome = repeated()
    assert outcome.status == WRONG and "fp16 implicit_gemm [block_m=" in outcome.reason
    assert "1 of 2 runs gave other bits" in outcome.reason


def test_what_is_not_exact_is_seen(monkeypatch):
    launching(monkeypatch, off_by_one)
    assert "1 elements are not exact" in repeated().reason


def test_repeats_are_of_eight_real_layers_a_pass_and_what_reaches_every_engine(monkeypatch):
    names = [step.name for step in repeats.steps(Setting(None))]
    assert [name.split("/")[1] for name in names].count("wgrad") == 12
    assert len(repeats.LAYERS) == 8 and set(repeats.LAYERS) <= {workload.id for workload in real()}
    layers = repeats.workloads(*repeats.LAYERS, *repeats.BESIDE)
    problems = [p for case in cases(layers, PASSES, ("bf16", "fp32")) for p in case.problems("NVIDIA H200", "sm_90")]
    run = {name for name, engine in engines.available().items() if any(engine.supports(p) is None for p in problems)}
    assert run == set(engines.available())
    asked = []
    monkeypatch.setattr(repeats, "check", lambda cases, device, runs, trial: asked.append((cases, runs)))
    for name in names:
        repeats.compute(name)
    assert {len(cases) for cases, _ in asked} == {3} and {runs for _, runs in asked} == {100}


# Tuning


def stub(monkeypatch, plans=("measured",), error=None, told=()):
    """A provider that does as it is told."""

    def call():
        for category, text in told:
            warnings.warn(text, category, stacklevel=1)
        if error is not None:
            raise error

    prepared = Prepared(call, lambda: tuple(Plan("aten", None, source) for source in plans))
    monkeypatch.setitem(PROVIDERS, "ours", types.SimpleNamespace(thread=MAIN, prepare=lambda case, tensors: prepared))


CASE = Case(TINY, "forward", "fp16")


@pytest.mark.parametrize("how, status, told", [
    (dict(), OK, ""),
    (dict(plans=("cache",), told=[(UserWarning, "never mind")]), OK, ""),
    (dict(plans=("ranking",)), UNSUPPORTED, "tiny.layer/forward/fp16/ieee/channels_last: not tuned"),
    (dict(told=[(RuntimeWarning, "gave a wrong result")]), WRONG, "gave a wrong result"),
    (dict(error=torch.OutOfMemoryError("no room")), MEMORY, "no room"),
], ids=["measured", "known", "not_tuned", "wrong", "memory"])  # fmt: skip
def test_tuning(monkeypatch, how, status, told):
    stub(monkeypatch, **how)
    outcome = tune.tuned(CASE, torch.device("cpu"))
    assert outcome.status == status and told in outcome.reason and outcome.checks == (status != MEMORY)


def test_an_illegal_access_while_tuning_ends_the_process(monkeypatch):
    stub(monkeypatch, error=ILLEGAL)
    with pytest.raises(DeviceLost) as lost:
        tune.tuned(CASE, torch.device("cpu"))
    assert lost.value.outcome.status == FAILED and "tiny.layer/forward" in lost.value.outcome.reason


def test_tuning_a_layer_takes_its_three_passes(where, monkeypatch):
    monkeypatch.setattr(tune.workloads, "suite", lambda name: (TINY,))
    _, layer, _ = steps = tune.steps(where)
    assert [step.name for step in steps] == ["trial of hopper", "tiny.layer", "table"]
    stub(monkeypatch)
    assert layer.run(60.0) == Outcome(OK, "", 3)
    monkeypatch.undo()
    if DEVICE.type == "cpu":  # the whole way, but for what is never measured on a CPU
        outcome = tune._tune(where, TINY, 60.0)
        assert outcome.status == UNSUPPORTED and outcome.checks == 3


@pytest.mark.parametrize("found, expected", [
    ((True, None), Outcome(OK, "", 1)),
    ((True, "SIGSEGV"), Outcome(WRONG, "SIGSEGV")),
    ((False, "no GPU"), Outcome(UNSUPPORTED, "no GPU")),
], ids=("right", "wrong", "unknown"))  # fmt: skip
def test_an_engine_on_trial_is_tried_before_the_layers(where, new_process, monkeypatch, found, expected):
    tried = []
    monkeypatch.setattr(proof, "_try", lambda *engine: tried.append(engine) or proof.Outcome(*found))
    step = tune.steps(where)[0]
    with contextlib.nullcontext() if expected.status != WRONG else pytest.warns(UserWarning, match="failed its trial"):
        assert step.run(60.0) == expected
    assert step.run(60.0) == expected and tried == [("hopper", 0)]
    assert step.patience > proof.SECONDS + proof.SILENT and len(proof.kept(where.cache)) == found[0]


def test_the_table_holds_what_was_measured_here(where):
    step = tune.steps(where)[-1]
    assert step.run(60.0) == Outcome(FAILED, f"{where.cache} holds no plans of this machine")
    names = environment(where.machine.device)
    problem = cache_entries.PROBLEM.replace(device=names["gpu"], arch=names["arch"])
    own = dataclasses.replace(cache_entries.ENTRY, problem=problem.to_dict(), environment=names)
    other = dataclasses.replace(own, environment={**own.environment, "driver": "another"})
    cache = PlanCache(where.cache)
    assert cache.store(own) and cache.store(other)
    assert step.run(60.0) == Outcome(OK, "", 1)
    written = table.read(table.path_for(where.out / "tables", own.environment["gpu"]))
    assert written.entries == (own,) and written.commit == STAMP.commit and written.policy == own.policy


# Benchmarks, networks and report


@pytest.fixture
def few_samples(monkeypatch):
    """And by the ranking's plans: where there is a GPU, tuning would find out what is planted, and use torch's own."""
    monkeypatch.setattr(timing, "SAMPLES", 1)
    monkeypatch.setattr(bench, "TUNING", "off")
    monkeypatch.setattr(torch, "compile", lambda module, **how: module)


def test_benchmarks_and_their_report(where, monkeypatch, few_samples):
    monkeypatch.setattr(bench.workloads, "suite", lambda name: (TINY,))
    (step,) = bench.steps(where)
    assert step.name == "tiny.layer" and step.run(0.0) is None  # the next call goes on
    assert step.run(60.0) == step.run(60.0) == Outcome(OK, "", 15)  # three passes, five providers
    rows = results.read(where.out / "core.csv")
    assert len(rows) == 15 and {row.status for row, _ in rows} == {OK} and {row.suite for row, _ in rows} == {"core"}

    network = whole.networks()["qwen2_vl"].shrunk()
    assert networks._measure(where, network, INFER, 60.0) == Outcome(OK, "", len(end_to_end.PROVIDERS))

    pytest.importorskip("matplotlib")
    (before,) = report.steps(where)
    assert before.run(60.0) == Outcome(OK, "", 1)
    assert list(where.out.rglob("*.png")) and list(where.out.rglob("*.md"))
    assert report.steps(where)[0].name == before.name
    with open(where.out / "core.csv", "a") as file:
        file.write("more")
    assert report.steps(where)[0].name != before.name


def test_a_wrong_result_of_a_benchmark_is_seen(where, monkeypatch, few_samples):
    launching(monkeypatch, lambda result: result + 1)
    outcome = bench._bench(where, TINY, 60.0)
    assert outcome.status == WRONG and outcome.checks == 15
    assert "tiny.layer/forward/fp16/ieee/channels_last by ours: forward is wrong" in outcome.reason


def test_a_device_lost_to_a_benchmark(where, monkeypatch, few_samples):
    def illegal(result):
        raise ILLEGAL

    with monkeypatch.context() as patch:
        launching(patch, illegal)
        with pytest.raises(DeviceLost) as lost:
            bench._bench(where, TINY, 60.0)
    assert lost.value.outcome is None
    again = bench._bench(where, TINY, 60.0)
    assert again.status == FAILED and "illegal memory access" in again.reason and again.checks == 15


def test_networks_go_on_where_the_budget_ended(where, few_samples):
    network = whole.networks()["qwen2_vl"].shrunk()
    assert networks._measure(where, network, INFER, 0.0) is None
    assert networks._measure(where, network, INFER, 60.0).checks == len(end_to_end.PROVIDERS)


def test_a_device_lost_to_a_network(where, monkeypatch, few_samples):
    network = whole.networks()["qwen2_vl"].shrunk()

    def illegal(module):
        raise ILLEGAL

    with monkeypatch.context() as patch:
        patch.setattr(end_to_end, "convert_conv3d", illegal)
        patch.setattr(end_to_end, "_compiled", lambda module, ours: illegal(module) if ours else module)
        for _ in range(2):  # ours, and ours compiled: each ends a process
            with pytest.raises(DeviceLost):
                networks._measure(where, network, INFER, 60.0)
        outcome = networks._measure(where, network, INFER, 60.0)
    assert outcome.status == FAILED and outcome.reason.count("illegal memory access") == 2


def test_networks_are_measured_in_both_modes(where):
    steps = networks.steps(where)
    assert [step.name for step in steps][:2] == ["nnunet3d/train", "nnunet3d/infer"] and len(steps) == 12
    assert all(step.keeps for step in steps)
