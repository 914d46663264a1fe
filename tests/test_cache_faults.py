"""The plan cache under hostile files, failing calls, concurrent writers and sudden death."""

from __future__ import annotations

import dataclasses
import errno
import multiprocessing
import os
import random
import signal
import socket
import time
import warnings
from pathlib import Path

import pytest
from cache_entries import DATA, ENTRY, ENVIRONMENT, NAME, PROBLEM, planted

from triton_conv3d.problem import Problem
from triton_conv3d.tuning import cache, storage
from triton_conv3d.tuning.cache import PlanCache, decode


@pytest.fixture(autouse=True)
def fresh_warnings(monkeypatch):
    monkeypatch.setattr(storage, "_warned", {})


@pytest.fixture
def directory(tmp_path) -> Path:
    return tmp_path / "home" / "cache"


# The file system


def _link(path: Path, target: Path) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to(target)


def _elsewhere(directory: Path) -> Path:
    path = directory.parent / "elsewhere"
    path.write_bytes(DATA)
    path.chmod(0o600)
    return path


def _replace_directory(directory: Path, make) -> None:
    for file in directory.iterdir():
        file.unlink()
    directory.rmdir()
    make(directory)


def _socket(path: Path) -> None:
    path.unlink()
    old = os.getcwd()
    os.chdir(path.parent)  # a socket's path is short
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(path.name)
    finally:
        os.chdir(old)


def _fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _folder(path: Path, inside: bool = False) -> None:
    path.unlink()
    path.mkdir()
    if inside:
        (path / "x").write_text("x")


def _own_directory_elsewhere(directory: Path) -> Path:
    target = directory.parent / "target"
    target.mkdir(mode=0o700)
    planted(target, DATA)
    return target


# name: (what happens to a cache that holds ENTRY, whether it still loads, whether it can be stored again)
FAULTS = {
    "none": (lambda d, p: None, True, True),
    "file-removed": (lambda d, p: p.unlink(), False, True),
    "file-empty": (lambda d, p: p.write_bytes(b""), False, True),
    "file-of-zeros": (lambda d, p: p.write_bytes(bytes(len(DATA))), False, True),
    "file-half-zeros": (lambda d, p: p.write_bytes(DATA[:300] + bytes(len(DATA) - 300)), False, True),
    "file-twice": (lambda d, p: p.write_bytes(DATA + DATA), False, True),
    "file-too-long": (lambda d, p: p.write_bytes(DATA + b" " * cache.MAX_BYTES), False, True),
    "file-sparse-and-huge": (lambda d, p: os.truncate(p, 2**40), False, True),
    "file-with-crlf": (lambda d, p: p.write_bytes(DATA.replace(b"\n", b"\r\n")), True, True),
    "file-with-bom": (lambda d, p: p.write_bytes(b"\xef\xbb\xbf" + DATA), False, True),
    "file-in-utf16": (lambda d, p: p.write_bytes(DATA.decode().encode("utf-16")), False, True),
    "file-group-writable": (lambda d, p: p.chmod(0o620), False, True),
    "file-world-writable": (lambda d, p: p.chmod(0o602), False, True),
    "file-readable-by-all": (lambda d, p: p.chmod(0o644), True, True),
    "file-read-only": (lambda d, p: p.chmod(0o400), True, True),
    "file-of-the-future": (lambda d, p: os.utime(p, (2**33, 2**33)), True, True),
    "file-with-a-second-name": (lambda d, p: os.link(p, d.parent / "second"), True, True),
    "link-to-an-entry": (lambda d, p: _link(p, _elsewhere(d)), False, True),
    "link-to-a-secret": (lambda d, p: _link(p, Path("/etc/passwd")), False, True),
    "link-to-zeros-without-end": (lambda d, p: _link(p, Path("/dev/zero")), False, True),
    "link-to-nowhere": (lambda d, p: _link(p, d / "nowhere"), False, True),
    "link-to-itself": (lambda d, p: _link(p, p), False, True),
    "link-to-the-directory": (lambda d, p: _link(p, d), False, True),
    "file-is-a-pipe": (lambda d, p: _fifo(p), False, True),
    "file-is-a-socket": (lambda d, p: _socket(p), False, True),
    "file-is-a-directory": (lambda d, p: _folder(p), False, False),
    "file-is-a-full-directory": (lambda d, p: _folder(p, inside=True), False, False),
    "directory-removed": (lambda d, p: _replace_directory(d, lambda d: None), False, True),
    "home-removed": (lambda d, p: _replace_directory(d, lambda d: d.parent.rmdir()), False, True),
    "directory-group-writable": (lambda d, p: d.chmod(0o770), False, False),
    "directory-world-writable": (lambda d, p: d.chmod(0o707), False, False),
    "directory-sticky-like-tmp": (lambda d, p: d.chmod(0o1777), False, False),
    "directory-readable-by-all": (lambda d, p: d.chmod(0o755), True, True),
    "directory-is-a-file": (lambda d, p: _replace_directory(d, lambda d: d.write_bytes(DATA)), False, False),
    "directory-is-a-pipe": (lambda d, p: _replace_directory(d, os.mkfifo), False, False),
    "directory-is-a-link": (lambda d, p: _replace_directory(d, lambda d: d.symlink_to(_own_directory_elsewhere(d))),
                            False, False),
    "directory-is-a-link-to-nowhere": (lambda d, p: _replace_directory(d, lambda d: d.symlink_to("nowhere")),
                                       False, False),
    "home-is-a-file": (lambda d, p: _replace_directory(d, lambda d: (d.parent.rmdir(), d.parent.write_bytes(b""))),
                       False, False),
    "other-files-beside": (lambda d, p: [planted(d, b"x", name) for name in ("a.json", ".json", "x.tmp", "\udcff")],
                           True, True),
    "directories-beside": (lambda d, p: [(d / name).mkdir() for name in ("0" * 64 + ".json", "ab.tmp")], True, True),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_file_system_fault(directory, fault):
    happen, loads, stores = FAULTS[fault]
    PlanCache(directory).store(ENTRY)
    happen(directory, directory / NAME)
    plans = PlanCache(directory)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        assert plans.load(PROBLEM, ENVIRONMENT) == (ENTRY if loads else None)
        assert [entry for _, entry in plans.entries()] == ([ENTRY] if loads else [])
        assert plans.store(ENTRY) is stores
        assert plans.load(PROBLEM, ENVIRONMENT) == (ENTRY if stores else None)
        assert not [path for path in tmp_files(directory) if path.name != "x.tmp" and path.name != "ab.tmp"]
        plans.clear()
        assert plans.load(PROBLEM, ENVIRONMENT) is None
    assert len(seen) <= 2  # one for reading, one for writing
    assert (directory.parent / "elsewhere").exists() == (fault == "link-to-an-entry")


def tmp_files(directory: Path) -> list[Path]:
    return list(directory.glob("*" + storage.TEMPORARY)) if directory.is_dir() else []


@pytest.mark.parametrize("target", ["directory", "file"])
def test_what_another_user_owns_is_refused(directory, monkeypatch, target):
    plans = PlanCache(directory)
    plans.store(ENTRY)
    lstat = os.lstat
    monkeypatch.setattr(os, "geteuid", lambda: os.stat(directory).st_uid + 1)
    if target == "file":  # the directory is said to be ours
        monkeypatch.setattr(os, "lstat", lambda p: os.stat_result([*lstat(p)[:4], os.geteuid(), *lstat(p)[5:10]]))
    with pytest.warns(UserWarning, match="belongs to user"):
        assert plans.load(PROBLEM, ENVIRONMENT) is None


def test_a_platform_without_users_works(directory, monkeypatch):
    for name in ("geteuid", "getuid", "O_NOFOLLOW", "O_CLOEXEC", "O_NONBLOCK"):
        monkeypatch.delattr(os, name, raising=False)
    plans = PlanCache(directory)
    assert plans.store(ENTRY) and plans.load(PROBLEM, ENVIRONMENT) == ENTRY


@pytest.mark.parametrize("path", ["a\0b", "x" * 5000, "a/" * 3000, "\ud800"], ids=["nul", "long", "deep", "surrogate"])
def test_a_directory_that_cannot_exist(tmp_path, path):
    plans = PlanCache(tmp_path / path)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        assert (plans.load(PROBLEM, ENVIRONMENT), plans.store(ENTRY)) == (None, False)
        assert list(plans.entries()) == [] and plans.clear() == 0
    assert 1 <= len(seen) <= 2


ERRNOS = ("EPERM", "ENOENT", "EINTR", "EIO", "ENXIO", "EBADF", "EAGAIN", "ENOMEM", "EACCES", "EBUSY", "EEXIST", "EXDEV",
          "ENODEV", "ENOTDIR", "EISDIR", "EINVAL", "ENFILE", "EMFILE", "EFBIG", "ENOSPC", "EROFS", "EMLINK", "ELOOP",
          "ENAMETOOLONG", "EDQUOT", "ESTALE", "ETIMEDOUT", "ENOSYS")
CALLS = ("open", "read", "write", "close", "fsync", "fstat", "lstat", "mkdir", "replace", "unlink", "listdir",
         "scandir")


def failing(call: str, number: int, after: int):
    """The os function, which fails from its call ``after`` on; a file is closed even so."""
    real, calls = getattr(os, call), iter(range(10**9))

    def function(*args, **kwargs):
        if next(calls) < after:
            return real(*args, **kwargs)
        if call == "close":
            real(*args)
        raise OSError(number, os.strerror(number), "injected")

    return function


def test_there_are_enough_injections():
    assert len(CALLS) * len(ERRNOS) >= 300 and len(FAULTS) >= 28


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("after", [0, 1], ids=["at-once", "later"])
def test_a_failing_call_never_raises(tmp_path, monkeypatch, call, after):
    other = dataclasses.replace(ENTRY, problem=PROBLEM.replace(batch=8).to_dict())
    file = tmp_path / "plans.json"
    PlanCache(tmp_path / "first").store(ENTRY)
    PlanCache(tmp_path / "first").export(file)
    for name in ERRNOS:
        directory = tmp_path / name
        PlanCache(directory).store(ENTRY)
        monkeypatch.setattr(storage, "_warned", {})
        plans = PlanCache(directory)
        with monkeypatch.context() as patch, warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            patch.setattr(os, call, failing(call, getattr(errno, name), after))
            assert plans.load(PROBLEM, ENVIRONMENT) in (ENTRY, None)
            assert plans.store(other) in (True, False)
            assert {entry.problem["batch"] for _, entry in plans.entries()} <= {2, 8}
            assert plans.import_(file).added in (0, 1)
            assert PlanCache(directory / "new").store(other) in (True, False)
            plans.clear() if call in ("listdir", "unlink") else None
        assert len(seen) <= 2, [str(each.message) for each in seen]
        for path in directory.glob("*.json"):  # whatever failed, no damaged file stands there
            decode(path.read_bytes())
        if call != "unlink":
            assert tmp_files(directory) == []
        assert plans.store(other) and plans.load(Problem.from_dict(other.problem), ENVIRONMENT) == other


def test_a_disk_that_fills_up_in_the_middle_keeps_the_old_entry(directory, monkeypatch):
    plans = PlanCache(directory)
    plans.store(ENTRY)
    real = os.write

    def write(descriptor, data):
        if len(data) <= 100:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(descriptor, data[:100])

    with monkeypatch.context() as patch, pytest.warns(UserWarning, match="memory only.*No space left"):
        patch.setattr(os, "write", write)
        assert not plans.store(dataclasses.replace(ENTRY, time_us=1.0))
    assert plans.load(PROBLEM, ENVIRONMENT) == ENTRY and os.listdir(directory) == [NAME]


def test_a_file_is_on_the_disk_before_it_gets_its_name(directory, monkeypatch):
    calls = []
    for name in ("write", "fsync", "close", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *args, name=name, real=real: calls.append(name) or real(*args))
    PlanCache(directory).store(ENTRY)
    assert calls == ["write", "fsync", "close", "replace"]


def test_short_writes_are_continued(directory, monkeypatch):
    real = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: real(descriptor, data[:7]))
    assert PlanCache(directory).store(ENTRY) and PlanCache(directory).load(PROBLEM, ENVIRONMENT) == ENTRY


def test_old_temporary_files_are_swept_and_young_ones_stay(directory):
    old, young = (planted(directory, b"x", c * 32 + storage.TEMPORARY) for c in "ab")
    os.utime(old, (time.time() - 2 * storage.STALE_SECONDS,) * 2)
    PlanCache(directory).store(ENTRY)
    assert (old.exists(), young.exists()) == (False, True)


# Many processes

KEYS = [PROBLEM.replace(batch=n) for n in range(40)]


def _writer(directory: Path, rank: int, barrier, queue) -> None:
    plans, draw = PlanCache(directory), random.Random(rank)
    barrier.wait(60)
    good = True
    for problem in draw.sample(KEYS, len(KEYS)):
        good &= plans.store(dataclasses.replace(ENTRY, problem=problem.to_dict(), time_us=1.0 + rank))
        good &= plans.load(problem, ENVIRONMENT) is not None
    barrier.wait(60)
    found = [plans.load(problem, ENVIRONMENT) for problem in KEYS]
    queue.put((good, [entry.time_us if entry else None for entry in found]))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_sixteen_processes_agree_on_forty_keys(directory):
    context = multiprocessing.get_context("fork")
    barrier, queue = context.Barrier(16), context.SimpleQueue()
    workers = [context.Process(target=_writer, args=(directory, rank, barrier, queue)) for rank in range(16)]
    for worker in workers:
        worker.start()
    results = [queue.get() for _ in workers]
    for worker in workers:
        worker.join(60)
    assert all(good for good, _ in results)
    assert None not in results[0][1] and all(times == results[0][1] for _, times in results)
    assert len(os.listdir(directory)) == 40


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_two_hundred_kills_leave_nothing_damaged(directory):
    draw = random.Random(0)
    entries = [dataclasses.replace(ENTRY, problem=problem.to_dict()) for problem in KEYS[:3]]
    interrupted = 0
    for _ in range(200):
        ready, started = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                plans = PlanCache(directory)
                os.write(started, b"x")
                while True:
                    for entry in entries:
                        plans.store(entry)
            finally:
                os._exit(1)
        os.read(ready, 1)
        time.sleep(draw.random() * 0.003)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(ready), os.close(started)
        for path in directory.glob("*.json") if directory.exists() else ():
            assert decode(path.read_bytes()) in entries
        interrupted += bool(tmp_files(directory))
    assert interrupted  # some died in the middle of writing
    for path in tmp_files(directory):
        os.utime(path, (0, 0))
    assert PlanCache(directory).store(ENTRY) and tmp_files(directory) == []
