"""The patch embedding of Qwen2-VL's vision tower: transformers 5.23.0, models/qwen2_vl/modeling_qwen2_vl.py,
PatchEmbed; 16,384 patches of 2 frames of 14x14 pixels."""

from __future__ import annotations

import torch
from torch import nn

from . import Network

PATCH = (2, 14, 14)


class PatchEmbed(nn.Module):
    """Input (patches, 3, 2, 14, 14); embeddings (patches, width)."""

    def __init__(self, width: int = 1280):
        super().__init__()
        self.proj = nn.Conv3d(3, width, PATCH, stride=PATCH, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj(x).flatten(1)


_PATCHES = (16_384, 3, *PATCH)
NETWORK = Network(
    "qwen2_vl", "Qwen2-VL patch embedding", PatchEmbed, 1280, _PATCHES, _PATCHES, "bf16", classes=None,
    tiny=(8, (5, 3, *PATCH)),
)  # fmt: skip
