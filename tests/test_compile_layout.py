"""Instance normalisation in compiled graphs, however it is called, and what it keeps of its input's statistics."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from compiled import by_aten, compare  # noqa: F401
from tolerances import COMPILED
from torch import nn

CALLS = {
    "torch's, without weights": lambda x, a, b, m, v, new: torch.instance_norm(
        x, None, None, m, v, new, 0.3, 1e-4, False
    ),
    "torch's, untracked": lambda x, a, b, m, v, new: torch.instance_norm(x, a, b, None, None, True, 0.3, 1e-4, False),
    "by position": lambda x, a, b, m, v, new: F.instance_norm(x, m, v, a, b, new, 0.3, 1e-4),
    "by name": lambda x, a, b, m, v, new: F.instance_norm(
        input=x, weight=a, bias=b, running_var=v, running_mean=m, use_input_stats=new, eps=1e-4
    ),
}


class Normalised(nn.Module):
    def __init__(self, call):
        super().__init__()
        self.call, self.first, self.last = call, nn.Conv3d(2, 3, 3), nn.Conv3d(3, 2, 1)
        self.weight, self.bias = nn.Parameter(torch.rand(3) + 0.5), nn.Parameter(torch.randn(3))
        self.register_buffer("mean", torch.randn(3))
        self.register_buffer("variance", torch.rand(3) + 0.5)

    def forward(self, x):
        return self.last(self.call(self.first(x), self.weight, self.bias, self.mean, self.variance, self.training))


@pytest.mark.parametrize("training", [True, False], ids=["its own", "running"])
@pytest.mark.parametrize("name", CALLS)
def test_every_way_to_normalise_is_what_torch_computes(name, training):
    off, made = compare(Normalised(CALLS[name]).train(training), torch.randn(2, 2, 5, 4, 6), True)
    assert off <= COMPILED
    assert all(not {"inside", "reshape"} & set(r.inserted) for r in made)


def test_a_lazy_norm_tracks_and_makes_no_conversion():
    model, x = (
        nn.Sequential(nn.Conv3d(2, 3, 3), nn.LazyInstanceNorm3d(), nn.ReLU(), nn.Conv3d(3, 2, 1)),
        torch.randn(2, 2, 5, 4, 6),
    )
    model(x)
    off, made = compare(model, x, True)
    assert off <= COMPILED and all(not {"inside", "reshape"} & set(r.inserted) for r in made)


def test_a_frozen_norm_is_folded_into_the_convolution():
    """By running statistics it is a number a channel, which Inductor does not know of."""
    model = nn.Sequential(nn.Conv3d(2, 3, 3), nn.InstanceNorm3d(3, affine=True, track_running_stats=True), nn.ReLU())
    off, (made,) = compare(model.eval(), torch.randn(2, 2, 5, 4, 6), False)
    assert off <= COMPILED and made.fused == ["scale", "bias + relu"]
