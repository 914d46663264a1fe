"""Where the tests run: in Triton's interpreter if there is no GPU, and with a cache directory of their own."""

from __future__ import annotations

import os
import tempfile

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports triton

_cache = tempfile.TemporaryDirectory(prefix="triton_conv3d_tests_")
os.environ["TRITON_CONV3D_CACHE_DIR"] = os.path.join(_cache.name, "cache")
