"""explain: the problems of a call, who could compute them, and the plan with its origin; of a whole model, what the
backend of torch.compile makes of it. Nothing runs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from . import engines, modules, ops, transposed
from .engines.base import Memory
from .functional import checked_geometry, refuse_types, transposed_geometry, transposed_shape
from .problem import NO_ACTIVATION, PASSES, Problem
from .tuning import Plan, select
from .tuning.select import ranking, refusals

_SHOWN = 5  # candidates of a pass in the printed form


@dataclass(frozen=True)
class Candidate:
    """An engine and config with the seconds that the cost model predicts, and the bytes it needs besides."""

    engine: str
    config: str
    seconds: float
    memory: Memory


@dataclass(frozen=True)
class PassExplanation:
    """One pass: its problem, the candidates from the most promising on, who refused and why, and the plan."""

    problem: Problem
    candidates: tuple[Candidate, ...]
    refused: dict[str, str]
    plan: Plan
    memory: Memory

    def __str__(self) -> str:
        p, plan = self.problem, self.plan
        measured = "" if plan.time_us is None else f", measured {plan.time_us:.1f} us"
        lines = [
            str(p),
            f"  {p.flops / 1e9:.3f} GFLOP, at least {p.min_bytes / 2**20:.2f} MiB moved, layouts {'/'.join(p.layouts)}",
            f"  plan: {plan.engine} [{plan.config}] from {plan.source}{measured}; workspace "
            f"{self.memory.workspace / 2**20:.2f} MiB, copies {self.memory.copies / 2**20:.2f} MiB",
        ]
        lines += [f"  predicted {c.seconds * 1e6:9.1f} us  {c.engine} [{c.config}]" for c in self.candidates[:_SHOWN]]
        if len(self.candidates) > _SHOWN:
            lines.append(f"  and {len(self.candidates) - _SHOWN} more")
        return "\n".join(lines + [f"  refused by {name}: {reason}" for name, reason in self.refused.items()])


@dataclass(frozen=True)
class Explanation:
    """Of a call: one :class:`PassExplanation` for each pass, by name. ``print`` it."""

    passes: dict[str, PassExplanation]

    def __str__(self) -> str:
        return "\n".join(map(str, self.passes.values()))


def explain_problem(problem: Problem) -> PassExplanation:
    """Explain one problem. Nothing is measured or launched."""
    candidates = tuple(
        Candidate(engine.NAME, str(config), seconds, engine.memory(problem, config))
        for seconds, engine, config in ranking(problem)
    )
    plan = select(problem)
    memory = engines.get(plan.engine).memory(problem, plan.config)
    return PassExplanation(problem, candidates, refusals(problem), plan, memory)


@dataclass(frozen=True)
class ModelExplanation:
    """Of a model under torch.compile: one :class:`triton_conv3d.compile_backend.Report` for each graph, those of the
    backward pass last. ``print`` it."""

    graphs: tuple

    def __str__(self) -> str:
        return "\n".join(map(str, self.graphs)) or "no 3-D convolution in any graph: nothing is changed"


def explain(
    input: Tensor | nn.Module,
    weight: Tensor | tuple,
    bias: Tensor | None = None,
    stride=1,
    padding=0,
    dilation=1,
    groups: int = 1,
    *,
    activation: str | None = None,
    residual: Tensor | None = None,
    pass_: str | None = None,
) -> Explanation | ModelExplanation:
    """Explain ``conv3d(input, weight, ...)``, a layer's call on an example, ``explain(layer, input)``, or what
    ``torch.compile(model, backend="triton_conv3d")`` makes of a model: ``explain(model, input)``.

    Args:
        input, ..., residual: as :func:`triton_conv3d.conv3d`; or a Conv3d or ConvTranspose3d and its input; or any other
            module, of a subclass that does more than convolve too, compiled or not, and its input, a tuple of inputs if
            there are several. Gradients and autocast are as where it is called.
        pass_: ``forward``, ``dgrad`` or ``wgrad``, of a call or layer; all three if None. A transposed layer is computed by
            ``dgrad``, and the gradient of its input by ``forward``.

    Returns:
        Of a model the graphs as ``inner="aot_eager"`` gets them, with the other options as they are by default; Inductor's
        are taken apart differently.

    Raises:
        ValueError: an unknown ``pass_``, or one of a model. TypeError: neither tensor nor module. RuntimeError: a model
            with lazy layers, or one that decides by what tensors hold. What ``conv3d`` or the model would raise for the
            same call.
    """
    if pass_ is not None and pass_ not in PASSES:
        raise ValueError(f"pass_={pass_!r} is not known: expected one of {', '.join(PASSES)}")
    if isinstance(input, nn.Module) and not _is_layer(input):
        if pass_ is not None:
            raise ValueError(f"pass_={pass_!r} is of one convolution, and {type(input).__name__} is a model: leave it out")
        return _explain_model(input, weight if isinstance(weight, tuple) else (weight,))
    layer = None
    if isinstance(input, nn.Module):
        layer, input = input, weight
    if not isinstance(input, Tensor):
        raise TypeError(f"explain: input must be a tensor, or a module and then its input, got {type(input).__name__}")
    if isinstance(layer, nn.ConvTranspose3d):
        return _explained(_of_transposed(layer, input), pass_)
    if layer is not None:
        weight, bias = layer.weight, layer.bias
        stride, padding, dilation, groups = layer.stride, layer.padding, layer.dilation, layer.groups
        if layer.padding_mode != "zeros":
            sides = layer._reversed_padding_repeated_twice
            input, padding = nn.functional.pad(input, sides, mode=layer.padding_mode), 0
    refuse_types("explain", weight=weight, bias=bias, residual=residual)
    if input.dim() == 4:
        input, residual = input.unsqueeze(0), None if residual is None else residual.unsqueeze(0)
    activation = NO_ACTIVATION if activation is None else activation
    with torch.no_grad():
        geometry = checked_geometry(input, weight, bias, stride, padding, dilation, groups)
        input, weight, bias, residual = (ops.autocasted(t, input.device.type) for t in (input, weight, bias, residual))
        problems = ops.problems(input, weight, bias, *geometry, residual=residual, activation=activation)
    return _explained(problems, pass_)


def _explained(problems: list[Problem], pass_: str | None) -> Explanation:
    return Explanation({p.pass_: explain_problem(p) for p in problems if pass_ in (None, p.pass_)})


def _of_transposed(layer: nn.ConvTranspose3d, input: Tensor) -> list[Problem]:
    """Of the convolution whose input gradient the layer's output is."""
    input, weight, bias = input.unsqueeze(0) if input.dim() == 4 else input, layer.weight, layer.bias
    written = (layer.stride, layer.padding, layer.output_padding, layer.groups, layer.dilation)
    with torch.no_grad():
        *geometry, extra = transposed_geometry(input, weight, bias, *written)
        input, weight = (ops.autocasted(tensor, input.device.type) for tensor in (input, weight))
        shape = transposed_shape(input.shape, weight.shape, *geometry, extra)
        last = ops.channels_last_result(input, weight)
        result = input.new_empty(shape).contiguous(memory_format=torch.channels_last_3d if last else torch.contiguous_format)
        return ops.problems(result, weight, None, *geometry)


def _is_layer(module: nn.Module) -> bool:
    """Whether its call is one convolution of its input; subclasses may do more, such as pad in front of it."""
    if isinstance(module, nn.ConvTranspose3d):
        return type(module).forward in (nn.ConvTranspose3d.forward, transposed.ConvTranspose3d.forward)
    return isinstance(module, nn.Conv3d) and all(
        getattr(type(module), name) in (getattr(nn.Conv3d, name), getattr(modules.Conv3d, name))
        for name in ("forward", "_conv_forward")
    )


def _explain_model(model: nn.Module, args: tuple) -> ModelExplanation:
    modules.check_materialized(model)
    from .compile_backend.explaining import explain_graphs  # torch's compiler takes long to import

    return ModelExplanation(tuple(explain_graphs(model, args)))
