"""What keeps channels-last in compiled graphs: instance norms, however called, and gradients of parts and means."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from compiled import by_aten, compare, compiled, conversions_between_convolutions, graphs  # noqa: F401
from tolerances import COMPILED
from torch import nn

from triton_conv3d.compile_backend import backend, reports

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


PARTS = {  # of the first convolution's result, for the second one
    "frames": lambda y: y[:, :, 1:-1] + y[:, :, ::2][:, :, :2] + torch.stack([y[:, :, 0], y[:, :, -1]], 2),
    "channels": lambda y: torch.cat([y[:, 1:], y[:, :1]], 1),
    "a mean": lambda y: y * y.mean((2, 3, 4), keepdim=True),
    "masked": lambda y: y.masked_fill(y[:, :1] > 0.3, 0.5) + y,
    "pixels": lambda y: y * y[:, :, [0, 3], [1, 2], [4, 0]].mean(2)[:, :, None, None, None],
    "of a vector": lambda y: y + y.mean((0, 2, 3, 4))[1:].sum(),
}


@pytest.mark.parametrize("name", PARTS)
def test_gradients_of_parts_and_means(name):
    class Parts(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Conv3d(2, 3, 3, padding=1), nn.Conv3d(3, 2, 1)

        def forward(self, x):
            return self.last(PARTS[name](self.first(x)))

    off, made = compare(Parts(), torch.randn(2, 2, 4, 3, 5), True)
    assert off <= COMPILED and len(made) == 2
    scattered = name == "pixels"  # their gradients go into contiguous zeros
    assert [len(conversions_between_convolutions(g.graph)) for g in graphs] == [0, scattered]


COPIES = {  # of a channels-last input, which is then changed
    "contiguous": lambda x: x.contiguous(),
    "contiguous part": lambda x: x[:, :, 1:].split(2, 2)[0].contiguous(),
    "channels-last": lambda x: x.clone(memory_format=torch.channels_last_3d),
}


@pytest.mark.parametrize("name", COPIES)
def test_what_is_asked_for_as_a_copy_is_one(name):
    class Copying(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv3d(2, 2, 3, padding=1)

        def forward(self, x):
            kept, y = COPIES[name](x), self.conv(x).relu()
            x.add_(1)
            return y, y.clone(memory_format=torch.channels_last_3d), kept

    x = torch.randn(2, 2, 4, 3, 5).contiguous(memory_format=torch.channels_last_3d)
    before = COPIES[name](x)
    with torch.no_grad():
        y, copied, kept = compiled(Copying())(x)
    assert kept.equal(before) and graphs and copied.equal(y) and copied.data_ptr() != y.data_ptr()


AMOUNTS = {  # of padding, for volumes of any size; what is folded forward and backward
    "numbers, up to a multiple": (lambda x: F.pad(x, (1, -x.shape[4] % 4, 0, 2, 2, 0)), ["padding"], ["padding"]),
    "zeros, once cropped perhaps": (
        lambda x: torch.cat([x.new_zeros(*x.shape[:2], 2, x.shape[3], 7), F.pad(x, (0, 7 - x.shape[4]))], 2), ["padding"], [],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", AMOUNTS)
def test_padding_of_volumes_of_any_size(name):
    pad, *fused = AMOUNTS[name]
    conv = nn.Conv3d(2, 2, 3, padding=(1, 0, 0))

    def padded(x):
        return conv(pad(x.sin()))

    torch._dynamo.reset()
    function = torch.compile(padded, backend=backend, options={"inner": "aot_eager"}, dynamic=True)
    for size in ((4, 5, 6), (5, 6, 9)):
        x = torch.randn(3, 2, *size, requires_grad=True)
        given, wanted = (torch.autograd.grad(f(x).square().sum(), (x, conv.weight)) for f in (function, padded))
        torch.testing.assert_close(given, wanted, rtol=1e-4, atol=1e-4)
    assert [r.fused for r in reports()] == fused


def test_a_part_that_is_kept_for_backward_is_laid_out_for_an_op_of_its_own_strides():
    class Cropped(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.out = nn.ConvTranspose3d(2, 4, 2, 2), nn.Conv3d(4, 2, 3)

        def forward(self, x):
            y = self.up(x)[:, :, 1:, :-1]
            return self.out(F.layer_norm(y.movedim(1, -1), (4,)).movedim(-1, 1))

    off, made = compare(Cropped(), torch.randn(2, 2, 3, 3, 4), True)
    assert off <= COMPILED and [r.kind for r in made] == ["forward", "backward"]


def test_depth_that_data_decide():
    conv = nn.Conv3d(2, 2, 3, padding=1).requires_grad_(False)

    def cut(x, depth):
        depth = depth.item()
        torch._check(1 < depth)
        torch._check(depth < 5)
        return conv(x[:, :, :depth])

    torch._dynamo.reset()
    arguments = torch.randn(2, 2, 5, 3, 4), torch.tensor(3)
    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        given = torch.compile(cut, backend=backend, options={"inner": "aot_eager"}, fullgraph=True)(*arguments)
    torch.testing.assert_close(given, cut(*arguments))  # which a CPU may add up in another order, laid out otherwise
    assert [r.inserted["leaving"] for r in reports()] == [1]


class Noisy(nn.Module):
    """The bottleneck of a variational autoencoder, or whatever draws numbers for its positions."""

    def __init__(self, draw):
        super().__init__()
        self.draw, self.first, self.last = draw, nn.Conv3d(2, 3, 3), nn.Conv3d(3, 2, 1)

    def forward(self, x):
        x = self.first(x).relu()
        return self.last(self.draw(x))


DRAWN = {
    "normal": lambda x: x + x.exp() * torch.randn_like(x),
    "uniform": lambda x: x + torch.rand_like(x, dtype=torch.float64).float(),
    "of a part": lambda x: x + torch.randn_like(x[:, :1]),
    "dropout of channels": lambda x: F.dropout3d(x, 0.4, True),
}


@pytest.mark.parametrize("memory_format", (torch.contiguous_format, torch.channels_last_3d), ids=("ncdhw", "ndhwc"))
@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("name", DRAWN)
def test_each_position_gets_the_random_number_that_it_gets_in_eager_mode(name, training, memory_format):
    off, _ = compare(Noisy(DRAWN[name]), torch.randn(2, 2, 5, 4, 6).contiguous(memory_format=memory_format), training)
    assert off <= COMPILED


def test_dropout_draws_in_the_order_of_memory_and_makes_no_conversion():
    _, made = compare(Noisy(lambda x: F.dropout(x, 0.4, True)), torch.randn(2, 2, 5, 4, 6), True)
    assert all(not {"inside", "reshape"} & set(r.inserted) for r in made)
