"""Depthwise cases: seeded drawing over everything that the engine takes, at sizes that the interpreter computes at once."""

from __future__ import annotations

import dataclasses
import importlib
import itertools
import math
import random
import sys

from cases import _READ, DTYPES, LAYOUTS, PRECISIONS, Case, make, run, small
from guarded import guards, overflow_checked, run_large
from interpreting import quick

from triton_conv3d.engines.base import Config
from triton_conv3d.problem import PASSES, Problem, met_taps

ENGINE = importlib.import_module("triton_conv3d.engines.depthwise")
KERNELS = ((3, 3, 3), (5, 5, 5), (7, 7, 7), (1, 3, 3), (1, 5, 5), (1, 7, 7), (3, 1, 1), (5, 1, 1), (1, 1, 9), (1, 1, 1))
LAST, FIRST = ("channels_last", "channels_last"), ("contiguous", "contiguous")
_MOST_OPERATIONS = (400, 400, 400, 1200)  # of one case in the interpreter: some 25 to 75 milliseconds


def depthwise(pass_: str, channels: int = 4, multiplier: int = 1, **rest) -> Case:
    return Case(pass_, in_channels=channels, out_channels=channels * multiplier, groups=channels, **rest)


def large(pass_: str, dtype: str = "bfloat16", layout: str = "channels_last", **rest) -> Problem:
    """A layer on a GPU, large enough for every strip."""
    shape = dict(
        batch=2, in_channels=64, out_channels=64, input_size=(64, 56, 64), kernel_size=(3, 3, 3), padding=(1,) * 6
    )
    return Problem(
        pass_, **{**shape, **rest}, groups=64, dtype=dtype, layouts=(layout,) * 3, arch="sm_90", device="any"
    )


def fuzz_case(pass_: str, seed: int) -> tuple[Case, Config]:
    """What a seed tries: a case, exact integers, and one of its configs."""
    rng = random.Random(f"depthwise-{pass_}-{seed}")
    while True:
        case = _draw(rng, pass_, seed)
        config = case and _config(rng, case.geometry())
        if config:
            return case, config


def _draw(rng: random.Random, pass_: str, seed: int) -> Case | None:
    kernel = rng.choice(KERNELS) if rng.random() < 0.6 else tuple(rng.choice((1, 2, 3, 4)) for _ in range(3))
    stride = (1, 1, 1) if rng.random() < 0.5 else tuple(rng.choice((1, 2, 2, 3)) for _ in range(3))
    dilation = (1, 1, 1) if rng.random() < 0.7 else tuple(rng.choice((1, 2, 3, 9)) for _ in range(3))
    if rng.random() < 0.5:  # as torch's "same", of odd kernels
        padding = tuple((k - 1) * d // 2 for k, d in zip(kernel, dilation, strict=True))
        padding = tuple(itertools.chain.from_iterable((p, p) for p in padding))
    else:
        padding = tuple(rng.choice((0, 0, 1, 2, 5)) for _ in range(6))
    channels = rng.choice((8, 16) if seed % 2 == 0 else (1, 2, 3, 5, 6, 11))
    dtype = rng.choice(DTYPES)
    case = Case(
        pass_,
        batch=rng.choice((1, 1, 2)),
        in_channels=channels,
        out_channels=channels * rng.choice((1, 1, 1, 2, 3)),
        input_size=tuple(rng.randint(1, most) for most in (3, 6, 10)),
        kernel_size=kernel,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=channels,
        bias=pass_ == "forward" and rng.random() < 0.5,
        dtype=dtype,
        precision=rng.choice(PRECISIONS) if dtype == "float32" else "ieee",
        layouts=tuple(rng.choice(("channels_last", "contiguous", *LAYOUTS)) for _ in _READ[pass_]),
        channels_last=rng.random() < 0.5,
        exact=True,
        seed=seed,
    )
    problem = case.geometry()
    return case if small(problem) and ENGINE.supports(problem) is None else None


def _config(rng: random.Random, problem: Problem) -> Config | None:
    offers = list(ENGINE.configs(problem))
    if rng.random() < 0.3:
        offers = [dataclasses.replace(offer, splits=rng.choice((2, 3, 5))) for offer in offers]
    most = rng.choice(_MOST_OPERATIONS)
    cheap = [offer for offer in offers if operations(problem, offer) <= most]
    return rng.choice(cheap) if cheap else None


def operations(problem: Problem, config: Config) -> float:
    """Tensor operations of a launch, about: the interpreter takes the same time for each, whatever its size."""
    work = ENGINE.work(problem, config)
    taps = met_taps(problem).count
    if problem.pass_ == "dgrad":
        taps *= problem.out_channels / problem.in_channels / math.prod(problem.stride)
    return work.programs * (20 + work.iterations * (10 + config.rows * config.columns * (2 * taps + 4)))


# ------------------------------------------------------------------------------------------- memory that cannot be overrun


def guarded_cases() -> list[Case]:
    """Ragged in every direction, so that every mask is needed; each read natively, without a copy."""
    rows = ("contiguous",) * 2
    geometries = (
        dict(in_channels=1, input_size=(1, 1, 1), kernel_size=(1, 1, 1)),
        dict(batch=2, in_channels=7, input_size=(2, 5, 3), padding=(1, 1, 2, 0, 0, 1)),
        dict(batch=2, in_channels=5, input_size=(2, 5, 4), padding=(1, 1, 1, 0, 0, 1), layouts=rows),
        dict(in_channels=3, input_size=(2, 3, 16), padding=(1,) * 6, layouts=rows, channels_last=False, dtype="float16"),
        dict(in_channels=6, stride=(2, 1, 2), input_size=(4, 3, 6), padding=(1, 1, 0, 0, 1, 0), dtype="float16"),
        dict(in_channels=6, stride=(2, 2, 2), input_size=(3, 4, 8), padding=(1,) * 6, layouts=rows, channels_last=False),
        dict(in_channels=16, kernel_size=(1, 2, 2), input_size=(2, 3, 9), dtype="float16"),
        dict(in_channels=3, multiplier=2, kernel_size=(2, 1, 2), input_size=(5, 4, 3), stride=(3, 2, 1)),
        dict(in_channels=3, multiplier=2, kernel_size=(2, 1, 2), input_size=(3, 4, 3), layouts=rows, channels_last=False),
        dict(in_channels=9, layouts=("cropped", "cropped"), kernel_size=(2, 2, 1)),
        dict(in_channels=9, layouts=("unaligned", "channel_slice"), channels_last=False, bias=True),
        dict(in_channels=2, kernel_size=(1, 1, 11), input_size=(1, 2, 12), dilation=(1, 1, 2), padding=(0, 0, 0, 0, 10, 9)),
    )  # fmt: skip
    cases = []
    for pass_, (seed, geometry) in itertools.product(PASSES, enumerate(geometries)):
        geometry = {
            **geometry,
            "bias": geometry.get("bias", False) and pass_ == "forward",
            "groups": geometry["in_channels"],
        }
        geometry["out_channels"] = geometry["in_channels"] * geometry.pop("multiplier", 1)
        cases.append(Case(pass_, seed=seed, **geometry))
    return cases


LARGE = [("batch", False), ("depth", False), ("height", False), ("width", False)]
LARGE += [("batch", True), ("channels", True), ("depth", True), ("height", True)]


def main(mode: str) -> None:
    if mode in ("end", "start"):
        with guards(mode == "end") as fresh:
            for i, case in enumerate(guarded_cases()):
                print(case, flush=True)
                offers = ENGINE.configs(make(case)[0])
                for config in {offers[0], offers[i % len(offers)]} if mode == "end" else {offers[-1]}:
                    run(case, ENGINE, dataclasses.replace(config, splits=1 + i % 2), fresh)
    elif mode == "checked":
        with overflow_checked():
            for case in guarded_cases():
                print(case, flush=True)
                run(case, ENGINE)
    elif mode == "large":
        with overflow_checked():
            for pass_, (crossing, contiguous) in itertools.product(PASSES, LARGE):
                print(pass_, crossing, contiguous, flush=True)
                run_large(ENGINE, pass_, crossing, contiguous)
    else:
        raise ValueError(f"mode {mode!r} is not known")
    print("done", mode, flush=True)


if __name__ == "__main__":
    with quick():
        for mode in sys.argv[1:]:
            main(mode)
