"""convert_conv3d: only the class of a layer changes, and what could compute something else is left and reported."""

from __future__ import annotations

import copy
import pickle
import re

import pytest
import torch
from compiled import error
from tolerances import COMPILED
from torch import nn

from triton_conv3d import Conv3d, LazyConv3d, configure, convert_conv3d, tuning

X = torch.randn(1, 4, 5, 5, 6, generator=torch.Generator().manual_seed(0))


class Causal(nn.Conv3d):
    """Pads in time at the front, as the convolutions of video autoencoders do; may be given earlier frames."""

    def forward(self, x, earlier=None):
        x = nn.functional.pad(x, (0, 0, 0, 0, 2, 0)) if earlier is None else torch.cat([earlier, x], dim=2)
        return super().forward(x)


class InChunks(nn.Conv3d):
    """Long inputs go through in parts."""

    def forward(self, x):
        return torch.cat([self._conv_forward(part, self.weight, self.bias) for part in x.split(1)])


class Simple(nn.Conv3d):
    """Only the constructor is its own, as in torchvision's video networks."""

    def __init__(self, in_planes, out_planes, midplanes=None, stride=1, padding=1):
        super().__init__(in_planes, out_planes, kernel_size=3, stride=stride, padding=padding, bias=False)

    @staticmethod
    def get_downsample_stride(stride):
        return stride, stride, stride


class Derived(Causal):
    def forward(self, x):
        return super().forward(x) * 2


class ByHand(nn.Conv3d):
    def forward(self, x):
        return nn.functional.conv3d(x, self.weight.square(), self.bias)


class Partly(nn.Conv3d):
    def forward(self, x):
        return super().forward(x) + nn.functional.conv3d(x, self.weight)


class OnByHand(ByHand):
    def forward(self, x):
        return super().forward(x)


class Standardised(nn.Conv3d):
    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, weight - weight.mean(), bias)


class LazySubclass(nn.LazyConv3d):
    pass


class Upsampling(nn.ConvTranspose3d):
    def forward(self, x, output_size=None):
        return super().forward(x, output_size).relu()


class Doubling(nn.ConvTranspose3d):
    """Only the constructor is its own."""

    def __init__(self, channels, filters):
        super().__init__(channels, filters, 2, stride=2)


class Unpooled(Doubling):
    def forward(self, x):
        return nn.ConvTranspose3d.forward(self, x)  # not by super(), which alone finds ours


class TransposedByHand(nn.ConvTranspose3d):
    def forward(self, x):
        return super().forward(x) + nn.functional.conv_transpose3d(x, self.weight)


class LazyUpsampling(nn.LazyConvTranspose3d):
    pass


def test_convert_keeps_everything_but_the_class():
    model = nn.Sequential(nn.Conv3d(4, 4, 3), nn.LazyConv3d(2, 1), ByHand(2, 2, 1), nn.ConvTranspose3d(2, 2, 2))
    calls = []
    model[0].register_forward_hook(lambda *_: calls.append(1))
    parameters = list(model[0].parameters())
    report = convert_conv3d(model)
    assert report.converted == ["0", "1", "3"] and set(report.skipped) == {"2"} and "ByHand" in str(report)
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


LEFT = {
    "by-hand": (lambda: ByHand(4, 6, 3), "ByHand is a subclass .* does not end in"),
    "partly": (lambda: Partly(4, 6, 3), "also convolves by itself"),
    "on-by-hand": (lambda: OnByHand(4, 6, 3), "does not end in"),
    "inner": (lambda: Standardised(4, 6, 3), "with its own _conv_forward"),
    "lazy": (lambda: LazySubclass(6, 3), "derive it from triton_conv3d.LazyConv3d"),
    "transposed": (lambda: Unpooled(4, 6), "Unpooled is a subclass of torch.nn.ConvTranspose3d: .* does not end in"),
    "transposed-by-hand": (lambda: TransposedByHand(4, 6, 3), "also convolves by itself"),
    "transposed-lazy": (lambda: LazyUpsampling(6, 3), "derive it from triton_conv3d.LazyConvTranspose3d"),
    "patched": (lambda: patched(), "replaced on the instance"),
}


def patched():
    layer = Causal(4, 6, 3)
    layer.forward = lambda x: x
    return layer


@pytest.mark.parametrize("make, reason", LEFT.values(), ids=LEFT)
def test_convert_leaves_what_could_compute_something_else(make, reason):
    layer = make()
    kind, report = type(layer), convert_conv3d(layer)
    assert not report.converted and re.search(reason, report.skipped[""]) and type(layer) is kind


def test_convert_passes_over_what_is_no_conv3d_of_torch():
    report = convert_conv3d(nn.Sequential(nn.Conv2d(4, 6, 3), Conv3d(4, 6, 3), LazyConv3d(2, 1)))
    assert not report.converted and not report.skipped


def used(layer: nn.Module, *inputs) -> tuple[torch.Tensor, int]:
    """What a layer gives, and how many of our convolutions that took."""
    problems, run = [], tuning.run
    with pytest.MonkeyPatch.context() as patch, configure(engine="aten"):
        patch.setattr(tuning, "run", lambda *a: problems.append(a[0]) or run(*a))
        return layer(*inputs), len(problems)


SUBCLASSES = {
    "causal": (lambda: Causal(4, 6, 3, padding=(0, 1, 1)), 1),
    "causal-reflect": (lambda: Causal(4, 6, 3, padding=(0, 1, 1), padding_mode="reflect"), 1),
    "chunks": (lambda: InChunks(4, 6, 3), 2),
    "simple": (lambda: Simple(4, 6, stride=2), 1),
    "derived": (lambda: Derived(4, 6, 3), 1),
    "transposed": (lambda: Upsampling(4, 6, 3, stride=2), 1),
    "transposed-simple": (lambda: Doubling(4, 6), 1),
    "transposed-weight-norm": (lambda: nn.utils.parametrizations.weight_norm(Upsampling(4, 6, 3), dim=1), 1),
    "causal-weight-norm": (lambda: nn.utils.parametrizations.weight_norm(Causal(4, 6, 3)), 1),
}


@pytest.mark.parametrize("make, convolutions", SUBCLASSES.values(), ids=SUBCLASSES)
def test_convert_subclasses_that_leave_the_convolution_to_torch(make, convolutions):
    layer = make()
    x = torch.cat([X, 2 * X])
    (expected, before), kind, state = used(layer, x), type(layer), list(layer.state_dict())
    assert before == 0 and convert_conv3d(layer).converted == [""] and convert_conv3d(layer).converted == []
    assert type(layer).__name__ == kind.__name__ and list(layer.state_dict()) == state
    if not nn.utils.parametrize.is_parametrized(layer):
        assert isinstance(layer, kind)
    result, count = used(layer, x)
    assert count == convolutions
    torch.testing.assert_close(result, expected)
    assert used(copy.deepcopy(layer), x)[1] == convolutions
    if not nn.utils.parametrize.is_parametrized(layer):  # torch does not pickle those
        again = pickle.loads(pickle.dumps(layer))
        result, count = used(again, x)
        torch.testing.assert_close(result, expected)
        assert isinstance(again, kind) and count == convolutions


def test_convert_keeps_further_arguments():
    layer, earlier = Causal(4, 6, 3), torch.randn(1, 4, 2, 5, 6)
    expected = layer(X, earlier)
    convert_conv3d(layer)
    torch.testing.assert_close(used(layer, X, earlier)[0], expected)


class Residual(nn.Module):
    """A block in the style of segmentation networks: (convolution, norm, dropout, activation) twice, and a shortcut."""

    def __init__(self, channels, filters, stride):
        super().__init__()
        self.unit0 = self.unit(channels, filters, stride)
        self.unit1 = self.unit(filters, filters, 1)
        self.residual = nn.Conv3d(channels, filters, 3, stride, padding=1)

    def unit(self, channels, filters, stride):
        adn = nn.Sequential(nn.InstanceNorm3d(filters), nn.Dropout(0.0), nn.PReLU())
        return nn.Sequential(nn.Conv3d(channels, filters, 3, stride, padding=1), adn)

    def forward(self, x):
        return self.unit1(self.unit0(x)) + self.residual(x)


def segmentation():
    down, up = Residual(4, 6, 2), nn.ConvTranspose3d(6, 4, 2, 2, output_padding=(1, 1, 0))
    return nn.Sequential(down, up, nn.InstanceNorm3d(4), nn.PReLU(), nn.Conv3d(4, 2, 1)), 5, []


def video():
    stem = nn.Sequential(nn.Conv3d(4, 6, (3, 5, 5), (1, 2, 2), (1, 2, 2), bias=False), nn.BatchNorm3d(6), nn.ReLU())
    block = nn.Sequential(Simple(6, 8, stride=2), nn.BatchNorm3d(8), nn.ReLU(), Simple(8, 8), nn.BatchNorm3d(8))
    return nn.Sequential(stem, block, nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(8, 3)), 3, []


def decoder():
    layers = (Causal(4, 6, 3, padding=(0, 1, 1)), nn.GroupNorm(2, 6), nn.SiLU(), nn.Upsample(scale_factor=(1, 2, 2)))
    return nn.Sequential(*layers, Causal(6, 6, (3, 1, 1)), nn.Conv3d(6, 2, 1)), 3, []


@pytest.mark.parametrize("make", (segmentation, video, decoder), ids=lambda f: f.__name__)
def test_convert_networks(make):
    torchs, convolutions, left = make()
    ours = copy.deepcopy(torchs)
    report = convert_conv3d(ours)
    assert len(report.converted) == convolutions and list(report.skipped) == left
    x = torch.cat([X, X.flip(2)])
    result, count = used(ours, x)
    assert count == convolutions
    expected = torchs(x)
    torch.testing.assert_close(result, expected)
    for y in (result, expected):
        y.square().sum().backward()
    # As one vector: single ones, such as of a bias before a normalisation, are nothing but roundoff.
    found, wanted = (torch.cat([p.grad.flatten() for p in model.parameters()]) for model in (ours, torchs))
    assert error(found, wanted) <= COMPILED


def test_convert_declares_no_class_to_its_bases():
    class Registered(nn.Conv3d):
        def __init_subclass__(cls, *, name):
            super().__init_subclass__()
            registry[name] = cls

    registry = {}

    class Layer(Registered, name="layer"):
        pass

    layer = Layer(2, 3, 1)
    assert convert_conv3d(layer).converted == [""] and registry == {"layer": Layer} and type(layer) is not Layer


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
