"""How a command of the project ends: its exit status, and one line for what is no fault of the program."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable


def status(command: Callable[[], int | None], name: str, mistakes: tuple[type[Exception], ...] = ()) -> int:
    """Run a command. Its own exit status; 1 if nobody reads on, 2 after a mistake, 130 if it is interrupted or terminated.

    Args:
        name: what the line about a mistake begins with.
        mistakes: exceptions that the user can mend, beside OSError: printed as one line, without a traceback.
    """
    if hasattr(sys.stdout, "reconfigure"):  # it is None where a process is started without one
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files need not be text
    try:
        if threading.current_thread() is threading.main_thread():  # so that a time limit is no different from Ctrl-C
            signal.signal(signal.SIGTERM, signal.default_int_handler)
        ended = command() or 0
        if sys.stdout is not None:
            sys.stdout.flush()
        return ended
    except BrokenPipeError:  # the reader has seen enough, as `head` does
        return 1
    except (OSError, *mistakes) as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    finally:
        _give_up_what_cannot_be_written()


def _give_up_what_cannot_be_written() -> None:
    """Or it would be tried again, and complained about, at exit."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
