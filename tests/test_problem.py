"""Problem: geometry as torch computes it, work and bytes, what is read off tensors, and the ways out and back."""

from __future__ import annotations

import math
import pickle

import pytest
import torch
import torch.nn.functional as F

from triton_conv3d.problem import CHANNELS_LAST, CONTIGUOUS, STRIDED, VIEW, Operands, Problem, describe, layout_of

GEOMETRIES = {
    "plain": dict(input_size=(5, 6, 7), kernel_size=(3, 3, 3)),
    "strided": dict(input_size=(9, 8, 7), kernel_size=(3, 2, 1), stride=(2, 3, 4), padding=(1, 1, 0, 0, 2, 2)),
    "dilated": dict(input_size=(9, 11, 6), kernel_size=(3, 2, 2), dilation=(2, 5, 1), padding=(1, 1, 2, 2, 0, 0)),
    "whole": dict(input_size=(2, 3, 4), kernel_size=(2, 3, 4)),
    "groups": dict(input_size=(4, 4, 4), kernel_size=(1, 3, 1), groups=2),
}


@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES.keys())
def test_shapes_are_torchs(geometry):
    p = Problem("forward", 2, 4, 6, **geometry)
    assert F.conv3d(
        torch.empty(p.input_shape, device="meta"), torch.empty(p.weight_shape, device="meta"), None,
        p.stride, p.padding[::2], p.dilation, p.groups,
    ).shape == p.output_shape  # fmt: skip
    shapes = {"forward": p.output_shape, "dgrad": p.input_shape, "wgrad": p.weight_shape}
    assert {pass_: p.replace(pass_=pass_).result_shape for pass_ in shapes} == shapes


def test_asymmetric_padding():
    p = Problem("forward", 1, 1, 1, (4, 4, 4), (2, 2, 2), padding=(0, 1, 2, 0, 0, 0))
    assert p.output_size == (4, 5, 3)


def test_work_and_bytes():
    p = Problem("forward", 2, 4, 6, (4, 4, 4), (3, 1, 1), groups=2, dtype="float32")
    pixels = 2 * 2 * 4 * 4
    assert p.pixels == pixels and p.flops == 2 * pixels * 6 * 2 * 3
    assert p.min_bytes == 4 * (2 * 4 * 64 + 6 * 2 * 3 + pixels * 6)
    assert p.replace(bias=True).min_bytes == p.min_bytes + 4 * 6
    assert p.replace(residual=True, activation="relu").min_bytes == p.min_bytes + 4 * pixels * 6
    assert p.replace(dtype="float16").min_bytes * 2 == p.min_bytes


@pytest.mark.parametrize("changes", (dict(batch=0), dict(in_channels=0), dict(out_channels=0)), ids=str)
def test_nothing_to_multiply(changes):
    assert Problem(**{**dict(pass_="forward", batch=1, in_channels=2, out_channels=2, input_size=(3, 3, 3),
                             kernel_size=(1, 1, 1)), **changes}).empty  # fmt: skip


X = torch.zeros(2, 8, 3, 4, 6, dtype=torch.float16)
LAST = X.contiguous(memory_format=torch.channels_last_3d)
LAYOUTS = {
    "contiguous": (X, CONTIGUOUS),
    "channels_last": (LAST, CHANNELS_LAST),
    "cropped": (LAST[:, :, 1:], VIEW),
    "channel_slice": (LAST[:, :4], VIEW),
    "channel_step": (LAST[:, ::2], STRIDED),
    "cropped_contiguous": (X[..., 1:], STRIDED),
    "expanded": (X[:1].expand(2, 8, 3, 4, 6), STRIDED),
    "one_channel": (X[:, :1].contiguous(), CHANNELS_LAST),
}


@pytest.mark.parametrize("tensor, layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_layouts(tensor, layout):
    assert layout_of(tensor) == layout


def described(x: torch.Tensor, filters: int = 5) -> Problem:
    w = torch.empty(filters, x.shape[1], 1, 1, 1, dtype=x.dtype, device=x.device)
    w = w.contiguous(memory_format=torch.channels_last_3d)
    geometry = ((1, 1, 1), (0,) * 6, (1, 1, 1), 1)
    return describe("forward", Operands(x, w), x.shape, w.shape, *geometry, True, "tf32")


ALIGNMENTS = {
    "full": (LAST, 16),
    "six_channels": (torch.zeros(1, 2, 2, 2, 6, dtype=torch.float16).permute(0, 4, 1, 2, 3), 4),
    "one_element_off": (torch.zeros(1025, dtype=torch.float16)[1:].view(2, 8, 2, 4, 8).permute(0, 4, 1, 2, 3), 2),
    "four_channels_of_eight": (LAST[:, 4:], 8),
}


@pytest.mark.parametrize("tensor, alignment", ALIGNMENTS.values(), ids=ALIGNMENTS.keys())
def test_alignment_of_pixels(tensor, alignment):
    assert described(tensor, filters=8).alignment == alignment


@pytest.mark.parametrize("depth, wide", ((2**10 - 1, False), (2**10, True)), ids=("below", "at"))
def test_64_bit_offsets_from_2_gib_on(depth, wide):
    """The byte extent of the largest tensor decides, of the result too."""
    shape = (1, 8, depth, 2**9, 2**8)
    x = torch.empty(shape, dtype=torch.float16, device="meta", memory_format=torch.channels_last_3d)
    assert math.prod(shape) * 2 >= 2**31 if wide else math.prod(shape) * 2 < 2**31
    assert described(x).index64 is wide
    assert described(x[:, :, : depth // 2], filters=16).index64 is wide
    assert described(x[:, :, :: depth - 1]).index64 is wide, "a view extends over what it skips"


@pytest.mark.parametrize("dilation, wide", [(1000, False), (1030, True)])
def test_taps_far_beyond_a_small_tensor_need_64_bits(dilation, wide):
    x, w = torch.empty(1, 1, 2, 1024, 1024, dtype=torch.float16), torch.empty(1, 1, 3, 1, 1, dtype=torch.float16)
    geometry = (1, 1, 1), (dilation, dilation, 0, 0, 0, 0), (dilation, 1, 1), 1
    assert describe("forward", Operands(x, w), x.shape, w.shape, *geometry, True, "ieee").index64 is wide


def test_precision_is_of_float32_only():
    assert described(LAST).precision == "ieee" and described(LAST.float()).precision == "tf32"


def test_equal_problems_are_one_key_and_one_dictionary_entry():
    one, other = described(LAST), described(LAST.clone(memory_format=torch.preserve_format))
    assert one == other and hash(one) == hash(other) and one.key == other.key
    changed = dict(batch=3, dilation=(1, 1, 2), layouts=(CONTIGUOUS,) * 3, bias=True, residual=True, activation="relu")
    for changes in ({name: value} for name, value in changed.items()):
        assert one.replace(**changes) != one and one.replace(**changes).key != one.key


def test_ways_out_and_back():
    p = described(LAST)
    hash(p), p.output_size  # cached values must not travel: another process hashes strings differently
    assert Problem.from_dict(p.to_dict()) == p
    again = pickle.loads(pickle.dumps(p))
    assert again == p and "_hash" not in vars(again)


@pytest.mark.parametrize(
    "change", (lambda d: d.pop("batch"), lambda d: d.update(colour="red")), ids=("missing", "unknown")
)
def test_foreign_fields_are_refused(change):
    values = described(LAST).to_dict()
    change(values)
    with pytest.raises(ValueError, match="a problem has the fields"):
        Problem.from_dict(values)


def test_text_names_what_is_unusual():
    p = Problem("dgrad", 1, 4, 6, (4, 4, 4), (3, 1, 1), (2, 1, 1), (1, 0, 0, 0, 0, 0), (1, 1, 2), 2, dtype="float32")
    assert str(p) == (
        "dgrad 1x4x4x4x4 -> 6, kernel 3x1x1, stride 2x1x1, padding 1x0x0/0x0x0, dilation 1x1x2, groups 2, float32 ieee"
    )
    fused = Problem("forward", 1, 4, 6, (4, 4, 4), (1, 1, 1), residual=True, activation="silu")
    assert str(fused) == "forward 1x4x4x4x4 -> 6, kernel 1x1x1, residual, silu, float16"
