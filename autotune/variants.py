"""Which compiled variants of an engine are worth having: the few that lose least beside the best of all, by the model.

``python -m autotune variants SUITE...`` writes ``triton_conv3d/tuning/variants.json``.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from triton_conv3d.problem import Problem
from triton_conv3d.tuning import storage
from triton_conv3d.tuning.search import OWN
from triton_conv3d.tuning.select import ranking
from triton_conv3d.tuning.variants import LOSS, MOST, kind, spelled
from triton_conv3d.workload import LAYOUTS, Layer

from . import suites

# In which every layer is looked at too, beside its own: what random networks have.
_STRIDES = ((2, 2, 2), (1, 2, 2))
_KERNELS = ((1, 3, 3), (3, 1, 1), (2, 2, 2), (1, 1, 1))  # of depthwise ones
_ODD = 33  # and at such a size


def problems(layers: Sequence[Layer], gpu: str, arch: str) -> list[Problem]:
    """The layers, also with strides and odd sizes, in both layouts and with elements of 2 and 4 bytes; as they are they come
    four times, to count for more."""
    strided = [
        dataclasses.replace(layer, stride=s) for layer in layers if min(layer.kernel_size) > 1 for s in _STRIDES
    ]
    others = [
        dataclasses.replace(layer, kernel_size=k, padding=tuple(n // 2 for n in k), stride=(1, 1, 1), input_size=size)
        for layer in layers
        if layer.groups == layer.in_channels > 1
        for k in (*_KERNELS, layer.kernel_size)
        for size in (layer.input_size, (_ODD,) * 3)
    ]
    kinds = {"dtypes": ("fp16", "fp32"), "layouts": tuple(LAYOUTS)}
    cases = suites.cases([*layers, *strided, *others], **kinds) + 3 * suites.cases(layers, **kinds)
    return [case.problem(gpu, arch) for case in cases]


def predicted(problems: Iterable[Problem]) -> dict[str, list[dict]]:
    """By kind: for each problem the predicted seconds of every variant, with the splits that suit it best.

    Slow ones take as long as each other: what is far behind the best of all engines matters to none.
    """
    found: dict[str, list[dict]] = {}
    for problem in problems:
        of: dict[str, dict] = {}
        ranked = [item for item in ranking(problem, measuring=True) if item[1].NAME != OWN]
        for seconds, engine, config in ranked:
            seconds = min(seconds, LOSS * ranked[0][0])
            of.setdefault(kind(engine.NAME, problem), {}).setdefault(config.whole(), seconds)
        for name, times in of.items():
            found.setdefault(name, []).append(times)
    return found


def best(problems: Sequence[dict], most: int, without: Sequence[float] | None = None) -> list[tuple[object, float]]:
    """Greedily, (variant, geometric mean of time with the variants so far over the best): first such that every problem
    can take one, the rarest first, then those that gain most.

    Args:
        problems: of each the seconds of every variant that it can take.
        without: of each the seconds that it takes without any variant; None: it needs one.
    """
    chosen: list[tuple[object, float]] = []
    every = {v for times in problems for v in times}
    reached = [math.inf] * len(problems) if without is None else list(without)
    best_of = [min((r, *times.values())) for r, times in zip(reached, problems, strict=True)]
    while every and len(chosen) < most:

        def rest(candidate: object) -> tuple[int, float]:
            now = [min(r, times.get(candidate, math.inf)) for r, times in zip(reached, problems, strict=True)]
            lost = [math.log(a / b) for a, b in zip(now, best_of, strict=True) if a < math.inf]
            return sum(a == math.inf for a in now), sum(lost)

        candidate = min(sorted(every, key=str), key=rest)
        every.remove(candidate)
        reached = [min(r, times.get(candidate, math.inf)) for r, times in zip(reached, problems, strict=True)]
        lost = [math.log(a / b) for a, b in zip(reached, best_of, strict=True) if a < math.inf]
        chosen.append((candidate, math.exp(sum(lost) / len(lost))))
    return chosen


def write(problems: Sequence[Problem], path: Path) -> dict[str, float]:
    """The list of every kind that offers more than ``MOST`` variants; what is lost by it, as time over the best."""
    lists, losses = {}, {}
    for name, of in sorted(predicted(problems).items()):
        if len({v for times in of for v in times}) > MOST:
            chosen = best(of, MOST)
            lists[name] = [spelled(config) for config, _ in chosen]
            losses[name] = chosen[-1][1]
    storage.write(path, f"{json.dumps(lists, indent=1)}\n".encode())
    os.chmod(path, 0o644)
    return losses
