"""Files that may be damaged, foreign or hostile: strict JSON, checked reads and atomic writes. Nothing here locks."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import secrets
import stat
import time
import warnings
from pathlib import Path
from typing import Any

TEMPORARY = ".tmp"
STALE_SECONDS = 3600  # no write takes an hour: an older temporary file was left by a process that died
_BITS = 63
_warned: dict[str, object] = {}


def warn_once(kind: str, message: str) -> None:
    """A UserWarning, the first time in this process that this kind occurs. Needs no lock: setdefault is atomic."""
    ours = object()
    if _warned.setdefault(kind, ours) is ours:
        warnings.warn(f"triton_conv3d: {message}", UserWarning, stacklevel=3)


# JSON


def canonical(value: Any) -> str:
    """The one spelling of a plain value: strictly equal values (True is not 1, nor 1.0) and no others share it."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def parse(data: bytes) -> Any:
    """Strict JSON in UTF-8. Raises ValueError, and nothing else; also for duplicate names, huge or infinite numbers."""
    try:
        return json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_unique,
            parse_int=_integer,
            parse_float=_finite,
            parse_constant=_refuse,
        )
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError("a name occurs twice")
    return values


def _integer(digits: str) -> int:
    if len(digits) > 20 or int(digits).bit_length() > _BITS:
        raise ValueError(f"an integer beyond {_BITS} bits")
    return int(digits)


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError("a number that is not finite")
    return value


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is not a number")


# Files


def foreign(status: os.stat_result) -> str | None:
    """Why a file or directory may not be trusted; None if only this user can have written it, or nobody can tell."""
    if not hasattr(os, "geteuid"):
        return None
    if status.st_uid != os.geteuid():
        return f"it belongs to user {status.st_uid}"
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return f"others may write to it (mode {stat.S_IMODE(status.st_mode):04o})"
    return None


def make_directory(directory: Path) -> None:
    """Create a directory, and what leads to it, for this user only. Raises OSError."""
    try:
        os.mkdir(directory, 0o700)
    except FileExistsError:
        pass
    except FileNotFoundError:
        if directory.parent == directory:
            raise
        make_directory(directory.parent)
        try:
            os.mkdir(directory, 0o700)
        except FileExistsError:  # another process was faster
            pass


def check_directory(directory: Path) -> None:
    """Raises PermissionError for a directory that is a link or that others can write to; OSError if it is missing."""
    status = os.lstat(directory)
    reason = "it is not a directory" if not stat.S_ISDIR(status.st_mode) else foreign(status)
    if reason:
        raise PermissionError(errno.EACCES, reason, str(directory))


def listed(directory: Path | None, pattern: re.Pattern) -> list[Path]:
    """Files of these names, in order; none of a directory that is not there or not to be trusted."""
    if directory is None:
        return []
    try:
        check_directory(directory)
        return sorted(Path(directory, name) for name in os.listdir(directory) if pattern.fullmatch(name))
    except (OSError, ValueError):  # ValueError: no directory can have this name
        return []


def read(path: str | os.PathLike, limit: int, private: bool) -> bytes:
    """The bytes of a regular file.

    Args:
        limit: bytes; a longer file is refused.
        private: refuse links and files that another user can have written.

    Raises:
        OSError: it cannot be read. ValueError: it is not to be read; the message says why.
    """
    flags = os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0)
    if private:
        flags |= getattr(os, "O_NOFOLLOW", 0)
    descriptor = os.open(path, flags)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("not a regular file")
        reason = foreign(status) if private else None
        if reason:
            raise ValueError(reason)
        chunks, left = [], limit + 1
        while left and (chunk := os.read(descriptor, min(left, 1 << 20))):
            chunks.append(chunk)
            left -= len(chunk)
        if not left:
            raise ValueError(f"longer than {limit} bytes")
        return b"".join(chunks)
    finally:
        os.close(descriptor)


def write(path: Path, data: bytes, durable: bool = True) -> None:
    """Put a whole file in place at once, mode 0600: readers see the old one or the new one; durable: even if the machine
    stops. Raises OSError."""
    temporary = path.with_name(secrets.token_hex(16) + TEMPORARY)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
    try:
        descriptor = os.open(temporary, flags | getattr(os, "O_NOFOLLOW", 0), 0o600)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None
    try:
        try:
            rest = memoryview(data)
            while rest:
                written = os.write(descriptor, rest)
                if written <= 0:
                    raise OSError(errno.EIO, "nothing was written", str(temporary))
                rest = rest[written:]
            if durable:
                os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.replace(temporary, path)
    except BaseException:
        discard(temporary)
        raise


def keep(path: Path, data: bytes, durable: bool = True) -> None:
    """:func:`write`, in a directory that is made for it, and is this user's alone. Raises OSError."""
    make_directory(path.parent)
    check_directory(path.parent)
    write(path, data, durable)


def discard(path: str | os.PathLike) -> bool:
    """Remove a file if that is possible."""
    try:
        os.unlink(path)
    except OSError:
        return False
    return True


def sweep(directory: Path) -> None:
    """Remove the temporary files of writers that died. Raises OSError if the directory cannot be listed."""
    oldest = time.time() - STALE_SECONDS
    with os.scandir(directory) as files:
        for file in files:
            if file.name.endswith(TEMPORARY) and file.stat(follow_symlinks=False).st_mtime < oldest:
                discard(file.path)
