"""convert_conv3d: only the class of a layer changes, and what could compute something else is left and reported."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from triton_conv3d import Conv3d, LazyConv3d, convert_conv3d

X = torch.randn(1, 4, 5, 5, 6, generator=torch.Generator().manual_seed(0))


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
