"""convert_conv3d: this package's convolution in a model that exists already."""

from __future__ import annotations

import copyreg
import functools
import types
from collections.abc import Callable
from dataclasses import dataclass, field

from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils.parametrize import is_parametrized

from .modules import Conv3d, LazyConv3d, become_eager
from .transposed import ConvTranspose3d, LazyConvTranspose3d

_CLASSES = {
    nn.Conv3d: Conv3d,
    nn.LazyConv3d: LazyConv3d,
    nn.ConvTranspose3d: ConvTranspose3d,
    nn.LazyConvTranspose3d: LazyConvTranspose3d,
}


@dataclass
class Conversion:
    """What :func:`convert_conv3d` did: names of converted layers, and of those left with the reason."""

    converted: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{len(self.converted)} converted, {len(self.skipped)} skipped"]
        lines += [f"  {_shown(name)}: converted" for name in self.converted]
        return "\n".join(lines + [f"  {_shown(name)}: skipped, {why}" for name, why in self.skipped.items()])


def _shown(name: str) -> str:
    return name or "(the model itself)"


def convert_conv3d(model: nn.Module, filter_fn: Callable[[nn.Module, str], bool] | None = None) -> Conversion:
    """Let every 3-D convolution of a model run through this package, in place.

    Only the class of a layer changes: parameters, buffers, hooks, parametrizations, state_dict and training flag stay.
    Converted are layers of :class:`torch.nn.Conv3d` and :class:`torch.nn.ConvTranspose3d`, lazy ones too, and of subclasses
    whose own ``forward``, if they have one, ends in ``super().forward`` or ``self._conv_forward``, as that of a causal
    convolution does: all that they do themselves stays, only the convolution below is ours. Other subclasses, which may
    compute something else, are left and reported. A second call changes nothing.

    Args:
        model: a module, or a convolution itself.
        filter_fn: ``filter_fn(module, name)``, with the layer's name in ``model``, is False for layers to leave.

    Raises:
        TypeError: ``model`` is no module, or ``filter_fn`` cannot be called.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"convert_conv3d: model must be a torch.nn.Module, got {type(model).__name__}")
    if filter_fn is not None and not callable(filter_fn):
        raise TypeError(f"convert_conv3d: filter_fn must be callable, got {type(filter_fn).__name__}")
    result = Conversion()
    for name, module in model.named_modules():
        if not isinstance(module, (nn.Conv3d, nn.ConvTranspose3d)) or isinstance(module, _CONVERTED):
            continue
        reason = _why_not(module)
        if reason is None and filter_fn is not None and not filter_fn(module, name):
            reason = "filter_fn left it out"
        if reason is None:
            _convert(module)
            result.converted.append(name)
        else:
            result.skipped[name] = reason
    return result


def _plain_class(module: nn.Module) -> type:
    """The class without what torch's parametrizations put on top of it."""
    return type(module).__bases__[0] if is_parametrized(module) else type(module)


def _why_not(module: nn.Module) -> str | None:
    kind = _plain_class(module)
    if "forward" in vars(module) or "_conv_forward" in vars(module):
        return "its forward was replaced on the instance"
    if kind in _CLASSES:
        return None
    base = nn.ConvTranspose3d if issubclass(kind, nn.ConvTranspose3d) else nn.Conv3d
    what = _own_convolution(kind, base)
    return None if what is None else f"{kind.__name__} is a subclass of torch.nn.{base.__name__}: {what}"


def _own_convolution(kind: type, base: type) -> str | None:
    """Why a subclass may not take its convolution from where alone it is replaced, in Conv3d._conv_forward or, by ``super()``,
    in ConvTranspose3d.forward; None if it does."""
    if issubclass(kind, LazyModuleMixin):
        return f"a lazy one, which becomes another class; derive it from triton_conv3d.Lazy{base.__name__} instead"
    if base is nn.Conv3d and kind._conv_forward is not nn.Conv3d._conv_forward:
        return "with its own _conv_forward"
    for owner in kind.__mro__[: kind.__mro__.index(base)]:
        forward = vars(owner).get("forward")
        if forward is None:
            continue
        names = _names(forward.__code__) if isinstance(forward, types.FunctionType) else set()
        ends = "forward" in names and "super" in names
        if base is nn.Conv3d:
            ends = ends or "_conv_forward" in names or "forward" in names and "Conv3d" in names
        if not ends:
            return f"with its own forward, which does not end in that of torch.nn.{base.__name__}"
        if names & {"conv3d", "conv_transpose3d", "convolution"}:
            return "with its own forward, which also convolves by itself"
    return None


def _names(code: types.CodeType) -> set[str]:
    """The globals and attributes that a function names, in inner functions and comprehensions too."""
    inner = (_names(constant) for constant in code.co_consts if isinstance(constant, types.CodeType))
    return set(code.co_names).union(*inner)


class _Marked:
    """What a converted subclass derives from, beside the class that it was; it is saved as that class, and made anew."""

    _conv_forward = Conv3d._conv_forward

    def __init_subclass__(cls) -> None:
        """Nothing for the class that is marked to hear of: it has registered itself already, or asks for arguments."""

    def __reduce_ex__(self, protocol):
        make, arguments, *state = super().__reduce_ex__(protocol)
        if make is not copyreg.__newobj__ or is_parametrized(self):
            return (make, arguments, *state)
        return (_blank, type(self).__bases__[1:2], *state)


_CONVERTED = (Conv3d, ConvTranspose3d, _Marked)


@functools.cache
def _marked(kind: type) -> type:
    ours = (ConvTranspose3d,) if issubclass(kind, nn.ConvTranspose3d) else ()  # what super() finds behind the subclass
    return type(kind.__name__, (_Marked, kind, *ours), {"__module__": kind.__module__, "__doc__": kind.__doc__})


def _blank(kind: type) -> nn.Module:
    marked = _marked(kind)
    return marked.__new__(marked)


def _convert(module: nn.Module) -> None:
    kind = _plain_class(module)
    kind = _CLASSES.get(kind) or _marked(kind)
    if is_parametrized(module):  # the class is made by torch and may be shared with copies: make one more
        inherited = ("__dict__", "__weakref__")
        body = {name: value for name, value in vars(type(module)).items() if name not in inherited}
        kind = type(type(module).__name__, (kind,), body)
    module.__class__ = kind
    if isinstance(module, LazyConv3d):
        module.adopt_parameters()
        if not module.has_uninitialized_params():  # a state was loaded, which torch does not notice
            module.in_channels = module.weight.shape[1] * module.groups
            become_eager(module)
