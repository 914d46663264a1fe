"""X3D-M: facebookresearch/pytorchvideo 0.1.5, models/x3d.py, with the numbers of SlowFast's
configs/Kinetics/X3D_M.yaml; 16 frames of 224x224, batch 8."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from . import Network

DEPTHS = tuple(math.ceil(2.2 * blocks) for blocks in (1, 2, 5, 3))  # DEPTH_FACTOR 2.2
BOTTLENECK = 2.25  # BOTTLENECK_FACTOR
SQUEEZE = 1 / 16  # of the channels, by squeeze and excitation in every second block
FEATURES = 2048  # DIM_C5


def _rounded(channels: float) -> int:
    """The nearest multiple of 8, at least 8 and at least nine tenths of ``channels``."""
    nearest = max(8, int(channels + 4) // 8 * 8)
    return nearest + 8 if nearest < 0.9 * channels else nearest


def _convolution(inside: int, outside: int, kernel=1, stride=1, groups: int = 1) -> list[nn.Module]:
    padding = tuple(k // 2 for k in kernel) if isinstance(kernel, tuple) else kernel // 2
    return [nn.Conv3d(inside, outside, kernel, stride, padding, groups=groups, bias=False), nn.BatchNorm3d(outside)]


class _Excitation(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        squeezed = _rounded(SQUEEZE * channels)
        self.gate = nn.Sequential(
            nn.AdaptiveAvgPool3d(1), nn.Conv3d(channels, squeezed, 1), nn.ReLU(), nn.Conv3d(squeezed, channels, 1),
            nn.Sigmoid(),
        )  # fmt: skip

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.gate(x)


class _Block(nn.Module):
    def __init__(self, inside: int, outside: int, stride: tuple[int, int, int], excited: bool):
        super().__init__()
        middle = int(BOTTLENECK * outside)
        self.body = nn.Sequential(
            *_convolution(inside, middle), nn.ReLU(inplace=True),
            *_convolution(middle, middle, 3, stride, groups=middle), *[_Excitation(middle)] * excited,
            nn.SiLU(inplace=True), *_convolution(middle, outside),
        )  # fmt: skip
        shortcut = [] if stride == (1, 1, 1) else _convolution(inside, outside, 1, stride)
        self.shortcut = nn.Sequential(*(shortcut if inside != outside else shortcut[:1]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.body(x) + self.shortcut(x))


class X3D(nn.Module):
    """Input (N, 3, frames, H, W); class scores (N, classes)."""

    def __init__(self, width: int = 24, classes: int = 400):
        super().__init__()
        first = nn.Conv3d(3, width, (1, 3, 3), (1, 2, 2), (0, 1, 1), bias=False)
        layers = [first, *_convolution(width, width, (5, 1, 1), groups=width), nn.ReLU(inplace=True)]
        inside = width
        for level, depth in enumerate(DEPTHS):
            outside = width << level
            for index in range(depth):
                layers.append(_Block(inside, outside, (1, 1, 1) if index else (1, 2, 2), index % 2 == 0))
                inside = outside
        middle = int(BOTTLENECK * inside)
        layers += [*_convolution(inside, middle), nn.ReLU(inplace=True), nn.AdaptiveAvgPool3d(1)]
        layers += [nn.Conv3d(middle, FEATURES, 1, bias=False), nn.ReLU(inplace=True), nn.Flatten()]
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(FEATURES, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x))


_CLIPS = (8, 3, 16, 224, 224)
NETWORK = Network("x3d_m", "X3D-M", X3D, 24, _CLIPS, _CLIPS, "fp32", classes=400, tiny=(8, (2, 3, 4, 32, 32)))
