"""What a call costs the host, before any kernel runs: microseconds, least of several rounds.

    python -m perf.host_cost

The launch is left out, so this needs no GPU: what remains is checks, the op's dispatch, the look-up of the plan, the
engine's arithmetic and the result's allocation. Where there is a GPU, a call with its launch stands beside.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
import timeit
from collections.abc import Callable, Iterator

import torch

from triton_conv3d import Conv3d, settings
from triton_conv3d.compile_backend import backend
from triton_conv3d.engines import launching
from triton_conv3d.ops import problems
from triton_conv3d.tuning import select

_CALLS, _ROUNDS = 2000, 7
_ROWS = 2, 12  # convolutions of a short and of a long row
_GEOMETRY = ((1, 1, 1), (1,) * 6, (1, 1, 1), 1)
_LAST = {"memory_format": torch.channels_last_3d}
_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LIMITS_US = {"select": 3.0, "module forward": 25.0}  # of one call; the project's own bars


def measure(function: Callable[[], object], calls: int = _CALLS, rounds: int = _ROUNDS) -> float:
    """Microseconds of processor time of one call: the least of some rounds, for whatever disturbs can only add."""
    return min(timeit.repeat(function, timer=time.process_time, number=calls, repeat=rounds)) / calls * 1e6


def costs(calls: int = _CALLS, rounds: int = _ROUNDS) -> dict[str, float]:
    """By name: a look-up of a known plan, calls of module and op, and torch's own module on the meta device beside."""
    layer, x = Conv3d(32, 32, 3, padding=1).to(_DEVICE, torch.float16, **_LAST), _input()
    problem = problems(x, layer.weight, layer.bias, *_GEOMETRY)[0]
    inner = torch.nn.Conv3d(32, 32, 3, padding=1, device="meta", dtype=torch.float16).to(**_LAST)
    y = x.to("meta")
    with _nothing_launched(), torch.no_grad():
        layer(x)  # chooses the plan
        found = {
            "select": measure(lambda: select(problem), calls, rounds),
            "op": measure(
                lambda: torch.ops.triton_conv3d.conv3d(x, layer.weight, layer.bias, *_GEOMETRY), calls, rounds
            ),
            "module forward": measure(lambda: layer(x), calls, rounds),
        }
    with _nothing_launched():
        x.requires_grad_()
        found["module forward, recorded for backward"] = measure(lambda: layer(x), calls, rounds)
    if _DEVICE == "cuda":
        with settings.configure(autotune="off", engine="implicit_gemm"), torch.no_grad():
            layer(x)  # compiles
            found["module forward, launched"] = measure(lambda: layer(x), calls, rounds)
    with torch.no_grad():
        found["torch's module on the meta device"] = measure(lambda: inner(y), calls, rounds)
    return found


@contextlib.contextmanager
def _nothing_launched() -> Iterator[None]:
    """Nor is anything tuned, by times and results of what did not run."""
    with settings.configure(autotune="off", engine="implicit_gemm"), launching.replaced(lambda *launch: None):
        yield


def _input() -> torch.Tensor:
    return torch.empty(1, 32, 4, 4, 4, dtype=torch.float16, device=_DEVICE).to(**_LAST)


def in_graphs(calls: int = _CALLS // 10, rounds: int = 3 * _ROUNDS) -> dict[str, float]:
    """By name: what one more convolution costs in a row of calls of the op, and in a compiled graph of such a row.

    The difference of a long and a short row, the two kinds measured in turns; of one layer again and again, since torch
    takes time for every parameter that a graph is given.
    """
    x, inner = _input(), "aot_eager"
    functions: dict[tuple[str, int], Callable[[], object]] = {}
    for length in _ROWS:
        layer = torch.nn.Conv3d(32, 32, 3, padding=1).to(_DEVICE, torch.float16, **_LAST)
        row = torch.nn.Sequential(*[layer] * length)

        def call_ops(layer=layer, length=length) -> torch.Tensor:
            y = x
            for _ in range(length):
                y = torch.ops.triton_conv3d.conv3d.default(y, layer.weight, layer.bias, *_GEOMETRY)
            return y

        compiled = torch.compile(row, backend=backend, options={"inner": inner}, dynamic=False)
        functions["op in a row", length] = call_ops
        functions[f"op in a graph, {inner}", length] = lambda compiled=compiled: compiled(x)
    with _nothing_launched(), torch.no_grad():
        for function in functions.values():
            function()
        turns = [{key: measure(f, calls, 1) for key, f in functions.items()} for _ in range(rounds)]
    least = {key: min(turn[key] for turn in turns) for key in functions}
    short, long = _ROWS
    return {name: (least[name, long] - least[name, short]) / (long - short) for name, length in functions if length == long}


def main() -> int:
    over = []
    for name, microseconds in {**costs(), **in_graphs()}.items():
        limit = LIMITS_US.get(name)
        print(f"{name:40} {microseconds:7.2f} us" + (f"  at most {limit:g}" if limit else ""))
        if limit and microseconds > limit:
            over.append(name)
    return 1 if over else 0


if __name__ == "__main__":
    if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        os.execve(sys.executable, [sys.executable, "-m", "perf.host_cost"], {**os.environ, "TRITON_INTERPRET": "1"})
    sys.exit(main())
