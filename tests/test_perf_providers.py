"""Providers: each computes what it is asked for, in its memory format, and no switch is left changed."""

from __future__ import annotations

import dataclasses
import sys
import types

import perf_cases
import pytest
import torch
import torch.nn.functional as F
from cases import DEVICE

from perf import calls, providers, workloads
from perf.checking import Reference
from perf.providers import PROVIDERS, FlagGems, alike, cudnn_benchmark
from perf.tensors import Tensors
from perf.workloads import LAYOUTS, PASSES, PRECISIONS, TRAIN, Case, Workload
from triton_conv3d import engines, settings
from triton_conv3d.tuning import forget, quarantine, select

TORCH = ("torch", "torch_cl", "torch_bench", "torch_cl_bench")


def prepared(name: str, case):
    return PROVIDERS[name].prepare(case, Tensors(case, DEVICE))


class TestResults:
    @pytest.mark.parametrize("pass_", (*PASSES, TRAIN))
    @pytest.mark.parametrize("layer", perf_cases.WORKLOADS)
    @pytest.mark.parametrize("name", ("ours", "implicit_gemm", *TORCH))
    def test_right(self, name, layer, pass_):
        case = perf_cases.case(layer, pass_)
        tensors = Tensors(case, DEVICE)
        with alike(case):
            ready = PROVIDERS[name].prepare(case, tensors)
            if pass_ == TRAIN and name == "implicit_gemm":
                assert "single passes" in ready
                return
            results = ready.call()
        for problem, result in zip(tensors.problems, results, strict=True):
            right, error = Reference(problem, tensors.operands(problem)).judge(result, coarse=True)
            assert right and error < 1e-2, problem

    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_ours_in_both_layouts(self, layout):
        case = perf_cases.case(layout=layout)
        (result,) = prepared("ours", case).call()
        assert result.is_contiguous(memory_format=LAYOUTS[layout])

    @pytest.mark.parametrize("pass_", PASSES)
    def test_every_engine_alone_where_it_can(self, pass_):
        layer = dataclasses.replace(perf_cases.LAYER, kernel_size=(1, 1, 1), stride=(1, 1, 1), padding=(0, 0, 0))
        case = Case(Workload(layer, "t", "tiny"), pass_, "fp32")
        tensors = Tensors(case, DEVICE)
        judged = Reference(tensors.problems[0], tensors.operands(tensors.problems[0]))
        for name in engines.available():
            ready = PROVIDERS[name].prepare(case, tensors)
            if isinstance(ready, str):
                assert ready == engines.get(name).supports(tensors.problems[0]) and name not in ("matmul", "aten")
            else:
                assert judged.judge(ready.call()[0])[0], name


class TestTiles:
    @pytest.mark.parametrize("pass_", PASSES)
    def test_each_config_is_a_provider(self, pass_):
        case = perf_cases.case(pass_=pass_)
        tensors = Tensors(case, DEVICE)
        (problem,) = tensors.problems
        judged = Reference(problem, tensors.operands(problem))
        ready = [tile.prepare(case, tensors) for tile in providers.get(["implicit_gemm:tiles"])]
        reasons = [why for why in ready if isinstance(why, str)]
        ready = ready[: -len(reasons)]
        assert set(reasons) == {f"implicit_gemm has {len(ready)} tiles for it"}
        found = [one.plans()[0].config for one in ready]
        whole = {dataclasses.replace(config, splits=1) for config in engines.get("implicit_gemm").configs(problem)}
        assert len(found) == len(whole) and {dataclasses.replace(config, splits=1) for config in found} == whole
        assert all(judged.judge(one.call()[0])[0] for one in (ready[0], ready[-1]))

    def test_there_are_providers_for_all_of_them(self):
        cases = workloads.cases(workloads.suite("nnunet3d"), PASSES, ["bf16"])
        problems = [problem for case in cases for problem in case.problems("NVIDIA H200", "sm_90")]
        most = max(
            len(providers.tiles(problem, engine))
            for problem in problems
            for engine in engines.available().values()
            if engine.supports(problem) is None
        )
        assert 14 <= most <= providers._MOST_TILES

    def test_what_they_cannot_do(self):
        (tile, *_) = providers.get(["depthwise:tiles"])
        assert "single passes" in tile.prepare(perf_cases.case(pass_=TRAIN), None)
        case = perf_cases.case(pass_="wgrad")
        assert "groups=1" in tile.prepare(case, Tensors(case, DEVICE))
        with pytest.raises(ValueError, match="'torch:tiles'.* implicit_gemm:tiles"):
            providers.get(["torch:tiles"])


class TestTensors:
    @pytest.mark.parametrize("name, layout", [("torch", "contiguous"), ("torch_cl", "channels_last")])
    @pytest.mark.parametrize("pass_", (*PASSES, TRAIN))
    def test_torch_finds_them_in_the_format_it_is_named_for(self, monkeypatch, name, layout, pass_):
        seen: list[torch.Tensor] = []

        def spy(function):
            return lambda *args: (
                seen.extend(t for t in args[:3] if torch.is_tensor(t) and t.dim() == 5) or function(*args)
            )

        monkeypatch.setattr(F, "conv3d", spy(F.conv3d))
        monkeypatch.setattr(
            torch.ops.aten, "convolution_backward", spy(torch.ops.aten.convolution_backward), raising=False
        )
        prepared(name, perf_cases.case("plain", pass_)).call()
        assert len(seen) == (2 if pass_ in ("forward", TRAIN) else 3)
        assert all(tensor.is_contiguous(memory_format=LAYOUTS[layout]) for tensor in seen)

    def test_the_same_values_in_both_layouts_and_other_ones_for_other_tensors(self):
        tensors = Tensors(perf_cases.case("plain", TRAIN), DEVICE)
        for name in ("input", "weight", "grad"):
            one, other = (tensors.get(name, layout) for layout in LAYOUTS)
            assert torch.equal(one, other) and one.stride() != other.stride()
            assert one is tensors.get(name, "channels_last") and 0.5 < one.abs().max() <= 1
        assert tensors.get("input", "contiguous")[0, 0, 0, 0, 0] != tensors.get("grad", "contiguous")[0, 0, 0, 0, 0]

    def test_bytes_of_what_is_read(self):
        layer = perf_cases.LAYER
        sizes = {name: torch.Size(getattr(layer, f"{name}_shape")).numel() for name in ("input", "weight", "output")}
        bytes_read = {p: Tensors(perf_cases.case("plain", p), DEVICE).bytes_read for p in (*PASSES, TRAIN)}
        assert bytes_read == {
            "forward": 2 * (sizes["input"] + sizes["weight"] + layer.out_channels),
            "dgrad": 2 * (sizes["output"] + sizes["weight"]),
            "wgrad": 2 * (sizes["input"] + sizes["output"]),
            TRAIN: 2 * (sum(sizes.values()) + layer.out_channels),
        }


class TestPlans:
    @pytest.mark.parametrize("layer", perf_cases.WORKLOADS)
    def test_ours_is_asked_for_the_problems_of_the_case(self, monkeypatch, layer):
        """What the plan in the row is looked up by is what the ops have posed: the three are in memory already."""
        case = perf_cases.case(layer, TRAIN)
        tensors = Tensors(case, DEVICE)
        forget()
        with alike(case):
            ready = PROVIDERS["ours"].prepare(case, tensors)
            ready.call()
            chosen: list = []
            module = sys.modules[select.__module__]
            monkeypatch.setattr(module, "_choose", lambda *args: chosen.append(args) or pytest.fail("not posed before"))
            assert [plan.engine for plan in ready.plans()] and len(ready.plans()) == 3 and not chosen

    def test_an_engine_alone_is_that_engine_and_the_setting_is_given_back(self):
        ready = prepared("aten", perf_cases.case())
        (plan,) = ready.plans()
        assert plan.engine == "aten" and settings.current().engine is None

    def test_an_engine_with_no_config_left_says_so(self, monkeypatch):
        monkeypatch.setattr(quarantine, "quarantined", lambda engine, config, arch: engine == "implicit_gemm")
        forget()
        with pytest.warns(RuntimeWarning):
            reason = prepared("implicit_gemm", perf_cases.case())
        assert reason == "every config failed to launch or gave a wrong result"


class TestSwitches:
    @staticmethod
    def state():
        cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
        return (
            cudnn.benchmark, cudnn.allow_tf32, cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision, matmul.allow_tf32,
            matmul.fp32_precision, settings.current(),
        )  # fmt: skip

    @pytest.fixture(
        params=[(False, True, False, "ieee"), (True, False, True, "tf32"), (False, True, False, "none")],
        ids=("as usual", "the other way", "not set"),
    )
    def before(self, request):
        cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
        old = (cudnn.benchmark, cudnn.allow_tf32, matmul.allow_tf32, matmul.fp32_precision)
        cudnn.benchmark, cudnn.allow_tf32, matmul.allow_tf32, matmul.fp32_precision = request.param
        with settings.configure(engine="aten" if request.param[0] else None, fp32="torch"):
            yield self.state()
        cudnn.benchmark, cudnn.allow_tf32, matmul.allow_tf32, matmul.fp32_precision = old

    @pytest.mark.parametrize("precision", PRECISIONS)
    def test_everybody_computes_in_the_cases_precision(self, before, precision):
        with alike(perf_cases.case("transposed", precision=precision)):
            assert settings.current().fp32 == precision and settings.current().engine is None
            tf32 = precision == "tf32"
            assert torch.backends.cudnn.allow_tf32 is tf32 and torch.backends.cuda.matmul.allow_tf32 is tf32
            assert (torch.backends.cudnn.conv.fp32_precision == "tf32") == tf32
            assert torch.backends.cudnn.benchmark is False
        assert self.state() == before

    def test_sixteen_bit_types_keep_torchs_switches(self, before):
        with alike(perf_cases.case()):
            assert self.state()[1:-1] == before[1:-1]
        assert self.state() == before

    def test_given_back_after_an_error(self, before):
        with pytest.raises(KeyError), alike(perf_cases.case("transposed")), cudnn_benchmark(True):
            raise KeyError
        assert self.state() == before

    @pytest.mark.parametrize("name", TORCH)
    def test_benchmark_only_where_it_is_in_the_name(self, monkeypatch, name):
        seen = []
        conv3d = F.conv3d
        monkeypatch.setattr(F, "conv3d", lambda *a: seen.append(torch.backends.cudnn.benchmark) or conv3d(*a))
        case = perf_cases.case()
        with alike(case):
            ready = prepared(name, case)
            with ready.context():
                ready.call()
            assert torch.backends.cudnn.benchmark is False
        assert seen == [name.endswith("_bench")]


@pytest.mark.parametrize("name", (*TORCH, "compile"))
def test_torch_has_no_tf32x3(name):
    assert prepared(name, perf_cases.case("transposed", precision="tf32x3")) == "torch has no tf32x3"


@pytest.mark.parametrize("pass_", (*PASSES, TRAIN))
@pytest.mark.parametrize("layer", perf_cases.WORKLOADS)
def test_compile_starts_afresh_for_every_case(monkeypatch, layer, pass_):
    """With a stand-in for the compiler: what it is handed, and that nothing of another case is left."""
    log: list = []
    monkeypatch.setattr(torch._dynamo, "reset", lambda: log.append("reset"))
    monkeypatch.setattr(torch, "compile", lambda function, mode: log.append(mode) or function)
    monkeypatch.setattr(torch._dynamo, "mark_static_address", lambda tensor: log.append(tuple(tensor.shape)))
    case = perf_cases.case(layer, pass_)
    ready = prepared("compile", case)
    assert log[:2] == ["reset", "max-autotune"] and ready.warmups == 3
    x = case.workload.layer.output_shape if layer == "transposed" else case.workload.layer.input_shape
    assert x in log[2:]
    expected = prepared("torch_cl", case).call()
    for result, other in zip(ready.call(), expected, strict=True):
        torch.testing.assert_close(result, other)
    ready.end()
    assert log[-1] == "reset"


@pytest.mark.parametrize(
    "case, reason",
    [
        (perf_cases.case("plain", "dgrad"), "it has the forward convolution only"),
        (perf_cases.case("transposed"), "it has the forward convolution only"),
        (perf_cases.case("plain", "forward", "fp32", precision="tf32"), "it computes float32 as ieee, not as tf32"),
    ],
    ids=("gradient", "transposed", "tf32"),
)
def test_flag_gems_says_what_it_cannot_do(case, reason):
    assert FlagGems().prepare(case, Tensors(case, DEVICE)) == reason


def test_flag_gems_is_called_as_torch_is(monkeypatch):
    monkeypatch.setitem(sys.modules, "flag_gems", types.ModuleType("flag_gems"))
    monkeypatch.setitem(sys.modules, "flag_gems.ops", types.SimpleNamespace(conv3d=F.conv3d))
    case = perf_cases.case()
    (result,) = FlagGems().prepare(case, Tensors(case, DEVICE)).call()
    assert torch.equal(result, prepared("torch", case).call()[0])


class TestGet:
    def test_in_the_order_asked_for_and_each_once(self):
        assert [p.name for p in providers.get(["torch", "ours", "torch"])] == ["torch", "ours"]

    def test_every_engine_is_one(self):
        assert {*engines.available(), "ours", "compile", *TORCH} <= set(PROVIDERS)
        assert all(provider.name == name for name, provider in PROVIDERS.items())


@pytest.mark.parametrize("layer", perf_cases.WORKLOADS)
def test_the_module_of_a_layer_is_what_the_model_has(layer):
    case = perf_cases.case(layer)
    tensors = Tensors(case, DEVICE)
    module = calls.as_module(case, tensors, "contiguous")
    x, grad = calls.outside(case, tensors, "contiguous")
    assert (module.in_channels, module.out_channels) == (x.shape[1], grad.shape[1])
    assert (module.bias is None) == (layer == "transposed") and x.requires_grad


def test_output_padding():
    assert calls.output_padding(perf_cases.case("transposed")) == (0, 0, 1)
