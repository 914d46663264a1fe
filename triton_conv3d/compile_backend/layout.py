"""channels_last_3d from convolution to convolution.

The inputs of convolutions are converted where they are not channels-last already, and the strides of everything that
follows are propagated anew: what torch computes from a channels-last tensor is channels-last in turn. Graph outputs, and
the operands of ops whose strides are their own affair, get back the strides that they had.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.utils._pytree import tree_leaves

from .. import ops
from . import moving
from .report import Report
from .rewriting import (
    DGRAD,
    FUSED,
    WGRAD,
    Rewriter,
    aten,
    dense_order,
    is_changed,
    is_channels_last,
    is_contiguous,
    is_dense,
    is_last,
    is_ours,
    is_view,
    prims,
    same_strides,
)

_FORMATS = (torch.contiguous_format, torch.channels_last, torch.channels_last_3d)

# Ops beside the pointwise ones whose results, by torch's kernels and fake kernels alike, do not depend on the strides of
# their operands but in their own strides. reflection_pad3d, replication_pad3d and roll are not among them: the two
# disagree.
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
    "upsample_trilinear3d_backward empty_like full_like zeros_like ones_like new_zeros new_ones "
    "new_full new_empty native_dropout native_dropout_backward _softmax _log_softmax mm addmm bmm baddbmm "
    # pointwise, though not every torch says so
    "convert_element_type leaky_relu leaky_relu_backward hardswish hardswish_backward elu_backward hardtanh_backward "
    "hardsigmoid_backward softplus_backward mish_backward _prelu_kernel rev "
    "sym_size sym_numel "
    "_low_memory_max_pool_with_offsets _low_memory_max_pool_offsets_to_indices".split(),
}  # fmt: skip
# Ops that return contiguous tensors: of contiguous ones, by torch's kernels and fake kernels alike.
_CONTIGUOUS = (aten.native_layer_norm.default, aten.native_layer_norm_backward.default, aten.roll.default)
# Numbers drawn in the order of memory: in that of eager mode each position gets the one that it gets there.
_DRAWN = (aten.rand_like.default, aten.randn_like.default)


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
        self.copies: dict[tuple, fx.Node] = {}  # (source, what was asked for) -> copy

    def run(self, visible: set[int], inputs: Sequence | None) -> None:
        self.visible = visible
        for node, value in zip(self.rewriter.graph.find_nodes(op="placeholder"), inputs or (), strict=False):
            old = node.meta["val"]
            if isinstance(value, torch.Tensor) and not same_strides(value, old.stride()):
                self.before[node], node.meta["val"] = old, value
        for node in list(self.rewriter.graph.nodes):
            if node.op == "output":
                self._outputs(node)
            elif is_ours(node):
                self._convolution(node)
            elif node.op in ("call_function", "call_module", "call_method"):
                if node.meta.get("unbacked_bindings"):  # numbers, or sizes, of which there are to be no others
                    continue
                self._drop_conversion(node)
                if self.convert and (result := moving.moved(self.rewriter, node)) is not None:
                    self._take_over(node, result)
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
            self._pin(node)
            self._revalue(node)

    def _pin(self, node: fx.Node) -> None:
        """Operand 0 is channels-last; let the strides of its dimensions of size 1, by which torch decides, say so too."""
        source = node.args[0]
        value = source.meta["val"]
        if not is_channels_last(value) or not any(statically_known_true(size == 1) for size in value.shape):
            return
        last, call = moving.channels_behind(value.dim()), self.rewriter.call
        sizes = self.rewriter.sizes(source, node)
        flat = call(node, aten.reshape.default, call(node, aten.permute.default, source, last), [-1])
        dense = call(node, aten.reshape.default, flat, [sizes[dim] for dim in last])
        node.update_arg(0, moving.moved_back(self.rewriter, node, dense, last))

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
            copy = moving.filled(self.rewriter, source, before)
            if copy is None:
                copy = self.rewriter.call(before, aten.clone.default, source, memory_format=torch.channels_last_3d)
                self.report.count("inserted", where)
            self.copies[key] = copy
        return self.copies[key]

    def _drop_conversion(self, node: fx.Node) -> None:
        """A copy that makes contiguous what is so no longer, or channels-last what is so already."""
        memory_format = node.kwargs.get("memory_format")
        if node.target is not aten.clone.default or memory_format not in _FORMATS:
            return
        source = node.args[0]
        value, changed = source.meta["val"], source in self.before
        needless = is_last(value) and (changed or not is_last(node.meta["val"]))  # else asked for as a copy
        needless |= changed and memory_format is torch.contiguous_format and not _is_expanded(value)
        needless |= changed and memory_format is torch.channels_last and is_channels_last(value)
        if needless and not is_changed(source) and not self._is_asked_for(node):
            node.target, node.kwargs = aten.alias.default, {}
            self._revalue(node)
            self.report.removed += 1

    def _is_asked_for(self, node: fx.Node) -> bool:
        """Whether it, or a view of it, is an output or an operand whose strides matter."""
        for user in node.users:
            if user.op == "output":
                asked = any(user.args[0][i] is node for i in self.visible)
            else:
                asked = self._is_asked_for(user) if is_view(user) else not (is_ours(user) or _follows(user))
            if asked:
                return True
        return False

    def _propagate(self, node: fx.Node) -> None:
        if node.target in _DRAWN and "memory_format" not in node.kwargs and is_contiguous(node.meta["val"]):
            node.update_kwarg("memory_format", torch.contiguous_format)
            self._revalue(node)
            return
        if not _follows(node) and not self._reads_contiguous(node):
            for source in [source for source in node.all_input_nodes if source in self.before]:
                node.replace_input_with(source, self._restored(source, node, f"{node.name}'s operand"))
            if _reads_any_strides(node):  # they need not be those that it had
                self._revalue(node)
            return
        self._harmonise(node)
        try:
            self._revalue(node)
        except (RuntimeError, ValueError):
            if node.target not in moving.VIEWS:
                raise
            node.target = aten.reshape.default
            self._revalue(node)
        if node.target is aten.reshape.default and not _aliases(node):
            source = node.args[0]
            if self.rewriter.viewed(self.before[source], node.args[1]) is not None:
                self.report.count("inserted", "reshape")

    def _reads_contiguous(self, node: fx.Node) -> bool:
        changed = [source.meta["val"] for source in node.all_input_nodes if source in self.before]
        return node.target in _CONTIGUOUS and all(map(is_contiguous, changed))

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

    def _take_over(self, node: fx.Node, result: fx.Node) -> None:
        if not same_strides(result.meta["val"], node.meta["val"].stride()):
            self.before[result] = node.meta["val"]
        self.rewriter.take_over(node, result)

    def _revalue(self, node: fx.Node) -> None:
        """Update the node's value, and remember the old one if strides differ."""
        old = self.before.pop(node, node.meta["val"])
        self.rewriter.update(node)
        pairs = zip(tree_leaves(old), tree_leaves(node.meta["val"]), strict=True)
        if any(isinstance(a, torch.Tensor) and not same_strides(b, a.stride()) for a, b in pairs):
            self.before[node] = old

    def _outputs(self, node: fx.Node) -> None:
        outputs = list(node.args[0])
        for i, source in enumerate(outputs):
            if i in self.visible and source in self.before:
                outputs[i] = self._restored(source, node, "leaving")
        node.args = (tuple(outputs) if isinstance(node.args[0], tuple) else outputs,)

    def _restored(self, source: fx.Node, before: fx.Node, where: str) -> fx.Node:
        """A copy of the node with the strides that it had: a dense permutation of its dimensions, or a view of one. Of a part
        that was kept for backward without the whole, where that will do, a dense one with dimensions in the same order."""
        value = self.before[source]
        order = dense_order(value) if isinstance(value, torch.Tensor) else []
        dense = isinstance(value, torch.Tensor) and is_dense(value, order)
        part = source.op == "placeholder" and not dense and not _is_expanded(value) and _reads_any_strides(before)
        key = source, "part" if part else "before"
        if key not in self.copies:
            if dense or part:
                copy = self._laid_out(source, before, order)
                self.report.count("inserted", where)
            elif is_view(source) and source.args[0] in self.before:
                base = self._restored(source.args[0], before, where)
                copy = self.rewriter.call(before, source.target, base, *source.args[1:], **source.kwargs)
            else:
                raise NotImplementedError(f"{source.name} is an operand of {before.name}, and neither dense nor a view")
            self.copies[key] = copy
        return self.copies[key]

    def _laid_out(self, source: fx.Node, before: fx.Node, order: list[int]) -> fx.Node:
        """A copy that is dense, with dimensions in that order."""
        copy, call = source, self.rewriter.call
        if order != sorted(order):
            copy = call(before, aten.permute.default, copy, order)
        copy = call(before, aten.clone.default, copy, memory_format=torch.contiguous_format)
        return copy if order == sorted(order) else moving.moved_back(self.rewriter, before, copy, order)


def _is_weight(node: fx.Node, index: int) -> bool:
    return index == 1 and node.target is not WGRAD


def _readable(value: torch.Tensor, is_weight: bool) -> bool:
    """Kernels read it as it is: channels are dense and last; of a weight all of it is."""
    if is_channels_last(value):
        return True
    return not is_weight and statically_known_true(value.stride(1) == 1)


def _follows(node: fx.Node) -> bool:
    target = node.target
    if getattr(target, "__name__", "") == "getitem":
        return True
    if not _is_atens(target):
        return False
    if target in (aten.convolution.default, aten.convolution_backward.default):  # of what we leave, those of frames
        return node.args[0].meta["val"].dim() == 4
    if target in (aten.view.dtype, prims.view_of_dtype.default if hasattr(prims, "view_of_dtype") else None):
        return False
    return _is_pointwise(node) or target._opname in _FOLLOWING


def _reads_any_strides(node: fx.Node) -> bool:
    """Whether it computes the same of an operand with other strides, if not in the same strides."""
    return _is_atens(node.target) and not node.target._opname.startswith("as_strided")


def _is_atens(target: object) -> bool:
    return isinstance(target, torch._ops.OpOverload) and target.namespace in ("aten", "prims")


def _is_pointwise(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and torch.Tag.pointwise in node.target.tags


def _is_dense_5d(value: object) -> bool:
    if not isinstance(value, torch.Tensor) or value.dim() != 5:
        return False
    return not _is_expanded(value)  # of which little is there


def _is_expanded(value: torch.Tensor) -> bool:
    return any(statically_known_true(stride == 0) for stride in value.stride())


def _aliases(node: fx.Node) -> bool:
    return torch._C._is_alias_of(node.meta["val"], node.args[0].meta["val"])
