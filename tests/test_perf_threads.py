"""Threads: whoever lets cuDNN search is called in a thread to himself, from being prepared to being timed."""

from __future__ import annotations

import threading

import perf_cases
import pytest
import torch

from perf import run
from perf.providers import PROVIDERS
from perf.threads import MAIN, separately
from triton_conv3d import engines


def here() -> int:
    return threading.get_ident()


def test_a_name_is_a_thread():
    first, other = separately("first", here), separately("other", here)
    assert len({first, other, here()}) == 3
    assert separately("first", here) == first and separately(MAIN, here) == here()


@pytest.mark.parametrize("thread", ("first", MAIN))
def test_errors_come_through_and_the_thread_goes_on(thread):
    def fail():
        raise KeyError("x")

    with pytest.raises(KeyError, match="x"):
        separately(thread, fail)
    assert separately(thread, lambda: 5) == 5


@pytest.mark.parametrize("thread", ("first", MAIN))
def test_backward_stays_in_the_thread(thread):
    enabled = torch._C._is_multithreading_enabled
    seen: list = []

    def train():
        x = torch.ones(2, requires_grad=True)
        x.register_hook(lambda grad: seen.append(here()))
        x.sum().backward()
        return here(), enabled()

    ident, multithreading = separately(thread, train)
    assert seen == [ident] and not multithreading
    assert enabled()


def test_the_search_is_kept_apart():
    """torch with cudnn.benchmark, torch without it, and ours, which has the search among its candidates."""
    bench = {PROVIDERS[name].thread for name in ("torch_bench", "torch_cl_bench")}
    plain = {PROVIDERS[name].thread for name in ("torch", "torch_cl", "compile")}
    ours = {PROVIDERS[name].thread for name in ("ours", *engines.available())}
    assert len(bench) == len(plain) == len(ours) == 1 and len(bench | plain | ours) == 3 and plain == {MAIN}


def test_everything_of_a_provider_happens_in_its_thread(tmp_path):
    seen: dict[str, set[int]] = {}

    class Watched(perf_cases.Right):
        def __init__(self, name, thread):
            super().__init__(name)
            self.thread = thread

        def prepare(self, case, tensors):
            seen.setdefault(self.name, set()).add(here())
            right = super().prepare(case, tensors)

            def call():
                seen[self.name].add(here())
                return right.call()

            return perf_cases.Prepared(call)

    chosen = [Watched("a", "first"), Watched("b", "other"), Watched("c", "first"), Watched("d", MAIN)]
    counts = run.measure(
        [perf_cases.case()], chosen, tmp_path / "file.csv", suite="t", machine=perf_cases.machine(), show=False
    )
    assert counts == {"ok": 4}
    first, other = separately("first", here), separately("other", here)
    assert seen == {"a": {first}, "b": {other}, "c": {first}, "d": {here()}}
