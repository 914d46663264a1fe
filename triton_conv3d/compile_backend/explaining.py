"""What the backend would make of a model, on tensors without memory: nothing is computed, measured or changed."""

from __future__ import annotations

import copy
import itertools
import types
from collections.abc import Sequence

import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map_only

from . import backend
from .report import Report, collected


def explain_graphs(model: nn.Module, args: Sequence) -> list[Report]:
    """Reports of the graphs that ``model(*args)`` becomes, those of its backward pass last, if gradients are on.

    With ``aot_eager`` as the inner backend, for Inductor would compile what nobody runs.

    Raises:
        RuntimeError: a model that cannot be copied, such as one of FSDP's, or that decides by what tensors hold. What the
            model raises for such an input.
    """
    model = getattr(model, "_orig_mod", model)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    memo = {id(tensor): mode.from_tensor(tensor) for tensor in itertools.chain(model.parameters(), model.buffers())}
    try:
        double = copy.deepcopy(model, memo)
    except Exception as error:
        name = type(model).__name__
        raise RuntimeError(f"{name} cannot be copied ({error}): explain it before it is sharded or run") from error
    args = tree_map_only(torch.Tensor, mode.from_tensor, tuple(args))
    with collected() as reports, mode:
        function = torch.compile(_caller(double), backend=backend, options={"inner": "aot_eager"}, dynamic=False)
        try:
            results = function(*args)
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            message = f"{type(model).__name__} decides by what tensors hold ({error}), and explain computes nothing"
            raise RuntimeError(message) from error
        results = [t for t in tree_leaves(results) if isinstance(t, torch.Tensor) and t.requires_grad]
        sources = [t for t in (*tree_leaves(args), *double.parameters()) if getattr(t, "requires_grad", False)]
        if results and sources:
            torch.autograd.grad(results, sources, [torch.empty_like(t) for t in results], allow_unused=True)
    return reports


def _caller(model: nn.Module):
    """A function with code of its own: what Dynamo compiles is kept with the code, and goes with this one."""

    def call(*args):
        return model(*args)

    return types.FunctionType(call.__code__.replace(), call.__globals__, "call", None, call.__closure__)
