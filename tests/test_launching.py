"""The door through which every kernel is launched: what it refuses, where it launches, and when it asks Triton which of its
compiled kernels is meant. That what is launched then is the same, numbers and all, tests/test_launches.py shows."""

from __future__ import annotations

import inspect
import types
from collections import namedtuple

import pytest
import torch

from triton_conv3d.engines import launching
from triton_conv3d.engines.launching import launch_kernel, same_options


@pytest.mark.parametrize("grid", [(0, 1), (1, 0), (2**31, 1), (1, 65_536), (2**20, 2**12)])
def test_grids_that_triton_would_skip_are_refused(grid: tuple[int, int]) -> None:
    def kernel() -> None: ...

    launched = []
    with launching.replaced(lambda *call: launched.append(call)):
        with pytest.raises(ValueError, match=rf"grid=\({grid[0]}, {grid[1]}\) of kernel"):
            launching.launch_kernel(kernel, grid, (), {})
        launching.launch_kernel(kernel, (2**31 - 1, 1), (), {})
    assert len(launched) == 1


def test_a_kernel_runs_on_the_device_of_its_tensors(monkeypatch) -> None:
    """Triton takes the current device, which need not be the tensors' own."""
    entered = []

    class Entered:
        def __init__(self, device):
            self.device = device

        def __enter__(self):
            entered.append(self.device)

        def __exit__(self, *exc):
            entered.append(None)

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", Entered)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    kernel = types.SimpleNamespace(__name__="kernel", run=lambda *args, **options: entered.append("run"))
    for index in (0, 1):
        tensor = types.SimpleNamespace(device=torch.device("cuda", index))
        launching.launch_kernel(kernel, (1, 1), (tensor,), {})
    assert entered == ["run", torch.device("cuda", 1), "run", None]


Asked = namedtuple("Asked", "grid args options")
Again = namedtuple("Again", "grid args")


class Kernel:
    """As Triton's, with a parameter that has a default; ``log`` tells who asked it, and who launched what it compiled."""

    __name__ = "kernel"

    def __init__(self) -> None:
        self.log: list[Asked | Again] = []
        self.signature = inspect.signature(lambda x, y, number, size, slope, BLOCK, INDEX, SKIPPED=False: None)

    def run(self, *args, grid, warmup, **options):
        self.log.append(Asked(grid, args, options))
        return Compiled(self)


class Compiled:
    packed_metadata = ()

    def __init__(self, kernel: Kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        return lambda *args: self.kernel.log.append(Again(grid, args))


class Descriptor:
    def __init__(self, dtype: torch.dtype, *block: int):
        self.base, self.block_shape = torch.empty(1, dtype=dtype), list(block)


X = torch.empty(64)
ARGS = {"x": X, "y": X, "number": 7, "size": (3, 4), "slope": 0.5}
OPTIONS = {"BLOCK": 64, "INDEX": "int32", "num_warps": 4}


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch) -> None:
    monkeypatch.setattr(launching, "_known", {})


def twice(first: dict, second: dict, options: tuple[dict, dict] = (same_options(**OPTIONS),) * 2) -> list[Asked | Again]:
    kernel = Kernel()
    for args, given in zip((first, second), options, strict=True):
        launch_kernel(kernel, (5, 6), tuple(args.values()), given)
    return kernel.log


def test_triton_is_asked_once() -> None:
    """And is told what its kernel's launch is told: every parameter in its order, those with a default too."""
    asked, again = twice(ARGS, ARGS)
    assert asked == Asked((5, 6, 1), tuple(ARGS.values()), OPTIONS | {"enable_fp_fusion": True})
    assert again == Again((5, 6, 1), (*ARGS.values(), 64, "int32", False))


SAME = {
    "other_tensors": {"x": torch.empty(8), "y": torch.nn.Parameter(torch.empty(64))},
    "as_far_from_16_bytes": {"x": X[2:], "y": X[6:]},
    "other_slope": {"slope": 0.25},
    "same_block": {"x": X, "y": Descriptor(torch.float16, 1, 64)},
}
OTHER = {
    "misaligned": {"x": X[1:]},
    "dtype": {"x": X.half()},
    "number": {"number": 16},
    "size": {"size": (3, 5)},
    "nothing": {"y": None},
    "no_slope": {"slope": None},
    "a_descriptor": {"y": Descriptor(torch.float16, 1, 64)},
}
BEFORE = {"as_far_from_16_bytes": {"x": X[6:], "y": X[2:]}, "same_block": SAME["same_block"]}


@pytest.mark.parametrize("name", SAME)
def test_what_triton_does_not_look_at_asks_nothing(name: str) -> None:
    log = twice(ARGS | BEFORE.get(name, {}), ARGS | SAME[name])
    assert [type(entry) for entry in log] == [Asked, Again]
    given = tuple((ARGS | SAME[name]).values())
    assert all(a is b for a, b in zip(log[1].args, given, strict=False))


@pytest.mark.parametrize("name", OTHER)
def test_what_triton_looks_at_asks_again(name: str) -> None:
    assert [type(entry) for entry in twice(ARGS, ARGS | OTHER[name])] == [Asked, Asked]


@pytest.mark.parametrize("other", [Descriptor(torch.float16, 1, 32), Descriptor(torch.bfloat16, 1, 64)], ids=["block", "dtype"])
def test_of_a_descriptor_block_and_type_are_looked_at(other: Descriptor) -> None:
    first = Descriptor(torch.float16, 1, 64)
    assert [type(entry) for entry in twice(ARGS | {"x": X, "y": first}, ARGS | {"y": other})] == [Asked, Asked]


def test_other_options_ask_again() -> None:
    one, other = same_options(**OPTIONS), same_options(**OPTIONS | {"BLOCK": 32})
    assert [type(entry) for entry in twice(ARGS, ARGS, (one, other))] == [Asked, Asked]


def test_another_kernel_of_the_same_options_is_asked_too() -> None:
    kernels = Kernel(), Kernel()
    for kernel in kernels:
        launch_kernel(kernel, (1, 1), tuple(ARGS.values()), same_options(**OPTIONS))
    assert [[type(entry) for entry in kernel.log] for kernel in kernels] == [[Asked], [Asked]]


def test_another_device_asks_again(monkeypatch) -> None:
    entered = []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "device", lambda device: entered.append(device.index) or torch.no_grad())
    kernel = Kernel()
    for index in (0, 1, 1, 0):
        target = Descriptor(torch.float16, 1)
        target.device = torch.device("cuda", index)
        launch_kernel(kernel, (1, 1), (target,), same_options(**OPTIONS))
    assert [type(entry) for entry in kernel.log] == [Asked, Asked, Again, Again] and entered == [1, 1]


@pytest.mark.parametrize("name", ("AMD", "unknown_kind", "interpreter"))
def test_where_more_decides_triton_is_asked_always(name: str, monkeypatch) -> None:
    args = ARGS
    if name == "AMD":
        monkeypatch.setattr(torch.version, "hip", "7.0")
    elif name == "unknown_kind":
        args = ARGS | {"number": object()}
    else:
        monkeypatch.setattr(Kernel, "run", lambda self, *args, **options: self.log.append(Asked((), args, options)))
    assert [type(entry) for entry in twice(args, args)] == [Asked, Asked]


def test_a_failed_launch_is_not_kept(monkeypatch) -> None:
    def fails(self, *args, **options):
        raise RuntimeError("out of resource")

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="out of resource"):
        patch.setattr(Kernel, "run", fails)
        twice(ARGS, ARGS)
    assert not launching._known


def test_what_replaces_launching_gets_every_launch() -> None:
    kernel, replaced = Kernel(), []
    call = kernel, (1, 1), tuple(ARGS.values()), same_options(**OPTIONS)
    launch_kernel(*call)
    with launching.replaced(lambda *launch: replaced.append(launch)):
        launch_kernel(*call)
    launch_kernel(*call)
    assert [type(entry) for entry in kernel.log] == [Asked, Again] and len(replaced) == 1


def test_only_so_many_are_kept(monkeypatch) -> None:
    monkeypatch.setattr(launching, "_MOST_KNOWN", 2)
    kernel = Kernel()
    for number in (1, 2, 3, 3):
        launch_kernel(kernel, (1, 1), (X, number), same_options(**OPTIONS))
    assert len(launching._known) == 1 and [type(entry) for entry in kernel.log] == [Asked] * 3 + [Again]


def test_no_other_options_take_the_place_of_those_that_are_known() -> None:
    kernel = Kernel()
    for block in range(9):
        launch_kernel(kernel, (1, 1), (X,), {**OPTIONS, "BLOCK": block})
    assert [type(entry) for entry in kernel.log] == [Asked] * 9


def test_the_same_options_are_one_dict() -> None:
    assert same_options(BLOCK=1, FLAT=True) is same_options(BLOCK=1, FLAT=True)
    assert same_options(BLOCK=1) is not same_options(BLOCK=True)
