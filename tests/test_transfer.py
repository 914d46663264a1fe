"""Plans of similar problems: what becomes of their config here, and when the model overrules it."""

from __future__ import annotations

import types

import pytest

from triton_conv3d.engines.aten import AtenConfig
from triton_conv3d.problem import Problem
from triton_conv3d.tuning import cost_model, transfer
from triton_conv3d.tuning.cache import Entry
from triton_conv3d.tuning.select import ranking

HERE = Problem("forward", 2, 320, 320, (8, 8, 8), (3, 3, 3), padding=(1,) * 6, device="NVIDIA H200", arch="sm_90")
THERE = HERE.replace(batch=4, input_size=(16, 16, 16))


def entry(config, engine="implicit_gemm", problem=THERE, time_us=None, aten_us=None):
    if time_us is None:
        (module,) = {e.NAME: e for _, e, _ in ranking(problem)}[engine],
        time_us = cost_model.predict(problem, module, config) * 1e6
    return Entry(problem.to_dict(), {}, {}, engine, config.to_dict(), time_us, aten_us, 9)


def gemms(problem=HERE):
    return [item for item in ranking(problem, measuring=True) if item[1].NAME == "implicit_gemm"]


def test_a_config_keeps_its_tile_and_takes_the_splits_that_suit():
    offers = ranking(HERE, measuring=True)
    whole = next(config for _, _, config in gemms(THERE) if config.splits == 1)
    engine, config = transfer.transferred(entry(whole, time_us=1.0), offers)  # far faster than predicted
    assert engine.NAME == "implicit_gemm" and config.whole() == whole
    same = [seconds for seconds, _, c in gemms() if c.whole() == whole]
    assert len(same) > 1 and config.splits > 1 and dict((c, s) for s, _, c in gemms())[config] == min(same)


def test_the_model_overrules_what_no_longer_suits():
    """The slowest tile here, though it was as fast there as the model said."""
    kept = {config.whole() for _, _, config in gemms()}
    poor = [config for _, _, config in gemms(THERE) if config.whole() in kept][-1]
    _, config = transfer.transferred(entry(poor), ranking(HERE, measuring=True))
    assert config.whole() != poor.whole()


@pytest.mark.parametrize("part, chosen", [(0.3, "aten"), (3.0, "implicit_gemm"), (None, "implicit_gemm")])
def test_torchs_own_is_taken_where_it_was_faster(part, chosen):
    own = cost_model.predict(THERE, types.SimpleNamespace(NAME="aten", memory=_memory), AtenConfig(benchmark=True)) * 1e6
    config = gemms(THERE)[0][2]
    found = entry(config, time_us=own, aten_us=part and part * own)
    assert transfer.transferred(found, ranking(HERE, measuring=True))[0].NAME == chosen


def _memory(problem, config):
    return types.SimpleNamespace(copies=0)


@pytest.mark.parametrize("faulty", [
    {"engine": "gone"}, {"config": {}}, {"config": {"block_m": 7}},
], ids=["engine", "no-knobs", "unknown"])  # fmt: skip
def test_an_entry_of_no_use(faulty):
    values = {**entry(gemms(THERE)[0][2]).to_dict(), **faulty}
    assert transfer.transferred(Entry(**values), ranking(HERE)) is None
    assert transfer.hints([(Entry(**values), 1.0)], ranking(HERE)) == []


def test_the_nearest_come_first():
    config = gemms(THERE)[0][2]
    far, near, foreign = HERE.replace(batch=8), HERE.replace(batch=1), HERE.replace(pass_="dgrad")
    found = transfer.nearest(HERE, [entry(config, problem=p, time_us=1.0) for p in (far, foreign, near)])
    assert [(e.problem["batch"], distance) for e, distance in found] == [(1, 1.0), (8, 2.0)]
