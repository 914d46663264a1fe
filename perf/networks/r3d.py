"""r3d_18: torchvision, models/video/resnet.py; 16 frames of 112x112, batch 16."""

from __future__ import annotations

import torch
from torch import nn

from . import Network

LEVELS = 4


def _convolution(inside: int, outside: int, kernel, stride=1, padding=0) -> list[nn.Module]:
    return [nn.Conv3d(inside, outside, kernel, stride, padding, bias=False), nn.BatchNorm3d(outside)]


class _Block(nn.Module):
    def __init__(self, inside: int, outside: int, stride: int):
        super().__init__()
        self.body = nn.Sequential(
            *_convolution(inside, outside, 3, stride, 1), nn.ReLU(inplace=True),
            *_convolution(outside, outside, 3, 1, 1),
        )  # fmt: skip
        same = inside == outside and stride == 1
        self.shortcut = nn.Identity() if same else nn.Sequential(*_convolution(inside, outside, 1, stride))
        self.activation = nn.ReLU(inplace=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.activation(self.body(x) + self.shortcut(x))


class R3D18(nn.Module):
    """Input (N, 3, frames, H, W); class scores (N, classes)."""

    def __init__(self, width: int = 64, classes: int = 400):
        super().__init__()
        layers = [*_convolution(3, width, (3, 7, 7), (1, 2, 2), (1, 3, 3)), nn.ReLU(inplace=True)]
        inside = width
        for outside in (width << level for level in range(LEVELS)):
            layers += [_Block(inside, outside, 1 if outside == width else 2), _Block(outside, outside, 1)]
            inside = outside
        self.body = nn.Sequential(*layers, nn.AdaptiveAvgPool3d(1), nn.Flatten())
        self.head = nn.Linear(inside, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x))


_CLIPS = (16, 3, 16, 112, 112)
NETWORK = Network("r3d18", "r3d_18", R3D18, 64, _CLIPS, _CLIPS, "fp32", classes=400, tiny=(4, (2, 3, 8, 32, 32)))
