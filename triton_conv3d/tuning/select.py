"""select(problem) -> plan, and run(problem, operands) -> result.

memory -> user cache -> tables (exact, then nearest) -> ranking of the cost model. In the modes ``quick`` and ``full`` a
problem's first call on a GPU measures candidates and keeps the winner.
"""

from __future__ import annotations

import functools
import threading
import warnings
from types import ModuleType

import torch

from .. import engines, settings
from ..engines.base import Config, forget_copies
from ..problem import Operands, Problem
from . import cost_model, measure, proof, quarantine, transfer, variants
from .cache import Entry, PlanCache
from .environment import environment, source_hash
from .faults import blamed, is_illegal_access, is_out_of_memory, is_out_of_resources
from .plan import Plan, offered
from .search import OWN
from .table import lookup

_TENSORS = (torch.Tensor, torch.nn.Parameter)  # a fake or otherwise special tensor is of a class of its own
_memory: tuple[dict[Problem, Plan], dict[Problem, Plan]] = ({}, {})  # [1]: where deterministic algorithms are demanded
_dropped: set[tuple] = set()  # what cannot be launched here, see _specialisation
_tuning = threading.Lock()
_logged: dict[Problem, Plan] = {}
_unstored: dict[tuple[str | None, Problem], Entry] = {}  # what was measured and no cache could keep; by forced engine
_stored: dict[tuple, list[Entry]] = {}  # of a cache directory in an environment, for similar problems to learn from


def _forget_plans() -> None:
    for plans in (*_memory, _logged):
        plans.clear()


def forget() -> None:
    """Forget every plan of this process; the caches on disk stay."""
    _forget_plans()
    _dropped.clear()
    _unstored.clear()
    _stored.clear()


settings.on_change(_forget_plans)


def select(problem: Problem, operands: Operands | None = None) -> Plan:
    """The plan of a problem.

    Args:
        problem: what to compute.
        operands: real tensors of this problem: only with them, and only where :func:`may_measure`, it is tuned.

    Raises:
        ValueError: the forced engine does not exist.
        RuntimeError: in strict mode, no engine but torch's own, or not the forced one, can compute the problem; or a
            candidate accessed memory illegally while it was measured.
    """
    plans = _memory[torch.are_deterministic_algorithms_enabled()]
    plan = plans.get(problem)
    if plan is None:
        plan, final = _choose(problem, operands)
        if final:
            plans[problem] = plan
        _log(problem, plan)
    return plan


def run(problem: Problem, operands: Operands) -> torch.Tensor:
    """Compute a problem by its plan.

    A config that runs out of resources or does not compile is dropped and the next best takes its place, torch's own
    convolution last. Where memory runs out, the candidate that needs the least takes its place, for this call.

    Raises:
        RuntimeError: an illegal memory access, with the name of the config; else as :func:`select`.
        torch.OutOfMemoryError: none needs less memory beside operands and result.
    """
    plan = _memory[torch.are_deterministic_algorithms_enabled()].get(problem) or select(problem, operands)
    while True:
        try:
            return engines.available()[plan.engine].launch(problem, operands, plan.config)
        except Exception as error:
            if is_illegal_access(error):
                raise blamed(plan.engine, plan.config, problem, error) from error
            if is_out_of_memory(error):
                forget_copies()
                leaner = _leaner(problem, plan)
                if leaner is None:
                    raise
                plan = leaner
                continue
            if plan.engine == OWN or not is_out_of_resources(error):
                raise
            plan = _replace(problem, plan, error)


def _leaner(problem: Problem, plan: Plan) -> Plan | None:
    """The candidate that needs the least memory beside operands and result, if that is less than this plan needs."""

    def needed(engine: ModuleType, config: Config) -> int:
        memory = engine.memory(problem, config)
        return memory.workspace + memory.copies

    allowed = [item for item in ranking(problem) if item[1].NAME != OWN or not settings.current().strict]
    _, engine, config = min(allowed, key=lambda item: needed(*item[1:]), default=(0.0, None, None))
    if engine is None or needed(engine, config) >= needed(engines.available()[plan.engine], plan.config):
        return None
    return Plan(engine.NAME, config, "fallback")


def _replace(problem: Problem, plan: Plan, error: Exception) -> Plan:
    """Drop a plan that cannot be launched, and take the next."""
    _dropped.add(_specialisation(problem, plan.engine, plan.config))
    warnings.warn(
        f"{plan.engine} [{plan.config}] cannot be launched on {problem.device} and is dropped: {str(error)[:200]}",
        RuntimeWarning,
        stacklevel=3,
    )
    for plans in _memory:
        plans.pop(problem, None)
    plan = _ranked_plan(problem)
    _memory[torch.are_deterministic_algorithms_enabled()][problem] = plan
    _log(problem, plan)
    return plan


def _specialisation(problem: Problem, engine: str, config: Config) -> tuple:
    """What decides whether a config compiles and fits."""
    return engine, config, problem.arch, problem.pass_, problem.dtype, problem.precision, problem.residual, problem.activation


def _choose(problem: Problem, operands: Operands | None) -> tuple[Plan, bool]:
    """A plan, and whether it holds from now on: not where tuning was only put off."""
    if problem.empty:  # nothing to launch: torch's own makes the result
        return Plan(OWN, _plain_aten(problem), "ranking"), True
    # Where there is no GPU to ask, as in a worker that was forked from a process with one, asking it is an error.
    quiet = torch.compiler.is_compiling() if problem.device == "cpu" else _quiet()
    if not quiet and problem.device != "cpu":
        names, here = _environment(problem)
        if here:
            quarantine.recall(settings.current().cache_dir, names)
    fallback = _ranked_plan(problem)
    if fallback.source == "fallback":
        return fallback, True
    if quiet:
        return fallback, False
    known = remembered(problem)
    if known is not None and known.source != "nearest":
        return known, True
    hint = known or fallback
    if settings.current().autotune == "off" or problem.device == "cpu" or torch.are_deterministic_algorithms_enabled():
        return hint, True
    if operands is None or not may_measure() or not all(t is None or type(t) in _TENSORS for t in operands.tensors):
        return hint, False
    if not _tuning.acquire(blocking=False):  # another thread is measuring: two at once would disturb each other
        return hint, False
    try:
        return _tune(problem, operands, hint), True
    finally:
        _tuning.release()


def _ranked_plan(problem: Problem) -> Plan:
    """The most promising candidate; torch's own, or an error, where an engine that was asked for has none."""
    current = settings.current()
    ranked = ranking(problem)
    if current.engine is not None:
        if ranked:
            return Plan(ranked[0][1].NAME, ranked[0][2], "forced")
        message = f"engine {current.engine!r} cannot compute {problem}: {refusals(problem)[current.engine]}"
    elif current.strict and all(engine.NAME == OWN for _, engine, _ in ranked):
        message = f"no engine but torch's own can compute {problem}"
    else:
        return Plan(ranked[0][1].NAME, ranked[0][2], "ranking")
    if current.strict:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in refusals(problem).items())
        raise RuntimeError(f"{message}. strict=True forbids torch's own. {reasons}")
    warnings.warn(f"{message}; torch's own convolution is used", RuntimeWarning, stacklevel=4)
    return Plan(OWN, _plain_aten(problem), "fallback")


def _plain_aten(problem: Problem) -> Config:
    return engines.get(OWN).configs(problem)[-1]


def refusals(problem: Problem) -> dict[str, str]:
    """Why each engine that has no candidate has none, by name."""
    reasons = {}
    for name, engine in engines.available().items():
        reason = engine.supports(problem)
        if reason is None and _on_trial(problem, engine):
            reason = proof.outcome(name, problem.device).reason or f"never measured on {problem.arch}"
            reason = f"on trial, {reason}: a plan only where measured, or asked for"
        if reason is None and not _usable(problem, engine):
            reason = "every config failed to launch or gave a wrong result"
        if reason is not None:
            reasons[name] = reason
    return reasons


def _usable(problem: Problem, engine: ModuleType) -> list[Config]:
    """Configs that an engine offers and that have not failed; no search of cuDNN's where determinism is demanded."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    return [
        config
        for config in engine.configs(problem)
        if not (_dropped and _specialisation(problem, engine.NAME, config) in _dropped)
        and not quarantine.quarantined(engine.NAME, config, problem.arch)
        and not (deterministic and _searches(config))
    ]


def _on_trial(problem: Problem, engine: ModuleType, measuring: bool = False) -> bool:
    """Whether an engine has still to prove itself here, and nobody has asked for it.

    One that was never measured on this architecture is a candidate only where candidates are measured, which verifies
    them first: no prediction makes it a plan. With ``TRIAL``, it is one only where :mod:`.proof` found that it works, and in
    the mode ``full`` where that could not be found out.
    """
    current = settings.current()
    if current.engine == engine.NAME:
        return False
    if not measuring and problem.arch not in getattr(engine, "MEASURED", (problem.arch,)):
        return True
    if not getattr(engine, "TRIAL", False) or proof.works(engine.NAME, problem.device):
        return False
    return current.autotune != "full" or proof.outcome(engine.NAME, problem.device).conclusive


def _rests_on_trial(problem: Problem, config: Config, measuring: bool = False) -> bool:
    """Whether a config hands its work on to an engine that has still to prove itself."""
    other = getattr(config, "engine", None)
    return other is not None and _on_trial(problem, engines.get(other), measuring)


def _searches(config: Config) -> bool:
    """Whether cuDNN measures its own algorithms for this config, at its first launch in every thread."""
    return getattr(config, "benchmark", False)


def ranking(problem: Problem, measuring: bool = False) -> list[tuple[float, ModuleType, Config]]:
    """Every candidate with its predicted seconds, the most promising first; of the forced engine only, if there is one.

    Args:
        measuring: the candidates are to be measured. Only then those on trial are among them, and cuDNN may search, and
            then it always does: a thread keeps one algorithm for a convolution, however it was found, so that the two
            cannot be told apart.

    Raises:
        ValueError: the forced engine does not exist.
    """
    forced, candidates = settings.current().engine, []
    for engine in engines.available().values() if forced is None else (engines.get(forced),):
        if engine.supports(problem) is None and not _on_trial(problem, engine, measuring):
            usable = [config for config in _usable(problem, engine) if not _rests_on_trial(problem, config, measuring)]
            searching = measuring and any(map(_searches, usable))
            candidates += [(engine, config) for config in usable if _searches(config) == searching]
    ranked = cost_model.rank(problem, candidates)
    if problem.arch == "interpreter":  # asked for the kernels: torch's own convolution only where they cannot
        ranked.sort(key=lambda item: item[1].NAME == OWN)
    return ranked


def remembered(problem: Problem) -> Plan | None:
    """The plan of the user cache, or of a table; None if neither knows one that an engine offers today.

    In the mode ``full`` a plan that was the best of a few only is not one.
    """
    if problem.device == "cpu":
        return None
    current = settings.current()
    names, here = _environment(problem)
    entry, source = _unstored.get((current.engine, problem)), "memory"  # newer than what the cache may still hold
    if entry is None and here:
        entry, source = PlanCache(current.cache_dir).load(problem, _key(names)), "cache"
    if entry is not None and current.autotune == "full" and entry.policy.get("mode") != "full":
        entry = None
    if entry is not None and (plan := _exact(problem, entry, source)):
        return plan
    for entry, distance in lookup(problem, names, current.tables):
        plan = _exact(problem, entry, "table") if distance == 0 else _near(problem, entry)
        if plan:
            return plan
    return None


def _exact(problem: Problem, entry: Entry, source: str) -> Plan | None:
    """The plan of an entry for this very problem, if an engine offers it today and none other is asked for."""
    config = offered(problem, entry.engine, entry.config)
    if settings.current().engine not in (None, entry.engine):
        return None
    if config is None or config not in _usable(problem, engines.get(entry.engine)):
        return None
    return Plan(entry.engine, config, source, entry.time_us)


def _near(problem: Problem, entry: Entry) -> Plan | None:
    ranked = ranking(problem, measuring=True)
    trusted = [
        (seconds, engine, config)
        for seconds, engine, config in ranked
        if engine.NAME == entry.engine or not (_on_trial(problem, engine) or _rests_on_trial(problem, config))
    ]
    candidate = transfer.transferred(entry, trusted)
    return None if candidate is None else Plan(candidate[0].NAME, candidate[1], "nearest")


def _environment(problem: Problem) -> tuple[dict[str, str], bool]:
    """The environment of a GPU of the problem's name, and whether there is one; all GPUs of a name share it."""
    for index in range(torch.cuda.device_count()):
        if torch.cuda.get_device_properties(index).name == problem.device:
            return environment(torch.device("cuda", index)), True
    return {"gpu": problem.device, "arch": problem.arch, "engines": source_hash()}, False


def _key(names: dict[str, str]) -> dict[str, str]:
    """The environment as cache entries carry it: the best of a forced engine is not the best of all."""
    forced = settings.current().engine
    return names if forced is None else {**names, "only": forced}


def may_measure() -> bool:
    """Not under CUDA-graph capture, not while torch.compile traces, and not where determinism is demanded."""
    return not (_quiet() or torch.are_deterministic_algorithms_enabled())


def _quiet() -> bool:
    """Capturing or tracing: no measuring, no waiting for the device and no files."""
    return torch.compiler.is_compiling() or (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing())


def _tune(problem: Problem, operands: Operands, hint: Plan) -> Plan:
    """Measure, and keep the winner; the hint is what holds if nothing could be measured."""
    current, device = settings.current(), next(t for t in operands[:3] if t is not None).device
    names, cache = environment(device), PlanCache(current.cache_dir)
    for engine in engines.available().values() if current.engine is None else ():
        if getattr(engine, "TRIAL", False) and engine.supports(problem) is None:
            proof.find_out(engine.NAME, device.index or 0, names, cache.directory)
    ranked = ranking(problem, measuring=True)
    if current.autotune != "full":
        ranked = variants.kept(problem, ranked)
    key, trial = _key(names), functools.partial(quarantine.trial, cache.directory, names, problem)
    measured = _measured(cache, key)
    similar = [*transfer.nearest(problem, measured), *lookup(problem, key, current.tables)]
    hints = transfer.hints(sorted(similar, key=lambda pair: pair[1]), ranked)
    hints += [(e, config) for _, e, config in ranked if (e.NAME, config) == (hint.engine, hint.config)]
    result = measure.best(problem, operands, ranked, current.autotune, hints=hints, trial=trial)
    if result is None:
        return hint if hint.config in _usable(problem, engines.get(hint.engine)) else _ranked_plan(problem)
    entry = Entry(
        problem.to_dict(), key, result.policy, result.engine, result.config.to_dict(),
        result.time_us, result.aten_us, result.candidates,
    )  # fmt: skip
    measured.append(entry)
    _keep(problem, entry)
    return Plan(result.engine, result.config, "measured", result.time_us)


def _measured(cache: PlanCache, key: dict[str, str]) -> list[Entry]:
    """What was measured in this environment: read once, and kept up by :func:`_tune`."""
    where = (cache.directory, *sorted(key.items()))
    if where not in _stored:
        _stored[where] = [entry for _, entry in cache.entries() if entry.environment == key]
    return _stored[where]


def _keep(problem: Problem, entry: Entry) -> None:
    key = entry.environment.get("only"), problem
    _unstored.pop(key, None)
    if not PlanCache(settings.current().cache_dir).store(entry):
        _unstored[key] = entry


def _measured_here(problem: Problem, entry: Entry) -> bool:
    names, here = _environment(problem)
    return here and names == {name: value for name, value in entry.environment.items() if name != "only"}


def known() -> list[Entry]:
    """Every plan that was measured for a GPU like one of this process: of its memory, and of the user cache."""
    entries = {}
    for entry in (*(e for _, e in PlanCache(settings.current().cache_dir).entries()), *_unstored.values()):
        problem = Problem.from_dict(entry.problem)
        if _measured_here(problem, entry):
            entries[problem, entry.environment.get("only")] = entry
    return list(entries.values())


def adopt(entry: Entry) -> str | None:
    """Take over a plan that another process measured, in place of what is known here; or the reason why not."""
    problem = Problem.from_dict(entry.problem)
    if not _measured_here(problem, entry):
        return "measured for another GPU or with other versions"
    config = offered(problem, entry.engine, entry.config)
    if config is None or config not in _usable(problem, engines.get(entry.engine)):
        return "its config is not offered here"
    if PlanCache(settings.current().cache_dir).load(problem, entry.environment) != entry:
        _keep(problem, entry)
    if entry.environment.get("only") == settings.current().engine:
        for plans in _memory:
            plans.pop(problem, None)
        select(problem)  # now, and not under a capture, which reads no file
    return None


def _log(problem: Problem, plan: Plan) -> None:
    if settings.current().log != "plan" or _logged.get(problem) == plan:
        return
    _logged[problem] = plan
    time = "" if plan.time_us is None else f", {plan.time_us:.1f} us"
    settings.show("%s: %s [%s] from %s%s", problem, plan.engine, plan.config, plan.source, time)
