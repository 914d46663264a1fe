"""convert_conv3d: this package's convolution in a model that exists already."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from .modules import Conv3d, LazyConv3d, become_eager

_CLASSES = {nn.Conv3d: Conv3d, nn.LazyConv3d: LazyConv3d}
_TRANSPOSED = (nn.ConvTranspose3d, nn.LazyConvTranspose3d)


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
    Layers of exactly :class:`torch.nn.Conv3d` or :class:`torch.nn.LazyConv3d` are converted; subclasses, which may
    compute something else, and transposed convolutions are left and reported. A second call changes nothing.

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
        if isinstance(module, Conv3d) or not isinstance(module, (nn.Conv3d, *_TRANSPOSED)):
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
    if isinstance(module, _TRANSPOSED):
        return "a transposed convolution"
    if kind not in _CLASSES:
        methods = ("forward", "_conv_forward")
        own = [method for method in methods if getattr(kind, method) is not getattr(nn.Conv3d, method)]
        what = f"with its own {' and '.join(own)}" if own else "derive it from triton_conv3d.Conv3d instead"
        return f"{kind.__name__} is a subclass of torch.nn.Conv3d: {what}"
    if "forward" in vars(module) or "_conv_forward" in vars(module):
        return "its forward was replaced on the instance"
    return None


def _convert(module: nn.Module) -> None:
    kind = _CLASSES[_plain_class(module)]
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
