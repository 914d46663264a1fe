"""torch.compile with this package's backend: what it computes, what the graphs look like, and what it says."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from compiled import (  # noqa: F401
    Inductor,
    by_aten,
    compare,
    compiled,
    conversions_between_convolutions,
    error,
    graphs,
    significant,
)
from tolerances import COMPILED
from torch import nn

import triton_conv3d
from perf.networks import mednext, nnunet, qwen2_vl, r3d, wan_vae, x3d
from triton_conv3d import ops, settings
from triton_conv3d.compile_backend import backend, fusion, inductor, reports

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


# Networks.

NETWORKS = {  # module, what to shrink it by, maker, input
    "nnunet": (nnunet, {"LEVELS": 2}, lambda: nnunet.PlainConvUNet(4), (2, 1, 4, 6, 8)),
    "mednext": (mednext, {"LEVELS": 1, "DEPTHS": (1,) * 3, "RATIOS": (2, 3, 2)}, lambda: mednext.MedNeXt(4), (2, 1, 6, 4, 8)),
    "r3d": (r3d, {"LEVELS": 2}, lambda: r3d.R3D18(6, 5), (2, 3, 6, 12, 12)),
    "x3d": (x3d, {"DEPTHS": (2,), "FEATURES": 8}, lambda: x3d.X3D(4, 5), (3, 3, 4, 20, 20)),
    "wan_vae": (
        wan_vae, {"MULTIPLES": (2, 1), "UPSAMPLING": ("",), "BLOCKS": 1}, lambda: wan_vae.WanDecoder(4), (1, 16, 2, 3, 4),
    ),
    "qwen2_vl": (qwen2_vl, {}, lambda: qwen2_vl.PatchEmbed(8), (5, 3, 2, 14, 14)),
}  # fmt: skip
RUNS = [
    *((name, True, "aot_eager") for name in NETWORKS), ("r3d", False, "aot_eager"), ("wan_vae", False, "aot_eager"),
    *(pytest.param(name, True, "inductor", marks=pytest.mark.long) for name in ("wan_vae", "x3d")),
]  # fmt: skip


@pytest.mark.parametrize("name, training, inner", RUNS, ids=lambda v: {True: "training", False: "inference"}.get(v, v))
def test_networks_give_what_eager_mode_gives(name, training, inner, monkeypatch):
    monkeypatch.setattr(torch._inductor.compile_fx, "_compile_fx_inner", Inductor())
    module, numbers, build, shape = NETWORKS[name]
    for constant, value in numbers.items():
        monkeypatch.setattr(module, constant, value)
    model, x = build().train(training), torch.randn(shape)
    converted = copy.deepcopy(model)
    triton_conv3d.convert_conv3d(converted)
    with torch.no_grad():
        assert error(copy.deepcopy(converted)(x), copy.deepcopy(model)(x)) <= COMPILED
    off, made = compare(model, x, training, inner)
    assert off <= COMPILED
    assert [r.kind for r in made] == (["forward", "backward"] if training else ["inference"])
    assert not [why for r in made for why in r.left if "fused" not in why]
    assert [node for g in graphs for node in conversions_between_convolutions(g.graph)] == []


# Layout.

WIDTH, DEPTH = 4, 20


def chain(norm, activation, depth: int = DEPTH) -> nn.Sequential:
    blocks = [(nn.Conv3d(WIDTH, WIDTH, 3, padding=1), norm(), activation()) for _ in range(depth)]
    return nn.Sequential(*(layer for block in blocks for layer in block))


class Joined(nn.Module):
    """Everything that may lie between the convolutions of a U-Net."""

    def __init__(self):
        super().__init__()
        self.inner = nn.ModuleList(nn.Conv3d(3, 6, 3, padding=1) if i == 0 else nn.Conv3d(6, 6, 1) for i in range(4))
        self.out = nn.Conv3d(12, 2, 3, padding=1)

    def forward(self, x):
        x = self.inner[0](x)
        y = F.group_norm(self.inner[1](F.max_pool3d(x, 2)), 3)
        y = self.inner[2](F.silu(y)) + y
        y = F.interpolate(self.inner[3](y), scale_factor=2.0, mode="trilinear")
        return self.out(torch.cat([F.interpolate(F.max_pool3d(y, 2), scale_factor=2), x], 1))


JOINED = "pool, interpolate, cat, add"
CHAINS = {
    "instance norm": lambda: chain(lambda: nn.InstanceNorm3d(WIDTH, affine=True), lambda: nn.LeakyReLU(0.1, True), 3),
    "tracked instance norm": lambda: chain(lambda: nn.InstanceNorm3d(WIDTH, track_running_stats=True), nn.ReLU, 3),
    "twenty instance norms": lambda: chain(lambda: nn.InstanceNorm3d(WIDTH, affine=True), lambda: nn.LeakyReLU(0.1, True)),
    "batch norm": lambda: chain(lambda: nn.BatchNorm3d(WIDTH), nn.ReLU, 3),
    "group norm": lambda: chain(lambda: nn.GroupNorm(2, WIDTH), nn.GELU, 3),
    JOINED: Joined,
}
LAYOUTS = [  # name, training, channels_last
    (name, training, last)
    for name in CHAINS
    for training, last in ((True, False), (False, False), (False, True))
    if training or name != "twenty instance norms"
]


@pytest.mark.parametrize("name, training, channels_last", LAYOUTS)
def test_no_conversion_lies_between_two_convolutions(name, training, channels_last, batch=2):
    model = CHAINS[name]().train(training)
    x = torch.randn(batch, next(model.parameters()).shape[1], 4, 4, 6)
    if channels_last:
        model, x = model.to(memory_format=torch.channels_last_3d), x.contiguous(memory_format=torch.channels_last_3d)
    off, made = compare(model, x, training)
    assert off <= COMPILED
    assert [node for g in graphs for node in conversions_between_convolutions(g.graph)] == []
    assert all("inside" not in r.inserted for r in made)
    assert all(n.args[2] is not None for n in graphs[0].graph.nodes if n.target in (ops.conv3d, ops.conv3d_fused))  # bias
    if channels_last:  # what instance normalisation returns is contiguous, in eager mode too
        assert all(set(r.inserted) <= {"leaving"} for r in made)


def test_nor_where_torch_forgets_what_its_convolution_returns():
    """Of one sample, on a CPU, torch's fake convolution gives contiguous tensors where the real one does not."""
    test_no_conversion_lies_between_two_convolutions("instance norm", False, True, batch=1)


def test_the_conversions_of_a_graph_are_counted():
    """The count of the test above sees what is there without the layout pass."""
    model = chain(lambda: nn.InstanceNorm3d(WIDTH), nn.Identity, 5).to(memory_format=torch.channels_last_3d)
    x = torch.randn(2, WIDTH, 4, 4, 6).contiguous(memory_format=torch.channels_last_3d)
    with torch.no_grad():
        compiled(model, layout=False)(x)
    assert len(conversions_between_convolutions(graphs[0].graph)) >= 4


@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
def test_what_a_model_changes_in_place_is_changed(training):
    """A buffer takes what a convolution gave, whose strides are others."""

    class Remembering(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv3d(2, 2, 3, padding=1)
            self.register_buffer("before", torch.randn(2, 2, 3, 4, 5))

        def forward(self, x):
            y = self.conv(x + self.before)
            self.before.add_(y.detach()).mul_(0.5)
            return y.relu()

    off, made = compare(Remembering(), torch.randn(2, 2, 3, 4, 5), training)
    assert off <= COMPILED and made


def test_layout_off_leaves_strides_alone():
    model = chain(lambda: nn.BatchNorm3d(WIDTH), nn.ReLU, 2).eval()
    off, (made,) = compare(model, torch.randn(1, WIDTH, 4, 4, 4), False, layout=False)
    assert off <= COMPILED and made.inserted == {} and made.replaced == {"conv3d": 2}


# Fusion.


@pytest.mark.parametrize("bias, depth", [(True, DEPTH), (False, 2)])
def test_every_block_of_an_inference_chain_is_one_node(bias, depth):
    model = chain(lambda: nn.BatchNorm3d(WIDTH), nn.ReLU, depth)
    for conv in model[::3]:
        conv.bias = conv.bias if bias else None
    for norm in model[1::3]:
        for tensor in (norm.running_mean, norm.bias.data):
            tensor.normal_()
        for tensor in (norm.running_var, norm.weight.data):
            tensor.uniform_(0.5, 2)
    off, (made,) = compare(model.eval(), torch.randn(2, WIDTH, 4, 3, 5), False)
    assert off <= COMPILED
    assert made.fused == ["scale"] * depth + ["bias + relu"] * depth
    large = [n for n in graphs[0].graph.nodes if n.op == "call_function" and n.meta["val"].numel() >= 2 * WIDTH * 60]
    names = [n.target._opname for n in large if "weight" not in n.name]
    assert names.count("conv3d_fused") == depth
    assert {name for name in names if name != "conv3d_fused"} <= {"clone", "mul"}  # of input, output; scaled weights


ACTIVATIONS = {
    "relu": F.relu, "leaky_relu": lambda x: F.leaky_relu(x, 0.3), "silu": F.silu, "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"), "sigmoid": torch.sigmoid, "tanh": torch.tanh,
    "hardswish": F.hardswish,
}  # fmt: skip


class Block(nn.Module):
    def __init__(self, after, bias: bool = True):
        super().__init__()
        self.conv, self.after = nn.Conv3d(3, 3, 3, padding=1, bias=bias), after

    def forward(self, x):
        return self.after(self.conv(x), x)


@pytest.mark.parametrize("name, residual", [*((name, False) for name in ACTIVATIONS), ("relu", True), ("silu", True)])
def test_activations_are_fused(name, residual):
    activation = ACTIVATIONS[name]
    model = Block(lambda y, x: activation(x + y if residual else y))
    off, (made,) = compare(model, torch.randn(2, 3, 4, 3, 5), False)
    assert off <= COMPILED
    assert made.fused == [f"bias + residual + {name}" if residual else f"bias + {name}"]


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_training_keeps_what_a_derivative_needs(name):
    activation = ACTIVATIONS[name]
    off, (forward, _) = compare(Block(lambda y, x: activation(y)), torch.randn(2, 3, 4, 3, 5), True)
    assert off <= COMPILED
    if name in ("relu", "sigmoid", "tanh"):  # their derivatives need the result alone
        assert forward.fused == [f"bias + {name}"] and forward.left == []
    else:
        assert forward.fused == [] and name in forward.left[0]


ROW = torch.tensor([1.5, -2.0, 0.25]).reshape(1, 3, 1, 1, 1)
ARITHMETIC = {
    "scale, no bias": (lambda y, x: y * ROW, False, "scale"),
    "scale and shift": (lambda y, x: y * ROW + ROW, True, "scale"),
    "shift": (lambda y, x: y - ROW, False, "shift"),
    "number": (lambda y, x: (y + 2) / 3, True, "scale"),
    "number without bias": (lambda y, x: y + 2, False, "shift"),
    "three dimensions": (lambda y, x: y * ROW[0], True, "scale"),
    "the other way round": (lambda y, x: ROW - y, True, None),
    "one number a pixel": (lambda y, x: y * x[:, :1], True, None),
    "whole numbers": (lambda y, x: (3 * y).int().to(y.dtype) * 2, True, "scale"),
    "over nothing": (lambda y, x: (y / 0).clamp(-1, 1), True, None),
    "without end": (lambda y, x: (y * float("inf")).clamp(-1, 1), True, None),
    "used twice": (lambda y, x: (y * ROW, y)[0] + y, True, None),
}


@pytest.mark.parametrize("name", ARITHMETIC)
def test_frozen_arithmetic_moves_into_weight_and_bias(name):
    after, bias, what = ARITHMETIC[name]
    off, (made,) = compare(Block(after, bias), torch.randn(2, 3, 4, 3, 5), False)
    assert off <= COMPILED
    assert made.fused == ([] if what is None else [what])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_batch_norm_is_folded_under_autocast(dtype):
    model = nn.Sequential(nn.Conv3d(3, 4, 3), nn.BatchNorm3d(4), nn.SiLU(), nn.Conv3d(4, 2, 1)).eval()
    x = torch.randn(2, 3, 5, 5, 5)
    with torch.no_grad():
        expected = model(x)
        with torch.autocast("cpu", dtype):
            eager = model(x)
            y = compiled(model)(x)
    assert y.dtype == dtype and "bias + silu" in reports()[-1].fused
    assert error(y, expected) <= 1.25 * error(eager, expected) + torch.finfo(dtype).eps / 8


PADDING = {
    "causal": (lambda x: F.pad(x, (0, 0, 0, 0, 2, 0)), 1),
    "every side": (lambda x: F.pad(x, (1, 0, 0, 2, 2, 1)), 1),
    "twice": (lambda x: F.pad(F.pad(x, (1, 1, 1, 1)), (0, 0, 0, 0, 2, 0)), 2),
    "zeros before": (lambda x: torch.cat([x.new_zeros(2, 3, 2, 3, 5), x], 2), 1),
    "zeros after": (lambda x: torch.cat([x, torch.zeros(2, 3, 4, 3, 2)], 4), 1),
    "nothing before": (lambda x: torch.cat([torch.zeros(0), x], 2), 0),
    "zeros of a wider type": (lambda x: torch.cat([torch.zeros(2, 3, 2, 3, 5), x.bfloat16()], 2), 0),
    "ones": (lambda x: F.pad(x, (1, 1, 1, 1), value=1.0), 0),
    "channels": (lambda x: F.pad(x[:, :2], (0, 0, 0, 0, 0, 0, 0, 1)), 0),
    "cropped": (lambda x: F.pad(x, (1, -1)), 0),
    "reflected": (lambda x: F.pad(x, (1, 1, 1, 1, 1, 1), mode="reflect"), 0),
}


@pytest.mark.parametrize("name", PADDING)
def test_zero_padding_moves_into_the_convolution(name):
    pad, count = PADDING[name]
    conv = nn.Conv3d(3, 2, 2, padding=(1, 0, 1))

    class Padded(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = conv

        def forward(self, x):
            return self.conv(pad(x))

    off, made = compare(Padded(), torch.randn(2, 3, 4, 3, 5), True)
    assert off <= COMPILED and len(made) == 2
    assert made[0].fused.count("padding") == count


# Convolutions.

TRANSPOSED = {
    "stride": {"stride": 2}, "overlap": {"kernel_size": 3, "stride": (2, 1, 3), "padding": 1},
    "output_padding": {"kernel_size": 3, "stride": (2, 3, 2), "padding": (1, 0, 1), "output_padding": (1, 2, 0)},
    "dilation": {"dilation": (1, 2, 3), "padding": 1}, "groups": {"groups": 2}, "no bias": {"bias": False},
}  # fmt: skip


@pytest.mark.parametrize("name", TRANSPOSED)
def test_transposed_convolutions(name):
    model = nn.ConvTranspose3d(4, 6, **{"kernel_size": 2, **TRANSPOSED[name]})
    off, made = compare(model, torch.randn(2, 4, 3, 4, 5), True)
    assert off <= COMPILED and made[0].replaced == {"transposed conv3d": 1}
    assert set(made[1].replaced) == {"conv3d", "conv3d_wgrad"} | ({"bias gradient"} if model.bias is not None else set())


@pytest.mark.parametrize(
    "model, dtype, why",
    [
        (nn.Conv3d(2, 3, 2), torch.float64, "float64"),
        (nn.ConvTranspose3d(2, 3, 2, dilation=3, output_padding=1), torch.float32, "output_padding=[1, 1, 1]"),
    ],
    ids=["float64", "output_padding"],
)
def test_what_is_left_has_a_reason(model, dtype, why):
    off, made = compare(model.to(dtype), torch.randn(1, 2, 4, 4, 4, dtype=dtype), True)
    assert off <= COMPILED
    assert all(why in r.left[0] and r.replaced == {} for r in made)


def test_converted_models_are_improved_too():
    model = nn.Sequential(nn.Conv3d(2, 3, 3), nn.ReLU(), nn.Conv3d(3, 2, 3))
    triton_conv3d.convert_conv3d(model)
    off, made = compare(model, torch.randn(1, 2, 6, 6, 6), True)
    assert off <= COMPILED and made[0].fused == ["bias + relu"] and made[0].inserted["entering"] == 1
    assert str(made[0]).startswith("forward: replaced 0 beside 2 that were ours; fused bias + relu 1")


# Dynamo.


def upsampling() -> nn.Sequential:
    return nn.Sequential(nn.Conv3d(2, 4, 3, padding=1), nn.InstanceNorm3d(4), nn.ReLU(), nn.ConvTranspose3d(4, 2, 2, 2))


DYNAMIC = {"transposed": upsampling, **{name: CHAINS[name] for name in ("instance norm", "batch norm", JOINED)}}


_LONG = [pytest.param(name, True, marks=pytest.mark.long) for name in DYNAMIC if name != "transposed"]


@pytest.mark.parametrize("name, training", [("transposed", True), ("transposed", False), *_LONG])
def test_dynamic_shapes_compile_once_and_keep_the_layout(name, training):
    model = DYNAMIC[name]().train(training)
    torch._dynamo.reset()
    function = torch.compile(model, backend=backend, options={"inner": "aot_eager"}, dynamic=True)
    for size in ((6, 8, 10), (8, 6, 12)) if name == JOINED else ((3, 5, 6), (5, 6, 7)):  # none is a number of channels
        x = torch.randn(2, next(model.parameters()).shape[1], *size, requires_grad=training)
        with torch.set_grad_enabled(training):
            y, expected = function(x), model(x)
        assert error(y, expected) <= COMPILED and significant(y) == significant(expected)
        if training:
            given, wanted = (torch.autograd.grad(z.square().sum(), (x, *model.parameters())) for z in (y, expected))
            assert error(*(torch.cat([t.flatten() for t in each]) for each in (given, wanted))) <= COMPILED
    assert [r.kind for r in reports()] == (["forward", "backward"] if training else ["inference"])
    assert [node for g in graphs for node in conversions_between_convolutions(g.graph)] == []
    assert all("inside" not in r.inserted and not r.left for r in reports())


def test_graph_breaks_and_checkpoints():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Sequential(nn.Conv3d(2, 3, 3, padding=1), nn.InstanceNorm3d(3), nn.ReLU())
            self.last = nn.Conv3d(3, 2, 1)

        def forward(self, x):
            x = torch.utils.checkpoint.checkpoint(self.first, x, use_reentrant=False)
            torch._dynamo.graph_break()
            return self.last(x)

    off, made = compare(Model(), torch.randn(2, 2, 4, 4, 4), True)
    assert off <= COMPILED and [r.kind for r in made] == ["forward", "forward", "backward", "backward"]


def test_the_kernels_themselves_run_in_compiled_graphs():
    with settings.configure(engine="implicit_gemm"):
        off, _ = compare(nn.Sequential(nn.Conv3d(1, 2, 2), nn.ReLU()), torch.randn(1, 1, 3, 3, 3), True)
    assert off <= COMPILED


# Inductor.

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a C++ compiler on a CPU")


def small() -> nn.Sequential:
    return nn.Sequential(nn.Conv3d(2, 3, 3, padding=1), nn.BatchNorm3d(3), nn.SiLU(), nn.Conv3d(3, 2, 1), nn.ReLU())


@pytest.mark.long
@needs_compiler
def test_inductor_trains():
    with torch._inductor.utils.fresh_cache():
        off, made = compare(small(), torch.randn(2, 2, 4, 4, 6), True, inner="inductor")
    assert off <= COMPILED and [r.kind for r in made] == ["forward", "backward"]
    assert all("inside" not in r.inserted for r in made) and made[0].fused == ["bias + relu"]


@pytest.mark.long
@needs_compiler
def test_inductor_trains_at_any_size():
    model = upsampling()
    torch._dynamo.reset()
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    with torch._inductor.utils.fresh_cache():
        function = torch.compile(model, backend=backend, dynamic=True)
        for size in ((3, 5, 6), (5, 6, 7)):
            x = torch.randn(2, 2, *size, requires_grad=True)
            given, wanted = (torch.autograd.grad(f(x).square().sum(), (x, *model.parameters())) for f in (function, model))
            assert error(*(torch.cat([t.flatten() for t in each]) for each in (given, wanted))) <= COMPILED
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before + 1  # not one for every size
    assert reports()[0].kind == "forward" and {r.kind for r in reports()[1:]} == {"backward"}
    assert all("inside" not in r.inserted and not r.left for r in reports())


@needs_compiler
def test_the_pass_serves_inductors_own_backend_and_its_cache():
    options = {"post_grad_custom_pre_pass": triton_conv3d.inductor_pass()}
    model, x = small().eval(), torch.randn(2, 2, 4, 4, 6)
    with torch._inductor.utils.fresh_cache(), torch.no_grad():
        expected = model(x)
        for cached in (False, True):
            torch._dynamo.reset()
            before = len(reports())
            assert error(torch.compile(model, options=options)(x), expected) <= COMPILED
            assert [r.fused for r in reports()[before:]] == [["scale", "bias + silu", "bias + relu"]] * (not cached)


def test_the_identity_of_the_pass_follows_its_options():
    def identity(**options):
        return triton_conv3d.inductor_pass(**options).uuid()

    assert identity() == identity()
    assert len({identity(), identity(layout=False), identity(fuse=False), identity(layout=False, fuse=False)}) == 4


def test_the_identity_of_the_pass_follows_its_source(tmp_path, monkeypatch):
    before, copied = triton_conv3d.inductor_pass().uuid(), tmp_path / "fusion.py"
    others = [path for path in inductor._SOURCES if not path.endswith("fusion.py")]
    assert len(others) == len(inductor._SOURCES) - 1
    copied.write_text(Path(fusion.__file__).read_text() + "# another\n")
    monkeypatch.setattr(inductor, "_SOURCES", (*others, str(copied)))
    assert triton_conv3d.inductor_pass().uuid() != before
