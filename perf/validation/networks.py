"""end-to-end: whole networks, as ``python -m perf end-to-end`` measures them."""

from __future__ import annotations

import functools

from triton_conv3d import settings

from .. import end_to_end
from ..networks import INFER, MODES, TRAIN, Network, networks
from ..results import LOST
from . import BAD, TUNING, DeviceLost, Outcome, Setting, Step, summed

NAME = "end-to-end"
WHAT = "training steps and inference of whole networks, eager and compiled"
WORKERS = 1  # times are taken
_SECONDS = {TRAIN: 300.0, INFER: 120.0}  # tuning and torch.compile included; estimates
_QUICK = {"qwen2_vl": 30.0}  # of a single layer


def steps(setting: Setting) -> list[Step]:
    return [
        Step(
            f"{network.name}/{mode}", _QUICK.get(network.name, _SECONDS[mode]),
            functools.partial(_measure, setting, network, mode), keeps=True,
        )
        for network in networks().values()
        for mode in MODES
    ]  # fmt: skip


def _measure(setting: Setting, network: Network, mode: str, limit: float) -> Outcome | None:
    path, machine, names = setting.out / end_to_end.FILE, setting.machine, list(end_to_end.PROVIDERS)
    with settings.configure(autotune=TUNING, cache_dir=setting.cache):
        lost = end_to_end.measure([network], [mode], names, path, machine=machine, budget=limit)[LOST]
    if end_to_end.pending(path, network, mode, names, machine.stamp):
        if lost:
            raise DeviceLost
        return None
    rows = end_to_end.rows(path, network, mode, machine.stamp).values()
    bad = [Outcome(row.status, f"{row.provider}: {row.reason}") for row in rows if row.status in BAD]
    return summed([*bad, Outcome(checks=len(rows))])
