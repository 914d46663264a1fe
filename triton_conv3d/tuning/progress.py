"""One line on a terminal's stderr for what takes long: tqdm if it is there, else a plain counter."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

_DELAY = 2.0  # seconds before anything is shown


@contextlib.contextmanager
def progress(title: str, total: int) -> Iterator[Callable[[], None]]:
    """``with progress("tuning", 10) as step: ...`` where ``step()`` tells that one of the ten is done."""
    if not (sys.stderr is not None and sys.stderr.isatty()):
        yield lambda: None
        return
    try:
        from tqdm import tqdm
    except ImportError:
        yield from _counter(title, total)
    else:
        with tqdm(total=total, desc=title, delay=_DELAY, leave=False, file=sys.stderr) as bar:
            yield bar.update


def _counter(title: str, total: int) -> Iterator[Callable[[], None]]:
    begin, done, width = time.monotonic(), 0, 0

    def step() -> None:
        nonlocal done, width
        done += 1
        if time.monotonic() - begin > _DELAY:
            line = f"{title}: {done}/{total}"
            width = max(width, len(line))
            print(f"\r{line}", end="", file=sys.stderr, flush=True)

    try:
        yield step
    finally:
        if width:
            print(f"\r{' ' * width}\r", end="", file=sys.stderr, flush=True)
