"""hopper: the bricks of engine tma, for sm_90 alone: one warp that only copies, two warpgroups that only multiply.

Written in Gluon, the layer below Triton's language, because there the warps of a program can be given different work
(ring.py). A program stays on its multiprocessor and takes tile after tile, so that the copies for the next tile run
while the last one is written. Geometry, views and descriptors are those of engines/tma, and so are the bytes by design;
partial sums of split reductions are float32 and added in a fixed order, so equal inputs give equal bits.

Layers that do not fill tiles of 128 channels may go by lines of pixels instead of bricks (lines.py; configs.py has the rule),
which are read again for the taps that they share. Bytes by design: from memory the minimum as ever; from L2, for every tile of
planes x lines of the result, (planes + kd - 1) x (lines + kh - 1) x kw lines of 64 pixels, and the weight once. wgrad by
lines (line_wgrad.py) reads of L2, for 128 rows of dw, which are channels by taps along D and W, all of the input that meets
them once, and the gradient once; by bricks it is as much for each tap along H. dgrad with a stride by lines (line_dgrad.py)
reads the gradient once for every shift of a cell, with the halo of a tile's lines along H, and the weight once for each tile,
or once in all where the taps stay; by bricks it is once for each tap of each parity class.

Where bricks fit badly, and from Triton 3.8 on, tiles may be rows of pixels that im2col copies gather (gather.py; configs.py
has the rule).

What a brick or a line covers beyond the end of the gradient in wgrad is multiplied by zeros: an infinity or NaN in the input
there reaches taps that it would not meet by the definition.
"""

from __future__ import annotations

import functools

import torch

from ...problem import Operands, Problem
from .. import tma
from ..base import Memory, Work, refused_by_kernels
from .class_configs import LineDgradConfig, class_work
from .configs import BrickConfig, Im2colConfig, by_lines, configs, im2col_work
from .line_configs import LineConfig, LineWgradConfig, line_wgrad_work, line_work

__all__ = [
    "NAME", "BrickConfig", "Im2colConfig", "LineConfig", "LineDgradConfig", "LineWgradConfig", "by_lines", "configs", "launch",
    "memory", "supports", "work",
]  # fmt: skip

HopperConfig = BrickConfig | Im2colConfig | LineConfig | LineDgradConfig | LineWgradConfig

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


def memory(problem: Problem, config: HopperConfig) -> Memory:
    return tma.memory(problem, _as_brick(config))


def work(problem: Problem, config: HopperConfig) -> Work:
    """The launch as the cost model sees it."""
    if isinstance(config, LineConfig):
        return line_work(problem, config)
    if isinstance(config, LineDgradConfig):
        return class_work(problem, config)
    if isinstance(config, LineWgradConfig):
        return line_wgrad_work(problem, config)
    return im2col_work(problem, config) if isinstance(config, Im2colConfig) else tma.work(problem, config)


def launch(problem: Problem, operands: Operands, config: HopperConfig) -> torch.Tensor:
    from . import host  # which needs Gluon

    gather, wgrad = functools.partial(host.gather, im2col=isinstance(config, Im2colConfig)), host.wgrad
    if isinstance(config, LineConfig):
        gather = functools.partial(host.lines, config)
    if isinstance(config, LineDgradConfig):
        gather = functools.partial(host.line_dgrad, config)
    if isinstance(config, LineWgradConfig):
        wgrad = functools.partial(host.line_wgrad, config)
    return tma.launched(problem, operands, _as_brick(config), gather, wgrad)


def _as_brick(config: HopperConfig) -> BrickConfig:
    return config if isinstance(config, BrickConfig) else config.brick
