"""Running models compiled and not, and a look at every tensor of the compiled graphs."""

from __future__ import annotations

import copy

import pytest
import torch
import torch._dynamo.backends.debugging
from torch import fx
from torch._guards import TracingContext
from torch._inductor import compile_fx, config
from torch._inductor.fx_passes.post_grad import view_to_reshape
from torch._inductor.output_code import OutputCode

from triton_conv3d import settings
from triton_conv3d.compile_backend import backend, eager, report, reports
from triton_conv3d.compile_backend.rewriting import is_ours

_TORCHS = (torch.ops.aten.convolution.default, torch.ops.aten.convolution_backward.default)


class Strict(fx.Interpreter):
    """Runs a graph and compares what torch computes with what the graph says: shapes, and the strides that matter.

    Not behind torch's own convolutions, whose strides its fake tensors do not always foresee.
    """

    def __init__(self, graph_module):
        super().__init__(graph_module)
        self.unforeseen: set[fx.Node] = set()
        self.sizes: dict = {}  # of the symbols, at this call

    def run_node(self, node):
        result = super().run_node(node)
        if node.op == "placeholder":
            self.learn(node.meta.get("val"), result)
        if node.target in _TORCHS or self.unforeseen & set(node.all_input_nodes):
            self.unforeseen.add(node)
            return result
        expected = node.meta.get("val")
        if isinstance(expected, torch.Tensor) and node.op == "call_function":
            wanted = [self.known(pair) for pair in zip(expected.shape, expected.stride(), strict=True)]
            for pair, (size, stride) in zip(significant(result), wanted, strict=True):
                same = size in (pair[0], None) and (pair[1] is None or stride in (pair[1], None))
                assert same, f"{node.format_node()} gave {significant(result)} instead of {wanted}"
        return result

    def learn(self, expected, result) -> None:
        if isinstance(expected, torch.Tensor):
            expected, result = (*expected.shape, *expected.stride()), (*result.shape, *result.stride())
        else:
            expected, result = (expected,), (result,)
        for symbol, number in zip(expected, result, strict=True):
            if isinstance(symbol, torch.SymInt) and symbol.node.expr.is_Symbol:
                self.sizes[symbol.node.expr] = number

    def known(self, numbers) -> list[int | None]:
        """The numbers, symbols replaced by what they are at this call; None where that is not known."""
        values = (n if type(n) is int else n.node.expr.subs(self.sizes) for n in numbers)
        return [int(value) if type(value) is int or value.is_Integer else None for value in values]


def significant(tensor: torch.Tensor) -> list[tuple]:
    """(size, stride) of each dimension, without strides of single elements."""
    pairs = zip(tensor.shape, tensor.stride(), strict=True)
    return [(int(size), int(stride) if size > 1 else None) for size, stride in pairs]


def strictly(graph_module: fx.GraphModule, inputs) -> object:
    """In place of torch's boxed_nop: see :class:`Strict`. ``graphs`` keeps every graph."""
    graphs.append(graph_module)
    interpreter = Strict(graph_module)

    def run(arguments):
        values = list(arguments)
        arguments.clear()
        return interpreter.run(*values)

    run._boxed_call = True
    return run


graphs: list[fx.GraphModule] = []


def compiled(model, inner: str = "aot_eager", **options):
    torch._dynamo.reset()
    return torch.compile(model, backend=backend, options={"inner": inner, **options})


def error(a: torch.Tensor, b: torch.Tensor) -> float:
    """Norm of the difference over the norm."""
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def compare(model, x, training: bool, inner: str = "aot_eager", **options) -> tuple[float, list]:
    """(the largest error of output, gradients and buffers against eager mode, reports of the graphs).

    Gradients are compared as one vector, since single ones may be nothing but roundoff. Strides of the output agree.
    """
    before, reference = len(reports()), copy.deepcopy(model)
    function = compiled(model, inner, **options)

    def call(module, given):
        torch.manual_seed(1)
        return module(given)

    if not training:
        with torch.no_grad():
            y, expected = call(function, x), call(reference, x)
        assert significant(y) == significant(expected)
        return max(error(y, expected), _state_error(model, reference)), reports()[before:]
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    y, expected = call(function, inputs[0]), call(reference, inputs[1])
    assert significant(y) == significant(expected)
    grad = torch.randn_like(expected)
    gradients = []
    for output, input, module in ((y, inputs[0], model), (expected, inputs[1], reference)):
        output.backward(grad)
        assert significant(input.grad) == significant(input)
        gradients.append(torch.cat([t.grad.flatten() for t in (input, *module.parameters()) if t.grad is not None]))
    return max(error(y, expected), error(*gradients), _state_error(model, reference)), reports()[before:]


def _state_error(*models) -> float:
    return error(*(torch.cat([tensor.flatten() for tensor in (torch.ones(1), *m.buffers())]) for m in models))


def conversions_between_convolutions(graph: fx.Graph) -> list[fx.Node]:
    """Copies of 5-D tensors into other strides, found by strides alone, that lie between two convolutions."""

    def reaches(node: fx.Node, neighbours: str, seen: set) -> bool:
        for other in getattr(node, neighbours):
            if is_ours(other) or (other not in seen and not seen.add(other) and reaches(other, neighbours, seen)):
                return True
        return False

    found = []
    for node in graph.nodes:
        source = node.args[0] if node.args and isinstance(node.args[0], fx.Node) else None
        a, b = (n.meta.get("val") if isinstance(n, fx.Node) else None for n in (source, node))
        if not (isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor)) or min(a.dim(), b.dim()) < 4:
            continue
        names = ("clone", "reshape", "_to_copy", "contiguous", "copy", "_unsafe_view")
        if getattr(node.target, "_opname", "") not in names or a.dtype != b.dtype or a.numel() != b.numel():
            continue
        with a.fake_mode:
            again = node.target(*fx.map_arg(node.args, lambda n: n.meta["val"]), **node.kwargs)
        if not torch._C._is_alias_of(a, again):
            if reaches(node, "all_input_nodes", set()) and reaches(node, "users", set()):
                found.append(node)
    return found


@pytest.fixture(autouse=True)
def by_aten(monkeypatch):
    """torch's own kernels behind our ops, every graph run under the eyes of :class:`compiled.Strict`."""
    monkeypatch.setattr(torch._dynamo.backends.debugging, "boxed_nop", strictly)
    monkeypatch.setattr(report, "_noticed", set())
    report._reports.clear()
    graphs.clear()
    torch.manual_seed(0)
    with settings.configure(engine="aten"):
        yield


class OpByOp(OutputCode):
    __hash__ = object.__hash__

    def __init__(self, gm: fx.GraphModule):
        self.run, self._boxed_call = strictly(gm, ()), True

    def __call__(self, inputs):
        return self.run(inputs)


class Inductor:
    """In place of Inductor behind its passes: runs graphs op by op, and fails on those of ``kinds`` if ``fails`` says so.

    Attributes:
        seen: the kind of each graph, and whether there was one of our ops in it. cached: whether the result would be.
    """

    def __init__(self, kinds=(), fails=None):
        self.kinds, self.fails, self.seen, self.cached = kinds, fails, [], []

    def __call__(self, gm, inputs, is_inference=False, is_backward=False, **_):
        view_to_reshape(gm)
        with torch.no_grad():
            compile_fx.fake_tensor_prop(gm, inputs)
        passes = config.post_grad_custom_pre_pass or ()
        for each in passes if isinstance(passes, (list, tuple)) else (passes,):
            each(gm.graph)
        kind = "inference" if is_inference else "backward" if is_backward else "forward"
        ours = any(map(is_ours, gm.graph.nodes))
        self.seen.append((kind, ours))
        self.cached.append(config.fx_graph_cache)
        if kind in self.kinds and self.fails(ours):
            raise NotImplementedError(f"planted {len(self.seen)}")
        if (strides := TracingContext.get().output_strides) is not None:
            strides.extend(map(eager._strides, gm.graph.output_node().args[0]))
        gm.recompile()
        return OpByOp(gm)
