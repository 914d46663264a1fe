"""Every setting of the package, read from the environment in this one place.

Each environment variable has a Python twin: a keyword of :func:`configure`. Settings are process-wide (not
thread-local), because torch runs backward passes in threads of its own and they have to follow the same rules.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import sys
from dataclasses import dataclass
from pathlib import Path

logger = logging.getLogger("triton_conv3d")
_PREFIX = "TRITON_CONV3D_"
AUTOTUNE_MODES = ("off", "quick", "full")
FP32_MODES = ("torch", "ieee", "tf32", "tf32x3")
LOG_LEVELS = ("", "plan")


def _default_cache_dir() -> Path | None:
    """The user's cache directory, or None when the process has no home."""
    base = os.environ.get("XDG_CACHE_HOME")
    if base and os.path.isabs(base):
        return Path(base) / "triton_conv3d"
    try:
        return Path.home() / ".cache" / "triton_conv3d"
    except RuntimeError:
        return None


@dataclass(frozen=True)
class Settings:
    """The values in force. Read them with :func:`current`, change them with :func:`configure`."""

    autotune: str = "quick"  # off: ranking only; quick: measure the best few once; full: measure all
    cache_dir: Path | None = None  # where measured plans are kept; None: memory only
    tables: Path | None = None  # a directory of the user's own tables, read before the shipped ones
    engine: str | None = None  # the one engine to use
    strict: bool = False  # raise instead of falling back to torch's own convolution
    log: str = ""  # "plan": one line for every new problem
    fp32: str = "torch"  # precision of float32 products: torch's own switches, or one of FP32_MODES


def _choice(name: str, value: str, allowed: tuple[str, ...]) -> str:
    if value not in allowed:
        raise ValueError(f"{name}={value!r} is not known: expected one of {', '.join(map(repr, allowed))}")
    return value


def _flag(name: str, value: str | int) -> bool:
    if str(value).lower() in ("1", "true", "yes", "on"):
        return True
    if str(value).lower() in ("", "0", "false", "no", "off"):
        return False
    raise ValueError(f"{name}={value!r} is not a switch: expected 1 or 0")


def _directory(name: str, value: str | os.PathLike | None) -> Path | None:
    try:
        return Path(value).expanduser() if value else None
    except RuntimeError:
        raise ValueError(f"{name}={str(value)!r} is no directory: there is no such user, or no home") from None
    except TypeError:
        raise ValueError(f"{name}={value!r} is no directory: expected a path, or None") from None


_PARSERS = {
    "autotune": lambda name, value: _choice(name, value, AUTOTUNE_MODES),
    "cache_dir": _directory,
    "tables": _directory,
    "engine": lambda name, value: value or None,  # engines check the name: settings import nothing
    "strict": _flag,
    "log": lambda name, value: _choice(name, value, LOG_LEVELS),
    "fp32": lambda name, value: _choice(name, value, FP32_MODES),
}


def variable(setting: str) -> str:
    """The environment variable of a setting: ``variable("engine") == "TRITON_CONV3D_ENGINE"``."""
    return _PREFIX + setting.upper()


def given(setting: str) -> str | None:
    """What its environment variable says; None for nothing. Only of the cache's directory an empty one says something."""
    raw = os.environ.get(variable(setting))
    return raw if raw or setting == "cache_dir" else None


def from_environment() -> Settings:
    """Settings as the environment asks for them. Raises ValueError naming the variable, its value and what is allowed."""
    values: dict = {"cache_dir": _default_cache_dir()}
    for name, parse in _PARSERS.items():
        raw = given(name)
        if raw is not None:
            values[name] = parse(variable(name), raw)
    return Settings(**values)


_current: Settings | None = None
_listeners: list = []


def current() -> Settings:
    """The settings in force; the environment is read at the first use."""
    global _current
    if _current is None:
        _current = from_environment()
    return _current


def on_change(listener) -> None:
    """Call ``listener()`` after every change: for whoever keeps something derived from the settings."""
    _listeners.append(listener)


def _install(settings: Settings | None) -> None:
    global _current
    _current = settings
    for listener in _listeners:
        listener()


class configure:
    """Change settings: at once as a call, and back again at the end of a ``with`` block.

    Args:
        **changes: any field of :class:`Settings`; the Python twins of the environment variables.

    Raises:
        TypeError: a setting that does not exist.
        ValueError: a value that the setting does not take.

    >>> with configure(autotune="off"):
    ...     current().autotune
    'off'
    """

    def __init__(self, **changes):
        unknown = sorted(set(changes) - set(_PARSERS))
        if unknown:
            raise TypeError(f"no setting named {', '.join(unknown)}: the settings are {', '.join(_PARSERS)}")
        checked = {name: value if value is None else _PARSERS[name](name, value) for name, value in changes.items()}
        for name in ("autotune", "strict", "log", "fp32"):
            if name in checked and checked[name] is None:
                raise ValueError(f"{name}=None is not a value that this setting takes")
        self._before = current()
        _install(dataclasses.replace(self._before, **checked))

    def __enter__(self) -> Settings:
        return current()

    def __exit__(self, *exc) -> None:
        _install(self._before)


def show(message: str, *args: object) -> None:
    """What the setting ``log`` asked for, on stderr unless the program has handlers of its own."""
    if logger.level == logging.NOTSET:
        logger.setLevel(logging.INFO)
    if not logger.hasHandlers():
        logger.addHandler(logging.StreamHandler(sys.stderr))
    logger.info(message, *args)


def reload() -> Settings:
    """Forget every change made in Python and read the environment again."""
    _install(None)
    return current()
