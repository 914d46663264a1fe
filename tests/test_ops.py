"""The torch.library ops: registration, derivatives of any order, autocast, and every way of tracing."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo import compiled_autograd
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from triton_conv3d import Conv3d, configure, conv3d, ops

GEOMETRY = ((1, 2, 1), (1, 0, 1, 1, 0, 2), (1, 1, 1), 2)  # stride, padding of both ends, dilation, groups


def tensors(dtype=torch.float32, memory_format=torch.contiguous_format):
    generator = torch.Generator().manual_seed(3)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=dtype)

    x, w = (draw(*s).contiguous(memory_format=memory_format) for s in ((1, 4, 4, 4, 3), (4, 2, 3, 3, 2)))
    return x.requires_grad_(), w.requires_grad_(), draw(4).requires_grad_()


def reference(x, w, b):
    front, back, top, bottom, left, right = GEOMETRY[1]
    padded = F.pad(x, (left, right, top, bottom, front, back))
    return F.conv3d(padded, w, b, GEOMETRY[0], 0, *GEOMETRY[2:])


FORMATS = pytest.mark.parametrize(
    "memory_format", (torch.contiguous_format, torch.channels_last_3d), ids=("ncdhw", "ndhwc")
)


@FORMATS
def test_values_strides_and_gradients(memory_format):
    inputs = tensors(memory_format=memory_format)
    y, expected = ops.conv3d(*inputs, *GEOMETRY), reference(*inputs)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    assert y.stride() == expected.stride()
    grad = torch.randn_like(y)
    results, wanted = torch.autograd.grad(y, inputs, grad), torch.autograd.grad(expected, inputs, grad)
    for result, want in zip(results, wanted, strict=True):
        torch.testing.assert_close(result, want, rtol=1e-4, atol=1e-4)
        assert result.stride() == want.stride()


@pytest.mark.parametrize("bias", (torch.randn(4, 2)[:, 1], torch.randn(1).expand(4)), ids=("every other", "expanded"))
def test_a_bias_lies_in_memory_as_it_likes(bias):
    x, w, _ = (tensor.detach() for tensor in tensors())
    with configure(engine="implicit_gemm"):
        plain, fused = ops.conv3d(x, w, bias, *GEOMETRY), ops.conv3d_fused(x, w, bias, None, *GEOMETRY, "relu", 0.0)
    torch.testing.assert_close(plain, reference(x, w, bias), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(fused, reference(x, w, bias).relu(), rtol=1e-4, atol=1e-4)


# input size, padding of both ends, stride, dilation, and the 3x3x3 kernel's taps that meet the input
DEGENERATE = {
    "one_frame": ((1, 4, 5), (1, 1, 1, 1, 1, 1), 1, 1, (1, 3, 3)),
    "causal_frame": ((1, 4, 5), (2, 0, 1, 1, 1, 1), 1, 1, (1, 3, 3)),
    "one_pixel": ((1, 1, 1), (1, 1, 1, 1, 1, 1), 1, 1, (1, 1, 1)),
    "two_frames_causal": ((2, 1, 4), (2, 0, 1, 1, 0, 2), 1, 1, (2, 1, 3)),
    "dilation_beyond_the_volume": ((4, 3, 9), (9, 9, 1, 1, 0, 0), 1, (9, 1, 4), (1, 3, 3)),
    "stride_beyond_the_volume": ((2, 2, 2), (1, 1, 1, 1, 3, 3), (4, 1, 5), 1, (2, 3, 1)),
    "nothing_met": ((1, 3, 3), (2, 4, 1, 1, 1, 1), (4, 1, 1), (3, 1, 1), (2, 3, 3)),
}


@FORMATS
@pytest.mark.parametrize("name", DEGENERATE)
def test_taps_that_only_meet_padding_are_left_out(name, memory_format):
    """Asked for is a smaller kernel; every result is exact, of integers, and the weight's gradient is zero there."""
    size, padding, stride, dilation, kernel = DEGENERATE[name]
    stride, dilation = (3 * (v,) if isinstance(v, int) else v for v in (stride, dilation))
    generator = torch.Generator().manual_seed(1)

    def draw(*shape):
        values = torch.randint(-3, 4, shape, generator=generator).float()
        return values.contiguous(memory_format=memory_format).requires_grad_()

    x, w, b = draw(2, 4, *size), draw(6, 2, 3, 3, 3), torch.arange(6.0, requires_grad=True)
    assert [p.kernel_size for p in ops.problems(x, w, b, stride, padding, dilation, 2)] == [kernel] * 3
    y = ops.conv3d(x, w, b, stride, padding, dilation, 2)
    padded = F.pad(x, (*padding[4:], *padding[2:4], *padding[:2]))
    expected = F.conv3d(padded, w, b, stride, 0, dilation, 2)
    grad = torch.randint(-3, 4, y.shape, generator=generator).float()
    for result, want in zip(
        (y, *torch.autograd.grad(y, (x, w, b), grad)),
        (expected, *torch.autograd.grad(expected, (x, w, b), grad)), strict=True,
    ):  # fmt: skip
        assert torch.equal(result, want) and result.stride() == want.stride()


@FORMATS
@pytest.mark.parametrize("op", ("conv3d", "conv3d_dgrad", "conv3d_wgrad"))
def test_opcheck(op, memory_format):
    x, w, b = tensors(memory_format=memory_format)
    last = memory_format == torch.channels_last_3d
    grad = torch.randn_like(reference(x, w, b)).requires_grad_()
    arguments = {
        "conv3d": (x, w, b, *GEOMETRY),
        "conv3d_dgrad": (grad, w, list(x.shape), *GEOMETRY, last),
        "conv3d_wgrad": (grad, x, list(w.shape), *GEOMETRY, last),
    }[op]
    opcheck(getattr(ops, op), arguments)


def test_gradients_of_both_orders_in_float64():
    inputs = tensors(torch.float64)
    assert torch.autograd.gradcheck(lambda *a: ops.conv3d(*a, *GEOMETRY), inputs)
    assert torch.autograd.gradgradcheck(lambda *a: ops.conv3d(*a, *GEOMETRY), inputs)


def test_double_backward_in_float32():
    def penalty(convolution):
        x, w, b = tensors()
        (gx,) = torch.autograd.grad(convolution(x, w, b).square().sum(), x, create_graph=True)
        return torch.autograd.grad(gx.square().sum(), (x, w))

    for result, want in zip(penalty(lambda *a: ops.conv3d(*a, *GEOMETRY)), penalty(reference), strict=True):
        torch.testing.assert_close(result, want, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("wanted", range(3), ids=("input", "weight", "bias"))
def test_only_the_gradients_that_are_needed(wanted, posed):
    inputs = [t.detach().requires_grad_(i == wanted) for i, t in enumerate(tensors())]
    ops.conv3d(*inputs, *GEOMETRY).sum().backward()
    assert [p.pass_ for p in posed] == ["forward", *[("dgrad",), ("wgrad",), ()][wanted]]


@pytest.mark.parametrize("leaves", (True, False), ids=("leaves", "results"))
@pytest.mark.parametrize("wanted, passes", [((0,), ["dgrad"]), ((1,), ["wgrad"]), ((0, 1), ["dgrad", "wgrad"])], ids=str)
def test_only_the_gradients_that_are_asked_for(wanted, passes, leaves, posed):
    """Of tensors that all require one, as for a gradient penalty; then of those gradients, all of them."""
    given = tensors()[:2]
    inputs = given if leaves else [t * 1 for t in given]
    result = ops.conv3d(*inputs, None, *GEOMETRY)
    found = torch.autograd.grad(result.square().sum(), [given[i] for i in wanted], create_graph=True)
    assert [p.pass_ for p in posed] == ["forward", *passes]
    expected = torch.autograd.grad(reference(*given, None).square().sum(), [given[i] for i in wanted], create_graph=True)
    of_found, of_expected = (torch.autograd.grad(sum(g.square().sum() for g in grads), given) for grads in (found, expected))
    for result, want in zip((*found, *of_found), (*expected, *of_expected), strict=True):
        torch.testing.assert_close(result, want, rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_autocast(dtype):
    x, w, b = tensors()
    with torch.autocast("cpu", dtype=dtype):
        y = conv3d(x, w, b, groups=2, padding=1)
        assert y.dtype == F.conv3d(x, w, b, groups=2, padding=1).dtype == dtype
    y.float().sum().backward()
    assert x.grad.dtype == w.grad.dtype == b.grad.dtype == torch.float32


@pytest.mark.parametrize("backend", ("eager", "aot_eager", "inductor"))
def test_compiles_whole_with_dynamic_shapes(backend):
    with configure(engine="aten"):
        model = nn.Sequential(Conv3d(2, 4, 3, padding="same"), nn.ReLU(), Conv3d(4, 2, (1, 2, 3), stride=2))
        compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend=backend, dynamic=True)
        for size in ((1, 4, 4, 5), (2, 5, 6, 7), (3, 4, 5, 9)):
            x = torch.randn(size[0], 2, *size[1:])
            torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-4)
            compiled(x).sum().backward()
    assert compiled._orig_mod[0].weight.grad is not None


@pytest.mark.parametrize("activation", (None, "relu"), ids=("plain", "fused"))
def test_compiled_autograd_of_eager_calls(activation):
    def gradients():
        x, w, b = tensors()
        return torch.autograd.grad(conv3d(x, w, b, (1, 2, 1), 1, 1, 2, activation=activation).square().sum(), (x, w, b))

    expected = gradients()
    with compiled_autograd._enable(torch.compile(backend="eager")):
        found = gradients()
    for result, want in zip(found, expected, strict=True):
        torch.testing.assert_close(result, want)


def test_export_keeps_one_node_a_convolution():
    model = nn.Sequential(Conv3d(2, 4, 3), Conv3d(4, 2, 1))
    x = torch.randn(2, 2, 4, 5, 6)
    shapes = ({0: torch.export.Dim("batch"), 4: torch.export.Dim("width", min=4)},)
    program = torch.export.export(model, (x,), dynamic_shapes=shapes)
    calls = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert calls.count(ops.conv3d) == 2
    other = torch.randn(3, 2, 4, 5, 8)
    torch.testing.assert_close(program.module()(other), model(other))


@pytest.mark.parametrize("call", (conv3d, functools.partial(conv3d, activation="relu")), ids=("plain", "fused"))
def test_flops_are_counted_as_of_torch(call):
    """Each pass by itself. Of groups torch counts too many of the weight's gradient."""
    counts = []
    for each in (F.conv3d, call):
        x, w = torch.ones(2, 3, 5, 6, 7, requires_grad=True), torch.ones(4, 3, 3, 2, 3, requires_grad=True)
        for inputs in ((x,), (w,), (x, w)):
            with FlopCounterMode(display=False) as counter:
                torch.autograd.grad(each(x, w, None, (1, 2, 1), (1, 0, 1)).sum(), inputs)
            counts.append(counter.get_total_flops())
    assert counts[:3] == counts[3:] and counts[0] == 2 * 2 * 4 * (3 * 18) * (5 * 3 * 7) * 2


def test_checkpointing_and_functional_call():
    layer, x = Conv3d(4, 4, 3), tensors()[0]
    y = checkpoint(layer, x, use_reentrant=False)
    y.sum().backward()
    doubled = {name: 2 * p for name, p in layer.named_parameters()}
    torch.testing.assert_close(torch.func.functional_call(layer, doubled, (x,)), 2 * y)
