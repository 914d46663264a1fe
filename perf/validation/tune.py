"""tune: the layers of the core suite are tuned, and what was found is written as a table."""

from __future__ import annotations

import functools
import warnings

import torch

from triton_conv3d import engines, settings
from triton_conv3d.tuning import Plan, proof, table
from triton_conv3d.tuning.cache import PlanCache
from triton_conv3d.tuning.environment import environment
from triton_conv3d.tuning.faults import is_illegal_access, is_out_of_memory

from .. import workloads
from ..providers import PROVIDERS, alike
from ..results import FAILED, MEMORY, OK, UNSUPPORTED, WRONG, now
from ..tensors import Tensors
from ..threads import separately
from ..workloads import Case, Workload
from . import TUNING, DeviceLost, Outcome, Setting, Step, summed

NAME = "tune"
WHAT = "the core suite tuned, and the table of its plans"
WORKERS = 1  # times are taken
SUITE = "core"
TABLES = "tables"  # folder of the results
_OURS = "ours"
_KNOWN = ("measured", "cache")  # sources of a plan that some call measured
_SECONDS = 9.0  # three passes of a layer, compiling included; an estimate
_TABLE, _TRIAL = "table", "trial of"
_TRIAL_SECONDS = 10.0  # to compile and run an engine on trial; an estimate. One that hangs is given up after proof.SECONDS


def steps(setting: Setting) -> list[Step]:
    layers = [
        Step(workload.id, _SECONDS, functools.partial(_tune, setting, workload)) for workload in workloads.suite(SUITE)
    ]
    trials = [
        Step(f"{_TRIAL} {name}", _TRIAL_SECONDS, functools.partial(_try, setting, name), keeps=True)
        for name, engine in engines.available().items()
        if getattr(engine, "TRIAL", False)
    ]
    return [*trials, *layers, Step(_TABLE, 1.0, functools.partial(_write, setting))]


def _try(setting: Setting, engine: str, limit: float) -> Outcome:
    """An engine on trial, once and before any layer, of which the first would wait for it."""
    device = setting.machine.device
    names = environment(device)
    proof.find_out(engine, device.index or 0, names, setting.cache)
    found = proof.outcome(engine, names["gpu"])
    if found.reason is None:
        return Outcome(OK, "", 1)
    return Outcome(WRONG if found.conclusive else UNSUPPORTED, found.reason)


def _tune(setting: Setting, workload: Workload, limit: float) -> Outcome:
    with settings.configure(autotune=TUNING, cache_dir=setting.cache):
        return summed([tuned(case, setting.machine.device) for case in workloads.cases([workload])])


def tuned(case: Case, device: torch.device) -> Outcome:
    """One case, called once as users call it: has it a plan that was measured, and were all candidates right?

    Raises:
        DeviceLost: a candidate accessed memory illegally.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            with alike(case):
                plans = separately(PROVIDERS[_OURS].thread, lambda: _plans(case, device))
        except Exception as error:
            reason = f"{case.key}: {error}"
            if is_illegal_access(error):
                raise DeviceLost(Outcome(FAILED, reason)) from error
            if is_out_of_memory(error):
                return Outcome(MEMORY, reason)
            raise
    told = [str(warning.message) for warning in caught if issubclass(warning.category, RuntimeWarning)]
    if told:
        return Outcome(WRONG, "; ".join(told), len(plans))
    if any(plan.source not in _KNOWN for plan in plans):  # a candidate that is wrong would have been told of
        return Outcome(UNSUPPORTED, f"{case.key}: not tuned, torch has no result to judge candidates by", len(plans))
    return Outcome(OK, "", len(plans))


def _plans(case: Case, device: torch.device) -> tuple[Plan, ...]:
    prepared = PROVIDERS[_OURS].prepare(case, Tensors(case, device))
    prepared.call()
    return prepared.plans()


def _write(setting: Setting, limit: float) -> Outcome:
    """The table of what was measured here with these versions, beside the other results."""
    machine = setting.machine
    names = environment(machine.device)
    entries = [entry for _, entry in PlanCache(setting.cache).entries() if entry.environment == names]
    if not entries:
        return Outcome(FAILED, f"{setting.cache} holds no plans of this machine")
    folder = setting.out / TABLES
    folder.mkdir(parents=True, exist_ok=True)
    path = table.write(table.Table(names, entries[0].policy, machine.stamp.commit, now(), tuple(entries)), folder)
    return Outcome(OK, "", len(table.read(path).entries))
