"""What decoders of videos have between their convolutions: frames, shuffled pixels, padding by the border, parts returned."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from compiled import (  # noqa: F401
    by_aten,
    compare,
    compiled,
    conversions_between_convolutions,
    error,
    graphs,
    significant,
)
from tolerances import COMPILED
from torch import nn

from triton_conv3d.compile_backend import reports

CHANNELS = 4


class Between(nn.Module):
    def __init__(self, piece, channels: int):
        super().__init__()
        self.piece, self.first, self.last = piece, nn.Conv3d(3, CHANNELS, 3, padding=1), nn.Conv3d(channels, 2, 1)
        self.frames = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1)
        self.qkv = nn.Conv2d(CHANNELS, 3 * CHANNELS, 1)

    def forward(self, x):
        return self.last(self.piece(self.first(x), self))


def as_frames(x):
    return x.permute(0, 2, 1, 3, 4).reshape(-1, x.shape[1], *x.shape[3:])


def as_videos(x, batch):
    return x.reshape(batch, -1, *x.shape[1:]).permute(0, 2, 1, 3, 4)


def upsampled(x, model):
    return as_videos(model.frames(F.interpolate(as_frames(x), scale_factor=2.0, mode="nearest-exact")), x.shape[0])


def twice_the_frames(x, model):
    b, c, t, h, w = x.shape
    x = x.reshape(b, 2, c // 2, t, h, w)
    x = torch.stack((x[:, 0], x[:, 1]), 3).reshape(b, c // 2, 2 * t, h, w)
    return upsampled(torch.cat([x, x], 1), model)


def shuffled(x, model):
    b, _, t, h, w = x.shape
    return x.reshape(b, -1, 1, 1, 2, t, h, w).permute(0, 1, 5, 2, 6, 3, 7, 4).flatten(6, 7).flatten(4, 5).flatten(2, 3)


def attending(x, model):
    frames = as_frames(x)
    qkv = model.qkv(frames).flatten(2).unsqueeze(1).transpose(2, 3).contiguous()
    seen = F.scaled_dot_product_attention(*qkv.chunk(3, -1)).squeeze(1)
    return x + as_videos(seen.transpose(1, 2).reshape(frames.shape), x.shape[0])


def normalised(x, model):
    frames = x.permute(0, 2, 1, 3, 4).flatten(0, 1)
    frames = torch.cat([F.group_norm(part, 2) for part in frames.split(2)])
    return F.layer_norm(as_videos(frames, x.shape[0]).movedim(1, -1), [CHANNELS]).movedim(-1, 1)


PIECES = {  # what is computed, of how many channels, copies that it takes
    "frames, upsampled": (upsampled, CHANNELS, 0),
    "twice the frames": (twice_the_frames, CHANNELS, 0),
    "shuffled pixels": (shuffled, CHANNELS // 2, 1),
    "border repeated": (lambda x, model: F.pad(x, (1, 1, 1, 1, 2, 0), mode="replicate"), CHANNELS, 0),
    "channels repeated": (lambda x, model: x.repeat(1, 2, 1, 1, 1), 2 * CHANNELS, 0),
    "attention": (attending, CHANNELS, 1),  # its operands, whose strides are its own affair
    "norms": (normalised, CHANNELS, 0),
    "pixels apart": (lambda x, model: x[:, :, [[0], [1]], :, [[0, 1, 2, 1]]], CHANNELS, None),
}


ONE = ("frames, upsampled", "twice the frames", "attention", "border repeated")  # by one frame torch tells no format


@pytest.mark.parametrize("name, frames", [*((name, 4) for name in PIECES), *((name, 1) for name in ONE)])
def test_the_layout_is_kept(name, frames):
    piece, channels, copies = PIECES[name]
    off, (made,) = compare(Between(piece, channels), torch.randn(1, 3, frames, 4, 6), False)
    assert off <= COMPILED and made
    assert copies is None or len(conversions_between_convolutions(graphs[0].graph)) == copies


def test_interpolated_frames_of_a_channels_last_model_are_not_copied():
    model, x = Between(upsampled, CHANNELS), torch.randn(2, 3, 4, 4, 6)
    model.first.to(memory_format=torch.channels_last_3d)
    off, _ = compare(model, x, False)
    assert off <= COMPILED and conversions_between_convolutions(graphs[0].graph) == []


RETURNED = {  # views that are not dense in eager mode either, and copies that are nobody's views
    "later frames": lambda y: y[:, :, 1:],
    "halves": lambda y: y.chunk(2, 1),
    "a frame, for all": lambda y: y[:, :, :1].expand(-1, -1, 5, -1, -1),
    "two copies": lambda y: [y.permute(0, 2, 3, 4, 1).contiguous() for _ in range(2)],
}


@pytest.mark.parametrize("name", RETURNED)
def test_what_is_returned_has_the_strides_of_eager_mode(name):
    class Returning(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv3d(2, CHANNELS, 3, padding=1)

        def forward(self, x):
            return RETURNED[name](self.conv(x))

    model, x = Returning(), torch.randn(2, 2, 4, 3, 5)
    with torch.no_grad():
        given, wanted = compiled(model)(x), model(x)
    if isinstance(given, torch.Tensor):
        given, wanted = (given,), (wanted,)
    assert [r.replaced for r in reports()] == [{"conv3d": 1}]
    for a, b in zip(given, wanted, strict=True):
        assert error(a, b) <= COMPILED and significant(a) == significant(b)
    shared = len({each.untyped_storage().data_ptr() for each in wanted})
    assert len({each.untyped_storage().data_ptr() for each in given}) == shared
