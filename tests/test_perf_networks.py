"""Whole networks: their layers are those of the workloads, their sizes the published ones, and they run converted."""

from __future__ import annotations

import collections
import dataclasses

import pytest
import torch
from cases import DEVICE
from torch import nn

from perf import networks
from perf.networks import INFER, MODES, TRAIN, Network, wan_vae
from perf.workloads import real
from triton_conv3d import Conv3d, ConvTranspose3d, configure, convert_conv3d

ALL = networks.networks()
every = pytest.mark.parametrize("network", ALL.values(), ids=list(ALL))

# Parameters in millions, as published: torchvision's r3d_18, the model zoo of X3D, the paper of MedNeXt.
PARAMETERS = {"r3d18": ("33.371472", 6), "x3d_m": ("3.79", 2), "mednext_L_k3": ("61.8", 1)}

# real.json holds the layers that take most of a model's time. What else a network has: how many shapes, and which.
ABSENT = {
    "nnunet3d": (0, lambda layer: False),
    "mednext_L_k3": (28, lambda layer: layer.kernel == (1, 1, 1)),  # stem, head, bottleneck, blocks that resample
    "r3d18": (2, lambda layer: layer.kernel == (1, 1, 1)),  # the deeper two of the three shortcuts
    "x3d_m": (20, lambda layer: layer.kernel == (1, 1, 1) or layer.channels == 3),  # excitation, shortcuts, ends, stem
    "wan21_dec_480p": (4, lambda layer: layer.kernel == (1, 1, 1) or layer.channels == 16),  # shortcuts, latent, first
    "qwen2_vl": (0, lambda layer: False),
}


Shape = collections.namedtuple(
    "Shape", "transposed batch channels filters size kernel stride padding dilation groups bias"
)


def shapes(network: Network, mode: str) -> collections.Counter[Shape]:
    """The convolutions that one forward pass calls; a transposed one as the convolution whose gradient it is."""
    found: collections.Counter[Shape] = collections.Counter()

    def hook(layer, inputs, output):
        transposed = isinstance(layer, nn.ConvTranspose3d)
        channels, filters, size = layer.in_channels, layer.out_channels, inputs[0].shape[2:]
        if transposed:
            channels, filters, size = filters, channels, output.shape[2:]
        bias = layer.bias is not None and not transposed
        found[
            Shape(
                transposed, inputs[0].shape[0], channels, filters, tuple(size), layer.kernel_size, layer.stride,
                layer.padding, layer.dilation, layer.groups, bias,
            )
        ] += 1  # fmt: skip

    with torch.device("meta"), torch.no_grad():
        module = network.build(network.width)
        for layer in module.modules():
            if isinstance(layer, (nn.Conv3d, nn.ConvTranspose3d)):
                layer.register_forward_hook(hook)
        module(torch.empty(network.shape(mode)))
    return found


def workloads(network: Network) -> dict[Shape, int]:
    return {
        Shape(
            w.transposed, w.layer.batch, w.layer.in_channels, w.layer.out_channels, w.layer.input_size,
            w.layer.kernel_size, w.layer.stride, w.layer.padding, w.layer.dilation, w.layer.groups, w.layer.bias,
        ): w.calls
        for w in real()
        if w.suite == network.name
    }  # fmt: skip


@every
def test_the_layers_are_those_of_the_workloads(network):
    found, expected = shapes(network, INFER), workloads(network)
    assert expected and {shape: found[shape] for shape in expected} == expected
    count, allowed = ABSENT[network.name]
    others = set(found) - set(expected)
    assert len(others) == count and all(map(allowed, others)), others
    assert {w.layer.dtype for w in real() if w.suite == network.name} == {network.dtype}


@pytest.mark.parametrize("name", PARAMETERS)
def test_the_size_is_the_published_one(name):
    millions, digits = PARAMETERS[name]
    with torch.device("meta"):
        module = ALL[name].build(ALL[name].width)
    assert f"{sum(p.numel() for p in module.parameters()) / 1e6:.{digits}f}" == millions


def test_a_wan_latent_of_5_frames_is_a_video_of_17():
    network = dataclasses.replace(ALL["wan21_dec_480p"], infer=(1, 16, 5, 60, 104))
    assert network.output_shape(INFER) == (1, 3, 17, 480, 832)


@every
def test_a_tiny_one_runs_converted(network):
    """Every convolution of torch, transposed too, is this package's afterwards; output and gradients stay the same."""
    network = network.shrunk()
    torch_own, ours = network.module(), network.module()
    converted = convert_conv3d(ours).converted
    assert len(converted) == sum(type(m) in (nn.Conv3d, nn.ConvTranspose3d) for m in torch_own.modules()) > 0
    assert sum(type(m) in (Conv3d, ConvTranspose3d) for m in ours.modules()) == len(converted)
    input, target = network.batch(TRAIN, "cpu")
    outputs = []
    with configure(engine="aten"):
        for module in (torch_own, ours):
            outputs.append(module(input))
            network.loss(outputs[-1], target).backward()
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-4, atol=1e-5)
    assert tuple(outputs[0].shape) == network.output_shape(TRAIN)
    first = [next(m for m in module.modules() if isinstance(m, nn.Conv3d)).weight.grad for module in (torch_own, ours)]
    assert first[0].norm() > 0 and (first[1] - first[0]).norm() <= 1e-2 * first[0].norm()


def test_our_kernels_compute_a_tiny_one():
    network = ALL["qwen2_vl"].shrunk()
    torch_own, ours = network.module(), network.module(device=DEVICE)
    convert_conv3d(ours)
    with configure(engine="implicit_gemm", strict=True, fp32="ieee"):
        for module, device in ((torch_own, "cpu"), (ours, DEVICE)):
            input, target = network.batch(TRAIN, device)
            network.loss(module(input), target).backward()
    torch.testing.assert_close(ours.proj.weight.grad.cpu(), torch_own.proj.weight.grad, rtol=1e-4, atol=1e-5)


def test_wan_remembers_between_the_pieces_of_a_video():
    """Convolved piece by piece, it is the convolution of the whole with two frames of zeros before it."""
    layer = wan_vae._Causal(2, 3, (3, 3, 3))
    x, past = torch.randn(1, 2, 7, 4, 5, generator=torch.Generator().manual_seed(0)), {}
    pieces = torch.cat([layer(piece, past) for piece in x.split((1, 1, 2, 3), 2)], 2)
    padded = nn.functional.pad(x, (1, 1, 1, 1, 2, 0))
    torch.testing.assert_close(pieces, nn.functional.conv3d(padded, layer.conv.weight, layer.conv.bias))


def test_wan_frames_see_no_later_ones():
    network = ALL["wan21_dec_480p"].shrunk()
    module = network.module().eval()
    latent, _ = network.batch(INFER, "cpu")
    with torch.no_grad():
        whole, changed = module(latent), module(latent + torch.tensor([0.0, 0.0, 1.0]).view(3, 1, 1))
    assert torch.equal(whole[:, :, :5], changed[:, :, :5]) and not torch.equal(whole[:, :, 5:], changed[:, :, 5:])


def test_equal_seeds_give_equal_weights_and_data():
    network = ALL["r3d18"].shrunk()
    state = torch.random.get_rng_state()
    weights = [next(network.module(seed).parameters()) for seed in (0, 0, 1)]
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    batches = [network.batch(mode, "cpu") for mode in (*MODES, TRAIN)]
    assert all(torch.equal(a, b) for a, b in zip(batches[0], batches[2], strict=True))


def test_an_unknown_network_is_told_what_exists():
    assert networks.get(None) == list(ALL.values()) and networks.get("x3d_m,r3d18") == [ALL["x3d_m"], ALL["r3d18"]]
    with pytest.raises(ValueError, match="'x3d': the networks are nnunet3d, mednext_L_k3, r3d18, x3d_m, wan21"):
        networks.get("r3d18,x3d")
