"""The compiled variants that tuning draws from by default, few enough that shapes share them.

A variant is a config without its splits; what a kernel is specialised on beside it (vectors, taps of the depthwise
kernels) a network has few of. Engines that offer at most ``MOST`` variants for a pass and type are free to use them all.
Of others, ``variants.json`` lists those that lose least beside all, by the cost model over the real and the designed
layers; ``python -m autotune variants`` writes it.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Sequence
from pathlib import Path

from ..engines.base import Config
from ..problem import Problem
from .search import Ranked

MOST = 16  # of an engine, a pass and the bytes of an element
LOSS = 1.25  # times what all variants take: what it costs to compile one more for an unusual layer is paid back
FILE = Path(__file__).with_name("variants.json")


@functools.lru_cache(maxsize=4096)
def spelled(config: Config) -> str:
    """The variant of a config, as text."""
    return " ".join(part for part in str(config.whole()).split(" ") if not part.startswith("splits="))


def kind(engine: str, problem: Problem) -> str:
    """What a list of variants is for."""
    return f"{engine} {problem.pass_} {problem.itemsize}"


@functools.cache
def listed() -> dict[str, frozenset[str]]:
    return {name: frozenset(those) for name, those in json.loads(FILE.read_text(encoding="utf-8")).items()}


def kept(problem: Problem, ranked: Sequence[Ranked]) -> list[Ranked]:
    """Those of the candidates whose variant is listed, or of whose engine none is. Where the list is predicted to lose
    much, or has none that the problem can take, the engine's most promising variant stays beside it, if it is not far behind
    the best of all."""
    lists, found = listed(), []
    for name in dict.fromkeys(engine.NAME for _, engine, _ in ranked):
        of = [item for item in ranked if item[1].NAME == name]
        allowed = lists.get(kind(name, problem))
        if allowed is not None:
            best = min((seconds for seconds, _, config in of if spelled(config) in allowed), default=math.inf)
            if best > LOSS * of[0][0] and of[0][0] <= LOSS * ranked[0][0]:
                allowed = allowed | {spelled(of[0][2])}
            of = [item for item in of if spelled(item[2]) in allowed]
        found += of
    return sorted(found, key=lambda item: item[0])
