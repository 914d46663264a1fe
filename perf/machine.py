"""The machine that is measured on: its stamp for every row, and its ceilings, measured in the same run.

The ceilings are what a large copy and a large matrix product of torch's own reach here, not what a data sheet says.
"""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from triton_conv3d.problem import Problem, device_name
from triton_conv3d.tuning.environment import environment
from triton_conv3d.workload import DTYPES

from .results import Stamp
from .timing import POLICY, Call, DeviceTimer, Timer, race

_ROOT = Path(__file__).resolve().parent.parent
# What a measured time depends on in the project: its code, not the results or what is written about them.
_CODE = ("triton_conv3d", "perf", ":(exclude)perf/results", ":(exclude)*.md")
_COPY_BYTES = 2**30
_MATMUL = 8192  # rows and columns: 1.1 TFLOP
PRODUCTS = (("fp16", "ieee"), ("bf16", "ieee"), ("fp32", "tf32"), ("fp32", "ieee"))
_TF32X3_PRODUCTS = 3  # of tf32, to one of tf32x3


@dataclass(frozen=True)
class Ceilings:
    """
    copy_gbps: GB/s of a large copy, bytes read plus bytes written.
    matmul_tflops: TFLOP/s of a large matrix product, by (dtype, precision) as a :class:`perf.workloads.Case` has them.
    """

    copy_gbps: float
    matmul_tflops: dict[tuple[str, str], float]

    def tflops(self, dtype: str, precision: str) -> float:
        """The rate of products of a case; tf32x3 takes three of tf32."""
        if precision == "tf32x3":
            return self.matmul_tflops[dtype, "tf32"] / _TF32X3_PRODUCTS
        return self.matmul_tflops[dtype, precision]

    def least(self, problem: Problem, dtype: str, precision: str) -> float:
        """Seconds below which this problem cannot be computed: its roofline."""
        rate = self.tflops(dtype, precision) * 1e12
        return max(problem.flops / rate, problem.min_bytes / (self.copy_gbps * 1e9))


@dataclass(frozen=True)
class Machine:
    """
    gpu, arch: as of :class:`triton_conv3d.problem.Problem`.
    """

    device: torch.device
    gpu: str
    arch: str
    stamp: Stamp
    timer: Timer
    ceilings: Ceilings


def here(policy: str = POLICY) -> Machine:
    """The current GPU, its ceilings measured now.

    Args:
        policy: how times are taken, in a few words, for the stamp.

    Raises:
        ValueError: there is no GPU; the message says what can be run without one.
    """
    if not torch.cuda.is_available():
        raise ValueError(
            "torch sees no GPU, so nothing can be measured. Without one there are `python -m perf static`, which "
            "predicts, and `python -m perf validate --dry-run`, which lists what a GPU is needed for"
        )
    device = torch.device("cuda", torch.cuda.current_device())
    timer = DeviceTimer(device)
    return Machine(device, *device_name(device), stamp(device, policy), timer, ceilings(device, timer))


def stamp(device: torch.device, policy: str) -> Stamp:
    """What a row measured on this device, and by this policy, is stamped with."""
    names = environment(device)
    return Stamp(
        gpu=names["gpu"],
        arch=names["arch"],
        driver=names["driver"].partition(",")[0],
        torch=names["torch"],
        cuda=f"hip {torch.version.hip}" if torch.version.hip else str(torch.version.cuda or "none"),
        cudnn=names["cudnn"],
        triton=names["triton"],
        commit=_commit() or f"engines {names['engines'][:12]}",
        policy=policy,
    )


def ceilings(device: torch.device, timer: Timer) -> Ceilings:
    """Measured on random data, with the L2 cache overwritten as for everything else."""
    source = torch.empty(_COPY_BYTES, dtype=torch.uint8, device=device).random_()
    copy = 2 * _COPY_BYTES / _seconds(torch.empty_like(source).copy_, source, timer=timer) / 1e9
    del source
    rates = {}
    for dtype, precision in PRODUCTS:
        a, b = (torch.randn(_MATMUL, _MATMUL, device=device).to(DTYPES[dtype]) for _ in range(2))
        with tf32(precision == "tf32"):
            rates[dtype, precision] = 2 * _MATMUL**3 / _seconds(torch.mm, a, b, timer=timer) / 1e12
    return Ceilings(copy, rates)


def _seconds(function, *arguments, timer: Timer) -> float:
    times, errors = race({"ceiling": Call(lambda: function(*arguments))}, timer)
    for error in errors.values():
        raise error
    return times["ceiling"].median


@contextlib.contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Within the block torch's float32 convolutions and matrix products are tf32, or exact; afterwards as before."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    switches = (cudnn, matmul)  # these set the newer ones as well, which may have been set apart from each other
    parts = (cudnn.conv, cudnn.rnn, matmul)
    before = [switch.allow_tf32 for switch in switches]
    parts_before = [part.fp32_precision for part in parts]
    try:
        for switch in switches:
            switch.allow_tf32 = allowed
        yield
    finally:
        for switch, value in zip(switches, before, strict=True):
            switch.allow_tf32 = value
        for part, value in zip(parts, parts_before, strict=True):
            part.fp32_precision = value


def _commit() -> str | None:
    """The last commit that changed the code, ``+`` behind it if files differ from it; None outside a repository."""
    last = _git("log", "-1", "--format=%h", "--abbrev=12", "--", *_CODE)
    return last and last + ("+" if _git("status", "--porcelain", "--", *_CODE) else "")


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-c", "safe.directory=*", "-C", str(_ROOT), *arguments], capture_output=True, text=True, timeout=30
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
