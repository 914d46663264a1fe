"""conv3d and conv_transpose3d: the functional forms, with the signature, defaults, checks and exceptions of torch's own."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from . import ops
from .engines.base import activate
from .problem import NO_ACTIVATION

_DIMENSIONS = ("depth", "height", "width")
_NO_PADDING = (0, 0, 0, 0, 0, 0)
_ONES = (1, 1, 1)
_KNOWN_LIMIT = 4096
_known: dict[tuple, tuple] = {}  # geometry of the signatures that passed every check
_CONV, _TRANSPOSED = "conv3d", "conv_transpose3d"  # as errors call them


def conv3d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: str | int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    *,
    activation: str | None = None,
    residual: Tensor | None = None,
    negative_slope: float = 0.01,
) -> Tensor:
    """3-D convolution (cross-correlation), as :func:`torch.nn.functional.conv3d`; more in one pass over memory:
    ``activation(conv3d(input, weight, bias, ...) + residual)``, rounded once where a Triton kernel computes it.

    Args:
        input: (N, C, D, H, W), or (C, D, H, W) without a batch.
        weight: (K, C / groups, kd, kh, kw).
        bias: (K,).
        stride, dilation: one positive integer, or three for depth, height and width.
        padding: zeros at both ends, one integer or three; ``'valid'`` for none; ``'same'`` for an output of the
            input's size, where an even kernel puts the extra zero at the end.
        groups: C and K are split into this many independent parts.
        activation: ``relu``, ``leaky_relu``, ``silu``, ``gelu``, ``gelu_tanh``, ``sigmoid``, ``tanh`` or ``hardswish``
            as of :mod:`torch.nn.functional` (``gelu_tanh``: its approximation by tanh); ``none`` or None for none. Where
            gradients of ``silu``, ``gelu`` or ``hardswish`` will be asked for, it is applied afterwards by torch, which
            keeps what it is applied to.
        residual: of the output's shape, dtype and device, with any strides.
        negative_slope: of ``leaky_relu``.

    Returns:
        (N, K, Do, Ho, Wo), or (K, Do, Ho, Wo), in channels_last_3d if input or weight is, else contiguous.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: an integer that does not fit into 64 bits, or an unknown activation.
        RuntimeError: shapes, dtypes, devices or numbers that do not fit; the message names the argument and its value.
    """
    if activation is not None or residual is not None:
        geometry = (stride, padding, dilation, groups)
        return _fused(input, weight, bias, residual, geometry, activation, negative_slope)
    if has_torch_function_variadic(input, weight, bias):
        overridden = (input, weight, bias)
        return handle_torch_function(conv3d, overridden, *overridden, stride, padding, dilation, groups)
    if not (isinstance(input, Tensor) and isinstance(weight, Tensor) and (bias is None or isinstance(bias, Tensor))):
        refuse_types(_CONV, input=input, weight=weight, bias=bias)
    if _is_torchs(input):
        return F.conv3d(input, weight, bias, stride, padding, dilation, groups)
    unbatched = input.dim() == 4
    if unbatched:
        input = input.unsqueeze(0)
    result = ops.conv3d(input, weight, bias, *checked_geometry(input, weight, bias, stride, padding, dilation, groups))
    return result.squeeze(0) if unbatched else result


def conv_transpose3d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    output_padding: int | Sequence[int] = 0,
    groups: int = 1,
    dilation: int | Sequence[int] = 1,
) -> Tensor:
    """Transposed 3-D convolution, as :func:`torch.nn.functional.conv_transpose3d`: the input gradient of the convolution
    that has this weight, which computes it.

    Args:
        input: (N, C, D, H, W), or (C, D, H, W) without a batch.
        weight: (C, K / groups, kd, kh, kw).
        bias: (K,), added in a pass of its own, as torch does.
        stride, dilation: one positive integer, or three for depth, height and width.
        padding: positions that are left out at both ends, one integer or three.
        output_padding: positions more at the end, one integer or three, each below the stride or the dilation. From the
            stride on it is torch's own convolution that computes.
        groups: C and K are split into this many independent parts.

    Returns:
        (N, K, Do, Ho, Wo), or (K, Do, Ho, Wo), of (D - 1) * stride - 2 * padding + dilation * (kd - 1) + output_padding + 1
        positions; in channels_last_3d if input or weight is (torch's own on CPUs are contiguous), else contiguous.

    Raises:
        As :func:`conv3d`.
    """
    given = (input, weight, bias)
    rest = (stride, padding, output_padding, groups, dilation)
    if has_torch_function_variadic(*given):
        return handle_torch_function(conv_transpose3d, given, *given, *rest)
    refuse_types(_TRANSPOSED, input=input, weight=weight, bias=bias)
    if _is_torchs(input):
        return F.conv_transpose3d(*given, *rest)
    unbatched = input.dim() == 4
    if unbatched:
        input = input.unsqueeze(0)
    strides, ends, dilations, groups, extra = transposed_geometry(input, weight, bias, *rest)
    if any(more >= step for more, step in zip(extra, strides, strict=True)):  # no convolution has this gradient
        result = F.conv_transpose3d(input, weight, bias, strides, ends[::2], extra, groups, dilations)
    else:
        result = _transposed(input, weight, bias, strides, ends, dilations, groups, extra)
    return result.squeeze(0) if unbatched else result


def _transposed(input, weight, bias, strides, ends, dilations, groups, extra) -> Tensor:
    input, weight, bias = (ops.autocasted(tensor, input.device.type) for tensor in (input, weight, bias))
    size = transposed_shape(input.shape, weight.shape, strides, ends, dilations, groups, extra)
    result = ops.conv3d_dgrad(
        input, weight, size, strides, ends, dilations, groups, ops.channels_last_result(input, weight)
    )
    return result if bias is None else result + bias[:, None, None, None]


def transposed_shape(shape, kernel, strides, ends, dilations, groups, extra) -> list:
    """(N, K, Do, Ho, Wo); sizes may be symbolic."""
    spatial = (
        (shape[i + 2] - 1) * strides[i] - 2 * ends[2 * i] + dilations[i] * (kernel[i + 2] - 1) + extra[i] + 1
        for i in range(3)
    )
    return [shape[0], kernel[1] * groups, *spatial]


def transposed_geometry(input, weight, bias, stride, padding, output_padding, groups, dilation) -> tuple:
    """(stride, padding of both ends, dilation, groups, output_padding), after every check of a 5-D call."""
    _check_partners(input, weight, bias, _TRANSPOSED)
    written = {"stride": stride, "padding": padding, "dilation": dilation, "output_padding": output_padding}
    numbers = [_triple(name, value, _TRANSPOSED) for name, value in written.items()]
    groups = _integer("groups", groups, of=_TRANSPOSED)
    signature = (input.shape, weight.shape, None if bias is None else bias.shape, *numbers, groups)
    return _remembered(_check_transposed, (*signature, _TRANSPOSED), written)


def _check_transposed(shape, kernel, bias, strides, paddings, dilations, extra, groups, of, written) -> tuple:
    """As :func:`_check`, of a transposed one. ``written`` is what the caller wrote, by name."""
    _check_dimensions(shape, kernel, of)
    for (name, value), numbers, least in zip(written.items(), (strides, paddings, dilations, extra), (1, 0, 1, 0), strict=True):
        _check_numbers(name, value, numbers, least, of)
    _check_numbers("groups", groups, (groups,), 1, of)
    if kernel[0] < groups or kernel[0] % groups:
        raise RuntimeError(
            f"{of}: groups={groups} must divide the first size of weight, a positive number, but weight is {list(kernel)}"
        )
    if shape[1] != kernel[0]:
        raise RuntimeError(
            f"{of}: input of shape {list(shape)} has {shape[1]} channels, but weight of shape {list(kernel)} needs {kernel[0]}"
        )
    if bias is not None and tuple(bias) != (kernel[1] * groups,):
        raise RuntimeError(
            f"{of}: bias of shape {list(bias)} must be [{kernel[1] * groups}], one for each channel that weight "
            f"{list(kernel)} with groups={groups} produces"
        )
    ends = tuple(end for p in paddings for end in (p, p))
    size = transposed_shape(shape, kernel, strides, ends, dilations, groups, extra)[2:]
    for i, dimension in enumerate(_DIMENSIONS):
        if kernel[1] <= 0 or kernel[i + 2] <= 0:
            raise RuntimeError(f"{of}: weight of shape {list(kernel)} is empty; each size must be 1 or more")
        if extra[i] >= strides[i] and extra[i] >= dilations[i]:
            raise RuntimeError(
                f"{of}: output_padding={_brief(written['output_padding'])} must be below stride={strides[i]} or dilation="
                f"{dilations[i]} in {dimension}"
            )
        if shape[i + 2] == 0:
            raise RuntimeError(f"{of}: input of shape {list(shape)} is empty in {dimension}; only the batch may be 0")
        if size[i] <= 0:
            raise RuntimeError(
                f"{of}: the result has {size[i]} positions in {dimension} (input {list(shape)}, weight {list(kernel)}, "
                f"padding={_brief(written['padding'])}); pad less"
            )
    return strides, ends, dilations, groups, extra


def _is_torchs(input: Tensor) -> bool:
    """What is left to torch: sparse, MKL-DNN, nested and complex tensors, of which it computes complex ones by real ones; and
    graphs for other runtimes, which know torch's operators alone."""
    other_runtime = torch.jit.is_tracing() or torch.compiler.is_exporting() and torch.onnx.is_in_onnx_export()
    return other_runtime or input.layout is not torch.strided or input.is_complex() or input.is_nested


def _fused(input, weight, bias, residual, geometry, activation, negative_slope) -> Tensor:
    """:func:`conv3d` with more to do than a convolution."""
    given = (input, weight, bias, residual)
    if has_torch_function_variadic(*given):
        more = {"activation": activation, "residual": residual, "negative_slope": negative_slope}
        return handle_torch_function(conv3d, given, input, weight, bias, *geometry, **more)
    refuse_types(_CONV, input=input, weight=weight, bias=bias, residual=residual)
    if not (activation is None or isinstance(activation, str)):
        raise TypeError(f"conv3d: activation must be a str or None, got {type(activation).__name__}: {activation!r}")
    activation = NO_ACTIVATION if activation is None else activation
    if isinstance(negative_slope, bool) or not isinstance(negative_slope, (int, float, torch.SymFloat)):
        raise TypeError(f"conv3d: negative_slope must be a number, got {_brief(negative_slope)}")
    if _is_torchs(input):
        sums = F.conv3d(input, weight, bias, *geometry)
        # Of what is traced, sizes are tensors: comparing them warns.
        ops.check_epilogue(sums.shape, activation, None if torch.jit.is_tracing() else residual)
        return activate(sums if residual is None else sums + residual, activation, negative_slope)
    unbatched = input.dim() == 4
    if unbatched:
        input = input.unsqueeze(0)
    stride, padding, dilation, groups = checked_geometry(input, weight, bias, *geometry)
    shape = ops.output_shape(input.shape, weight.shape, stride, padding, dilation)
    ops.check_epilogue(shape[1:] if unbatched else shape, activation, residual)
    if residual is not None:
        _check_partner("residual", residual, input)
        residual = residual.unsqueeze(0) if unbatched else residual
    result = ops.conv3d_fused(
        input, weight, bias, residual, stride, padding, dilation, groups, activation, float(negative_slope)
    )
    return result.squeeze(0) if unbatched else result


def checked_geometry(input, weight, bias, stride, padding, dilation, groups) -> tuple[tuple, tuple, tuple, int]:
    """(stride, padding of both ends, dilation, groups) as the ops take them, after every check of a 5-D call."""
    _check_partners(input, weight, bias, _CONV)
    strides = _triple("stride", stride)
    paddings = padding if isinstance(padding, str) else _triple("padding", padding)
    dilations = _triple("dilation", dilation)
    if type(groups) is not int:
        groups = _integer("groups", groups)
    bias_shape = None if bias is None else bias.shape
    signature = (input.shape, weight.shape, bias_shape, strides, paddings, dilations, groups)
    return _remembered(_check, signature, stride, padding, dilation)


def _remembered(check: Callable, signature: tuple, *written) -> tuple:
    """``check(*signature, *written)``, once for each signature. It begins with the shapes of input and weight."""
    if torch.compiler.is_compiling():  # sizes may be symbolic, and a cache would become a guard
        return check(*signature, *written)
    try:
        return _known[signature]
    except (KeyError, TypeError):  # symbolic sizes have no hash
        geometry = check(*signature, *written)
    if not any(isinstance(size, torch.SymInt) for size in (*signature[0], *signature[1])):
        if len(_known) >= _KNOWN_LIMIT:
            _known.clear()
        _known[signature] = geometry
    return geometry


def refuse_types(of: str, **tensors) -> None:
    """Raises TypeError, naming the argument of ``of``, for what is no tensor; bias and residual may be None."""
    for name, value in tensors.items():
        optional = name in ("bias", "residual")
        if not isinstance(value, Tensor) and not (value is None and optional):
            wanted = "a Tensor or None" if optional else "a Tensor"
            raise TypeError(f"{of}: {name} must be {wanted}, got {type(value).__name__}: {_brief(value)}")


def _brief(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _integer(name: str, value, may_be_bool: bool = False, of: str = _CONV):
    """An integer as torch reads it: numpy's and one-element tensors too."""
    if type(value) is int or isinstance(value, torch.SymInt):
        return value
    if may_be_bool or not isinstance(value, bool):
        try:
            return operator.index(value)
        except TypeError:
            pass
    raise TypeError(f"{of}: {name} must be an integer, got {type(value).__name__}: {_brief(value)}")


def _triple(name: str, value, of: str = _CONV) -> tuple:
    """Three integers, from one or three."""
    if type(value) is tuple and len(value) == 3:
        a, b, c = value
        if type(a) is int and type(b) is int and type(c) is int:
            return value
    elif type(value) is int:
        return (value, value, value)
    if not isinstance(value, (tuple, list)):
        return (_integer(name, value, of=of),) * 3
    if len(value) not in (1, 3):
        raise RuntimeError(f"{of}: {name}={_brief(value)} must be one integer or 3 (depth, height, width)")
    elements = tuple(_integer(f"{name}={_brief(value)} at {i}", v, i > 0, of) for i, v in enumerate(value))
    return elements if len(elements) == 3 else elements * 3


def _check(shape, kernel, bias, strides, paddings, dilations, groups, stride, padding, dilation) -> tuple:
    """The geometry, if sizes and numbers fit. ``stride``, ``padding``, ``dilation`` are what the caller wrote."""
    _check_dimensions(shape, kernel, _CONV)
    _check_numbers("stride", stride, strides, 1)
    _check_numbers("dilation", dilation, dilations, 1)
    if isinstance(padding, str):
        ends = _named_padding(padding, kernel, stride, strides, dilations)
    else:
        _check_numbers("padding", padding, paddings, 0)
        d, h, w = paddings
        ends = (d, d, h, h, w, w)
    _check_numbers("groups", groups, (groups,), 1)
    filters = kernel[0]
    if filters < groups or filters % groups:
        raise RuntimeError(
            f"conv3d: groups={groups} must divide the filters of weight, a positive number, but weight of shape "
            f"{list(kernel)} has {filters}"
        )
    if shape[1] != kernel[1] * groups:
        raise RuntimeError(
            f"conv3d: input of shape {list(shape)} has {shape[1]} channels, but weight of shape {list(kernel)} with "
            f"groups={groups} needs {kernel[1] * groups}; to initialise a layer anew for it, assign in_channels = "
            f"{shape[1]} before the call"
        )
    if bias is not None and (len(bias) != 1 or bias[0] != filters):
        raise RuntimeError(
            f"conv3d: bias of shape {list(bias)} must be [{filters}], one for each filter of weight {list(kernel)}"
        )
    for i, dimension in enumerate(_DIMENSIONS):
        taps, size = kernel[i + 2], shape[i + 2]
        if taps <= 0:
            raise RuntimeError(f"conv3d: weight of shape {list(kernel)} has no taps in {dimension}; it needs 1 or more")
        extent, reach = size + ends[2 * i] + ends[2 * i + 1], dilations[i] * (taps - 1) + 1
        if reach > extent:
            raise RuntimeError(
                f"conv3d: the kernel of weight {list(kernel)} spans {reach} in {dimension} (dilation="
                f"{dilations[i]}), more than the padded input's {extent} (input {list(shape)}, padding="
                f"{_brief(padding)}); pad more or use a smaller kernel"
            )
        if size == 0 and shape[0] != 0 and shape[1] != 0:
            raise RuntimeError(
                f"conv3d: input of shape {list(shape)} is empty in {dimension}; only batch and channels may be 0"
            )
    return strides, ends, dilations, groups


def _check_dimensions(shape, kernel, of: str) -> None:
    if len(shape) != 5:
        raise RuntimeError(
            f"{of}: input of shape {list(shape)} must have 5 dimensions (N, C, D, H, W), or 4 without a batch"
        )
    if len(kernel) != 5:
        channels = "K, C / groups" if of == _CONV else "C, K / groups"
        raise RuntimeError(f"{of}: weight of shape {list(kernel)} must have 5 dimensions ({channels}, kd, kh, kw)")


def _check_numbers(name: str, value, numbers: tuple, least: int, of: str = _CONV) -> None:
    for number in numbers:
        if isinstance(number, int) and not -(2**63) <= number < 2**63:
            kind = TypeError if isinstance(value, (tuple, list)) else ValueError
            raise kind(f"{of}: {name}={_brief(value)} must fit into 64 bits")
        if number < least:
            raise RuntimeError(f"{of}: {name}={_brief(value)} must be {'positive' if least else 'zero or more'}")


def _named_padding(padding: str, kernel, stride, strides: tuple, dilations: tuple) -> tuple:
    """(front, back, top, bottom, left, right); an odd total puts the extra zero at the end, as torch does."""
    if padding == "valid":
        return _NO_PADDING
    if padding != "same":
        raise RuntimeError(f"conv3d: padding={padding!r} is not known: expected 'same', 'valid' or integers")
    if strides != _ONES:
        raise RuntimeError(f"conv3d: padding='same' needs stride 1, got stride={_brief(stride)}")
    totals = [d * (k - 1) for d, k in zip(dilations, kernel[2:], strict=True)]
    return tuple(side for total in totals for side in (total // 2, total - total // 2))


def _check_partners(input: Tensor, weight: Tensor, bias: Tensor | None, of: str) -> None:
    dtype, device = input.dtype, input.device
    if dtype != weight.dtype or device != weight.device:
        _check_partner("weight", weight, input, of)
    if bias is not None and (dtype != bias.dtype or device != bias.device):
        _check_partner("bias", bias, input, of)


def _check_partner(name: str, tensor: Tensor, input: Tensor, of: str = _CONV) -> None:
    """``tensor`` is of another dtype or device than ``input``: refuse, unless autocast brings them together."""
    if tensor.device != input.device:
        raise RuntimeError(
            f"{of}: input is on {input.device} but {name} is on {tensor.device}; move one of them with .to(device)"
        )
    if _computed_dtype(tensor) != _computed_dtype(input):
        raise RuntimeError(
            f"{of}: input is {input.dtype} but {name} is {tensor.dtype}; convert one of them with .to(dtype)"
        )


def _computed_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype in which autocast, if it is on, passes the tensor to a convolution."""
    kind = tensor.device.type
    castable = tensor.is_floating_point() and tensor.dtype != torch.float64
    return torch.get_autocast_dtype(kind) if castable and torch.is_autocast_enabled(kind) else tensor.dtype
