"""The modules are torch's own in everything but the kernels; the lazy one does what torch's does not."""

from __future__ import annotations

import copy
import inspect
import io
import pickle

import pytest
import torch
from torch import nn

from triton_conv3d import Conv3d, LazyConv3d, convert_conv3d, materialize

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
    with pytest.warns(UserWarning, match="replaced") as warned:
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
        assert seen == ["before", "after"] * 2


def test_assignment_that_the_first_input_contradicts():
    layer = LazyConv3d(6, 3)
    layer.in_channels = 3
    with pytest.raises(RuntimeError, match="in_channels=3 was assigned"):
        layer(X)


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
    with pytest.raises(RuntimeError, match="uninitialized parameters"):  # torch's own words
        nn.parallel.DistributedDataParallel(LazyConv3d(6, 3))
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
    "not-reached": (lambda: materialize(Skipping(), X), RuntimeError, "does not reach unused"),
}


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


class Causal(nn.Conv3d):
    def forward(self, x):
        return super().forward(nn.functional.pad(x, (0, 0, 0, 0, 2, 0)))


def test_convert_keeps_everything_but_the_class():
    model = nn.Sequential(nn.Conv3d(4, 4, 3), nn.LazyConv3d(2, 1), Causal(2, 2, 3), nn.ConvTranspose3d(2, 2, 2))
    calls = []
    model[0].register_forward_hook(lambda *_: calls.append(1))
    parameters = list(model[0].parameters())
    report = convert_conv3d(model)
    assert report.converted == ["0", "1"] and set(report.skipped) == {"2", "3"} and "Causal" in str(report)
    assert all(a is b for a, b in zip(parameters, model[0].parameters(), strict=True))
    assert model(X).shape[1] == 2 and calls and type(model[1]) is Conv3d
    assert convert_conv3d(model).converted == []


def test_convert_a_layer_itself_and_by_filter():
    layer = nn.Conv3d(4, 6, 3)
    asked = []
    report = convert_conv3d(layer, lambda module, name: asked.append((module, name)))
    assert report.skipped == {"": "filter_fn left it out"} and type(layer) is nn.Conv3d and asked == [(layer, "")]
    assert convert_conv3d(layer).converted == [""] and type(layer) is Conv3d
    names = []
    model = nn.ModuleDict({"a": nn.Sequential(nn.Conv3d(2, 2, 1), nn.ReLU())})
    convert_conv3d(model, lambda module, name: names.append(name))
    assert names == ["a.0"]


def test_convert_refuses():
    with pytest.raises(TypeError, match="model must be a torch.nn.Module, got type"):
        convert_conv3d(nn.Conv3d)
    with pytest.raises(TypeError, match="filter_fn must be callable, got str"):
        convert_conv3d(nn.Conv3d(1, 1, 1), "0")


def test_convert_leaves_what_could_compute_something_else():
    class Named(nn.Conv3d):
        pass

    patched = nn.Conv3d(4, 6, 3)
    patched.forward = lambda x: x
    model = nn.Sequential(Named(4, 6, 3), patched, nn.Conv2d(4, 6, 3), Conv3d(4, 6, 3), LazyConv3d(2, 1))
    report = convert_conv3d(model)
    assert not report.converted and set(report.skipped) == {"0", "1"} and type(model[0]) is Named
    assert "derive it" in report.skipped["0"] and "instance" in report.skipped["1"]


def test_convert_a_shared_layer_once():
    layer = nn.Conv3d(4, 4, 1)
    assert convert_conv3d(nn.Sequential(layer, layer)).converted == ["0"]


@pytest.mark.parametrize("loaded", (False, True), ids=("lazy", "loaded"))
def test_convert_torchs_lazy_layer(loaded):
    layer = nn.LazyConv3d(6, 3, dtype=torch.float64)
    weight, source = layer.weight, nn.Conv3d(4, 6, 3, dtype=torch.float64)
    if loaded:
        layer.load_state_dict(source.state_dict())
    convert_conv3d(layer)
    assert type(layer) is (Conv3d if loaded else LazyConv3d) and layer.weight is weight
    assert layer.in_channels == (4 if loaded else 0)
    layer.load_state_dict(source.state_dict())
    assert type(layer) is Conv3d and layer.in_channels == 4 and torch.equal(layer(X.double()), source(X.double()))


@pytest.mark.filterwarnings("ignore:.*weight_norm")
@pytest.mark.parametrize(
    "norm", (nn.utils.weight_norm, nn.utils.spectral_norm, nn.utils.parametrizations.weight_norm,
             nn.utils.parametrizations.spectral_norm), ids=("weight", "spectral", "new-weight", "new-spectral")
)  # fmt: skip
def test_convert_keeps_norms_exact(norm):
    layer = norm(nn.Conv3d(4, 6, 3)).eval()
    twin = layer if norm is nn.utils.weight_norm else copy.deepcopy(layer)  # deepcopy refuses the first
    expected, state = layer(X), list(layer.state_dict())
    assert convert_conv3d(layer).converted == [""] and isinstance(layer, Conv3d)
    torch.testing.assert_close(layer(X), expected, rtol=1e-4, atol=1e-5)
    assert list(layer.state_dict()) == state and (twin is layer or not isinstance(twin, Conv3d))
    layer(X).sum().backward()
    if nn.utils.parametrize.is_parametrized(layer):
        assert convert_conv3d(layer).converted == []
        nn.utils.parametrize.remove_parametrizations(layer, "weight")
        assert type(layer) is Conv3d
