"""Suites, sweeps, cases and filters: what there is to be measured."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F

from perf import calls, workloads
from perf.workloads import PASSES, Case, sweeps

ENTRIES = {entry["id"]: entry for entry in json.loads(workloads.REAL.read_text())}
TRANSPOSED = [w for w in workloads.real() if w.transposed]


class TestSuites:
    def test_core_and_all(self):
        assert len(workloads.suite("core")) == 81 and len(workloads.suite("all")) == 176
        assert set(workloads.suite("core")) < set(workloads.suite("all"))

    @pytest.mark.parametrize("name", workloads.suites())
    def test_every_suite_has_cases_with_keys_of_their_own(self, name):
        cases = workloads.cases(workloads.suite(name), (*PASSES, "train"), layouts=workloads.LAYOUTS)
        assert cases and len({case.key for case in cases}) == len(cases)
        if name not in ("core", "all"):
            assert {case.workload.suite for case in cases} == {name}

    def test_a_list_has_each_layer_once(self):
        both = workloads.suite("core, nnunet3d")
        assert len(set(both)) == len(both) == len({*workloads.suite("core"), *workloads.suite("nnunet3d")})

    @pytest.mark.parametrize("name", ["resnet", "", "core,resnet", "sweep", "sweep.depth"])
    def test_an_unknown_suite_lists_what_exists(self, name):
        with pytest.raises(ValueError, match="no suite named .*: the suites are core, all, nnunet3d, .*sweep.size, "):
            workloads.suite(name)


class TestSweeps:
    @pytest.mark.parametrize("name", sweeps.NAMES)
    def test_one_size_is_varied_and_everything_fits(self, name):
        layers = [workload.layer for workload in workloads.suite(name)]
        values = [int(layer.id.split(".")[-1]) for layer in layers]
        assert values == sorted(set(values)) and len(values) >= 4
        for case in workloads.cases(workloads.suite(name), dtypes=("fp32",)):
            (problem,) = case.problems()
            assert problem.min_bytes < 4.5e9 and not problem.empty

    @pytest.mark.parametrize(
        "name, value, values",
        [
            ("channels", lambda layer: (layer.in_channels, layer.out_channels), [(v, v) for v in (8, 512)]),
            ("size", lambda layer: layer.input_size, [(8, 8, 8), (256, 256, 256)]),
            ("kernel", lambda layer: layer.kernel_size, [(1, 1, 1), (7, 7, 7)]),
            ("batch", lambda layer: layer.batch, [1, 32]),
            ("stride", lambda layer: layer.stride, [(1, 1, 1), (4, 4, 4)]),
            ("dilation", lambda layer: layer.dilation, [(1, 1, 1), (6, 6, 6)]),
            ("groups", lambda layer: layer.groups, [1, 64]),
            ("depthwise", lambda layer: (layer.groups, layer.in_channels), [(8, 8), (512, 512)]),
        ],
    )
    def test_from_the_smallest_to_the_largest(self, name, value, values):
        layers = [workload.layer for workload in workloads.suite(f"sweep.{name}")]
        assert [value(layers[0]), value(layers[-1])] == values

    @pytest.mark.parametrize("name", ["kernel", "dilation"])
    def test_padding_keeps_the_size(self, name):
        for workload in workloads.suite(f"sweep.{name}"):
            assert workload.layer.output_shape[2:] == workload.layer.input_size


@pytest.mark.parametrize("workload", TRANSPOSED, ids=lambda w: w.id)
def test_a_transposed_layer_is_the_adjoint_of_its_convolution(workload):
    """torch's own, on the shapes of the file, gives what the convolution reads, and gives the same output padding."""
    entry, layer = ENTRIES[workload.id], workload.layer
    x = torch.empty(entry["N"], entry["C"], *(entry[d] for d in "DHW"), device="meta")
    weight = torch.empty(layer.weight_shape, device="meta")
    geometry = (entry["stride"], entry["padding"], entry["output_padding"], entry["groups"], entry["dilation"])
    assert tuple(x.shape) == layer.output_shape
    assert tuple(F.conv_transpose3d(x, weight, None, *geometry).shape) == layer.input_shape
    case = Case(workload, "forward", "fp16")
    assert calls.output_padding(case) == tuple(entry["output_padding"])
    assert case.problems()[0].pass_ == "dgrad"
    assert case.problems()[0].result_shape == layer.input_shape


class TestCases:
    LAYERS = workloads.suite("r3d18,qwen2_vl")  # float32, bfloat16

    def test_own_dtype_and_torchs_own_precision(self):
        cases = workloads.cases(self.LAYERS)
        assert len(cases) == 3 * len(self.LAYERS)
        assert {(c.workload.suite, c.dtype, c.precision) for c in cases} == {
            ("r3d18", "fp32", "tf32"), ("qwen2_vl", "bf16", "ieee")
        }  # fmt: skip

    def test_every_combination(self):
        cases = workloads.cases(
            self.LAYERS[:1], ("forward", "train"), ("fp16", "fp32"), workloads.LAYOUTS, workloads.PRECISIONS
        )
        assert len(cases) == 2 * 2 * (1 + 3)  # passes, layouts; only float32 has precisions
        assert all(case.precision == "ieee" for case in cases if case.dtype == "fp16")


class TestSelect:
    CASES = workloads.cases(workloads.suite("nnunet3d"))

    @pytest.mark.parametrize(
        "filter, layers, passes",
        [("c32_k32", 1, 3), ("/dgrad/", 23, 1), ("*_k64_*/wgrad/*", 4, 1), ("*.c?_*", 1, 3), ("*s[12]22*", 10, 3)],
    )
    def test_text_or_pattern(self, filter, layers, passes):
        chosen = workloads.select(self.CASES, filter)
        assert len({case.workload.id for case in chosen}) == layers and len(chosen) == layers * passes

    def test_nothing_is_an_error_that_says_what_there_is(self):
        with pytest.raises(ValueError, match=r"filter 'c33' matches no case: there are nnunet3d.c32_.* and 66 more"):
            workloads.select(self.CASES, "c33")
