"""Every order of turns of what a program of gluon_emulator.py did: that none of them ends otherwise."""

from __future__ import annotations

from types import SimpleNamespace

from gluon_emulator import Barrier


def explore(traces: list[list[tuple]]) -> int:
    """Try every order in which all sides can do what they did, and copies arrive; the number of states that this meets.

    What a side does depends on no turn, so one run tells all of it. A state is how far each side is, which copies are on
    their way, the products that are not done, and what barriers and buffers hold: of a buffer, which of its copies.

    Raises:
        AssertionError: in some order nobody can go on, a stage is overwritten, or read before it is filled.
    """
    numbers: dict[int, int] = {}  # of barriers and buffers, in the order of their first use
    steps = [[tuple(_number(x, numbers) for x in step) for step in trace] for trace in traces]
    used = {id(x): x for trace in traces for step in trace for x in step}
    counts = [getattr(used[x], "count", 0) for x in numbers]  # of barriers: arrivals that complete one
    idle, empty = tuple((count, 0, 0) for count in counts), (0,) * len(numbers)
    start = ((0,) * len(traces), (), ((),) * len(traces), idle, empty)
    seen, left = {start}, [start]
    while left:
        state = left.pop()
        following = list(_following(steps, counts, *state))
        finished = all(at == len(side) for at, side in zip(state[0], steps, strict=True))
        assert following or (finished and not state[1] and not any(state[2])), "deadlock"
        fresh = [other for other in dict.fromkeys(following) if other not in seen]
        seen.update(fresh)
        left += fresh
    return len(seen)


def _number(x: object, numbers: dict[int, int]) -> object:
    return numbers.setdefault(id(x), len(numbers)) if isinstance(x, (Barrier, SimpleNamespace)) else x


def _there(read: list[int], copies, buffers) -> None:
    """These buffers, each with the number of its copy, have been filled, and are not being overwritten."""
    there = all(buffers[buffer] == count for buffer, count in zip(read[::2], read[1::2], strict=True))
    assert there and not set(read[::2]) & {started[0] for started in copies}, "a product of what is not there"


def _following(steps, counts, at, copies, products, barriers, buffers):
    """All states that one more action can lead to."""

    def changed(items: tuple, where: int, what: object) -> tuple:
        return (*items[:where], what, *items[where + 1 :])

    def completed(barrier: int, arrivals: int, count: int) -> tuple:
        pending, missing, phase = barriers[barrier]
        pending, missing = pending - arrivals, missing + count
        assert pending >= 0, "more arrivals than the barrier counts"
        done = pending == 0 and missing == 0
        return changed(barriers, barrier, (counts[barrier], 0, phase ^ 1) if done else (pending, missing, phase))

    for i, (_, barrier, count) in enumerate(copies):
        yield at, copies[:i] + copies[i + 1 :], products, completed(barrier, 0, -count), buffers
    for side in range(len(steps)):
        if at[side] == len(steps[side]):
            continue
        name, *what = steps[side][at[side]]
        after = changed(at, side, at[side] + 1)
        if name == "wait":
            if barriers[what[0]][2] != what[1]:
                yield after, copies, products, barriers, buffers
        elif name in ("expect", "arrive"):
            yield after, copies, products, completed(what[0], 1, *what[1:] or (0,)), buffers
        elif name == "load":
            buffer, count = what[0], buffers[what[0]]
            assert buffer not in (started[0] for started in copies), "a copy into what is being copied"
            assert all(buffer not in product for side in products for product in side), "a copy into what is read"
            started = tuple(sorted((*copies, tuple(what))))
            yield after, started, products, barriers, changed(buffers, buffer, count + 1)
        elif name == "multiply":
            _there(what, copies, buffers)
            yield after, copies, changed(products, side, (*products[side], tuple(what[::2]))), barriers, buffers
        elif name == "read":
            _there(what, copies, buffers)
            yield after, copies, products, barriers, buffers
        else:
            left = products[side][max(0, len(products[side]) - what[0]) :]
            yield after, copies, changed(products, side, left), barriers, buffers
