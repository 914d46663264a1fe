"""From the measured plan of a similar problem to a candidate for this one, judged by the cost model.

A config's time here is taken as its predicted time here, times what the prediction was off by there:

    estimate = predicted here * time there / predicted there

Of the plan that was the fastest there, time there is known. Any other config took at least as long, and is expected to
be off as much as that plan: its time there is the larger of the two.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ..problem import Problem
from . import cost_model
from .cache import Entry
from .plan import offered
from .search import OWN, Candidate, Ranked
from .table import MAX_DISTANCE, distance

NEIGHBOURS = 3  # similar problems whose plans are measured first
_MARGIN = 0.8  # of the estimate of what was measured, that a config must stay below which was only predicted


def nearest(problem: Problem, entries: Iterable[Entry]) -> list[tuple[Entry, float]]:
    """Entries of similar problems with their distances in octaves, the nearest first."""
    apart = ((entry, distance(problem, Problem.from_dict(entry.problem))) for entry in entries)
    return sorted((pair for pair in apart if pair[1] <= MAX_DISTANCE), key=lambda pair: pair[1])


def transferred(entry: Entry, ranked: Sequence[Ranked]) -> Candidate | None:
    """The candidate that a measured plan of a similar problem speaks for; None if it is of no use here.

    That is its config with the splits that suit this problem, or a config that gains much more than it by the
    difference of the problems; torch's own if that was measured there and is estimated to be faster here.

    Args:
        entry: the plan, of another problem. ranked: all candidates of this one, with their predicted seconds.
    """
    there = Problem.from_dict(entry.problem)
    config = offered(there, entry.engine, entry.config)
    if config is None or not ranked:
        return None
    kin = [item for item in ranked if item[1].NAME == entry.engine and item[2].whole() == config.whole()]
    if not kin:
        return None
    seconds = entry.time_us * 1e-6
    off = seconds / cost_model.predict(there, kin[0][1], config)
    chosen, least = kin[0], kin[0][0] * off
    off = off if entry.engine != OWN else 1.0  # which says nothing about ours
    for item in ranked:
        predicted, engine, other = item
        if engine.NAME == OWN:
            if entry.aten_us is None or entry.engine == OWN:
                continue
            estimate = predicted * entry.aten_us * 1e-6 / cost_model.predict(there, engine, other)
        elif engine.supports(there) is None:
            estimate = predicted * max(off, seconds / cost_model.predict(there, engine, other)) / _MARGIN
        else:
            continue
        if estimate < least:
            chosen, least = item, estimate
    return chosen[1:]


def hints(found: Iterable[tuple[Entry, float]], ranked: Sequence[Ranked]) -> list[Candidate]:
    """The candidates that the nearest plans speak for, to be measured first; ``found`` as :func:`nearest` gives it."""
    candidates = [transferred(entry, ranked) for entry, _ in list(found)[:NEIGHBOURS]]
    return [candidate for candidate in candidates if candidate is not None]
