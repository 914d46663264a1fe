"""The lazy layer: what is asked of it before its first call, states, clear refusals, and materialize."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from triton_conv3d import Conv3d, LazyConv3d, convert_conv3d, materialize

X = torch.randn(1, 4, 5, 5, 6, generator=torch.Generator().manual_seed(0))


def seeded(make):
    torch.manual_seed(7)
    return make()


def test_assignment_that_the_first_input_contradicts():
    with pytest.raises(RuntimeError, match="in_channels=3 was assigned"):
        assigned(3)(X)


@pytest.mark.parametrize("assign", (False, True), ids=("copy", "assign"))
def test_loading_a_state_makes_it_a_plain_layer(assign):
    source, layer = Conv3d(4, 6, 3, groups=2), LazyConv3d(6, 3, groups=2)
    layer.load_state_dict(source.state_dict(), assign=assign)
    assert type(layer) is Conv3d and layer.in_channels == 4
    assert torch.equal(layer.weight, source.weight) and torch.equal(layer(X), source(X))
    assert (layer.weight.data_ptr() == source.weight.data_ptr()) == assign


def test_loading_keeps_the_memory_format_asked_for():
    layer = LazyConv3d(6, 3).to(memory_format=torch.channels_last_3d)
    layer.load_state_dict(nn.Conv3d(4, 6, 3).state_dict())
    assert layer.weight.is_contiguous(memory_format=torch.channels_last_3d) and not layer.weight.is_contiguous()


@pytest.mark.parametrize("name", ("weight", "bias"))
def test_loading_a_part_initialises_the_rest(name):
    state = {name: getattr(nn.Conv3d(4, 6, 3), name).detach()}
    layer = LazyConv3d(6, 3)
    assert len(layer.load_state_dict(state, strict=False).missing_keys) == 1
    layer(X)
    assert type(layer) is Conv3d and torch.equal(getattr(layer, name), state[name])
    other = layer.bias if name == "weight" else layer.weight
    assert 0 < other.abs().max() <= 1 / (4 * 27) ** 0.5  # torch's bound of initial values


@pytest.mark.parametrize("source", (nn.Conv3d(4, 7, 3), nn.Conv3d(4, 6, 2), nn.Conv2d(4, 6, 3)), ids=repr)
def test_loading_what_does_not_fit_is_refused(source):
    layer = LazyConv3d(6, 3)
    with pytest.raises(RuntimeError, match=r"size mismatch for weight.*\[6, any, 3, 3, 3\]"):
        layer.load_state_dict(source.state_dict())
    assert type(layer) is LazyConv3d and layer(X).shape[1] == 6


def test_state_of_a_lazy_layer_goes_through_a_file():
    file = io.BytesIO()
    torch.save(LazyConv3d(6, 3).state_dict(), file)
    file.seek(0)
    layer = LazyConv3d(6, 3)
    layer.load_state_dict(torch.load(file, weights_only=False))
    assert type(layer) is LazyConv3d and layer(X).shape[1] == 6


def test_first_call_in_inference_mode_leaves_trainable_parameters():
    layer = LazyConv3d(6, 3)
    with torch.inference_mode():
        layer(X)
        assert LazyConv3d(6, 3)(X).shape == (1, 6, 3, 3, 4)
    layer(X).sum().backward()
    assert not layer.weight.is_inference() and layer.weight.grad.shape == layer.weight.shape


def test_conversions_before_the_first_call_are_kept():
    layer = nn.Sequential(LazyConv3d(6, 3)).to(memory_format=torch.channels_last_3d).double()[0]
    layer = pickle.loads(pickle.dumps(copy.deepcopy(layer)))
    seeded(lambda: layer(X.double()))
    assert layer.weight.dtype == layer.bias.dtype == torch.float64
    assert layer.weight.is_contiguous(memory_format=torch.channels_last_3d) and not layer.weight.is_contiguous()
    assert vars(layer).keys() == vars(nn.Conv3d(4, 6, 3)).keys()
    assert torch.equal(layer.weight, seeded(lambda: nn.Conv3d(4, 6, 3, dtype=torch.float64)).weight)


def test_what_else_a_lazy_layer_holds_is_converted_too():
    layer = LazyConv3d(6, 3)
    layer.register_buffer("scale", torch.ones(2))
    layer.gain = nn.Parameter(torch.ones(2))
    layer.double()
    assert layer.scale.dtype == layer.gain.dtype == torch.float64
    assert layer(X.double()).dtype == torch.float64


def test_the_last_conversion_wins():
    layer = LazyConv3d(6, 3).to(memory_format=torch.channels_last_3d).to(memory_format=torch.contiguous_format)
    layer(X)
    assert layer.weight.is_contiguous()
    with pytest.raises(RuntimeError, match="rank 4"):
        LazyConv3d(6, 3).to(memory_format=torch.channels_last)


def test_another_device_before_the_first_call():
    layer = LazyConv3d(6, 3).to("meta")
    assert layer(X.to("meta")).device.type == "meta" and layer.weight.is_meta and type(layer) is Conv3d
    layer = LazyConv3d(6, 3, device="meta").to_empty(device="cpu")
    assert layer(X).device.type == "cpu"


ACCESSES = {
    "numel": lambda layer: layer.weight.numel(),
    "shape": lambda layer: layer.weight.shape,
    "share": lambda layer: layer.share_memory(),
    "load": lambda layer: nn.Conv3d(4, 6, 3).load_state_dict(layer.state_dict()),
    "functional": lambda layer: nn.functional.conv3d(X, layer.weight),
    "vector": lambda layer: nn.utils.parameters_to_vector(layer.parameters()),
    "init": lambda layer: nn.init.zeros_(layer.weight),
    "export": lambda layer: torch.export.export(layer, (X,)),
}


@pytest.mark.parametrize("access", ACCESSES.values(), ids=ACCESSES.keys())
def test_uninitialised_parameters_name_the_remedy(access):
    for layer in (LazyConv3d(6, 3), nn.LazyConv3d(6, 3), LazyConv3d(6, 3)):
        convert_conv3d(layer)
        with pytest.raises((RuntimeError, ValueError), match="materialize"):
            access(copy.deepcopy(pickle.loads(pickle.dumps(layer))))


@pytest.fixture
def one_process(tmp_path):
    if not torch.distributed.is_gloo_available():
        pytest.skip("gloo is not built in")
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_distributed_needs_parameters(one_process):
    from torch.distributed.fsdp import fully_shard

    with pytest.raises(RuntimeError, match="materialize"):
        fully_shard(LazyConv3d(6, 3))
    for model in (LazyConv3d(6, 3), nn.Sequential(nn.Conv3d(3, 3, 1), LazyConv3d(6, 3))):
        with pytest.raises(RuntimeError, match="DistributedDataParallel.*materialize"):
            nn.parallel.DistributedDataParallel(model)
    model = nn.parallel.DistributedDataParallel(materialize(LazyConv3d(6, 3), X))
    model(X).sum().backward()
    assert model.module.weight.grad is not None


class Sample(nn.Module):
    """Everything that a dry run could disturb: statistics, random numbers, hooks, buffers, other lazy layers."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.drop = LazyConv3d(6, 3), nn.BatchNorm3d(6), nn.Dropout(0.5)
        self.second, self.head = LazyConv3d(2, 1, bias=False), nn.LazyLinear(3)
        self.register_buffer("calls", torch.zeros(()))
        self.seen = []
        self.first.register_forward_hook(lambda *_: self.seen.append(1))

    def forward(self, x, *, noise=0.0):
        self.calls += 1
        x = self.drop(self.norm(self.first(x)))
        return self.head(self.second(x + noise * torch.rand(x.shape)).flatten(1))


def test_materialize_by_example_changes_nothing_else():
    model = Sample()
    model.drop.eval()
    before = copy.deepcopy(dict(model.named_buffers()))
    random = seeded(lambda: materialize(model, X, noise=0.1) and torch.rand(1))
    assert (type(model.first), type(model.second), type(model.head)) == (Conv3d, Conv3d, nn.Linear)
    assert model.first.in_channels == 4 and model.head.in_features == 2 * 3 * 3 * 4
    assert not model.seen and all(torch.equal(before[name], value) for name, value in model.named_buffers())
    assert model.training and model.norm.training and not model.drop.training
    assert all(p.device.type == "cpu" and p.requires_grad and p.grad is None for p in model.parameters())

    def plain():
        layers = nn.Conv3d(4, 6, 3), nn.Conv3d(6, 2, 1, bias=False), nn.Linear(72, 3)
        return [p for layer in layers for p in layer.parameters()], torch.rand(1)

    parameters, plain_random = seeded(plain)
    lazy = [p for layer in (model.first, model.second, model.head) for p in layer.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(lazy, parameters, strict=True)) and torch.equal(random, plain_random)
    assert materialize(model, X) is model and materialize(model) is model
    assert model(X).shape == (1, 3) and model.seen == [1]


def test_materialize_costs_no_computation():
    model = nn.Sequential(LazyConv3d(6, 3), nn.Conv3d(6, 4, 3), LazyConv3d(6, 3))
    materialize(model, torch.empty(64, 4, 999, 999, 999, device="meta"))
    assert [layer.in_channels for layer in model] == [4, 6, 4] and not any(p.is_meta for p in model.parameters())


def test_materialize_in_inference_mode_leaves_trainable_parameters():
    layer = LazyConv3d(6, 3)
    with torch.inference_mode():
        materialize(layer, X)
    layer(X).sum().backward()
    assert layer.weight.grad is not None


def test_materialize_with_spectral_norm_and_weight_norm():
    model = nn.Sequential(
        nn.utils.spectral_norm(nn.Conv3d(4, 4, 1)),
        nn.utils.parametrizations.weight_norm(nn.Conv3d(4, 4, 1)),
        LazyConv3d(6, 3),
    )
    assert materialize(model, X)[2].in_channels == 4


def test_materialize_by_channels():
    assert materialize(LazyConv3d(6, 3), in_channels=4)(X).shape[1] == 6
    assert materialize(nn.LazyConv3d(6, 3), in_channels=4)(X).shape[1] == 6
    model = nn.Sequential(nn.Sequential(LazyConv3d(6, 3)), LazyConv3d(2, 1))
    assert materialize(model, in_channels={"0.0": 4, "1": 6})(X).shape[1] == 2


class Branch(nn.Module):
    """Decides on values, which shapes alone cannot."""

    def __init__(self):
        super().__init__()
        self.a, self.b = LazyConv3d(6, 3), LazyConv3d(6, 3)

    def forward(self, x):
        return self.a(x) if x.sum() > 0 else self.b(x)


MISTAKES = {
    "nothing-given": (lambda: materialize(LazyConv3d(6, 3)), TypeError, "example_input"),
    "not-lazy": (lambda: materialize(Conv3d(4, 6, 3), in_channels=4), TypeError, "model must be a LazyConv3d"),
    "not-lazy-inside": (lambda: materialize(nn.Sequential(nn.ReLU()), in_channels={"0": 4}), TypeError, "0 must be"),
    "no-such-layer": (lambda: materialize(Branch(), in_channels={"c": 4}), AttributeError, "c"),
    "float": (lambda: materialize(LazyConv3d(6, 3), in_channels=4.0), TypeError, "in_channels=4.0"),
    "zero": (lambda: materialize(LazyConv3d(6, 3), in_channels=0), TypeError, "in_channels=0"),
    "groups": (lambda: materialize(LazyConv3d(6, 3, groups=3), in_channels=4), ValueError, "groups=3"),
    "values-needed": (lambda: materialize(Branch(), X), RuntimeError, "run the model once"),
    "bad-example": (lambda: materialize(LazyConv3d(6, 3), X[0, 0]), RuntimeError, r"size: .*\[5, 5, 6\]"),
    "contradiction": (lambda: materialize(assigned(3), X), RuntimeError, "in_channels=3 was assigned"),
    "not-reached": (lambda: materialize(Skipping(), X), RuntimeError, "does not reach unused"),
}


def assigned(channels: int) -> LazyConv3d:
    layer = LazyConv3d(6, 3)
    layer.in_channels = channels
    return layer


class Skipping(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.unused = LazyConv3d(6, 3), LazyConv3d(6, 3)

    def forward(self, x):
        return self.used(x)


@pytest.mark.parametrize("call, error, message", MISTAKES.values(), ids=MISTAKES.keys())
def test_materialize_refuses(call, error, message):
    with pytest.raises(error, match=message):
        call()
