"""The ways people train: each gives what the same model of torch's own layers gives."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from triton_conv3d import configure, convert_conv3d

X = torch.randn(4, 2, 5, 4, 6, generator=torch.Generator().manual_seed(0))


def twins() -> tuple[nn.Module, nn.Module]:
    """torch's own, and the same with our convolutions."""
    torch.manual_seed(3)
    norm = nn.GroupNorm(2, 4)
    torchs = nn.Sequential(nn.Conv3d(2, 4, 3, padding=1), norm, nn.SiLU(), nn.Conv3d(4, 2, (1, 2, 3), stride=(1, 2, 1)))
    ours = copy.deepcopy(torchs)
    assert convert_conv3d(ours).converted == ["0", "3"]
    return torchs, ours


def gradients(model) -> list[torch.Tensor]:
    return [p.grad.clone() for p in model.parameters()]


def scaled(dtype, overflow):
    """Two steps of mixed precision; a first loss of infinity is skipped and halves the scale."""

    def train(model):
        optimiser = torch.optim.SGD(model.parameters(), lr=0.05)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
        for step in range(2):
            optimiser.zero_grad()
            with torch.autocast("cpu", dtype=dtype):
                y = model(X)
                assert y.dtype == dtype
                loss = y.float().square().mean()
            if overflow and step == 0:
                loss = loss * torch.inf
            scaler.scale(loss).backward()
            scaler.step(optimiser)
            scaler.update()
        assert scaler.get_scale() == 2.0 ** (7 if overflow else 8)
        return [*(p.detach() for p in model.parameters()), torch.tensor(scaler.get_scale())]

    return train


def checkpointed(use_reentrant):
    def train(model):
        x = X.clone().requires_grad_()
        checkpoint(model, x, use_reentrant=use_reentrant).square().sum().backward()
        return [x.grad, *gradients(model)]

    return train


def accumulated(model):
    for part in X.split(1):
        model(part).square().sum().backward()
    return gradients(model)


WAYS = {
    "float16-scaled": scaled(torch.float16, False),
    "float16-overflow": scaled(torch.float16, True),
    "bfloat16": scaled(torch.bfloat16, False),
    "checkpointed": checkpointed(False),
    "checkpointed-reentrant": checkpointed(True),
    "accumulated": accumulated,
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_as_torch(way):
    """With torch's kernels behind the ops: the bias gradient alone is summed in another order."""
    torchs, ours = twins()
    with configure(engine="aten"):
        results = way(ours)
    for result, expected in zip(results, way(torchs), strict=True):
        torch.testing.assert_close(result, expected, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("way, tolerance", (("float16-scaled", 2e-3), ("checkpointed", 1e-4)))
def test_with_the_kernels(way, tolerance):
    torchs, ours = twins()
    for result, expected in zip(WAYS[way](ours), WAYS[way](torchs), strict=True):
        torch.testing.assert_close(result, expected, rtol=tolerance, atol=tolerance)


# CUDA graphs

DEVICE = "cuda"
needs_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.fixture(params=("measured", "first-call"))
def warm(request):
    """How often the work runs before its capture: a first-ever call inside one is correct too, and measures nothing."""
    from triton_conv3d import tuning

    tuning.forget()
    with configure(cache_dir=None, autotune="quick"):
        yield request.param == "measured"
    tuning.forget()


def captured(work, warm: bool) -> torch.cuda.CUDAGraph:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3 * warm):
            work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph


@contextlib.contextmanager
def ieee():
    with torch.backends.cudnn.flags(allow_tf32=False), configure(fp32="ieee"):
        yield


class TestCudaGraphs:
    pytestmark = needs_gpu

    def test_forward(self, warm, monkeypatch):
        from triton_conv3d.tuning import measure

        if not warm:
            monkeypatch.setattr(measure, "best", lambda *a: pytest.fail("measured while capturing"))
        torchs, ours = (model.to(DEVICE) for model in twins())
        x, out = torch.zeros_like(X, device=DEVICE), []
        with ieee(), torch.no_grad():
            graph = captured(lambda: out.append(ours(x)), warm)
            for seed in (1, 2):
                x.copy_(torch.randn(X.shape, generator=torch.Generator().manual_seed(seed)))
                graph.replay()
                torch.testing.assert_close(out[-1], torchs(x), rtol=1e-4, atol=1e-4)

    def test_training_step(self, warm):
        torchs, ours = (model.to(DEVICE) for model in twins())
        batches = [torch.randn(X.shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE) for seed in range(4)]
        x = batches[0].clone()
        start = copy.deepcopy(ours.state_dict())

        def step_of(model):
            optimiser = torch.optim.SGD(model.parameters(), lr=0.05)

            def step(input):
                optimiser.zero_grad(set_to_none=True)
                model(input).square().mean().backward()
                optimiser.step()

            return step

        with ieee():
            step = step_of(ours)
            graph = captured(lambda: step(x), warm)
            ours.load_state_dict(start)
            plain = step_of(torchs)
            for batch in batches:
                x.copy_(batch)
                graph.replay()
                plain(batch)
            for result, expected in zip(ours.parameters(), torchs.parameters(), strict=True):
                torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)
