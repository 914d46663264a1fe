"""A pytest plugin: ``-p perf.shard --shard 3/8`` keeps every eighth test, from the fourth on."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--shard", default="0/1", metavar="I/N", help="of every N tests in turn the one with number I")


@pytest.hookimpl(trylast=True)  # what -k and -m leave is shared out
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    index, count = map(int, config.getoption("--shard").split("/"))
    kept = items[index::count]
    if len(kept) < len(items):
        config.hook.pytest_deselected(items=[item for i, item in enumerate(items) if i % count != index])
        items[:] = kept
