"""The decoder of Wan2.1's video autoencoder: huggingface/diffusers, models/autoencoders/autoencoder_kl_wan.py, with its
default numbers. It decodes one latent frame after the other; every causal convolution remembers its last two frames.

Inference is of 9 frames at 480x832, training of 5 frames at 128x128: the first stage on videos in the technical report
(arXiv 2503.20314)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from . import Network

LATENT = 16  # channels
MULTIPLES = (4, 4, 4, 2, 1)  # of the width: bottleneck, then the four stages
BLOCKS = 3  # of a stage
UPSAMPLING = ("time", "time", "space", "")  # after each stage: space by 2, frames too, or nothing
PAST = 2  # frames that a kernel of 3 looks back

Past = dict[nn.Module, torch.Tensor]


class _Causal(nn.Module):
    """A convolution whose frames see no later ones. What it remembers between pieces of a video is the caller's."""

    def __init__(self, inside: int, outside: int, kernel: tuple[int, int, int]):
        super().__init__()
        self.conv = nn.Conv3d(inside, outside, kernel)
        self.pad = tuple(k // 2 for k in (kernel[2], kernel[2], kernel[1], kernel[1]))

    def start(self, x: torch.Tensor, past: Past) -> None:
        """Nothing lies before the first piece."""
        past[self] = x.new_zeros(*x.shape[:2], PAST, *x.shape[3:])

    def forward(self, x: torch.Tensor, past: Past) -> torch.Tensor:
        if self not in past:
            self.start(x, past)
        x = torch.cat([past[self], x], 2)
        past[self] = x[:, :, -PAST:]
        return self.conv(F.pad(x, self.pad))


class _Norm(nn.Module):
    """Channels of a pixel, divided by their root mean square."""

    def __init__(self, channels: int, dims: int = 3):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(channels, *(1,) * dims))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.normalize(x, dim=1) * (x.shape[1] ** 0.5 * self.gamma)


class _Residual(nn.Module):
    def __init__(self, inside: int, outside: int):
        super().__init__()
        self.norms = nn.ModuleList([_Norm(inside), _Norm(outside)])
        self.convs = nn.ModuleList([_Causal(inside, outside, (3, 3, 3)), _Causal(outside, outside, (3, 3, 3))])
        self.shortcut = nn.Identity() if inside == outside else nn.Conv3d(inside, outside, 1)

    def forward(self, x: torch.Tensor, past: Past) -> torch.Tensor:
        y = x
        for norm, conv in zip(self.norms, self.convs, strict=True):
            y = conv(F.silu(norm(y)), past)
        return y + self.shortcut(x)


def _frames(x: torch.Tensor) -> torch.Tensor:
    """(N, C, T, H, W) as (N * T, C, H, W)."""
    return x.transpose(1, 2).flatten(0, 1)


def _videos(x: torch.Tensor, batch: int) -> torch.Tensor:
    return x.unflatten(0, (batch, -1)).transpose(1, 2)


class _Attention(nn.Module):
    """One head, over the pixels of each frame."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = _Norm(channels, dims=2)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj = nn.Conv2d(channels, channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        frames = _frames(x)
        qkv = self.qkv(self.norm(frames)).flatten(2).transpose(1, 2).unsqueeze(1)
        seen = F.scaled_dot_product_attention(*qkv.chunk(3, dim=-1)).squeeze(1)
        return x + _videos(self.proj(seen.transpose(1, 2).reshape(frames.shape)), x.shape[0])


class _Upsample(nn.Module):
    def __init__(self, channels: int, time: bool):
        super().__init__()
        self.time = _Causal(channels, 2 * channels, (3, 1, 1)) if time else None
        self.conv = nn.Conv2d(channels, channels // 2, 3, padding=1)

    def forward(self, x: torch.Tensor, past: Past) -> torch.Tensor:
        if self.time is not None:
            if self.time in past:
                x = self.time(x, past).unflatten(1, (2, -1)).permute(0, 2, 3, 1, 4, 5).flatten(2, 3)
            else:  # the first latent frame stands for one frame, every later one for four
                self.time.start(x, past)
        return _videos(self.conv(F.interpolate(_frames(x), scale_factor=2.0, mode="nearest-exact")), x.shape[0])


class WanDecoder(nn.Module):
    """Latents (N, 16, T, H, W); videos (N, 3, 4 T - 3, 8 H, 8 W)."""

    def __init__(self, width: int = 96):
        super().__init__()
        widths = [width * multiple for multiple in MULTIPLES]
        first = widths[0]
        self.latent = nn.Conv3d(LATENT, LATENT, 1)
        self.conv_in = _Causal(LATENT, first, (3, 3, 3))
        self.middle = nn.ModuleList([_Residual(first, first), _Attention(first), _Residual(first, first)])
        self.stages, inside = nn.ModuleList(), first
        for outside, upsampling in zip(widths[1:], UPSAMPLING, strict=True):
            stage = nn.ModuleList(_Residual(outside if index else inside, outside) for index in range(BLOCKS))
            if upsampling:
                stage.append(_Upsample(outside, upsampling == "time"))
            self.stages.append(stage)
            inside = outside // 2
        self.norm = _Norm(width)
        self.conv_out = _Causal(width, 3, (3, 3, 3))

    def forward(self, latent: torch.Tensor) -> torch.Tensor:
        past: Past = {}
        return torch.cat([self._piece(piece, past) for piece in self.latent(latent).split(1, 2)], 2).clamp(-1, 1)

    def _piece(self, x: torch.Tensor, past: Past) -> torch.Tensor:
        x = self.conv_in(x, past)
        for layer in (*self.middle, *(layer for stage in self.stages for layer in stage)):
            x = layer(x) if isinstance(layer, _Attention) else layer(x, past)
        return self.conv_out(F.silu(self.norm(x)), past)


NETWORK = Network(
    "wan21_dec_480p", "Wan2.1 VAE decoder", WanDecoder, 96, (2, LATENT, 2, 16, 16), (1, LATENT, 3, 60, 104), "bf16",
    classes=None, tiny=(4, (1, LATENT, 3, 2, 3)),
)  # fmt: skip
