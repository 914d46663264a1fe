"""What one rank of several does in test_distributed.py: ``python rank.py FOLDER``, with RANK and WORLD_SIZE set.

Every function of :data:`CHECKS` runs in every rank; what went wrong is written to FOLDER/RANK.json.
"""

from __future__ import annotations

import copy
import importlib
import json
import os
import sys
import traceback
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from cache_entries import CONFIG, PROBLEM
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from triton_conv3d import Conv3d, LazyConv3d, broadcast_plans, compile_backend, configure, materialize, settings
from triton_conv3d.tuning import select
from triton_conv3d.tuning.cache import Entry, PlanCache

CHECKS = {}


def check(function):
    CHECKS[function.__name__] = function
    return function


def network() -> nn.Module:
    torch.manual_seed(5)
    return nn.Sequential(LazyConv3d(6, 3, padding=1), nn.SiLU(), Conv3d(6, 5, (1, 3, 2), groups=1), Conv3d(5, 2, 1))


def samples(rank: int | None = None) -> torch.Tensor:
    """Two for each rank; all of them without a rank."""
    x = torch.randn(2 * dist.get_world_size(), 3, 4, 5, 4, generator=torch.Generator().manual_seed(1))
    return x if rank is None else x[2 * rank : 2 * rank + 2]


def gradients_alone(model: nn.Module) -> list[torch.Tensor]:
    alone = copy.deepcopy(model)
    alone(samples()).square().mean().backward()
    return [p.grad for p in alone.parameters()]


def compare(gradients, expected) -> None:
    for gradient, want in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, want, rtol=1e-5, atol=1e-6)


@check
def ddp():
    model = materialize(network(), samples())
    expected = gradients_alone(model)
    wrapped = DistributedDataParallel(model)
    wrapped(samples(dist.get_rank())).square().mean().backward()
    compare([p.grad for p in model.parameters()], expected)


@check
def ddp_accumulates():
    model = materialize(network(), samples())
    expected = gradients_alone(model)
    wrapped = DistributedDataParallel(model)
    first, second = samples(dist.get_rank()).split(1)
    with wrapped.no_sync():
        wrapped(first).square().mean().div(2).backward()
    wrapped(second).square().mean().div(2).backward()
    compare([p.grad for p in model.parameters()], expected)


@check
def fsdp():
    model = materialize(network(), samples())
    expected = gradients_alone(model)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model:
        if isinstance(layer, nn.Conv3d):
            fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    model(samples(dist.get_rank())).square().mean().backward()
    compare([p.grad.full_tensor() for p in model.parameters()], expected)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    optimiser.step()
    model(samples(dist.get_rank())).sum().backward()


def compiled(model: nn.Module):
    return torch.compile(model, backend=compile_backend.backend, options={"inner": "aot_eager"})


@check
def ddp_compiled():
    model = materialize(network(), samples())
    expected = gradients_alone(model)
    wrapped = compiled(DistributedDataParallel(model))  # nothing is reduced once it is gone
    wrapped(samples(dist.get_rank())).square().mean().backward()
    compare([p.grad for p in model.parameters()], expected)


@check
def fsdp_compiled():
    model = materialize(network(), samples())
    expected = gradients_alone(model)
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    compiled(model)(samples(dist.get_rank())).square().mean().backward()
    compare([p.grad.full_tensor() for p in model.parameters()], expected)


GPU = PROBLEM.replace(device="NVIDIA X1", arch="sm_90", dtype="float32")
NAMES = {"gpu": GPU.device, "arch": GPU.arch, "torch": "2"}
selecting = importlib.import_module("triton_conv3d.tuning.select")  # the name in the package is the function


def entry(problem, names=NAMES, config=CONFIG, time=3.0) -> Entry:
    return Entry(problem.to_dict(), names, {"mode": "quick"}, "aten", config, time, time, 2)


@check
def plans_of_one_rank_hold_in_all():
    """Stored by one rank, or in its memory only; another's own are replaced, what does not fit is refused."""
    last = dist.get_world_size() - 1
    selecting._environment = lambda problem: (NAMES, problem.device == GPU.device)
    stored, only_in_memory, odd = (GPU.replace(batch=n) for n in (11, 12, 13))
    with configure(cache_dir=settings.current().cache_dir / str(dist.get_rank()), autotune="off"):
        cache = PlanCache(settings.current().cache_dir)
        assert select(stored).source == "ranking"
        if dist.get_rank() == last:
            cache.store(entry(stored))
            selecting._unstored[None, only_in_memory] = entry(only_in_memory)
            cache.store(entry(odd, config={"channels_last": "yes", "benchmark": False}))
            cache.store(entry(odd.replace(device="NVIDIA Y2"), {**NAMES, "gpu": "NVIDIA Y2"}))
        else:
            cache.store(entry(only_in_memory, time=9.0))
        report = broadcast_plans(src=last)
        if dist.get_rank() == last:
            assert (report.added, report.skipped) == (0, {})
        else:
            assert (report.added, report.skipped) == (2, {"its config is not offered here": 1})
            assert selecting._memory[False].keys() >= {stored, only_in_memory}
            plans = [select(p) for p in (stored, only_in_memory)]
            assert [(p.engine, p.config.to_dict(), p.time_us) for p in plans] == [("aten", CONFIG, 3.0)] * 2
            assert cache.load(only_in_memory, NAMES).time_us == 3.0
        assert broadcast_plans(src=last).added == (0 if dist.get_rank() == last else 2)


@check
def a_rank_that_is_none_is_refused():
    try:
        broadcast_plans(src=77)
    except ValueError as error:
        assert "src=77" in str(error)
    else:
        raise AssertionError("src=77 was taken")


def main(folder: Path) -> None:
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size, timeout=timedelta(seconds=60)
    )
    wrong = {}
    for name, function in CHECKS.items():
        try:
            function()
        except Exception:
            wrong[name] = traceback.format_exc()
    (folder / f"{rank}.json").write_text(json.dumps(wrong))
    dist.barrier()
    sys.stderr.flush()
    os._exit(0)  # destroying a gloo group now and then waits forever, see run_to_its_end of test_readme.py


if __name__ == "__main__":
    main(Path(sys.argv[1]))
