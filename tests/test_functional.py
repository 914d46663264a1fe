"""conv3d answers as torch.nn.functional.conv3d: values, shapes, strides, and the class of every refusal."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

from triton_conv3d import conv3d, functional, posing

X, W, B = torch.ones(2, 4, 5, 6, 7), torch.ones(6, 4, 3, 3, 3), torch.ones(6)

GOOD = {
    "plain": {},
    "stride": {"stride": 2},
    "stride-triple": {"stride": (1, 2, 3)},
    "stride-list-of-one": {"stride": [2]},
    "stride-tensor": {"stride": torch.tensor(2)},
    "stride-bool-inside": {"stride": (1, True, 2)},
    "padding": {"padding": 1},
    "padding-triple": {"padding": (0, 1, 2)},
    "padding-size": {"padding": torch.Size((0, 1, 2))},
    "valid": {"padding": "valid"},
    "same": {"padding": "same"},
    "same-dilated": {"padding": "same", "dilation": (1, 2, 1)},
    "dilation": {"dilation": (2, 1, 3)},
}


@pytest.mark.parametrize("arguments", GOOD.values(), ids=GOOD.keys())
@pytest.mark.parametrize("memory_format", (torch.contiguous_format, torch.channels_last_3d), ids=("ncdhw", "ndhwc"))
def test_same_answer(arguments, memory_format):
    x = torch.randn(2, 4, 5, 6, 7).contiguous(memory_format=memory_format)
    w, b = torch.randn(6, 4, 3, 3, 3), torch.randn(6)
    expected = F.conv3d(x, w, b, **arguments)
    result = conv3d(x, w, b, **arguments)
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)
    assert result.stride() == expected.stride()


@pytest.mark.parametrize("kernel", list(itertools.product((2, 3), (1, 4), (2,))), ids=lambda k: "x".join(map(str, k)))
@pytest.mark.filterwarnings("ignore:Using padding='same'")
def test_same_puts_the_extra_zero_where_torch_does(kernel):
    x, w = torch.randn(1, 2, 5, 6, 4), torch.randn(3, 2, *kernel)
    torch.testing.assert_close(conv3d(x, w, padding="same"), F.conv3d(x, w, padding="same"), rtol=1e-4, atol=1e-4)


def test_unbatched():
    assert conv3d(X[0], W, B).shape == F.conv3d(X[0], W, B).shape == (6, 3, 4, 5)


@pytest.mark.parametrize("fused", (False, True), ids=("plain", "fused"))
def test_complex_numbers_train(fused):
    further = {"residual": torch.randn(1, 3, 3, 3, 3, dtype=torch.complex64)} if fused else {}
    shapes = (1, 2, 4, 4, 4), (3, 2, 2, 2, 2), (3,)
    x, w, b = (torch.randn(shape, dtype=torch.complex64, requires_grad=True) for shape in shapes)
    results = conv3d(x, w, b, **further), F.conv3d(x, w, b) + further.get("residual", 0)
    gradients = (torch.autograd.grad(y.abs().square().sum(), (x, w, b)) for y in results)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("arguments, error, message", [
    (dict(activation="swish"), ValueError, "activation='swish' is not known"),
    (dict(residual=torch.ones(1, 1, 1, 1, 1, dtype=torch.complex64)), RuntimeError, "residual of shape .* must be"),
], ids=("activation", "residual"))  # fmt: skip
def test_a_wrong_epilogue_of_complex_numbers(arguments, error, message):
    x, w = (torch.ones(shape, dtype=torch.complex64) for shape in ((1, 2, 4, 4, 4), (3, 2, 2, 2, 2)))
    with pytest.raises(error, match=message):
        conv3d(x, w, **arguments)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_are_torchs():
    nested = torch.nested.nested_tensor([torch.zeros(2, 3, 3, 3), torch.zeros(2, 4, 3, 3)])
    for function in (F.conv3d, conv3d):
        with pytest.raises(NotImplementedError, match="NestedTensor"):
            function(nested, torch.zeros(2, 2, 2, 2, 2))


@pytest.mark.parametrize(
    "x, w, padding",
    ((X[:0], W, 0), (X[:, :0], W[:, :0], 0), (X[:0, :, :0], W, 2)),
    ids=("no-batch", "no-channels", "no-batch-nor-depth"),
)
def test_empty(x, w, padding):
    torch.testing.assert_close(conv3d(x, w, B, padding=padding), F.conv3d(x, w, B, padding=padding))


BIG = 2**70
# id: (arguments, what the message has to name)
BAD = {
    "input-rank": ((X[0, 0], W), "input of shape [5, 6, 7]"),
    "input-rank-6": ((X[None], W), "input of shape [1, 2, 4, 5, 6, 7]"),
    "weight-rank": ((X, W[0]), "weight of shape [4, 3, 3, 3]"),
    "weight-rank-with-same": ((X, W[0], None, 1, "same"), "weight of shape [4, 3, 3, 3]"),
    "channels": ((X[:, :3], W), "3 channels"),
    "channels-tell-the-layer": ((X[:, :3], W), "assign in_channels = 3"),
    "channels-unbatched": ((X[0, :3], W), "3 channels"),
    "groups-zero": ((X, W, B, 1, 0, 1, 0), "groups=0"),
    "groups-negative": ((X, W, B, 1, 0, 1, -1), "groups=-1"),
    "groups-do-not-divide-channels": ((torch.ones(2, 8, 5, 6, 7), W, B, 1, 0, 1, 4), "groups=4"),
    "groups-do-not-divide-filters": ((torch.ones(2, 16, 5, 6, 7), W, B, 1, 0, 1, 4), "groups=4"),
    "groups-float": ((X, W, B, 1, 0, 1, 1.5), "groups must be an integer, got float: 1.5"),
    "groups-bool": ((X, W, B, 1, 0, 1, True), "groups must be an integer, got bool: True"),
    "groups-tuple": ((X, W, B, 1, 0, 1, (1,)), "groups must be an integer, got tuple: (1,)"),
    "groups-none": ((X, W, B, 1, 0, 1, None), "groups must be an integer, got NoneType"),
    "groups-overflow": ((X, W, B, 1, 0, 1, BIG), f"groups={BIG}"),
    "no-filters": ((X, W[:0]), "weight of shape [0, 4, 3, 3, 3]"),
    "no-taps": ((X, W[:, :, :0]), "weight of shape [6, 4, 0, 3, 3]"),
    "no-depth": ((X[:, :, :0], W, B, 1, 2), "input of shape [2, 4, 0, 6, 7]"),
    "padding-negative": ((X, W, B, 1, -1), "padding=-1"),
    "padding-one-negative": ((X, W, B, 1, (0, -1, 0)), "padding=(0, -1, 0)"),
    "padding-none": ((X, W, B, 1, None), "padding must be an integer, got NoneType"),
    "padding-pair": ((X, W, B, 1, (1, 2)), "padding=(1, 2)"),
    "padding-word": ((X, W, B, 1, "full"), "padding='full'"),
    "padding-upper-case": ((X, W, B, 1, "SAME"), "padding='SAME'"),
    "padding-bool": ((X, W, B, 1, False), "padding must be an integer, got bool: False"),
    "same-with-stride": ((X, W, B, 2, "same"), "stride=2"),
    "same-with-stride-zero": ((X, W, B, 0, "same"), "stride=0"),
    "same-with-stride-pair": ((X, W, B, (1, 1), "same"), "stride=(1, 1)"),
    "same-with-dilation-negative": ((X, W, B, 1, "same", -1), "dilation=-1"),
    "stride-zero": ((X, W, B, 0), "stride=0"),
    "stride-negative": ((X, W, B, (1, -1, 1)), "stride=(1, -1, 1)"),
    "stride-pair": ((X, W, B, (1, 1)), "stride=(1, 1)"),
    "stride-four": ((X, W, B, (1, 1, 1, 1)), "stride=(1, 1, 1, 1)"),
    "stride-empty": ((X, W, B, ()), "stride=()"),
    "stride-float": ((X, W, B, 1.5), "stride must be an integer, got float: 1.5"),
    "stride-floats": ((X, W, B, (1.0, 1.0, 1.0)), "stride=(1.0, 1.0, 1.0)"),
    "stride-one-float": ((X, W, B, (1, 1.0, 1)), "stride=(1, 1.0, 1)"),
    "stride-bool": ((X, W, B, True), "stride must be an integer, got bool: True"),
    "stride-bool-first": ((X, W, B, (True, 1, 1)), "stride=(True, 1, 1)"),
    "stride-range": ((X, W, B, range(1, 4)), "stride must be an integer, got range"),
    "stride-set": ((X, W, B, {1, 2, 3}), "stride must be an integer, got set"),
    "stride-tensor-of-three": ((X, W, B, torch.ones(3, dtype=torch.int64)), "stride must be an integer, got Tensor"),
    "stride-float-tensor": ((X, W, B, torch.ones(1)), "stride must be an integer, got Tensor"),
    "stride-word": ((X, W, B, "a"), "stride must be an integer, got str: 'a'"),
    "stride-none": ((X, W, B, None), "stride must be an integer, got NoneType"),
    "stride-none-inside": ((X, W, B, (1, None, 1)), "stride=(1, None, 1)"),
    "stride-overflow": ((X, W, B, BIG), f"stride={BIG}"),
    "stride-overflow-negative": ((X, W, B, -BIG), f"stride=-{BIG}"),
    "stride-overflow-inside": ((X, W, B, (1, BIG, 1)), f"stride=(1, {BIG}, 1)"),
    "dilation-zero": ((X, W, B, 1, 0, 0), "dilation=0"),
    "dilation-negative": ((X, W, B, 1, 0, (1, 1, -2)), "dilation=(1, 1, -2)"),
    "dilation-pair": ((X, W, B, 1, 0, (1, 1)), "dilation=(1, 1)"),
    "dilation-word": ((X, W, B, 1, 0, "same"), "dilation must be an integer, got str: 'same'"),
    "kernel-too-large": ((X, torch.ones(6, 4, 7, 3, 3)), "spans 7 in depth"),
    "kernel-too-large-for-no-batch": ((X[:0], torch.ones(6, 4, 7, 3, 3)), "spans 7 in depth"),
    "dilated-kernel-too-large": ((X, W, B, 1, 0, (1, 3, 1)), "spans 7 in height"),
    "dtype": ((X.double(), W), "input is torch.float64 but weight is torch.float32"),
    "dtype-half": ((X.half(), W), "input is torch.float16 but weight is torch.float32"),
    "dtype-integer": ((X.long(), W), "input is torch.int64 but weight is torch.float32"),
    "bias-dtype": ((X, W, B.double()), "bias is torch.float64"),
    "bias-length": ((X, W, B[:3]), "bias of shape [3]"),
    "bias-rank": ((X, W, B[None]), "bias of shape [1, 6]"),
    "bias-scalar": ((X, W, B[0]), "bias of shape []"),
    "input-none": ((None, W), "input must be a Tensor, got NoneType"),
    "input-list": (([1.0], W), "input must be a Tensor, got list: [1.0]"),
    "weight-none": ((X, None), "weight must be a Tensor, got NoneType"),
    "weight-list": ((X, [1]), "weight must be a Tensor, got list: [1]"),
    "bias-number": ((X, W, 3), "bias must be a Tensor or None, got int: 3"),
    "bias-bool": ((X, W, False), "bias must be a Tensor or None, got bool: False"),
    "weight-missing": ((X,), "weight"),
    "one-argument-too-many": ((X, W, B, 1, 0, 1, 1, 1), "arguments"),
    "sparse": ((X.to_sparse(), W), "sparse"),
}


def refused_alike(arguments: tuple) -> str:
    """The message of our refusal, which is of exactly torch's class."""
    with pytest.raises(Exception) as torchs:
        F.conv3d(*arguments)
    with pytest.raises(torchs.type) as ours:
        conv3d(*arguments)
    assert ours.type is torchs.type
    return str(ours.value)


@pytest.mark.parametrize("arguments, named", BAD.values(), ids=BAD.keys())
def test_refuses_what_torch_refuses(arguments, named):
    assert named in refused_alike(arguments)


def test_refuses_even_after_the_like_was_accepted():
    conv3d(X, W, B, (1, 1, 1))
    assert "stride=(1.0, 1, 1)" in refused_alike((X, W, B, (1.0, 1, 1)))


def test_device_mismatch():
    with pytest.raises(RuntimeError, match="weight is on meta"):
        conv3d(X, W.to("meta"))
    with pytest.raises(RuntimeError, match="bias is on meta"):
        conv3d(X, W, B.to("meta"))


DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.int32)


@pytest.mark.parametrize("dtypes", list(itertools.product(DTYPES, DTYPES)), ids=str)
def test_autocast_agrees_on_which_dtypes_fit(dtypes):
    x, w = X.to(dtypes[0]), W.to(dtypes[1])
    with torch.autocast("cpu", torch.bfloat16):
        try:
            expected = F.conv3d(x, w)
        except RuntimeError:
            with pytest.raises(RuntimeError, match="but weight is"):
                conv3d(x, w)
        else:
            result = conv3d(x, w)
            assert result.dtype == expected.dtype
            torch.testing.assert_close(result, expected)


def test_what_passed_the_checks_is_remembered_within_limits(monkeypatch):
    monkeypatch.setattr(functional, "_known", {})
    monkeypatch.setattr(functional, "_KNOWN_LIMIT", 3)
    monkeypatch.setattr(posing, "_posed", {})
    monkeypatch.setattr(posing, "_MOST_POSED", 3)
    for size in (3, 4, 5, 6, 3):
        conv3d(torch.ones(1, 1, size, 3, 3), torch.ones(1, 1, 3, 3, 3))
        assert 1 <= len(functional._known) <= 3 and 1 <= len(posing._posed) <= 3


class Wrapped(torch.Tensor):
    """A subclass with torch's default handling."""


class Counted(torch.Tensor):
    """A subclass that answers for itself."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        return func, args, kwargs


def test_tensor_subclass():
    assert type(conv3d(X.as_subclass(Wrapped), W, B)) is type(F.conv3d(X.as_subclass(Wrapped), W, B))
    func, args, kwargs = conv3d(X.as_subclass(Counted), W, B, padding="same")
    assert func is conv3d and args[3:] == (1, "same", 1, 1) and not kwargs


@pytest.mark.parametrize("backend", ("eager", "aot_eager"))
@pytest.mark.parametrize("dynamic", (False, True), ids=("static", "dynamic"))
def test_compiles_to_one_graph(backend, dynamic):
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x, w: conv3d(x, w, None, [1], "same", (1, 2, 1)), backend=backend, fullgraph=True, dynamic=dynamic
    )
    for depth in (5, 8):
        x, w = torch.randn(1, 2, depth, 6, 7), torch.randn(3, 2, 3, 3, 3)
        expected = F.conv3d(x, w, None, 1, "same", (1, 2, 1))
        torch.testing.assert_close(compiled(x, w), expected, rtol=1e-4, atol=1e-4)


def test_dynamic_sizes_share_one_graph():
    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(lambda x, w: conv3d(x, w, padding=1), backend=backend, fullgraph=True, dynamic=True)
    # No two sizes of the first call are equal by chance: torch would take them for one and the same symbol.
    for batch, depth, width in ((5, 7, 8), (4, 9, 10), (6, 11, 4)):
        assert compiled(torch.ones(batch, 2, depth, 6, width), torch.ones(9, 2, 3, 3, 3)).shape[2] == depth
    assert len(graphs) == 1
