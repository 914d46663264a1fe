"""What ``torch.utils.flop_counter`` counts of the ops: as of torch's own convolution, but each group's weights once.

The formulas have to be there before anybody counts. Their import imports Triton, as the first kernel would.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch._ops import OpOverload
from torch.utils.flop_counter import register_flop_formula


def register(conv3d: OpOverload, conv3d_fused: OpOverload, conv3d_dgrad: OpOverload, conv3d_wgrad: OpOverload) -> None:
    @register_flop_formula([conv3d.overloadpacket, conv3d_fused.overloadpacket])
    def forward(input: Sequence[int], weight: Sequence[int], *_, out_shape: Sequence[int], **__) -> int:
        return _flops(out_shape, weight)

    @register_flop_formula(conv3d_dgrad.overloadpacket)
    def dgrad(grad: Sequence[int], weight: Sequence[int], *_, **__) -> int:
        return _flops(grad, weight)

    @register_flop_formula(conv3d_wgrad.overloadpacket)
    def wgrad(grad: Sequence[int], input: Sequence[int], weight: Sequence[int], *_, **__) -> int:
        return _flops(grad, weight)


def _flops(output: Sequence[int], weight: Sequence[int]) -> int:
    """A product and a sum for each weight and output pixel of (N, K, D, H, W); those that meet padding count, too."""
    return 2 * output[0] * math.prod(output[2:]) * math.prod(weight)
