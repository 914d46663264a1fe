"""Triton's interpreter without what takes most of its time: it prepares ``triton.language`` for every launch, and again
for every function that a kernel calls, each time by looking through all names of it; and for the result of every operation
it makes the same few types anew.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from unittest import mock

import triton.language as tl
from triton.runtime import interpreter


@contextlib.contextmanager
def quick() -> Iterator[None]:
    """Within the block the interpreter takes a third of its time."""
    with _prepared_once(), _types_made_once():
        yield


@contextlib.contextmanager
def _prepared_once() -> Iterator[None]:
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


@contextlib.contextmanager
def _types_made_once() -> Iterator[None]:
    """Within the block, what a type's name and shape decide is worked out once."""
    core = tl.core
    patches = {
        (interpreter, "_get_np_dtype"): _by_name,
        (core.block_type, "__init__"): _of_blocks,
        (core.tensor, "__init__"): _of_tensors,
        (core.tuple, "__eq__"): _comparing,
        (core, "_unwrap_if_constexpr"): _unwrapping,
    }
    with contextlib.ExitStack() as stack:
        for (owner, name), replaced in patches.items():
            if original := getattr(owner, name, None):  # no part of its interface: a later Triton may do without
                stack.enter_context(mock.patch.object(owner, name, replaced(original)))
        yield


def _by_name(original: Callable) -> Callable:
    known: dict = {}

    def of(dtype):
        if dtype.name not in known:
            known[dtype.name] = original(dtype)
        return known[dtype.name]

    return of


def _of_blocks(original: Callable) -> Callable:
    known: dict = {}

    def init(self, element_ty, shape):
        sizes = shape.values if isinstance(shape, tl.tuple) else shape
        key = (element_ty.name, *sizes) if all(type(size) is int for size in sizes) else None
        if key in known:
            vars(self).update(known[key], element_ty=element_ty)
            return
        original(self, element_ty, shape)
        if key:
            known[key] = vars(self).copy()

    return init


def _of_tensors(original: Callable) -> Callable:
    known: dict = {}

    def init(self, handle, type):
        if type.name not in known:
            original(self, handle, type)
            known[type.name] = vars(self).copy()
        vars(self).update(known[type.name], handle=handle, type=type, dtype=type.scalar)

    return init


def _comparing(original: Callable) -> Callable:
    def equal(self, other):
        if isinstance(other, list) and all(type(size) is int for size in other):
            return tl.constexpr(self.values == other)
        return original(self, other)

    return equal


def _unwrapping(original: Callable) -> Callable:
    within = (list, tuple, tl.tuple)

    def unwrapped(value):
        if isinstance(value, tl.constexpr):
            return value.value
        return original(value) if isinstance(value, within) else value

    return unwrapped
