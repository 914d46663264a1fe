"""What surrounds a convolution becomes part of it: zero padding, frozen arithmetic, bias, residual, activation."""

from __future__ import annotations

from .report import Report
from .rewriting import Rewriter, fused_op


def fuse(rewriter: Rewriter, report: Report) -> None:
    pass
