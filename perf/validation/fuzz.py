"""correctness.fuzz: seeds of the fuzzer beyond the 300 a pass of ``correctness.tests``, over every dtype and layout."""

from __future__ import annotations

import functools

from . import Setting, Step, pytested

NAME = "correctness.fuzz"
WHAT = "1,750 fuzz cases a pass beyond the 300 of the tests"
WORKERS = pytested.WORKERS
_SHARDS, _TAKEN = 97, 63  # of the 2,700 long seeds a pass 1,753; a prime, so that a shard has as many of each pass
_SECONDS = 120.0  # a shard, compiling included; an estimate
unavailable = pytested.unavailable


def steps(setting: Setting) -> list[Step]:
    chosen = ["tests/test_fuzz.py", *pytested.EVERY_CASE, "-m", "long", "--shard"]
    shards = [f"{index}/{_SHARDS}" for index in range(_TAKEN)]
    return [Step(shard, _SECONDS, functools.partial(pytested.run, [*chosen, shard])) for shard in shards]
