"""Where the tests run: in Triton's interpreter if there is no GPU, and with a cache directory of their own."""

from __future__ import annotations

import os
import tempfile

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports triton

_cache = tempfile.TemporaryDirectory(prefix="triton_conv3d_tests_")
os.environ["TRITON_CONV3D_CACHE_DIR"] = os.path.join(_cache.name, "cache")


@pytest.fixture
def posed(monkeypatch) -> list:
    """The problems that are computed from now on, in their order."""
    from triton_conv3d import tuning

    found, run = [], tuning.run
    monkeypatch.setattr(tuning, "run", lambda problem, operands: found.append(problem) or run(problem, operands))
    return found
