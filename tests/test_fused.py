"""activation(conv3d(input, weight, bias) + residual) as one op: values, derivatives, tracing, tuning and refusals."""

from __future__ import annotations

import dataclasses
import types

import pytest
import torch
import torch.nn.functional as F
from cases import DTYPES, Case, make, run
from torch.library import opcheck

from triton_conv3d import configure, conv3d, engines, explain, ops
from triton_conv3d.engines import aten
from triton_conv3d.problem import ACTIVATIONS
from triton_conv3d.tuning import cost_model, measure, quarantine, verify
from triton_conv3d.workload import layer

SLOPE = 0.25
GEOMETRY = ((1, 2, 1), (1, 0, 1, 1, 0, 2), (1, 1, 1), 2)  # stride, padding of both ends, dilation, groups
ENGINES = {
    "implicit_gemm": dict(batch=2, in_channels=5, out_channels=7, input_size=(2, 3, 3), kernel_size=(1, 2, 2)),
    "folded": dict(batch=2, in_channels=2, out_channels=5, input_size=(2, 3, 3), kernel_size=(2, 1, 2)),
    "halo": dict(in_channels=9, out_channels=10, input_size=(3, 2, 3), kernel_size=(2, 1, 2)),
    "depthwise": dict(batch=2, in_channels=3, out_channels=3, groups=3, input_size=(1, 2, 6), kernel_size=(1, 1, 2)),
    "tma": dict(batch=2, in_channels=8, out_channels=7, input_size=(2, 3, 3), kernel_size=(1, 2, 2)),
    "matmul": dict(in_channels=5, out_channels=7, input_size=(2, 3, 3), kernel_size=(1, 1, 1)),
    "aten": dict(in_channels=4, out_channels=6, groups=2, input_size=(2, 3, 3), kernel_size=(1, 2, 2)),
}
each_activation = pytest.mark.parametrize("activation", ACTIVATIONS)


def case(engine: str, activation: str, dtype: str = "float32", **changes) -> Case:
    exact = activation in ("none", "relu", "leaky_relu")
    like = {**ENGINES[engine], "bias": True, "exact": exact, "dtype": dtype, "activation": activation}
    return Case("forward", **{**like, **changes}, negative_slope=SLOPE)


def composed(x, w, b, residual, activation, slope=SLOPE):
    """The same by torch's own operations."""
    front, back, top, bottom, left, right = GEOMETRY[1]
    y = F.conv3d(F.pad(x, (left, right, top, bottom, front, back)), w, b, GEOMETRY[0], 0, *GEOMETRY[2:])
    return torch_activation(y if residual is None else y + residual, activation, slope)


def torch_activation(y, activation, slope=SLOPE):
    return {
        "none": lambda: y, "relu": lambda: F.relu(y), "leaky_relu": lambda: F.leaky_relu(y, slope),
        "silu": lambda: F.silu(y), "gelu": lambda: F.gelu(y), "gelu_tanh": lambda: F.gelu(y, approximate="tanh"),
        "sigmoid": lambda: torch.sigmoid(y), "tanh": lambda: torch.tanh(y), "hardswish": lambda: F.hardswish(y),
    }[activation]()  # fmt: skip


def tensors(dtype=torch.float32, memory_format=torch.contiguous_format, grad=True):
    """input, weight, bias and residual of GEOMETRY."""
    generator = torch.Generator().manual_seed(5)
    shapes = ((1, 4, 2, 4, 3), (4, 2, 2, 3, 2), (4,), (1, 4, 2, 2, 4))
    drawn = [torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes]
    drawn = [t if t.dim() == 1 else t.contiguous(memory_format=memory_format) for t in drawn]
    return [t.requires_grad_(grad) for t in drawn]


def fused(x, w, b, residual, activation, slope=SLOPE):
    return ops.conv3d_fused(x, w, b, residual, *GEOMETRY, activation, slope)


# Values, by every engine: against float64 and with one rounding, or exactly


@each_activation
@pytest.mark.parametrize("engine", ENGINES)
def test_value(engine, activation):
    dtypes = DTYPES if engine not in ("halo", "tma") else ("float16", "bfloat16", "float16")
    for dtype, residuals in zip(dtypes, ((None, "cropped"), ("contiguous", "scalar"), ("channels_last",)), strict=True):
        for residual in residuals:
            run(case(engine, activation, dtype, residual=residual), engine)


@pytest.mark.parametrize("channels_last", (True, False), ids=("ndhwc", "ncdhw"))
@pytest.mark.parametrize("activation", ("none", "leaky_relu", "silu"))
def test_value_of_a_split_sum_and_of_dense_rows(activation, channels_last):
    layout = ("channels_last" if channels_last else "contiguous",) * 2
    for engine in ("implicit_gemm", "depthwise", "folded", "tma"):
        dtype = "float16" if engine == "tma" else "float32"
        given = case(engine, activation, dtype, residual="expanded_channels", channels_last=channels_last, layouts=layout)
        offers = engines.get(engine).configs(given.geometry())
        config = dataclasses.replace(offers[-1], splits=3) if engine in ("implicit_gemm", "tma") else offers[0]
        run(given, engine, config)


def test_a_plain_call_after_a_fused_one_is_plain():
    x, w, b, residual = tensors(grad=False)
    fused(x, w, b, residual, "relu")
    torch.testing.assert_close(ops.conv3d(x, w, b, *GEOMETRY), composed(x, w, b, None, "none"))


def test_unbatched_and_numbers_that_are_no_floats():
    x, w, residual = torch.randn(2, 3, 3, 3), torch.randn(4, 2, 2, 2, 2), torch.randn(4, 2, 2, 2)
    y = conv3d(x, w, activation="leaky_relu", residual=residual, negative_slope=2)
    torch.testing.assert_close(y, F.leaky_relu(F.conv3d(x, w) + residual, 2), rtol=1e-5, atol=1e-5)


# Derivatives


@each_activation
@pytest.mark.parametrize("with_residual", (False, True), ids=("", "residual"))
def test_gradients(activation, with_residual):
    inputs = tensors(memory_format=torch.channels_last_3d)
    inputs = inputs if with_residual else [*inputs[:3], None]
    double = [t if t is None else t.detach().double().requires_grad_() for t in inputs]
    y, expected = fused(*inputs, activation), composed(*double, activation)
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
    grad = torch.randn_like(y)
    results = torch.autograd.grad(y, [t for t in inputs if t is not None], grad)
    wanted = torch.autograd.grad(expected, [t for t in double if t is not None], grad.double())
    for result, want in zip(results, wanted, strict=True):
        torch.testing.assert_close(result.double(), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("activation", ("leaky_relu", "sigmoid", "tanh", "silu"))
def test_gradients_of_second_order_in_float64(activation):
    """By the output, where the derivative depends on it and where not, and by torch."""
    inputs = tensors(torch.float64)
    assert torch.autograd.gradgradcheck(lambda *a: fused(*a, activation), inputs, fast_mode=True)


@pytest.mark.parametrize("slope", (0.0, -0.5))
def test_a_slope_that_hides_the_sign(slope):
    """The output of such a leaky_relu does not tell where its input was negative."""
    inputs = tensors(torch.float64)
    results = torch.autograd.grad(fused(*inputs, "leaky_relu", slope).sum(), inputs)
    for result, want in zip(results, torch.autograd.grad(composed(*inputs, "leaky_relu", slope).sum(), inputs), strict=True):
        torch.testing.assert_close(result, want)


@pytest.mark.parametrize("activation, passes", [
    ("relu", ["forward relu", "dgrad none", "wgrad none"]), ("silu", ["forward none", "dgrad none", "wgrad none"]),
])  # fmt: skip
def test_nothing_is_computed_twice(activation, passes, posed):
    inputs = tensors()
    fused(*inputs, activation).sum().backward()
    with torch.no_grad():
        fused(*inputs, activation)
    assert [f"{p.pass_} {p.activation}" for p in posed] == [*passes, f"forward {activation}"]


def test_autocast():
    inputs = tensors()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = fused(*inputs, "tanh")
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert {t.grad.dtype for t in inputs} == {torch.float32}


# Tracing


@pytest.mark.parametrize("activation, grad", [("relu", True), ("silu", True), ("silu", False)])
def test_opcheck(activation, grad):
    x, w, b, residual = tensors(grad=grad, memory_format=torch.channels_last_3d)
    opcheck(ops.conv3d_fused, (x, w, b, residual, *GEOMETRY, activation, SLOPE))


@pytest.mark.parametrize("memory_format", (torch.contiguous_format, torch.channels_last_3d), ids=("ncdhw", "ndhwc"))
def test_strides_are_those_of_the_plain_op(memory_format):
    x, w, b, residual = tensors(grad=False, memory_format=memory_format)
    wanted = ops.conv3d(x, w, b, *GEOMETRY).stride()
    for given in (residual, residual.contiguous(), residual[:, :1].expand_as(residual)):
        assert fused(x, w, b, given, "gelu").stride() == wanted
        meta = [t.to("meta") for t in (x, w, b, given)]
        assert fused(*meta, "gelu").stride() == wanted


def test_compiles_whole():
    def block(x, w, b, residual):
        y = conv3d(x, w, b, padding=(0, 1, 0), activation="relu", residual=residual)
        return conv3d(y, w, b, activation="silu")

    x, w, b = torch.randn(1, 4, 3, 4, 3), torch.randn(4, 4, 1, 3, 1), torch.randn(4)
    inputs = [t.requires_grad_() for t in (x, w, b, torch.randn(1, 4, 3, 4, 3))]
    with configure(engine="aten"):
        results = []
        for function in (block, torch.compile(block, fullgraph=True, backend="aot_eager")):
            y = function(*inputs)
            results.append([y, *torch.autograd.grad(y.square().sum(), inputs)])
    for result, want in zip(*results, strict=True):
        torch.testing.assert_close(result, want, rtol=1e-5, atol=1e-5)


# Tuning


WRONG = {
    "no residual": (dict(residual=False), dict(residual=None)),
    "no activation": (dict(activation="none"), {}),
    "another activation": (dict(activation="relu"), {}),
    "another slope": ({}, dict(negative_slope=0.01)),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_epilogue_is_quarantined(wrong, dtype, monkeypatch):
    given = case("implicit_gemm", "leaky_relu", dtype, residual="channels_last", in_channels=64, input_size=(6, 6, 6))
    problem, operands = make(given)
    changes, others = WRONG[wrong]

    class Timer:
        def time(self, function):
            function()
            return 1.0

    def launch(p, o, config):
        return aten.launch(p.replace(**changes), o._replace(**others), aten.AtenConfig())

    monkeypatch.setattr(quarantine, "_left_out", {})
    config = engines.get("implicit_gemm").configs(problem)[-1]
    faulty = types.SimpleNamespace(NAME="faulty", launch=launch, work=None)
    right = types.SimpleNamespace(NAME="right", launch=lambda p, o, c: aten.launch(p, o, aten.AtenConfig()))
    ranked = [(1.0, faulty, config), (2.0, right, config), (3.0, aten, aten.AtenConfig())]
    with pytest.warns(RuntimeWarning, match=r"faulty .* wrong result"):
        result = measure.best(problem, operands, ranked, "full", Timer())
    assert result.candidates == 2 and quarantine.quarantined("faulty", config, problem.arch)


@each_activation
def test_a_right_epilogue_is_not(activation):
    for dtype in DTYPES:
        problem, operands = make(case("implicit_gemm", activation, dtype, residual="cropped"))
        private = verify.private_operands(operands)
        expected = verify.trusted(problem, private)
        gemm = engines.get("implicit_gemm")
        result = gemm.launch(problem, private, gemm.configs(problem)[-1])
        assert verify.is_right(problem, result, expected, negative_slope=SLOPE)


def test_more_work_takes_longer():
    plain = case("matmul", "none", "bfloat16", in_channels=64, input_size=(64, 64, 64)).geometry()
    plain = plain.replace(arch="sm_90", device="NVIDIA H200")
    steps = (plain, plain.replace(residual=True), plain.replace(residual=True, activation="silu"))
    for name, least in (("implicit_gemm", 2), ("matmul", 3)):
        engine = engines.get(name)
        seconds = [cost_model.predict(p, engine, engine.configs(p)[-1]) for p in steps]
        assert seconds == sorted(seconds) and len(set(seconds)) >= least


def test_explained_and_read_from_a_workload():
    x, w, b, residual = tensors()
    told = explain(x, w, b, GEOMETRY[0], (1, 1, 1), groups=2, activation="silu", residual=residual.new_empty(1, 4, 3, 2, 4))
    assert ", residual, silu," in str(told) and not told.passes["dgrad"].problem.fused
    entry = dict(id="a", N=1, C=4, D=2, H=3, W=3, K=4, kernel=[1, 1, 1], stride=[1] * 3, padding=[0] * 3,
                 dilation=[1] * 3, groups=1, bias=True, dtype="fp32", activation="relu", residual=True)  # fmt: skip
    assert (layer(entry).activation, layer(entry).residual) == ("relu", True)
    layer(entry).run(("forward",), torch.device("cpu"), torch.contiguous_format)
    with pytest.raises(ValueError, match="activation='swish' is not valid: expected none or relu"):
        layer({**entry, "activation": "swish"})


# Refusals

X, W, R = torch.ones(1, 4, 3, 3, 3), torch.ones(6, 4, 2, 2, 2), torch.ones(1, 6, 2, 2, 2)
BAD = {
    "name": (dict(activation="swish"), ValueError, "activation='swish' is not known: expected one of none, relu"),
    "type": (dict(activation=1), TypeError, "activation must be a str or None, got int: 1"),
    "slope": (dict(activation="leaky_relu", negative_slope="x"), TypeError, "negative_slope must be a number, got 'x'"),
    "no tensor": (dict(residual=1.0), TypeError, "residual must be a Tensor or None, got float"),
    "shape": (dict(residual=R[:, :1]), RuntimeError, r"residual of shape \[1, 1, 2, 2, 2\] must be \[1, 6, 2, 2, 2\]"),
    "dtype": (dict(residual=R.half()), RuntimeError, "input is torch.float32 but residual is torch.float16"),
    "device": (dict(residual=R.to("meta")), RuntimeError, "input is on cpu but residual is on meta"),
}


@pytest.mark.parametrize("arguments, kind, message", BAD.values(), ids=BAD)
def test_refused(arguments, kind, message):
    with pytest.raises(kind, match=message):
        conv3d(X, W, **arguments)


@pytest.mark.parametrize("residual, activation, message", [
    (R, "swish", "is not known"), (R[0], "relu", "must be"), (R.double(), "relu", "torch.float64 on cpu, but input is"),
], ids=("name", "shape", "dtype"))  # fmt: skip
@pytest.mark.parametrize("device", ("cpu", "meta"))
def test_the_op_refuses_too(residual, activation, message, device):
    x, w, residual = (t.to(device) for t in (X, W, residual))
    with pytest.raises((ValueError, RuntimeError), match=message.replace("cpu", device)):
        ops.conv3d_fused(x, w, None, residual, (1,) * 3, (0,) * 6, (1,) * 3, 1, activation, 0.01)
