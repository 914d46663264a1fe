"""What is made of a sweep: regret, fitted coefficients, tables."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
from autotune_cases import GPU, PROBLEMS, World, call, header, offers
from fake_clock import Clock

from autotune import analysis, export, fit, records
from triton_conv3d import configure
from triton_conv3d.tuning import coefficients, cost_model, table
from triton_conv3d.tuning.cache import SCHEMA
from triton_conv3d.tuning.search import OWN
from triton_conv3d.tuning.select import select


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    path = tmp_path_factory.mktemp("sweep") / "s.jsonl"
    World(Clock()).run(path)
    return path


@pytest.fixture(scope="module")
def found(swept):
    return analysis.measured(records.read(swept))


def test_regret_of_choices(found):
    regrets = analysis.regrets(found)
    for of, cold, quick in zip(found, regrets["cold"].values, regrets["quick"].values, strict=True):
        top = of.seconds[of.ranked[0][1].NAME, of.ranked[0][2]]
        assert cold == top / min(of.seconds.values()) - 1 and 0 <= quick <= 0.1
    assert regrets["cold"].at(1.0) == max(regrets["cold"].values) > regrets["quick"].at(1.0)


def test_the_best_variants_get_better_and_end_at_the_best(found):
    chosen = analysis.best_variants(found, 50)
    values = [value for _, value in chosen]
    assert values == sorted(values, reverse=True) and values[-1] == pytest.approx(1.0) and values[0] > 1
    assert len({key for key, _ in chosen}) == len(chosen) and all(name != OWN for (name, _), _ in chosen)


def test_tiles(found):
    maps = analysis.tile_map(found)
    assert set(maps) == {"forward", "dgrad", "wgrad"}
    assert all(0 < share <= 1 for tiles in maps.values() for share in tiles.values())


def test_analyze_draws(swept, capsys, tmp_path):
    pytest.importorskip("matplotlib")
    status, out, _ = call(capsys, "analyze", swept, "--out", tmp_path)
    assert status == 0 and "cold   regret: median" in out and "variants" in out
    names = {path.name for path in tmp_path.iterdir() if path.read_bytes().startswith(b"\x89PNG")}
    assert names == {"regret.png", "best_k.png", "tiles_forward.png", "tiles_dgrad.png", "tiles_wgrad.png"}


class TestFit:
    TRUTH = {"tensor_part": 0.45, "issue_part": 0.35, "latency": 1.2e-6, "aten_part": 0.12, "launch": 7e-6}

    def sweep(self):
        truth = dataclasses.replace(cost_model.RATES["H200"], **self.TRUTH)
        made = records.Sweep(header())
        for problem in PROBLEMS:
            for _, engine, config in offers(problem):
                seconds = cost_model.predict(problem, engine, config, truth)
                made.add(records.Record(problem.to_dict(), engine.NAME, config.to_dict(), seconds))
        return made

    def test_predictions_come_close_to_what_was_measured(self):
        result = fit.fit(analysis.measured(self.sweep()), cost_model.RATES["H200"])
        assert result.before > 0.02 and result.after < result.before / 10
        assert abs(math.log(result.values["aten_part"] / self.TRUTH["aten_part"])) < 0.15

    def test_nothing_to_fit_where_the_defaults_hold(self):
        self.TRUTH = {}
        assert fit.fit(analysis.measured(self.sweep()), cost_model.RATES["H200"]).values == {}

    def test_the_command_writes_what_the_model_reads(self, capsys, tmp_path):
        records.write(tmp_path / "s.jsonl", self.sweep())
        status, out, _ = call(capsys, "fit", tmp_path / "s.jsonl", "--out", tmp_path)
        assert status == 0 and "fitted" in out and str(coefficients.path(tmp_path, GPU)) in out
        cost_model._rates.cache_clear()
        with configure(tables=tmp_path):
            assert cost_model.rates(PROBLEMS[0]).aten_part < 0.2
        cost_model._rates.cache_clear()


class TestExport:
    def test_a_table_has_the_best_of_every_problem(self, swept, found, capsys, tmp_path):
        status, out, _ = call(capsys, "export", swept, "--out", tmp_path)
        made = table.read(table.path_for(tmp_path, GPU))
        assert status == 0 and f"{len(PROBLEMS)} plans" in out
        assert (made.commit, made.policy, made.environment["gpu"]) == ("abc", {"mode": "full"}, GPU)
        for of, entry in zip(found, made.entries, strict=True):
            assert entry.time_us == pytest.approx(of.best * 1e6) and entry.candidates == len(of.seconds)
            assert entry.aten_us == pytest.approx(1e6 * min(s for (n, _), s in of.seconds.items() if n == OWN))
        with configure(tables=tmp_path, autotune="off", cache_dir=None):
            plan = select(PROBLEMS[1])
        assert plan.source == "table" and plan.time_us == made.entries[1].time_us

    def test_sweeps_of_other_sources_are_refused(self, capsys, tmp_path):
        World(Clock()).run(tmp_path / "s", PROBLEMS[:1], created=header(engines="0" * 64))
        for name in ("export", "fit", "analyze"):
            status, _, err = call(capsys, name, tmp_path / "s")
            assert status == 2 and "engine sources" in err and "commit abc" in err

    def test_nothing_measured(self, capsys, tmp_path):
        records.write(tmp_path / "s", records.Sweep(header()))
        for name in ("export", "fit", "analyze"):
            status, _, err = call(capsys, name, tmp_path / "s", "--out", tmp_path)
            assert status == 2 and err.startswith("error:") and "nothing" in err


class TestMergedTables:
    @pytest.fixture
    def one(self, swept):
        return export.table(records.read(swept), "2026-01-01T00:00:00Z")

    @staticmethod
    def later(one, versions=None, **changes):
        entries = tuple(dataclasses.replace(entry, **changes) for entry in one.entries[:2])
        environment = {**one.environment, **(versions or {})}
        return dataclasses.replace(one, environment=environment, entries=entries, created="2026-02-01T00:00:00Z")

    @pytest.mark.parametrize("versions, changes, wins", [
        ({}, {"time_us": 0.5}, True), ({}, {"time_us": 1e9}, False), ({"triton": "4.0"}, {"time_us": 1e9}, True),
        ({}, {"time_us": 1e9, "candidates": 10**6}, True), ({"triton": "4.0"}, {"time_us": 0.5, "candidates": 1}, False),
    ])  # fmt: skip
    def test_more_candidates_then_newer_versions_then_faster(self, one, versions, changes, wins):
        other = self.later(one, versions, **changes)
        for given in ([one, other], [other, one]):
            merged = table.merged(given)
            by_problem = {str(entry.problem): entry.time_us for entry in merged.entries}
            expected = (other if wins else one).entries[0]
            assert by_problem[str(expected.problem)] == expected.time_us
            assert len(merged.entries) == len(one.entries) and merged.created == other.created

    @pytest.mark.parametrize("name", ("gpu", "arch", "engines"))
    def test_foreign_tables_are_refused(self, one, name):
        with pytest.raises(ValueError, match=f"measured with {name}"):
            table.merged([one, self.later(one, {name: "other"})])

    def test_command(self, one, capsys, tmp_path):
        for folder, given in (("a", one), ("b", self.later(one, time_us=0.25))):
            (tmp_path / folder).mkdir()
            table.write(given, tmp_path / folder)
        files = [table.path_for(tmp_path / folder, GPU) for folder in "ab"]
        status, out, _ = call(capsys, "merge", *files, "--out", tmp_path / "c")
        assert status == 0 and "4 plans" in out
        assert sorted(e.time_us for e in table.read(table.path_for(tmp_path / "c", GPU)).entries)[:2] == [0.25, 0.25]
        files[1].write_text(json.dumps({"schema": 9}))
        status, _, err = call(capsys, "merge", *files, "--out", tmp_path / "c")
        assert status == 2 and f"schema 9, expected {SCHEMA}" in err
