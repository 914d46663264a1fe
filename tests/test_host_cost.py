"""The benchmark of the host's cost runs; its figures are for a quiet machine and are not judged here."""

from __future__ import annotations

from perf import host_cost


def test_costs(monkeypatch, capsys):
    found = host_cost.costs(calls=3, rounds=1)
    assert set(host_cost.LIMITS_US) <= set(found) and min(found.values()) > 0
    monkeypatch.setattr(host_cost, "_ROWS", (1, 2))
    within = host_cost.in_graphs(calls=3, rounds=1)
    assert set(within) == {"op in a row", "op in a graph, aot_eager"}
    monkeypatch.setattr(host_cost, "in_graphs", lambda: within)
    monkeypatch.setattr(host_cost, "costs", lambda: {**found, "select": 99.0, "module forward": 1.0})
    assert host_cost.main() == 1 and "99.00 us  at most 3" in capsys.readouterr().out
