"""hopper: the bricks of engine tma, for sm_90 alone: one warp that only copies, two warpgroups that only multiply.

Written in Gluon, the layer below Triton's language, because there the warps of a program can be given different work
(ring.py). A program stays on its multiprocessor and takes tile after tile, so that the copies for the next tile run
while the last one is written. Geometry, views and descriptors are those of engines/tma, and so are the bytes by design;
partial sums of split reductions are float32 and added in a fixed order, so equal inputs give equal bits.

Layers that do not fill tiles of 128 channels may go by lines of pixels instead of bricks (lines.py; configs.py has the rule),
which are read again for the taps that they share. Bytes by design: from memory the minimum as ever; from L2, for every tile of
planes x lines of the result, (planes + kd - 1) x (lines + kh - 1) x kw lines of 64 pixels, and the weight once.

Where bricks fit badly, and from Triton 3.8 on, tiles may be rows of pixels that im2col copies gather (gather.py; configs.py
has the rule).

What a brick covers beyond the end of the gradient in wgrad is multiplied by zeros: an infinity or NaN in the input there
reaches taps that it would not meet by the definition.
"""

from __future__ import annotations

import functools

import torch

from ...problem import Operands, Problem
from .. import tma
from ..base import Memory, Work, refused_by_kernels
from .configs import BrickConfig, Im2colConfig, LineConfig, configs, im2col_work, line_work

__all__ = ["NAME", "BrickConfig", "Im2colConfig", "LineConfig", "configs", "launch", "memory", "supports", "work"]

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


def memory(problem: Problem, config: BrickConfig | Im2colConfig | LineConfig) -> Memory:
    return tma.memory(problem, _as_brick(config))


def work(problem: Problem, config: BrickConfig | Im2colConfig | LineConfig) -> Work:
    """The launch as the cost model sees it."""
    if isinstance(config, LineConfig):
        return line_work(problem, config)
    return im2col_work(problem, config) if isinstance(config, Im2colConfig) else tma.work(problem, config)


def launch(problem: Problem, operands: Operands, config: BrickConfig | Im2colConfig | LineConfig) -> torch.Tensor:
    from . import host  # which needs Gluon

    gather = functools.partial(host.gather, im2col=isinstance(config, Im2colConfig))
    if isinstance(config, LineConfig):
        gather = functools.partial(host.lines, config)
    return tma.launched(problem, operands, _as_brick(config), gather, host.wgrad)


def _as_brick(config: BrickConfig | Im2colConfig | LineConfig) -> BrickConfig:
    return config if isinstance(config, BrickConfig) else config.brick
