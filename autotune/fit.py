"""Fitting the cost model's coefficients to a sweep: the least mean error of log(predicted / measured).

By coordinate descent: each coefficient in turn, along steps that shrink. The error is Huber's, so that a candidate that
the model does not understand counts no more than it must, and a weak pull to the defaults keeps a coefficient that the
sweep does not tell anything about where it was.
"""

from __future__ import annotations

import dataclasses
import math
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from triton_conv3d import engines
from triton_conv3d.tuning import coefficients, cost_model
from triton_conv3d.tuning.cost_model import Rates

from .analysis import Measured

_SAMPLES = 2000  # measurements that are looked at: more change a dozen coefficients little
_SEED = 1
_STEPS = (2.0, 1.4, 1.15, 1.05)  # factors by which a coefficient is tried above and below
_HUBER = 0.3  # of the logarithm, up to which errors count by their square
_PULL = 1e-3  # of the squared logarithm of a coefficient over its default
_GAIN = 1e-6
PARTS = tuple(name for name in coefficients.FITTED if name.endswith("_part") and not name.startswith("aten"))


@dataclass(frozen=True)
class Fit:
    """Fitted coefficients that differ from the defaults, and the mean error before and after."""

    values: dict[str, float]
    before: float
    after: float
    measurements: int


def fit(found: Sequence[Measured], defaults: Rates) -> Fit:
    """Raises ValueError where nothing was measured."""
    samples = [
        (of.problem, engines.available()[name], config, seconds)
        for of in found
        for (name, config), seconds in of.seconds.items()
    ]
    if not samples:
        raise ValueError("nothing was measured in this sweep: no coefficient to fit")
    chosen = random.Random(_SEED).sample(samples, min(_SAMPLES, len(samples)))
    counts = Counter(engine.NAME for _, engine, _, _ in chosen)  # engines count alike, however many configs they have

    def error(rates: Rates) -> float:
        errors = ((e, math.log(cost_model.predict(p, e, c, rates) / seconds)) for p, e, c, seconds in chosen)
        return sum(_huber(off) / counts[e.NAME] for e, off in errors) / len(counts)

    def cost(rates: Rates) -> float:
        pull = sum(math.log(getattr(rates, n) / getattr(defaults, n)) ** 2 for n in coefficients.FITTED)
        return error(rates) + _PULL * pull

    best, least = defaults, cost(defaults)
    for step in _STEPS:
        improved = True
        while improved:
            improved = False
            for name in coefficients.FITTED:
                for factor in (step, 1 / step):
                    value = getattr(best, name) * factor
                    tried = dataclasses.replace(best, **{name: value})
                    if _plausible(name, value, getattr(defaults, name)) and (now := cost(tried)) < least - _GAIN:
                        best, least, improved = tried, now, True
                        break
    values = {n: getattr(best, n) for n in coefficients.FITTED if getattr(best, n) != getattr(defaults, n)}
    return Fit(values, error(defaults), error(best), len(samples))


def _plausible(name: str, value: float, default: float) -> bool:
    """Within the range of :mod:`.coefficients`, and no more than the whole of a rate."""
    most = coefficients.MOST_FACTOR
    return default / most <= value <= default * most and (name not in PARTS or value <= 1.0)


def _huber(error: float) -> float:
    size = abs(error)
    return size * size / 2 if size <= _HUBER else _HUBER * (size - _HUBER / 2)
