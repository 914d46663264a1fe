"""One-line faults planted into a copy of an engine, each tried in a forked process: does a battery of cases see it?

A test file holds its ``FAULTS``, name: (file, what stands there, what is planted), and its ``battery(engine, name)``,
which raises, or kills the process, if the engine is wrong.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType

import pytest
from guarded import subprocess_of

ENGINES = Path(__file__).resolve().parent.parent / "triton_conv3d" / "engines"
SOUND = ""  # the name of no fault
_USUAL = 3  # faults of one engine, about; the others are for the long run
Fault = tuple[str, str, str]


def try_all(engine: str, faults: dict[str, Fault], battery: Callable[[ModuleType, str], None], names: list[str]) -> None:
    """Print, as JSON lines, what became of the sound engine and of each fault, or of those named."""
    import torch

    torch.set_num_threads(1)
    import cases  # noqa: F401  what the forks share
    from interpreting import quick

    with quick():
        for name in names or (SOUND, *faults):
            print(json.dumps([name, _in_a_fork(engine, name, faults.get(name), battery)]), flush=True)


def outcomes(script: str, names: Iterable[str] = ()) -> dict[str, str]:
    """What :func:`try_all` printed of these names, or of all, run by a script of this folder in a process of its own."""
    done = subprocess_of(script, *names)
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(map(json.loads, done.stdout.splitlines()))


def tests(script: str, names: Iterable[str]) -> tuple[Callable, Callable, Callable]:
    """A script's fixture ``outcomes``, and its tests that the sound engine passes and that each of these faults is caught."""

    names = list(names)
    usual = names[:: max(1, round(len(names) / _USUAL))]

    @pytest.fixture(scope="module", name="outcomes")
    def tried(request: pytest.FixtureRequest) -> dict[str, str]:
        asked = [item for item in request.session.items if item.path.name == script and hasattr(item, "callspec")]
        return outcomes(script, (SOUND, *(item.callspec.params["name"] for item in asked)))

    def without_a_fault_the_battery_passes(outcomes: dict[str, str]) -> None:
        assert outcomes[SOUND] == "survived"

    @pytest.mark.parametrize(
        "name", [pytest.param(name, marks=() if name in usual else pytest.mark.long) for name in names]
    )
    def planted_fault_is_caught(name: str, outcomes: dict[str, str]) -> None:
        check(outcomes[name])

    return tried, without_a_fault_the_battery_passes, planted_fault_is_caught


def stale(engine: str, faults: dict[str, Fault]) -> list[str]:
    """Names of the faults whose place is gone, of those for the long run too."""

    def source(file: str) -> str:
        own = ENGINES / engine / file
        return (own if own.is_file() else ENGINES / file).read_text()

    return [name for name, (file, old, _) in faults.items() if old not in source(file)]


def check(outcome: str) -> None:
    """A fault has to be there, and to be seen."""
    assert not outcome.startswith("stale"), outcome
    assert outcome != "survived"


def _load(engine: str, name: str, fault: Fault | None, where: str) -> ModuleType:
    """An engine, a folder or a file, with a fault in it, as a module of its own. LookupError if its place is gone."""
    copy = Path(where) / f"planted_{engine}_{name or 'nothing'}"
    single = ENGINES / f"{engine}.py"
    if single.is_file():
        copy.mkdir()
        shutil.copy(single, copy)
    else:
        shutil.copytree(ENGINES / engine, copy, ignore=shutil.ignore_patterns("__pycache__"))
    if not single.is_file():  # what the kernels share, so that faults can stand there too
        shutil.copy(ENGINES / "epilogue.py", copy)
        for source in copy.glob("*.py"):
            source.write_text(source.read_text().replace("from ..epilogue import", "from .epilogue import"))
    if fault:
        file, old, new = fault
        source = (copy / file).read_text()
        if old not in source:
            raise LookupError(f"{file} no longer holds: {old}")
        (copy / file).write_text(source.replace(old, new))
    full = f"triton_conv3d.engines.{copy.name}"
    spec = importlib.util.spec_from_file_location(
        full,
        copy / (single.name if single.is_file() else "__init__.py"),
        submodule_search_locations=None if single.is_file() else [str(copy)],
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules[full] = module
    spec.loader.exec_module(module)
    return module


def _in_a_fork(engine: str, name: str, fault: Fault | None, battery: Callable[[ModuleType, str], None]) -> str:
    """'survived', or how the fault was caught."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        outcome = "survived"
        try:
            with tempfile.TemporaryDirectory() as where:
                battery(_load(engine, name, fault, where), name)
        except LookupError as error:
            outcome = f"stale: {error}"
        except Exception as error:
            lines = str(error).splitlines()
            outcome = f"{type(error).__name__}: " + " | ".join(lines[:1] + lines[-1:])
            if fault is None:
                traceback.print_exc()
        os.write(writer, outcome[:2000].encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        outcome = pipe.read().decode()
    _, status = os.waitpid(child, 0)
    return f"signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else outcome
