"""hopper: the bricks of engine tma, for sm_90 alone: one warp that only copies, two warpgroups that only multiply.

Written in Gluon, the layer below Triton's language, because there the warps of a program can be given different work
(ring.py). A program stays on its multiprocessor and takes tile after tile, so that the copies for the next tile run
while the last one is written. Geometry, views and descriptors are those of engines/tma, and so are the bytes by design;
partial sums of split reductions are float32 and added in a fixed order, so equal inputs give equal bits.

What a brick covers beyond the end of the gradient in wgrad is multiplied by zeros: an infinity or NaN in the input there
reaches taps that it would not meet by the definition.
"""

from __future__ import annotations

import torch

from ...problem import Operands, Problem
from .. import tma
from ..base import refused_by_kernels
from ..tma import memory, work
from .configs import BrickConfig, configs

__all__ = ["NAME", "BrickConfig", "configs", "launch", "memory", "supports", "work"]

NAME = "hopper"
TRIAL = True  # it has not run on a GPU yet
MEASURED = ()  # architectures
_ARCHITECTURE = "sm_90"


def supports(problem: Problem) -> str | None:
    if reason := refused_by_kernels(problem):
        return reason
    if problem.arch == "interpreter":
        return "Gluon has no interpreter"
    if problem.arch != _ARCHITECTURE:
        return f"{problem.arch} lacks the matrix instructions of {_ARCHITECTURE}, which this engine is written for"
    from .gluon import MISSING  # takes as long to import as all other kernels, for sm_90 alone

    return MISSING or tma.supports(problem)


def launch(problem: Problem, operands: Operands, config: BrickConfig) -> torch.Tensor:
    from . import host  # which needs Gluon

    return tma.launched(problem, operands, config, host.gather, host.wgrad)
