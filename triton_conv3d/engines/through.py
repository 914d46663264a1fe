"""What engines share that rewrite a problem and hand it to another engine, whose kernels compute it."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import NamedTuple

import torch

from ..problem import Problem
from .base import Config, Memory, Work

_MOST_TILES, _MOST_PARTS = 2, 2  # of each engine, and its smallest tile; numbers of splits of one
_BY_LINES = "hopper"  # offers these alone


@dataclass(frozen=True)
class ThroughConfig(Config):
    """
    engine: that computes the rewritten problem.
    config: its own, of that problem.
    """

    engine: str
    config: Config

    @property
    def splits(self) -> int:
        return getattr(self.config, "splits", 1)

    def whole(self) -> ThroughConfig:
        return self.replace(config=self.config.whole())

    def to_dict(self) -> dict:
        return {"engine": self.engine, **self.config.to_dict()}


class Moved(NamedTuple):
    """What rewriting a problem takes: bytes of the copies, bytes that making them moves, launches."""

    copies: int
    moved: int
    launches: int


def memory_through(engines: Mapping[str, ModuleType], problem: Problem, config: ThroughConfig, moved: Moved) -> Memory:
    """Of the rewritten problem, and what rewriting takes."""
    other = engines[config.engine].memory(problem, config.config)
    return Memory(other.workspace, other.copies + moved.copies)


def work_through(engines: Mapping[str, ModuleType], problem: Problem, config: ThroughConfig, moved: Moved) -> Work:
    """The launches of the rewritten problem, and those that rewriting takes, as the cost model sees them."""
    work = engines[config.engine].work(problem, config.config)
    work.extra_bytes += moved.moved
    work.launches += moved.launches
    return work


class Float32Sums(Problem):
    """A wgrad whose result stays in float32: it is summed further."""

    def empty_result(self, device: torch.device) -> torch.Tensor:
        return torch.empty(self.result_shape, dtype=torch.float32, device=device, memory_format=self.memory_format)


def offers_through(engines: Mapping[str, ModuleType], problem: Problem) -> tuple[ThroughConfig, ...]:
    """Of each engine, in this order, the largest tiles that it offers for the rewritten problem, whole and in the fewest
    parts that fill a GPU, and its smallest last. Of ``hopper`` its first tile by lines: its bricks are those of ``tma``."""
    found = []
    for name, engine in engines.items():
        if engine.supports(problem) is not None:
            continue
        if name == _BY_LINES:
            most, offers, last = 1, engine.by_lines(problem), []
        else:
            most, (*offers, smallest) = _MOST_TILES, engine.configs(problem)
            last = [smallest]
        tiles = itertools.islice(itertools.groupby(offers, key=Config.whole), most)
        few = [config for _, parts in tiles for config in itertools.islice(parts, _MOST_PARTS)]
        found += [ThroughConfig(name, config) for config in few + last]
    return tuple(found)
