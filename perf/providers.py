"""Providers: everybody whose time is taken, behind one interface.

    ours                          tuned, as users call it, on tensors in the case's memory format
    implicit_gemm, matmul, ...    one engine of ours alone, tuned, by its own launch
    implicit_gemm:tiles, ...      each config of it alone, a provider apiece, as maps of tiles need them
    torch, torch_cl               torch's own on contiguous tensors, and on channels_last_3d ones
    torch_bench, torch_cl_bench   the same with cudnn.benchmark
    compile                       torch.compile(mode="max-autotune") of torch's own, in the case's memory format
    flag_gems                     where it is installed

Every provider computes the same thing from the same numbers. What it costs to reach a memory format is not counted:
each finds its tensors, weight and gradient included, in the format that it is named for. A transposed convolution is
torch's conv_transpose3d on one side, and the pass that it is the adjoint of on ours. Who lets cuDNN search has a thread
to himself, see :mod:`perf.threads`.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Protocol

import torch

import triton_conv3d
from triton_conv3d import engines, ops, settings
from triton_conv3d.engines.base import Config
from triton_conv3d.problem import CHANNELS_LAST, CONTIGUOUS, Operands, Problem
from triton_conv3d.tuning import Plan, cost_model, select

from .calls import Results, arguments, as_module, outside, single, torch_pass, training
from .machine import tf32
from .tensors import Tensors
from .threads import MAIN
from .workloads import TRAIN, Case

_NO_TF32X3 = "torch has no tf32x3"
_TILES = ":tiles"
_MOST_TILES = 48  # of one engine for one problem: what tma offers, three bricks for each of 13 tiles, and room


@dataclass(frozen=True)
class Prepared:
    """A provider ready to compute one case.

    Attributes:
        call: returns a result for each problem of the case, in their order.
        plans: what was chosen for each problem, once ``call`` has run; empty if the provider does not tell.
        context: to be entered around every call.
        warmups: calls after which nothing is compiled or searched any more.
        end: to be called at last: frees what is kept beyond the tensors.
    """

    call: Callable[[], Results]
    plans: Callable[[], tuple[Plan, ...]] = tuple
    context: Callable[[], AbstractContextManager] = nullcontext
    warmups: int = 1
    end: Callable[[], object] = lambda: None


class Provider(Protocol):
    """
    thread: of :mod:`perf.threads`, in which it is prepared and called.
    """

    name: str
    thread: str

    def prepare(self, case: Case, tensors: Tensors) -> Prepared | str:
        """The case ready to be called, or why this provider cannot do it."""


@contextlib.contextmanager
def alike(case: Case) -> Iterator[None]:
    """Within the block every provider computes in the case's precision, and no switch of the user's favours one.

    For 16-bit types torch's switches for tf32 stay as they are: forbidding it there can cost tensor cores.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(settings.configure(engine=None))
        stack.enter_context(cudnn_benchmark(False))
        if case.dtype == "fp32":
            stack.enter_context(settings.configure(fp32=case.precision))
            stack.enter_context(tf32(case.precision == "tf32"))
        yield


@contextlib.contextmanager
def cudnn_benchmark(value: bool) -> Iterator[None]:
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = value
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


class Ours:
    """The package as users call it: the functional form and the module, or the ops that autograd calls."""

    name, thread = "ours", "ours"  # among its candidates is torch's own convolution with cudnn.benchmark

    def prepare(self, case: Case, tensors: Tensors) -> Prepared | str:
        layer, last = case.workload.layer, case.layout == CHANNELS_LAST
        geometry = (layer.stride, layer.padding_both, layer.dilation, layer.groups)
        if case.pass_ == TRAIN:
            module = as_module(case, tensors, case.layout, triton_conv3d)
            call = training(module, *outside(case, tensors, case.layout))
        else:
            (problem,) = tensors.problems
            x, w, g, b = tensors.operands(problem)[:4]
            call = {
                "forward": single(triton_conv3d.conv3d, x, w, b, *arguments(case)),
                "dgrad": single(ops.conv3d_dgrad, g, w, layer.input_shape, *geometry, last),
                "wgrad": single(ops.conv3d_wgrad, g, x, layer.weight_shape, *geometry, last),
            }[problem.pass_]
        return Prepared(call, lambda: tuple(map(select, tensors.problems)))


class Engine:
    """One engine alone: the best of its configs for the problem, by its own launch."""

    thread = Ours.thread

    def __init__(self, name: str):
        self.name = self.engine = name

    def prepare(self, case: Case, tensors: Tensors) -> Prepared | str:
        if case.pass_ == TRAIN:
            return "an engine alone computes single passes; a module chooses its engines itself"
        (problem,) = tensors.problems
        engine, operands = engines.get(self.engine), tensors.operands(problem)
        plan = engine.supports(problem) or self.plan(problem, operands)
        if isinstance(plan, str):
            return plan
        return Prepared(single(engine.launch, problem, operands, plan.config), lambda: (plan,))

    def plan(self, problem: Problem, operands: Operands) -> Plan | str:
        """What is launched, or why nothing can be."""
        with settings.configure(engine=self.engine):
            plan = select(problem, operands)
        return plan if plan.engine == self.engine else "every config failed to launch or gave a wrong result"


class Tile(Engine):
    """The index-th config of an engine, as :func:`tiles` counts them, whatever the tuner thinks of it."""

    def __init__(self, engine: str, index: int):
        self.name, self.engine, self.index = f"{engine}:{index}", engine, index

    def plan(self, problem: Problem, operands: Operands) -> Plan | str:
        offered = tiles(problem, engines.get(self.engine))
        if self.index >= len(offered):
            return f"{self.engine} has {len(offered)} tiles for it"
        return Plan(self.engine, offered[self.index], "forced")


def tiles(problem: Problem, engine: ModuleType) -> list[Config]:
    """The configs that an engine offers; of those that differ in their splits only, the one predicted to be fastest."""
    best: dict[Config, tuple[float, Config]] = {}
    for config in engine.configs(problem):
        whole = config.whole()
        predicted = cost_model.predict(problem, engine, config)
        if whole not in best or predicted < best[whole][0]:
            best[whole] = predicted, config
    return [config for _, config in best.values()]


class Torch:
    """torch's own convolution as eager users call it: the functional form, the module, or what autograd calls."""

    def __init__(self, name: str, layout: str, benchmark: bool = False):
        self.name, self.thread = name, "bench" if benchmark else MAIN
        self._layout, self._benchmark = layout, benchmark

    def prepare(self, case: Case, tensors: Tensors) -> Prepared | str:
        if case.precision == "tf32x3":
            return _NO_TF32X3
        if case.pass_ == TRAIN:
            call = training(as_module(case, tensors, self._layout), *outside(case, tensors, self._layout))
        else:
            call = single(*torch_pass(case, tensors, self._layout))
        return Prepared(call, context=lambda: cudnn_benchmark(self._benchmark))


class Compile:
    """torch.compile of what :class:`Torch` calls.

    The addresses of its inputs are declared constant, as those of activations within a compiled network are: otherwise
    every replay of its CUDA graph would copy them. The gradient that a backward pass begins with is still copied.
    """

    name, thread = "compile", MAIN  # torch keeps CUDA graphs of compiled code for the main thread only

    def prepare(self, case: Case, tensors: Tensors) -> Prepared | str:
        if case.precision == "tf32x3":
            return _NO_TF32X3
        torch._dynamo.reset()  # what was compiled for other cases must not make this one's shapes dynamic
        compiled = partial(torch.compile, mode="max-autotune")
        if case.pass_ == TRAIN:
            x, grad = outside(case, tensors, case.layout)
            inputs = (x,)
            call = training(compiled(as_module(case, tensors, case.layout)), x, grad)
        else:
            function, *inputs = torch_pass(case, tensors, case.layout)
            call = single(compiled(function), *inputs)
        for tensor in inputs:
            if tensor is not None:
                torch._dynamo.mark_static_address(tensor)

        def step() -> Results:
            torch.compiler.cudagraph_mark_step_begin()
            return call()

        # The first call compiles, the second records a CUDA graph, the third replays it.
        return Prepared(step, warmups=3, end=torch._dynamo.reset)


class FlagGems:
    """FlagGems' Triton convolution, where it is installed: forward only, on contiguous tensors."""

    name, thread = "flag_gems", MAIN

    def prepare(self, case: Case, tensors: Tensors) -> Prepared | str:
        if case.pass_ != "forward" or case.workload.transposed:
            return "it has the forward convolution only"
        if case.dtype == "fp32" and case.precision != "ieee":
            return f"it computes float32 as ieee, not as {case.precision}"
        conv3d = importlib.import_module("flag_gems.ops").conv3d
        x, w, b = (tensors.get(name, CONTIGUOUS) for name in ("input", "weight", "bias"))
        return Prepared(single(conv3d, x, w, b, *arguments(case)))


PROVIDERS: dict[str, Provider] = {
    provider.name: provider
    for provider in (
        Ours(),
        *map(Engine, engines.available()),
        Torch("torch", CONTIGUOUS),
        Torch("torch_cl", CHANNELS_LAST),
        Torch("torch_bench", CONTIGUOUS, benchmark=True),
        Torch("torch_cl_bench", CHANNELS_LAST, benchmark=True),
        Compile(),
        *([FlagGems()] if importlib.util.find_spec("flag_gems") else []),
    )
}


def get(names: Sequence[str]) -> list[Provider]:
    """Providers by name, each once. Raises ValueError listing what exists."""
    found: list[Provider] = []
    for name in dict.fromkeys(names):
        engine = name.removesuffix(_TILES)
        if name in PROVIDERS:
            found.append(PROVIDERS[name])
        elif engine != name and engine in engines.available():
            found += [Tile(engine, index) for index in range(_MOST_TILES)]
        else:
            known = (*PROVIDERS, *(engine + _TILES for engine in engines.available()))
            raise ValueError(f"no provider named {name!r}: the providers are {', '.join(known)}")
    return found
