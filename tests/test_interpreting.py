"""The quick interpreter of the tests computes what Triton's own does, bit by bit, and refuses what it refuses."""

from __future__ import annotations

import contextlib
import sys

import pytest
from guarded import subprocess_of

pytest.importorskip("triton")
import triton
import triton.language as tl


@triton.constexpr_function
def halved(value):
    return value / 2 if isinstance(value, float) else value // 2


@triton.jit
def mixtures(y_ptr, x_ptr, n, SIZE: tl.constexpr):
    """A row of results for each mixture of blocks, scalars, and constants of either type; signed zeros among them."""
    i = tl.arange(0, SIZE)
    x = tl.load(x_ptr + i)
    half = x.to(tl.float16)
    square = i[:, None] * n + i[None, :]
    rows = (
        x * 0.0, x * -0.0, x * 0, x + 1, x + 1.0, i + 1, i + 0.5, i - 3, 7 - i, 1 / (x + 1), i * n, n * i, n * x, x * n,
        i // 3, i % 3, (i - 4) // 3, (i * n).to(tl.int64) + i, (i < n).to(tl.int32), ((i < n) & (i > 1)).to(tl.int32),
        half * 3, half + half, half / 3, half / (half * 3 + 1), half * x,
        tl.sum(square, 1), tl.max(square, 0), tl.where(i < 4, x, -0.0),
        x + halved(7), x + halved(7.0), x + halved(True), -x, i << 2, (i ^ 5) | 1,
    )  # fmt: skip
    for k in tl.static_range(len(rows)):
        tl.store(y_ptr + k * SIZE + i, rows[k].to(tl.float32))


@triton.jit
def refused(y_ptr):
    tl.store(y_ptr + tl.arange(0, 8), tl.arange(0, 8) + 2**40)


def main(mode: str) -> None:
    import torch
    from interpreting import quick

    with quick() if mode == "quick" else contextlib.nullcontext():
        y, x = torch.full((40, 8), -1.0), torch.arange(8.0) - 3
        for n in (3, 5, 3):  # the third time all that is remembered is there
            mixtures[(1,)](y, x, n, 8)
            print(y.view(torch.int32).tolist())
        try:
            refused[(1,)](y.to(torch.int32))
            print("taken")
        except Exception as error:
            print(type(error).__name__)


def test_it_computes_the_same() -> None:
    plain, quick = (subprocess_of("test_interpreting.py", mode) for mode in ("plain", "quick"))
    assert plain.returncode == 0, plain.stderr[-2000:]
    assert len(set(plain.stdout.splitlines())) == 3
    assert quick.stdout == plain.stdout, quick.stderr[-2000:]


if __name__ == "__main__":
    main(*sys.argv[1:])
