"""MedNeXt-L with kernel 3: MIC-DKFZ/MedNeXt, network_architecture/mednextv1/MedNextV1.py and its trainer's numbers.
Without the trainer's checkpointing, which computes forward passes twice."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from . import Network

DEPTHS = (3, 4, 8, 8, 8, 8, 8, 4, 3)  # blocks of encoder, bottleneck and decoder
RATIOS = (3, 4, 8, 8, 8, 8, 8, 4, 3)  # expansion of their inverted bottlenecks
LEVELS = len(DEPTHS) // 2  # below the finest


class _Block(nn.Module):
    """Depthwise convolution, norm, and a pointwise product into ``ratio`` times the channels and back.

    resample: ``""``, or ``"down"`` and ``"up"`` by 2, where the shortcut is a pointwise convolution as well.
    """

    def __init__(self, inside: int, outside: int, ratio: int, resample: str = ""):
        super().__init__()
        kind = nn.ConvTranspose3d if resample == "up" else nn.Conv3d
        stride = 2 if resample else 1
        self.depthwise = kind(inside, inside, 3, stride=stride, padding=1, groups=inside)
        self.norm = nn.GroupNorm(inside, inside)
        self.expand = nn.Conv3d(inside, ratio * inside, 1)
        self.compress = nn.Conv3d(ratio * inside, outside, 1)
        self.shortcut = kind(inside, outside, 1, stride=stride) if resample else nn.Identity()
        self.pad = (1, 0) * 3 if resample == "up" else None  # 2 n - 1 pixels become 2 n

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.compress(F.gelu(self.expand(self.norm(self.depthwise(x))))) + self.shortcut(x)
        return y if self.pad is None else F.pad(y, self.pad)


class MedNeXt(nn.Module):
    """Input (N, channels, D, H, W), sizes divisible by 16; class scores (N, classes, D, H, W)."""

    def __init__(self, width: int = 32, channels: int = 1, classes: int = 3):
        super().__init__()
        widths = [width << level for level in range(LEVELS + 1)]

        def stage(level: int, index: int) -> nn.Sequential:
            return nn.Sequential(*(_Block(widths[level], widths[level], RATIOS[index]) for _ in range(DEPTHS[index])))

        self.stem = nn.Conv3d(channels, width, 1)
        self.encoder = nn.ModuleList(stage(level, level) for level in range(LEVELS + 1))
        self.down = nn.ModuleList(
            _Block(widths[level], widths[level + 1], RATIOS[level + 1], "down") for level in range(LEVELS)
        )
        up = [(level, 2 * LEVELS - level) for level in reversed(range(LEVELS))]
        self.up = nn.ModuleList(_Block(widths[level + 1], widths[level], RATIOS[index], "up") for level, index in up)
        self.decoder = nn.ModuleList(stage(level, index) for level, index in up)
        self.head = nn.ConvTranspose3d(width, classes, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x, skipped = self.stem(x), []
        for stage, down in zip(self.encoder, self.down, strict=False):
            skipped.append(stage(x))
            x = down(skipped[-1])
        x = self.encoder[-1](x)
        for up, stage, skip in zip(self.up, self.decoder, reversed(skipped), strict=True):
            x = stage(skip + up(x))
        return self.head(x)


_PATCH = (2, 1, 128, 128, 128)
NETWORK = Network(
    "mednext_L_k3", "MedNeXt-L k3", MedNeXt, 32, _PATCH, _PATCH, "fp16", classes=3, tiny=(2, (1, 1, 32, 16, 16))
)
