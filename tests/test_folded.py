"""The engine for few channels: fuzzed over what is its own, every config, and what it leaves to others."""

from __future__ import annotations

import random

import pytest
import torch
from cases import DTYPES, LAYOUTS, PRECISIONS, Case, run
from guarded import subprocess_of

from triton_conv3d import engines
from triton_conv3d.problem import Problem

SEEDS = 100


def draw(pass_: str, seed: int) -> tuple[Case, object]:
    """A case with 1 to 8 channels to sum over, and a config of few programs."""
    rng = random.Random(f"folded-{pass_}-{seed}")
    folded = engines.get("folded")

    def triple(*choices: int) -> tuple[int, int, int]:
        return tuple(rng.choice(choices) for _ in range(3))

    while True:
        groups = rng.choice((1, 1, 1, 2, 3))
        few, many = groups * rng.choice((1, 1, 2, 3, 4, 5, 8)), groups * rng.choice((2, 3, 8, 16, 17, 40))
        dtype = rng.choice(DTYPES)
        case = Case(
            pass_, batch=rng.choice((1, 2)), in_channels=few if pass_ == "forward" else many,
            out_channels=many if pass_ == "forward" else few, input_size=triple(1, 2, 3, 4, 5, 6),
            kernel_size=triple(1, 2, 3, 3, 5), stride=triple(1, 1, 2, 3) if pass_ == "forward" else (1, 1, 1),
            padding=tuple(rng.choice((0, 1, 1, 2)) for _ in range(6)), dilation=triple(1, 1, 2), groups=groups,
            bias=pass_ == "forward" and rng.random() < 0.5, dtype=dtype,
            precision=rng.choice(PRECISIONS) if dtype == "float32" else "ieee",
            layouts=(rng.choice(tuple(LAYOUTS)), rng.choice(tuple(LAYOUTS))), channels_last=rng.random() < 0.5,
            exact=seed % 2 == 0, seed=seed,
        )  # fmt: skip
        problem = case.geometry()
        if min(problem.output_size) >= 1 and folded.supports(problem) is None:
            cheap = [c for c in folded.configs(problem) if folded.work(problem, c).programs <= 12]
            if cheap:
                return case, rng.choice(cheap)


@pytest.mark.parametrize("seed", range(SEEDS))
@pytest.mark.parametrize("pass_", ["forward", "dgrad"])
def test_fuzz(pass_: str, seed: int) -> None:
    case, config = draw(pass_, seed)
    run(case, "folded", config)


LARGE = Problem("forward", 2, 3, 512, (64, 64, 64), (3, 3, 3), arch="sm_90", device="any")  # takes every tile


@pytest.mark.parametrize("config", engines.get("folded").configs(LARGE), ids=str)
@pytest.mark.parametrize("pass_", ["forward", "dgrad"])
def test_every_config_is_exact(pass_: str, config) -> None:
    channels = dict(in_channels=3, out_channels=37) if pass_ == "forward" else dict(in_channels=37, out_channels=3)
    for shape in (
        dict(batch=2, input_size=(3, 7, 5), kernel_size=(3, 2, 3), padding=(1, 1, 0, 1, 1, 0)),
        dict(input_size=(1, 1, 300), kernel_size=(1, 1, 2)),
        dict(input_size=(5, 5, 5), kernel_size=(5, 1, 2), padding=(4, 4, 0, 0, 0, 0), groups=1, dilation=(2, 1, 3)),
    ):
        run(Case(pass_, dtype="float16", **channels, **shape), "folded", config)


@pytest.mark.parametrize("changes, reason", [
    (dict(in_channels=9), "9 channels"),
    (dict(pass_="wgrad"), "folds taps and channels already"),
    (dict(pass_="dgrad", out_channels=3, stride=(1, 2, 1)), "stride (1, 2, 1)"),
    (dict(groups=3, out_channels=3), "depthwise"),
    (dict(dtype="float64"), "float64"),
    (dict(batch=0), "nothing to multiply"),
    (dict(arch="cpu"), "TRITON_INTERPRET"),
], ids=lambda value: str(value) if isinstance(value, dict) else "")  # fmt: skip
def test_what_it_leaves_to_others(changes: dict, reason: str) -> None:
    problem = LARGE.replace(arch="interpreter")
    assert engines.get("folded").supports(problem) is None
    assert reason in engines.get("folded").supports(problem.replace(**changes))


def test_nothing_is_copied_for_a_layout() -> None:
    problem = LARGE.replace(layouts=("contiguous", "strided", "contiguous"))
    assert engines.get("folded").memory(problem, engines.get("folded").configs(problem)[0]).copies == 0


@pytest.mark.parametrize("at_end", [True, False], ids=["end", "start"])
def test_between_pages_that_fault(at_end: bool) -> None:
    done = subprocess_of("test_folded.py", "end" if at_end else "start")
    assert done.returncode == 0 and done.stdout.endswith("done\n"), done.stdout[-300:] + done.stderr[-2000:]


if __name__ == "__main__":
    import sys

    from guarded import guards

    torch.set_num_threads(1)
    for mine in ("forward", "dgrad"):
        for number in range(8):
            tried, chosen = draw(mine, number)
            print(tried, chosen, flush=True)
            with guards(sys.argv[1] == "end") as fresh:
                run(tried, "folded", chosen, fresh)
    print("done")
