"""The slices, in the order in which they run."""

from __future__ import annotations

from types import ModuleType

from . import bench, fuzz, large, networks, repeats, report, sanitizer, suite, tune

SLICES: tuple[ModuleType, ...] = (suite, fuzz, large, repeats, sanitizer, tune, bench, networks, report)


def chosen(names: str | None) -> list[ModuleType]:
    """The slices of a comma-separated list, all if None; ``correctness`` stands for all that begin with it.

    Raises:
        ValueError: an unknown name; the message lists what exists.
    """
    if names is None:
        return list(SLICES)
    found = []
    for name in names.split(","):
        some = [module for module in SLICES if module.NAME == name or module.NAME.startswith(f"{name}.")]
        if not some:
            raise ValueError(f"no slice named {name!r}: the slices are {', '.join(module.NAME for module in SLICES)}")
        found += some
    return [module for module in SLICES if module in found]
