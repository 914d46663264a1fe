"""Conv3d and LazyConv3d: torch's own modules with this package's convolution behind them."""

from __future__ import annotations

import copy
import itertools
import sys
import warnings
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_map_only

from .functional import conv3d

_REMEDY = "run the model once, or triton_conv3d.materialize(model, example_input), before this"
_PADDING_MODES = ("zeros", "reflect", "replicate", "circular")


def _own_mode(parameter: Tensor):
    """Under inference mode only what was created there is an inference tensor; a parameter stays what it is."""
    return torch.inference_mode(parameter.data.is_inference())


class UninitializedParameter(nn.UninitializedParameter):
    """torch's uninitialised parameter, whose errors tell what to do, and which is trainable wherever it is made."""

    def materialize(self, shape, device=None, dtype=None) -> None:
        with _own_mode(self):
            super().materialize(shape, device, dtype)

    @property
    def shape(self):
        raise RuntimeError(f"the shape of an uninitialised parameter is not known: {_REMEDY}")

    def share_memory_(self):
        raise RuntimeError(f"an uninitialised parameter has no memory to share: {_REMEDY}")

    def __reduce_ex__(self, protocol):
        """As torch's class, which every reader of a checkpoint knows; with dtype and device, which torch forgets."""
        return nn.UninitializedParameter, (self.requires_grad, self.data.device, self.data.dtype)

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if _asked_by_ddp():
            raise RuntimeError(f"DistributedDataParallel needs initialised parameters: {_REMEDY}")
        try:
            return super().__torch_function__(func, types, args, kwargs)
        except ValueError as error:
            raise ValueError(f"this parameter is not initialised: {_REMEDY}. {error}") from None


def _asked_by_ddp() -> bool:
    """Whether DDP's constructor reads a parameter, as it does before it refuses uninitialised ones in words of its own."""
    reader = sys._getframe(1).f_back  # the constructor, or a generator expression in it
    constructor = getattr(nn.parallel.DistributedDataParallel.__init__, "__code__", None)
    return any(frame is not None and frame.f_code is constructor for frame in (reader, reader and reader.f_back))


class Conv3d(nn.Conv3d):
    """:class:`torch.nn.Conv3d`, computed by :func:`triton_conv3d.conv3d`: same arguments, state and initial values.

    ``in_channels=None`` gives a :class:`LazyConv3d`.

    Assigning ``in_channels`` asks for that channel count: when an input with it arrives that the weight does not fit,
    the layer is initialised anew for it, with a warning. The Parameter object stays, so optimisers keep seeing it, but
    its gradient is cleared, and what an optimiser keeps of it (momentum) has the old shape: drop it with
    ``optimizer.state.pop(layer.weight, None)``. Not for layers inside DDP or FSDP, which fix the sizes.
    """

    def __init__(
        self,
        in_channels: int | None,
        out_channels: int,
        kernel_size,
        stride=1,
        padding=0,
        dilation=1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device=None,
        dtype=None,
    ) -> None:
        rest = (kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype)
        if in_channels is None:
            if type(self) is not Conv3d:
                raise TypeError(
                    f"in_channels=None makes a Conv3d lazy, not its subclass {type(self).__name__}: derive that from "
                    "LazyConv3d"
                )
            self.__class__ = LazyConv3d
            LazyConv3d.__init__(self, out_channels, *rest)
        else:
            _check_arguments(in_channels, out_channels, stride, padding, groups, padding_mode)
            super().__init__(in_channels, out_channels, *rest)

    def forward(self, input: Tensor) -> Tensor:
        try:
            weight, bias = self._parameters["weight"], self._parameters["bias"]  # at an eighth of an attribute's cost
        except KeyError:  # computed from others
            weight, bias = self.weight, self.bias
        if isinstance(weight, Tensor) and self.in_channels != weight.shape[1] * self.groups:  # not a tracer's proxy
            torch.compiler.disable(self._renew)(input)  # not a decorator: it imports the compiler, which takes a second
        return self._conv_forward(input, weight, bias)

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        padding = self.padding
        if self.padding_mode != "zeros":
            input = F.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            padding = 0
        return conv3d(input, weight, bias, self.stride, padding, self.dilation, self.groups)

    def _renew(self, input: Tensor) -> None:
        """``in_channels`` was assigned: initialise the layer anew for it, once an input with that many arrives."""
        channels, weight = self.in_channels, self._parameters.get("weight")
        if not isinstance(input, Tensor) or input.dim() not in (4, 5) or input.size(-4) != channels:
            return
        if not isinstance(weight, nn.Parameter):  # computed from others, as weight_norm does, or lent for one call
            return
        if channels % self.groups:
            raise ValueError(f"in_channels={channels} must be divisible by groups={self.groups}")
        shape = (self.out_channels, channels // self.groups, *self.kernel_size)
        warnings.warn(
            f"in_channels={channels} was assigned: the weight of shape {tuple(weight.shape)} is replaced by a newly "
            f"initialised one of shape {shape}",
            UserWarning,
            stacklevel=6,
        )
        with _own_mode(weight), torch.no_grad():
            fresh = torch.empty(shape, dtype=weight.dtype, device=weight.device)
            memory_format = _format_of(weight)
            # Autograd would go on with an accumulator of the old shape; a passing change of dtype makes it drop that.
            weight.data = fresh.new_empty(0, dtype=torch.float16 if fresh.dtype != torch.float16 else torch.float32)
            weight.data = fresh
            torch.autograd.graph.increment_version(weight)  # graphs that still need the old weight must not go on
            for parameter in self._parameters.values():
                if parameter is not None:
                    parameter.grad = None
            self.reset_parameters()
            weight.data = weight.data.contiguous(memory_format=memory_format)


def _check_arguments(in_channels, out_channels, stride, padding, groups, padding_mode) -> None:
    """What torch's constructor checks, with messages that show the values."""
    if groups <= 0:
        raise ValueError(f"groups={groups} must be a positive integer")
    for name, channels in (("in_channels", in_channels), ("out_channels", out_channels)):
        if channels % groups:
            raise ValueError(f"{name}={channels} must be divisible by groups={groups}")
    if isinstance(padding, str):
        if padding not in ("same", "valid"):
            raise ValueError(f"padding={padding!r} is not known: expected 'same', 'valid' or integers")
        if padding == "same" and any(s != 1 for s in (stride if isinstance(stride, (tuple, list)) else [stride])):
            raise ValueError(f"padding='same' needs stride 1, got stride={stride}")
    if padding_mode not in _PADDING_MODES:
        raise ValueError(f"padding_mode={padding_mode!r} is not known: expected one of {', '.join(_PADDING_MODES)}")


def _format_of(weight: Tensor) -> torch.memory_format:
    last = weight.is_contiguous(memory_format=torch.channels_last_3d) and not weight.is_contiguous()
    return torch.channels_last_3d if last else torch.contiguous_format


class LazyConv3d(nn.LazyConv3d, Conv3d):
    """:class:`torch.nn.LazyConv3d` that becomes a :class:`Conv3d` at the first call, or when a state is loaded.

    Beyond torch's: ``in_channels`` may be assigned before the call; dtype, device and memory format asked for before
    it are kept; the parameters can be trained even if the first call was under ``torch.inference_mode``; a state_dict
    sets ``in_channels``, and one that does not fit is refused. DDP, FSDP, export and counting parameters need
    :func:`materialize` first.
    """

    cls_to_become = Conv3d

    def __init__(
        self,
        out_channels: int,
        kernel_size,
        stride=1,
        padding=0,
        dilation=1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device=None,
        dtype=None,
    ) -> None:
        rest = (stride, padding, dilation, groups, bias, padding_mode, device, dtype)
        super().__init__(out_channels, kernel_size, *rest)
        self.adopt_parameters()

    def __setstate__(self, state) -> None:
        super().__setstate__(state)
        self.adopt_parameters()

    def adopt_parameters(self) -> None:
        """Give torch's uninitialised parameters the class whose errors tell what to do."""
        for parameter in self._parameters.values():
            if is_lazy(parameter):
                parameter.__class__ = UninitializedParameter

    def initialize_parameters(self, input: Tensor, *args, **kwargs) -> None:
        if not self.has_uninitialized_params():
            return
        if not isinstance(input, Tensor):
            raise TypeError(f"{type(self).__name__}: input must be a Tensor, got {type(input).__name__}")
        channels = self._get_in_channels(input)
        if self.in_channels not in (0, channels):
            raise RuntimeError(
                f"in_channels={self.in_channels} was assigned, but the input of shape {list(input.shape)} has "
                f"{channels} channels; assign in_channels = {channels}, or nothing"
            )
        self._initialize(int(channels))

    def _initialize(self, channels: int) -> None:
        """Make what is not there yet; a parameter that was loaded stays."""
        if channels % self.groups:
            raise ValueError(f"in_channels={channels} must be divisible by groups={self.groups}")
        self.in_channels = channels
        filters = self.out_channels
        shapes = {"weight": (filters, channels // self.groups, *self.kernel_size), "bias": (filters,)}
        with _own_mode(self.weight), torch.no_grad():
            loaded = []
            for name, parameter in self._parameters.items():
                if is_lazy(parameter):
                    parameter.materialize(shapes[name])
                elif parameter is not None:
                    loaded.append((parameter, parameter.clone()))
            self.reset_parameters()
            for parameter, value in loaded:
                parameter.copy_(value)
            self._use_memory_format()  # last: in another order of memory torch may draw other values

    def _use_memory_format(self) -> None:
        memory_format = self.__dict__.pop("_memory_format", None)
        if memory_format is not None:
            with _own_mode(self.weight):
                self.weight.data = self.weight.data.contiguous(memory_format=memory_format)

    def _apply(self, fn, recurse=True):
        """``to``, ``half``, ``cuda``, ... before the first call: a probe shows what a weight would have become."""
        if is_lazy(self._parameters["weight"]):
            like = self._parameters["weight"].data
            memory_format = self.__dict__.get("_memory_format", torch.contiguous_format)
            probe = fn(torch.empty((2,) * 5, dtype=like.dtype, device=like.device, memory_format=memory_format))
            if probe.device.type == "cpu" and probe.is_shared():
                raise RuntimeError(f"an uninitialised parameter has no memory to share: {_REMEDY}")
            self._memory_format = _format_of(probe)
        lazy = {name: parameter for name, parameter in self._parameters.items() if is_lazy(parameter)}
        for name, parameter in lazy.items():
            data = fn(parameter.data)
            if torch._has_compatible_shallow_copy_type(parameter.data, data):
                parameter.data = data
            else:
                lazy[name] = UninitializedParameter(parameter.requires_grad, data.device, data.dtype)
        self._parameters.update(dict.fromkeys(lazy))  # torch passes over None
        try:
            return super()._apply(fn, recurse)
        finally:
            self._parameters.update(lazy)

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ) -> None:
        error = self._misfit(state_dict, prefix)
        if error:
            error_msgs.append(error)
            return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        self.adopt_parameters()
        if is_lazy(self.weight):
            return
        if local_metadata.get("assign_to_params_buffers", False):
            self.__dict__.pop("_memory_format", None)  # what is assigned comes as it is
        channels = self.weight.shape[1] * self.groups
        if self.has_uninitialized_params():
            self._initialize(channels)
        self.in_channels = channels
        self._use_memory_format()
        become_eager(self)

    def _misfit(self, state_dict, prefix: str) -> str | None:
        """Why a state cannot be that of this layer, in the words of torch's own check."""
        for name, wanted in (("weight", (self.out_channels, None, *self.kernel_size)), ("bias", (self.out_channels,))):
            loaded = state_dict.get(prefix + name)
            if not isinstance(loaded, Tensor) or is_lazy(loaded) or not is_lazy(self._parameters[name]):
                continue
            sizes = zip(loaded.shape, wanted, strict=False)
            if loaded.dim() != len(wanted) or any(want not in (None, size) for size, want in sizes):
                shape = ", ".join("any" if size is None else str(size) for size in wanted)
                return (
                    f"size mismatch for {prefix}{name}: copying a param with shape {loaded.shape} from checkpoint, the "
                    f"shape in current model is [{shape}]."
                )
        return None


def become_eager(layer: nn.Module) -> None:
    """What torch does to a lazy module after its first call: drop the hooks that waited for it, change the class."""
    for hook in ("_initialize_hook", "_load_hook"):
        if hasattr(layer, hook):
            getattr(layer, hook).remove()
            delattr(layer, hook)
    layer.__class__ = layer.cls_to_become


def materialize(model: nn.Module, *args, in_channels: int | Mapping[str, int] | None = None, **kwargs) -> nn.Module:
    """Give every lazy layer its parameters: before DDP, FSDP, export, or counting parameters.

    Nothing else changes: no forward pass of ``model`` itself runs, so buffers (running statistics), hooks, gradients
    and training flags stay, and random numbers are drawn for the initial values only, in the order of the first calls.

    Args:
        model: changed in place and returned. Lazy modules of every kind are served.
        *args, **kwargs: an example input of ``model``. Only shapes are worked out on it: a copy of the model runs on
            the meta device.
        in_channels: instead of an example, the channel count of ``model``, itself a lazy convolution; or a mapping
            from names of lazy convolutions in it to theirs.

    Raises:
        TypeError: lazy layers, but neither an example nor ``in_channels``; or ``in_channels`` for something else.
        RuntimeError: the example does not run on shapes alone, or does not reach every lazy layer.
    """
    if in_channels is not None:
        for name, channels in (in_channels.items() if isinstance(in_channels, Mapping) else [("", in_channels)]):
            layer = model.get_submodule(name)
            if not isinstance(layer, (nn.LazyConv3d, nn.LazyConvTranspose3d)):
                raise TypeError(
                    f"in_channels={in_channels}: {name or 'model'} must be a LazyConv3d or LazyConvTranspose3d, got "
                    f"{type(layer).__name__}"
                )
            if isinstance(channels, bool) or not isinstance(channels, int) or channels <= 0:
                raise TypeError(f"in_channels={in_channels} must be positive integers")
            layer._infer_parameters(layer, (torch.empty(1, channels, 1, 1, 1, device="meta"),))
    waiting = _lazy_modules(model)
    if waiting and (args or kwargs):
        calls = _first_calls(model, args, kwargs)
        missed = [name for name in waiting if name not in calls]
        if missed:
            raise RuntimeError(f"the example does not reach {', '.join(missed)}: give in_channels={{name: n}} for them")
        for name, (call_args, call_kwargs) in calls.items():
            waiting[name]._infer_parameters(waiting[name], call_args, call_kwargs)
    elif waiting and in_channels is None:
        raise TypeError(
            "materialize needs an example_input, or in_channels=..., for the lazy "
            + ", ".join(name or type(module).__name__ for name, module in waiting.items())
        )
    return model


def _lazy_modules(model: nn.Module) -> dict[str, nn.Module]:
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, LazyModuleMixin) and module.has_uninitialized_params()
    }


def check_materialized(model: nn.Module) -> None:
    """Raises RuntimeError that names what is lazy still."""
    if waiting := _lazy_modules(model):
        names = ", ".join(name or type(module).__name__ for name, module in waiting.items())
        raise RuntimeError(f"the parameters of {names} do not exist yet: {_REMEDY}")


def _first_calls(model: nn.Module, args: tuple, kwargs: dict) -> dict[str, tuple[tuple, dict]]:
    """The first call of every lazy module that the example reaches, in order, as tensors on the meta device."""
    calls: dict[str, tuple[tuple, dict]] = {}

    def remember(name: str):
        def hook(module, call_args, call_kwargs) -> None:
            calls.setdefault(name, (call_args, call_kwargs))

        return hook

    try:
        with torch.inference_mode(False), torch.no_grad():
            # A copy whose tensors have no memory: deepcopy takes what the memo holds already.
            memo = {id(t): _without_memory(t) for t in itertools.chain(model.parameters(), model.buffers())}
            double = copy.deepcopy(model, memo)
            for module in double.modules():
                _drop_foreign_hooks(module)
            for name, module in _lazy_modules(double).items():
                module.register_forward_pre_hook(remember(name), prepend=True, with_kwargs=True)
            args, kwargs = tree_map_only(Tensor, lambda t: t.to("meta"), (args, kwargs))
            with torch.device("meta"):
                double(*args, **kwargs)
    except Exception as error:
        raise RuntimeError(
            f"the shapes of {type(model).__name__} could not be worked out without computing ({type(error).__name__}: "
            f"{error}); run the model once instead, or give in_channels={{name: n}}"
        ) from error
    return calls


def _without_memory(tensor: Tensor) -> Tensor:
    if is_lazy(tensor):
        kind = nn.UninitializedParameter if isinstance(tensor, nn.Parameter) else nn.UninitializedBuffer
        return kind(tensor.requires_grad, "meta", tensor.data.dtype)
    empty = tensor.detach().to("meta")
    return nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty


def _drop_foreign_hooks(module: nn.Module) -> None:
    """Keep the hooks that torch computes with (lazy modules, weight_norm, spectral_norm), drop the user's."""
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        for key, hook in list(hooks.items()):
            owner = getattr(hook, "__self__", hook)
            if owner is not module and not type(owner).__module__.startswith("torch.nn.utils."):
                del hooks[key]
