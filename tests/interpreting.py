"""Triton's interpreter without what takes half of its time: it prepares ``triton.language`` for every launch, and again
for every function that a kernel calls, each time by looking through all names of it.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from types import SimpleNamespace

import triton.language as tl
from triton.runtime import interpreter


@contextlib.contextmanager
def prepared_once() -> Iterator[None]:
    """Within the block, a launch sets what the first one set, and functions that it calls find that done."""
    if not hasattr(interpreter, "_patch_lang"):  # no part of its interface: a later Triton may do without
        yield
        return
    original, running = interpreter._patch_lang, set()
    set_by: dict[frozenset, list[tuple]] = {}  # (owner, name, value), by the modules that a kernel has prepared

    @functools.cache
    def modules(function) -> frozenset:
        return frozenset(value.__name__ for value in function.__globals__.values() if value is tl or value is tl.core)

    def prepare(function):
        found, kernel = modules(function), not running
        if found in running:
            return None
        running.add(found)
        if not kernel:  # what it sets depends on what its kernel set before
            return original(function)
        if found in set_by:
            scope = interpreter._LangPatchScope()
            for change in set_by[found]:
                scope.set_attr(*change)
        else:
            scope = original(function)
            set_by[found] = [(owner, name, getattr(owner, name)) for owner, name, _ in scope._changes]
        return SimpleNamespace(restore=lambda: (running.clear(), scope.restore()))

    interpreter._patch_lang = prepare
    try:
        yield
    finally:
        interpreter._patch_lang = original
