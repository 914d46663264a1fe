"""What a sweep tells about choosing: regret of choices made without it, and how few candidates are enough."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from triton_conv3d import engines
from triton_conv3d.engines.base import Config
from triton_conv3d.problem import Problem
from triton_conv3d.tuning import cost_model, search
from triton_conv3d.tuning.measure import QUICK_CANDIDATES
from triton_conv3d.tuning.plan import offered
from triton_conv3d.tuning.search import OWN, Ranked
from triton_conv3d.tuning.storage import parse
from triton_conv3d.tuning.variants import spelled

from . import variants
from .records import Key, Sweep

_LEAST_MEASURED = 4  # candidates of a problem, below which its best says nothing


@dataclass(frozen=True)
class Measured:
    """A problem of which enough was measured: its candidates as ranked, with predicted and with measured seconds."""

    problem: Problem
    ranked: list[Ranked]
    seconds: dict[tuple[str, Config], float]

    @property
    def best(self) -> float:
        return min(self.seconds.values())

    def regret(self, choice: tuple[str, Config]) -> float:
        """By which part a choice is slower than the best that was measured."""
        return self.seconds[choice] / self.best - 1


def measured(sweep: Sweep) -> list[Measured]:
    """Every problem of a sweep of which at least four candidates that engines still offer were measured."""
    found = []
    for problem in sweep.problems.values():
        seconds, candidates = {}, []
        for key, time in sweep.times(problem).items():
            config = _config(problem, key)
            if config is not None:
                seconds[key[0], config] = time
                candidates.append((engines.available()[key[0]], config))
        if len(seconds) >= _LEAST_MEASURED:
            found.append(Measured(problem, cost_model.rank(problem, candidates), seconds))
    return found


def _config(problem: Problem, key: Key) -> Config | None:
    return offered(problem, key[0], parse(key[1].encode()))


def cold(of: Measured) -> tuple[str, Config]:
    """What is chosen when nothing is measured: the top of the ranking."""
    return of.ranked[0][1].NAME, of.ranked[0][2]


def quick(of: Measured) -> tuple[str, Config]:
    """What the search finds, if it measures what the sweep measured."""
    times = search.median(search.search(of.ranked, lambda c, _: of.seconds[c[0].NAME, c[1]], QUICK_CANDIDATES))
    return min(times, key=times.get)


CHOICES: dict[str, Callable[[Measured], tuple[str, Config]]] = {"cold": cold, "quick": quick}


@dataclass(frozen=True)
class Regret:
    """Of one way to choose, over many problems."""

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    def part_within(self, bound: float) -> float:
        return sum(value <= bound for value in self.values) / len(self.values)

    def at(self, part: float) -> float:
        return sorted(self.values)[math.ceil(part * len(self.values)) - 1]


def regrets(found: Sequence[Measured]) -> dict[str, Regret]:
    return {name: Regret(tuple(of.regret(choose(of)) for of in found)) for name, choose in CHOICES.items()}


def best_variants(found: Sequence[Measured], most: int) -> list[tuple[tuple[str, str], float]]:
    """The best few compiled variants, ((engine, variant), value) as :func:`.variants.best` chooses them; torch's own is
    available from the start."""
    tables = [_by_variant(of) for of in found]
    own = [min((seconds for (name, _), seconds in of.items() if name == OWN), default=math.inf) for of in tables]
    return variants.best([{key: of[key] for key in of if key[0] != OWN} for of in tables], most, own)


def _by_variant(of: Measured) -> dict[tuple[str, str], float]:
    times: dict[tuple[str, str], float] = {}
    for (name, config), seconds in of.seconds.items():
        key = name, spelled(config)
        times[key] = min(seconds, times.get(key, math.inf))
    return times


def tile_map(found: Sequence[Measured]) -> dict[str, dict[tuple[int, int], float]]:
    """By pass and tile (block_m, block_n): geometric mean of the best time of all over that of the tile."""
    shares: dict[str, dict[tuple[int, int], list[float]]] = {}
    for of in found:
        tiles: dict[tuple[int, int], float] = {}
        for (_, config), seconds in of.seconds.items():
            if hasattr(config, "block_m"):
                tile = config.block_m, config.block_n
                tiles[tile] = min(seconds, tiles.get(tile, math.inf))
        for tile, seconds in tiles.items():
            shares.setdefault(of.problem.pass_, {}).setdefault(tile, []).append(of.best / seconds)
    return {
        pass_: {tile: statistics.geometric_mean(values) for tile, values in by_tile.items()}
        for pass_, by_tile in shares.items()
    }


def text(found: Sequence[Measured], most: int) -> str:
    """The analysis in words."""
    lines = [f"{len(found)} problems, {sum(len(of.seconds) for of in found)} candidates measured"]
    for name, regret in regrets(found).items():
        lines.append(
            f"{name:<6} regret: median {regret.median:.1%}, 95 % within {regret.at(0.95):.1%}; within 5 % on "
            f"{regret.part_within(0.05):.0%} of the problems, within 25 % on {regret.part_within(0.25):.0%}"
        )
    lines.append("value of the best k variants beside torch's own (mean time over the best):")
    for k, ((name, config), value) in enumerate(best_variants(found, most), 1):
        lines.append(f"  {k:>2}  {value:.3f}  {name} {config}")
    return "\n".join(lines)
