"""The ways in which people are told to use a lazy 3-D convolution. Each has to work."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from triton_conv3d import Conv3d, LazyConv3d, configure, conv3d


@pytest.fixture(autouse=True)
def torchs_engine():
    """The shapes are those of the tutorials, too large for Triton's interpreter."""
    with configure(engine="aten"):
        yield


class Assigning(nn.Module):
    """Sets the channel count from the input before every call."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        self.layer.in_channels = x.shape[1]
        return self.layer(x)


@pytest.mark.parametrize("assign", (True, False), ids=("assigned", "inferred"))
def test_first_call_learns_the_channels(assign):
    layer = LazyConv3d(out_channels=32, kernel_size=3)
    model = Assigning(layer) if assign else layer
    assert model(torch.randn(1, 4, 32, 32, 32)).shape == (1, 32, 30, 30, 30)
    assert type(layer) is Conv3d and layer.in_channels == 4


def test_another_channel_count_after_an_assignment():
    model = Assigning(LazyConv3d(out_channels=32, kernel_size=3))
    assert model(torch.randn(16, 4, 32, 32, 32)).shape == (16, 32, 30, 30, 30)
    with pytest.warns(UserWarning, match=r"\(32, 4, 3, 3, 3\) is replaced .*\(32, 8, 3, 3, 3\)"):
        assert model(torch.randn(32, 8, 32, 32, 32)).shape == (32, 32, 30, 30, 30)


def test_on_top_of_pretrained_features():
    features = nn.Sequential(
        nn.Conv3d(3, 32, 3), nn.ReLU(), nn.MaxPool3d(2), nn.Conv3d(32, 64, 3), nn.ReLU(), nn.MaxPool3d(2)
    )
    model = nn.Sequential(features, LazyConv3d(32, 3), nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(32, 100))
    assert model(torch.randn(1, 3, 32, 32, 32)).shape == (1, 100)
    assert model[1].in_channels == 64


def test_conv3d_without_channels_is_lazy():
    layer = Conv3d(in_channels=None, out_channels=32, kernel_size=3)
    assert isinstance(layer, LazyConv3d)
    assert Assigning(layer)(torch.randn(1, 4, 32, 32, 32)).shape == (1, 32, 30, 30, 30)


def test_custom_module_from_the_functional_form():
    class Own(nn.Module):
        def __init__(self, filters):
            super().__init__()
            self.filters, self.weight = filters, nn.UninitializedParameter()

        def forward(self, x):
            if isinstance(self.weight, nn.UninitializedParameter):
                self.weight.materialize((self.filters, x.shape[1], 3, 3, 3))
                nn.init.kaiming_uniform_(self.weight)
            return conv3d(x, self.weight, padding="same")

    assert Own(5)(torch.randn(1, 4, 6, 6, 6)).shape == (1, 5, 6, 6, 6)
