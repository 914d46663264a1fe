"""torch.library ops: the three passes, each with fake kernels, autograd, autocast and derivatives of any order.

    triton_conv3d::conv3d         y  = conv3d(input, weight, bias)
    triton_conv3d::conv3d_fused   y  = activation(conv3d(input, weight, bias) + residual)
    triton_conv3d::conv3d_dgrad   gradient of the input,  linear in grad and weight
    triton_conv3d::conv3d_wgrad   gradient of the weight, linear in grad and input

Padding is given for both ends of each dimension, (front, back, top, bottom, left, right). The derivative of each op is
made of conv3d and the two gradients, so the system is closed under differentiation, and only gradients that are asked
for are computed.
"""

from __future__ import annotations

import functools

import torch
from torch._functorch.autograd_function import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.library import Library

from . import batching, flops
from .engines.base import activate, sharing
from .posing import pose, run, with_epilogue
from .problem import ACTIVATIONS, NO_ACTIVATION, Operands, Problem

_GEOMETRY = "SymInt[3] stride, SymInt[6] padding, SymInt[3] dilation, SymInt groups"
_library = Library("triton_conv3d", "FRAGMENT")
_library.define(
    f"conv3d(Tensor input, Tensor weight, Tensor? bias, {_GEOMETRY}) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,)
)
_library.define(
    f"conv3d_fused(Tensor input, Tensor weight, Tensor? bias, Tensor? residual, {_GEOMETRY}, str activation, "
    "float negative_slope) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    f"conv3d_dgrad(Tensor grad, Tensor weight, SymInt[] input_size, {_GEOMETRY}, bool channels_last) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    f"conv3d_wgrad(Tensor grad, Tensor input, SymInt[] weight_size, {_GEOMETRY}, bool channels_last) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
conv3d = torch.ops.triton_conv3d.conv3d.default
conv3d_fused = torch.ops.triton_conv3d.conv3d_fused.default
conv3d_dgrad = torch.ops.triton_conv3d.conv3d_dgrad.default
conv3d_wgrad = torch.ops.triton_conv3d.conv3d_wgrad.default

# The memory format of results: torch's own rule, channels_last_3d as soon as one of input and weight suggests it.


def _suggests_channels_last(tensor: torch.Tensor) -> bool:
    """``Tensor::suggest_memory_format`` for 5-D tensors: the strides are those of channels_last_3d, and dense."""
    strides, shape = tensor.stride(), tensor.shape
    if strides[1] == 0:
        return False
    least = 0
    for dim in (1, 4, 3, 2, 0):
        if shape[dim] == 0 or strides[dim] < least or (dim == 0 and least == strides[1]):
            return False
        least = strides[dim] * shape[dim] if shape[dim] > 1 else strides[dim]
    return True


def channels_last_result(input: torch.Tensor, weight: torch.Tensor) -> bool:
    return _suggests_channels_last(input) or _suggests_channels_last(weight)


# From tensors to problems (posing.py).


def problems(
    input, weight, bias, stride, padding, dilation, groups, *, residual=None, activation: str = NO_ACTIVATION
) -> list[Problem]:
    """The problems of forward, dgrad and wgrad of one call, for real tensors or meta tensors; nothing is computed."""
    channels_last = channels_last_result(input, weight)
    grad = _empty(input, output_shape(input.shape, weight.shape, stride, padding, dilation), channels_last)
    _check_fused(input, grad.shape, activation, residual)
    geometry = (input.shape, weight.shape, stride, padding, dilation, groups, channels_last)
    return [
        with_epilogue(pose("forward", Operands(input, weight, None, bias), *geometry)[0], residual is not None, activation),
        pose("dgrad", Operands(None, weight, grad), *geometry)[0],
        pose("wgrad", Operands(input, None, grad), *geometry)[0],
    ]


# The kernels behind the ops: one for every device, which the engines tell apart.


def _dense(bias: torch.Tensor | None) -> torch.Tensor | None:
    """One number behind the other, as the kernels read it."""
    return bias if bias is None or bias.is_contiguous() else bias.contiguous()


def _forward(input, weight, bias, stride, padding, dilation, groups):
    operands = Operands(input, weight, None, _dense(bias))
    channels_last = channels_last_result(input, weight)
    geometry = (stride, padding, dilation, groups, channels_last)
    return run(*pose("forward", operands, input.shape, weight.shape, *geometry), operands)


def _fused(input, weight, bias, residual, stride, padding, dilation, groups, activation, negative_slope):
    problem, taps = pose(  # of the convolution alone
        "forward", Operands(input, weight, None, bias), input.shape, weight.shape, stride, padding, dilation, groups,
        channels_last_result(input, weight),
    )  # fmt: skip
    _check_fused(input, problem.output_shape, activation, residual)
    problem = with_epilogue(problem, residual is not None, activation)
    return run(problem, taps, Operands(input, weight, None, _dense(bias), residual, negative_slope))


def _dgrad(grad, weight, input_size, *geometry):
    operands = Operands(None, weight, grad)
    return run(*pose("dgrad", operands, input_size, weight.shape, *geometry), operands)


def _wgrad(grad, input, weight_size, *geometry):
    operands = Operands(input, None, grad)
    return run(*pose("wgrad", operands, input.shape, weight_size, *geometry), operands, weight_size)


def check_epilogue(shape, activation: str, residual: torch.Tensor | None) -> None:
    """Raises ValueError for an unknown activation, RuntimeError for a residual that has not the output's shape."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"conv3d: activation={activation!r} is not known: expected one of {', '.join(ACTIVATIONS)}")
    if residual is not None and tuple(residual.shape) != tuple(shape):
        raise RuntimeError(f"conv3d: residual of shape {list(residual.shape)} must be {list(shape)}, the output's")


def _check_fused(input, shape, activation: str, residual: torch.Tensor | None) -> None:
    check_epilogue(shape, activation, residual)
    if residual is not None and (residual.dtype != input.dtype or residual.device != input.device):
        raise RuntimeError(
            f"conv3d_fused: residual is {residual.dtype} on {residual.device}, but input is {input.dtype} on "
            f"{input.device}; convert one of them with .to()"
        )


# Fake kernels: shapes and exact strides, for any mixture of symbolic and plain sizes.


def _empty(like: torch.Tensor, shape, channels_last: bool) -> torch.Tensor:
    memory_format = torch.channels_last_3d if channels_last else torch.contiguous_format
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=memory_format)


def output_shape(input_size, weight_size, stride, padding, dilation) -> list:
    """(N, K, Do, Ho, Wo); sizes may be symbolic."""
    spatial = (
        (input_size[i + 2] + padding[2 * i] + padding[2 * i + 1] - dilation[i] * (weight_size[i + 2] - 1) - 1)
        // stride[i]
        + 1
        for i in range(3)
    )
    return [input_size[0], weight_size[0], *spatial]


def _fake_forward(input, weight, bias, stride, padding, dilation, groups):
    shape = output_shape(input.shape, weight.shape, stride, padding, dilation)
    return _empty(input, shape, channels_last_result(input, weight))


def _fake_fused(input, weight, bias, residual, stride, padding, dilation, groups, activation, negative_slope):
    result = _fake_forward(input, weight, bias, stride, padding, dilation, groups)
    _check_fused(input, result.shape, activation, residual)
    return result


def _fake_dgrad(grad, weight, input_size, stride, padding, dilation, groups, channels_last):
    return _empty(grad, input_size, channels_last)


def _fake_wgrad(grad, input, weight_size, stride, padding, dilation, groups, channels_last):
    return _empty(grad, weight_size, channels_last)


# Autograd. Each backward calls the other ops, so that it can be differentiated again. Registered by hand: what
# torch.library.register_autograd makes costs the host twice as much a call.

_AFTER_AUTOGRAD, _AFTER_VIEWS = torch._C._after_autograd_keyset, torch._C._after_ADInplaceOrView_keyset
_BACKENDS = (torch._C.DispatchKey.CPU, torch._C.DispatchKey.CUDA)


def _autograd(op, kernel, setup, backward):
    """The op's kernel for the dispatcher's autograd keys. Each op is linear in its first and in its second tensor.

    Args:
        setup: ``setup(ctx, inputs, output)`` saves what ``backward(ctx, grad)`` needs.
    """

    def below(keys, inputs):
        with torch._C._AutoDispatchBelowAutograd():
            if (keys & _AFTER_VIEWS).highestPriorityTypeId() in _BACKENDS:  # the dispatcher's next stop
                return kernel(*inputs)
            return op.redispatch(keys & _AFTER_AUTOGRAD, *inputs)

    def forward(ctx, keys, *inputs):
        if torch._C._are_functorch_transforms_active():  # off for this level only: the outer ones decide for themselves
            with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):
                output = below(keys, inputs)
        else:
            output = below(keys, inputs)
        setup(ctx, inputs, output)
        return output

    def forward_with_tangents(ctx, *inputs):
        ctx.inputs = inputs
        return forward(ctx, *inputs)

    # Not autograd.Function, which is for calls from outside of torch.func's levels: in the dispatcher one level is left.
    function = torch.autograd.function._SingleLevelFunction
    backward_ = staticmethod(lambda ctx, grad: (None, *backward(ctx, grad)))
    key = torch.autograd.Function._compiled_autograd_key  # which compiled autograd asks for
    methods = {"forward": staticmethod(forward), "backward": backward_, "_compiled_autograd_key": staticmethod(key)}
    recorded = type(f"Recorded_{op._opname}", (function,), methods)
    methods = {"forward": staticmethod(forward_with_tangents), "jvp": staticmethod(functools.partial(_tangent, op))}
    followed = type(f"Followed_{op._opname}", (recorded,), methods)

    def autograd(keys, *inputs):
        kind = None
        if forward_ad._current_level >= 0 and _has_tangent(inputs):
            kind = followed
        elif torch._C.is_grad_enabled() and torch._C._any_requires_grad(*inputs):
            kind = recorded
        if kind is not None:
            if torch._C._are_functorch_transforms_active():
                with enable_single_level_autograd_function():
                    return kind.apply(keys, *inputs)
            return kind.apply(keys, *inputs)
        return below(keys, inputs)

    return autograd


def _has_tangent(inputs) -> bool:
    """Whether forward-mode differentiation follows one of these."""
    tensors = (value for value in inputs if isinstance(value, torch.Tensor))
    return any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors)


def _tangent(op, ctx, *_):
    """The derivative in forward mode: the product rule, of calls that can be differentiated again, either way."""
    count = 3 if op is conv3d else 2
    _, *inputs = ctx.__dict__.pop("inputs")
    rest = inputs[count:]
    with forward_ad._set_fwd_grad_enabled(True):  # torch turns it off, for the outer levels of torch.func as well
        # what has no tangent costs no call; among those that torch passes it would be zeros
        (a, da), (b, db), *biases = [(t, None) if t is None else forward_ad.unpack_dual(t) for t in inputs[:count]]
        none = (None,) * len(biases)
        terms = [op(*pair, *none, *rest) for pair in ((da, b), (a, db)) if pair[0] is not None and pair[1] is not None]
        for _, tangent in biases:
            if tangent is not None:
                shape = output_shape(a.shape, b.shape, *rest[:3])
                terms.append(tangent[:, None, None, None].expand(shape))
        return sum(terms[1:], terms[0])


def _wanted(ctx) -> tuple[bool, bool]:
    """Whether the derivative by the first and by the second tensor is asked for, by this run of the engine too: to a Python
    function torch tells only whether they require one, which ``torch.autograd.grad`` need not ask for."""
    return tuple(ctx.needs_input_grad[1 + i] and _will_run(ctx.next_functions[i][0]) for i in range(2))


def _will_run(node) -> bool:
    try:
        return torch._C._will_engine_execute_node(node)
    except RuntimeError:  # a leaf that is asked for, or no engine at all (compiled autograd)
        return True


def _setup_forward(ctx, inputs, output):
    input, weight, bias, *ctx.geometry = inputs
    ctx.save_for_backward(input, weight)
    ctx.channels_last = channels_last_result(input, weight)


def _backward_forward(ctx, grad):
    return (*_gradients(ctx, grad, *ctx.saved_tensors), *[None] * 4)


def _gradients(ctx, grad, input, weight):
    """Of input, weight and bias."""
    of_input, of_weight = _wanted(ctx)
    geometry = (*ctx.geometry, ctx.channels_last)
    with sharing(grad):
        return (
            conv3d_dgrad(grad, weight, input.shape, *geometry) if of_input else None,
            conv3d_wgrad(grad, input, weight.shape, *geometry) if of_weight else None,
            grad.sum((0, 2, 3, 4)) if ctx.needs_input_grad[3] else None,
        )


# The derivatives of the activations that their output tells. Of the others torch's own needs the input.
_aten = torch.ops.aten
_FROM_OUTPUT = {
    NO_ACTIVATION: lambda grad, output, slope: grad,
    "relu": lambda grad, output, slope: _aten.threshold_backward(grad, output, 0),
    "leaky_relu": lambda grad, output, slope: _aten.leaky_relu_backward(grad, output, slope, True),
    "sigmoid": lambda grad, output, slope: _aten.sigmoid_backward(grad, output),
    "tanh": lambda grad, output, slope: _aten.tanh_backward(grad, output),
}


def _setup_fused(ctx, inputs, output):
    input, weight, bias, residual, *ctx.geometry, ctx.activation, ctx.negative_slope = inputs
    ctx.save_for_backward(input, weight, None if ctx.activation == NO_ACTIVATION else output)
    ctx.channels_last = channels_last_result(input, weight)


def _backward_fused(ctx, grad):
    input, weight, output = ctx.saved_tensors
    grad = _FROM_OUTPUT[ctx.activation](grad, output, ctx.negative_slope)
    return (*_gradients(ctx, grad, input, weight), grad if ctx.needs_input_grad[4] else None, *[None] * 6)


def _autograd_fused():
    """As :func:`_autograd`, but what is to be differentiated and does not tell its derivative is an op and its activation.

    torch differentiates the activation by its input, which a fused kernel does not keep. Forward mode needs that input
    always.
    """
    from_output = _autograd(conv3d_fused, _fused, _setup_fused, _backward_fused)

    def autograd(keys, *inputs):
        activation, negative_slope = inputs[-2:]
        if forward_ad._current_level >= 0 and _has_tangent(inputs):
            input, weight, bias, residual, *geometry = inputs[:-2]
            sums = conv3d(input, weight, bias, *geometry)
            return activate(sums if residual is None else sums + residual, activation, negative_slope)
        told = activation in _FROM_OUTPUT and (activation != "leaky_relu" or negative_slope > 0)
        if not told and torch._C.is_grad_enabled() and torch._C._any_requires_grad(*inputs):
            sums = conv3d_fused(*inputs[:-2], NO_ACTIVATION, negative_slope)
            return activate(sums, activation, negative_slope)
        return from_output(keys, *inputs)

    return autograd


def _setup_dgrad(ctx, inputs, output):
    grad, weight, input_size, *ctx.geometry, ctx.channels_last = inputs
    ctx.save_for_backward(grad, weight)


def _backward_dgrad(ctx, grad_input):
    grad, weight = ctx.saved_tensors
    of_grad, of_weight = _wanted(ctx)
    with sharing(grad_input):
        return (
            conv3d(grad_input, weight, None, *ctx.geometry) if of_grad else None,
            conv3d_wgrad(grad, grad_input, weight.shape, *ctx.geometry, ctx.channels_last) if of_weight else None,
            *[None] * 6,
        )


def _setup_wgrad(ctx, inputs, output):
    grad, input, weight_size, *ctx.geometry, ctx.channels_last = inputs
    ctx.save_for_backward(grad, input)


def _backward_wgrad(ctx, grad_weight):
    grad, input = ctx.saved_tensors
    of_grad, of_input = _wanted(ctx)
    return (
        conv3d(input, grad_weight, None, *ctx.geometry) if of_grad else None,
        conv3d_dgrad(grad, grad_weight, input.shape, *ctx.geometry, ctx.channels_last) if of_input else None,
        *[None] * 6,
    )


# Autocast: as torch's own convolution, which is on the list of ops that run in the lower precision.

_AUTOCAST_KEYS = {"cpu": "AutocastCPU", "cuda": "AutocastCUDA"}


def _autocast(op, tensors: int, device_type: str, key: str):
    """The op's kernel for the dispatcher's autocast key; its first ``tensors`` arguments are tensors."""
    keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

    def autocast(*inputs):
        with torch._C._ExcludeDispatchKeyGuard(keys):
            return op(*(_cast(tensor, device_type) for tensor in inputs[:tensors]), *inputs[tensors:])

    return autocast


def _cast(tensor, device_type: str):
    eligible = tensor is not None and tensor.is_floating_point() and tensor.dtype != torch.float64
    if eligible and tensor.device.type == device_type:
        return tensor.to(torch.get_autocast_dtype(device_type))
    return tensor


def autocasted(tensor: torch.Tensor | None, device_type: str) -> torch.Tensor | None:
    """For an op that autocast leaves alone, as it does gradients: what it would be given if it were a convolution."""
    on = device_type in _AUTOCAST_KEYS and torch.is_autocast_enabled(device_type)
    return _cast(tensor, device_type) if on else tensor


def _register() -> None:
    for op, kernel, fake, autograd in (
        (conv3d, _forward, _fake_forward, _autograd(conv3d, _forward, _setup_forward, _backward_forward)),
        (conv3d_fused, _fused, _fake_fused, _autograd_fused()),
        (conv3d_dgrad, _dgrad, _fake_dgrad, _autograd(conv3d_dgrad, _dgrad, _setup_dgrad, _backward_dgrad)),
        (conv3d_wgrad, _wgrad, _fake_wgrad, _autograd(conv3d_wgrad, _wgrad, _setup_wgrad, _backward_wgrad)),
    ):
        name = op.name().removesuffix(".default")
        _library.impl(name, kernel, "CompositeExplicitAutograd")
        _library.impl(name, autograd, "Autograd", with_keyset=True)
        torch.library.register_fake(name, fake, lib=_library)
    batching.register(
        _library,
        {
            conv3d: batching.conv3d_rule(conv3d),
            conv3d_fused: batching.fused_rule(conv3d, conv3d_fused, activate),
            conv3d_dgrad: batching.gradient_rule(conv3d_dgrad, "ywx"),
            conv3d_wgrad: batching.gradient_rule(conv3d_wgrad, "yxw"),
        },
    )
    flops.register(conv3d, conv3d_fused, conv3d_dgrad, conv3d_wgrad)
    for device_type, key in _AUTOCAST_KEYS.items():
        _library.impl("conv3d", _autocast(conv3d, 3, device_type, key), key)
        _library.impl("conv3d_fused", _autocast(conv3d_fused, 4, device_type, key), key)


_register()
