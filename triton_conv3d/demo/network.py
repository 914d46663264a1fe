"""A small 3-D U-Net whose convolutions learn their channel counts on the first call, and its loss and score."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from ..modules import LazyConv3d


def _block(width: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        LazyConv3d(width, 3, stride=stride, padding=1, bias=False),
        nn.InstanceNorm3d(width, affine=True),
        nn.LeakyReLU(0.01, inplace=True),
    )


class UNet(nn.Module):
    """``width`` channels at the finest resolution, twice as many at each of the ``levels - 1`` coarser ones.

    Input (N, C, D, H, W), with sizes divisible by 2 ** (levels - 1).
    """

    def __init__(self, width: int, classes: int, levels: int = 3):
        super().__init__()
        widths = [width << level for level in range(levels)]
        self.down = nn.ModuleList(
            nn.Sequential(_block(w, stride=2 if level else 1), _block(w)) for level, w in enumerate(widths)
        )
        self.up = nn.ModuleList(_block(w) for w in reversed(widths[:-1]))
        self.head = LazyConv3d(classes, 1)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Class scores (N, classes, D, H, W)."""
        passed, x = [], image
        for stage in self.down:
            x = stage(x)
            passed.append(x)
        for block, finer in zip(self.up, reversed(passed[:-1]), strict=True):
            x = block(torch.cat([finer, F.interpolate(x, scale_factor=2.0, mode="nearest")], 1))
        return self.head(x)


def loss(scores: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross entropy plus one minus the mean soft Dice."""
    scores = scores.float()
    truth = F.one_hot(labels, scores.shape[1]).movedim(-1, 1)
    chance = scores.softmax(1)
    dims = (0, 2, 3, 4)
    soft = (2 * (chance * truth).sum(dims) + 1) / (chance.sum(dims) + truth.sum(dims) + 1)
    return F.cross_entropy(scores, labels) + 1 - soft.mean()


def dice(predicted: torch.Tensor, labels: torch.Tensor, classes: int) -> list[float]:
    """Dice overlap 2|A & B| / (|A| + |B|) of every class over the whole batch; 1 where both are empty."""
    scores = []
    for value in range(classes):
        a, b = predicted == value, labels == value
        total = int(a.sum() + b.sum())
        scores.append(2 * int((a & b).sum()) / total if total else 1.0)
    return scores
