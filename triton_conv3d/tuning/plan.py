"""Plan: an engine and its config, chosen for a problem."""

from __future__ import annotations

from dataclasses import dataclass

from .. import engines
from ..engines.base import Config
from ..problem import Problem
from .storage import canonical


@dataclass(frozen=True)
class Plan:
    """
    engine, config: what to launch.
    source: who chose it: ``memory``, ``cache``, ``table``, ``nearest``, ``ranking``, ``measured``, ``forced`` or
        ``fallback``.
    time_us: microseconds that were measured for it, if any.
    """

    engine: str
    config: Config
    source: str
    time_us: float | None = None


def offered(problem: Problem, engine_name: str, config_dict: dict) -> Config | None:
    """The engine's own config that equals a stored one; None if the engine does not offer it for this problem today.

    Values from a file are only ever compared, strictly: no value of a file reaches a kernel.
    """
    engine = engines.available().get(engine_name) if isinstance(engine_name, str) else None
    if engine is None or engine.supports(problem) is not None:
        return None
    try:
        wanted = canonical(config_dict)
    except (TypeError, ValueError, RecursionError):  # not plain values: nothing that a file can hold
        return None
    return next((config for config in engine.configs(problem) if canonical(config.to_dict()) == wanted), None)
