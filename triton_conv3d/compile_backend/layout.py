"""channels_last_3d from convolution to convolution.

The inputs of convolutions are converted where they are not channels-last already, and the strides of everything that
follows are propagated anew: what torch computes from a channels-last tensor is channels-last in turn. Graph outputs, and
the operands of ops whose strides are their own affair, get back the strides that they had.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.utils._pytree import tree_leaves

from .. import ops
from .report import Report
from .rewriting import (
    DGRAD,
    FUSED,
    WGRAD,
    Rewriter,
    aten,
    is_channels_last,
    is_contiguous,
    is_ours,
    prims,
    same_strides,
)

_GATHERS = (aten.index.Tensor, aten._unsafe_index.Tensor)
_SCATTERS = (aten.index_put.default, aten._unsafe_index_put.default)
_PARTS = (aten.slice_backward.default, aten.select_backward.default)
_FILLED = {aten.new_zeros.default: 1, aten.full.default: 0, aten.zeros.default: 0}  # where their sizes stand
_LAST, _FIRST = [0, 2, 3, 4, 1], [0, 4, 1, 2, 3]  # channels moved there, and back
_FORMATS = (torch.contiguous_format, torch.channels_last_3d)
_VIEWS = (aten.view.default, aten._unsafe_view.default)

# Ops beside the pointwise ones whose results, by torch's kernels and fake kernels alike, do not depend on the strides of
# their operands but in their own strides. reflection_pad3d, replication_pad3d, roll and 2-D convolutions are not among
# them: the two disagree.
_FOLLOWING = {
    *"reshape view _unsafe_view permute transpose t squeeze unsqueeze expand slice select split split_with_sizes unbind "
    "alias detach diagonal cat stack clone _to_copy copy copy_ constant_pad_nd slice_backward slice_scatter "
    "select_scatter select_backward index _unsafe_index index_put _unsafe_index_put index_select flip repeat sum mean "
    "var var_mean amax amin any all max min argmax std linalg_vector_norm prod native_batch_norm _native_batch_norm_legit "
    "_native_batch_norm_legit_functional _native_batch_norm_legit_no_training _batch_norm_with_update "
    "_batch_norm_with_update_functional native_batch_norm_backward batch_norm_backward cudnn_batch_norm "
    "cudnn_batch_norm_backward max_pool3d_with_indices max_pool3d_with_indices_backward avg_pool3d avg_pool3d_backward "
    "_adaptive_avg_pool3d _adaptive_avg_pool3d_backward adaptive_max_pool3d upsample_nearest3d "
    "_upsample_nearest_exact3d upsample_trilinear3d upsample_nearest3d_backward _upsample_nearest_exact3d_backward "
    "upsample_trilinear3d_backward empty_like full_like zeros_like ones_like rand_like randn_like new_zeros new_ones "
    "new_full new_empty native_dropout native_dropout_backward _softmax _log_softmax mm addmm bmm baddbmm "
    # pointwise, though not every torch says so
    "convert_element_type leaky_relu leaky_relu_backward hardswish hardswish_backward elu_backward hardtanh_backward "
    "hardsigmoid_backward softplus_backward mish_backward _prelu_kernel rev "
    "sym_size sym_numel "
    "_low_memory_max_pool_with_offsets _low_memory_max_pool_offsets_to_indices".split(),
}  # fmt: skip


def channels_last(
    rewriter: Rewriter, report: Report, visible: set[int], inputs: Sequence | None, convert: bool = True
) -> None:
    """Propagate over the whole graph.

    Args:
        convert: the inputs of convolutions; else only what the strides of their results have become.
        visible: indices of the outputs whose strides somebody else relies on; the others are kept for a backward graph
            that is told their strides.
        inputs: fake values of the graph's inputs, if their strides may differ from those in the graph.
    """
    _Propagation(rewriter, report, convert).run(visible, inputs)


class _Propagation:
    def __init__(self, rewriter: Rewriter, report: Report, convert: bool):
        self.rewriter, self.report, self.convert = rewriter, report, convert
        self.before: dict[fx.Node, object] = dict(rewriter.stale)  # values of the nodes whose strides have changed
        self.copies: dict[tuple, fx.Node] = {}  # (source, strides) -> copy

    def run(self, visible: set[int], inputs: Sequence | None) -> None:
        for node, value in zip(self.rewriter.graph.find_nodes(op="placeholder"), inputs or (), strict=False):
            old = node.meta["val"]
            if isinstance(value, torch.Tensor) and not same_strides(value, old.stride()):
                self.before[node], node.meta["val"] = old, value
        for node in list(self.rewriter.graph.nodes):
            if node.op == "output":
                self._outputs(node, visible)
            elif is_ours(node):
                self._convolution(node)
            elif node.op in ("call_function", "call_module", "call_method"):
                self._drop_conversion(node)
                if self.convert and (self._index_pixels(node) or self._scatter_gradient(node)):
                    continue
                if any(source in self.before for source in node.all_input_nodes):
                    self._propagate(node)
        self.rewriter.graph.eliminate_dead_code()

    def _convolution(self, node: fx.Node) -> None:
        tensors = [i for i, arg in enumerate(node.args[:4]) if isinstance(arg, fx.Node)]
        for i in tensors if self.convert else ():
            source = node.args[i]
            value = source.meta["val"]
            if not isinstance(value, torch.Tensor) or value.dim() != 5 or _readable(value, is_weight := _is_weight(node, i)):
                continue
            where = "weight" if is_weight else "inside" if self._from_convolution(source) else "entering"
            node.update_arg(i, self._copy(source, node, where))
        if node.target is DGRAD and self.convert:
            node.args = (*node.args[:-1], True)
        self._revalue(node)
        if self.convert and node.target in (ops.conv3d, FUSED) and not is_channels_last(node.meta["val"]):
            self._disambiguate(node)

    def _disambiguate(self, node: fx.Node) -> None:
        """One channel in, so that operands are contiguous and channels-last alike: let strides say that it is the latter."""
        input = node.args[0]
        if statically_known_true(input.meta["val"].shape[1] != 1):
            return
        view = self.rewriter.call(node, aten.squeeze.dim, input, 1)
        view = self.rewriter.call(node, aten.unsqueeze.default, view, -1)
        node.update_arg(0, self.rewriter.call(node, aten.permute.default, view, _FIRST))
        self._revalue(node)

    def _from_convolution(self, node: fx.Node) -> bool:
        """Whether what lies before the node, up to other convolutions, is one."""
        seen, stack = set(), [node]
        while stack:
            node = stack.pop()
            if is_ours(node):
                return True
            if node not in seen:
                seen.add(node)
                stack += node.all_input_nodes
        return False

    def _copy(self, source: fx.Node, before: fx.Node, where: str) -> fx.Node:
        key = source, "channels_last"
        if key not in self.copies:
            if source.target in _FILLED and source.meta["val"].dim() == 5:  # filled in that order at once
                filled = self._filled_last(source, before)
                self.copies[key] = self.rewriter.call(before, aten.permute.default, filled, _FIRST)
            else:
                copied = self.rewriter.call(before, aten.clone.default, source, memory_format=torch.channels_last_3d)
                self.copies[key] = copied
                self.report.count("inserted", where)
        return self.copies[key]

    def _filled_last(self, source: fx.Node, before: fx.Node) -> fx.Node:
        """What a node of ``_FILLED`` makes, with its channels as the last dimension."""
        at, arguments = _FILLED[source.target], list(source.args)
        arguments[at] = [arguments[at][dim] for dim in _LAST]
        return self.rewriter.call(before, source.target, *arguments, **source.kwargs)

    def _drop_conversion(self, node: fx.Node) -> None:
        """A copy of a channels-last tensor that makes it contiguous, or channels-last."""
        if node.target is not aten.clone.default or node.kwargs.get("memory_format") not in _FORMATS:
            return
        source = node.args[0]
        copies = source not in self.before and _is_last(node.meta["val"])  # asked for as a copy, in the same strides
        if _is_last(source.meta["val"]) and not copies and not _is_changed(source):
            node.target, node.kwargs = aten.alias.default, {}
            self._revalue(node)
            self.report.removed += 1

    def _propagate(self, node: fx.Node) -> None:
        if node.meta.get("unbacked_bindings"):  # numbers, which no layout changes
            return
        if not _follows(node):
            for source in [source for source in node.all_input_nodes if source in self.before]:
                node.replace_input_with(source, self._restored(source, node, f"{node.name}'s operand"))
            return
        self._harmonise(node)
        try:
            self._revalue(node)
        except (RuntimeError, ValueError):
            if node.target not in _VIEWS:
                raise
            node.target = aten.reshape.default
            self._revalue(node)
        if node.target is aten.reshape.default and not _aliases(node):
            source = node.args[0]
            if _was_view(self.before[source], node.args[1], self.rewriter):
                self.report.count("inserted", "reshape")

    def _harmonise(self, node: fx.Node) -> None:
        """Where a channels-last tensor meets one that is not, the other is converted: else it may decide for both."""
        if node.target is aten.copy_.default:  # into a graph input, which stays where it is
            return
        meeting = [source for source in node.all_input_nodes if _is_dense_5d(source.meta["val"])]
        others = [source for source in meeting if not _readable(source.meta["val"], is_weight=False)]
        if 0 < len(others) < len(meeting):
            for source in others:
                where = "inside" if self._from_convolution(source) else "entering"
                node.replace_input_with(source, self._expanded_last(source, node) or self._copy(source, node, where))

    def _expanded_last(self, source: fx.Node, before: fx.Node) -> fx.Node | None:
        """A pointwise function of one expanded tensor, as that of the tensor, expanded; of a mean's gradient, say."""
        inner = source.all_input_nodes
        if not _is_pointwise(source) or len(inner) != 1 or inner[0].target is not aten.expand.default:
            return None
        tensor, *sizes = inner[0].args
        args, kwargs = fx.map_arg((source.args, source.kwargs), lambda _: tensor)
        result = self.rewriter.call(before, source.target, *args, **kwargs)
        return self.rewriter.call(before, aten.expand.default, result, *sizes)

    def _index_pixels(self, node: fx.Node) -> bool:
        """Interpolation by indices of pixels gives contiguous tensors; with channels moved last before, it need not."""
        if node.target not in (*_GATHERS, *_SCATTERS):
            return False
        tensor, indices = node.args[:2]
        values = node.args[2:3] if node.target in _SCATTERS else ()
        pixels = len(indices) == 5 and indices[:2] == [None, None] and all(isinstance(i, fx.Node) for i in indices[2:])
        read = values or (tensor,)  # a scatter goes into zeros, made for it
        whole = all(n.meta["val"].dim() == 5 for n in values or (node,))  # not of a list of pixels
        if not (pixels and whole) or not all(_is_channels_inside(n.meta["val"]) for n in read):
            return False
        if values and tensor.target not in _FILLED:
            return False
        values = [self.rewriter.call(node, aten.permute.default, n, _LAST) for n in values]
        if values:
            moved = self._filled_last(tensor, node)
        else:
            moved = self.rewriter.call(node, aten.permute.default, tensor, _LAST)
        result = self.rewriter.call(node, node.target, moved, [None, *indices[2:]], *values, *node.args[3:])
        self._take_over(node, result)
        return True

    def _scatter_gradient(self, node: fx.Node) -> bool:
        """The gradient of a slice, or of one plane, goes into contiguous zeros, too."""
        if node.target not in _PARTS or len(node.args[1]) != 5:
            return False
        grad, sizes, dim, *ends = node.args
        kept = [each for each in _LAST if node.target is aten.slice_backward.default or each != dim % 5]
        order, value = [sorted(kept).index(each) for each in kept], grad.meta["val"]
        inside = kept[-1] == 1 and statically_known_true(value.stride(order[-1]) == 1)
        if not inside or is_contiguous(value):
            return False
        moved, sizes = self.rewriter.call(node, aten.permute.default, grad, order), [sizes[each] for each in _LAST]
        self._take_over(node, self.rewriter.call(node, node.target, moved, sizes, _LAST.index(dim % 5), *ends))
        return True

    def _take_over(self, node: fx.Node, result: fx.Node) -> None:
        """``result``, with channels as the last dimension, stands for ``node``."""
        result = self.rewriter.call(node, aten.permute.default, result, _FIRST)
        self.before[result] = node.meta["val"]
        self.rewriter.take_over(node, result)

    def _revalue(self, node: fx.Node) -> None:
        """Update the node's value, and remember the old one if strides differ."""
        old = self.before.pop(node, node.meta["val"])
        self.rewriter.update(node)
        pairs = zip(tree_leaves(old), tree_leaves(node.meta["val"]), strict=True)
        if any(isinstance(a, torch.Tensor) and not same_strides(b, a.stride()) for a, b in pairs):
            self.before[node] = old

    def _outputs(self, node: fx.Node, visible: set[int]) -> None:
        outputs = list(node.args[0])
        for i, source in enumerate(outputs):
            if i in visible and source in self.before:
                outputs[i] = self._restored(source, node, "leaving")
        node.args = (tuple(outputs) if isinstance(node.args[0], tuple) else outputs,)

    def _restored(self, source: fx.Node, before: fx.Node, where: str) -> fx.Node:
        """A copy of the node with the strides that it had: a dense permutation of its dimensions."""
        value = self.before[source]
        if not isinstance(value, torch.Tensor):
            raise NotImplementedError(f"{source.name}, of several tensors, is an operand of {before.name}")
        key = source, "before"
        if key not in self.copies:
            order = _dense_order(value)
            copy, call = source, self.rewriter.call
            if order != sorted(order):
                copy = call(before, aten.permute.default, copy, order)
            copy = call(before, aten.clone.default, copy, memory_format=torch.contiguous_format)
            if order != sorted(order):
                copy = call(before, aten.permute.default, copy, [order.index(dim) for dim in range(len(order))])
            if not same_strides(copy.meta["val"], value.stride()):
                raise NotImplementedError(f"{source.name} had the strides {tuple(value.stride())}")
            self.copies[key] = copy
            self.report.count("inserted", where)
        return self.copies[key]


def _is_weight(node: fx.Node, index: int) -> bool:
    return index == 1 and node.target is not WGRAD


def _is_last(value: torch.Tensor) -> bool:
    """Channels-last and nothing else."""
    return is_channels_last(value) and not is_contiguous(value)


def _is_channels_inside(value: torch.Tensor) -> bool:
    return _readable(value, is_weight=False) and not is_contiguous(value)


def _readable(value: torch.Tensor, is_weight: bool) -> bool:
    """Kernels read it as it is: channels are dense and last; of a weight all of it is."""
    if is_channels_last(value):
        return True
    return not is_weight and statically_known_true(value.stride(1) == 1)


def _follows(node: fx.Node) -> bool:
    target = node.target
    if getattr(target, "__name__", "") == "getitem":
        return True
    if not isinstance(target, torch._ops.OpOverload) or target.namespace not in ("aten", "prims"):
        return False
    if target in (aten.view.dtype, prims.view_of_dtype.default if hasattr(prims, "view_of_dtype") else None):
        return False
    return _is_pointwise(node) or target._opname in _FOLLOWING


def _is_pointwise(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and torch.Tag.pointwise in node.target.tags


def _is_dense_5d(value: object) -> bool:
    if not isinstance(value, torch.Tensor) or value.dim() != 5:
        return False
    return not any(statically_known_true(stride == 0) for stride in value.stride())  # of expanded ones little is there


def _is_changed(node: fx.Node) -> bool:
    """Whether it is a graph input, or a view of one, that the graph changes in place."""
    while getattr(node.target, "is_view", False) or node.target in (aten.reshape.default, operator.getitem):
        node = node.args[0]
    return any(user.target is aten.copy_.default and user.args[0] is node for user in node.users)


def _aliases(node: fx.Node) -> bool:
    return torch._C._is_alias_of(node.meta["val"], node.args[0].meta["val"])


def _was_view(value: torch.Tensor, shape, rewriter: Rewriter) -> bool:
    """Whether reshaping the tensor took no copy before its strides changed."""
    shape = fx.map_arg(shape, lambda n: n.meta["val"])
    with torch.no_grad(), rewriter.mode:
        return torch._C._is_alias_of(aten.reshape.default(value, shape), value)


def _dense_order(value: torch.Tensor) -> list[int]:
    """Dimensions from the outermost in."""
    strides = [int(stride) if isinstance(stride, int) else stride.node.hint for stride in value.stride()]
    return sorted(range(value.dim()), key=lambda dim: (-strides[dim], dim))


