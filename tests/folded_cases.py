"""Drawn cases of the engine for few channels."""

from __future__ import annotations

import dataclasses
import random

from cases import DTYPES, LAYOUTS, PRECISIONS, Case

from triton_conv3d import engines


def draw(pass_: str, seed: int) -> tuple[Case, object]:
    """A case with 1 to 8 channels to sum over, or of wgrad so many filters, and a config of few programs."""
    rng = random.Random(f"folded-{pass_}-{seed}")
    folded = engines.get("folded")

    def triple(*choices: int) -> tuple[int, int, int]:
        return tuple(rng.choice(choices) for _ in range(3))

    while True:
        head = pass_ == "wgrad" and rng.random() < 0.3
        groups = 1 if head else rng.choice((1, 1, 1, 2, 3))
        gather = pass_ == "dgrad" or head
        few, many = groups * rng.choice((1, 1, 2, 3, 4, 5, 8)), groups * rng.choice((2, 3, 8, 16, 17, 40))
        dtype = rng.choice(DTYPES)
        case = Case(
            pass_, batch=rng.choice((1, 2)), in_channels=many if gather else few,
            out_channels=few if gather else many, input_size=triple(1, 2, 3, 4, 5, 6),
            kernel_size=triple(1, 2, 3, 3, 5), stride=(1, 1, 1) if head else triple(1, 1, 2, 3),
            padding=tuple(rng.choice((0, 1, 1, 2)) for _ in range(6)), dilation=triple(1, 1, 2), groups=groups,
            bias=pass_ == "forward" and rng.random() < 0.5, dtype=dtype,
            precision=rng.choice(PRECISIONS) if dtype == "float32" else "ieee",
            layouts=(rng.choice(tuple(LAYOUTS)), rng.choice(tuple(LAYOUTS))), channels_last=rng.random() < 0.5,
            exact=seed % 2 == 0, seed=seed,
        )  # fmt: skip
        problem = case.geometry()
        if min(problem.output_size) >= 1 and folded.supports(problem) is None:
            splits = rng.choice((1, 2, 5))
            offers = [dataclasses.replace(c, splits=splits) if pass_ == "wgrad" else c for c in folded.configs(problem)]
            works = [folded.work(problem, c) for c in offers]
            cheap = [c for c, w in zip(offers, works, strict=True) if w.programs <= 12 and w.programs * w.iterations <= 60]
            if cheap:
                return case, rng.choice(cheap)
