"""Finding the fastest of many ranked candidates by measuring few of them. Nothing here knows a device.

The ranking is a prior: the logarithm of measured over predicted time is taken as a Gaussian process over the candidates
(kriging; Rasmussen and Williams, 2006, chapter 2), so that each measurement corrects the predictions of its engine, and
most of all those of configs that differ in few knobs. Measured next is what is expected to improve on the best so far
(Jones, Schonlau and Welch, 1998), a batch at a time so that a batch can be compiled together; it ends when no candidate
is expected to. Then the fastest are measured again and again while the slow ones leave (successive halving; Karnin,
Koren and Somekh, 2013).
"""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from types import ModuleType

from ..engines.base import Config

Candidate = tuple[ModuleType, Config]
Ranked = tuple[float, ModuleType, Config]  # predicted seconds, engine, config
Key = tuple[str, Config]
Measure = Callable[[Candidate, int], "float | None"]

OWN = "aten"
OPENING = 7  # candidates, torch's own among them, that are measured before anything is concluded
_BATCH = 2  # candidates that are compiled together from then on
_EXPLORING = 0.75  # of the time, for looking at candidates; the rest is for telling the fastest apart
# (times the fastest, beyond which a candidate leaves; repetitions of those that stay), one round each.
ROUNDS = ((2.0, 1), (1.25, 2), (1.05, 3))
REPETITIONS = 1 + sum(repetitions for _, repetitions in ROUNDS)  # of the last ones that stay

# Standard deviations of log(measured / predicted): of what all engines have in common, of an engine, of a config, of
# one measurement; and the distance in knobs at which configs share 1 / e of theirs. Guesses until sweeps tell more.
_COMMON, _ENGINE, _CONFIG, _NOISE, _RANGE = 0.3, 0.4, 0.7, 0.03, 1.2
_COPIES = 0.2  # of what engines have in common that prepare operands for another
_WORTH = 0.012  # expected improvement, as a part of the time, below which nothing more is measured
_LEAST = 1e-9  # seconds: what takes no time has no logarithm


def search(
    ranked: Sequence[Ranked],
    measure: Measure,
    most: int | None = None,
    hints: Sequence[Candidate] = (),
    prepare: Callable[[list[Candidate]], object] = lambda batch: None,
    late: Callable[[float], bool] = lambda part: False,
) -> dict[Key, list[float]]:
    """Seconds that were measured, by engine's name and config; :func:`median` of them decides.

    Args:
        ranked: what there is, the most promising first; see :func:`.cost_model.rank`.
        measure: ``measure(candidate, repetitions)``: seconds of one launch, or None if the candidate cannot be used.
        most: candidates that are measured at most, torch's own included; all if None.
        hints: candidates that were the fastest of similar problems: measured first.
        prepare: called with each batch before it is measured.
        late: whether this part of the time is over. The first candidate and torch's own are measured even then.
    """
    belief = Belief(ranked)
    must = [*[c for c in (*hints, *belief.candidates) if c[0].NAME != OWN][:1], *belief.of(OWN)]
    limit = len(belief.candidates) if most is None else max(most, len(must))
    batch = belief.candidates if most is None else _opening(belief, must, hints, min(limit, OPENING))
    batch = _distinct([*must, *batch])
    times: dict[Key, list[float]] = {}
    tried = 0
    while batch:
        prepare(batch)
        for candidate in batch:
            if late(_EXPLORING) and candidate not in must:
                return _halved(belief, times, measure, late)
            seconds = measure(candidate, 1)
            tried += 1
            belief.tell(candidate, seconds)
            if seconds is not None:
                times[_key(candidate)] = [seconds]
        batch = belief.promising(min(_BATCH, limit - tried))
    return _halved(belief, times, measure, late)


def median(times: dict[Key, list[float]]) -> dict[Key, float]:
    return {key: statistics.median(samples) for key, samples in times.items()}


def _opening(belief: Belief, must: list[Candidate], hints: Sequence[Candidate], count: int) -> list[Candidate]:
    """What is certain to be measured, hints, the best of every engine, and what is promising and different from them."""
    engines = dict.fromkeys(engine.NAME for engine, _ in belief.candidates)
    opening = _distinct([*must, *hints, *belief.candidates[:1], *[belief.of(name)[0] for name in engines]])[:count]
    return opening + belief.promising(count - len(opening), besides=opening)


def _halved(belief: Belief, times: dict[Key, list[float]], measure: Measure, late: Callable[[float], bool]):
    """Measure the fastest again. Torch's own stays, so that there is something to compare with."""
    racing = {_key(candidate): candidate for candidate in belief.candidates if _key(candidate) in times}
    for limit, repetitions in ROUNDS:
        medians = median({key: times[key] for key in racing})
        fastest = min(medians.values(), default=0.0)
        own = min((seconds for (name, _), seconds in medians.items() if name == OWN), default=0.0)
        racing = {k: c for k, c in racing.items() if medians[k] <= limit * fastest or medians[k] == own}
        for key, candidate in list(racing.items()):
            if late(1.0):
                return times
            seconds = measure(candidate, repetitions)
            if seconds is None:
                del racing[key], times[key]
            else:
                times[key] += [seconds] * repetitions
    return times


def _key(candidate: Candidate) -> Key:
    return candidate[0].NAME, candidate[1]


def _distinct(candidates: Iterable[Candidate]) -> list[Candidate]:
    return list({_key(candidate): candidate for candidate in candidates}.values())


@functools.lru_cache(maxsize=4096)
def _knobs(config: Config) -> tuple[tuple[float, object], ...]:
    """Each knob as (octave, choice): numbers by their logarithm, anything else by itself."""
    return tuple((math.log2(v), None) if type(v) is int and v > 0 else (0.0, v) for v in config.to_dict().values())


def apart(one: Config, other: Config) -> float:
    """Distance of two configs of an engine: octaves between their numbers, and 1 for each choice that differs.

    Configs of two kinds, of different kernels, say nothing about each other.
    """
    if type(one) is not type(other):
        return math.inf
    pairs = zip(_knobs(one), _knobs(other), strict=True)
    return sum(abs(a - b) if mine == theirs else 1.0 for (a, mine), (b, theirs) in pairs)


class Belief:
    """What is believed about the time of every candidate: predictions, corrected by what was measured."""

    def __init__(self, ranked: Sequence[Ranked]):
        self.candidates = [(engine, config) for _, engine, config in ranked]
        self._predicted = {_key((e, c)): math.log(max(seconds, _LEAST)) for seconds, e, c in ranked}
        self._told: dict[Key, float] = {}  # log(measured / predicted)
        self._left = dict.fromkeys(self._predicted)
        self._best = math.inf  # log of the least that was measured

    def of(self, engine: str) -> list[Candidate]:
        return [candidate for candidate in self.candidates if candidate[0].NAME == engine]

    def tell(self, candidate: Candidate, seconds: float | None) -> None:
        """What a candidate took; None: it cannot be used, which says nothing about the others."""
        key = _key(candidate)
        self._left.pop(key, None)
        if seconds is not None and key in self._predicted:
            logarithm = math.log(max(seconds, _LEAST))
            self._told[key] = logarithm - self._predicted[key]
            self._best = min(self._best, logarithm)

    def promising(self, count: int, besides: Sequence[Candidate] = ()) -> list[Candidate]:
        """Up to so many candidates that are expected to improve on the best, each as if the ones before it, and
        ``besides``, had taken what is believed of them; before anything is measured, whatever improvement is expected."""
        told, least = dict(self._told), _WORTH if self._told else -math.inf
        chosen: list[Key] = []
        for candidate in besides:
            told[_key(candidate)] = self._expected(_Process(told), _key(candidate))[0] - self._predicted[_key(candidate)]
        while len(chosen) < count:
            process = _Process(told)
            best = min([self._best, *(self._predicted[key] + told[key] for key in told)])
            left = {key: self._expected(process, key) for key in self._left if key not in told}
            gains = {key: _improvement(best - mean, deviation) for key, (mean, deviation) in left.items()}
            key = max(gains, key=gains.get, default=None)
            if key is None or gains[key] < least:
                break
            chosen.append(key)
            told[key] = left[key][0] - self._predicted[key]
        return [candidate for key in chosen for candidate in self.candidates if _key(candidate) == key]

    def _expected(self, process: _Process, key: Key) -> tuple[float, float]:
        """(mean, standard deviation) of the logarithm of a candidate's seconds."""
        mean, deviation = process.at(key)
        return self._predicted[key] + mean, deviation


def _improvement(ahead: float, deviation: float) -> float:
    """Expected value of the positive part of a normal variable."""
    z = ahead / deviation
    density = math.exp(-z * z / 2) / math.sqrt(2 * math.pi)
    return ahead * (1 + math.erf(z / math.sqrt(2))) / 2 + deviation * density


class _Process:
    """A Gaussian process of mean 0 that took these values at these keys."""

    def __init__(self, told: dict[Key, float]):
        self._keys = list(told)
        self._root: list[list[float]] = []  # Cholesky factor of the covariance, row by row
        for i, key in enumerate(self._keys):
            row = self._forward([_covariance(key, other) for other in self._keys[:i]])
            rest = _covariance(key, key) + _NOISE**2 - sum(v * v for v in row)
            self._root.append([*row, math.sqrt(rest)])
        self._values = self._forward(list(told.values()))

    def at(self, key: Key) -> tuple[float, float]:
        """(mean, standard deviation) at a key."""
        row = self._forward([_covariance(key, other) for other in self._keys])
        mean = sum(a * b for a, b in zip(row, self._values, strict=True))
        return mean, math.sqrt(max(_covariance(key, key) - sum(v * v for v in row), _NOISE**2))

    def _forward(self, right: list[float]) -> list[float]:
        """The solution x of root x = right."""
        solved: list[float] = []
        for value, row in zip(right, self._root, strict=False):
            solved.append((value - sum(a * b for a, b in zip(row, solved, strict=False))) / row[len(solved)])
        return solved


def _covariance(one: Key, other: Key) -> float:
    mine, theirs = _computing(one), _computing(other)
    common = _COMMON**2 + (_COPIES**2 if mine is not one and one[0] == other[0] else 0.0)
    if mine[0] != theirs[0]:
        return common
    return common + _ENGINE**2 + _CONFIG**2 * math.exp(-apart(mine[1], theirs[1]) / _RANGE)


def _computing(key: Key) -> Key:
    """The engine and config that compute, where those of the key only prepare their operands."""
    config = key[1]
    return (config.engine, config.config) if hasattr(config, "engine") else key
