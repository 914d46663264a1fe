"""nnU-Net v2's PlainConvUNet, 3d_fullres: MIC-DKFZ dynamic_network_architectures 0.4.4, architectures/unet.py, with the
planner's 32 to 320 features over six resolutions. The heads of deep supervision are left out."""

from __future__ import annotations

import torch
from torch import nn

from . import Network

LEVELS = 6
MOST = 10  # times the width: UNet_max_features_3d 320 of UNet_base_num_features 32


def _block(inside: int, outside: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv3d(inside, outside, 3, stride=stride, padding=1),
        nn.InstanceNorm3d(outside, affine=True),
        nn.LeakyReLU(0.01, inplace=True),
    )


class PlainConvUNet(nn.Module):
    """Input (N, channels, D, H, W), sizes divisible by 32; class scores (N, classes, D, H, W)."""

    def __init__(self, width: int = 32, channels: int = 1, classes: int = 3):
        super().__init__()
        widths = [width * min(1 << level, MOST) for level in range(LEVELS)]
        self.down, self.up, self.merge = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        for level, (inside, outside) in enumerate(zip([channels, *widths], widths, strict=False)):
            self.down.append(nn.Sequential(_block(inside, outside, 1 + (level > 0)), _block(outside, outside)))
        for fine, coarse in list(zip(widths, widths[1:], strict=False))[::-1]:
            self.up.append(nn.ConvTranspose3d(coarse, fine, 2, stride=2))
            self.merge.append(nn.Sequential(_block(2 * fine, fine), _block(fine, fine)))
        self.head = nn.Conv3d(width, classes, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        skipped = []
        for stage in self.down:
            x = stage(x)
            skipped.append(x)
        for up, merge, skip in zip(self.up, self.merge, skipped[-2::-1], strict=True):
            x = merge(torch.cat([up(x), skip], 1))
        return self.head(x)


_PATCH = (2, 1, 128, 128, 128)
NETWORK = Network(
    "nnunet3d", "nnU-Net 3d_fullres", PlainConvUNet, 32, _PATCH, _PATCH, "fp16", classes=3, tiny=(2, (1, 1, 64, 32, 32))
)
