"""Compiled variants that tuning draws from: how many there are, and what is lost by having no more."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import random
import statistics
from pathlib import Path

import pytest
from simulated import random_problem

from autotune import suites
from autotune import variants as choosing
from perf import workloads
from triton_conv3d import engines
from triton_conv3d.engines.hopper.gluon import IM2COL
from triton_conv3d.problem import Problem
from triton_conv3d.tuning import variants
from triton_conv3d.tuning.search import OWN
from triton_conv3d.tuning.select import ranking

pytestmark = pytest.mark.usefixtures("proven")
GPU = ("NVIDIA H200", "sm_90")
REAL = Path(workloads.__file__).with_name("real.json")


def real() -> list[Problem]:
    return [p for case in workloads.cases(workloads.real()) for p in case.problems(*GPU)]


@functools.cache
def problems() -> tuple[Problem, ...]:
    """All real layers, and random ones, of which the depthwise ones in both layouts."""
    draw = random.Random(8)
    drawn = [random_problem(draw, *GPU) for _ in range(600)]
    drawn += [p.replace(layouts=("contiguous",) * 3) for p in drawn if p.groups > 1]
    return tuple(dict.fromkeys([*real(), *(p for p in drawn if min(p.output_size) > 0)]))


def counts(of, kept) -> dict[tuple, int]:
    """Distinct variants by engine, pass and dtype."""
    found = {}
    for problem in of:
        for _, engine, config in kept(problem, ranking(problem, measuring=True)):
            found.setdefault((engine.NAME, problem.pass_, problem.dtype), set()).add(variants.spelled(config))
    return {key: len(those) for key, those in found.items()}


def test_at_most_sixteen_for_an_engine_a_pass_and_a_type():
    kept, offered = counts(real(), variants.kept), counts(real(), lambda problem, ranked: ranked)
    assert max(kept.values()) <= variants.MOST == 16
    assert max(offered.values()) > variants.MOST and offered.keys() == kept.keys()  # or there would be nothing to choose


def test_unusual_layers_add_few():
    """One candidate in sixteen, or fewer, is there because the list is predicted to lose too much."""
    added = affected = 0
    for problem in problems():
        for _, engine, config in variants.kept(problem, ranking(problem, measuring=True)):
            listed = variants.listed().get(variants.kind(engine.NAME, problem))
            if listed is not None:
                affected += 1
                added += variants.spelled(config) not in listed
    assert affected > 500 and added <= affected / 16


def test_little_is_lost_by_the_model():
    losses = []
    for problem in problems():
        ours = [item for item in ranking(problem, measuring=True) if item[1].NAME != OWN]
        if any(variants.kind(engine.NAME, problem) in variants.listed() for _, engine, _ in ours):
            losses.append(variants.kept(problem, ours)[0][0] / ours[0][0] - 1)
    assert len(losses) > 50 and statistics.mean(losses) < 0.02 and max(losses) <= 0.25


def is_im2col(spelled: str) -> bool:
    """Of engine hopper, from Triton 3.8 on."""
    return spelled.startswith("pixels=") and "engine=" not in spelled  # not of space_to_depth, which has pixels too


@pytest.mark.long
def test_every_listed_variant_is_one_that_its_engine_offers():
    """To one of the layers that the list was made for."""
    left = {name: {item for item in listed if IM2COL or not is_im2col(item)} for name, listed in variants.listed().items()}
    made_for = choosing.problems(suites.layers([str(REAL), suites.DESIGNED]), *GPU)
    for problem in itertools.chain(problems(), made_for):
        if not any(left.values()):
            break
        for engine in engines.available().values():
            missing = left.get(variants.kind(engine.NAME, problem))
            if missing and engine.supports(problem) is None:
                missing.difference_update(map(variants.spelled, engine.configs(problem)))
    assert not any(left.values()), left


def test_the_best_variant_stays_where_none_is_listed(monkeypatch):
    problem = next(p for p in problems() if p.groups == p.in_channels > 1)
    ranked = ranking(problem, measuring=True)
    monkeypatch.setattr(variants, "listed", lambda: {variants.kind("depthwise", problem): frozenset({"nothing"})})
    left = [config for _, engine, config in variants.kept(problem, ranked) if engine.NAME == "depthwise"]
    first = next(config for _, engine, config in ranked if engine.NAME == "depthwise")
    assert {variants.spelled(config) for config in left} == {variants.spelled(first)} and first in left
    assert [item for item in variants.kept(problem, ranked) if item[1].NAME == OWN]
    own = next(item for item in ranked if item[1].NAME == OWN)
    ahead = [(ranked[0][0] / 1.3, *own[1:]), *(item for item in ranked if item[1].NAME == "depthwise")]
    assert variants.kept(problem, ahead) == ahead[:1]  # far behind, it is worth no kernel


def test_splits_share_a_variant():
    config = next(c for _, e, c in ranking(problems()[0]) if e.NAME == "implicit_gemm")
    assert variants.spelled(config) == variants.spelled(dataclasses.replace(config, splits=7)) != variants.spelled(
        dataclasses.replace(config, num_stages=config.num_stages + 1)
    )


@pytest.mark.parametrize("most, chosen", [(1, ["rare"]), (2, ["rare", "good"]), (9, ["rare", "good", "best", "poor"])])
def test_choosing(most, chosen):
    """First what makes every problem computable, then what gains most."""
    times = [{"good": 2.0, "best": 1.9, "poor": 9.0}, {"good": 2.0, "poor": 3.0}, {"rare": 4.0}, {"rare": 8.0, "good": 1.0}]
    times += [{"rare": 5.0}, {"rare": 5.0}]
    found = choosing.best(times, most)
    assert [name for name, _ in found] == chosen
    assert [loss for _, loss in found] == sorted((loss for _, loss in found), reverse=True) or most == 2
