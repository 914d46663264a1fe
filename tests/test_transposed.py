"""conv_transpose3d, ConvTranspose3d and LazyConvTranspose3d answer as torch's: values, gradients, shapes, state, and the
class of every refusal. The kernels compute them: dgrad forward, forward and wgrad backward."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from compiled import error
from tolerances import COMPILED
from torch import nn

import triton_conv3d
from triton_conv3d import ConvTranspose3d, LazyConvTranspose3d, conv_transpose3d

X, W, B = torch.ones(2, 4, 3, 4, 5), torch.ones(4, 6, 3, 3, 3), torch.ones(6)
GOOD = {
    "plain": {},
    "stride": {"stride": 2},
    "stride-triple": {"stride": (1, 2, 3)},
    "padding": {"stride": [2], "padding": (0, 1, 2)},
    "output_padding": {"stride": (2, 3, 2), "padding": 1, "output_padding": (1, 2, 0)},
    "output_padding-of-a-dilation": {"stride": 1, "dilation": 3, "output_padding": 2},
    "dilation": {"dilation": (2, 1, 3), "padding": (1, 0, 2)},
    "groups": {"groups": 2, "stride": 2},
}


def operands(groups: int = 1, dtype=torch.float32, seed: int = 0) -> tuple:
    draw = torch.Generator().manual_seed(seed)
    shapes = (2, 4, 3, 4, 5), (4, 6 // groups, 3, 2, 3), (6,)
    return tuple(torch.randn(shape, generator=draw, dtype=dtype, requires_grad=True) for shape in shapes)


@pytest.mark.parametrize("last", (False, True), ids=("ncdhw", "ndhwc"))
@pytest.mark.parametrize("arguments", GOOD.values(), ids=GOOD.keys())
def test_same_answer_and_gradients(arguments, last, posed):
    memory_format = torch.channels_last_3d if last else torch.contiguous_format
    x, w, b = operands(arguments.get("groups", 1))
    result = conv_transpose3d(x.contiguous(memory_format=memory_format), w, b, **arguments)
    expected = F.conv_transpose3d(*(t.double() for t in (x, w, b)), **arguments)
    assert result.shape == expected.shape and error(result, expected) <= COMPILED
    found, wanted = (torch.autograd.grad(y.square().sum(), (x, w, b)) for y in (result, expected))
    assert all(error(a, b) <= COMPILED for a, b in zip(found, wanted, strict=True))
    if arguments is GOOD["output_padding-of-a-dilation"]:
        assert not posed  # torch's own
    else:
        assert [problem.pass_ for problem in posed] == ["dgrad", "forward", "wgrad"]
        assert result.is_contiguous(memory_format=memory_format)


def test_no_gradient_is_computed_that_nobody_asks_for(posed):
    x, w, _ = operands()
    conv_transpose3d(x.detach(), w, stride=2).sum().backward()
    assert [problem.pass_ for problem in posed] == ["dgrad", "wgrad"] and w.grad is not None


def test_unbatched_and_empty():
    assert conv_transpose3d(X[0], W, B, 2).shape == F.conv_transpose3d(X[0], W, B, 2).shape
    torch.testing.assert_close(conv_transpose3d(X[:0], W, B), F.conv_transpose3d(X[:0], W, B))


@pytest.mark.parametrize("dtype", (torch.float64, torch.complex64), ids=str)
def test_what_is_torchs_own(dtype):
    x, w, b = operands(dtype=dtype)
    torch.testing.assert_close(conv_transpose3d(x, w, b, 2), F.conv_transpose3d(x, w, b, 2))


def test_derivatives_of_any_order():
    x, w, b = (t.detach()[..., :2, :2, :2].requires_grad_() if t.dim() > 1 else t for t in operands(dtype=torch.float64))
    assert torch.autograd.gradgradcheck(lambda *given: conv_transpose3d(*given, stride=2), (x[:1], w, b))


def test_autocast_computes_as_torch_does():
    x, w, b = operands()
    with torch.autocast("cpu", torch.bfloat16):
        result, expected = (function(x, w, b, 2) for function in (conv_transpose3d, F.conv_transpose3d))
    assert result.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(result, expected, rtol=2**-6, atol=2**-5)  # the bias is added after a rounding
    result.float().sum().backward()
    assert x.grad.dtype == w.grad.dtype == torch.float32


@pytest.mark.parametrize("dynamic", (False, True), ids=("static", "dynamic"))
def test_compiles_whole(dynamic):
    x, w, b = (t.detach() for t in operands())
    compiled = torch.compile(conv_transpose3d, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for batch in (2, 1) if dynamic else (2,):
        torch.testing.assert_close(compiled(x[:batch], w, b, 2), conv_transpose3d(x[:batch], w, b, 2))


def test_batches_of_functional_transforms():
    x, w, b = (t.detach() for t in operands())
    found = torch.func.vmap(conv_transpose3d, (0, None, None))(x[:, None], w, b)
    torch.testing.assert_close(found, F.conv_transpose3d(x, w, b)[:, None], rtol=1e-4, atol=1e-4)
    found = torch.func.vmap(conv_transpose3d, (None, None, 0))(x, w, torch.stack([b, -b]))
    torch.testing.assert_close(found[1], F.conv_transpose3d(x, w, -b), rtol=1e-4, atol=1e-4)


BAD = {
    "stride": (dict(stride=0), "stride=0 must be positive"),
    "stride-type": (dict(stride=1.5), "stride must be an integer, got float"),
    "stride-length": (dict(stride=(1, 2)), r"stride=\(1, 2\) must be one integer or 3"),
    "stride-size": (dict(stride=2**70), "must fit into 64 bits"),
    "padding": (dict(padding=-1), "padding=-1 must be zero or more"),
    "padding-name": (dict(padding="same"), "padding must be an integer, got str"),
    "padding-too-large": (dict(padding=4), "the result has -3 positions in depth .* padding=4.; pad less"),
    "output_padding": (dict(output_padding=-1), "output_padding=-1 must be zero or more"),
    "output_padding-too-large": (dict(output_padding=1), "output_padding=1 must be below stride=1 or dilation=1"),
    "dilation": (dict(dilation=0), "dilation=0 must be positive"),
    "groups": (dict(groups=0), "groups=0 must be positive"),
    "groups-indivisible": (dict(groups=3), "groups=3 must divide the first size of weight"),
    "channels": (dict(input=X[:, :3]), "has 3 channels, but weight of shape .* needs 4"),
    "bias-size": (dict(bias=B[:3]), r"bias of shape \[3\] must be \[6\]"),
    "bias-rank": (dict(bias=B[:, None]), r"bias of shape \[6, 1\] must be \[6\]"),
    "bias-type": (dict(bias=3), "bias must be a Tensor or None, got int"),
    "rank": (dict(input=X[0, 0]), "must have 5 dimensions .N, C, D, H, W., or 4"),
    "weight-rank": (dict(weight=W[..., 0]), "weight of shape .* must have 5 dimensions .C, K / groups"),
    "weight-type": (dict(weight=None), "weight must be a Tensor, got NoneType"),
    "weight-empty": (dict(weight=W[:, :0], bias=None), "weight of shape .* is empty"),
    "no-taps": (dict(weight=W[:, :, :0]), "weight of shape .* is empty"),
    "depth-empty": (dict(input=X[:, :, :0]), "is empty in depth"),
    "dtype": (dict(weight=W.double()), "weight is torch.float64; convert one of them"),
    "device": (dict(bias=B.to("meta")), "bias is on meta; move one of them"),
}


@pytest.mark.parametrize("arguments, message", BAD.values(), ids=BAD.keys())
def test_refused_as_by_torch(arguments, message):
    arguments = {"input": X, "weight": W, "bias": B, **arguments}
    kind = RuntimeError
    if not getattr(arguments["bias"], "is_meta", False):  # which torch computes with
        with pytest.raises(Exception) as torchs:
            F.conv_transpose3d(**arguments)
        kind = torchs.type
    with pytest.raises(kind, match=message):
        conv_transpose3d(**arguments)


# Modules.

LAYERS = {
    "up": dict(kernel_size=2, stride=2),
    "overlapping": dict(kernel_size=3, stride=(2, 1, 3), padding=1, output_padding=(1, 0, 2)),
    "grouped": dict(kernel_size=2, stride=2, groups=2, bias=False),
}


@pytest.mark.parametrize("arguments", LAYERS.values(), ids=LAYERS.keys())
def test_layers_are_torchs(arguments):
    torch.manual_seed(0)
    torchs = nn.ConvTranspose3d(4, 6, **arguments)
    torch.manual_seed(0)
    ours = ConvTranspose3d(4, 6, **arguments)
    assert isinstance(ours, nn.ConvTranspose3d) and repr(ours) == repr(torchs)
    torch.testing.assert_close(ours.state_dict(), torchs.state_dict(), rtol=0, atol=0)
    x = operands()[0]
    torch.testing.assert_close(ours(x), torchs(x), rtol=1e-4, atol=1e-4)
    assert pickle.loads(pickle.dumps(ours))(x).equal(ours(x)) and copy.deepcopy(ours)(x).equal(ours(x))


def test_a_size_that_is_asked_for(posed):
    layer = ConvTranspose3d(4, 6, 3, stride=2)
    assert layer(X, output_size=[8, 9, 12]).shape[2:] == (8, 9, 12) and posed
    with pytest.raises(ValueError, match="requested an output size"):
        layer(X, output_size=[20, 9, 12])


def test_lazy_layers_learn_their_channels():
    layer = LazyConvTranspose3d(6, 2, stride=2)
    assert isinstance(layer, nn.LazyConvTranspose3d)
    assert layer(X).shape == (2, 6, 6, 8, 10)
    assert type(layer) is ConvTranspose3d and layer.in_channels == 4 and layer.weight.shape == (4, 6, 2, 2, 2)
    waiting = nn.Sequential(LazyConvTranspose3d(3, 2), LazyConvTranspose3d(2, 2))
    triton_conv3d.materialize(waiting, X)
    assert [module.in_channels for module in waiting] == [4, 3]
    assert triton_conv3d.materialize(LazyConvTranspose3d(6, 2, groups=2), in_channels=4).weight.shape == (4, 3, 2, 2, 2)


def test_a_loaded_lazy_layer_is_converted_as_it_is():
    state = nn.ConvTranspose3d(4, 6, 2).state_dict()
    layer = nn.LazyConvTranspose3d(6, 2)
    layer.load_state_dict(state)
    assert triton_conv3d.convert_conv3d(layer).converted == [""]
    layer(X)
    assert type(layer) is ConvTranspose3d and layer.weight.equal(state["weight"])


def test_functional_calls_and_parametrizations_keep_working(posed):
    layer = nn.utils.parametrizations.spectral_norm(nn.ConvTranspose3d(4, 6, 2)).eval()
    expected = layer(X)
    assert triton_conv3d.convert_conv3d(layer).converted == [""]
    torch.testing.assert_close(layer(X), expected, rtol=1e-4, atol=1e-4)
    plain = ConvTranspose3d(4, 6, 2)
    zeros = {name: torch.zeros_like(parameter) for name, parameter in plain.named_parameters()}
    assert torch.func.functional_call(plain, zeros, (X,)).abs().max() == 0 and len(posed) == 2


@pytest.mark.parametrize("kind", (nn.ConvTranspose3d, ConvTranspose3d), ids=("torchs", "ours"))
def test_a_layer_is_explained_by_the_problems_that_it_poses(kind, posed):
    layer, x = kind(4, 6, 3, stride=2, output_padding=1), X.clone().requires_grad_()
    explained = triton_conv3d.explain(layer, x)
    triton_conv3d.convert_conv3d(layer)
    result = layer(x)
    result.backward(torch.ones_like(result))
    assert {p.problem for p in explained.passes.values()} == set(posed)
    assert list(triton_conv3d.explain(layer, X[0], pass_="dgrad").passes) == ["dgrad"]
