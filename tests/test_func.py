"""torch.func and forward mode: every transform of our convolution is that of torch's own."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.func import functional_call, grad, jacfwd, jacrev, jvp, vjp, vmap

from triton_conv3d import Conv3d, configure, conv3d, ops

BATCH, GROUPS = 3, 2
SHAPES = {"x": (2, 4, 4, 3, 3), "w": (6, 2, 2, 1, 3), "b": (6,)}
PLACES = {"x": -1, "w": 2, "b": 1}  # of the mapped dimension
HOW = {"stride": (1, 2, 1), "padding": (1, 0, 1), "groups": GROUPS}


@pytest.fixture(autouse=True)
def _torchs_kernels():
    """What is tested lies above the kernels."""
    with configure(engine="aten"):
        yield


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def operands(mapped: str = "") -> tuple[torch.Tensor, ...]:
    """x, w and b, with one dimension more, at a place of its own, where they are mapped."""
    drawn = []
    for place, (name, shape) in enumerate(SHAPES.items()):
        tensor = draw(*((BATCH, *shape) if name in mapped else shape), seed=place)
        drawn.append(tensor.movedim(0, PLACES[name]).contiguous() if name in mapped else tensor)
    return tuple(drawn)


def places(mapped: str) -> tuple[int | None, ...]:
    return tuple(PLACES[name] if name in mapped else None for name in SHAPES)


def ours(x, w, b):
    return conv3d(x, w, b, **HOW)


def torchs(x, w, b):
    return F.conv3d(x, w, b, **HOW)


MAPPED = ["".join(m) for n in (1, 2, 3) for m in itertools.combinations("xwb", n)]


@pytest.mark.parametrize("mapped", MAPPED)
def test_vmap_is_one_call(mapped, posed):
    arguments = operands(mapped)
    result = vmap(ours, places(mapped))(*arguments)
    torch.testing.assert_close(result, vmap(torchs, places(mapped))(*arguments))
    assert [p.groups for p in posed] == [GROUPS * BATCH if "x" in mapped and "w" in mapped else GROUPS]


@pytest.mark.parametrize("mapped", MAPPED)
def test_gradients_of_each_sample(mapped):
    """The rules of both gradients: each reads two of x, w and y, mapped or not."""
    def each(convolution):
        def loss(*a):
            return convolution(*a).pow(3).sum()

        return vmap(grad(loss, (0, 1, 2)), places(mapped))(*operands(mapped))

    for result, expected in zip(each(ours), each(torchs), strict=True):
        torch.testing.assert_close(result, expected)


@pytest.mark.parametrize("mapped", ("x", "w"))
def test_gradients_of_one_cotangent(mapped):
    """Which is not mapped, as only a call of vjp can have it."""
    cotangent = draw(2, 6, 5, 2, 3, seed=8)

    def each(convolution):
        return vmap(lambda *a: vjp(convolution, *a)[1](cotangent), places(mapped))(*operands(mapped))

    for result, expected in zip(each(ours), each(torchs), strict=True):
        torch.testing.assert_close(result, expected)


@pytest.mark.parametrize("mapped", ("x", "w", "xw"))
def test_vmap_of_vmap_and_with_one_group(mapped):
    x, w, b = (torch.stack([t, 2 * t, -t]) if name in mapped else t for name, t in zip("xwb", operands(), strict=True))
    w = w.repeat_interleave(2, dim=-4)  # one group
    dims = tuple(0 if name in mapped else None for name in "xwb")

    def twice(convolution):
        return vmap(vmap(convolution, dims), (None, 0, None) if "w" not in mapped else (0, None, None))

    more = (x, torch.stack([w, 3 * w]), b) if "w" not in mapped else (torch.stack([x, 3 * x]), w, b)
    torch.testing.assert_close(twice(conv3d)(*more), twice(F.conv3d)(*more))


ACTIVATIONS = (("none", lambda x: x), ("relu", F.relu), ("silu", F.silu))


@pytest.mark.parametrize("activation, function", ACTIVATIONS, ids=[name for name, _ in ACTIVATIONS])
@pytest.mark.parametrize("mapped", ("x", "xw", "r", "xr"))
def test_fused(mapped, activation, function):
    x, w, b = operands(mapped)
    residual = draw(*([BATCH] * ("r" in mapped)), 2, 6, 5, 2, 3, seed=9)
    dims = (*places(mapped), 0 if "r" in mapped else None)

    def fused(x, w, b, r):
        return conv3d(x, w, b, **HOW, residual=r, activation=activation)

    def composed(x, w, b, r):
        return function(torchs(x, w, b) + r)

    torch.testing.assert_close(vmap(fused, dims)(x, w, b, residual), vmap(composed, dims)(x, w, b, residual))
    plain, tangents = (*operands(), draw(2, 6, 5, 2, 3)), tuple(2 * t + 1 for t in (*operands(), draw(2, 6, 5, 2, 3)))
    for result, expected in zip(jvp(fused, plain, tangents), jvp(composed, plain, tangents), strict=True):
        torch.testing.assert_close(result, expected)
    results, wanted = (grad(lambda *a: f(*a).pow(2).sum(), (0, 1, 2, 3))(*plain) for f in (fused, composed))
    for result, expected in zip(results, wanted, strict=True):
        torch.testing.assert_close(result, expected)


ORDERS = {"rev-rev": (jacrev, jacrev), "fwd-rev": (jacfwd, jacrev), "rev-fwd": (jacrev, jacfwd), "fwd-fwd": (jacfwd, jacfwd)}


@pytest.mark.parametrize("outer, inner", ORDERS.values(), ids=ORDERS)
@pytest.mark.parametrize("which", range(3), ids=tuple(SHAPES))
def test_second_derivatives(outer, inner, which):
    def hessian(convolution):
        x, w, b = draw(1, 2, 2, 2, 1), draw(2, 1, 1, 1, 1, seed=1), draw(2, seed=2)

        def cubed(t):
            return convolution(*(t if i == which else o for i, o in enumerate((x, w, b))), groups=2).pow(3).sum()

        return outer(inner(cubed))((x, w, b)[which])

    torch.testing.assert_close(hessian(conv3d), hessian(F.conv3d))


def test_a_tangent_that_depends_on_the_outer_one():
    def inner(convolution):
        x, w, b = operands()

        def outer(w):
            return jvp(lambda v: convolution(x, v, b).square(), (w,), (w * w,))

        return jvp(outer, (w,), (3 * w,))[1]

    for result, expected in zip(inner(ours), inner(torchs), strict=True):
        torch.testing.assert_close(result, expected)


OPS = {
    "conv3d": (ops.conv3d, ("x", "w"), None),
    "dgrad": (ops.conv3d_dgrad, ("y", "w"), "x"),
    "wgrad": (ops.conv3d_wgrad, ("y", "x"), "w"),
}


@pytest.mark.parametrize("op, names, of", OPS.values(), ids=OPS)
def test_forward_mode_of_every_op_and_order(op, names, of):
    shapes = {"x": (1, 2, 2, 2, 1), "w": (2, 1, 2, 1, 1), "y": (1, 2, 1, 2, 1)}
    inputs = [draw(*shapes[name], seed=i).requires_grad_() for i, name in enumerate(names)]
    geometry = ((1,) * 3, (0,) * 6, (1,) * 3, 2)

    def call(a, b):
        return op(a, b, None, *geometry) if of is None else op(a, b, shapes[of], *geometry, False)

    how = {"check_batched_grad": True}
    assert torch.autograd.gradcheck(call, inputs, check_forward_ad=True, check_batched_forward_grad=True, **how)
    assert torch.autograd.gradgradcheck(call, inputs, check_fwd_over_rev=True, **how)


def test_no_tangent_no_work(posed):
    x, w, b = operands()
    jvp(lambda w: ours(x, w, b), (w,), (w,))
    assert len(posed) == 2  # the value, and the derivative by the weight


def test_an_ensemble_of_layers():
    layers = [Conv3d(4, 6, (2, 1, 3), groups=2, dtype=torch.float64) for _ in range(BATCH)]
    parameters = {n: torch.stack([dict(layer.named_parameters())[n] for layer in layers]) for n in ("weight", "bias")}
    x = draw(*SHAPES["x"])
    result = vmap(lambda p: functional_call(layers[0], p, (x,)))(parameters)
    torch.testing.assert_close(result, torch.stack([layer(x) for layer in layers]))
