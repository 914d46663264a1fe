"""Triton's interpreter without what takes most of its time: it prepares ``triton.language`` for every launch, and again
for every function that a kernel calls, each time by looking through all names of it; for the result of every operation
it makes the same few types anew; and it asks of every two operands what they would have to be converted to.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from unittest import mock

import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.jit import ConstexprFunction


@contextlib.contextmanager
def quick() -> Iterator[None]:
    """Within the block the interpreter computes the same, much faster."""
    with _prepared_once(), _types_made_once(), _no_work_for_what_is_alike():
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
    as_they_are = {int, bool, float, str, tl.tensor, type(None)}

    def unwrapped(value):
        kind = type(value)
        if kind in as_they_are or kind is tuple and all(type(item) in as_they_are for item in value):
            return value
        return value.value if kind is tl.constexpr else original(value)

    return unwrapped


@contextlib.contextmanager
def _no_work_for_what_is_alike() -> Iterator[None]:
    """Within the block, operands of one type are left as they are, and what constants decide is worked out once."""
    semantic = interpreter.TritonSemantic
    patches = {
        (interpreter, "_patch_attr"): _setting_builtins,
        (semantic, "binary_op_type_checking_impl"): _checking_types,
        (semantic, "broadcast_impl_value"): _broadcasting,
        (ConstexprFunction, "__call__"): _remembering,
    }
    with contextlib.ExitStack() as stack:
        for (owner, name), replaced in patches.items():
            if original := getattr(owner, name, None):
                stack.enter_context(mock.patch.object(owner, name, replaced(original)))
        yield


def _checking_types(original: Callable) -> Callable:
    computed_as_they_are = {"int32", "int64", "fp32"}
    constants: dict = {}

    def checked(self, lhs, rhs, *args):
        if type(lhs) is tl.tensor and lhs.dtype.name in computed_as_they_are:
            if type(rhs) is tl.tensor:
                if rhs.type.name in (lhs.type.name, lhs.dtype.name):  # numpy spreads a scalar by itself
                    return lhs, rhs
            elif type(rhs) in (int, float):
                key = lhs.type.name, repr(rhs), args
                if key not in constants:
                    left, constant = original(self, lhs, rhs, *args)
                    if left is not lhs:  # an integer that becomes a float
                        return left, constant
                    constant.handle.data.flags.writeable = False
                    constants[key] = constant
                return lhs, constants[key]
        return original(self, lhs, rhs, *args)

    return checked


def _broadcasting(original: Callable) -> Callable:
    def broadcast(self, lhs, rhs):
        left, right = lhs.type, rhs.type
        if type(left) is type(right) is tl.block_type and left.shape.values == right.shape.values:
            return lhs, rhs
        return original(self, lhs, rhs)

    return broadcast


def _setting_builtins(original: Callable) -> Callable:
    of = getattr(interpreter, "interpreter_semantic", None)

    def set_builtin(obj, name, member, builder, scope):
        semantic, computed = of or interpreter.TritonSemantic(builder), inspect.unwrap(member)

        def builtin(*args, _semantic=None, **kwargs):
            return computed(*args, _semantic=semantic, **kwargs)

        scope.set_attr(obj, name, builtin)

    return set_builtin


def _remembering(original: Callable) -> Callable:
    known: dict = {}

    def call(self, *args, **kwargs):
        if kwargs:
            return original(self, *args, **kwargs)
        key = self.fn, args, *map(type, args)
        try:
            return known[key]
        except (KeyError, TypeError):
            result = original(self, *args)
        if isinstance(result, int | tuple):
            with contextlib.suppress(TypeError):  # an argument that has no hash
                known[key] = result
        return result

    return call
