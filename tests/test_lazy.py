"""The lazy layer before, at and after its first call: conversions, states, optimisers, materialize, clear refusals."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from triton_conv3d import Conv3d, LazyConv3d, convert_conv3d, materialize

X = torch.randn(1, 4, 4, 5, 3, generator=torch.Generator().manual_seed(0))


def renewed(layer: Conv3d, channels: int) -> torch.Tensor:
    """The output for an input with another channel count, after asking for it."""
    layer.in_channels = channels
    with pytest.warns(UserWarning, match=f"in_channels={channels} was assigned"):
        return layer(X[:, :channels])


# A new channel count after the first call


def test_renewing_draws_the_values_of_a_new_layer():
    layer = Conv3d(4, 6, 3)
    torch.manual_seed(5)
    renewed(layer, 2)
    torch.manual_seed(5)
    fresh = nn.Conv3d(2, 6, 3)
    assert torch.equal(layer.weight, fresh.weight) and torch.equal(layer.bias, fresh.bias)
    assert repr(layer) == repr(fresh)


def test_renewing_names_both_shapes_at_the_callers_line():
    layer = Conv3d(4, 6, 3)
    layer.in_channels = 2
    with pytest.warns(UserWarning, match=r"\(6, 4, 3, 3, 3\).*\(6, 2, 3, 3, 3\)") as caught:
        layer(X[:, :2])
    assert [warning.filename for warning in caught] == [__file__]


def test_an_optimiser_goes_on_with_the_renewed_parameter():
    layer = LazyConv3d(6, 3)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.5)
    layer(X).sum().backward()
    renewed(layer, 2).sum().backward()
    before = layer.weight.detach().clone()
    optimizer.step()
    assert layer.weight.grad.shape == (6, 2, 3, 3, 3)
    torch.testing.assert_close(layer.weight.detach(), before - 0.5 * layer.weight.grad)


def test_a_graph_of_the_old_weight_cannot_go_on():
    layer = Conv3d(4, 6, 3)
    old = layer(X.clone().requires_grad_())
    renewed(layer, 2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        old.sum().backward()


def test_renewing_needs_channels_that_the_groups_divide():
    layer = Conv3d(4, 6, 3, groups=2)
    layer.in_channels = 3
    with pytest.raises(ValueError, match="in_channels=3 must be divisible by groups=2"):
        layer(X[:, :3])
    assert layer.weight.shape[1] == 2


def test_an_assignment_that_the_weight_fits_changes_nothing():
    layer = Conv3d(4, 6, 3)
    layer.weight, layer.in_channels = nn.Parameter(torch.ones(6, 1, 3, 3, 3)), 1
    layer(X[:, :1])
    assert bool((layer.weight == 1).all())


def test_weights_lent_for_one_call_are_not_renewed():
    layer = Conv3d(4, 6, 3)
    lent = {"weight": torch.ones(6, 2, 3, 3, 3)}
    assert torch.func.functional_call(layer, lent, (X[:, :2],)).shape == (1, 6, 2, 3, 1)
    assert layer.weight.shape[1] == 4


# Conversions and copies before the first call


def test_other_parameters_and_buffers_are_converted_too():
    layer = LazyConv3d(6, 3)
    layer.register_buffer("scale", torch.ones(2))
    layer.gain = nn.Parameter(torch.ones(2))
    layer.double()
    assert layer.scale.dtype == layer.gain.dtype == torch.float64
    assert layer(X.double()).dtype == torch.float64


def test_meta_and_back():
    layer = LazyConv3d(6, 3, device="meta").to_empty(device="cpu")
    assert layer(X).device.type == "cpu"
    layer = LazyConv3d(6, 3).to("meta")
    assert layer(X.to("meta")).is_meta and layer.weight.is_meta


@pytest.mark.parametrize("again", (copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))), ids=("deepcopy", "pickle"))
def test_copies_keep_what_was_asked_for(again):
    layer = again(LazyConv3d(6, 3).double().to(memory_format=torch.channels_last_3d))
    layer(X.double())
    assert layer.weight.dtype == layer.bias.dtype == torch.float64
    assert layer.weight.is_contiguous(memory_format=torch.channels_last_3d) and not layer.weight.is_contiguous()


# States


@pytest.mark.parametrize("name", ("weight", "bias"))
def test_a_part_of_a_state_is_kept(name):
    value = Conv3d(4, 6, 3).state_dict()[name]
    layer = LazyConv3d(6, 3)
    layer.load_state_dict({name: value}, strict=False)
    layer(X)
    assert type(layer) is Conv3d and torch.equal(getattr(layer, name), value)


@pytest.mark.parametrize("other", (dict(out_channels=8), dict(kernel_size=1)), ids=str)
def test_a_state_of_another_layer_is_refused(other):
    state = Conv3d(**{"in_channels": 4, "out_channels": 6, "kernel_size": 3, **other}).state_dict()
    layer = LazyConv3d(6, 3)
    with pytest.raises(RuntimeError, match="size mismatch for weight"):
        layer.load_state_dict(state)
    assert layer(X).shape == (1, 6, 2, 3, 1)


# Materialize


def test_materialize_draws_what_constructing_would():
    torch.manual_seed(3)
    model = materialize(nn.Sequential(LazyConv3d(6, 3), nn.Dropout(), nn.LazyLinear(2)), X)
    after = torch.rand(1)
    torch.manual_seed(3)
    layers = nn.Conv3d(4, 6, 3), nn.Linear(1, 2)
    assert torch.equal(model[0].weight, layers[0].weight) and torch.equal(model[2].weight, layers[1].weight)
    assert torch.equal(after, torch.rand(1))


def test_materialize_by_name():
    model = nn.ModuleDict({"a": LazyConv3d(6, 3), "b": nn.Sequential(LazyConv3d(2, 1, groups=2))})
    materialize(model, in_channels={"a": 4, "b.0": 6})
    assert model["a"].weight.shape == (6, 4, 3, 3, 3) and model["b"][0].weight.shape == (2, 3, 1, 1, 1)


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.unused = LazyConv3d(6, 3), LazyConv3d(6, 3)

    def forward(self, x):
        return self.used(x)


class Deciding(Branching):
    def forward(self, x):
        return self.used(x) if x.sum() < 1e9 else x


BAD = {
    "nothing": (lambda: materialize(LazyConv3d(6, 3)), TypeError, "example_input"),
    "unreached": (lambda: materialize(Branching(), X), RuntimeError, "unused"),
    "value-dependent": (lambda: materialize(Deciding(), X), RuntimeError, "run the model once"),
    "zero": (lambda: materialize(LazyConv3d(6, 3), in_channels=0), TypeError, "in_channels=0"),
    "no-convolution": (lambda: materialize(nn.Linear(3, 3), in_channels=4), TypeError, "Linear"),
    "contradiction": (lambda: materialize(assigned(3), X), RuntimeError, "in_channels=3"),
}


def assigned(channels: int) -> LazyConv3d:
    layer = LazyConv3d(6, 3)
    layer.in_channels = channels
    return layer


@pytest.mark.parametrize("call, error, named", BAD.values(), ids=BAD.keys())
def test_materialize_refuses(call, error, named):
    with pytest.raises(error, match=named):
        call()


# Uses that need a shape


@pytest.fixture
def process_group():
    import torch.distributed as dist

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_fsdp_names_the_remedy(process_group):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    with pytest.raises(RuntimeError, match="materialize"):
        fully_shard(nn.Sequential(LazyConv3d(6, 3)), mesh=init_device_mesh("cpu", (1,)))


def test_ddp_refuses(process_group):
    model = nn.Sequential(LazyConv3d(6, 3))
    with pytest.raises(RuntimeError, match="uninitialized parameters"):
        nn.parallel.DistributedDataParallel(model)
    assert nn.parallel.DistributedDataParallel(materialize(model, X))(X).shape == (1, 6, 2, 3, 1)


NEEDS_A_SHAPE = {
    "shape": lambda layer: layer.weight.shape,
    "share_memory": lambda layer: layer.share_memory(),
    "norm": lambda layer: layer.weight.norm(),
}


@pytest.mark.parametrize("use", NEEDS_A_SHAPE.values(), ids=NEEDS_A_SHAPE.keys())
@pytest.mark.parametrize("converted", (False, True), ids=("own", "converted"))
def test_uses_that_need_a_shape_name_the_remedy(use, converted):
    layer = nn.LazyConv3d(6, 3) if converted else LazyConv3d(6, 3)
    convert_conv3d(layer)
    with pytest.raises((RuntimeError, ValueError), match="materialize"):
        use(layer)


# Conversion and tracing


def test_converting_a_lazy_layer_that_was_loaded():
    layer = nn.LazyConv3d(6, 3)
    layer.load_state_dict(nn.Conv3d(4, 6, 3).state_dict())
    convert_conv3d(layer)
    assert type(layer) is Conv3d and layer.in_channels == 4 and layer(X).shape == (1, 6, 2, 3, 1)


def test_converting_a_parametrized_layer_leaves_its_copies():
    layer = nn.utils.parametrizations.weight_norm(nn.Conv3d(4, 6, 3))
    twin, expected = copy.deepcopy(layer), layer(X)
    assert convert_conv3d(layer).converted == [""]
    assert isinstance(layer, Conv3d) and not isinstance(twin, Conv3d)
    torch.testing.assert_close(layer(X), expected, rtol=1e-4, atol=1e-5)
    nn.utils.parametrize.remove_parametrizations(layer, "weight")
    assert type(layer) is Conv3d


def test_symbolic_tracing():
    model = nn.Sequential(Conv3d(4, 6, 3), nn.ReLU(), Conv3d(6, 2, 1, padding_mode="circular"))
    torch.testing.assert_close(torch.fx.symbolic_trace(model)(X), model(X))


def test_compiling_an_assigning_model():
    class Assigning(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = LazyConv3d(6, 3)

        def forward(self, x):
            self.layer.in_channels = x.shape[1]
            return self.layer(x)

    model = materialize(Assigning(), X)
    compiled = torch.compile(model, backend="eager")
    assert compiled(X).shape == (1, 6, 2, 3, 1)
    with pytest.warns(UserWarning, match="in_channels=2 was assigned"):
        assert compiled(X[:, :2]).shape == (1, 6, 2, 3, 1)
    assert model.layer.weight.shape == (6, 2, 3, 3, 3)
