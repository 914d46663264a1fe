"""Train a small 3-D U-Net of lazy convolutions on a brain MRI and show what the package chose to do for it."""

from __future__ import annotations

import copy
import statistics
import time
from dataclasses import dataclass

import torch
from torch import nn

from .. import Conv3d, configure, explain
from .data import CLASSES, Slab, load
from .network import UNet, dice, loss

__all__ = ["DEFAULTS", "Run", "evaluate", "load", "main", "plans", "train", "with_torch_convolution"]


@dataclass(frozen=True)
class Run:
    """What one demo run does. ``device`` is ``cuda``, ``interpreter`` (kernels on the CPU) or ``cpu`` (torch's own)."""

    device: str
    steps: int
    width: int
    patch: int
    batch: int = 2
    levels: int = 3
    spacing: int = 1
    amp: bool = False
    seed: int = 0
    learning_rate: float = 0.01
    held_out_patches: int = 8

    def __post_init__(self):
        if self.patch % 4 or self.patch < 8:
            raise ValueError(f"patch={self.patch} is no size of a patch: expected a multiple of 4, at least 8")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed={self.seed} is none: expected a number from 0 to 2^63 - 1")
        for name in ("steps", "width", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} is too small: expected at least 1")

    @property
    def torch_device(self) -> torch.device:
        return torch.device("cuda" if self.device == "cuda" else "cpu")

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.torch_device.type, dtype=torch.bfloat16, enabled=self.amp)


# The interpreter needs seconds for what a GPU does in microseconds: few, small patches of a coarser image.
_STEPS_TIMED = 30
DEFAULTS = {
    "cuda": Run("cuda", steps=200, width=32, patch=64, amp=True, learning_rate=0.005),
    "interpreter": Run("interpreter", steps=12, width=8, patch=16, batch=1, levels=2, spacing=2, held_out_patches=4),
    "cpu": Run("cpu", steps=40, width=8, patch=64),
}
_WHERE = {
    "cuda": "Triton kernels on {gpu}",
    "interpreter": "no GPU: the Triton kernels run in Triton's interpreter, slowly, on small patches",
    "cpu": "torch's own CPU convolution; the Triton kernels are not used",
}


def main(run: Run, training: Slab, held_out: Slab) -> None:
    """The whole demo, printed. The slabs are those of :func:`.data.load`."""
    gpu = torch.cuda.get_device_name() if run.device == "cuda" else ""
    print(_WHERE[run.device].format(gpu=gpu))
    print(
        f"MNI152 T1 template, voxels of {run.spacing} mm: train on the back {_size(training)}, test on the front "
        f"{_size(held_out)}\npatch {run.patch}, batch {run.batch}, width {run.width}, "
        f"{'bfloat16 autocast' if run.amp else 'float32'}"
    )
    torch.manual_seed(run.seed)
    network = UNet(run.width, len(CLASSES), run.levels).to(run.torch_device, memory_format=torch.channels_last_3d)
    if run.device == "cpu":
        with configure(engine="aten"):
            _train_and_report(run, network, training, held_out)
    else:
        _train_and_report(run, network, training, held_out)


def _train_and_report(run: Run, network: nn.Module, training: Slab, held_out: Slab) -> None:
    train(run, network, training)
    print("\nDice on held-out patches: " + _scores(evaluate(run, network, held_out)))
    print_plans(run, network, training)
    if run.device == "cuda":
        print_step_times(run, network, training)


def train(run: Run, network: nn.Module, slab: Slab) -> list[float]:
    """Train in place and print the falling loss, each line a mean since the last. Returns every loss."""
    generator = torch.Generator().manual_seed(run.seed)
    with torch.no_grad(), run.autocast():
        network(_batch(run, slab, generator)[0])  # the lazy layers learn their channels; then the optimiser may come
    count = sum(parameter.numel() for parameter in network.parameters())
    print(f"{count:,} parameters after the first call; {run.steps} steps\n")
    optimiser = torch.optim.Adam(network.parameters(), lr=run.learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, run.steps, eta_min=1e-4)
    losses: list[float] = []
    reports = max(1, min(10, run.steps // 4))
    printed, begin = 0, time.perf_counter()
    for step in range(1, run.steps + 1):
        losses.append(float(_step(run, network, optimiser, *_batch(run, slab, generator))))
        schedule.step()
        if step * reports // run.steps > (step - 1) * reports // run.steps:
            mean = statistics.fmean(losses[printed:])
            print(f"step {step:4d}   loss {mean:.4f}   {time.perf_counter() - begin:6.1f} s", flush=True)
            printed = step
    return losses


@torch.no_grad()
def evaluate(run: Run, network: nn.Module, slab: Slab) -> list[float]:
    """Dice of every class over patches of a slab that training has not seen."""
    generator = torch.Generator().manual_seed(run.seed + 1)
    predicted, labels = [], []
    for _ in range(-(-run.held_out_patches // run.batch)):
        image, truth = _batch(run, slab, generator)
        with run.autocast():
            predicted.append(network(image).argmax(1))
        labels.append(truth)
    return dice(torch.cat(predicted), torch.cat(labels), len(CLASSES))


def print_plans(run: Run, network: nn.Module, slab: Slab) -> None:
    """For each layer and pass that training needs: the problem, the plan and where the plan came from."""
    print("\nplans")
    for name, problems in plans(run, network, slab).items():
        print(f"  {name}")
        for passed in problems:
            plan = passed.plan
            time_ = "" if plan.time_us is None else f", {plan.time_us:.1f} us"
            print(f"    {passed.problem}\n        {plan.engine} [{plan.config}] from {plan.source}{time_}")


def plans(run: Run, network: nn.Module, slab: Slab) -> dict[str, list]:
    """What :func:`triton_conv3d.explain` tells of each convolution, by the layer's name."""
    found: dict[str, list] = {}

    def look(name: str):
        def hook(layer, inputs, output):
            passes = explain(layer, inputs[0]).passes
            found[name] = [p for p in passes.values() if p.problem.pass_ != "dgrad" or inputs[0].requires_grad]

        return hook

    layers = {name: module for name, module in network.named_modules() if isinstance(module, Conv3d)}
    hooks = [module.register_forward_hook(look(name)) for name, module in layers.items()]
    try:
        with run.autocast():
            network(_batch(run, slab, torch.Generator().manual_seed(run.seed))[0])
    finally:
        for hook in hooks:
            hook.remove()
    return found


def print_step_times(run: Run, network: nn.Module, slab: Slab) -> None:
    """Median milliseconds of a training step, beside the same weights in torch's own convolution in both layouts."""
    torchs = with_torch_convolution(network)
    rows = (
        ("triton_conv3d", network, torch.channels_last_3d, False),
        ("torch, contiguous", torchs, torch.contiguous_format, False),
        ("torch, channels_last_3d + cudnn.benchmark", torchs, torch.channels_last_3d, True),
    )
    print("\nmedian step time")
    before = torch.backends.cudnn.benchmark
    for name, source, layout, benchmark in rows:
        torch.backends.cudnn.benchmark = benchmark
        try:
            model = copy.deepcopy(source).to(memory_format=layout)
            print(f"  {name:<42} {_median_step_ms(run, model, slab, layout):8.2f} ms")
        finally:
            torch.backends.cudnn.benchmark = before


def _median_step_ms(run: Run, model: nn.Module, slab: Slab, layout: torch.memory_format) -> float:
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-4)
    image, labels = _batch(run, slab, torch.Generator().manual_seed(run.seed))
    image = image.contiguous(memory_format=layout)
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(_STEPS_TIMED + 1)]
    for _ in range(5):
        _step(run, model, optimiser, image, labels)
    for mark in marks[:-1]:
        mark.record()
        _step(run, model, optimiser, image, labels)
    marks[-1].record()
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in zip(marks, marks[1:], strict=False))


def with_torch_convolution(network: nn.Module) -> nn.Module:
    """A copy of the network whose convolutions are torch.nn.Conv3d with the same weights."""
    network = copy.deepcopy(network)
    for parent in list(network.modules()):
        for name, ours in list(parent.named_children()):
            if isinstance(ours, Conv3d):
                shape = (ours.in_channels, ours.out_channels, ours.kernel_size, ours.stride, ours.padding)
                theirs = nn.Conv3d(*shape, ours.dilation, ours.groups, ours.bias is not None, ours.padding_mode)
                theirs.to(ours.weight).load_state_dict(ours.state_dict())
                setattr(parent, name, theirs)
    return network


def _step(run: Run, network: nn.Module, optimiser, image: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    optimiser.zero_grad(set_to_none=True)
    with run.autocast():
        scores = network(image)
    value = loss(scores, labels)
    value.backward()
    optimiser.step()
    return value.detach()


def _batch(run: Run, slab: Slab, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    image, labels = slab.patches(run.batch, run.patch, generator)
    device = run.torch_device
    return image.to(device, memory_format=torch.channels_last_3d), labels.to(device)


def _size(slab: Slab) -> str:
    return "x".join(map(str, slab.labels.shape))


def _scores(values: list[float]) -> str:
    return ", ".join(f"{name} {value:.3f}" for name, value in zip(CLASSES, values, strict=True))
