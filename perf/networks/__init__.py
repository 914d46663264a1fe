"""Whole networks, written here from their published shapes in plain torch.nn: what people train and run.

Each file holds one network; its numbers come from the source that its docstring names. ``width`` scales the channels,
so that the same code runs in tests. Dropout is left out everywhere: with it two runs could not be compared.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

TRAIN, INFER = "train", "infer"
MODES = (TRAIN, INFER)
_MODULES = ("nnunet", "mednext", "r3d", "x3d", "wan_vae", "qwen2_vl")


@dataclass(frozen=True)
class Network:
    """One network and what it is run on.

    Attributes:
        name: of its suite in :mod:`perf.workloads`. title: for people.
        build: ``build(width)`` makes the module. width: the published one.
        train, infer: shapes of the input of a training step and of inference.
        dtype: of the convolutions, a key of :data:`triton_conv3d.workload.DTYPES`; below float32 under autocast.
        classes: the output scores that many classes along dimension 1; None: it is regressed.
        tiny: a width and an input shape that a CPU computes in a moment.
    """

    name: str
    title: str
    build: Callable[[int], nn.Module]
    width: int
    train: tuple[int, ...]
    infer: tuple[int, ...]
    dtype: str
    classes: int | None
    tiny: tuple[int, tuple[int, ...]]

    def shrunk(self) -> Network:
        """The same network at its tiny size."""
        width, shape = self.tiny
        return dataclasses.replace(self, width=width, train=shape, infer=shape)

    def shape(self, mode: str) -> tuple[int, ...]:
        return self.train if mode == TRAIN else self.infer

    def module(self, seed: int = 0, device: torch.device | str = "cpu") -> nn.Module:
        """Fresh weights; equal seeds give equal weights on every device."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.build(self.width).to(device)

    def batch(self, mode: str, device: torch.device | str) -> tuple[torch.Tensor, torch.Tensor]:
        """(input, target): normal noise in float32, and the classes or values that the output is compared with."""
        generator = torch.Generator().manual_seed(0)
        input = torch.randn(self.shape(mode), generator=generator)
        shape = self.output_shape(mode)
        if self.classes is None:
            target = torch.randn(shape, generator=generator)
        else:
            target = torch.randint(self.classes, (shape[0], *shape[2:]), generator=generator)
        return input.to(device), target.to(device)

    def output_shape(self, mode: str) -> tuple[int, ...]:
        with torch.device("meta"), torch.no_grad():
            return tuple(self.build(self.width)(torch.empty(self.shape(mode))).shape)

    def loss(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Cross entropy, or the mean squared error."""
        return F.mse_loss(output.float(), target) if self.classes is None else F.cross_entropy(output.float(), target)


@functools.cache
def networks() -> dict[str, Network]:
    """Every network, by name."""
    found = (importlib.import_module(f"{__name__}.{module}").NETWORK for module in _MODULES)
    return {network.name: network for network in found}


def get(names: str | None) -> list[Network]:
    """The networks of a comma-separated list, all if None. Raises ValueError listing what exists."""
    known = networks()
    wanted = known if names is None else names.split(",")
    for name in wanted:
        if name not in known:
            raise ValueError(f"no network named {name!r}: the networks are {', '.join(known)}")
    return [known[name] for name in wanted]
