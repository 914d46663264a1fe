"""What a function costs the host, by a count that is the same on every machine."""

from __future__ import annotations

import sys
from collections.abc import Callable


def calls(function: Callable[[], object]) -> int:
    """Of Python's functions and of C's, however busy the machine is."""
    count = 0

    def see(frame, event: str, of) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(see)
    try:
        function()
    finally:
        sys.setprofile(None)
    return count
