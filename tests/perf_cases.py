"""Tiny layers, a machine that is not there, and providers that misbehave: what tests of perf measure with."""

from __future__ import annotations

import torch
from cases import DEVICE

from perf.machine import PRODUCTS, Ceilings, Machine
from perf.providers import Prepared
from perf.results import Stamp
from perf.threads import MAIN
from perf.timing import Sample
from perf.workloads import Case, Workload
from triton_conv3d.problem import device_name
from triton_conv3d.workload import Layer

LAYER = Layer("t.plain", 2, 3, 4, (2, 3, 3), (2, 2, 3), (1, 2, 1), (1, 0, 1), (1, 1, 1), 1, True, "fp16")
# As the convolution whose input gradient it computes; one pixel of output padding along W.
TRANSPOSED = Layer("t.transposed", 1, 4, 2, (3, 3, 4), (3, 3, 3), (2, 2, 2), (1, 1, 1), (1, 1, 1), 2, False, "fp32")
WORKLOADS = {"plain": Workload(LAYER, "t", "tiny"), "transposed": Workload(TRANSPOSED, "t", "tiny", transposed=True)}

STAMP = Stamp(*device_name(DEVICE), "1", "2", "3", "4", "5", "abc", "scripted")
CEILINGS = Ceilings(copy_gbps=2.0, matmul_tflops={key: 0.5 for key in PRODUCTS})


def case(name: str = "plain", pass_: str = "forward", dtype: str | None = None, **more) -> Case:
    workload = WORKLOADS[name]
    return Case(workload, pass_, dtype or workload.layer.dtype, **more)


class FakeTimer:
    """Calls what it times, and says that it took the seconds that it has for an attribute, or these.

    bytes_: allocated before a call, and at most during it.
    """

    def __init__(self, bytes_: tuple[int, int] | None = None, seconds: float = 0.1):
        self.bytes, self.seconds = bytes_, seconds

    def time(self, function, ahead=0.0):
        function()
        return Sample(getattr(function, "seconds", self.seconds), 1e-5)

    def allocated(self):
        return self.bytes and self.bytes[0]

    def highest(self, function):
        return function(), self.bytes and self.bytes[1]


def machine(timer: FakeTimer | None = None, **stamp) -> Machine:
    values = {**vars(STAMP), **stamp}
    return Machine(DEVICE, *device_name(DEVICE), Stamp(**values), timer or FakeTimer(), CEILINGS)


class Right:
    """Computes what torch does, in so many seconds."""

    thread = MAIN

    def __init__(self, name: str = "right", seconds: float = 0.1):
        self.name, self.seconds = name, seconds
        self.prepared: list[str] = []

    def prepare(self, case, tensors):
        self.prepared.append(case.key)
        (problem,) = tensors.problems
        x, w, _, b = tensors.operands(problem)[:4]

        def call():
            return (torch.nn.functional.conv3d(x, w, b, *geometry),)

        layer = case.workload.layer
        geometry = (layer.stride, layer.padding, layer.dilation, layer.groups)
        call.seconds = self.seconds
        return Prepared(call)


class Wrong(Right):
    """Leaves one element out."""

    def prepare(self, case, tensors):
        right = super().prepare(case, tensors)

        def call():
            (result,) = right.call()
            result.view(-1)[-1] = 0
            return (result,)

        return Prepared(call)


class Raises(Right):
    """Raises this error in the call of this number; 0: when it is prepared."""

    def __init__(self, name: str, error: BaseException, number: int = 0):
        super().__init__(name)
        self.error, self.number = error, number

    def prepare(self, case, tensors):
        right, calls = super().prepare(case, tensors), 0
        if not self.number:
            raise self.error

        def call():
            nonlocal calls
            calls += 1
            if calls == self.number:
                raise self.error
            return right.call()

        return Prepared(call)
