"""The modules are torch's own in everything but the kernels."""

from __future__ import annotations

import copy
import inspect
import pickle

import pytest
import torch
from torch import nn

from triton_conv3d import Conv3d, LazyConv3d, materialize

VARIANTS = {
    "plain": dict(kernel_size=3),
    "same": dict(kernel_size=(2, 3, 1), padding="same"),
    "strided": dict(kernel_size=3, stride=2, padding=1),
    "grouped": dict(kernel_size=3, groups=2, bias=False),
    "reflect": dict(kernel_size=3, padding=1, padding_mode="reflect"),
    "replicate": dict(kernel_size=3, padding=(1, 0, 2), padding_mode="replicate"),
    "circular": dict(kernel_size=3, padding=1, padding_mode="circular"),
}
X = torch.randn(1, 4, 5, 5, 6, generator=torch.Generator().manual_seed(0))


def seeded(make):
    torch.manual_seed(7)
    return make()


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS.keys())
@pytest.mark.parametrize("lazy", (False, True), ids=("eager", "lazy"))
def test_same_as_torch(variant, lazy):
    if lazy:
        ours, torchs = seeded(lambda: LazyConv3d(6, **variant)), nn.LazyConv3d(6, **variant)
        assert repr(ours) == repr(torchs)
        result = ours(X)
        torch.manual_seed(7)
        expected = torchs(X)
    else:
        ours, torchs = seeded(lambda: Conv3d(4, 6, **variant)), seeded(lambda: nn.Conv3d(4, 6, **variant))
        result, expected = ours(X), torchs(X)
    assert isinstance(ours, nn.Conv3d) and type(ours) is Conv3d and repr(ours) == repr(torchs)
    assert ours.state_dict().keys() == torchs.state_dict().keys()
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), torchs.parameters(), strict=True))
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-5)
    assert result.stride() == expected.stride()


@pytest.mark.parametrize("pair", ((Conv3d, nn.Conv3d), (LazyConv3d, nn.LazyConv3d)), ids=("Conv3d", "LazyConv3d"))
def test_signature(pair):
    ours, torchs = (inspect.signature(kind.__init__).parameters for kind in pair)
    assert list(ours) == list(torchs)
    assert [p.default for p in ours.values()] == [p.default for p in torchs.values()]


@pytest.mark.parametrize("again", (copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))), ids=("deepcopy", "pickle"))
@pytest.mark.parametrize("make", (lambda: Conv3d(4, 6, 3), lambda: LazyConv3d(6, 3)), ids=("eager", "lazy"))
def test_copies(again, make):
    layer = again(make())
    assert layer(X).shape == (1, 6, 3, 3, 4) and type(layer) is Conv3d


CONSTRUCTOR = (
    (dict(groups=3), "in_channels=4 must be divisible by groups=3"),
    (dict(groups=4), "out_channels=6 must be divisible by groups=4"),
    (dict(groups=0), "groups=0"),
    (dict(groups=-2), "groups=-2"),
    (dict(padding="full"), "padding='full'"),
    (dict(padding_mode="none"), "padding_mode='none'"),
    (dict(stride=2, padding="same"), "stride=2"),
    (dict(stride=(1, 2, 1), padding="same"), "stride=(1, 2, 1)"),
    (dict(in_channels=-4), ""),
    (dict(in_channels="4"), ""),
    (dict(stride="a", padding="same"), ""),
)


@pytest.mark.parametrize("arguments, named", CONSTRUCTOR, ids=lambda v: str(v) if isinstance(v, dict) else "")
def test_constructor_refuses(arguments, named):
    arguments = {"in_channels": 4, **arguments}
    with pytest.raises(Exception) as torchs:
        nn.Conv3d(out_channels=6, kernel_size=3, **arguments)
    with pytest.raises(torchs.type) as ours:
        Conv3d(out_channels=6, kernel_size=3, **arguments)
    assert ours.type is torchs.type and named in str(ours.value)


CALLS = {
    "none": (dict(kernel_size=3), None),
    "list": (dict(kernel_size=3), [1.0]),
    "rank": (dict(kernel_size=3), X[0, 0]),
    "channels": (dict(kernel_size=3), X[:, :3]),
    "dtype": (dict(kernel_size=3), X.double()),
    "kernel-pair": (dict(kernel_size=(3, 3)), X),
    "padding-pair": (dict(kernel_size=3, padding=(1, 1)), X),
    "padding-negative": (dict(kernel_size=3, padding=-1), X),
    "stride-zero": (dict(kernel_size=3, stride=0), X),
    "reflection-too-wide": (dict(kernel_size=3, padding=5, padding_mode="reflect"), X),
}


@pytest.mark.parametrize("arguments, input", CALLS.values(), ids=CALLS.keys())
def test_call_refuses(arguments, input):
    with pytest.raises(Exception) as torchs:
        nn.Conv3d(4, 6, **arguments)(input)
    with pytest.raises(torchs.type) as ours:
        Conv3d(4, 6, **arguments)(input)
    assert ours.type is torchs.type


def test_none_makes_a_lazy_layer_of_conv3d_only():
    layer = Conv3d(None, 6, 3, padding="same", bias=False)
    assert type(layer) is LazyConv3d and layer.bias is None and layer(X).shape == (1, 6, 5, 5, 6)

    class Own(Conv3d):
        pass

    with pytest.raises(TypeError, match="in_channels=None"):
        Own(None, 6, 3)


def test_unasked_channels_are_an_error_that_tells_how():
    layer = Conv3d(4, 6, 3)
    with pytest.raises(RuntimeError, match="assign in_channels = 3"):
        layer(X[:, :3])


def test_assigned_channels_renew_the_same_parameter():
    layer = Conv3d(4, 6, 3).to(memory_format=torch.channels_last_3d)
    layer(X).sum().backward()
    weight, layer.in_channels = layer.weight, 2
    with pytest.warns(UserWarning, match=r"in_channels=2 .*\(6, 4, 3, 3, 3\).*\(6, 2, 3, 3, 3\)") as warned:
        assert layer(X[:, :2]).shape == (1, 6, 3, 3, 4)
    assert warned[0].filename == __file__
    assert layer.weight is weight and weight.shape == (6, 2, 3, 3, 3) and weight.grad is None
    assert weight.is_contiguous(memory_format=torch.channels_last_3d)


def renewed(layer, input):
    layer.in_channels = input.shape[1]
    with pytest.warns(UserWarning, match="replaced"):
        return layer(input)


def test_renewed_values_are_those_of_a_new_layer():
    layer = Conv3d(4, 6, 3)
    seeded(lambda: renewed(layer, X[:, :2]))
    fresh = seeded(lambda: nn.Conv3d(2, 6, 3))
    assert torch.equal(layer.weight, fresh.weight) and torch.equal(layer.bias, fresh.bias)


def test_renewal_in_a_compiled_network():
    layer = Conv3d(4, 6, 3)
    compiled = torch.compile(layer, backend="eager")
    compiled(X)
    torch.testing.assert_close(renewed(compiled, X[:, :2]), layer(X[:, :2]))


def test_training_goes_on_with_the_renewed_weight():
    layer = Conv3d(4, 6, 3)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    graph = layer(X)  # alive: autograd keeps the accumulator that it made for the old shape
    renewed(layer, X[:, :2]).sum().backward()
    before = layer.weight.detach().clone()
    optimizer.step()
    assert layer.weight.grad.shape == before.shape and not torch.equal(layer.weight, before)
    with pytest.raises(RuntimeError, match="modified"):
        graph.sum().backward()


def test_renewal_in_inference_mode_leaves_trainable_parameters():
    layer = Conv3d(4, 6, 3)
    with torch.inference_mode():
        renewed(layer, X[:, :2])
    layer(X[:, :2]).sum().backward()
    assert layer.weight.grad.shape == (6, 2, 3, 3, 3)


def test_an_assignment_costs_no_weight_while_the_call_works():
    """Model surgery assigns ``in_channels`` for the record and gives the weight itself, before or after."""
    layer = Conv3d(4, 6, 3)
    layer.in_channels = 2
    expected = layer.weight.clone()
    assert layer(X).shape == (1, 6, 3, 3, 4) and torch.equal(layer.weight, expected)
    layer.weight = nn.Parameter(layer.weight[:, :2].detach())
    expected = layer.weight.clone()
    layer(X[:, :2])
    assert torch.equal(layer.weight, expected)


def test_a_computed_weight_is_not_renewed():
    layer = nn.utils.parametrizations.weight_norm(Conv3d(4, 6, 3))
    layer.in_channels = 2
    with pytest.raises(RuntimeError, match="2 channels"):
        layer(X[:, :2])


def test_a_computed_weight_in_a_compiled_network():
    layer = nn.utils.parametrizations.weight_norm(Conv3d(4, 6, 3))
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(X), nn.functional.conv3d(X, layer.weight, layer.bias))


def test_assigned_channels_must_fit_the_groups():
    layer = Conv3d(4, 6, 3, groups=2)
    layer.in_channels = 3
    with pytest.raises(ValueError, match="in_channels=3 must be divisible by groups=2"):
        layer(X[:, :3])
    with pytest.raises(ValueError, match="in_channels=4 must be divisible by groups=3"):
        LazyConv3d(6, 3, groups=3)(X)


@pytest.mark.parametrize("backend", ("eager", "aot_eager"))
def test_compiled_in_one_graph(backend):
    torch._dynamo.reset()
    layer = Conv3d(4, 6, 3, padding=1, padding_mode="circular")
    result = torch.compile(layer, backend=backend, fullgraph=True)(X)
    torch.testing.assert_close(result, layer(X))


def test_compiled_with_assignments():
    torch._dynamo.reset()

    class Assigning(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = materialize(LazyConv3d(6, 3), in_channels=4)

        def forward(self, x):
            self.layer.in_channels = x.shape[1]
            return self.layer(x)

    compiled = torch.compile(Assigning(), backend="eager")
    assert compiled(X).shape == (1, 6, 3, 3, 4)
    with pytest.warns(UserWarning, match="replaced"):
        assert compiled(X[:, :2]).shape == (1, 6, 3, 3, 4)


def test_compiled_while_lazy():
    torch._dynamo.reset()
    layer = LazyConv3d(6, 3)
    assert torch.compile(layer, backend="eager", fullgraph=True)(X).shape == (1, 6, 3, 3, 4)
    assert type(layer) is Conv3d


@pytest.mark.parametrize("strict", (False, True), ids=("nonstrict", "strict"))
def test_exported_with_dynamic_sizes(strict):
    layer, sizes = Conv3d(4, 6, 3, padding=1), {d: torch.export.Dim.AUTO for d in (0, 2, 3, 4)}
    x = torch.randn(2, 4, 5, 6, 7)
    program = torch.export.export(layer, (x,), dynamic_shapes=(sizes,), strict=strict)
    torch.testing.assert_close(program.module()(X), layer(X))


def test_symbolic_tracing():
    model = nn.Sequential(Conv3d(4, 6, 3), nn.ReLU(), Conv3d(6, 2, 1, padding=1, padding_mode="circular"))
    torch.testing.assert_close(torch.fx.symbolic_trace(model)(X), model(X))


def test_functional_call_lends_a_weight():
    layer = Conv3d(4, 6, 3)
    lent = {"weight": torch.ones(6, 2, 3, 3, 3), "bias": torch.zeros(6)}
    result = torch.func.functional_call(layer, lent, (X[:, :2],))
    torch.testing.assert_close(result, nn.functional.conv3d(X[:, :2], lent["weight"]), rtol=1e-4, atol=1e-5)
    assert layer.weight.shape == (6, 4, 3, 3, 3)


def test_hooks_run_on_every_call():
    for layer in (Conv3d(4, 6, 3), LazyConv3d(6, 3)):
        seen = []
        layer.register_forward_pre_hook(lambda module, args: seen.append("before"))
        layer.register_forward_hook(lambda module, args, result: seen.append("after"))
        layer(X), layer(X)
