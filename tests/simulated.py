"""A GPU that is made up: the cost model is its truth, but for biases that the search is not told of.

    true = predicted * engine's bias * tile's bias * schedule's bias * surprise * of this problem alone

Biases are fixed for a GPU, that is a seed, and a pass. Surprises are planted: one variant in six runs in half or in 2.5
times what its tile would let expect, on wide or on narrow layers only. Measured times are noisy, and now and then disturbed.
"""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Callable, Sequence

from triton_conv3d.problem import PASSES, Problem
from triton_conv3d.tuning.search import Candidate, Ranked

ENGINE, TILE, SCHEDULE, ALONE = 0.35, 0.3, 0.1, 0.04  # standard deviations of logarithms
SURPRISES, FASTER, SLOWER = 1 / 6, 0.5, 2.5
NOISE, DISTURBED, DISTURBANCE = 0.02, 0.02, 1.5  # of one measurement
_TILE_KNOBS = ("block_m", "block_n", "kernel", "rows", "columns", "channels_last", "benchmark")


class SimulatedGPU:
    def __init__(self, seed: int):
        self.seed, self.known = seed, {}

    def _draw(self, *key: object) -> random.Random:
        return random.Random(f"{self.seed} {key}")

    def _bias(self, deviation: float, *key: object) -> float:
        if key not in self.known:
            self.known[key] = deviation * self._draw(*key).gauss(0, 1)
        return self.known[key]

    def _surprise(self, problem: Problem, name: str, variant: tuple) -> float:
        wide = min(problem.group_in, problem.group_out) >= 64
        key = ("surprise", problem.pass_, name, variant, wide)
        if key not in self.known:
            draw = self._draw(*key)
            planted = draw.random() < SURPRISES
            self.known[key] = math.log(FASTER if draw.random() < 0.5 else SLOWER) if planted else 0.0
        return self.known[key]

    def true(self, problem: Problem, ranked: Ranked) -> float:
        """Seconds without noise."""
        predicted, engine, config = ranked
        knobs = config.to_dict()
        splits = knobs.pop("splits", 1)
        computing = knobs.pop("engine", engine.NAME)  # it has the same kernels behind another engine
        where, variant = (problem.pass_, computing), tuple(knobs.values())
        tile = tuple(knobs[name] for name in _TILE_KNOBS if name in knobs)
        logarithm = self._bias(ENGINE / 2, problem.pass_, engine.NAME) if computing != engine.NAME else 0.0
        logarithm += self._bias(ENGINE, *where) + self._bias(TILE, *where, tile) + self._bias(SCHEDULE, *where, variant)
        logarithm += self._bias(SCHEDULE, *where, "split") * (splits > 1) + self._surprise(problem, computing, variant)
        return predicted * math.exp(logarithm + ALONE * self._draw(problem.key, engine.NAME, variant, splits).gauss(0, 1))

    def times(self, problem: Problem, ranked: Sequence[Ranked]) -> dict[tuple, float]:
        return {(engine.NAME, config): self.true(problem, (seconds, engine, config)) for seconds, engine, config in ranked}

    def measure(self, times: dict[tuple, float], counts: dict[tuple, int]) -> Callable[[Candidate, int], float]:
        """The callable that a search takes; ``counts`` how often each candidate was launched. Every problem has a noise of its
        own, so that what an engine adds to one of them changes no other.
        """
        noise = self._draw("noise", *times.values())

        def measure(candidate: Candidate, repetitions: int) -> float:
            key = (candidate[0].NAME, candidate[1])
            counts[key] = counts.get(key, 0) + repetitions
            return statistics.median(_measured(noise, times[key]) for _ in range(repetitions))

        return measure


def _measured(noise: random.Random, seconds: float) -> float:
    disturbed = noise.random() < DISTURBED
    return seconds * math.exp(NOISE * noise.gauss(0, 1)) * (DISTURBANCE if disturbed else 1.0)


def random_problem(draw: random.Random, device: str, arch: str) -> Problem:
    """Any layer that a network might have."""

    def channels() -> int:
        return draw.choice([draw.choice([1, 2, 3, 4]), 8 * draw.randint(1, 16), 32 * draw.randint(1, 16), draw.randint(5, 200)])

    kernel = draw.choice([(3, 3, 3)] * 4 + [(1, 3, 3), (3, 1, 1), (5, 5, 5), (2, 2, 2), (1, 1, 1)])
    depth = 2 ** draw.randint(2, 7) + draw.randint(0, 3)
    size = (max(kernel[0], depth // draw.choice([1, 1, 4])), depth, depth)
    groups = 1
    into, out = channels(), channels()
    if draw.random() < 0.1:
        groups = into = out = 8 * draw.randint(1, 32)
    dtype = draw.choice(["float16", "bfloat16", "float32"])
    stride = draw.choice([(1, 1, 1)] * 3 + [(2, 2, 2), (1, 2, 2)])
    unit = 4 if dtype == "float32" else 8
    return Problem(
        draw.choice(PASSES), draw.choice([1, 1, 2, 4]), into, out, size, kernel, stride,
        tuple(k // 2 for k in kernel for _ in range(2)), groups=groups, dtype=dtype,
        precision=draw.choice(["tf32", "ieee"]) if dtype == "float32" else "ieee",
        alignment=16 if into % unit == out % unit == 0 else math.gcd(16, into * 32 // (unit * 2), out * 32 // (unit * 2)),
        device=device, arch=arch,
    )  # fmt: skip


def regret(times: dict[tuple, float], chosen: tuple) -> float:
    """By which part a choice is slower than the best of all."""
    return times[chosen] / min(times.values()) - 1


def percentile(values: Sequence[float], part: float) -> float:
    return sorted(values)[math.ceil(part * len(values)) - 1]
