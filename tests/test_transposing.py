"""Copies from one memory format to the other: every element, nothing else, and where the kernel makes them."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from cases import DEVICE, Case, judge, make, run

pytest.importorskip("triton")
import triton.language as tl

from triton_conv3d import configure, conv3d, conv_transpose3d
from triton_conv3d.engines import aten, base, implicit_gemm, transposing
from triton_conv3d.engines.base import in_format
from triton_conv3d.engines.launching import launch_kernel

LAST, FIRST = torch.channels_last_3d, torch.contiguous_format
SHAPES = {
    "even": (2, 64, 4, 8, 8),
    "odd": (3, 5, 3, 7, 9),
    "few_channels": (1, 3, 5, 6, 70),
    "many_channels": (1, 130, 2, 3, 5),
    "channels_of_three_tiles": (2, 96, 2, 4, 8),
    "one_plane": (2, 8, 1, 5, 6),
    "one_line": (2, 8, 1, 1, 40),
    "one_column": (2, 8, 3, 4, 1),
    "one_channel": (2, 1, 3, 4, 5),
    "one_pixel": (2, 6, 1, 1, 1),
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@pytest.fixture(autouse=True)
def at_any_size(monkeypatch):
    monkeypatch.setattr(base, "LEAST_TRANSPOSED", 0)


@pytest.fixture
def copied(monkeypatch) -> list:
    """What the kernel was asked for, and whether it could."""
    calls, transposed = [], transposing.transposed

    def noted(tensor, channels_last):
        copy = transposed(tensor, channels_last)
        calls.append(copy is not None)
        return copy

    monkeypatch.setattr(transposing, "transposed", noted)
    return calls


def volume(shape, dtype=torch.float32) -> torch.Tensor:
    """Every element another number, as far as the type has so many; a NaN among them."""
    x = torch.arange(torch.Size(shape).numel(), device=DEVICE).remainder(2039).to(dtype).reshape(shape)
    x.view(-1)[1] = float("nan")
    return x


def check(tensor: torch.Tensor, memory_format: torch.memory_format) -> torch.Tensor:
    copy = in_format(tensor, memory_format)
    assert (
        copy.dtype == tensor.dtype and copy.stride() == torch.empty(tensor.shape, memory_format=memory_format).stride()
    )
    torch.testing.assert_close(copy, tensor, rtol=0, atol=0, equal_nan=True)
    return copy


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_there_and_back(shape, dtype, copied):
    x = volume(shape, dtype)
    check(check(x, LAST), FIRST)
    moves = shape[1] > 1 and torch.Size(shape[2:]).numel() > 1
    assert copied == ([True, shape[4] > 1] if moves else [])


CUTS = {  # and whether the kernel copies what is left
    "samples": (lambda x: x[::2], True),
    "channels": (lambda x: x[:, 3:11], True),
    "planes": (lambda x: x[:, :, 1:], True),
    "one_sample_again": (lambda x: x[:1].expand(3, -1, -1, -1, -1), True),
    "lines": (lambda x: x[..., 1:, :], False),
    "columns": (lambda x: x[..., ::2], False),
    "turned": (lambda x: x.transpose(3, 4), False),
}


@pytest.mark.parametrize("to, other", ((LAST, FIRST), (FIRST, LAST)), ids=("to_last", "to_first"))
@pytest.mark.parametrize("cut", CUTS)
def test_views(cut, to, other, copied):
    of, expected = CUTS[cut]
    check(of(volume((4, 16, 3, 5, 7)).contiguous(memory_format=other)), to)
    assert copied == [expected]


@pytest.mark.parametrize(
    "to, strides", ((LAST, (64, 32, 8, 1)), (FIRST, (1, 512, 128, 16))), ids=("to_last", "to_first")
)
def test_samples_at_uneven_distances(to, strides, copied):
    """Not as many vectors apart as all the rest."""
    check(volume((1, 1, 1, 2, 1100)).as_strided((2, 16, 2, 4, 8), (1026, *strides)), to)
    assert copied == [True]


def test_offsets_beyond_32_bits(copied, monkeypatch):
    """A limit of two bytes makes any volume a large one."""
    monkeypatch.setattr(transposing, "INT32_BYTES", 1)
    launched = []
    monkeypatch.setattr(
        transposing, "launch_kernel", lambda *args: (launched.append(args[3]["INDEX"]), launch_kernel(*args))
    )
    check(check(volume(SHAPES["odd"]), LAST), FIRST)
    assert launched == [tl.int64] * 2


@pytest.mark.parametrize("numel", (0, 1))
def test_small_volumes_are_torchs(numel, copied, monkeypatch):
    x = volume(SHAPES["odd"])
    monkeypatch.setattr(base, "LEAST_TRANSPOSED", x.numel() + numel)
    check(x, LAST)
    assert copied == [True] * (1 - numel)


@pytest.mark.parametrize(
    "dtype", (torch.complex64, torch.float8_e5m2, torch.int16, torch.bool), ids=lambda d: str(d)[6:]
)
def test_other_dtypes_are_torchs(dtype, copied):
    x = torch.ones(SHAPES["odd"], device=DEVICE).to(dtype)
    assert (
        in_format(x, LAST).equal(x)
        if dtype != torch.float8_e5m2
        else in_format(x, LAST).is_contiguous(memory_format=LAST)
    )
    assert copied == [False]


@pytest.mark.parametrize("pass_", ("forward", "dgrad", "wgrad"))
@pytest.mark.parametrize(
    "engine, config",
    ((implicit_gemm, None), (aten, aten.AtenConfig(channels_last=True))),
    ids=("implicit_gemm", "aten"),
)
def test_engines_copy_by_it(engine, config, pass_, copied):
    case = Case(pass_, 2, 16, 8, (3, 4, 6), padding=(1,) * 6, layouts=("contiguous",) * 2, channels_last=False)
    run(case, engine, config)
    assert copied and all(copied)


LAYERS = {  # of contiguous tensors, and how often backward copies what both of its passes read
    "convolution": (conv3d, True, True, 1),
    "transposed": (conv_transpose3d, True, True, 1),
    "input_alone": (conv3d, True, False, 1),
    "weight_alone": (conv3d, False, True, 1),
    "neither": (conv3d, False, False, 0),
}


@pytest.mark.parametrize("function, of_input, of_weight, count", LAYERS.values(), ids=LAYERS)
def test_two_passes_share_a_copy(function, of_input, of_weight, count, monkeypatch):
    """Of the gradient that both read, for as long as backward takes."""
    torch.manual_seed(0)
    x, weight = torch.randn(2, 16, 3, 4, 6, device=DEVICE), torch.randn(16, 16, 3, 3, 3, device=DEVICE)
    bias = torch.randn(16, device=DEVICE, requires_grad=True)
    x.requires_grad_(of_input), weight.requires_grad_(of_weight)
    inputs = [tensor for tensor in (x, weight, bias) if tensor.requires_grad]
    with configure(engine="implicit_gemm", fp32="ieee"):
        y = function(x, weight, bias, padding=1)
        grad, copies = torch.randn_like(y), []
        move = transposing.transposed

        def noted(tensor, channels_last):
            copies.append(tensor.data_ptr() == grad.data_ptr())
            return move(tensor, channels_last)

        monkeypatch.setattr(transposing, "transposed", noted)
        gradients = torch.autograd.grad(y, inputs, grad)
    assert copies.count(True) == count
    assert base._shared.tensor is None
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        reference = getattr(torch.nn.functional, function.__name__)(x, weight, bias, padding=1)
        expected = torch.autograd.grad(reference, inputs, grad)
    for ours, torchs in zip(gradients, expected, strict=True):
        torch.testing.assert_close(ours, torchs, rtol=1e-4, atol=1e-3)


def test_another_threads_copies_are_its_own():
    x = volume(SHAPES["odd"])
    with base.sharing(x), ThreadPoolExecutor(1) as pool:
        first, again, elsewhere = in_format(x, LAST), in_format(x, LAST), pool.submit(in_format, x, LAST).result()
        assert first is again and elsewhere is not first
        base.forget_copies()
        assert in_format(x, LAST) is not first
    assert in_format(x, LAST) is not in_format(x, LAST)


def test_the_last_resort_needs_no_kernel(copied):
    """torch's own convolution on a CPU is contiguous, whatever it is asked for."""
    run(Case("forward", 2, 16, 8, (3, 4, 6), padding=(1,) * 6), aten, aten.AtenConfig())
    assert copied == []


@pytest.mark.parametrize("padding", ((1,) * 6, (0, 1, 1, 0, 2, 0)), ids=("even", "uneven"))
@pytest.mark.parametrize("channels_last, config, shown", [
    (True, aten.AtenConfig(), True),
    (False, aten.AtenConfig(), False),
    (False, aten.AtenConfig(channels_last=True), True),
], ids=("channels_last", "contiguous", "copied"))  # fmt: skip
def test_torchs_dgrad_on_a_gpu_follows_the_format_of_its_result(channels_last, config, shown, padding, monkeypatch):
    """cuDNN's operands are brought into the format of the input, though it is not read."""
    layouts = ("channels_last" if channels_last else "contiguous",) * 2
    case = Case("dgrad", 2, 3, 5, (4, 5, 6), padding=padding, stride=(1, 2, 1), layouts=layouts, channels_last=channels_last)
    problem, operands = make(case)
    on_gpu, seen, backward = problem.replace(arch="sm_90"), [], torch.ops.aten.convolution_backward

    def spied(grad, input, *rest):
        seen.append(input)
        return backward(grad, input, *rest)

    monkeypatch.setattr(torch.ops.aten, "convolution_backward", spied)
    judge(case, problem, operands, aten.launch(on_gpu, operands, config), engine="aten")
    (input,) = seen
    assert input.is_contiguous(memory_format=LAST) == shown and (input.stride(0) > 0) == shown
    assert (aten.memory(on_gpu, config).workspace > 0) == shown
    assert aten.memory(on_gpu.replace(arch="cpu"), aten.AtenConfig()).workspace == 0
