"""Threads that keep apart what torch remembers for each thread.

For each convolution torch keeps one cuDNN plan a thread, whether ``cudnn.benchmark`` searched for it or a heuristic
proposed it (``benchmark_cache`` in ATen/native/cudnn/Conv_v8.cpp): the first call of a shape decides for all later ones.
So whoever searches needs a thread to himself, or torch with and without the search would be timed as the same thing.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

MAIN = ""
_T = TypeVar("_T")
_threads: dict[str, ThreadPoolExecutor] = {}


def separately(thread: str, function: Callable[[], _T]) -> _T:
    """What ``function()`` returns or raises, called in the thread of this name; :data:`MAIN` is the caller's own.

    Backward passes run in that thread too, instead of in one that autograd has for all.
    """
    device = torch.cuda.current_device() if torch.cuda.is_available() else None

    def there() -> _T:
        if device is not None:
            torch.cuda.set_device(device)
        with torch.autograd.set_multithreading_enabled(False):
            return function()

    if thread == MAIN:
        return there()
    if thread not in _threads:
        _threads[thread] = ThreadPoolExecutor(1, f"perf-{thread}")
    return _threads[thread].submit(there).result()
