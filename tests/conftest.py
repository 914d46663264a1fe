"""Where the tests run: in Triton's interpreter if there is no GPU, and with a cache directory of their own.

On a GPU each kernel is compiled first, 7,000 of them, which takes one process more than an hour. There ``python -m pytest``
runs some cases of every test; ``--cases 0`` runs all, and ``python -m perf validate --slice correctness`` does so in several
processes.
"""

from __future__ import annotations

import os
import random
import tempfile
from collections import defaultdict

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports triton

MOST_CASES = 8 if os.environ.get("TRITON_INTERPRET", "0") == "0" else 0  # 8 of every test: some 1,500 kernels

_cache = tempfile.TemporaryDirectory(prefix="triton_conv3d_tests_")
os.environ["TRITON_CONV3D_CACHE_DIR"] = os.path.join(_cache.name, "cache")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--cases", type=int, default=MOST_CASES, metavar="N",
        help="run at most N cases of every test, the same ones each time; 0: all (default: %(default)s)",
    )  # fmt: skip


@pytest.hookimpl(trylast=True)  # of what -k and -m leave
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    most, of_test = config.getoption("--cases"), defaultdict(list)
    for item in items:
        of_test[item.nodeid.partition("[")[0]].append(item)
    dropped = set()
    for name, cases in of_test.items():
        if 0 < most < len(cases):
            dropped.update(random.Random(name).sample(cases, len(cases) - most))
    if dropped:
        config.hook.pytest_deselected(items=[item for item in items if item in dropped])
        items[:] = [item for item in items if item not in dropped]


@pytest.fixture(scope="session", autouse=True)
def quick_interpreter():
    if os.environ.get("TRITON_INTERPRET", "0") == "0":
        yield
    else:
        from interpreting import quick

        with quick():
            yield


@pytest.fixture
def new_process(monkeypatch):
    """What tuning knows when a process begins; called, it begins again."""
    from triton_conv3d.tuning import forget, proof, quarantine, storage

    def begin() -> None:
        monkeypatch.setattr(quarantine, "_left_out", {})
        monkeypatch.setattr(quarantine, "_recalled", set())
        monkeypatch.setattr(proof, "_found", {})
        monkeypatch.setattr(storage, "_warned", {})
        forget()

    begin()
    return begin


@pytest.fixture
def proven(monkeypatch) -> None:
    """As on a GPU on which every engine on trial was right."""
    from triton_conv3d.tuning import proof

    monkeypatch.setattr(proof, "works", lambda engine, gpu: True)


@pytest.fixture
def posed(monkeypatch) -> list:
    """The problems that are computed from now on, in their order."""
    from triton_conv3d import tuning

    found, run = [], tuning.run
    monkeypatch.setattr(tuning, "run", lambda problem, operands: found.append(problem) or run(problem, operands))
    return found
